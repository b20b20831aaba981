"""The connector-level channel between instances: pyzmq sockets that carry protocol/messages.py, nothing else.

`server.py` is P's one listener (in the scheduler process), `client.py` what D's scheduler and workers speak through.
Neither knows what a message means.
"""
