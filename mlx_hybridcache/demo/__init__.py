"""The bundled model, and the demo that asks a server about a long text with it."""

from pathlib import Path

BUNDLED_MODEL = Path(__file__).parent / "model"
"""A small Qwen3-Next; its card is in the folder, how it was made in `tools/bundled_model` of the sources."""
