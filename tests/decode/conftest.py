"""Checkpoints with heads, and a look at what they draft."""

import pytest
import tiny
from odd_models import heads

from mlx_hybridcache.drafting.head_drafter import HeadDrafter


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    """Of a checkpoint whose head is right for the reply to `PROMPT`, or one of random weights."""
    made = {}

    def directory(name, *, right=True):
        if (name, right) not in made:
            model = tiny.build(name)
            layers = heads.fitted(name) if right else heads.fresh_layers(model)
            where = tmp_path_factory.mktemp(name)
            made[name, right] = heads.write(where, model, layers)
        return made[name, right]

    return directory


@pytest.fixture
def proposals(monkeypatch):
    """Each draft: the tokens that it is behind, and those that were drafted."""
    found, original = [], HeadDrafter.propose

    def propose(self, history, most):
        tokens = original(self, history, most)
        found.append(([*history], most, tokens))
        return tokens

    monkeypatch.setattr(HeadDrafter, "propose", propose)
    return found
