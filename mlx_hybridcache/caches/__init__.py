"""All that touches mlx-lm's cache arrays: layouts, checkpoints, capture, and the caches of running requests."""
