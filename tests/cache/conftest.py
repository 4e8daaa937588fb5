"""A cache over the bundled model, with small steps."""

import pytest
from bundled import load
from plain_replies import SMALL

from mlx_hybridcache import HybridPromptCache


@pytest.fixture
def cache():
    model, tokenizer = load()
    with HybridPromptCache(model, tokenizer, memory_budget="200MB", **SMALL) as cache:
        yield cache
