"""Plans of a model in a directory, for any machine or for a Mac."""

import pytest

from mlx_hybridcache.planning.plan import Room, make, room_on_a_mac
from mlx_hybridcache.planning.unloaded_model import describe

GIB = 2**30
MIB = 2**20
AMPLE = Room(2**40, None, "a test")
EIGHT_BITS = {"quantization": {"group_size": 64, "bits": 8}}


def plan_of(path, context, *, room=AMPLE, max_tokens=256):
    """A plan with the server's default steps."""
    model = describe(str(path))
    return make(model, room, context=context, max_tokens=max_tokens, step=2048, every=2048)


def mac_plan(path, memory, context, **options):
    """The same for a Mac with so many GiB."""
    model = describe(str(path))
    room = room_on_a_mac(model.weights_bytes, memory * GIB)
    options = {"max_tokens": 0, "step": 2048, "every": 2048, **options}
    return make(model, room, context=context, **options)


def near(expected):
    """Within 1 %, the promise."""
    return pytest.approx(expected, rel=0.01)
