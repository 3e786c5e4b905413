"""`moesaic bench`, on models so small that the figures mean nothing and only their sense is tested."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from moesaic.bench import machine, reached

TINY = {
    "model_type": "mixtral", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "PEAK_SIZE", 64)
    monkeypatch.setattr(machine, "_LEAST_PROBE_BYTES", 2**20)
    monkeypatch.setattr(machine, "_CACHES_OF_PROBE", 0)
    monkeypatch.setattr(reached, "SAMPLE_SECONDS", 0.002)


def test_the_report_of_a_folder(moesaic, moe_folder, tmp_path):
    arguments = ("bench", moe_folder, "--batch", "4,1", "--samples", "3", "--threads", "1")
    ran = moesaic(*arguments, "--plot", tmp_path / "bench.svg", "--json")
    assert ran.exit_code == 0, ran.err
    document = ran.json
    assert document["random_weights"] is False and document["machine"]["threads"] == 1
    assert [case["case"] for case in document["cases"]] == ["decode 1", "decode 4", "prefill 95"]
    for case in document["cases"]:
        speed, fraction = case["tokens_per_second"], case["fraction"]
        assert speed["low"] <= speed["median"] <= speed["high"] and fraction["median"] > 0
        assert case["bound_by"] in ("memory", "arithmetic") and case["samples"] == 3
        assert {"attention", "experts", "router", "head"} <= case["shares"].keys()
        assert sum(case["shares"].values()) + case["outside_kernels"] == pytest.approx(1, abs=0.5)
    one, four, _ = document["cases"]
    assert one["bytes"] < four["bytes"]  # more experts are chosen by four
    assert 32 < document["held"]["bits_per_weight"] < 50  # rows are filled up to whole vectors
    assert len(list(ElementTree.parse(tmp_path / "bench.svg").iter("{http://www.w3.org/2000/svg}circle"))) == 2


@pytest.mark.parametrize("bits", [(), ("--bits", "8", "--experts-bits", "4")], ids=["plain", "packed"])
def test_a_model_without_weights_gets_random_ones(moesaic, tmp_path, bits):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY), encoding="utf-8")
    ran = moesaic("bench", path, "--batch", "2", "--prefill", "8", "--samples", "1", *bits)
    assert ran.exit_code == 0, ran.err
    assert "random weights" in ran.out and "brings no weights" in ran.err
    assert "decode 2" in ran.out and "prefill 8" in ran.out and "share of time" in ran.out
    assert "first token after" in ran.err


def test_no_prefill(moesaic, dense_folder):
    ran = moesaic("bench", dense_folder, "--batch", "1", "--prefill", "0", "--samples", "1", "--json")
    assert [case["case"] for case in ran.json["cases"]] == ["decode 1"]
    assert ran.json["cases"][0]["routing"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", "1,x"), "--batch 1,x; give numbers of texts above 0"),
        (("--batch", "0"), "--batch 0; give numbers of texts above 0"),
        (("--prefill", "96"), "this model takes prompts of 1 to 95 tokens"),
        (("--prefill", "-1"), "this model takes prompts of 1 to 95 tokens"),
        (("--threads", "0"), "--threads 0; give 1 or more"),
        (("--samples", "0"), "--samples 0; give 1 or more"),
        (("--experts-bits", "4"), "--experts-bits without --bits"),
        (("--bits", "5"), "invalid choice"),
        (("--plot", "/nowhere/picture.svg"), "--plot /nowhere/picture.svg; there is no folder /nowhere"),
    ],
)
def test_bad_input_is_one_line(moesaic, moe_folder, arguments, message):
    ran = moesaic("bench", moe_folder, *arguments)
    line = ran.err.splitlines()[-1]
    assert ran.exit_code == 2 and line.startswith("moesaic: error: ")
    assert re.search(re.escape(message), line), line
    assert ran.out == ""


def test_an_unknown_model(moesaic):
    ran = moesaic("bench", "no-such-model")
    assert ran.exit_code == 2 and "no path on this machine and no preset" in ran.err
