"""Every family that mlx-lm has: a tiny model of each, what the cache makes of it, and what is known so far."""
