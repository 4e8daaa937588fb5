"""A cache directory: segments of rows and of states in files, and an index that spares opening them."""
