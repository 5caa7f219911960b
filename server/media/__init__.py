"""What a client's pictures may be and where they may come from."""
