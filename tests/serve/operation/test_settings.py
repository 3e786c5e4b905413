import pytest

from moesaic.errors import ConfigError
from moesaic.serve.operation.settings import Limits, ModelSettings, ServeSettings, parse_bytes, settings_of


def test_a_file_becomes_settings() -> None:
    found = settings_of(
        {
            "port": 0,
            "cors_origins": ["https://a.example"],
            "limits": {"queue": 3, "body_s": 5},
            "models": {"small": {"path": "x", "bits": 4, "cache": "2GiB"}},
        }
    )
    assert found == ServeSettings(
        port=0,
        cors_origins=("https://a.example",),
        limits=Limits(queue=3, body_s=5.0),
        models={"small": ModelSettings(path="x", bits=4, cache="2GiB")},
    )


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"prot": 1}, "unknown field 'prot' in serve; did you mean 'port'?"),
        ({"port": 70000}, "port=70000; use 1 to 65535"),
        ({"port": "x"}, "serve.port='x'; it must be a whole number"),
        ({"limits": {"queue": -1}}, "limits.queue=-1; use 0 or more"),
        ({"limits": {"body_s": 0}}, "body_s=0.0; use more than 0"),
        ({"models": {"a": {"bits": 4}}}, "models.a without path"),
        ({"models": {"a": {"path": "x", "bits": 5}}}, "bits=5; use 4 or 8"),
        ({"models": {"a": {"path": "x", "experts_bits": 4}}}, "experts_bits without bits"),
        ({"models": {"a": {"path": "x", "cache": "lots"}}}, "cache='lots'; give bytes such as"),
        ({"models": {"a": {"path": "x", "cache": 0}}}, "cache=0; give tokens"),
        ({"models": {"a": {"path": "x", "speculation": "draft"}}}, 'speculation="draft" and draft=PATH'),
        ({"models": {"a": {"path": "x", "draft": "y"}}}, 'speculation="draft" and draft=PATH'),
        ({"models": 3}, "models must be tables"),
        ({"tls_cert": "/none.pem"}, "TLS needs both"),
        ({"tls_cert": "/none.pem", "tls_key": "/none.key"}, "there is no such file"),
        ({"drain_seconds": -1}, "drain_seconds=-1.0; use 0 or more"),
        ({"log": {"format": "xml"}}, "log.format='xml'; it must be one of"),
    ],
    ids=str,
)
def test_impossible_settings_are_named(tree: dict, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_of(tree)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "count"), [("500MB", 500 * 10**6), ("4GiB", 4 * 2**30), ("1.5 g", 1_500_000_000), ("64kib", 65536)]
)
def test_bytes(text: str, count: int) -> None:
    assert parse_bytes("cache", text) == count
