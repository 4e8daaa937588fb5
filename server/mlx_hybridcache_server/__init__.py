"""An OpenAI-compatible server over `mlx_hybridcache`, a drop-in for `mlx_lm.server`."""
