"""What a cache is made with, and the engine that is made of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from . import models
from .adapters.lora import is_served
from .caches.kinds.smaller import StorePrecision, smaller
from .caches.layout import Layout
from .caches.memory import MemoryStore
from .caches.quantizing.precision import Precision
from .caches.relief import Relief
from .caches.room import ROW_STEP, longest_prompt
from .decode import batch_check as batching
from .decode.decoder import Decoder
from .decode.store_check import measure
from .drafting.draft_model import DraftModel
from .drafting.drafting import Drafting
from .engine import Engine
from .errors import AdapterError, BudgetError, RouterError, SettingError
from .machine import Pressure, default_reserve
from .prefill.followers import Followers
from .prefill.prefill import Prefill
from .prefill.schedule import Grid
from .report import StoreError
from .request.arguments import check_counts
from .request.info import CacheInfo
from .request.sharing import Sharing
from .router.in_memory import applied, apply
from .router.patch import Patch
from .sizes import format_bytes, parse_bytes
from .store.references import CountedReferences, References
from .store.store import Store
from .tiers import Tiers
from .tokenizing.turn_marks import learn_turn_marks
from .tokens import settings_digest, vocabulary_of
from .worker.turns import Load

if TYPE_CHECKING:
    from .disk.tier.tier import DiskTier
    from .group.group import Group

log = logging.getLogger("mlx_hybridcache")


OF_EACH_MACHINE = ("memory_budget", "memory_reserve", "disk_budget")
"""Settings in which the ranks of a group may differ: the tightest counts."""

SET_ASIDE = 8
"""On several ranks with a directory this part of the memory budget is for what is being written. When that is done only
the rank itself knows, so it does not count for what all of them decide by. Twice what the queue may hold, as a
file may be of a part of what is held."""


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """What `HybridPromptCache` describes, checked."""

    memory_budget: int | str | None
    memory_reserve: int | str | None
    exact: bool
    prefill_step_size: int
    checkpoint_every: int
    checkpoint_min_step: int
    swa_full: bool
    store_kv: int | None
    store_state: str | None
    max_conversations: int | None
    max_checkpoints: int | None
    cache_dir: str | Path | None
    disk_budget: int | str | None
    router: Patch | str | Path | None
    kv_bits: int | None
    kv_group_size: int
    quantized_kv_start: int

    def __post_init__(self) -> None:
        check_counts(
            prefill_step_size=self.prefill_step_size,
            checkpoint_every=self.checkpoint_every,
            checkpoint_min_step=self.checkpoint_min_step,
        )
        if self.disk_budget is not None and self.cache_dir is None:
            raise SettingError("disk_budget needs a cache_dir to hold.")
        if (
            self.cache_dir == ""
        ):  # which would be the directory that the process happens to stand in
            raise SettingError("cache_dir is empty; name a directory, or leave it out.")
        if self.storing and self.precision is not None:
            raise SettingError(
                "kv_bits makes rows small while requests run too; leave store_kv and store_state out."
            )
        if self.storing and self.exact:
            raise SettingError(
                "A smaller store gives back rounded numbers, so exact cannot hold with store_kv or "
                "store_state. Leave one of them out."
            )

    def check_for(self, group: Group) -> None:
        """Raises for what several ranks cannot do yet, and where they were started with other settings."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        alone = ("router", "kv_bits", "store_kv", "store_state", "swa_full")
        found = [name for name in alone if given[name] not in (None, False)]
        if found:
            raise SettingError(
                f"{', '.join(found)} cannot be used with several ranks yet. Leave it out, or start the model "
                "on one machine."
            )
        own = {name: given[name] for name in given if name not in (*alone, *OF_EACH_MACHINE)}
        own["cache_dir"] = self.cache_dir is not None  # each machine's own
        versions = {name: version(name) for name in ("mlx", "mlx-lm", "mlx-hybridcache")}
        group.agree_or_say({**own, **versions}, "settings or versions")

    @property
    def storing(self) -> StorePrecision:
        """What the store keeps of numbers."""
        return smaller(self.store_kv, self.store_state)

    @property
    def every(self) -> int:
        """The distance of grid cuts: whole slices."""
        return -(-self.checkpoint_every // self.prefill_step_size) * self.prefill_step_size

    @property
    def precision(self) -> Precision | None:
        """What rows are quantized to, and from where on; None where they stay as they are."""
        return Precision.of(self.kv_bits, self.kv_group_size, self.quantized_kv_start)

    def layout(self, model: Any, group: Group | None = None) -> Layout:
        """How the model's caches come apart. To be released, whatever comes. All of the model is evaluated."""
        layout = Layout.of(
            model,
            self.prefill_step_size,
            swa_full=self.swa_full,
            precision=self.precision,
            storing=self.storing,
        )
        return layout if group is None else _shared(group, layout)

    def engine(
        self,
        model: Any,
        tokenizer: Any,
        layout: Layout,
        load: Load,
        references: CountedReferences,
        group: Group | None = None,
    ) -> Engine:
        """All that works for one model, but for the disk. A router's patch is applied to it."""
        _say_what_differs(layout, self.precision)
        store = self._store(model, layout, references, group)
        if self.router is not None:
            _patch(model, tokenizer, self.router)
        step = self.prefill_step_size
        digest = self._digest(model, layout, group)
        sharing = Sharing(digest, layout, step, self.every, self.exact)
        grid = Grid(step, self.every, self.checkpoint_min_step, layout.alignment)
        tiers = Tiers(model, layout, sharing, store)
        reserve = self.memory_reserve
        pressure = Pressure(default_reserve() if reserve is None else parse_bytes(reserve))
        # Which bits a batch gives depends on the device, so exact mode decodes one by one.
        batches = not self.exact and not layout.unsupported and batching.shown(model, layout)
        prefill = Prefill(model, layout, grid, learn_turn_marks(tokenizer), tiers, load)
        drafts = vocabulary_of(tokenizer), partial(self._draft_model, prefill)
        engine = Engine(
            model=model,
            tokenizer=tokenizer,
            layout=layout,
            sharing=sharing,
            tiers=tiers,
            relief=Relief(store, tiers.pool, pressure, tiers.publish),
            followers=Followers(layout, grid, tiers.reach),
            prefill=prefill,
            decoder=Decoder(model, layout, store, batches=batches),
            drafting=Drafting(model, layout, sharing, tiers, prefill, *drafts),
        )
        return engine if group is None else _ranked(group, engine)

    def _draft_model(self, beside: Prefill, model: Any) -> DraftModel:
        """What drafts beside the model whose prompts are read so: read alike, and stored beside it."""
        layout, step = self.layout(model), self.prefill_step_size
        digest = self._digest(model, layout, drafts=True)
        sharing = Sharing(digest, layout, step, self.every, exact=False)
        grid = Grid(step, self.every, self.checkpoint_min_step, layout.alignment)
        tiers = beside.tiers
        if not layout.unsupported:
            tiers = tiers.beside(model, layout, sharing)
        prefill = Prefill(model, layout, grid, beside.marks, tiers, beside.load)
        return DraftModel(model, layout, sharing, tiers, prefill)

    def disk(
        self,
        engine: Engine,
        references: CountedReferences,
        post: Callable[[Callable[[], None]], None],
        group: Group | None = None,
    ) -> DiskTier:
        """The tier in `cache_dir`. `post` runs things on the worker's thread."""
        # With SQLite and a thread: not without a directory.
        from .disk.tier.tier import DiskTier, OpenDirectory

        assert self.cache_dir is not None
        root = Path(self.cache_dir).expanduser()
        budget = None if self.disk_budget is None else parse_bytes(self.disk_budget)
        own = (engine.tiers.memory, references, engine.layout, engine.model, self.every, post)
        if group is None:
            return DiskTier.open(OpenDirectory.at(root, budget), *own)
        from .group.disk import RankDisk, acts_of, opened_on_each

        opened = opened_on_each(group, root, budget)
        return RankDisk.open(opened, *own, acts=acts_of(engine), worker_post=post)

    def _store(
        self,
        model: Any,
        layout: Layout,
        references: CountedReferences,
        group: Group | None,
    ) -> MemoryStore:
        given = self.memory_budget
        budget = parse_bytes(models.default_budget(model) if given is None else given)
        is_apart = self.cache_dir is not None and group is not None
        set_aside = max(budget // SET_ASIDE, 2 * layout.snapshot_bytes) if is_apart else 0
        store: MemoryStore = Store(
            max(0, budget - set_aside),
            needs_checkpoints=layout.needs_snapshots,
            max_conversations=self.max_conversations,
            max_checkpoints=self.max_checkpoints,
            references=References() if is_apart else references,
        )
        smallest = (
            layout.running_bytes(ROW_STEP)
            + layout.stored_snapshot_bytes
            + layout.rows_nbytes(0, ROW_STEP)
            + layout.restoring_bytes(ROW_STEP)
        )
        if store.budget.limit_bytes < smallest:
            of_it = f", {format_bytes(set_aside)} of it set aside for what is being written"
            raise BudgetError(
                f"The memory budget is {format_bytes(budget)}{of_it if set_aside else ''}; one running request "
                f"of {ROW_STEP} tokens and one checkpoint of this model need {format_bytes(smallest)}. Raise "
                "memory_budget (the server's --prompt-cache-bytes)."
            )
        return store

    def _digest(
        self, model: Any, layout: Layout, group: Group | None = None, *, drafts: bool = False
    ) -> str:
        device: tuple[object, ...] = (
            str(mx.default_device()),
            version("mlx"),
            self.prefill_step_size,
        )
        if models.has_cuda():  # whose name is that of Metal's
            device += ("cuda",)
        own = models.fingerprint(model)
        return settings_digest(
            # The rank too: what another one's files hold may look alike.
            model=own if group is None else [group.rank, *group.agree(own)],
            swa_full=self.swa_full,
            exact=device if self.exact else False,
            **({} if layout.precision is None else {"kv": layout.precision}),
            # The rows are in the fingerprint, how they are selected from is not.
            **({} if (selection := applied(model)) is None else {"router": selection}),
            **({"store": (self.store_kv, self.store_state)} if self.storing else {}),
            # What drafts may have gone back in its caches: nothing of it is ever a reply's.
            **({"drafts": True} if drafts else {}),
        )


def _store_error(engine: Engine) -> StoreError | None:
    layout = engine.layout
    if not layout.storing or layout.unsupported:
        return None
    sizes = (layout.row_bytes, layout.snapshot_bytes)
    if sizes == (layout.stored_row_bytes, layout.stored_snapshot_bytes):
        log.warning(
            "store_kv and store_state have no effect: this model has nothing to make small."
        )
    error = measure(engine.model, engine.tokenizer, layout)
    log.info("The smaller store, measured on this model: %s.", error.sentence)
    return error


def _say_what_differs(layout: Layout, asked: Precision | None) -> None:
    """Nothing that was asked for is passed over in silence."""
    if layout.unsupported:
        log.warning(
            "%s cannot be stored by this version: requests are served without the cache.",
            ", ".join(layout.unsupported),
        )
    elif asked is not None:
        _say_what_is_quantized(layout)


def _say_what_is_quantized(layout: Layout) -> None:
    if layout.precision is None:
        log.warning(
            "kv_bits has no effect: no layer of this model has attention that looks at quantized rows, "
            "or rows of whole groups. Prompts are cached in full precision."
        )
        return
    log.info(
        "Keys and values of %d of %d layers are quantized to %d bits from position %d on; windows and "
        "states stay in full precision. Replies are decoded one by one.",
        len(layout.quantized),
        len(layout.kinds),
        layout.precision.bits,
        layout.quantized_start,
    )


def info(engine: Engine) -> CacheInfo:
    """What a cache with this engine is for all of its life. What a smaller store costs is measured for it."""
    layout, budget_bytes = engine.layout, engine.tiers.memory.budget.limit_bytes
    return CacheInfo(
        settings=engine.sharing.settings,
        marks=engine.prefill.marks,
        vocabulary=layout.vocabulary,
        needs_checkpoints=layout.needs_snapshots,
        unsupported=layout.unsupported,
        layers=len(layout.every_kind),
        checkpoint_layers=sum(kind.needs_snapshot for kind in layout.every_kind),
        row_bytes=layout.row_bytes,
        checkpoint_bytes=layout.snapshot_bytes,
        stored_row_bytes=layout.stored_row_bytes,
        stored_checkpoint_bytes=layout.stored_snapshot_bytes,
        store_error=_store_error(engine),
        slicing_limit=layout.slicing_limit,
        longest_prompt=longest_prompt(layout, budget_bytes),
        budget_bytes=budget_bytes,
        reserve_bytes=engine.relief.pressure.reserve_bytes,
        exact=engine.sharing.exact,
        batches=engine.decoder.batches,
        merges=layout.merges,
        goes_back=layout.goes_back,
        ranks=layout.parts,
        model=engine.model,
    )


def adapted(engine: Engine, load: Load, path: str | Path | None) -> CacheInfo:
    """Put an adapter into an engine's model; what its cache is then. Between two turns.

    Raises `AdapterError` for what cannot be used, while requests are under way, and for several ranks.
    """
    if engine.layout.parts > 1:
        raise AdapterError(
            "Several ranks cannot change adapters yet. Start all of them with this one."
        )
    if load.reading or load.waiting or load.writing:
        raise AdapterError(
            "Requests are under way, which another adapter would change. Wait for their end."
        )
    engine.adapting.use(path)
    return info(engine)


def _patch(model: Any, tokenizer: Any, router: Patch | str | Path) -> None:
    """Apply a router's patch to a model, for good."""
    if is_served(model) and applied(model) is None:
        raise RouterError(
            "Another cache serves this model, and a router patch would change its replies too. Close that "
            "one first, or load the model again for this cache."
        )
    from .router.choose import choose_patch  # with the search for one, which few ask for

    apply(model, choose_patch(model, tokenizer, router))


def _shared(group: Group, layout: Layout) -> Layout:
    from .group.layout import shared  # with what ranks say to each other, which few are

    return shared(group, layout)


def _ranked(group: Group, engine: Engine) -> Engine:
    from .group.joined import ranked

    return ranked(group, engine)
