"""`moesaic lint`: recipes, builders of one's own, and what it answers to neither."""

import json
import sys
from pathlib import Path

import pytest

from moesaic.cli.main import main
from tests.cli.tiny_recipe import RECIPE

PLANTED = Path(__file__).parents[1] / "train" / "lint" / "planted.py"


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def test_our_own_recipe_is_sound(recipe, capsys):
    assert main(["lint", str(recipe), "--ranks", "1", "--set", "model.num_hidden_layers=2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    verdicts = {outcome["check"]: outcome["verdict"] for outcome in report["outcomes"]}
    assert report["sound"] and verdicts["layers pooled in the balance loss"] == "sound"
    assert verdicts["padding in the balance loss"] == verdicts["balance loss over micro-batches"] == "sound"


def test_a_recipe_without_balance_is_found(recipe, capsys):
    assert main(["lint", str(recipe), "--ranks", "1", "--set", "train.balance_losses=[]"]) == 2
    printed = capsys.readouterr().out
    assert "balancing" in printed and "pulls at no router" in printed and "What to do:" in printed


def test_a_builder_of_ones_own(capsys):
    assert main(["lint", f"{PLANTED}:company", "--ranks", "1"]) == 0
    assert "a company where nothing is wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["none.toml"], "none.toml"),
        (["none.py:build"], "none.py is no file; give FILE.py:FUNCTION"),
        ([f"{PLANTED}:nothing"], "has no function 'nothing'"),
        ([f"{PLANTED}:company", "--set", "train.steps=3"], "--set changes a recipe"),
        (["none.toml", "--ranks", "0"], "--ranks 0; give 1 or more"),
    ],
)
def test_mistakes_are_named(words, answer, capsys):
    assert main(["lint", *words]) == 2
    assert answer in capsys.readouterr().err


BUILDERS = """
import sys
from tests.train.lint.planted import company
def fails(): raise RuntimeError("no such\\ncolumn")
def leaves(): sys.exit(3)
def asks(name): return name
def without_a_batch():
    built = company()
    built.__class__ = type("Empty", (type(built),), {"batch": property(lambda self: [][0])})
    return built
def stumbles():
    built = company(); built._step = lambda batches: {}["loss"]
    return built
def unknown():
    built = company(); step = built._step; built._step = lambda batches: step(batches) * float("nan")
    return built
def alone():
    built = company(); step = built._step
    built._step = lambda batches: step(batches) if len(batches) == 1 else {}["loss"]
    return built
def frozen():
    built = company("nothing")
    for name, weight in built.model.named_parameters():
        weight.requires_grad_("clerk" not in name)
    return built
"""


@pytest.fixture
def builders(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])
    path = tmp_path / f"my_builders_{tmp_path.name}.py"
    path.write_text(BUILDERS)
    return path


@pytest.mark.parametrize(
    ("function", "answer"),
    [
        ("fails", "the builder failed: RuntimeError: no such column (my_builders_"),
        ("leaves", "the builder failed: SystemExit: 3"),
        ("asks", "the builder failed: TypeError: asks() missing 1 required positional argument: 'name'"),
        ("without_a_batch", "the builder failed: IndexError: list index out of range"),
        ("stumbles", "a step of 1 micro-batch failed: KeyError: 'loss'"),
        ("unknown", "the set-up's loss is nan"),
        ("", "names no function; give FILE.py:FUNCTION"),
    ],
)
def test_mistakes_of_their_own_code_are_told_as_such(builders, function, answer, capsys):
    assert main(["lint", f"{builders}:{function}", "--ranks", "1"]) == 2
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("moesaic: ")]
    assert answer in line


def test_a_cut_that_fails_alone_is_not_measured(builders, capsys):
    assert main(["lint", f"{builders}:alone", "--ranks", "1"]) == 0
    printed = capsys.readouterr().out
    assert "a step of 2 micro-batches failed: KeyError" in printed and "not measured" in printed


def test_frozen_routers_are_no_lack_of_balancing(builders, capsys):
    assert main(["lint", f"{builders}:frozen", "--ranks", "1", "--json"]) == 0
    outcomes = {each["check"]: each for each in json.loads(capsys.readouterr().out)["outcomes"]}
    assert outcomes["balancing"]["verdict"] == "not measured" and "frozen" in outcomes["balancing"]["says"]


@pytest.mark.parametrize(
    ("name", "text", "answer"),
    [
        ("json.py", "def build(): pass", "has the name of another module, 'json'"),
        ("broken_one.py", "def build(:", "SyntaxError"),
        ("broken_two.py", "import nothing_like_this", "No module named 'nothing_like_this' (broken_two.py, line 1)"),
    ],
)
def test_files_that_cannot_be_imported(tmp_path, monkeypatch, name, text, answer, capsys):
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / name).write_text(text)
    assert main(["lint", f"{tmp_path / name}:build"]) == 2
    assert answer in capsys.readouterr().err
