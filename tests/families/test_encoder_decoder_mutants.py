"""Files of encoder-decoders with one thing wrong: refused, or seen in the logits, which the comparison would catch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.errors import CheckpointError
from moesaic.hub import load
from tests.families.encoder_decoder_oracle import LONG

VISIBLE = 1e-4  # of the logits' scale: ten times what the comparison allows

Mutation = Callable[[dict[str, Tensor]], None]


def _swap(first: str, second: str) -> Mutation:
    """Between names that contain these; the first such pair."""

    def mutate(tensors: dict[str, Tensor]) -> None:
        pairs = [(name, name.replace(first, second)) for name in sorted(tensors) if first in name]
        pairs = [(one, other) for one, other in pairs if other != one and other in tensors]
        assert pairs
        for one, other in pairs:
            tensors[one], tensors[other] = tensors[other], tensors[one]

    return mutate


def _each(part: str, change: Callable[[Tensor], Tensor]) -> Mutation:
    def mutate(tensors: dict[str, Tensor]) -> None:
        names = [name for name in tensors if part in name]
        assert names
        for name in names:
            tensors[name] = change(tensors[name]).contiguous()

    return mutate


def _drop(part: str) -> Mutation:
    def mutate(tensors: dict[str, Tensor]) -> None:
        del tensors[next(name for name in tensors if part in name)]

    return mutate


def _duplicate(part: str, other: str) -> Mutation:
    def mutate(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if part in name]:
            tensors[name.replace(part, other)] = tensors[name].clone()

    return mutate


MUTANTS: dict[str, dict[str, Mutation]] = {
    "switch_transformers": {
        "experts exchanged": _swap("expert_0.wi", "expert_1.wi"),
        "wi for wo": _swap(".wi.", ".wo."),
        "an expert transposed": _each("expert_2.wi.", lambda tensor: tensor.T),
        "all transposed": _each(".wo.", lambda tensor: tensor.T),
        "an expert dropped": _drop("expert_3.wo"),
        "an expert too many": _duplicate("expert_4.", "expert_5."),
        "an expert twice": _duplicate("expert_4.", "expert_3."),
        "layers shifted": _swap("encoder.block.2.layer.0", "encoder.block.3.layer.0"),
        "encoder's and decoder's biases": _swap(
            "encoder.block.0.layer.0.SelfAttention.relative", "decoder.block.0.layer.0.SelfAttention.relative"
        ),
        "queries for keys": _swap("Attention.q.", "Attention.k."),
        "cross for self": _swap(".layer.0.SelfAttention.v", ".layer.1.EncDecAttention.v"),
        "norms": _swap("layer.0.layer_norm", "layer.1.layer_norm"),
    },
    "nllb_moe": {
        "experts exchanged": _swap("expert_0.fc1", "expert_1.fc1"),
        "fc1 for fc2": _swap(".fc1.", ".fc2."),
        "an expert transposed": _each("expert_2.fc1.weight", lambda tensor: tensor.T),
        "an expert dropped": _drop("expert_3.fc2.bias"),
        "an expert too many": _duplicate("expert_4.", "expert_5."),
        "an expert twice": _duplicate("expert_4.", "expert_3."),
        "layers shifted": _swap("decoder.layers.1.ffn", "decoder.layers.3.ffn"),
        "encoder for decoder": _swap("model.encoder.layers.1.ffn", "model.decoder.layers.1.ffn"),
        "final norms": _swap("model.encoder.layer_norm", "model.decoder.layer_norm"),
        "cross for self": _swap("self_attn.", "cross_attention."),
        "biases rounded": _each("fc1.bias", lambda tensor: tensor.bfloat16().float()),
    },
}


@pytest.mark.parametrize(("family", "mutant"), [(family, name) for family, own in MUTANTS.items() for name in own])
@torch.no_grad()
def test_every_mutant_is_caught(family: str, mutant: str, made: Any, tmp_path: Path) -> None:
    """In the case whose matrices are square: transposed or exchanged, they have the right shape."""
    oracle = made(f"{family}/square matrices")
    tensors = load_file(oracle.folder / "model.safetensors")
    MUTANTS[family][mutant](tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((oracle.folder / "config.json").read_bytes())
    try:
        seen = load(tmp_path)(*LONG)[..., oracle.columns]
    except CheckpointError:
        return
    expected = oracle.answer("logits, long")
    assert (seen - expected).abs().max() > VISIBLE * expected.abs().max()
