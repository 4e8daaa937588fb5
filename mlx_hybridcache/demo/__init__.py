"""The bundled model, how it was made, and the demo that reads a long text with it."""

from pathlib import Path

BUNDLED_MODEL = Path(__file__).parent / "model"
"""A small Qwen3-Next, trained by the scripts beside it; its card is in the folder."""
