"""What crosses instances, as typed and bounded values: request parameters, geometry, side-channel messages."""
