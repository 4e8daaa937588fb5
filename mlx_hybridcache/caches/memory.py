"""What the memory tier keeps: rows of its own or of a running request's, and checkpoints, both of MLX arrays."""

from __future__ import annotations

from typing import TypeAlias

from ..store.lazy_rows import LazyRows
from ..store.match import Found
from ..store.materialize import Materializer
from ..store.store import Store
from ..store.tree import Node
from .checkpoint import Checkpoint
from .kinds.rows import RowBlock

MemoryRows: TypeAlias = RowBlock | LazyRows[RowBlock]
MemoryNode: TypeAlias = Node[MemoryRows, Checkpoint]
MemoryFound: TypeAlias = Found[MemoryRows, Checkpoint]
MemoryStore: TypeAlias = Store[MemoryRows, Checkpoint]
MemoryMaterializer: TypeAlias = Materializer[RowBlock, Checkpoint]
