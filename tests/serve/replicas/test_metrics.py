"""Metrics of replicas together, read back with the official client."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from moesaic.serve.replicas.metrics import merged


def text(requests: int) -> str:
    registry = CollectorRegistry()
    Counter("requests", "Requests.", ["route"], registry=registry).labels("/a").inc(requests)
    Gauge("queued", "Waiting.", registry=registry).set(requests + 0.5)
    Histogram("latency_seconds", "Time.", buckets=(1, 2), registry=registry).observe(requests)
    return generate_latest(registry).decode()


def test_every_sample_says_of_which_replica_it_is() -> None:
    found = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(merged([text(1), text(7)]).decode())
        for sample in family.samples
    }
    assert found["requests_total", (("replica", "0"), ("route", "/a"))] == 1
    assert found["requests_total", (("replica", "1"), ("route", "/a"))] == 7
    assert found["queued", (("replica", "1"),)] == 7.5
    assert found["latency_seconds_bucket", (("le", "1.0"), ("replica", "0"))] == 1
    assert found["latency_seconds_count", (("replica", "1"),)] == 1


def test_nothing_at_all() -> None:
    assert merged([]) == b""
