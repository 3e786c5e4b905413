"""The whole application on a real socket, with models that come and go."""

import asyncio

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from moesaic.serve.operation.application import create_application
from moesaic.serve.operation.drain import Readiness
from moesaic.serve.operation.fleet import Fleet
from moesaic.serve.operation.keys import Keys
from moesaic.serve.operation.logs import RequestLog
from moesaic.serve.operation.metrics import Metrics
from moesaic.serve.operation.settings import LogSettings, settings_of
from tests.serve import tiny
from tests.serve.operation.whole import serving, settings

KEY = {"x-api-key": "sk-a"}


def complete(client: httpx.Client, model: str = "one", **fields) -> httpx.Response:
    body = {"model": model, "prompt": "the quick brown fox " * 9, "max_tokens": 5, "temperature": 0, **fields}
    return client.post("/v1/completions", json=body, timeout=60)


def test_what_is_counted() -> None:
    with serving(settings()) as client:
        first, second = (complete(client).json() for _ in range(2))
        assert first["choices"][0]["text"] == second["choices"][0]["text"]
        text = client.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    values = {name: sum(sample.value for sample in family.samples) for name, family in families.items()}
    assert values["moesaic_generation_tokens"] == 10
    assert values["moesaic_prefix_hits"] == 1 and values["moesaic_cached_prompt_tokens"] >= 32
    rows = families["moesaic_expert_rows"].samples
    assert {(sample.labels["layer"], sample.labels["model"]) for sample in rows} == {("0", "one"), ("1", "one")}
    routed = {sample.value for sample in families["moesaic_routed_tokens"].samples}
    assert len(routed) == 1 and {sum(s.value for s in rows if s.labels["layer"] == "0")} == {
        2 * value for value in routed
    }
    assert 1 <= families["moesaic_distinct_experts_per_step"].samples[0].value <= 5


@pytest.mark.slow
def test_models_come_and_go() -> None:
    with serving(settings(load_models=True)) as client:
        assert complete(client, "two").status_code == 404
        loaded = client.post("/v1/models/load", json={"model": "two"}, timeout=120)
        assert loaded.json() == {"models": {"one": "ready", "two": "ready"}}
        texts = [complete(client, name).json()["choices"][0]["text"] for name in ("one", "two")]
        assert texts[0] == texts[1]
        gone = client.post("/v1/models/unload", json={"model": "one"}, timeout=60)
        assert gone.json() == {"models": {"one": "unloaded", "two": "ready"}}
        assert complete(client, "one").status_code == 404
        assert client.post("/v1/models/unload", json={"model": "two"}).status_code == 400
        assert client.post("/v1/models/load", json={"model": "three"}).status_code == 404
        assert client.get("/health").json() == {"status": "ok"}


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_leaves_the_others(tmp_path) -> None:
    broken = {"path": str(tmp_path), "at_start": False}
    tree = {"models": {"one": {"path": str(tiny.folder()), "cache": 4096}, "broken": broken}, "load_models": True}
    with serving(settings_of(tree)) as client:
        answer = client.post("/v1/models/load", json={"model": "broken"}, timeout=120)
        assert answer.status_code == 400 and "cannot load" in answer.json()["error"]["message"]
        assert complete(client).status_code == 200


def test_loading_is_there_only_where_settings_allow_it() -> None:
    with serving(settings()) as client:
        assert client.post("/v1/models/load", json={"model": "two"}).status_code in (404, 405)


def test_limits_of_one_server() -> None:
    tree = settings(limits={"prompt_tokens": 50, "new_tokens": 20, "body_bytes": 2000, "choices": 2})
    with serving(tree) as client:
        assert complete(client, prompt="fox", max_tokens=None).json()["usage"]["completion_tokens"] == 16
        cut = complete(client, prompt="fox", max_tokens=21).json()
        assert (cut["usage"]["completion_tokens"], cut["choices"][0]["finish_reason"]) == (20, "length")
        assert complete(client, prompt="the quick brown fox " * 40).status_code == 400
        assert complete(client, prompt="x" * 2000).status_code == 413
        assert complete(client, prompt="fox", n=3).status_code == 400
        assert complete(client, prompt="fox", n=2).status_code == 200


def test_keys_and_names_and_other_sites() -> None:
    tree = settings(cors_origins=["https://ours.example"], metrics_key=True)
    with serving(tree, Keys([("alice", "sk-a")])) as client:
        assert complete(client).status_code == 401
        assert client.get("/metrics").status_code == 401
        assert client.get("/metrics", headers=KEY).status_code == 200
        assert client.get("/health").status_code == 200
        assert client.get("/").status_code == 200
        asks = {"origin": "https://ours.example", "access-control-request-method": "POST"}
        asked = client.options("/v1/completions", headers=asks)
        assert asked.headers["access-control-allow-origin"] == "https://ours.example"
        other = client.options("/v1/completions", headers={**asks, "origin": "https://theirs.example"})
        assert "access-control-allow-origin" not in other.headers
    with serving(settings()) as client:
        assert client.get("/v1/models", headers={"host": "rebound.example"}).status_code == 403
        assert [client.head(path).status_code for path in ("/health", "/ready")] == [200, 200]
        assert client.get("/v1/models/").json() == client.get("/v1/models").json()
        asked = client.options("/v1/completions", headers=asks)
        assert "access-control-allow-origin" not in asked.headers


def test_until_models_are_loaded_only_probes_are_answered() -> None:
    metrics, readiness = Metrics(), Readiness()
    fleet = Fleet(settings(), metrics)
    log = RequestLog(LogSettings(format="none"))
    app = create_application(settings(), fleet, Keys([]), readiness, metrics, log)

    async def ask() -> list[int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [(await client.get(path)).status_code for path in ("/health", "/ready", "/v1/models")]

    assert asyncio.run(ask()) == [200, 503, 503]
