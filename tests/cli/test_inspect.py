"""`moesaic inspect`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from moesaic import families, hub
from moesaic.data.tokenizer import Tokenizer
from moesaic.models.build import decoder_only
from moesaic.models.decoder import Decoder, route
from tests.cli.conftest import TEXT, tiny_config
from tests.families.cases import CASES, COMMON
from tests.telemetry.inspection.known import known_trace, tokenizer
from tests.telemetry.watching.lines import run_folder
from tests.tiny import lively_decoder
from tests.trace.traces import write_trace


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Two checkpoints with one tokenizer."""
    place, words = tmp_path_factory.mktemp("models"), Tokenizer.train([TEXT], vocab_size=300)
    for seed in (1, 2):
        config = tiny_config("mixtral", words.vocab_size)
        hub.save(Decoder(config).initialize(seed), place / str(seed), tokenizer=words)
    return place


@pytest.fixture
def corpus(tmp_path) -> Path:
    for domain, words in (("fables", "the quick brown fox"), ("menus", "naïve café 12345.")):
        (tmp_path / "texts" / domain).mkdir(parents=True)
        for number in range(40):
            (tmp_path / "texts" / domain / f"{number}.txt").write_text(f"{number} {words} " * (9 + number))
    return tmp_path / "texts"


def test_a_checkpoint_and_its_page(moesaic, models, corpus, tmp_path):
    page = tmp_path / "new" / "page.html"
    arguments = ("inspect", models / "1", "--data", corpus, "--max-tokens", "300", "--out", page)
    ran = moesaic(*arguments, "--json")
    assert ran.exit_code == 0, ran.err
    (subject,) = ran.json["subjects"]
    assert subject["domains"] == ["fables", "menus"]
    assert all(100 < tokens <= 300 for tokens in subject["domain_tokens"])
    assert sum(subject["domain_tokens"]) == subject["num_tokens"]
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert [line.split(":")[0] for line in ran.err.splitlines()[-2:]] == ["page", "next"]
    again = moesaic(*arguments)
    assert "- " in again.out and "routing through 1" in again.err
    packed = tmp_path / "packed"
    assert moesaic("pack", corpus, "--out", packed, "--tokenizer", models / "1").exit_code == 0
    same = moesaic("inspect", models / "1", "--data", packed, "--json")
    assert same.json["subjects"][0]["domains"] == ["fables", "menus"]
    moesaic("pack", corpus, "--out", tmp_path / "other", "--vocab-size", "280")
    other = moesaic("inspect", models / "1", "--data", tmp_path / "other")
    assert (other.exit_code, "another tokenizer" in other.err) == (2, True)


def test_two_checkpoints_over_a_file(moesaic, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text(TEXT)
    arguments = ("inspect", models / "1", "--against", models / "2", "--data", tmp_path / "book.txt")
    ran = moesaic(*arguments, "--sequence-length", "50", "--json")
    assert ran.exit_code == 0, ran.err
    assert not (tmp_path / "inspect.html").exists()
    ids = np.array(Tokenizer.load(models / "1").encode(TEXT, add_special_tokens=True))
    chosen = []
    for name in "12":
        model = decoder_only(hub.load(models / name), "a test")
        windows = [ids[first : first + 50] for first in range(0, len(ids), 50)]
        chosen.append([route(model, torch.from_numpy(window)[None])[1].as_topk()[0] for window in windows])
    shared = [
        len(set(a) & set(b))
        for left, right in zip(*chosen, strict=True)
        for a, b in zip(left.tolist(), right.tolist(), strict=True)
    ]
    assert ran.json["agreement"]["layers"]["1"] == [pytest.approx(np.mean(shared) / 2)]
    assert moesaic(*arguments).exit_code == 0
    assert "badge" in (tmp_path / "inspect.html").read_text()


def test_a_run_and_how_its_router_came_there(moesaic, models, corpus, tmp_path):
    run = run_folder(tmp_path / "run")
    for step in (10, 20, 30):
        source = models / ("2" if step == 10 else "1")
        (run / "checkpoints").mkdir(exist_ok=True)
        (run / "checkpoints" / f"step-{step:06d}").symlink_to(source)
    recipe = json.loads((run / "recipe.json").read_text())
    (run / "recipe.json").write_text(json.dumps({**recipe, "corpus_folder": str(corpus)}))
    ran = moesaic("inspect", run, "--max-tokens", "200", "--json")
    assert ran.exit_code == 0, ran.err
    assert "has not finished: inspecting its checkpoint of step 30" in ran.err
    found = ran.json["saturation"]
    assert found["names"] == ["step 10", "step 20", "step 30"]
    for shares in found["layers"].values():
        assert shares[0] < 1 and shares[1:] == [1, 1]
    assert ran.json["subjects"][0]["name"] == "run"


@pytest.mark.slow
def test_a_family_that_only_transformers_reads(moesaic, tmp_path):
    transformers = pytest.importorskip("transformers")
    words = Tokenizer.train([TEXT], vocab_size=300)
    config = transformers.FlexOlmoConfig(
        vocab_size=words.vocab_size, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_experts=5, num_experts_per_tok=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.FlexOlmoForCausalLM(config).save_pretrained(tmp_path / "flex")
    words.save(tmp_path / "flex")
    (tmp_path / "book.txt").write_text(TEXT)
    ran = moesaic("inspect", tmp_path / "flex", "--data", tmp_path / "book.txt", "--json")
    assert ran.exit_code == 0, ran.err
    assert "transformers runs it instead" in ran.err
    (subject,) = ran.json["subjects"]
    assert (subject["family"], len(subject["layers"])) == ("flex_olmo", 2)
    for layer in subject["layers"]:
        assert sum(layer["counts"]) == 2 * subject["num_tokens"] and len(layer["counts"]) == 5


def test_recordings(moesaic, tmp_path):
    known_trace(tmp_path / "a.npz", windows=3)
    known_trace(tmp_path / "b.npz", windows=4)
    tokenizer().save(tmp_path / "words")
    ran = moesaic("inspect", tmp_path / "a.npz", "--tokenizer", tmp_path / "words", "--json")
    assert ran.exit_code == 0, ran.err
    assert "punctuation" in ran.json["subjects"][0]["classes"]
    bare = moesaic("inspect", tmp_path / "a.npz", "--against", tmp_path / "b.npz", "--json")
    assert (bare.exit_code, bare.json["why_not"]) == (0, "they read other texts")
    assert "brings no tokenizer" in bare.err and bare.json["subjects"][0]["classes"] == []


def test_mistakes(moesaic, models, dense_folder, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    trace = write_trace(tmp_path / "t.npz")
    (tmp_path / "cut.npz").write_bytes(trace.read_bytes()[:-9])
    waiting = run_folder(tmp_path / "waiting")
    read = ("--data", tmp_path / "text.txt")
    for arguments, seen in (
        ((dense_folder, *read), "no layers that route; take one with experts"),
        ((tmp_path / "cut.npz",), "cut short"),
        ((tmp_path / "nowhere.npz",), "nowhere.npz"),
        ((trace, *read), "leave out --data"),
        ((trace, "--against", models / "1"), "give both traces"),
        ((models / "1", *read, "--tokenizer", models / "1"), "a checkpoint brings its own"),
        ((models / "1", "--data", tmp_path / "nowhere"), "no file or folder"),
        ((models / "1", *read, "--max-tokens", "0"), "--max-tokens 0"),
        ((models / "1", *read, "--sequence-length", "97"), "takes 1 to 96"),
        ((models / "1", *read, "--out", tmp_path), "is a folder"),
        ((waiting,), "has written no checkpoint yet"),
        ((tmp_path / "nowhere", *read), "nowhere"),
    ):
        ran = moesaic("inspect", *arguments)
        assert (ran.exit_code, ran.out, seen in ran.err) == (2, "", True), (arguments, ran.err)
        assert ran.err.splitlines()[-1].startswith("moesaic: error: ")


def test_a_recipe_that_cannot_be_read_names_what_to_give(moesaic, models, corpus, tmp_path):
    for number, recipe in enumerate(("", "[]", '{"recipe": {}}', '{"corpus_folder": 5}')):
        run = run_folder(tmp_path / f"run{number}")
        (run / "model").symlink_to(models / "1")
        (run / "recipe.json").write_text(recipe)
        ran = moesaic("inspect", run)
        assert (ran.exit_code, "name a text with --data" in ran.err) == (2, True), ran.err
        assert moesaic("inspect", run, "--data", corpus, "--max-tokens", "99", "--json").exit_code == 0


def test_windows_fit_what_the_engine_can_read(moesaic, tmp_path):
    """Rotations of long texts are others: the engine keeps to those of short ones, and windows with it."""
    fields = {"model_type": "phimoe", **COMMON, **CASES["phimoe/as released"], "vocab_size": 300}
    words = Tokenizer.train([TEXT], vocab_size=300)
    hub.save(lively_decoder(families.from_hf(fields)), tmp_path / "phi", tokenizer=words)
    (tmp_path / "book.txt").write_text(TEXT)
    ran = moesaic("inspect", tmp_path / "phi", "--data", tmp_path / "book.txt", "--json")
    assert ran.exit_code == 0, ran.err
    longer = moesaic("inspect", tmp_path / "phi", "--data", tmp_path / "book.txt", "--sequence-length", "64")
    assert (longer.exit_code, "this model takes 1 to 32 tokens" in longer.err) == (2, True)
