"""`moesaic lint`: recipes, builders of one's own, and what it answers to neither."""

import json
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
