"""The one thread that calls MLX, its queue, and whose turn it is."""
