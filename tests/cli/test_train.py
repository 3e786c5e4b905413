import gzip
import json
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from moesaic.cli.main import main
from moesaic.train.recipe import Recipe

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


def test_resume_says_when_there_is_nothing_to_resume(tmp_path, corpus, recipe, capsys):
    assert train(tmp_path, corpus, recipe, "--resume") == 0
    assert f"no checkpoint in {tmp_path / 'run'}: starting at step 0" in capsys.readouterr().err


def test_resume_of_another_recipe_is_refused(tmp_path, corpus, recipe, capsys):
    assert train(tmp_path, corpus, recipe) == 0
    assert train(tmp_path, corpus, recipe, "--resume", "--set", "train.seed=5") == 2
    assert "recipe.train.seed was 0 and is now 5" in capsys.readouterr().err
    assert train(tmp_path, corpus, recipe, "--resume") == 0
    assert "going on from step 6 of 6" in capsys.readouterr().err


@pytest.mark.parametrize("damaged", [b"", b"{", b"[1]", b"caf\xe9", b'{"corpus_folder": null, "start": {"siz": 1}}'])
def test_a_damaged_recipe_names_the_way_on_and_it_works(tmp_path, corpus, recipe, capsys, damaged):
    assert train(tmp_path, corpus, recipe) == 0
    place = tmp_path / "run" / "recipe.json"
    place.write_bytes(damaged)
    assert main(["train", "--out", str(tmp_path / "run"), "--resume"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"{place} is damaged (" in last and "; delete it and use --resume with --config FILE or --size" in last
    place.unlink()
    assert train(tmp_path, corpus, recipe, "--resume") == 0
    assert main(["train", "--out", str(tmp_path / "run"), "--resume"]) == 0


def test_resume_needs_no_recipe_and_no_corpus(tmp_path, corpus, recipe, capsys, monkeypatch):
    assert train(tmp_path, corpus, recipe, "--set", "train.steps=4") == 0
    monkeypatch.chdir(tmp_path / "corpus")
    capsys.readouterr()
    assert main(["train", "--out", str(tmp_path / "run"), "--resume", "--json"]) == 0
    captured = capsys.readouterr()
    assert "going on from step 4 of 4" in captured.err
    assert json.loads(captured.out)["steps"] == 4


MISTAKES = [
    (["--set", "model.model_type=gpt5"], "unknown model_type 'gpt5'"),
    (["--set", "model.num_experts_per_tok=9"], "top_k=9 is more than num_experts=5"),
    (["--set", "train.steps=many"], "train.steps='many'; it must be a whole number"),
    (["--set", "train.warmup_steps=6"], "train.warmup_steps=6 leaves nothing of train.steps=6"),
    (["--set", "train.sequence_length=99", "--set", "model.max_position_embeddings=64"], "max_position_embeddings=64"),
    (["--size", "tiny"], "--size and --config both describe the recipe; give one"),
    (["--profile", "0"], "--profile 0; give the number of steps to profile"),
    (["--sweep"], "--sweep without anything to vary"),
    (["--sweep", "train.seed"], "--sweep 'train.seed'; write table.field=value,value"),
    (["--sweep", "train.seed=1,1"], "has a value twice"),
    (["--sweep", "train.steps=3,0"], "train.steps=0; use 1 or more"),
    (["--sweep", "train.seed=1,2", "--print-recipe"], "--print-recipe prints one recipe and --sweep has many"),
]


@pytest.mark.parametrize(("more", "words"), MISTAKES)
def test_mistakes_are_one_line_and_nothing_is_written(tmp_path, corpus, recipe, capsys, more, words):
    assert train(tmp_path, corpus, recipe, *more) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("moesaic: error: ") and words in captured.err
    assert captured.out == "" and not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_text_that_is_too_little(tmp_path, corpus, recipe, capsys):
    assert train(tmp_path, corpus, recipe, "--set", "train.batch_size=100000") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("moesaic: error: ") and "fewer than one batch" in last


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "train needs --out FOLDER, or --print-recipe"),
        (["--out", "run", "--size", "huge"], "unknown size 'huge'. Known: tiny, small, medium, large"),
        (["--out", "run", "--config", "none.toml"], "cannot read the recipe none.toml"),
    ],
)
def test_mistakes_without_a_recipe(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and words in captured.err
    assert list(tmp_path.iterdir()) == []


SMALLER = ["--set", "model.hidden_size=32", "--set", "train.steps=3", "--set", "train.batch_size=2"]
SMALLER += ["--set", "train.sequence_length=16", "--set", "vocab_size=300", "--set", "model.num_experts=5"]


def test_a_size_says_what_it_derives(tmp_path, corpus, capsys):
    arguments = ["train", "--out", str(tmp_path / "run"), "--corpus", str(corpus), "--size", "tiny", *SMALLER]
    assert main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert "train.learning_rate" in captured.err and "set by you" in captured.err
    assert "about" in captured.err and "on two CPU cores" in captured.err
    derived = {row["field"]: row for row in json.loads(captured.out)["derived"]}
    assert derived["train.steps"] == {"field": "train.steps", "value": 3, "reason": "set by you", "is_set": True}
    assert derived["model.moe_intermediate_size"]["value"] == 16
    assert not derived["model.moe_intermediate_size"]["is_set"]
    assert main(["train", "--out", str(tmp_path / "run"), "--resume"]) == 0


def test_a_printed_recipe_is_one(tmp_path, capsys):
    assert main(["train", "--size", "small", "--set", "train.seed=3", "--print-recipe"]) == 0
    captured = capsys.readouterr()
    (tmp_path / "small.toml").write_text(captured.out)
    assert "# 32 x layers" in captured.out and "next: moesaic train --config" in captured.err
    assert main(["train", "--config", str(tmp_path / "small.toml"), "--print-recipe", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)["recipe"]
    assert tree["train"]["seed"] == 3
    assert Recipe.from_dict(tree) == Recipe.from_dict(tomllib.loads((tmp_path / "small.toml").read_text()))


def test_a_profile_and_a_board_beside_the_run(tmp_path, corpus, recipe, capsys):
    assert train(tmp_path, corpus, recipe, "--profile", "2", "--tensorboard", "--json") == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["profile"]["first_step"], result["profile"]["num_steps"]) == (3, 2)
    assert "experts: gate and up" in captured.err and "steps 3 to 4" in captured.err
    with gzip.open(tmp_path / "run" / "trace.json.gz", "rt") as file:
        assert any(event.get("cat") == "phase" for event in json.load(file)["traceEvents"])
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    written = events.read_bytes()
    for tag in (b"held_out_by_domain/prose", b"router/layer 1/dead_experts", b"gradient_norm", b"balance/switch"):
        assert tag in written


SWEEP = ["--sweep", "train.learning_rate=1e-3,1e-2"]


def test_a_sweep_trains_ranks_and_goes_on(tmp_path, corpus, recipe, capsys):
    assert train(tmp_path, corpus, recipe, *SWEEP, "--json") == 0
    captured = capsys.readouterr()
    swept = json.loads(captured.out)
    assert [point["status"] for point in swept["points"]] == ["done", "done"]
    folder = tmp_path / "run" / "learning_rate=0.01"
    assert (folder / "model" / "model.safetensors").exists()
    assert captured.err.count("training a tokenizer") == 1
    assert "held-out" in (tmp_path / "run" / "report.html").read_text()

    assert train(tmp_path, corpus, recipe, *SWEEP) == 2
    assert "holds a sweep with 2 of 2 points done; add --resume" in capsys.readouterr().err
    assert train(tmp_path, corpus, recipe) == 2
    assert "holds a sweep; add --sweep and --resume" in capsys.readouterr().err

    assert main(["train", "--out", str(tmp_path / "run"), "--resume"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("done before") == 2
    assert captured.out.splitlines()[1].startswith("learning_rate=0.01 ")
    capsys.readouterr()
    assert train(tmp_path, corpus, recipe, *SWEEP, "--resume", "--set", "train.seed=5") == 2
    assert "holds a run of another recipe" in capsys.readouterr().err


def test_a_point_that_fails_leaves_the_others(tmp_path, corpus, recipe, capsys):
    recipe.write_text(RECIPE + "[sweep]\ntrain.batch_size = [2, 100000]\n")
    assert train(tmp_path, corpus, recipe) == 2
    assert "has a [sweep] table; add --sweep" in capsys.readouterr().err
    assert train(tmp_path, corpus, recipe, "--sweep") == 2
    captured = capsys.readouterr()
    assert "1 of 2 points failed, the first of them batch_size=100000" in captured.err.splitlines()[-1]
    assert captured.out.splitlines()[1].startswith("batch_size=2 ")
    record = json.loads((tmp_path / "run" / "sweep.json").read_text())
    assert [point["status"] for point in record["points"]] == ["done", "failed"]
    assert "fewer than one batch" in record["points"][1]["error"]


@pytest.mark.parametrize(
    "sweep",
    [pytest.param([], id="run"), pytest.param(["--sweep", "train.seed=0,1"], id="sweep", marks=pytest.mark.slow)],
)
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, corpus, recipe, capsys, sweep):
    out = tmp_path / "run"
    long = ["--set", "train.steps=100000", "--set", "train.checkpoint_every=5", "--set", "train.evaluate_every=50000"]
    long += ["--config", str(recipe), "--corpus", str(corpus), "--out", str(out)]
    command = [sys.executable, "-m", "moesaic", "train", *long, *sweep]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = (out / "seed=0" if sweep else out) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 5):
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 130, err
    last = err.splitlines()[-1]
    assert last.startswith("moesaic: interrupted: ")
    assert f"moesaic train --out {out} --resume" in last
    assert "Traceback" not in err
    if not sweep:
        assert list((out / "checkpoints").glob("step-*"))
