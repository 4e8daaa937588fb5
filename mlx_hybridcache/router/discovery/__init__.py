"""Finding experts that are one: calibration tokens, experts run on their own, agreement, groups."""
