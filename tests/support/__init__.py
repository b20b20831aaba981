"""Real servers, clients and readings for the end-to-end tests."""
