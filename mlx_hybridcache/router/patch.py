"""A patch: which experts of which layers are one, frozen, with what it takes to know its model again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import RouterError, refusal

FORMAT = "mlx-hybridcache router patch"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Group:
    """Experts that compute the same function, as far as calibration could tell."""

    members: tuple[int, ...]  # ascending, at least two
    representative: int  # the member whose row all get
    cap: int  # most members that one token may take: the most it took at calibration


@dataclass(frozen=True, slots=True)
class RouterTensor:
    """One router tensor, known by its bytes: row-major, as in a safetensors file."""

    name: str
    shape: tuple[int, ...]
    before: str  # digest of the original's bytes
    after: str  # digest once every group's rows are equal


@dataclass(frozen=True, slots=True)
class LayerPatch:
    """The groups of one layer and the tensors they change."""

    name: str  # of the block, as its parameters' names begin
    experts: int
    top_k: int
    groups: tuple[Group, ...]
    tensors: tuple[RouterTensor, ...]

    @property
    def members(self) -> int:
        """How many experts are in groups."""
        return sum(len(group.members) for group in self.groups)


@dataclass(frozen=True)
class Patch:
    """What to change in a model. It holds no weights: rows are copied from the model's own.

    `model` is the fingerprint of everything but the router tensors, which are known one by one, by
    what they were and what they become. So a patch fits its model before and after it was applied.
    """

    model: str
    method: str
    layers: tuple[LayerPatch, ...]  # every MoE layer, those without groups too

    @property
    def groups(self) -> int:
        """How many groups there are in all layers."""
        return sum(len(layer.groups) for layer in self.layers)

    @property
    def experts(self) -> int:
        """How many experts all layers have."""
        return sum(layer.experts for layer in self.layers)

    @property
    def members(self) -> int:
        """How many experts are in groups."""
        return sum(layer.members for layer in self.layers)

    @property
    def coverage(self) -> float:
        """Share of all experts that are in groups."""
        return self.members / self.experts if self.experts else 0.0

    @cached_property
    def digest(self) -> str:
        """A short name for this patch; equal for equal patches."""
        return rows_digest(json.dumps(asdict(self), sort_keys=True).encode())

    def save(self, path: Path) -> None:
        """Write it as JSON. Raises `OSError` as writing a file does."""
        text = json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Patch:
        """Read a patch that `save` wrote. Raises `RouterError` for anything else."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            why = refusal(error) if isinstance(error, OSError) else f"{error}."
            raise RouterError(f"{path} cannot be read as a router patch: {why}") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise RouterError(
                f"{path} is no router patch. `mlx-hybridcache canonicalize` writes one."
            )
        if found.get("version") != VERSION:
            raise RouterError(
                f"{path} is a router patch of version {found.get('version')}; this version reads "
                f"{VERSION}. Make it again with `mlx-hybridcache canonicalize`."
            )
        try:
            return cls(
                str(found["model"]), str(found["method"]), tuple(map(_layer, found["layers"]))
            )
        except (KeyError, TypeError, ValueError) as error:
            raise RouterError(f"{path} is a damaged router patch: {error!r}.") from error


def _layer(found: Mapping[str, Any]) -> LayerPatch:
    experts, top_k = int(found["experts"]), int(found["top_k"])
    groups = tuple(
        Group(tuple(map(int, g["members"])), int(g["representative"]), int(g["cap"]))
        for g in found["groups"]
    )
    used: set[int] = set()
    for group in groups:
        members = group.members
        fits = (
            len(members) > 1
            and sorted(set(members)) == list(members)
            and members[0] >= 0
            and members[-1] < experts
            and not used & set(members)
            and group.representative in members
            and 1 <= group.cap <= len(members)
        )
        if not fits:
            raise ValueError(f"{found['name']}: {group} means nothing among {experts} experts")
        used |= set(members)
    tensors = tuple(
        RouterTensor(str(t["name"]), tuple(map(int, t["shape"])), str(t["before"]), str(t["after"]))
        for t in found["tensors"]
    )
    return LayerPatch(str(found["name"]), experts, top_k, groups, tensors)


def rows_digest(data: bytes | memoryview) -> str:
    """What a router tensor, or a patch, is known by: a digest of its bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def copied_rows(data: bytes | memoryview, experts: int, groups: tuple[Group, ...]) -> bytes:
    """A router tensor's bytes with every member's row replaced by its representative's.

    Works on bytes, so that it is the same for every dtype, in a file and in memory, and so that
    applying it twice changes nothing.
    """
    changed = bytearray(data)
    row = len(changed) // experts
    for group in groups:
        source = changed[group.representative * row : (group.representative + 1) * row]
        for member in group.members:
            changed[member * row : (member + 1) * row] = source
    return bytes(changed)


def differing_rows(before: bytes, after: bytes, experts: int) -> set[int]:
    """Experts whose row is not the same in both."""
    row = len(before) // experts
    return {
        i
        for i in range(experts)
        if before[i * row : (i + 1) * row] != after[i * row : (i + 1) * row]
    }
