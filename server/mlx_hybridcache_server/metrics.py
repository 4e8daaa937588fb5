"""Prometheus metrics: what was asked, what the cache gave, what it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mlx_hybridcache import CacheReport
from mlx_hybridcache.store.budget import StoreStats
from mlx_hybridcache.worker.turns import Load

if TYPE_CHECKING:
    from mlx_hybridcache.disk.tier.tier import DiskStats

NAMESPACE = "mlx_hybridcache"

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


@dataclass(slots=True)
class Totals:
    """Prompts read since the start, and of their tokens those that were restored."""

    prompts: int = 0
    prompt_tokens: int = 0
    restored_tokens: int = 0


class Metrics:
    """One server's metrics, in a registry of their own."""

    def __init__(
        self,
        *,
        held: Callable[[], StoreStats],
        on_disk: Callable[[], DiskStats | None],
        load: Callable[[], Load],
        waiting: Callable[[], int],
    ):
        self.registry = CollectorRegistry()
        self.totals = Totals()
        where: Any = {"namespace": NAMESPACE, "registry": self.registry}
        counter = partial(Counter, namespace=NAMESPACE, registry=self.registry)
        self.requests = counter("requests", "Requests answered", ["endpoint", "status"])
        self.reasons = counter("prompts", "Prompts by what the cache did", ["reason"])
        self.restored = counter("restored_tokens", "Prompt tokens restored")
        self.replayed = counter("replayed_tokens", "Prompt tokens read")
        self.generated = counter("generated_tokens", "Tokens written")
        self.cancelled = counter("cancelled", "Replies whose client went away")
        self.refused = counter("refused", "Replies not given", ["why"])
        self.forwards = counter("prompt_forwards", "Model calls that prompts took")
        self.drafted = counter("drafted_tokens", "Tokens that were drafted")
        self.accepted = counter("accepted_tokens", "Drafted tokens that were right")
        self.calls = counter("drafted_reply_forwards", "Model calls that drafted replies took")
        self.draft_calls = counter("draft_model_forwards", "Calls of draft models and heads")
        self.first_token = Histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to its first token",
            buckets=SECONDS,
            **where,
        )
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "queued": ("Replies that wait for a slot", waiting),
            "reading": ("Prompts being read", lambda: load().reading),
            "following": ("Prompts that wait for what another one reads", lambda: load().waiting),
            "writing": ("Replies being written", lambda: load().writing),
            "hit_ratio": ("Share of prompt tokens that were restored", self._hit_ratio),
        }
        for short, (what, value) in gauges.items():
            Gauge(short, what, **where).set_function(value)
        self.registry.register(_Held(held, on_disk))

    def read(self, report: CacheReport, seconds_to_first_token: float) -> None:
        """A prompt was read and its first token is there."""
        self.first_token.observe(seconds_to_first_token)
        self.reasons.labels(report.reason.value).inc()
        self.restored.inc(report.restored_tokens)
        self.replayed.inc(report.replayed_tokens)
        self.forwards.inc(report.forwards)
        self.totals.prompts += 1
        self.totals.prompt_tokens += report.prompt_tokens
        self.totals.restored_tokens += report.restored_tokens

    def wrote(self, report: CacheReport) -> None:
        """A reply has ended."""
        self.drafted.inc(report.drafted_tokens)
        self.accepted.inc(report.accepted_tokens)
        self.calls.inc(report.reply_forwards)
        self.draft_calls.inc(report.draft_forwards)

    def _hit_ratio(self) -> float:
        restored, asked = self.totals.restored_tokens, self.totals.prompt_tokens
        return restored / asked if asked else 0.0


class _Held(Collector):
    """Both tiers' figures as the last request left them."""

    def __init__(
        self, in_memory: Callable[[], StoreStats], on_disk: Callable[[], DiskStats | None]
    ):
        self._in_memory, self._on_disk = in_memory, on_disk

    def collect(self) -> Iterator[Metric]:
        for tier, found in (("store", self._in_memory()), ("disk", self._on_disk())):
            if found is not None:
                for name, value in asdict(found).items():
                    yield GaugeMetricFamily(
                        f"{NAMESPACE}_{tier}_{name}", f"The {tier}'s {name}", value=value
                    )
