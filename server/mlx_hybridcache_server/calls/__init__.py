"""What a model wrote as calls of tools, read while it is written."""
