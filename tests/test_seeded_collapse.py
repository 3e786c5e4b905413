"""A tiny version of benchmarks/seeded_collapse.py: the illness that never heals by itself, and none."""

from types import SimpleNamespace
from typing import Any

import pytest

from moesaic.train.recipe import Recipe
from tests.benchmark_programs import imported
from tests.train.tiny_run import packed_text

TEXT: Any = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=61), packed=packed_text(8000))


@pytest.mark.slow
def test_doubled_experts_stay_one_without_the_doctor() -> None:
    with imported(["seeded_collapse"]) as programs:
        study = programs.seeded_collapse
        tree = study.recipe_of(0, 20, 100).to_dict()
        tree["model"] |= {"hidden_size": 32, "moe_intermediate_size": 16}
        tree["vocab_size"], tree["train"]["sequence_length"] = 61, 32
        recipe = Recipe.from_dict(tree)
        moment = study.trained(recipe, TEXT, 20)
        left = study.go_on(moment, recipe, TEXT, "doubled", "off", 100)
        treated = study.go_on(moment, recipe, TEXT, "doubled", "act", 100)
    assert left["twins"] == 8 and left["clear_since"] is None  # four pairs in each of two layers
    verdicts = {(line["doctor"], line["remedy"]) for line in treated["log"]}
    assert ("treated", "merge") in verdicts
    # On a text that is nearly learned any change costs more than the doctor allows: then it must have been taken back.
    assert treated["twins"] < 8 or ("undone", "merge") in verdicts, treated["log"]


@pytest.mark.slow
def test_the_doctor_mends_killed_experts_or_leaves_them_as_they_were() -> None:
    with imported(["seeded_collapse"]) as programs:
        study = programs.seeded_collapse
        tree = study.recipe_of(0, 40, 120).to_dict()
        tree["model"] |= {"hidden_size": 32, "moe_intermediate_size": 16}
        tree["vocab_size"], tree["train"]["sequence_length"] = 61, 32
        recipe = Recipe.from_dict(tree)
        moment = study.trained(recipe, TEXT, 40)
        results = {
            (illness, doctor): {"seed": 0, **study.go_on(moment, recipe, TEXT, illness, doctor, 120)}
            for illness in ("healthy", "killed")
            for doctor in ("off", "act")
        }
        assert len(study.table(list(results.values()))) == 4
    healthy = results["healthy", "off"]
    assert results["healthy", "act"]["treated"] == 0
    assert results["healthy", "act"]["bits_per_byte"] == healthy["bits_per_byte"]
    left, treated = results["killed", "off"], results["killed", "act"]
    assert left["dead"] > 0 and treated["treated"] > 0
    # On a text that is nearly learned any change costs more than the doctor allows: then it must have been taken back.
    verdicts = {line["doctor"] for line in treated["log"] if line["doctor"] != "treated"}
    assert verdicts and (treated["dead"] == 0 or "undone" in verdicts), treated["log"]
    assert treated["bits_per_byte"] < left["bits_per_byte"] * 1.01
