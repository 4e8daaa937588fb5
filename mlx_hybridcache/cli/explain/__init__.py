"""The command `mlx-hybridcache explain`."""
