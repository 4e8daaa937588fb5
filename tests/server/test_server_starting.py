"""What cannot be served ends the start with one line, and one line says where it listens."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from servers import (
    OURS,
    run_to_its_end,
)


def test_what_cannot_be_served_ends_the_start_with_one_line(tmp_path):
    """Unknown model, port in use, nonsense: exit status 2, a sentence, no traceback."""
    with socket.create_server(("127.0.0.1", 0)) as taken, ThreadPoolExecutor(2) as both:
        port = str(taken.getsockname()[1])
        refused = {
            port: ["--port", port],
            "nothing": ["--port", "0", "--model", str(tmp_path / "nothing")],
            "nobody/has-this": ["--port", "0", "--model", "nobody/has-this"],
            "--adapter-path": ["--adapter-path", str(tmp_path)],
        }
        all_ended = both.map(
            lambda flags: run_to_its_end("--log-level", "ERROR", *flags), refused.values()
        )
        for said, ended in zip(refused, all_ended, strict=True):
            assert ended.returncode == 2, ended
            assert ended.stdout == ""
            (line,) = ended.stderr.splitlines()
            assert line.startswith("mlx_hybridcache.server: ")
            assert said in line


def test_both_entry_points_know_the_same_flags():
    """`mlx-hybridcache serve --help` and `python -m mlx_hybridcache.server --help`."""
    helps = [
        subprocess.run(
            [sys.executable, "-m", *entry, "--help"], capture_output=True, text=True, check=True
        ).stdout
        for entry in (["mlx_hybridcache.cli", "serve"], [OURS])
    ]
    flags = [set(re.findall(r"--[a-z][a-z-]+", shown)) for shown in helps]
    assert flags[0] == flags[1]
    assert "--model" in flags[0]


def test_one_line_says_where_it_listens(server):
    """`Listening on http://127.0.0.1:PORT`, once."""
    assert server.log.count(f"Listening on http://127.0.0.1:{server.port}") == 1
