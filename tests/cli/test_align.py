"""From parallel texts to a model that translates, and span corruption from a packed folder; each by its commands."""

import json

import pytest

from moesaic.data.tokenizer import Tokenizer
from tests.cli.tiny_recipe import ENCODER_DECODER


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))


def books(folder) -> list[str]:
    """The same numbered sections in two languages, one paragraph of them in one only."""
    english = [f"1.{i}. About {i}\n\nThe cat number {i} sits upon its own mat.\n\n# ls -{i}" for i in range(1, 60)]
    french = [f"1.{i}. De {i}\n\nLe chat numéro {i} est assis sur sa natte.\n\n# ls -{i}" for i in range(1, 60)]
    (folder / "en.txt").write_text("\n\n".join(english))
    (folder / "fr.txt").write_text("\n\n".join(french))
    return [f"en={folder / 'en.txt'}", f"fr={folder / 'fr.txt'}"]


def test_align_then_train_on_it(moesaic, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    ran = moesaic("align", *books(tmp_path), "--out", pairs, "--json")
    assert ran.exit_code == 0, ran.err
    assert ran.json["texts"] == {"en": 118, "fr": 118}
    assert ran.json["sections"] == ran.json["even_sections"]
    assert len(pairs.read_text().splitlines()) == ran.json["groups"] == 118
    assert json.loads(pairs.read_text().splitlines()[1])["fr"] == "Le chat numéro 1 est assis sur sa natte."
    assert ran.err.splitlines()[-1].startswith("next: moesaic train --config examples/translation.toml --corpus")

    (tmp_path / "run.toml").write_text(ENCODER_DECODER)
    train = ("train", "--config", tmp_path / "run.toml", "--corpus", pairs, "--out", tmp_path / "run")
    trained = moesaic(*train, "--set", "data.task=translation", "--json")
    assert trained.exit_code == 0, trained.err
    assert set(trained.json["by_domain"]) == {"en-fr", "fr-en"}
    assert trained.json["other_sources"] > 0
    assert "6 segments" not in trained.err and "pairs to train on" in trained.err
    tokenizer = Tokenizer.load(tmp_path / "run" / "tokenizer")
    assert [tokenizer.language_id(language) for language in ("en", "fr")] == [
        tokenizer.vocab_size - 2,
        tokenizer.vocab_size - 1,
    ]
    assert '--target-prefix "<|fr|>"' in trained.err.splitlines()[-1]
    written = moesaic(
        "generate", tmp_path / "run" / "model", "--prompt", "<|en|>The cat", "--target-prefix", "<|fr|>",
        "--max-new-tokens", 3,
    )  # fmt: skip
    assert written.exit_code == 0, written.err
    resumed = moesaic("train", "--out", tmp_path / "run", "--resume", "--json")
    assert resumed.exit_code == 0, resumed.err
    assert resumed.json["by_domain"] == trained.json["by_domain"]


def test_the_table_says_why_texts_are_left_out(moesaic, tmp_path):
    ran = moesaic("align", *books(tmp_path), "--out", tmp_path / "pairs.jsonl", "--unit", "paragraph")
    assert ran.exit_code == 0
    assert "59 not translated" in ran.out


def test_span_corruption_of_a_packed_folder(moesaic, tmp_path):
    (tmp_path / "texts" / "prose").mkdir(parents=True)
    (tmp_path / "texts" / "prose" / "all.txt").write_text("the cat sat on the mat and looked at the dog.\n\n" * 200)
    (tmp_path / "run.toml").write_text(ENCODER_DECODER)
    packed, out = tmp_path / "packed", tmp_path / "run"
    assert moesaic("pack", tmp_path / "texts", "--out", packed, "--vocab-size", 300).exit_code == 0
    train = ("train", "--config", tmp_path / "run.toml", "--set", "data.task=span_corruption", "--json")
    refused = moesaic(*train, "--corpus", packed, "--out", out)
    assert refused.exit_code == 2
    assert "needs 2 sentinels and the vocabulary has 0" in refused.err.splitlines()[-1]
    options = ("--vocab-size", 320, "--sentinels", 20)
    assert moesaic("pack", tmp_path / "texts", "--out", tmp_path / "better", *options).exit_code == 0
    trained = moesaic(*train, "--corpus", tmp_path / "better", "--out", tmp_path / "again")
    assert trained.exit_code == 0, trained.err
    assert "<extra_id_0>" in trained.err.splitlines()[-1]
    unpacked = moesaic(*train, "--corpus", tmp_path / "texts", "--out", tmp_path / "third")
    assert unpacked.exit_code == 0, unpacked.err
    assert len(Tokenizer.load(tmp_path / "third" / "tokenizer").sentinel_ids) == 100


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (["en=a.txt"], "1 languages to align"),
        (["en"], "write LANGUAGE=FILE"),
        (["en=a.txt", "en=a.txt"], "given twice"),
        (["en=a.txt", "fr=none.txt"], "none.txt: No such file"),
        (["en=a.txt", "fr=bad.txt"], "bad.txt is not UTF-8"),
        (["en=a.txt", "fr=a.txt"], "no part of these texts is a translation"),
        (["en=a.txt", "fr=b.txt", "--out", "pairs.txt"], "name it .jsonl"),
    ],
)
def test_mistakes(moesaic, tmp_path, monkeypatch, words, seen):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("Some words in a text.")
    (tmp_path / "b.txt").write_text("Quelques mots.")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    ran = moesaic("align", *words, *([] if "--out" in words else ["--out", "pairs.jsonl"]))
    assert ran.exit_code == 2
    assert seen in ran.err.splitlines()[-1]
    assert not (tmp_path / "pairs.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        (["data.task=translation"], "needs pairs of texts; give --corpus FILE.jsonl"),
        (["data.task=causal"], "set data.task to 'span_corruption' or 'translation'"),
        (["data.task=translating"], "data.task='translating'; it must be one of 'causal', 'span_corruption'"),
        (["data.task=span_corruption", "data.noise_density=1.5"], "data.noise_density=1.5; it must be above 0"),
        (["data.task=span_corruption", "data.mean_span_length=0"], "data.mean_span_length=0.0; use 1 or more"),
    ],
)
def test_tasks_that_cannot_be(moesaic, tmp_path, changes, seen):
    (tmp_path / "run.toml").write_text(ENCODER_DECODER)
    words = [word for change in changes for word in ("--set", change)]
    ran = moesaic("train", "--config", tmp_path / "run.toml", "--out", tmp_path / "run", *words)
    assert ran.exit_code == 2
    assert seen in ran.err.splitlines()[-1]
