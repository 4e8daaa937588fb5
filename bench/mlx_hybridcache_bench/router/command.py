"""`bench router`: what canonicalizing a router does, where experts are alike and where they are not."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from mlx_hybridcache import PromptError
from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache.router import Patch
from mlx_hybridcache.router.trial.arms import CANONICALIZED, ORIGINAL, RANDOM
from mlx_hybridcache.router.trial.measure import NOISE
from mlx_hybridcache.router.trial.tables import sentences, tables
from mlx_hybridcache.router.trial.verdict import MOST, percent

from ..kit.machine import machine, one_line
from ..kit.tables import Figure, Spread, show, show_figures, write_json
from ..kit.text import tokenizer_of
from ..serving.scenarios import Material
from .models import Said, Size, Tried, cloned, look, try_cloned, try_model, try_specialised
from .plot import plot_tried
from .servers import CLIENTS, SHARED, UNIQUE, WITH, WITHOUT, Served, ServerLoad, launches, serve

SIZE, QUICK_SIZE = Size(64, 20, 128, 8), Size(32, 16, 64, 2)
LOAD = ServerLoad(requests=8, prompt=1_000, reply=32, repeats=3, texts=20, text=300)
QUICK_LOAD = ServerLoad(requests=4, prompt=300, reply=8, repeats=1, texts=4, text=120)
SEEDS, QUICK_SEEDS = 5, 1
UNLIKE = 1e-4
"""How far clones of the bundled model's experts are off, of their own size."""

SPECIALISED, MODEL, SCORES, CLONED, SERVERS = PARTS = (
    "specialised",
    "model",
    "scores",
    "cloned",
    "servers",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench router`."""
    parser.add_argument("--model", help="directory, or owner/name (default: the bundled model)")
    parser.add_argument("--quick", action="store_true", help="little text, one run, for a try")
    parser.add_argument(
        "--only", action="append", choices=PARTS, help="run this part (may be repeated)"
    )
    parser.add_argument("--seeds", type=int, help="specialised models (5; with --quick 1)")
    parser.add_argument("--texts", type=int, help="texts to try a patch on (20; with --quick 16)")
    parser.add_argument("--repeats", type=int, help="runs of each load (3; with --quick 1)")
    parser.add_argument(
        "--plot",
        type=Path,
        default=Path("router.png"),
        metavar="FILE",
        help="groups by layer and flips by arm (router.png)",
    )


@dataclass
class _Result:
    tried: list[Tried] = field(default_factory=list)
    seeds: list[Tried] = field(default_factory=list)
    served: Served | None = None


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure, print, write. 1 when a counted figure misses its target; timings never fail it."""
    size, load = (QUICK_SIZE, QUICK_LOAD) if args.quick else (SIZE, LOAD)
    size = replace(size, texts=size.texts if args.texts is None else args.texts)
    load = replace(load, repeats=args.repeats or load.repeats)
    parts = args.only or list(PARTS)
    if size.texts < 2:
        raise PromptError("An interval needs two texts at least: --texts 2 or more.")
    found, result = machine(), _Result()
    console.print(one_line(found), highlight=False)
    with console.status("starting") as status:
        _measure(args, parts, size, load, result, status.update)
    _show(console, result, load)
    shown = [*result.seeds[:1], *result.tried]
    if shown:
        plot_tried(args.plot, shown)
        console.print(f"The picture is in {args.plot}.", highlight=False)
    promised = figures(result.seeds, result.tried, result.served)
    show_figures(console, promised)
    write_json(
        args.json,
        {
            "command": "router",
            "machine": found,
            "size": asdict(size),
            "load": asdict(load),
            "figures": [figure.as_json() for figure in promised],
            "specialised": [each.as_json() for each in result.seeds],
            "tried": [each.as_json() for each in result.tried],
            "served": result.served.as_json() if result.served else None,
        },
    )
    return int(any(figure.counted and not figure.kept for figure in promised))


def _measure(
    args: argparse.Namespace,
    parts: Sequence[str],
    size: Size,
    load: ServerLoad,
    result: _Result,
    said: Said,
) -> None:
    name = "bundled" if args.model == str(BUNDLED_MODEL) else Path(args.model).name
    if SPECIALISED in parts:
        seeds = range(args.seeds or (QUICK_SEEDS if args.quick else SEEDS))
        result.seeds += [try_specialised(seed, size, said) for seed in seeds]
    tried: Tried | None = None
    if MODEL in parts:
        tried = try_model(name, args.model, size, said)
        result.tried.append(tried)
    if SCORES in parts:
        result.tried.append(try_model(f"{name}, by scores", args.model, size, said, "scores"))
    if CLONED not in parts and SERVERS not in parts:
        return
    with _equivalent(args.model, name) as (path, groups):
        if groups is not None:
            tried = try_cloned(path, groups, size, said) if CLONED in parts else None
            result.tried += [tried] if tried else []
        if SERVERS in parts:
            said("servers: calibrating")
            found = tried.discovery if tried else look(str(path), size)
            result.served = _serve(str(path), found.patch, load, said)


@contextmanager
def _equivalent(model: str, name: str) -> Iterator[tuple[Any, Any]]:
    """The bundled model with every expert twice, and its groups; another model as it is."""
    if name == "bundled":
        with cloned(Path(model), UNLIKE) as made:
            yield made
    else:
        yield model, None


def _serve(model: str, patch: Patch, load: ServerLoad, said: Said) -> Served:
    longest = max(2 * load.prompt, load.texts * load.text)
    material = Material(tokenizer_of(model), longest + 1_000)
    with tempfile.TemporaryDirectory(prefix="bench-router-") as directory:
        file = Path(directory) / "patch.json"
        patch.save(file)
        return serve(launches(model, file), material, load, said)


def figures(seeds: Sequence[Tried], tried: Sequence[Tried], served: Served | None) -> list[Figure]:
    """The promised ones, as far as they were measured. Planted models are those whose groups are known."""
    planted = [*seeds, *(each for each in tried if each.planted is not None)]
    found = _planted_figures(planted) if planted else []
    if seeds:
        blind = sum(
            not (control.change.is_significant and control.change.mean > MOST)
            for control in (each.trial.readings.arms[RANDOM] for each in seeds)
        )
        title = "specialised models whose control cannot tell"
        found.append(Figure(title, blind, f"of {len(seeds)}", 0, True))
    changed = [each.changed_logits for each in tried if each.changed_logits is not None]
    if changed:
        title = "logits changed where no experts are alike"
        found.append(Figure(title, sum(changed), "", 0, True))
    if served:
        other = sum(2 * each.texts - each.cold - each.hot for each in served.determined)
        texts = 2 * sum(each.texts for each in served.determined)
        title = "replies of the servers that differ, cold or hot"
        found.append(Figure(title, other, f"of {texts}", 0, True))
    return found


def _planted_figures(planted: Sequence[Tried]) -> list[Figure]:
    """What was found of the groups that are known, and what choosing among them changed."""
    found = []
    wrong = sum(each.wrong for each in planted)
    total = sum(each.discovery.patch.groups for each in planted)
    found.append(Figure("groups found that were not planted", wrong, f"of {total}", 0, True))
    missed = sum(each.missed for each in planted)
    total = sum(len(groups) for each in planted for groups in each.planted or ())
    found.append(Figure("planted groups that were not found", missed, f"of {total}", 0, True))
    inside = sum(
        by_arm[CANONICALIZED].flips.inside
        for each in planted
        for by_arm in each.trial.readings.seen.values()
    )
    before = sum(
        by_arm[ORIGINAL].flips.inside
        for each in planted
        for by_arm in each.trial.readings.seen.values()
    )
    title = "flips inside groups that are left, planted models"
    found.append(Figure(title, inside, f"of {before:,}", 0, True))
    arms = [each.trial.readings.arms[CANONICALIZED] for each in planted]
    outside = max(arm.flips.outside / arm.flips.chosen for arm in arms)
    title = "choices changed outside groups, planted models, at most"
    found.append(Figure(title, 100 * outside, "%", 100 * MOST, True))
    change = max(abs(arm.change.mean) for arm in arms)
    title = "perplexity's change, planted models, at most"
    found.append(Figure(title, 100 * change, "%", 100 * MOST, True))
    return found


def _show(console: Console, result: _Result, load: ServerLoad) -> None:
    everyone = [*result.seeds, *result.tried]
    if everyone:
        _show_discoveries(console, everyone)
    if result.seeds:
        _show_seeds(console, result.seeds)
    for each in [*result.seeds[:1], *result.tried]:
        console.print(f"\n[bold]{each.name}[/bold]", highlight=False)
        for title, columns, rows in tables(each.trial):
            show(console, title, columns, rows)
        for sentence in sentences(each.trial):
            console.print(sentence, highlight=False, markup=False)
    if result.served:
        _show_served(console, result.served, load)


def _show_discoveries(console: Console, everyone: Sequence[Tried]) -> None:
    rows = []
    for each in everyone:
        found = each.discovery
        planted = "" if each.planted is None else f"{sum(map(len, each.planted)):,}"
        rows.append(
            (
                each.name,
                planted,
                f"{found.patch.groups:,}",
                f"{found.patch.members:,} of {found.patch.experts:,}",
                f"{found.coverage:.1%}",
                f"{found.null_coverage:.1%}",
                f"{found.unseen:,}",
            )
        )
    columns = ("model", "planted", "groups", "experts", "coverage", "null model's", "left alone")
    show(console, "Experts that compute the same", columns, rows)


def _show_seeds(console: Console, seeds: Sequence[Tried]) -> None:
    rows = []
    for each in seeds:
        readings = each.trial.readings
        pair = next(name for name in readings.seen if name.startswith(NOISE))
        before, after = (readings.seen[pair][arm].flips for arm in (ORIGINAL, CANONICALIZED))
        rows.append(
            (
                each.name,
                f"{before.inside:,} -> {after.inside:,}",
                percent(readings.arms[CANONICALIZED].change),
                percent(readings.arms[RANDOM].change),
            )
        )
    columns = ("model", f"flips inside, {pair}", "perplexity", "perplexity, random groups")
    show(console, "Specialised models: one expert for each kind of text, and copies", columns, rows)
    control = Spread.of([each.trial.readings.arms[RANDOM].change.mean for each in seeds])
    console.print(
        f"Random groups of the same sizes change perplexity by {control.median:+.0%} (median of {len(seeds)} "
        f"models; {control.low:+.0%} to {control.high:+.0%}).",
        highlight=False,
    )


def _show_served(console: Console, served: Served, load: ServerLoad) -> None:
    rows = []
    for name in (ORIGINAL, CANONICALIZED):
        for prefix in (SHARED, UNIQUE):
            runs = {
                cache: [
                    each
                    for each in served.rates
                    if (each.server, each.prefix, each.cache) == (name, prefix, cache)
                ]
                for cache in (WITHOUT, WITH)
            }
            rates = {
                cache: Spread.of([each.generated_per_second for each in runs[cache]])
                for cache in runs
            }
            pairs = zip(runs[WITHOUT], runs[WITH], strict=True)
            speedup = Spread.of([b.generated_per_second / a.generated_per_second for a, b in pairs])
            cached = runs[WITH][0]
            rows.append(
                (
                    f"{name}, {prefix}",
                    rates[WITHOUT].text(".1f"),
                    rates[WITH].text(".1f"),
                    f"{speedup.text('.2f')} x",
                    f"{cached.cached_tokens:,} of {cached.prompt_tokens:,}",
                )
            )
    title = (
        f"Generated tokens per second, {load.requests} requests of {load.prompt:,} tokens and "
        f"{load.reply} more, {CLIENTS} at once"
    )
    show(console, title, ("", WITHOUT, WITH, "with / without", "cached tokens"), rows)
    rows = [
        (each.server, f"{each.texts}", f"{each.cold}", f"{each.hot}", f"{each.cached_tokens:,}")
        for each in served.determined
    ]
    columns = ("server", "texts", "same cold twice", "hot as cold", "cached tokens")
    show(console, "The same reply from the real server", columns, rows)
