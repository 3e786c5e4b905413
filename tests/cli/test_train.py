import json
from pathlib import Path

import pytest

from moesaic.cli.main import main

RECIPE = """
vocab_size = 300
[model]
model_type = "qwen3_moe"
hidden_size = 24
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 8
num_experts = 5
num_experts_per_tok = 2
moe_intermediate_size = 12
intermediate_size = 24
norm_topk_prob = true
[train]
steps = 6
batch_size = 2
sequence_length = 16
warmup_steps = 2
evaluate_every = 3
evaluate_tokens = 64
checkpoint_every = 3
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for domain, words in (("prose", "the cat sat on the mat and looked at the dog. "), ("code", "x = f(y) + 1\n")):
        folder = tmp_path / "corpus" / domain
        folder.mkdir(parents=True)
        for number in range(30):
            (folder / f"{number:02}.txt").write_text(f"{domain} {number}: {words}" * 6)
    return tmp_path / "corpus"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RECIPE)
    return path


def train(tmp_path, corpus, recipe, *more):
    out = str(tmp_path / "run")
    return main(["train", "--out", out, "--config", str(recipe), "--corpus", str(corpus), *more])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))


def test_train_then_generate_as_the_last_line_says(tmp_path, corpus, recipe, capsys):
    assert train(tmp_path, corpus, recipe, "--json") == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["steps"] == 6
    assert set(result["by_domain"]) == {"prose", "code"}
    assert captured.err.splitlines()[-1].startswith("next: moesaic generate ")
    assert main(["generate", result["model"], "--prompt", "the cat", "--max-new-tokens", "4", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["token_ids"]) == 4


def test_a_finished_run_is_not_trained_over(tmp_path, corpus, recipe, capsys):
    assert train(tmp_path, corpus, recipe) == 0
    assert train(tmp_path, corpus, recipe) == 2
    assert "holds a run at step 6; add --resume" in capsys.readouterr().err


def test_resume_of_another_recipe_is_refused(tmp_path, corpus, recipe, capsys):
    assert train(tmp_path, corpus, recipe) == 0
    assert train(tmp_path, corpus, recipe, "--resume", "--set", "train.seed=5") == 2
    assert "recipe.train.seed was 0 and is now 5" in capsys.readouterr().err
    assert train(tmp_path, corpus, recipe, "--resume") == 0
    assert "going on from step 6 of 6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--set", "model.model_type=gpt5"], "unknown model_type 'gpt5'"),
        (["--set", "model.num_experts_per_tok=9"], "top_k=9 is more than num_experts=5"),
        (["--set", "train.batch_size=100000"], "fewer than one batch"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(tmp_path, corpus, recipe, capsys, more, words):
    assert train(tmp_path, corpus, recipe, *more) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("moesaic: error: ") and words in last
