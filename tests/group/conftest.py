"""A server of one machine, to compare with."""

import pytest
from servers import OURS, running


@pytest.fixture(scope="session")
def process():
    with running(OURS) as server:
        yield server
