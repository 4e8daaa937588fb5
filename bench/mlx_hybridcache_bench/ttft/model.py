"""What model was measured, as far as its files say it: name, kind, quantization, bytes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mlx_hybridcache.demo import BUNDLED_MODEL

GGUF_TYPE = re.compile(
    r"(?:^|[-._])((?:UD-)?I?Q\d\w*|BF16|F16|F32|MXFP4\w*)(?=[-._])", re.IGNORECASE
)
"""How llama.cpp's quantizations are written in the names of files."""


def describe(model: str) -> dict[str, Any]:
    """A directory in the format of mlx-lm, by its name alone where it is none yet."""
    path = Path(model)
    if not path.is_dir():
        return {"name": model}
    bundled = path.resolve() == BUNDLED_MODEL.resolve()
    found: dict[str, Any] = {"name": "the bundled model" if bundled else path.resolve().name}
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return found
    text = config.get("text_config") or config
    found["type"] = config.get("model_type", "")
    found["layers"] = text.get("num_hidden_layers")
    found["quantization"] = _quantization(config, text)
    found["bytes"] = sum(each.stat().st_size for each in path.glob("*.safetensors"))
    return found


def describe_gguf(path: Path) -> dict[str, Any]:
    """A GGUF file, all its parts if it is one of several."""
    part = re.sub(r"-\d{5}-of-(\d{5})$", r"-*-of-\1", path.stem)
    told = GGUF_TYPE.search(path.name)
    return {
        "name": path.name,
        "type": "gguf",
        "quantization": told[1] if told else "",
        "bytes": sum(each.stat().st_size for each in path.parent.glob(f"{part}.gguf")),
    }


def _quantization(config: dict[str, Any], text: dict[str, Any]) -> str:
    told = config.get("quantization") or config.get("quantization_config") or {}
    if "bits" in told:
        return f"{told['bits']} bits, groups of {told.get('group_size', '?')}"
    return str(text.get("dtype") or text.get("torch_dtype") or "")
