"""MXFP4, by hand from the format, and as transformers reads it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moesaic import families
from moesaic.errors import CheckpointError
from moesaic.hub import load, mxfp4, read_config, save
from moesaic.hub.sources import SafetensorsFolder
from moesaic.hub.streaming import convert
from moesaic.models.decoder import Decoder

TINY = {
    "model_type": "gpt_oss",
    "vocab_size": 131,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 18,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "sliding_window": 4,
}
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
IDS = torch.tensor([[3, 17, 99, 4, 8, 8, 41]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = Decoder(families.from_hf(TINY), dtype=torch.bfloat16).initialize(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float("norm" in name), 0.2)
            if ".experts." in name:
                parameter.mul_(torch.logspace(-3, 1, parameter.shape[-1], base=2))
    save(model, tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "mxfp4", dtype="mxfp4")
    return tmp_path / "mxfp4"


def value(byte: int, half: int, scale: int) -> float:
    """One number, as the format tells it."""
    code = byte >> 4 if half else byte & 15
    magnitude = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][code & 7]
    return (-magnitude if code & 8 else magnitude) * 2.0 ** (scale - 127)


def test_a_file_is_what_the_format_says(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    assert GATE_UP not in tensors
    assert tensors[f"{GATE_UP}_blocks"].shape == (5, 128, 3, 16) and tensors[f"{GATE_UP}_scales"].shape == (5, 128, 3)
    assert {tensors[f"{GATE_UP}{suffix}"].dtype for suffix in ("_blocks", "_scales")} == {torch.uint8}
    assert tensors[f"{GATE_UP}_bias"].dtype == tensors["lm_head.weight"].dtype == torch.bfloat16
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["quant_method"] == "mxfp4"
    kept = config["quantization_config"]["modules_to_not_convert"]
    assert {"model.embed_tokens", "lm_head", "model.layers.*.mlp.router"} <= set(kept)
    assert read_config(folder) == read_config(folder.with_name("m"))


def test_reading_is_by_hand_and_as_theirs(folder: Path) -> None:
    tensors, source = load_file(folder / "model.safetensors"), SafetensorsFolder(folder)
    blocks, scales = tensors[f"{GATE_UP}_blocks"], tensors[f"{GATE_UP}_scales"]
    seen = source.read(GATE_UP)
    assert torch.equal(seen, convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    for expert, row, column in ((0, 0, 0), (1, 33, 7), (4, 95, 127), (2, 64, 100), (3, 31, 1)):
        byte = int(blocks[expert, column, row // 32, row % 32 // 2])
        assert seen[expert, row, column] == value(byte, row % 2, int(scales[expert, column, row // 32]))
    at = (slice(1, 3), slice(5, 70), slice(0, None, 2))
    assert torch.equal(source.read(GATE_UP, at), seen[at])
    assert torch.equal(source.read(GATE_UP, (2, slice(31, 33))), seen[2, 31:33])


def test_every_byte_and_scale_is_read_as_theirs() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 254, 16, 16).contiguous()
    scales = torch.arange(254, dtype=torch.uint8)[None, :, None].expand(1, 254, 16).contiguous()
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    finite = expected.mT.isfinite()
    assert torch.equal(mxfp4.unpack(blocks, scales)[finite], expected.mT[finite])
    assert mxfp4.unpack(blocks[:1, :1, :1], torch.tensor([[[255]]], dtype=torch.uint8)).isnan().all()


def test_packing_takes_the_nearest_value() -> None:
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    sizes = torch.logspace(-20, 20, 7, base=2)[:, None]
    values = torch.randn(7, 64, generator=torch.Generator().manual_seed(1)) * sizes
    packed = mxfp4.pack(values)
    step = (packed.scales.double() - 127).exp2().repeat_interleave(32, dim=1)
    scaled = values.double() / step
    assert (scaled.abs() <= 6).all() and (scaled.abs().unflatten(1, (2, 32)).amax(-1) > 3).all()
    nearest = (scaled.abs()[..., None] - grid).abs().amin(-1)
    assert torch.equal((mxfp4.unpack(*packed).double() / step - scaled).abs(), nearest)


def test_halfway_goes_to_the_even_code() -> None:
    values = torch.zeros(1, 32)
    values[0, :9] = torch.tensor([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -2.5])
    assert mxfp4.unpack(*mxfp4.pack(values))[0, :9].tolist() == [6, 0, 1, 1, 2, 2, 4, 4, -2]


def test_extremes_pack_to_numbers() -> None:
    values = torch.tensor([[2e38] * 32, [1e-45] * 32, [0.0] * 32, [-0.0] * 32])
    packed = mxfp4.pack(values)
    assert packed.scales.flatten().tolist()[2:] == [127, 127] and mxfp4.unpack(*packed)[0].isfinite().all()
    assert (mxfp4.unpack(*packed)[1:] == 0).logical_or(mxfp4.unpack(*packed)[1:].abs() < 1e-38).all()


def test_unpacked_and_packed_again_is_the_same(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "plain", dtype="fp32")
    convert(tmp_path / "plain", tmp_path / "again", dtype="mxfp4")
    first, second = load(folder, dtype=torch.float32), load(tmp_path / "again", dtype=torch.float32)
    for (name, tensor), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


def test_packed_weights_stay_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "copy", max_shard_bytes=20_000)
    copies = {n: t for path in (tmp_path / "copy").glob("*.safetensors") for n, t in load_file(path).items()}
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(copies.pop(name).view(torch.uint8), tensor.view(torch.uint8)), name
    assert not copies


@torch.no_grad()
def test_transformers_reads_what_we_write(folder: Path) -> None:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    ours, expected = load(folder, dtype=torch.float32)(IDS), loaded(IDS).logits
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    plain = load(folder.with_name("m"), dtype=torch.float32)(IDS)
    assert not torch.equal(ours, plain)


def test_widths_that_are_no_multiple_of_a_block_are_refused(tmp_path: Path) -> None:
    save(Decoder(families.from_hf(TINY | {"intermediate_size": 37})).initialize(1), tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"mlp.experts.down_proj multiplies 37 inputs; mxfp4 packs 32 at a time"):
        convert(tmp_path / "m", tmp_path / "out", dtype="mxfp4")


DAMAGES = {
    "no scales": (lambda t: t.pop(f"{GATE_UP}_scales"), f"{GATE_UP}_scales is missing"),
    "no blocks": (lambda t: t.pop(f"{GATE_UP}_blocks"), f"{GATE_UP}_scales scales no MXFP4 blocks"),
    "shape of scales": (
        lambda t: t.update({f"{GATE_UP}_scales": t[f"{GATE_UP}_scales"][:, :, :2].contiguous()}),
        rf"{GATE_UP}_scales in .* is \[5, 128, 2\] and the blocks of \[5, 128, 3, 16\] need \[5, 128, 3\]",
    ),
    "shape of blocks": (
        lambda t: t.update({f"{GATE_UP}_blocks": t[f"{GATE_UP}_blocks"].flatten(2)}),
        rf"{GATE_UP}_blocks in .* is \[5, 128, 48\]; MXFP4 blocks are \[experts, outputs, groups, 16\]",
    ),
    "type": (
        lambda t: t.update({f"{GATE_UP}_scales": t[f"{GATE_UP}_scales"].float()}),
        f"{GATE_UP}_scales in .* is of type F32; known: U8",
    ),
    "other model": (
        lambda t: t.update({f"{GATE_UP}{suffix}": t[f"{GATE_UP}{suffix}"][:4].contiguous()
                            for suffix in ("_blocks", "_scales")}),
        rf"{GATE_UP} in .* is \[4, 96, 128\] and its configuration describes \[5, 96, 128\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_tables_that_do_not_fit_are_named(folder: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
