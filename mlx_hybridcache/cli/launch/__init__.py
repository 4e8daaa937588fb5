"""The command `mlx-hybridcache launch`."""
