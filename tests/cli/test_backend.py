"""What is said where MLX has no backend, lacks the driver of the one it has, or has several."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_hybridcache import BackendError, HybridCacheError, backend

LOADERS = {
    "none": "libmlx.so: cannot open shared object file: No such file or directory",
    "no driver": "libcuda.so.1: cannot open shared object file: No such file or directory",
}
"""What Python's loader says of `mlx.core` then."""

HIDES_BACKENDS = """
import importlib.metadata as metadata
found = metadata.distribution
def distribution(name):
    if name in ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13"):
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.distribution = distribution
"""
"""A `sitecustomize`: this environment has a backend."""

COMMANDS = [
    ["-m", "mlx_hybridcache.cli", "verify"],
    ["-m", "mlx_hybridcache.cli", "bench", "decode"],
    ["-m", "mlx_hybridcache.server"],
    ["-c", "from mlx_hybridcache import HybridPromptCache"],
]


def package_of(folder: Path, name: str) -> None:
    """A distribution that is installed in `folder`, as far as its metadata tells."""
    told = folder / f"{name.replace('-', '_')}-0.32.4.dist-info"
    told.mkdir(parents=True)
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.32.4\n")


@pytest.fixture
def only_these(monkeypatch, tmp_path):
    """Nothing is installed but what the test puts here."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    backend.say_if_several.cache_clear()
    yield tmp_path
    backend.say_if_several.cache_clear()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("why", LOADERS)
def test_a_start_without_a_backend_says_which_to_install(command, why, tmp_path):
    """One sentence, exit status 2; the library raises it as an error of both kinds."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()
    (tmp_path / "mlx" / "core.py").write_text(f"raise ImportError({LOADERS[why]!r}, name='core')")
    (tmp_path / "sitecustomize.py").write_text(HIDES_BACKENDS)
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    said = done.stderr.splitlines()[-1]
    assert 'pip install "mlx-hybridcache[cpu]"' in said
    assert ("cuda13" in said) is (why == "none")
    if command[0] == "-c":
        assert "mlx_hybridcache.errors.BackendError: " in said
    else:
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


LACKING = {
    "libmlx.so: cannot open shared object file": ["mlx-cuda-13"],
    "libnccl.so.2: cannot open shared object file": ["mlx-cpu", "mlx-cuda-13"],
}
"""What of several is left when one was taken away, and a backend without what it needs."""


@pytest.mark.parametrize("text", LACKING)
def test_a_backend_that_is_not_whole_is_to_be_installed_anew(text, only_these):
    """Both steps, with all names: pip alone would say that it is there."""
    for name in LACKING[text]:
        package_of(only_these, name)
    with pytest.raises(BackendError) as caught, backend.explaining():
        raise ImportError(text, name="core", path="/lib/mlx/core.so")
    assert f"pip uninstall {' '.join(LACKING[text])}, then" in str(caught.value)
    assert 'pip install "mlx-hybridcache[cuda13]"' in str(caught.value)


def test_its_error_is_an_import_error_too(only_these):
    """Whoever guards an import of MLX catches it as before."""
    assert issubclass(BackendError, HybridCacheError)
    assert issubclass(BackendError, ImportError)
    with pytest.raises(BackendError, match="cuda12"), backend.explaining():
        raise ImportError(LOADERS["none"])


def test_other_packages_are_missed_under_their_own_names():
    with pytest.raises(ModuleNotFoundError, match="matplotlib"), backend.explaining():
        raise ModuleNotFoundError("No module named 'matplotlib'")


@pytest.mark.parametrize("name", backend.EXTRAS)
def test_of_one_backend_nothing_is_said(name, only_these, caplog):
    package_of(only_these, name)
    package_of(only_these, "mlx")
    backend.say_if_several()
    assert backend.installed() == [name]
    assert caplog.records == []


def test_of_two_backends_both_are_named_once(only_these, caplog):
    """With how to keep one of them."""
    for name in ("mlx-cpu", "mlx-cuda-13"):
        package_of(only_these, name)
    backend.say_if_several()
    backend.say_if_several()
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith("mlx-cpu and mlx-cuda-13 are installed")
    assert "pip uninstall mlx-cpu mlx-cuda-13" in said
    assert '"mlx-hybridcache[cuda13]"' in said
