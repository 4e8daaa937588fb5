"""Where things are in the checkout."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The checkout."""

SUPPORT = Path(__file__).parent
"""The helpers of the tests, for processes that import them too."""
