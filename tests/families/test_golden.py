"""The files of recorded answers are what their script would write now."""

import dataclasses
from typing import Any

import pytest
import torch

from tests.families.cases import CASES
from tests.families.encoder_decoder_cases import CASES as ENCODER_DECODERS
from tests.families.golden import FOLDER, Golden, golden, preset_counts
from tests.golden import make_families

TOLERANCE = 1e-5  # of an answer's scale: another machine rounds otherwise


def test_there_are_no_others() -> None:
    families = {case.partition("/")[0] for case in (*CASES, *ENCODER_DECODERS)}
    assert {path.name for path in FOLDER.iterdir()} == {f"{family}.safetensors" for family in families} | {
        "preset_counts.json"
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, *ENCODER_DECODERS])
def test_a_case_is_recorded_as_it_is_now(case: str) -> None:
    recorded, made = golden(case), make_families.made(case)
    assert _described(recorded) == _described(made)
    assert recorded.answers.keys() == made.answers.keys()
    for question, expected in made.answers.items():
        seen = recorded.answers[question]
        assert (seen.dtype, seen.shape) == (expected.dtype, expected.shape)
        if expected.is_floating_point():
            assert (seen - expected).abs().max() <= TOLERANCE * expected.abs().max(), question
        else:
            assert torch.equal(seen, expected), question


def _described(case: Golden) -> dict[str, Any]:
    """All but the answers, and the name of transformers' version, which the configuration says too."""
    said = {each.name: getattr(case, each.name) for each in dataclasses.fields(case) if each.name != "answers"}
    config = {name: value for name, value in case.config.items() if name != "transformers_version"}
    return said | {"config": config}


@pytest.mark.slow
def test_counts_of_presets_are_recorded_as_they_are_now() -> None:
    assert preset_counts() == make_families.made_counts()
