"""What each extra installs, on Linux and on a Mac, as a resolver sees it: asks a package registry."""

import os
import subprocess

import pytest
from checkout.client_environments import environment
from places import ROOT

pytestmark = [pytest.mark.clients, pytest.mark.timeout(1800)]

MAC = {"mlx", "mlx-lm", "mlx-metal"}
EXPECTED = {
    ("x86_64-manylinux_2_35", "cpu"): {"mlx", "mlx-lm", "mlx-cpu"},
    ("x86_64-manylinux_2_35", "cuda12"): {"mlx", "mlx-lm", "mlx-cuda-12"},
    ("x86_64-manylinux_2_35", "cuda13"): {"mlx", "mlx-lm", "mlx-cuda-13"},
    ("aarch64-apple-darwin", "cpu"): MAC,
    ("aarch64-apple-darwin", "cuda12"): MAC,
    ("aarch64-apple-darwin", "cuda13"): MAC,
}
"""The platform and the extra, with all packages whose names begin with `mlx`."""


@pytest.mark.parametrize(("platform", "extra"), EXPECTED, ids=" ".join)
def test_each_extra_brings_one_backend_and_none_to_a_mac(platform, extra, request):
    """`uv pip compile` for the platform; on a Mac nothing of NVIDIA's either."""
    uv = environment("uv", request.config.cache.mkdir("clients")).command("uv")
    done = subprocess.run(
        [
            *(uv, "pip", "compile", "-q", "--no-header", "--no-annotate", ROOT / "pyproject.toml"),
            *("--extra", extra, "--python-platform", platform, "--python-version", "3.12"),
        ],
        env={**os.environ, "MACOSX_DEPLOYMENT_TARGET": "14.0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    names = {line.split("==")[0] for line in done.stdout.splitlines()}
    assert {name for name in names if name.startswith("mlx")} == EXPECTED[platform, extra]
    assert any(name.startswith("nvidia-") for name in names) is (
        "linux" in platform and extra != "cpu"
    )
