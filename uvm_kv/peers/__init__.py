"""Other engines on the same requests."""
