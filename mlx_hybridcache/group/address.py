"""Where the other ranks reach rank 0, beside MLX's own group: as the launcher told them, or as this machine calls itself."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
from pathlib import Path

import mlx.core as mx

from ..errors import GroupError

MOST_NAME = 64
"""Letters of an address."""

NAMED = "MLX_HYBRIDCACHE_RANK_0"
"""The variable that names the address where no launcher does, as with MPI."""


def address_of_rank_0(ranks: mx.distributed.Group) -> str:
    """Every rank asks at the same time; only rank 0 needs the answer.

    Raises `GroupError` on rank 0 where it is not known.
    """
    if (hosts := os.environ.get("MLX_HOSTFILE")) is not None:
        first: str = json.loads(Path(hosts).read_text(encoding="utf-8"))[0][0]
        return _without_port(first)
    if (coordinator := os.environ.get("MLX_JACCL_COORDINATOR")) is not None:
        return _without_port(coordinator)
    is_one_machine = _is_one_machine(ranks)
    if (named := os.environ.get(NAMED)) is not None:
        return _checked(named)
    return "127.0.0.1" if is_one_machine or ranks.rank() else _own()


def _checked(named: str) -> str:
    if not 0 < len(named) <= MOST_NAME or not named.isascii():
        raise GroupError(f"{NAMED} is {named!r}; an address has at most {MOST_NAME} letters.")
    return named


def _without_port(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")


def _is_one_machine(ranks: mx.distributed.Group) -> bool:
    """Whether all ranks are on the same one, by its name."""
    name = hashlib.blake2b(platform.node().encode(), digest_size=7).digest()
    names = mx.distributed.all_gather(mx.array([int.from_bytes(name)]), group=ranks)
    return bool(mx.all(names == names[0]).item())


def _own() -> str:
    """This machine's address by its own name, if others can reach that."""
    name = socket.gethostname()
    try:
        found = socket.gethostbyname(name)
    except OSError:
        found = ""
    if not found or found.startswith("127."):
        raise GroupError(
            f"How the other machines reach this one is not known: {name} is {found or 'no address'} here. Set "
            f"{NAMED} to an address of rank 0's that they reach."
        )
    return found
