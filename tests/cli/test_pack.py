import gzip
import json
from pathlib import Path

import pytest

from moesaic.data.packed import open_packed
from moesaic.data.tokenizer import Tokenizer
from tests.cli.tiny_recipe import RECIPE


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rows = "".join(
        json.dumps({"text": f"{i}: the cat sat on the mat and looked at the dog. " * 6}) + "\n" for i in range(30)
    )
    (tmp_path / "corpus" / "prose").mkdir(parents=True)
    (tmp_path / "corpus" / "prose" / "part.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (tmp_path / "corpus" / "code").mkdir()
    (tmp_path / "corpus" / "code" / "all.txt").write_text("".join(f"x{i} = f({i}) + 1\n\n" for i in range(400)))
    return tmp_path / "corpus"


def test_pack_then_train_on_it(moesaic, corpus, tmp_path):
    packed = tmp_path / "packed"
    ran = moesaic("pack", corpus, "--out", packed, "--vocab-size", 300, "--workers", 1, "--json")
    assert ran.exit_code == 0
    assert set(ran.json["domains"]) == {"code", "prose"}
    opened = open_packed(packed)
    assert ran.json["digest"] == opened.digest
    assert sum(parts["train"]["tokens"] for parts in ran.json["domains"].values()) == opened.num_train_tokens
    assert ran.err.splitlines()[-1] == f"next: moesaic train --corpus {packed} --out runs/first"
    (tmp_path / "run.toml").write_text(RECIPE)
    train = ("train", "--config", tmp_path / "run.toml", "--corpus", packed, "--out", tmp_path / "run")
    trained = moesaic(*train)
    assert trained.exit_code == 0, trained.err
    assert Tokenizer.load(tmp_path / "run" / "tokenizer").digest == Tokenizer.load(packed / "tokenizer").digest
    assert not (tmp_path / "cache").exists()
    assert moesaic(*train, "--resume").exit_code == 0

    shard = next(packed.glob("000-code/train-*.bin"))
    data = shard.read_bytes()
    shard.write_bytes(data[:50] + bytes([data[50] ^ 4]) + data[51:])
    for refused in (moesaic(*train, "--resume"), moesaic("pack", corpus, "--out", packed, "--vocab-size", 300)):
        assert refused.exit_code == 2
        assert f"{shard} is damaged (its sha256 is" in refused.err.splitlines()[-1]


def test_packing_twice_does_nothing_and_another_text_is_refused(moesaic, corpus, tmp_path):
    words = ("pack", corpus, "--out", tmp_path / "packed", "--vocab-size", 300)
    assert moesaic(*words).exit_code == 0
    table = moesaic(*words)
    assert table.exit_code == 0 and table.out.splitlines()[0].split()[:2] == ["domain", "documents"]
    (corpus / "code" / "more.txt").write_text("more = 1\n" * 40)
    refused = moesaic(*words)
    assert refused.exit_code == 2
    assert "holds other packed text; delete it or choose another folder" in refused.err


def test_a_tokenizer_that_is_given(moesaic, corpus, tmp_path):
    Tokenizer.train(["the cat " * 99], 290).save(tmp_path / "mine")
    assert moesaic("pack", corpus, "--out", tmp_path / "packed", "--tokenizer", tmp_path / "mine").exit_code == 0
    assert Tokenizer.load(tmp_path / "packed" / "tokenizer").digest == Tokenizer.load(tmp_path / "mine").digest


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--workers", "0"], "--workers 0; give 1 or more"),
        (["--tokenizer", "absent"], "tokenizer.json; give a folder that holds one"),
        (["--tokenizer", "absent", "--vocab-size", "300"], "give one of the two"),
        (["--vocab-size", "100"], "vocab_size=100 is too small"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(moesaic, corpus, tmp_path, more, words):
    ran = moesaic("pack", corpus, "--out", tmp_path / "packed", *more)
    assert ran.exit_code == 2
    assert ran.err.splitlines()[-1].startswith("moesaic: error: ") and words in ran.err
    assert not (tmp_path / "packed").exists()
