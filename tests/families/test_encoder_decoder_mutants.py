"""Files of encoder-decoders with one thing wrong: refused, or seen in the logits, which the comparison would catch."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.errors import CheckpointError
from moesaic.hub import load
from tests.families.encoder_decoder_cases import CASES
from tests.families.encoder_decoder_oracle import Seq2SeqOracle, make, words

pytestmark = pytest.mark.usefixtures("nllb_as_chosen")

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


SQUARE = {  # of which a transposed or exchanged matrix has the right shape
    "switch_transformers": {"d_ff": 48, "d_kv": 16, "num_layers": 4, "num_decoder_layers": 4},
    "nllb_moe": {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 4, "decoder_layers": 4},
}
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
def test_every_mutant_is_caught(
    family: str, mutant: str, squares: Callable[[str], Seq2SeqOracle], tmp_path: Path
) -> None:
    oracle = squares(family)
    tensors = load_file(oracle.folder / "model.safetensors")
    MUTANTS[family][mutant](tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((oracle.folder / "config.json").read_bytes())
    source, target = words(3, 30), words(3, 29, seed=4)
    try:
        seen = load(tmp_path)(source, target)
    except CheckpointError:
        return
    expected = oracle.model(input_ids=source, decoder_input_ids=target, use_cache=False).logits
    assert (seen - expected).abs().max() > VISIBLE * expected.abs().max()


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Seq2SeqOracle]:
    @cache
    def square(family: str) -> Seq2SeqOracle:
        case = next(name for name in CASES if name.startswith(family))
        return make(case, tmp_path_factory.mktemp("square"), **SQUARE[family])

    return square
