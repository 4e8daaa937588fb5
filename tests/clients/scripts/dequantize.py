"""Weights out of a GGUF file: `dequantize.py OUT PART...`, in an environment that has the `gguf` package.

Writes OUT/weights.npz, in float16 under the file's own names, and OUT/fields.json.
"""

import json
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

out, parts = Path(sys.argv[1]), [Path(part) for part in sys.argv[2:]]
whole = out / "whole.gguf"
with whole.open("wb") as file:
    for part in parts:
        file.write(part.read_bytes())
reader = GGUFReader(whole)
fields = {name: field.contents() for name, field in reader.fields.items()}
(out / "fields.json").write_text(json.dumps(fields), encoding="utf-8")
weights = {
    each.name: dequantize(each.data, each.tensor_type).astype(np.float16) for each in reader.tensors
}
np.savez(out / "weights.npz", **weights)
whole.unlink()
