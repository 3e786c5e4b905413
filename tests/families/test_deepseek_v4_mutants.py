"""Mistakes that a map of DeepSeek-V4's tensors could make: each is made once, and found by comparing outputs."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moesaic import families
from moesaic.errors import MoesaicError
from moesaic.families import deepseek_v4
from moesaic.hub import load, loading, save
from moesaic.models.weight_map import Piece, WeightMap
from tests.families.decoder_oracle import token_ids

released = deepseek_v4.weight_map


def exchange(one: str, other: str) -> Callable[[WeightMap], WeightMap]:
    return lambda maps: maps | {one: maps[other], other: maps[one]}


def pieces(ours: str, how: Callable[[Piece], Piece]) -> Callable[[WeightMap], WeightMap]:
    return lambda maps: maps | {ours: tuple(map(how, maps[ours]))}


def respelled(old: str, new: str) -> Callable[[Piece], Piece]:
    return lambda piece: dataclasses.replace(piece, name=piece.name.replace(old, new))


def _swap_gate_and_up(piece: Piece) -> Piece:
    return respelled(".w1.", ".w3.")(piece) if ".w1." in piece.name else respelled(".w3.", ".w1.")(piece)


def _transposed(piece: Piece) -> Piece:
    return dataclasses.replace(piece, transposed="experts.3." in piece.name)


MUTANTS = {
    "an expert transposed": pieces("layers.1.feed_forward.experts.down", _transposed),
    "gate and up swapped": pieces("layers.2.feed_forward.experts.gate_up", _swap_gate_and_up),
    "an expert twice": pieces("layers.0.feed_forward.experts.down", respelled("experts.1.", "experts.0.")),
    "shared gate and up swapped": exchange(
        "layers.0.feed_forward.shared_experts.gate_proj.weight", "layers.0.feed_forward.shared_experts.up_proj.weight"
    ),
    "layers shifted": exchange("layers.1.feed_forward.router.weight", "layers.2.feed_forward.router.weight"),
    "norms exchanged": exchange("layers.1.attention_norm.weight", "layers.1.feed_forward_norm.weight"),
    "connections exchanged": exchange(
        "layers.1.attention_connection.weight", "layers.1.feed_forward_connection.weight"
    ),
    "scales of connections exchanged": exchange(
        "layers.0.attention_connection.scale", "layers.0.feed_forward_connection.scale"
    ),
    "values and gates of entries exchanged": exchange(
        "layers.2.attention.compressor.kv_proj.weight", "layers.2.attention.compressor.gate_proj.weight"
    ),
    "entries of the indexer with other places": exchange(
        "layers.1.attention.indexer.compressor.kv_proj.weight", "layers.1.attention.indexer.compressor.gate_proj.weight"
    ),
}


@pytest.fixture
def square(made: Any) -> Any:
    """The case whose experts are square."""
    return made("deepseek_v4/square experts")


def are_its_logits(seen: Tensor, square: Any) -> bool:
    logits = square.answer("logits")
    return bool((seen[..., square.columns] - logits).abs().max() <= 1e-5 * logits.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("mutant", [None, *MUTANTS])
@pytest.mark.parametrize("way", ["load", "save"])
def test_every_mutant_is_caught(
    square: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: str | None, way: str
) -> None:
    mutate = MUTANTS[mutant] if mutant else lambda maps: maps
    model = square.ours if way == "save" else None
    monkeypatch.setattr(deepseek_v4, "weight_map", lambda config: mutate(released(config)))
    try:
        if model is not None:
            save(model, tmp_path / "out")
            monkeypatch.undo()
        seen = load(tmp_path / "out" if model is not None else square.folder, allow_extra=True)(token_ids())
    except (MoesaicError, KeyError):
        assert mutant
        return
    assert are_its_logits(seen, square) == (mutant is None)


@torch.no_grad()
@pytest.mark.parametrize(
    "kind",
    ["attention.sinks", "position_bias", "attention_connection.bias", "router.selection_bias"],
)
def test_what_loses_precision_is_caught(
    square: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """By the outputs; selection biases, which move a choice near a tie only, by the bytes of a round trip."""
    dtype_of = loading._dtype

    def narrow(spec: Any, *others: Any) -> torch.dtype:
        return torch.bfloat16 if spec.name.endswith(kind) else dtype_of(spec, *others)

    with monkeypatch.context() as patched:
        patched.setattr(loading, "_dtype", narrow)
        model = load(square.folder)
    save(model, tmp_path / "out")
    exact, seen = (load_file(each / "model.safetensors") for each in (square.folder, tmp_path / "out"))
    changed = [name for name in exact if exact[name].dtype != seen[families.released_name("deepseek_v4", name)].dtype]
    assert changed
    assert not are_its_logits(model.float()(token_ids()), square) or kind == "router.selection_bias"
