#!/bin/sh
# transformers 5.24.0: importing the package reads the source of every model it has, and asking it for a tokenizer reads all of them
# again, although its modules are loaded lazily and none of these is imported. To know which names the files define it looks for their
# `__all__` as text. What was found is remembered by the path it was asked for, and the package asks for the folder `models`, that
# folder for the file `models/__init__.py`, which means the same.
#
# Found by an audit hook on a server that loads only a tokenizer: 1,693 files, 36 million characters, each twice, and to look at the last
# lines of each the whole of it is split into lines. Of 1.1 s of processor time until a server was up 0.5 went there.
#
# Not part of CI: it installs packages. Exits with 1 when what it sees has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "transformers==5.24.0"
"$folder/venv/bin/python" - <<'PYTHON'
import os
import sys
from collections import Counter

reads, MODELS = Counter(), os.path.join("transformers", "models", "")


def opened(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and MODELS in arguments[0] and arguments[0].endswith(".py"):
        reads[arguments[0]] += 1


sys.addaudithook(opened)
import transformers

first = dict(reads)
from transformers import AutoTokenizer

files = {path for path in reads if os.path.basename(path) != "__init__.py"}
loaded = {module.__file__ for name, module in sys.modules.items() if name.startswith("transformers.models.")}
unused = files - loaded
once = sum(first.get(path) == 1 for path in unused)
twice = sum(reads[path] >= 2 for path in unused)
size = sum(os.path.getsize(path) for path in unused)
print(f"transformers {transformers.__version__}: {len(unused):,} files of models that were not imported, {size / 1e6:.0f} MB")
print(f"read by `import transformers`: {once:,}; again for {AutoTokenizer.__name__}: {twice:,}")
as_seen = len(unused) > 1000 and once == twice == len(unused)
print("as seen" if as_seen else "CHANGED: they are not all read twice any more")
sys.exit(not as_seen)
PYTHON
