"""The bundled model under a strict chat template: what lenient templates forgive, it refuses."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import mlx_lm

from mlx_hybridcache.demo import BUNDLED_MODEL

TEMPLATE = Path(__file__).with_name("strict_template.jinja")


@cache
def directory() -> Path:
    """A model directory that `--model` takes: the bundled files beside the strict template."""
    made = Path(tempfile.mkdtemp(prefix="strict-")) / "strict-model"
    made.mkdir()
    for file in BUNDLED_MODEL.iterdir():
        if file.name != "chat_template.jinja":
            (made / file.name).symlink_to(file)
    (made / "chat_template.jinja").write_text(TEMPLATE.read_text())
    return made


@cache
def load() -> tuple[Any, Any]:
    """Model and tokenizer, by plain `mlx_lm.load`; calls are written as Qwen3-Coder writes them."""
    return mlx_lm.load(str(directory()))[:2]
