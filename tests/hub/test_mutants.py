"""A comparison of outputs finds every mistake that a map or a converter could make: here each is made, once."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moesaic.errors import MoesaicError
from moesaic.families import qwen3_moe
from moesaic.hub import load, loading, save
from moesaic.hub.streaming import convert
from moesaic.hub.targets import Plan
from moesaic.models.weight_map import Piece, WeightMap

TOLERANCE = 1e-5  # of the logits' scale, as for every family
IDS = torch.randint(131, (2, 11), generator=torch.Generator().manual_seed(3))
GATE_UP, DOWN = "layers.{}.feed_forward.experts.gate_up", "layers.{}.feed_forward.experts.down"
released = qwen3_moe.weight_map


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """Files that transformers wrote, and its logits. Experts are square, so that shapes betray no transposition."""
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=131, hidden_size=24, moe_intermediate_size=24, num_hidden_layers=3, num_experts=5,
        num_attention_heads=4, num_key_value_heads=2, head_dim=6, num_experts_per_tok=3, max_position_embeddings=64,
        attention_bias=True,
    )  # fmt: skip
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float("norm" in name), 0.2)
    folder = tmp_path_factory.mktemp("mutants")
    model.save_pretrained(folder)
    return folder, model(IDS).logits.detach()


def change(ours: str, how: Callable[[Piece], Piece | None]) -> Callable[[WeightMap], WeightMap]:
    """A mutant of the pieces of one of our tensors; None drops one."""

    def mutate(weight_map: WeightMap) -> WeightMap:
        changed = (how(piece) for piece in weight_map[ours])
        return weight_map | {ours: tuple(piece for piece in changed if piece is not None)}

    return mutate


def renamed(old: str, new: str) -> Callable[[Piece], Piece]:
    return lambda piece: dataclasses.replace(piece, name=piece.name.replace(old, new))


def exchanged(one: str, other: str) -> Callable[[Piece], Piece]:
    def exchange(piece: Piece) -> Piece:
        found = next((part for part in (one, other) if part in piece.name), "")
        return renamed(found, other if found == one else one)(piece) if found else piece

    return exchange


def transposed(part: str) -> Callable[[Piece], Piece]:
    return lambda piece: dataclasses.replace(piece, transposed=part in piece.name)


def shifted(weight_map: WeightMap) -> WeightMap:
    """Every layer reads the next one's experts."""
    shift = {f".layers.{index}.": f".layers.{(index + 1) % 3}." for index in range(3)}

    def move(piece: Piece) -> Piece:
        return renamed(*next((old, new) for old, new in shift.items() if old in piece.name))(piece)

    mutated = {name: tuple(map(move, pieces)) for name, pieces in weight_map.items() if ".experts." in name}
    return weight_map | mutated


MUTANTS: dict[str, Callable[[WeightMap], WeightMap]] = {
    "gate of an expert transposed": change(GATE_UP.format(1), transposed("experts.3.gate_proj")),
    "up of an expert transposed": change(GATE_UP.format(2), transposed("experts.0.up_proj")),
    "down of an expert transposed": change(DOWN.format(0), transposed("experts.4.down_proj")),
    "gate and up swapped": change(GATE_UP.format(1), exchanged("gate_proj", "up_proj")),
    "gate and up of one expert swapped": change(
        GATE_UP.format(1),
        lambda piece: exchanged("gate_proj", "up_proj")(piece) if "experts.2." in piece.name else piece,
    ),
    "an expert twice": change(DOWN.format(2), renamed("experts.1.", "experts.0.")),
    "two experts exchanged": change(DOWN.format(1), exchanged("experts.1.", "experts.2.")),
    "layers shifted": shifted,
    "norms exchanged": lambda weight_map: (
        weight_map
        | {
            "layers.1.attention_norm.weight": weight_map["layers.1.feed_forward_norm.weight"],
            "layers.1.feed_forward_norm.weight": weight_map["layers.1.attention_norm.weight"],
        }
    ),
    "k and v exchanged": lambda weight_map: (
        weight_map
        | {
            "layers.1.attention.k_proj.weight": weight_map["layers.1.attention.v_proj.weight"],
            "layers.1.attention.v_proj.weight": weight_map["layers.1.attention.k_proj.weight"],
        }
    ),
}


def differs(folder: Path, logits: Tensor, **options: Any) -> bool:
    """Whether a folder's model gives other logits, or is refused."""
    try:
        seen = load(folder, **options)(IDS)
    except MoesaicError:
        return True
    return not bool((seen - logits).abs().max() <= TOLERANCE * logits.abs().max())


def through_load(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, mutate: Any) -> Path:
    monkeypatch.setattr(qwen3_moe, "weight_map", lambda config: mutate(released(config)))
    return folder


def through_save(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, mutate: Any) -> Path:
    model = load(folder)
    monkeypatch.setattr(qwen3_moe, "weight_map", lambda config: mutate(released(config)))
    save(model, out)
    monkeypatch.undo()
    return out


def through_conversion(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, mutate: Any) -> Path:
    """Read by the mutated map, written by the right one of stacked experts."""
    right = released
    calls = iter([mutate])
    monkeypatch.setattr(qwen3_moe, "weight_map", lambda config: next(calls, lambda same: same)(right(config)))
    monkeypatch.setattr("moesaic.hub.sources._without_absent_mtp", lambda config, found: config)
    convert(folder, out, layout="fused", allow_extra=True)
    monkeypatch.undo()
    return out


@torch.no_grad()
@pytest.mark.parametrize("way", [through_load, through_save, through_conversion])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_every_mutant_is_caught(
    theirs: tuple[Path, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: str, way: Any
) -> None:
    folder, logits = theirs
    try:
        changed = way(folder, tmp_path / "out", monkeypatch, MUTANTS[mutant])
    except (MoesaicError, KeyError):
        return  # refused before it could do harm
    assert differs(changed, logits, allow_extra=True)


@pytest.mark.parametrize("way", [through_load, through_conversion])
def test_a_dropped_expert_is_refused(
    theirs: tuple[Path, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Any
) -> None:
    """Not compared: what nobody fills has any values, by accident the right ones."""
    drop = change(GATE_UP.format(0), lambda piece: None if "experts.4." in piece.name else piece)
    monkeypatch.setattr("moesaic.hub.streaming.Plan", lambda *args, allow_extra, **options: Plan(*args, **options))
    with pytest.raises(MoesaicError, match=r"holds 2 tensors .*: model.layers.0.mlp.experts.4.gate_proj.weight"):
        load(way(theirs[0], tmp_path / "out", monkeypatch, drop))


@torch.no_grad()
@pytest.mark.parametrize("way", [through_load, through_save, through_conversion])
def test_without_a_mutation_nothing_differs(
    theirs: tuple[Path, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Any
) -> None:
    folder, logits = theirs
    assert not differs(way(folder, tmp_path / "out", monkeypatch, lambda same: same), logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["q_proj.bias", "o_proj.bias"])
def test_a_bias_that_loses_precision_is_caught(
    theirs: tuple[Path, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder, logits = theirs
    dtype_of = loading._dtype

    def narrow_on_load(spec: Any, *others: Any) -> torch.dtype:
        return torch.bfloat16 if spec.name.endswith(kind) else dtype_of(spec, *others)

    own_dtype = Plan._own_dtype

    def narrow_on_conversion(self: Plan, parts: Any) -> torch.dtype:
        return torch.bfloat16 if parts[0].spec.name.endswith(kind) else own_dtype(self, parts)

    with monkeypatch.context() as patched:
        patched.setattr(Plan, "_own_dtype", narrow_on_conversion)
        convert(folder, tmp_path / "out")
    assert differs(tmp_path / "out", logits, dtype=torch.float32)
    with monkeypatch.context() as patched:
        patched.setattr(loading, "_dtype", narrow_on_load)
        model = load(folder)
    assert (model.float()(IDS) - logits).abs().max() > TOLERANCE * logits.abs().max()
