"""A model that is served: loaded, with its cache, its names and its renderer."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from huggingface_hub import CacheNotFound, scan_cache_dir

from mlx_hybridcache import Group, HybridPromptCache, models
from mlx_hybridcache.adapters import lora
from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache.errors import HybridCacheError, SettingError
from mlx_hybridcache.router.defaults import AUTO
from mlx_hybridcache.router.patch import Patch

from ..adapter import token_bytes
from ..prompts.chat import Renderer
from ..prompts.tokenizing import Room
from ..settings import Settings

if TYPE_CHECKING:
    from ..calls.formats import ToolFormat
    from ..grammar.constrain import Constraints

log = logging.getLogger("mlx_hybridcache.server")

DEFAULT_NAME = "default_model"
"""mlx_lm.server's name for the model of `--model`."""

BUNDLED_NAME = "mlx-hybridcache-demo"
"""The bundled model's."""

SNAPSHOTS = "snapshots"
"""Where the hub's cache keeps a repository's versions: `models--owner--name/snapshots/version`."""

ENDS_SECONDS = 0.005
"""How often it is looked whether requests that were given up have ended."""

T = TypeVar("T")


class Named(NamedTuple):
    """A model as a request names it, with the adapter and the draft model that it asks for."""

    name: str
    adapter: str | None = None
    draft: str | None = None

    def resolved(self, settings: Settings) -> Named:
        """The same by the names from which it can be loaded. `--draft-model` is for the model of `--model`."""
        # Most name none, or one that needs no look at the disk.
        is_default = self.name in (DEFAULT_NAME, settings.model, *settings.aliases)
        is_default = is_default or self.name in own_names(settings)
        draft = None if self.draft == DEFAULT_NAME else self.draft
        if draft is None and is_default and self.adapter is None:
            draft = settings.draft_model
        return self._replace(name=settings.model if is_default else self.name, draft=draft)


def short_name(path_or_repo: str) -> str:
    """What a model is called in replies: never by where it lies on this machine's disk."""
    path = Path(path_or_repo).expanduser()
    if not path.exists():
        return path_or_repo
    path = path.resolve()
    if path == BUNDLED_MODEL.resolve():
        return BUNDLED_NAME
    if path.parent.name == SNAPSHOTS:
        return path.parents[1].name.removeprefix("models--").replace("--", "/")
    return path.name


def own_names(settings: Settings) -> tuple[str, ...]:
    """The names that mean the model of `--model`, that of replies first."""
    names = (*settings.aliases, short_name(settings.model), DEFAULT_NAME)
    return tuple(dict.fromkeys(names))


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model with what serves it.

    `id` is its name in `/v1/models`, `names` all that mean it, `source` what it was loaded from,
    `adapter` the one that a request asked for, `drafted_by` what `draft` was. `head` is where its own head lies, if that
    drafts. `shown` are the names that are listed.
    The weights of one that `is_changed` are not the model's own, so that no other adapter can take that one's place.
    """

    id: str
    shown: tuple[str, ...]
    names: frozenset[str]
    source: str
    adapter: str | None
    tokenizer: Any
    cache: HybridPromptCache
    renderer: Renderer
    token_bytes: Callable[[int], bytes]
    draft: Any | None
    drafted_by: str | None = None
    head: str | None = None
    is_changed: bool = False

    @cached_property
    def constraints(self) -> Constraints:
        """Compiles what replies are held to. Most models are never asked to, so it is imported here."""
        from ..grammar.constrain import Constraints

        return Constraints(self.tokenizer)

    def serves(self, wanted: Named) -> bool:
        """Whether a request for `wanted` is a request for this one."""
        same = (wanted.adapter, wanted.draft) == (self.adapter, self.drafted_by)
        return same and wanted.name in self.names

    def may_adapt(self, wanted: Named) -> bool:
        """Whether a request for `wanted` is for this model with another adapter, which can take turns with its own."""
        is_small = wanted.adapter is None or lora.is_small(wanted.adapter)
        is_same = wanted.name in self.names and wanted.draft == self.drafted_by
        return is_same and is_small and not self.is_changed

    def adapted(self, adapter: str | None) -> Loaded:
        """The same with an adapter, None for its own, and all that is cached for any. Not for the event loop.

        Nobody asks for anything meanwhile; what a client has left behind ends first. Raises `AdapterError`
        for what cannot be used.
        """
        load = self.cache.load
        while load.reading or load.waiting or load.writing:
            time.sleep(ENDS_SECONDS)
        self.cache.use_adapter(adapter)
        return replace(self, adapter=adapter)

    def tool_format(self, tools: list[dict[str, Any]] | None, *, calls: bool) -> ToolFormat | None:
        """How this model writes calls; None where nothing it writes is one: without tools, or `calls`."""
        tokenizer = self.tokenizer
        if not (calls and tools and tokenizer.has_tool_calling):
            return None
        from ..calls.formats import ToolFormat  # all formats, of which a model writes one

        start, end = tokenizer.tool_call_start, tokenizer.tool_call_end or ""
        return ToolFormat(start, end, tokenizer.tool_parser, tools)

    def without_calls(self) -> tuple[tuple[int, float], ...]:
        """A bias under which no call begins, where a token of its own begins one. Else it is text."""
        tokens = self.tokenizer.tool_call_start_tokens if self.tokenizer.has_tool_calling else None
        return ((tokens[0], -math.inf),) if tokens is not None and len(tokens) == 1 else ()


MakeRoom = Callable[[], None]


def load(
    settings: Settings,
    name: str,
    adapter: str | None = None,
    drafted_by: str | None = DEFAULT_NAME,
    *,
    make_room: MakeRoom | None = None,
    group: Group | None = None,
) -> Loaded:
    """Load the model that `name` means, a directory or a repository, and make its cache.

    `adapter` replaces the settings' own, `drafted_by` names a draft model. `make_room` is called once it is known
    to be there, before weights take memory. Each rank of a `group` loads its part.

    Raises `ModelError` for what cannot be loaded, `SettingError` and `BudgetError` for settings
    that do not suit it. The arrays are evaluated: any thread may have loaded them.
    """
    draft = Named(name, adapter, drafted_by).resolved(settings).draft if drafted_by else None
    asked = Named(name, adapter, draft)
    if adapter is None or settings.canonicalize_router is not None or not lora.is_small(adapter):
        return _load(settings, asked, make_room, group)
    made = _load(settings, asked._replace(adapter=None), make_room, group)
    try:
        return made.adapted(adapter)
    except BaseException:
        made.cache.close()
        raise


def _load(
    settings: Settings, asked: Named, make_room: MakeRoom | None, group: Group | None
) -> Loaded:
    name, adapter, drafted_by = asked
    is_default = name == settings.model and adapter is None
    with_adapter = settings.adapter_path if is_default else adapter
    model, tokenizer = _weights(settings, name, with_adapter, group, lazy=make_room is not None)
    if make_room is not None:
        make_room()
    router = _router(settings, model, tokenizer, name, is_default=is_default)
    cache = _cache(settings, model, tokenizer, router, group)
    draft = _draft(settings, cache, tokenizer, drafted_by, name)
    head = None if draft is not None else _head(settings, cache, name, is_default=is_default)
    own = own_names(settings) if is_default else (_other_name(name, settings),)
    return Loaded(
        id=own[0],
        shown=settings.aliases if is_default and settings.aliases else own[:1],
        names=frozenset({*own, name, *_paths(name)}),
        source=name,
        adapter=adapter,
        tokenizer=tokenizer,
        cache=cache,
        renderer=_renderer(settings, tokenizer, cache, name),
        token_bytes=token_bytes(tokenizer),
        draft=draft,
        drafted_by=drafted_by,
        head=head,
        is_changed=router is not None or not (with_adapter is None or lora.is_small(with_adapter)),
    )


def _weights(
    settings: Settings, name: str, adapter: str | None, group: Group | None, *, lazy: bool
) -> tuple[Any, Any]:
    """A model with its tokenizer, which suits the settings."""
    model, tokenizer = models.load(
        name,
        adapter_path=adapter,
        chat_template=settings.chat_template,
        trust_remote_code=settings.trust_remote_code,
        lazy=lazy or group is not None,
    )
    if group is not None:
        from mlx_hybridcache.group.load import split

        split(group, model, pipeline=settings.pipeline)
    _suit(tokenizer, settings, name)
    return model, tokenizer


def _cache(
    settings: Settings, model: Any, tokenizer: Any, router: Patch | None, group: Group | None
) -> HybridPromptCache:
    return HybridPromptCache(
        model,
        tokenizer,
        router=router,
        # With the cache off the budget bounds running requests only.
        memory_budget=settings.memory_budget or None,
        exact=settings.exact,
        prefill_step_size=settings.prefill_step_size,
        checkpoint_every=settings.checkpoint_every,
        checkpoint_min_step=settings.checkpoint_min_step,
        max_conversations=settings.prompt_cache_size or None,
        max_checkpoints=settings.max_checkpoints,
        swa_full=settings.swa_full,
        store_kv=settings.store_kv,
        store_state=settings.store_state,
        kv_bits=settings.kv_bits,
        kv_group_size=settings.kv_group_size,
        quantized_kv_start=settings.quantized_kv_start,
        memory_reserve=settings.memory_reserve,
        cache_dir=settings.cache_dir if settings.uses_cache else None,
        disk_budget=settings.disk_budget if settings.uses_cache else None,
        group=group,
    )


def _suit(tokenizer: Any, settings: Settings, name: str) -> None:
    """Give it the template that the settings want, and say what they want in vain."""
    if settings.use_default_chat_template and tokenizer.chat_template is None:
        tokenizer.chat_template = getattr(tokenizer, "default_chat_template", None)
        tokenizer.has_chat_template = tokenizer.chat_template is not None
    if settings.max_thinking_tokens is not None and not tokenizer.has_thinking:
        log.warning("--max-thinking-tokens has no effect: %s reasons in no block of its own.", name)


def _paths(name: str) -> tuple[str, str]:
    path = Path(name).expanduser()
    return str(path), str(path.resolve())


def _renderer(settings: Settings, tokenizer: Any, cache: HybridPromptCache, name: str) -> Renderer:
    info, context = cache.info, settings.context_length
    if context is None:
        context = models.longest_context(models.configuration(name))
    room = Room(settings.max_prompt_tokens, info.longest_prompt, context or None)
    return Renderer(
        tokenizer,
        info.marks,
        info.vocabulary,
        settings.chat_template_args,
        room,
        cache.encoder,
        stable_prefix=settings.stable_prefix,
        canonical_tools=settings.canonical_tools,
    )


def _other_name(name: str, settings: Settings) -> str:
    """The short name of a model that is not `--model`'s, which it must not be taken for."""
    short = short_name(name)
    if name != settings.model and short in own_names(settings):
        return f"{short}@{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return short


def _router(
    settings: Settings, model: Any, tokenizer: Any, name: str, *, is_default: bool
) -> Patch | None:
    """The router patch for this model. A file is for the model of `--model` only."""
    wanted = settings.canonicalize_router
    if wanted is None or (wanted != AUTO and not is_default):
        return None
    from mlx_hybridcache.router.choose import (
        choose_patch,  # with the search for one, which few ask for
    )

    return choose_patch(model, tokenizer, wanted, models.directory(name))


def _draft(
    settings: Settings, cache: HybridPromptCache, own: Any, drafted_by: str | None, name: str
) -> Any | None:
    """The draft model of that name, if any. What is wrong with it is said now, not with the first reply."""
    if drafted_by is None:
        return None
    try:
        draft, tokenizer = models.load(drafted_by)
        if tokenizer.vocab_size != own.vocab_size:
            raise SettingError(
                f"The draft model {drafted_by} has a vocabulary of {tokenizer.vocab_size}, {name} one of "
                f"{own.vocab_size}. A draft model must share the tokenizer."
            )
        models.evaluate(draft)
        if settings.uses_cache:  # else mlx-lm drafts on caches of its own, where it can
            cache.learn_draft(draft)
    except HybridCacheError:
        cache.close()
        raise
    return draft


def _head(
    settings: Settings, cache: HybridPromptCache, name: str, *, is_default: bool
) -> str | None:
    """Where the head of a model lies, once it is loaded, if it is to draft. Of the others those draft that have one."""
    if not settings.draft_mtp or not settings.uses_cache:
        return None
    try:
        cache.learn_mtp(name)
    except HybridCacheError as error:
        if is_default:
            cache.close()
            raise
        log.warning("%s Its replies are not drafted so.", error)
        return None
    return name


def contexts() -> dict[str, int | None]:
    """The context of each downloaded model, by its configuration."""
    return {name: models.longest_context(models.configuration(name)) for name in downloaded()}


def downloaded() -> list[str]:
    """Repositories in the hub's cache that hold an MLX model, whole ones and sharded ones."""
    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    return sorted(
        repo.repo_id
        for repo in repos
        if repo.repo_type == "model"
        and any(_is_model({Path(f.file_name).name for f in r.files}) for r in repo.revisions)
    )


def _is_model(files: set[str]) -> bool:
    weights = any(name.startswith("model") and name.endswith(".safetensors") for name in files)
    return weights and {"config.json", "tokenizer_config.json"} <= files
