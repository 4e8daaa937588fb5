"""Quantized rows: mlx-lm's own arithmetic on them, begun at one exact position."""
