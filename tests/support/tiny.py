"""Tiny random models of every family the cache meets, built by mlx-lm's own classes.

They are real models with sensible weights: tokens far back still move the logits, and a state that is
one token stale shows. Nothing is read from files, and the same name always has the same weights.
"""

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from tiny_models import ARCHITECTURES, HEAD_DIM, HEADS, HIDDEN, VOCAB

SEED = 1162
EMBEDDING_NAMES = ("embed_tokens", "embeddings")


def _weight(name: str, default: mx.array) -> mx.array:
    """A random float32 parameter of `default`'s shape whose scale suits what `name` does."""
    kind = name.rsplit(".", 1)[-1]
    noise = mx.random.normal(default.shape)
    if kind == "A_log":
        # Slow decay: with the classes' own default a state forgets within a few tokens, and a
        # restored state that is wrong further back would go unnoticed.
        return mx.log(mx.random.uniform(0.01, 0.5, default.shape))
    if kind == "recurrent_param":
        return -4.0 + 0.5 * noise
    if kind in {"dt_bias", "D"} or (kind == "weight" and default.ndim == 1):
        return 1.0 + 0.1 * noise
    if default.ndim == 0:
        return default
    if "bias" in kind or default.ndim == 1:
        return 0.1 * noise
    if name.split(".")[-2] in EMBEDDING_NAMES:
        return 0.5 * noise
    is_convolution = default.shape[-1] == 1
    fan_in = default.shape[-2] if is_convolution else default.shape[-1]
    return fan_in**-0.5 * noise


def fresh(name: str) -> nn.Module:
    """A new model of family `name`; the same weights every time.

    Its parameters are evaluated. What a module keeps outside `parameters()` (the frequencies of a
    scaled RoPE) stays lazy, as `mlx_lm.load` leaves it.
    """
    return made(ARCHITECTURES[name])


def made(make: Callable[[], nn.Module]) -> nn.Module:
    """What `make` builds, with sensible weights; see `fresh`."""
    mx.random.seed(SEED)
    model = make()
    weights = [(path, _weight(path, array)) for path, array in tree_flatten(model.parameters())]
    model.update(tree_unflatten(weights))
    model.eval()
    mx.eval(model.parameters())
    return model


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    name: functools.partial(fresh, name) for name in ARCHITECTURES
}
"""Family name -> a function that makes a new model of it."""


SHARED: dict[str, nn.Module] = {}
"""Family name -> the model that `build` gives."""


def build(name: str) -> nn.Module:
    """The one model of family `name` that this process shares; see `fresh`."""
    if name not in SHARED:
        SHARED[name] = FAMILIES[name]()
    return SHARED[name]


def random_tokens(n: int, seed: int) -> list[int]:
    """`n` token ids in `[0, VOCAB)`; a longer list with the same seed begins with the shorter one."""
    generator = random.Random(seed)
    return [generator.randrange(VOCAB) for _ in range(n)]


@functools.cache
def device_is_split_invariant() -> bool:
    """Whether this device computes a row's bits alike however many rows are read with it.

    True with the plain BLAS of the Linux CPU wheel; on a GPU the kernel depends on the shape.
    """
    mx.random.seed(SEED)
    rows, weight = mx.random.normal((130, HIDDEN)), mx.random.normal((HIDDEN, HIDDEN))
    query = mx.random.normal((1, HEADS, 130, HEAD_DIM))
    attend = functools.partial(
        mx.fast.scaled_dot_product_attention, k=query, v=query, scale=0.25, mask=None
    )
    return all(
        mx.array_equal((rows @ weight)[:n], rows[:n] @ weight).item()
        and mx.array_equal(attend(q=query)[:, :, :n], attend(q=query[:, :, :n])).item()
        for n in (1, 7, 64)
    )


class _NoisyEmbedding(nn.Module):
    """An embedding whose rows depend on the shape of the chunk they are read in."""

    def __init__(self, clean: nn.Module, scale: float) -> None:
        super().__init__()
        self.clean = clean
        self.scale = scale

    def __call__(self, tokens: mx.array) -> mx.array:
        """Embed tokens (B, L) as (B, L, D), each off by up to `scale` of its size."""
        embedded = self.clean(tokens)
        batch, length, dims = embedded.shape
        row = mx.arange(length)[:, None] * 0.11
        column = mx.arange(dims)[None, :] * 1.7
        phase = row + column + 0.37 * length + 0.53 * (batch - 1)
        return embedded * (1.0 + self.scale * mx.cos(phase)).astype(embedded.dtype)

    def as_linear(self, hidden: mx.array) -> mx.array:
        """The tied output head, (B, L, D) -> (B, L, VOCAB), without noise."""
        return self.clean.as_linear(hidden)


class NoisyChunks(nn.Module):
    """A model that reads a prompt differently when it is cut differently, as a GPU can.

    Hidden stream, logits and everything in its caches move by about `scale` (relative) with the
    batch size, the length of the chunk and the place in the chunk at which a token is read. Calls
    with equal chunks stay equal to the last bit. The wrapped model itself is left as it was.
    """

    def __init__(self, inner: nn.Module, scale: float = 1e-4) -> None:
        super().__init__()
        self.inner = inner
        self.scale = scale

    def __call__(self, inputs: mx.array, cache: Any = None, **options: Any) -> mx.array:
        """Tokens (B, L) -> logits (B, L, VOCAB); `cache` is updated in place."""
        owner, name = _embedding_slot(self.inner)
        clean = getattr(owner, name)
        setattr(owner, name, _NoisyEmbedding(clean, self.scale))
        try:
            return self.inner(inputs, cache=cache, **options)
        finally:
            setattr(owner, name, clean)

    @property
    def layers(self) -> Any:
        """The wrapped model's layers."""
        return self.inner.layers

    @property
    def args(self) -> Any:
        """The wrapped model's arguments."""
        return self.inner.args

    @property
    def model_type(self) -> str:
        """The wrapped model's type."""
        return self.inner.model_type

    def make_cache(self) -> list[Any]:
        """Empty caches, one for each layer."""
        return make_prompt_cache(self.inner)


def _embedding_slot(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the token embedding, and its attribute name there."""
    for _, module in model.named_modules():
        for name in EMBEDDING_NAMES:
            if isinstance(module.get(name), nn.Embedding):
                return module, name
    raise LookupError(f"no token embedding found in {type(model).__module__}")


def cold_caches(
    model: nn.Module, tokens: Sequence[int], step: int = 2048, fresh: list[Any] | None = None
) -> list[Any]:
    """Fresh caches that have read all of `tokens`, in slices of at most `step` tokens."""
    caches = make_prompt_cache(model) if fresh is None else fresh
    for start in range(0, len(tokens), step):
        model(mx.array([tokens[start : start + step]]), cache=caches)
        mx.eval([cache.state for cache in caches])
    return caches


def next_logits(model: nn.Module, caches: list[Any], token: int) -> mx.array:
    """Logits (VOCAB,) after reading one more token; `caches` move on by one."""
    logits = model(mx.array([[token]]), cache=caches)[0, -1]
    mx.eval(logits)
    return logits


def cold_logits(model: nn.Module, tokens: Sequence[int], step: int = 2048) -> mx.array:
    """Logits (VOCAB,) after `tokens` on an empty cache: slices of `step`, the last token alone."""
    return next_logits(model, cold_caches(model, tokens[:-1], step), tokens[-1])
