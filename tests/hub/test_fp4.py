"""Files of DeepSeek-V4: FP8 blocks and FP4 rows, powers of two beside them, by hand and as transformers reads them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moesaic import families
from moesaic.errors import CheckpointError, ConfigError, MoesaicError
from moesaic.hub import fp4, fp8, load, read_config, save
from moesaic.hub.quantization import read_quantization
from moesaic.hub.sources import SafetensorsFolder
from moesaic.hub.streaming import convert
from moesaic.models.decoder import Decoder

# Whole blocks, since transformers cuts others into equal parts, at odds with the format.
RAW = {
    "model_type": "deepseek_v4",
    "vocab_size": 131,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 64,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 16,
    "o_groups": 2,
    "o_lora_rank": 64,
    "sliding_window": 4,
    "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 3},
    "compress_ratios": [0, 2, 3, 0],
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 64,
    "num_hash_layers": 1,
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "hc_mult": 2,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 64,
}
EXPERT, SHARED = "layers.1.ffn.experts.2.w1", "layers.1.ffn.shared_experts.w2"
IDS = torch.tensor([[3, 17, 99, 4, 8, 120, 5]])
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of very different sizes, so that scales matter."""
    model = Decoder(families.from_hf(RAW), dtype=torch.float32).initialize(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "connection" not in name:
                parameter.mul_(torch.linspace(0.1, 3, parameter.shape[-1]))
    save(model.eval(), tmp_path_factory.mktemp("v4"))
    return tmp_path_factory.getbasetemp() / "v40"


@pytest.fixture(params=["fp8", "mxfp4"])
def folder(request: pytest.FixtureRequest, plain: Path, tmp_path: Path) -> Path:
    convert(plain, tmp_path / request.param, dtype=request.param)
    return tmp_path / request.param


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_file_is_what_is_released(folder: Path) -> None:
    """Names and types of the released files, by module."""
    tensors, is_fp4 = tensors_of(folder), folder.name == "mxfp4"
    packed = {name.removesuffix(".scale") for name, each in tensors.items() if each.dtype == torch.float8_e8m0fnu}
    kinds = {".".join(part for part in name.split(".")[2:] if not part.isdigit()) for name in packed}
    linears = {f"attn.{name}" for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "indexer.wq_b")}
    parts = {f"ffn.{block}.w{number}" for block in ("experts", "shared_experts") for number in (1, 2, 3)}
    assert kinds == linears | parts | {"e_proj", "h_proj"}
    for name in packed:
        in_fours = is_fp4 and ".experts." in name
        assert tensors[f"{name}.weight"].dtype == (torch.int8 if in_fours else torch.float8_e4m3fn), name
    others = {name: each for name, each in tensors.items() if name.rpartition(".")[0] not in packed}
    assert {each.dtype for each in others.values()} == {torch.float32, torch.int32}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    described = config["quantization_config"]
    assert described["quant_method"] == "fp8" and described["scale_fmt"] == "ue8m0"
    assert described["weight_block_size"] == [128, 128] and config["expert_dtype"] == ("fp4" if is_fp4 else "fp8")
    kept = set(described["modules_to_not_convert"])
    assert {"embed", "head", "layers.*.ffn.gate", "layers.*.attn.compressor.wkv"} <= kept
    assert read_config(folder) == families.from_hf(RAW)


def by_hand(weight: Tensor, scale: Tensor) -> Tensor:
    """One number at a time, from the formats."""
    rows, columns = weight.shape
    if weight.dtype == torch.float8_e4m3fn:
        return torch.tensor(
            [[float(weight[r, c]) * float(scale[r // 128, c // 128]) for c in range(columns)] for r in range(rows)]
        )
    numbers = torch.empty(rows, 2 * columns)
    for row in range(rows):
        for column in range(2 * columns):
            code = int(weight[row, column // 2]) & 0xFF
            code = code >> 4 if column % 2 else code & 0xF
            size = VALUES[code & 7] * 2.0 ** (int(scale.view(torch.uint8)[row, column // 32]) - 127)
            numbers[row, column] = -size if code & 8 else size
    return numbers


def test_reading_is_the_product_by_hand(folder: Path) -> None:
    tensors, source = tensors_of(folder), SafetensorsFolder(folder)
    for name in (EXPERT, SHARED):
        expected, seen = by_hand(tensors[f"{name}.weight"], tensors[f"{name}.scale"]), source.read(f"{name}.weight")
        assert seen.dtype == torch.float32 and torch.equal(seen, expected) and expected.abs().max() > 0.1
        for at in ((slice(3, 50), slice(33, 61)), (7, slice(None, None, 2)), (slice(5, 6),)):
            assert torch.equal(source.read(f"{name}.weight", at), expected[at])
    up = load(folder, dtype=torch.float32).state_dict()["layers.1.feed_forward.experts.gate_up"][2, :64]
    assert torch.equal(up, source.read(f"{EXPERT}.weight"))


def test_packing_is_near_and_packing_again_changes_nothing(folder: Path, plain: Path, tmp_path: Path) -> None:
    exact, source = tensors_of(plain), SafetensorsFolder(folder)
    for name, step in ((EXPERT, 2**-2 if folder.name == "mxfp4" else 2**-4), (SHARED, 2**-4)):
        error = (source.read(f"{name}.weight") - exact[f"{name}.weight"]).abs()
        assert error.max() <= step * exact[f"{name}.weight"].abs().max()
    convert(folder, tmp_path / "plain", dtype="fp32")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text(encoding="utf-8"))
    convert(tmp_path / "plain", tmp_path / "again", dtype="fp8" if folder.name == "fp8" else "mxfp4")
    for number, dtype in enumerate((None, folder.name)):
        convert(folder, tmp_path / f"same{number}", dtype=dtype, max_shard_bytes=2_000_000)  # pyright: ignore
    again = SafetensorsFolder(tmp_path / "again")  # where rounding left a block less, by a smaller power of two
    assert all(torch.equal(again.read(name), source.read(name)) for name in source.tensors)
    for out in ("same0", "same1"):
        seen = {name: each for path in (tmp_path / out).glob("*.safetensors") for name, each in load_file(path).items()}
        expected = tensors_of(folder)
        assert seen.keys() == expected.keys()
        assert all(torch.equal(seen[n].view(torch.uint8), each.view(torch.uint8)) for n, each in expected.items())


def test_from_one_format_to_the_other(plain: Path, tmp_path: Path) -> None:
    """Powers of two that are no larger lose nothing, so what was FP8 stays the same number for number."""
    convert(plain, tmp_path / "mxfp4", dtype="mxfp4")
    convert(tmp_path / "mxfp4", tmp_path / "fp8", dtype="fp8")
    fours, eights = SafetensorsFolder(tmp_path / "mxfp4"), SafetensorsFolder(tmp_path / "fp8")
    assert tensors_of(tmp_path / "fp8")[f"{EXPERT}.weight"].dtype == torch.float8_e4m3fn
    assert torch.equal(fours.read(f"{SHARED}.weight"), eights.read(f"{SHARED}.weight"))
    assert read_quantization(json.loads((tmp_path / "fp8" / "config.json").read_text(encoding="utf-8")))


def test_powers_of_two_are_the_least_that_hold_a_block() -> None:
    values = torch.tensor([448.0, 449.0, 0.0, 1e-3]).repeat_interleave(128)[None].expand(128, -1)
    scales = fp8.pack(values, powers_of_two=True).scales
    assert scales.dtype == torch.float8_e8m0fnu
    assert scales.float().tolist() == [[1.0, 2.0, 1.0, 2.0**-18]]
    packed = fp4.pack(torch.tensor([[6.0, *[-0.5] * 31, 7.0, *[0.0] * 31]]))
    assert packed.scales.float().tolist() == [[1.0, 2.0]]
    assert packed.values.view(torch.uint8)[0, :2].tolist() == [0x97, 0x99]


@torch.no_grad()
def test_transformers_reads_what_we_write(folder: Path) -> None:
    """It unpacks to the same numbers, and ignores the layer that predicts further tokens."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    ours, expected = load(folder, dtype=torch.float32)(IDS), loaded(IDS).logits
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no scale": (lambda t: t.pop(f"{EXPERT}.scale"), f"{EXPERT}.weight in .* is FP4 and {EXPERT}.weight_scale_inv is"),
    "no weight": (lambda t: t.pop(f"{EXPERT}.weight"), f"{EXPERT}.scale scales no FP8 or FP4 weight in its folder"),
    "shape": (
        lambda t: t.update({f"{EXPERT}.scale": t[f"{EXPERT}.scale"][:, :1].contiguous()}),
        rf"{EXPERT}.scale in .* is \[64, 1\] and groups of 32 of \[64, 128\] need \[64, 4\]",
    ),
    "type": (
        lambda t: t.update({f"{EXPERT}.scale": t[f"{EXPERT}.scale"].float()}),
        f"{EXPERT}.scale in .* is of type F32; known scales: F8_E8M0, U8",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damages_are_named(plain: Path, tmp_path: Path, damage: str) -> None:
    convert(plain, tmp_path / "m", dtype="mxfp4")
    change, message = DAMAGES[damage]
    edit(tmp_path / "m", change)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "m")


def test_what_config_and_files_do_not_agree_on(plain: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "m", dtype="mxfp4")
    described = json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))
    for experts, error, message in (
        (None, CheckpointError, 'is of type I8 and config.json does not say what that is; add "expert_dtype": "fp4"'),
        ("fp6", ConfigError, "expert_dtype='fp6'; known: 'fp8', 'fp4'"),
    ):
        (tmp_path / "m" / "config.json").write_text(json.dumps(described | {"expert_dtype": experts}), encoding="utf-8")
        with pytest.raises(error, match=message):
            load(tmp_path / "m")


def test_inputs_that_are_no_multiple_of_32_are_refused(tmp_path: Path) -> None:
    model = Decoder(families.from_hf(RAW | {"moe_intermediate_size": 40}), dtype=torch.float32).initialize(0)
    save(model, tmp_path / "m")
    with pytest.raises(MoesaicError, match=r"experts.0.w2.weight multiplies 40 inputs; mxfp4 packs 32 at a time"):
        convert(tmp_path / "m", tmp_path / "out", dtype="mxfp4")
