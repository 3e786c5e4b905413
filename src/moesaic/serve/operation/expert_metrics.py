"""The live load of models' experts as metrics: counts since the start, and the last minute judged.

Names are those that a run's own metrics have (telemetry/prometheus.py).
"""

import math
from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from moesaic.serve.live_routing import LONGEST_S, LiveRouting, Tally
from moesaic.telemetry.health import RouterHealth

_GAUGES = {
    "load_entropy": "Entropy of the load of the last minute over ln E; 1 is even.",
    "effective_experts": "As how many equally loaded experts the load of the last minute is worth.",
    "max_violation": "Heaviest load of the last minute over the mean, less 1 (MaxVio).",
}


class ExpertMetrics:
    """A collector of models by name. Rows, tokens and distinct experts are counters: divide their rates by steps'."""

    def __init__(self, routing: Mapping[str, LiveRouting]) -> None:
        self._of = routing

    def collect(self) -> Iterator[Metric]:
        models = {name: live for name, live in list(self._of.items()) if live.routes}
        yield from _counters({name: live.total() for name, live in models.items()})
        health = {name: RouterHealth.of(live.as_load(live.window(LONGEST_S))) for name, live in models.items()}
        for field, text in _GAUGES.items():
            family = GaugeMetricFamily(f"moesaic_router_{field}", text, labels=["model", "layer"])
            for name, judged in health.items():
                for layer in judged.layers:
                    value = getattr(layer, field)
                    if not math.isnan(value):
                        family.add_metric([name, str(layer.layer)], value)
            yield family


def _counters(totals: Mapping[str, Tally]) -> Iterator[Metric]:
    rows = _counter("moesaic_expert_rows", "Rows that the router gave to an expert.", "layer", "expert")
    distinct = _counter("moesaic_distinct_experts", "Experts that a step had work for, added up over steps.", "layer")
    tokens = _counter("moesaic_routed_tokens", "Tokens that went through the layers that route.")
    steps = _counter("moesaic_routed_steps", "Steps of the engine.")
    for name, total in totals.items():
        tokens.add_metric([name], total.tokens)
        steps.add_metric([name], total.steps)
        for layer, counted in total.layers.items():
            distinct.add_metric([name, str(layer)], counted.distinct)
            for expert, count in enumerate(counted.counts_E.tolist()):
                rows.add_metric([name, str(layer), str(expert)], count)
    yield from (rows, distinct, tokens, steps)


def _counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, labels=["model", *labels])
