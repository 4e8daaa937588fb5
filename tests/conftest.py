"""The order of the suite: the longest file first, so that no worker is left with it at the end."""

import pytest

LONGEST = "test_state_machine.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files are handed to the workers in this order."""
    items.sort(key=lambda item: item.path.name != LONGEST)
