"""What the server counts, for Prometheus: requests, tokens, latencies, queue and cache, and what the experts do."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moesaic.serve.operation.observing import Exchange
from moesaic.telemetry.prometheus import CONTENT_TYPE, Exposed, exposition_of

if TYPE_CHECKING:
    from moesaic.serve.live_routing import LiveRouting

__all__ = ["CONTENT_TYPE", "Metrics", "ModelState"]

_WINDOW_S = 60.0
_FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_BETWEEN_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 10.0)
_WHOLE_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0)


class ModelState(NamedTuple):
    """A model at one moment; all but the first lines counts since it was loaded.

    cache_used: share of the cache that running requests hold; cache_kept: that prefixes beside them hold.
    prefix_hits: requests that began with blocks of others. preemptions: requests that gave up their place for another;
    evictions: blocks that were taken from prefixes. drafted, accepted: tokens of speculation.
    """

    running: int
    waiting: int
    cache_used: float = 0.0
    cache_kept: float = 0.0
    prefix_hits: int = 0
    prefix_mismatches: int = 0
    preemptions: int = 0
    evictions: int = 0
    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    engine_seconds: float = 0.0
    busy_seconds: float = 0.0


class Metrics:
    """Counts in a registry of its own. `watch` adds a model whose state and routing are asked for at each scrape."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self._states: dict[str, Callable[[], ModelState]] = {}
        self._routing: dict[str, LiveRouting] = {}
        self._requests = Counter(
            "moesaic_http_requests", "HTTP requests that are over.", ["method", "route", "status"], registry=registry
        )
        self._prompt_tokens = Counter("moesaic_prompt_tokens", "Tokens of prompts.", ["model"], registry=registry)
        self._cached_tokens = Counter(
            "moesaic_cached_prompt_tokens", "Tokens of prompts that were in the cache.", ["model"], registry=registry
        )
        self._new_tokens = Counter("moesaic_generation_tokens", "Tokens written.", ["model"], registry=registry)
        self._finished = Counter(
            "moesaic_finished",
            "Continuations over, by what ended them.",
            ["model", "reason"],
            registry=registry,
        )
        self._first = Histogram(
            "moesaic_time_to_first_token_seconds",
            "From request to first token.",
            ["model"],
            buckets=_FIRST_S,
            registry=registry,
        )
        self._between = Histogram(
            "moesaic_inter_token_seconds", "From a token to the next.", ["model"], buckets=_BETWEEN_S, registry=registry
        )
        self._whole = Histogram(
            "moesaic_request_seconds", "From a request to its end.", ["model"], buckets=_WHOLE_S, registry=registry
        )
        self._ready = Gauge("moesaic_ready", "1: new requests are taken.", registry=registry)
        self.registry.register(_States(self._states))
        self.registry.register(_Distinct(self._routing))

    def hear(self, exchange: Exchange) -> None:
        """Count an HTTP request that is over."""
        self._requests.labels(exchange.method, exchange.route, str(exchange.status)).inc()

    def first_token(self, model: str, seconds: float) -> None:
        self._first.labels(model).observe(seconds)

    def between_tokens(self, model: str) -> Callable[[float], None]:
        """What is told of the seconds from each token to the next."""
        return self._between.labels(model).observe

    def finished(
        self, model: str, reason: str, seconds: float, *, prompt_tokens: int, cached_tokens: int, new_tokens: int
    ) -> None:
        """A continuation is over."""
        self._finished.labels(model, reason).inc()
        self._whole.labels(model).observe(seconds)
        self._prompt_tokens.labels(model).inc(prompt_tokens)
        self._cached_tokens.labels(model).inc(cached_tokens)
        self._new_tokens.labels(model).inc(new_tokens)

    def watch(self, model: str, state: Callable[[], ModelState], routing: "LiveRouting | None" = None) -> None:
        """Ask a model for its state, and for what its experts do, at each scrape."""
        self._states[model] = state
        if routing is not None and routing.routes:
            self._routing[model] = routing

    def forget(self, model: str) -> None:
        """A model is gone; what was counted of it stays."""
        self._states.pop(model, None)
        self._routing.pop(model, None)

    def exposition(self, *, ready: bool) -> bytes:
        """Everything, as Prometheus text; gauges of experts are of the last minute."""
        self._ready.set(ready)
        exposed = [
            Exposed(live.as_load(live.total()), live.as_load(live.window(_WINDOW_S)), {"model": model})
            for model, live in self._routing.items()
        ]
        return generate_latest(self.registry) + exposition_of(exposed).encode()


class _States(Collector):
    """Models' states as metrics, taken when they are asked for."""

    def __init__(self, states: dict[str, Callable[[], ModelState]]) -> None:
        self._of = states

    def collect(self) -> Iterator[Metric]:
        states = {model: state() for model, state in list(self._of.items())}
        for name, text, kind in _FAMILIES:
            family = kind(f"moesaic_{name}", text, labels=["model"])
            for model, state in states.items():
                family.add_metric([model], getattr(state, name))
            yield family


class _Distinct(Collector):
    """How many experts of a layer a step has work for, in the mean."""

    def __init__(self, routing: "dict[str, LiveRouting]") -> None:
        self._of = routing

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "moesaic_distinct_experts_per_step",
            "Experts of a layer that a step has work for, mean of the last minute.",
            labels=["model", "layer"],
        )
        for model, live in self._of.items():
            window = live.window(_WINDOW_S)
            for layer, tally in window.layers.items():
                if window.steps:
                    family.add_metric([model, str(layer)], tally.distinct / window.steps)
        yield family


_FAMILIES = (
    ("running", "Requests in the engine's steps.", GaugeMetricFamily),
    ("waiting", "Requests that wait for their turn.", GaugeMetricFamily),
    ("cache_used", "Share of the cache that running requests hold.", GaugeMetricFamily),
    ("cache_kept", "Share of the cache that prefixes hold beside them.", GaugeMetricFamily),
    ("prefix_hits", "Requests that began with blocks of others.", CounterMetricFamily),
    ("prefix_mismatches", "Of hits that were run again, those whose bits differed: always 0.", CounterMetricFamily),
    ("preemptions", "Requests that gave up their place for another.", CounterMetricFamily),
    ("evictions", "Blocks of the cache that were taken from prefixes.", CounterMetricFamily),
    ("drafted", "Tokens that speculation drafted.", CounterMetricFamily),
    ("accepted", "Drafted tokens that were what the model would have written.", CounterMetricFamily),
    ("steps", "Steps of the engine.", CounterMetricFamily),
    ("engine_seconds", "Seconds in the engine.", CounterMetricFamily),
    ("busy_seconds", "Seconds in steps, the engine's and all around it.", CounterMetricFamily),
)
