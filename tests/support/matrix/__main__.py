"""Try families anew and write down what came of it: `PYTHONPATH=.:tests/support python -m matrix [FAMILY ...]`.

Without a name: all that mlx-lm has.
"""

import sys
import tempfile
from pathlib import Path

from matrix import journeys, page, shapes

known = page.load() if page.KEPT.exists() else {}
for family in sys.argv[1:] or shapes.modules():
    with tempfile.TemporaryDirectory() as folder:
        known[family] = journeys.examine(family, Path(folder), tuple(journeys.DTYPES))
    print(family, known[family].refused or "as mlx-lm")
page.save(known[family] for family in known if family in shapes.modules())
