#!/bin/sh
# mlx 0.32.4 on Linux: its three backends, mlx-cpu, mlx-cuda-12 and mlx-cuda-13, are packages of their own that all install
# the same mlx/lib/libmlx.so, and nothing in their metadata says that they exclude each other.
#
# `pip install "mlx[cpu]" "mlx[cuda13]"`, or two packages of which one names the one and one the other, is resolved and
# installed without a word: `pip check` names no conflict, and the backend that was unpacked last computes. Whoever
# removes the one that is not wanted removes the file of both: the other is still listed as installed, `pip install` of
# it says that it is satisfied, and `import mlx.core` fails until it is installed with --force-reinstall.
#
# Seen: with mlx-cpu 0.32.4 and then mlx-cuda-13 0.32.4, both RECORDs name the file, and it has the bytes that the RECORD of
# the second one gives; `pip check` names no conflict of the two. After `pip uninstall mlx-cuda-13` mlx-cpu is listed, `pip install mlx-cpu==0.32.4` changes
# nothing, and importing mlx.core raises ImportError naming libmlx.so; --force-reinstall mends it.
#
# Not part of CI: it installs packages (90 MB; no GPU is needed, as nothing computes). Exits with 1 when what it sees has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" --disable-pip-version-check "$@"; }
pip install --quiet "mlx[cpu]==0.32.4"
pip install --quiet --no-deps "mlx-cuda-13==0.32.4"

echo "both installed:"
"$folder/venv/bin/python" - <<'PYTHON'
import base64
import hashlib
from importlib.metadata import distribution

FILE = "mlx/lib/libmlx.so"
recorded = {}
for name in ("mlx-cpu", "mlx-cuda-13"):
    (entry,) = (file for file in distribution(name).files if str(file) == FILE)
    recorded[name] = entry.hash.value
    path = entry.locate()
digest = hashlib.sha256(path.read_bytes()).digest()
there = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
owners = [name for name, value in recorded.items() if value == there]
print(f"  {FILE} is in the RECORDs of {' and '.join(recorded)}; its bytes are those of {owners}")
assert owners == ["mlx-cuda-13"], owners
PYTHON
pip check >"$folder/checked" || true # it misses the GPU's own libraries, which were not asked for
if grep -v "requires nvidia-" "$folder/checked" | grep "mlx-"; then exit 1; fi
echo "  pip check names no conflict between the two"

pip uninstall --quiet --yes mlx-cuda-13
echo "mlx-cuda-13 removed:"
pip show --quiet mlx-cpu
pip install "mlx-cpu==0.32.4" | grep -q "already satisfied"
if "$folder/venv/bin/python" -c "import mlx.core" 2>"$folder/said"; then exit 1; fi
grep -q "ImportError.*libmlx.so" "$folder/said"
echo "  mlx-cpu counts as installed; importing mlx.core: $(tail -n 1 "$folder/said")"

pip install --quiet --no-deps --force-reinstall "mlx-cpu==0.32.4"
"$folder/venv/bin/python" -c "import mlx.core as mx; mx.eval(mx.ones(2) + 1)"
echo "  installed anew by force, it computes"
echo "as seen with mlx 0.32.4"
