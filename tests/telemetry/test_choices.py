"""Counts of an engine's choices, taken in one call, are those of every layer's own choices."""

from typing import Any

import numpy as np
import pytest
import torch

from moesaic import families
from moesaic.engine.cache import Text
from moesaic.engine.engine import Engine, Piece
from moesaic.telemetry.choices import ChoiceCounts
from tests.families.cases import CASES, COMMON
from tests.tiny import lively_decoder

FAMILIES = ["mixtral", "deepseek_v3", "phimoe", "llama4_text", "qwen2"]


def engine_of(model_type: str, **more: Any) -> Engine:
    case = next(name for name in CASES if name.partition("/")[0] == model_type)
    fields: dict[str, Any] = {"model_type": model_type, **COMMON, **CASES[case], **more}
    config = families.from_hf(fields)
    return Engine(lively_decoder(config).eval(), threads=1, mtp=bool(config.mtp))


@pytest.mark.parametrize(
    "model_type", [name for name in FAMILIES if any(case.startswith(f"{name}/") for case in CASES)]
)
def test_counts_are_those_of_the_choices(model_type: str) -> None:
    engine, text = engine_of(model_type), Text()
    counts, wanted, distinct = ChoiceCounts(engine), {}, {}
    for token_ids in ([5, 9, 2, 77, 31, 8], [4], [3, 3]):
        engine.step([Piece(text, token_ids), Piece(Text(), [7, 1])])
        counts.add()
        for layer, routed in engine.routed().items():
            num_experts = len(counts.by_layer()[layer])
            ids = routed.expert_ids_TM[(routed.expert_ids_TM >= 0) & (routed.expert_ids_TM < num_experts)]
            found_E = torch.bincount(ids, minlength=num_experts).numpy()
            wanted[layer] = wanted.get(layer, 0) + found_E
            distinct[layer] = distinct.get(layer, 0) + int(np.count_nonzero(found_E))
    assert {layer: found.tolist() for layer, found in counts.by_layer().items()} == {
        layer: found.tolist() for layer, found in wanted.items()
    }
    assert counts.distinct() == distinct
    counts.clear()
    assert not any(found.any() for found in counts.by_layer().values())


def test_arrays_of_other_sizes_are_refused() -> None:
    engine = engine_of("mixtral")
    engine.step([Piece(Text(), [3, 4])])
    with pytest.raises(ValueError, match="counts"):
        engine.program.choice_tally().read(np.zeros(3, np.int64), np.zeros(1, np.int64))


def test_two_listeners_hear_each_what_they_were_told_to() -> None:
    engine, text = engine_of("mixtral"), Text()
    one, other = ChoiceCounts(engine), ChoiceCounts(engine)
    for step in range(5):
        engine.step([Piece(text, [step + 1])])
        one.add()
        if step % 2:
            other.add()
    assert (one.num_tokens, other.num_tokens) == (5, 2)
    one.clear()
    assert (one.num_tokens, other.num_tokens) == (0, 2)


def test_many_steps_are_counted_as_few_are() -> None:
    """More choices than are kept before they are counted."""
    engine = engine_of("mixtral")
    counts = ChoiceCounts(engine)
    wanted = {layer: np.zeros_like(counts_E) for layer, counts_E in counts.by_layer().items()}
    for length in [60] * 100:
        text = Text()
        engine.step([Piece(text, list(range(1, length + 1)))])
        engine.free(text)
        counts.add()
        for layer, routed in engine.routed().items():
            wanted[layer] += np.bincount(routed.expert_ids_TM.flatten().numpy(), minlength=len(wanted[layer]))
    assert counts.num_tokens == 6000
    assert sum(int(found.sum()) for found in wanted.values()) > 1 << 14
    for layer, counts_E in counts.by_layer().items():
        assert counts_E.tolist() == wanted[layer].tolist()


def test_layers_that_look_ahead_are_not_heard() -> None:
    engine, text = engine_of("deepseek_v3", num_nextn_predict_layers=1), Text()
    counts = ChoiceCounts(engine)
    engine.step([Piece(text, [5, 9, 2])])
    engine.ahead([Piece(text, [9, 2, 7])])
    counts.add()
    assert counts.num_tokens == 0 and not any(found.any() for found in counts.by_layer().values())
