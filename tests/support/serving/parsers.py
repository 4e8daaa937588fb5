"""The command lines of mlx_lm.server and of ours."""

from __future__ import annotations

import argparse
from typing import Any

import mlx_lm
import mlx_lm.server
import pytest


def their_parser() -> argparse.ArgumentParser:
    """mlx_lm.server's own, caught in its `main`."""
    caught: list[argparse.ArgumentParser] = []

    class Caught(Exception):  # noqa: N818  # it ends `main`, nothing went wrong
        pass

    def catch(self: argparse.ArgumentParser, *args: Any) -> None:
        caught.append(self)
        raise Caught

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        with pytest.raises(Caught):
            mlx_lm.server.main()
    return caught[0]


def our_parser() -> argparse.ArgumentParser:
    """Ours."""
    from mlx_hybridcache_server.settings import build_parser

    return build_parser("mlx_hybridcache.server")


def flags_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {
        option: action
        for action in parser._actions
        for option in action.option_strings
        if option not in ("-h", "--help")
    }
