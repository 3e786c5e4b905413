"""A tiny version of benchmarks/seeded_collapse.py: every illness, with the doctor and without."""

from types import SimpleNamespace
from typing import Any

import pytest

from moesaic.train.recipe import Recipe
from tests.benchmark_programs import imported
from tests.train.tiny_run import packed_text

TEXT: Any = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=61), packed=packed_text(8000))


@pytest.mark.slow
def test_with_the_doctor_nobody_stays_ill() -> None:
    with imported(["seeded_collapse"]) as programs:
        study = programs.seeded_collapse
        tree = study.recipe_of(0, 40, 120).to_dict()
        tree["model"] |= {"hidden_size": 32, "moe_intermediate_size": 16}
        tree["vocab_size"], tree["train"]["sequence_length"] = 61, 32
        recipe = Recipe.from_dict(tree)
        moment = study.trained(recipe, TEXT, 40)
        results = {
            (illness, doctor): {"seed": 0, **study.go_on(moment, recipe, TEXT, illness, doctor, 120)}
            for illness in study.ILLNESSES
            for doctor in ("off", "act")
        }
        assert len(study.table(list(results.values()))) == 8
    healthy = results["healthy", "off"]
    assert results["healthy", "act"]["treated"] == 0
    assert results["healthy", "act"]["bits_per_byte"] == healthy["bits_per_byte"]
    assert results["killed", "off"]["dead"] > 0
    for illness in ("takeover", "killed", "identical"):
        treated = results[illness, "act"]
        assert treated["dead"] == treated["oversized"] == treated["twins"] == 0, (illness, treated["log"])
