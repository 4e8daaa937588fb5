"""Measurements of mlx_hybridcache: what it costs, and what it saves. Run as `mlx-hybridcache bench`."""
