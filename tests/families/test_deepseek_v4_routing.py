"""DeepSeek-V4's tables of experts, and its routers in a bf16 model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moesaic import families
from moesaic.errors import CheckpointError
from moesaic.hub import load, save
from moesaic.hub.streaming import convert
from moesaic.layers.router import RouterLayer
from moesaic.models.decoder import Decoder
from moesaic.routing import RoutingTape
from tests.families.cases import COMMON, COMPRESSED
from tests.families.v4 import changed, decoder, folder_of, token_ids

RAW = {"model_type": "deepseek_v4", **COMMON, **COMPRESSED}


TABLE = "model.layers.0.ffn.gate.tid2eid"


def set_row(row: int, experts: list[int]) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[TABLE][row] = torch.tensor(experts)

    return change


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ([4, 4], "layers.0.ffn.gate.tid2eid in .* gives token 77 expert 4 more than once; a table names 2 different"),
        ([1, 7], "layers.0.ffn.gate.tid2eid in .* gives token 77 expert 7; this model has 0 to 6, so copy the table"),
        ([-1, 2], "gives token 77 expert -1; this model has 0 to 6"),
    ],
)
@pytest.mark.parametrize("way", ["load", "convert"])
def test_a_table_that_no_router_can_follow_is_refused(
    made: Callable[[str], Any], tmp_path: Path, experts: list[int], message: str, way: str
) -> None:
    broken = changed(folder_of(made), tmp_path / "m", set_row(77, experts))
    with pytest.raises(CheckpointError, match=message):
        load(broken) if way == "load" else convert(broken, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_table_keeps_its_bits(made: Callable[[str], Any], tmp_path: Path, dtype: torch.dtype) -> None:
    folder = changed(folder_of(made), tmp_path / "m", lambda t: t.update({TABLE: t[TABLE].to(dtype)}))
    expected = load_file(folder / "model.safetensors")[TABLE]
    save(load(folder, dtype=torch.bfloat16), tmp_path / "saved")
    convert(folder, tmp_path / "converted", dtype="bf16")
    for out in ("saved", "converted"):
        seen = load_file(tmp_path / out / "model.safetensors")["layers.0.ffn.gate.tid2eid"]
        assert seen.dtype == dtype and torch.equal(seen, expected)


def test_new_tables_differ_between_layers_and_name_different_experts() -> None:
    model = Decoder(families.from_hf(RAW | {"num_hash_layers": 3})).initialize(0)
    tables = [model.state_dict()[f"layers.{layer}.feed_forward.router.table"] for layer in range(3)]
    assert not torch.equal(tables[0], tables[1]) and not torch.equal(tables[1], tables[2])
    assert all((table.sort(1).values.diff(dim=1) > 0).all() for table in tables)


# The router, in the arithmetic of the authors: transformers multiplies in the model's dtype, and so chooses others.


def by_hand(model: Decoder, layer: int, x_TD: Tensor, ids_T: Tensor) -> tuple[Tensor, Tensor]:
    """The experts of tokens, in ascending order, and their weights."""
    state = model.state_dict()
    prefix = f"layers.{layer}.feed_forward.router"
    scores_TE = torch.log1p(torch.exp(x_TD.float() @ state[f"{prefix}.weight"].float().T)).sqrt()
    if f"{prefix}.table" in state:
        chosen_TK = state[f"{prefix}.table"][ids_T].long()
    else:
        chosen_TK = (scores_TE + state[f"{prefix}.selection_bias"]).topk(2).indices
    chosen_TK = chosen_TK.sort(1).values
    weights_TK = scores_TE.gather(1, chosen_TK)
    return chosen_TK, 1.5 * weights_TK / (weights_TK.sum(1, keepdim=True) + 1e-20)


@torch.no_grad()
def test_the_router_counts_in_fp32_in_a_bf16_model(made: Callable[[str], Any]) -> None:
    model, ids_BS, tape = decoder(folder_of(made), dtype=torch.bfloat16), token_ids(60), RoutingTape()
    heard: dict[int, Tensor] = {}
    for index in range(len(model.layers)):
        hook = lambda _, args, index=index: heard.__setitem__(index, args[0].flatten(0, 1))  # noqa: E731
        model.get_submodule(f"layers.{index}.feed_forward").register_forward_pre_hook(hook)
    model(ids_BS, tape=tape)
    other = 0
    for index, decision in tape.decisions.items():
        assert heard[index].dtype == torch.bfloat16 and decision.scores_TE is not None
        expected_TK, weights_TK = by_hand(model, index, heard[index], ids_BS.flatten())
        ids_TK, seen_TK = decision.rows.as_topk()
        order_TK = ids_TK.argsort(1)
        assert torch.equal(ids_TK.gather(1, order_TK).long(), expected_TK)
        assert torch.allclose(seen_TK.gather(1, order_TK), weights_TK, rtol=1e-5)
        router = model.get_submodule(f"layers.{index}.feed_forward.router")
        assert isinstance(router, RouterLayer) and router.weight is not None
        if router.selection_bias is not None:
            narrow_TE = torch.nn.functional.softplus(torch.nn.functional.linear(heard[index], router.weight)).sqrt()
            narrow_TK = (narrow_TE + router.selection_bias).topk(2).indices.sort(1).values
            other += int((narrow_TK != expected_TK).any(1).sum())
    assert other > 0, "and bf16 would have chosen others"


@torch.no_grad()
def test_what_is_fp32_stays_so(made: Callable[[str], Any], tmp_path: Path) -> None:
    """What the released files hold in fp32 beside bf16."""
    model = load(folder_of(made), dtype=torch.bfloat16)
    fp32 = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    kinds = ("connection.", "stream_join.", "attention.sinks", "position_bias", "selection_bias")
    assert fp32 == {name for name in model.state_dict() if any(kind in name for kind in kinds)}
    save(model, tmp_path / "m")
    for name, tensor in load_file(tmp_path / "m" / "model.safetensors").items():
        wide = name.startswith("hc_") or any(part in name for part in (".hc_", ".attn_sink", ".ape", ".gate.bias"))
        assert tensor.dtype == (torch.int64 if "tid2eid" in name else torch.float32 if wide else torch.bfloat16), name
