"""What finding a patch and trying it take where nobody says otherwise: known before MLX is loaded."""

AUTO = "auto"
"""Names the patch in the model's directory, or else one that is looked for now."""

ROWS = 32
"""Rows of calibration tokens; every second one is held out."""

ROW_TOKENS = 256

RELATIVE_ERROR = 0.05
"""Threshold of `outputs`: largest relative error at the 95th percentile."""

SIMILARITY = 0.7
"""Threshold of `scores`, as published: smallest cosine of two experts' scores over tokens."""

MIN_TOKENS = 8
"""Held-out tokens that must be routed to an expert; with fewer it is left alone."""

TEXTS = 20
"""Texts that a patch is tried on; none of them was calibrated with."""
