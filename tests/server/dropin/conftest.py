"""Both servers over the bundled model."""

from __future__ import annotations

import pytest
from servers import (
    THEIRS,
    running,
)


@pytest.fixture(scope="module")
def ours(server):
    return server


@pytest.fixture(scope="session")
def their_process():
    with running(THEIRS) as server:
        yield server


@pytest.fixture
def theirs(their_process):
    """Started again when the test before ended it."""
    their_process.revive()
    return their_process
