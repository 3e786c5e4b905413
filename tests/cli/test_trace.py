"""`moesaic trace`."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moesaic import hub
from moesaic.cli.text import open_tokenizer
from moesaic.data.tokenizer import Tokenizer
from moesaic.models.build import decoder_only
from moesaic.models.decoder import Decoder, route
from moesaic.trace import Trace, TraceWriter
from tests.cli.conftest import TEXT, tiny_config
from tests.trace.traces import two_layers, write_trace


@pytest.fixture
def text_file(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text.txt"


@pytest.fixture
def corpus(tmp_path) -> Path:
    for domain, words in (("fables", "the quick brown fox"), ("menus", "naïve café 12345.")):
        (tmp_path / "texts" / domain).mkdir(parents=True)
        for number in range(30):
            text = f"{number} {words} " * (5 + number)
            (tmp_path / "texts" / domain / f"{number}.txt").write_text(text, encoding="utf-8")
    return tmp_path / "texts"


def test_a_text_is_recorded_and_shown(moesaic, moe_folder, text_file, tmp_path):
    out = tmp_path / "new" / "trace.npz"
    arguments = ("--text", text_file, "--out", out, "--sequence-length", "50", "--max-tokens", "140")
    ran = moesaic("trace", moe_folder, *arguments, "--json")
    assert ran.exit_code == 0, ran.err
    token_ids = open_tokenizer(str(moe_folder)).encode(TEXT, add_special_tokens=True)[:140]
    trace = Trace.open(out)
    assert trace.token_facts["token_ids"].tolist() == token_ids
    windows = [token_ids[:100], token_ids[100:]]
    model, counts = decoder_only(hub.load(moe_folder), "a test"), {0: np.zeros(5, int), 1: np.zeros(5, int)}
    for ids in windows:
        for layer, rows in route(model, torch.tensor(ids).view(-1, min(50, len(ids)))).items():
            counts[layer] += rows.counts_E.numpy()
    assert [layer["counts"] for layer in ran.json["layers"]] == [counts[0].tolist(), counts[1].tolist()]
    assert (ran.json["forwards"], ran.json["tokens"], ran.json["routed_tokens"]) == (2, 140, 140)
    for layer, found in enumerate(ran.json["layers"]):
        assert found["max_over_mean"] == pytest.approx(counts[layer].max() / (280 / 5))
        assert found["share_of_tokens"] == pytest.approx(counts[layer].max() / 140)
        assert found["heaviest"] == counts[layer].argmax()
        assert (found["rows_per_token"], found["dropped"], found["domain_divergence"]) == (2, 0, None)
    assert ran.err.splitlines()[-1] == f"next: moesaic trace {out} --json"
    again = moesaic("trace", out, "--json")
    assert (again.exit_code, again.json) == (0, ran.json)


def test_the_table_names_every_layer(moesaic, moe_folder, text_file, tmp_path):
    ran = moesaic("trace", moe_folder, "--text", text_file, "--out", tmp_path / "trace.npz", "--max-tokens", "30")
    title, head, *rows = ran.out.splitlines()
    assert "1 forwards, 30 tokens" in title and "checksum holds" in title
    assert head.split()[:2] == ["layer", "experts"]
    assert [row.split()[:3] for row in rows] == [["0", "5", "2.00"], ["1", "5", "2.00"]]
    assert "tracing" in ran.err
    shown = moesaic("trace", tmp_path / "trace.npz")
    assert (shown.exit_code, shown.out) == (0, ran.out)


def test_a_corpus_is_told_apart_by_domain(moesaic, corpus, tmp_path, monkeypatch):
    tokenizer = Tokenizer.train([TEXT], vocab_size=300)
    moe_folder = tmp_path / "model"
    hub.save(Decoder(tiny_config("mixtral", tokenizer.vocab_size)).initialize(), moe_folder, tokenizer=tokenizer)
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "trace.npz"
    arguments = ("--corpus", corpus, "--out", out, "--max-tokens", "90", "--sequence-length", "32")
    ran = moesaic("trace", moe_folder, *arguments, "--json")
    assert ran.exit_code == 0, ran.err
    assert ran.json["domains"] == ["fables", "menus"]
    for layer in ran.json["layers"]:
        by_domain = np.array(layer["domain_counts"])
        assert by_domain.sum(0).tolist() == layer["counts"]
        assert (by_domain.sum(1) > 0).all()
        assert 0 <= layer["domain_divergence"] <= 1
    packed = tmp_path / "packed"
    assert moesaic("pack", corpus, "--out", packed, "--tokenizer", moe_folder).exit_code == 0
    same = moesaic("trace", moe_folder, "--corpus", packed, "--out", out, *arguments[4:], "--json")
    assert same.json == ran.json
    moesaic("pack", corpus, "--out", tmp_path / "other", "--vocab-size", "280")
    other = moesaic("trace", moe_folder, "--corpus", tmp_path / "other", "--out", out)
    assert (other.exit_code, "another tokenizer" in other.err) == (2, True)


def test_drops_and_padding_are_shown(moesaic, tmp_path):
    path = write_trace(tmp_path / "trace.npz")
    ran = moesaic("trace", path, "--json")
    trace = Trace.open(path)
    dropped = [layer["dropped"] for layer in ran.json["layers"]]
    assert dropped[0] == 0
    assert dropped[1] == pytest.approx(1 - trace.rows(3).num_rows / trace.chosen(3).num_rows)


def test_a_trace_of_nothing_is_refused_by_all_who_read_it(moesaic, tmp_path):
    path = tmp_path / "trace.npz"
    with TraceWriter(path, two_layers()):
        pass
    said = {moesaic(verb, path).err.splitlines()[-1] for verb in ("trace", "inspect")}
    wanted = f"{path} is a whole trace and holds no tokens; record one of some text with `moesaic trace`"
    assert said == {f"moesaic: error: {wanted}"}


def test_mistakes(moesaic, moe_folder, dense_folder, text_file, tmp_path):
    out, empty, broken = tmp_path / "t.npz", tmp_path / "empty.txt", tmp_path / "broken.npz"
    empty.write_bytes(b"")
    broken.write_bytes(write_trace(tmp_path / "whole.npz").read_bytes()[:-7])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    read = ("--text", text_file, "--out", out)
    for arguments, seen in (
        ((moe_folder,), "no --out"),
        ((out, "--text", text_file), "no --out"),
        ((tmp_path / "nowhere.npz",), "nowhere.npz"),
        ((broken,), "no whole routing trace"),
        ((moe_folder, "--text", text_file, "--out", tmp_path / "t.txt"), "ends in .npz"),
        ((moe_folder, "--text", tmp_path / "nowhere.txt", "--out", out), "nowhere.txt"),
        ((moe_folder, "--text", empty, "--out", out), "holds no text"),
        ((moe_folder, "--text", tmp_path / "latin.txt", "--out", out), "not UTF-8 at byte 3"),
        ((moe_folder, *read, "--max-tokens", "0"), "--max-tokens 0"),
        ((moe_folder, *read, "--sequence-length", "97"), "takes 1 to 96 tokens"),
        ((moe_folder, *read, "--sequence-length", "-1"), "takes 1 to 96 tokens"),
        ((moe_folder, *read, "--corpus", tmp_path), "not allowed with"),
        ((dense_folder, *read), "no layers that route"),
        ((tmp_path / "nowhere", *read), "nowhere"),
    ):
        ran = moesaic("trace", *arguments)
        assert (ran.exit_code, ran.out, seen in ran.err) == (2, "", True), ran.err
        assert ran.err.splitlines()[-1].startswith("moesaic: error: ")
    assert not out.exists()


def test_showing_a_trace_loads_no_torch(tmp_path):
    path = write_trace(tmp_path / "trace.npz")
    code = f"""
import json, sys
from moesaic.cli.main import main
assert main(["trace", {str(path)!r}]) == 0
print(json.dumps([name for name in ("torch", "transformers", "tokenizers") if name in sys.modules]), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr.splitlines()[-1]) == []
