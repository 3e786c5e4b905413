"""Files with rounded weights: what they hold, that they read back exactly, and that other programs read the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic import families
from moesaic.errors import CheckpointError, ConfigError
from moesaic.hub import load, read_config, save
from moesaic.hub.sources import SafetensorsFolder
from moesaic.hub.streaming import convert
from moesaic.kernels.rounding import Bits, dequantized, round_to_ints
from moesaic.models.decoder import Decoder
from moesaic.quantize.files import quantize_checkpoint
from moesaic.quantize.report import report
from tests.full_disk import full_disk

TINY: dict[str, Any] = {
    "model_type": "qwen2_moe", "vocab_size": 131, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64, "intermediate_size": 96, "max_position_embeddings": 64,
    "mlp_only_layers": [0],
}  # fmt: skip
LATENT = {
    "model_type": "deepseek_v3", "vocab_size": 131, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "moe_intermediate_size": 32, "intermediate_size": 64, "first_k_dense_replace": 1,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "max_position_embeddings": 64,
}  # fmt: skip
IDS = torch.randint(131, (2, 9), generator=torch.Generator().manual_seed(4))
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"
WEIGHT = "model.layers.0.self_attn.q_proj.weight"


@torch.no_grad()
def saved(folder: Path, raw: dict[str, Any] = TINY, dtype: torch.dtype = torch.float32) -> Path:
    model = Decoder(families.from_hf(raw), dtype=dtype).initialize(3)
    for parameter in model.parameters():
        parameter.mul_(3 if parameter.dim() > 1 else 1)
    save(model, folder)
    return folder


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return saved(tmp_path / "plain")


@pytest.fixture
def packed(plain: Path) -> Path:
    quantize_checkpoint(plain, plain.with_name("packed"), 8, experts_bits=4)
    return plain.with_name("packed")


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change(raw["quantization_config"])
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")


def test_a_file_is_what_the_format_says(packed: Path) -> None:
    tensors = load_file(packed / "model.safetensors")
    outputs, inputs = tensors[f"{EXPERT}_shape"].tolist()
    assert (outputs, inputs) == (64, 32)
    assert tensors[f"{EXPERT}_packed"].dtype == torch.int32 and tensors[f"{EXPERT}_packed"].shape == (64, 32 * 4 // 32)
    assert tensors[f"{WEIGHT}_packed"].shape == (64, 64 * 8 // 32) and tensors[f"{WEIGHT}_scale"].shape == (64, 2)
    kept = {name.split(".", 2)[-1] for name in tensors if name.endswith(".weight") and tensors[name].dim() == 2}
    assert kept == {"weight", "1.mlp.gate.weight", "1.mlp.shared_expert_gate.weight"}
    described = json.loads((packed / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert described["quant_method"] == "compressed-tensors" and described["format"] == "pack-quantized"
    groups = described["config_groups"].values()
    assert [(each["targets"], each["weights"]["num_bits"]) for each in groups] == [
        ([r"re:.*\.experts\.(expert_)?\d+\..*"], 4),
        (["Linear"], 8),
    ]
    assert "model.layers.1.mlp.gate" in described["ignore"] and "lm_head" not in described["ignore"]
    assert read_config(packed) == read_config(packed.with_name("plain"))


def test_reading_is_numbers_times_scales(packed: Path) -> None:
    exact, source = load_file(packed.with_name("plain") / "model.safetensors"), SafetensorsFolder(packed)
    of_each: dict[str, Bits] = {EXPERT: 4, WEIGHT: 8, "lm_head.weight": 8}
    for name, bits in of_each.items():
        expected = dequantized(round_to_ints(exact[name], bits, 32), 32)
        assert torch.equal(source.read(name), expected)
        assert torch.equal(source.read(name, (slice(5, 60), slice(3, 31))), expected[5:60, 3:31])
        assert torch.equal(source.read(name, (3, slice(1, None, 2))), expected[3, 1::2])
        assert source.packed(name) == (f"{name}_packed", f"{name}_scale", f"{name}_shape")


def test_a_matrix_by_hand(packed: Path) -> None:
    tensors = load_file(packed / "model.safetensors")
    words, scale = tensors[f"{EXPERT}_packed"], tensors[f"{EXPERT}_scale"]
    seen = SafetensorsFolder(packed).read(EXPERT)
    for row, column in ((0, 0), (7, 9), (63, 31)):
        number = (int(words[row, column // 8]) >> 4 * (column % 8) & 15) - 8
        assert seen[row, column] == number * float(scale[row, column // 32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_have_the_type_of_the_model(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = saved(tmp_path / "plain", dtype=dtype)
    quantize_checkpoint(folder, tmp_path / "out", 4)
    scales = {name: each for name, each in load_file(tmp_path / "out/model.safetensors").items() if "_scale" in name}
    assert {scale.dtype for scale in scales.values()} == {dtype}
    assert all(torch.equal(scale.half().float(), scale.float()) for scale in scales.values())
    exact = load_file(folder / "model.safetensors")[WEIGHT].float()
    seen = SafetensorsFolder(tmp_path / "out").read(WEIGHT)
    assert torch.equal(seen, dequantized(round_to_ints(exact, 4, 32, in_bf16=dtype == torch.bfloat16), 32))


@torch.no_grad()
def test_converting_keeps_or_unpacks(packed: Path, tmp_path: Path) -> None:
    convert(packed, tmp_path / "same", max_shard_bytes=20_000)
    convert(packed, tmp_path / "wide", dtype="fp32")
    logits = load(packed, dtype=torch.float32)(IDS)
    for name in ("same", "wide"):
        assert torch.equal(load(tmp_path / name, dtype=torch.float32)(IDS), logits)
    assert "quantization_config" not in json.loads((tmp_path / "wide/config.json").read_text(encoding="utf-8"))
    with pytest.raises(ConfigError, match="only unpacked"):
        convert(packed, tmp_path / "fused", layout="fused")


@torch.no_grad()
def test_stacked_experts_become_one_by_one(plain: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "fused", layout="fused")
    quantize_checkpoint(tmp_path / "fused", tmp_path / "out", 8)
    quantize_checkpoint(plain, tmp_path / "direct", 8)
    seen, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "direct"))
    assert seen.keys() == expected.keys() and all(torch.equal(seen[name], expected[name]) for name in seen)


def test_the_report_adds_up(plain: Path, tmp_path: Path) -> None:
    quantized = quantize_checkpoint(plain, tmp_path / "out", 8, experts_bits=4, head_bits=16)
    document = report(quantized, read_config(plain).total)
    files = load_file(tmp_path / "out/model.safetensors")
    assert document["bytes_after"] == sum(tensor.nbytes for tensor in files.values())
    assert document["bytes_before"] == sum(t.nbytes for t in load_file(plain / "model.safetensors").values())
    assert {each["role"] for each in document["by_layer"]} == {"attention", "mlp", "experts", "shared_experts"}
    experts = next(each for each in document["by_layer"] if each["role"] == "experts")
    assert experts["layer"] == "1" and experts["tensors"] == 15 and 0.05 < experts["error"] < 0.12
    assert all(each["error"] < 0.01 for each in document["by_layer"] if each["bits"] == 8)
    assert len(document["worst_experts"]) == 5 and document["worst_experts"][0]["layer"] == "1"
    assert "lm_head.weight" in files


def test_latent_attention_is_rounded_and_choosers_stay(tmp_path: Path) -> None:
    quantize_checkpoint(saved(tmp_path / "plain", LATENT), tmp_path / "out", 4)
    names = set(load_file(tmp_path / "out/model.safetensors"))
    assert {"model.layers.0.self_attn.kv_b_proj.weight_packed", "model.layers.1.mlp.gate.weight"} <= names
    assert load(tmp_path / "out", dtype=torch.float32)(IDS).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("raw", [TINY, LATENT], ids=lambda raw: raw["model_type"])
@pytest.mark.parametrize(("bits", "experts_bits", "head_bits"), [(8, 8, 8), (4, 4, 8), (8, 4, 16)])
@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_what_we_write(
    tmp_path: Path, raw: dict[str, Any], bits: Any, experts_bits: Any, head_bits: int
) -> None:
    from transformers import AutoModelForCausalLM

    quantize_checkpoint(
        saved(tmp_path / "plain", raw), tmp_path / "out", bits, experts_bits=experts_bits, head_bits=head_bits
    )
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    ours, expected = load(tmp_path / "out", dtype=torch.float32)(IDS), loaded(IDS).logits
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


OF_GROUP = {
    "num_bits": (3, r"group_1.weights.num_bits=3; known: 4, 8"),
    "symmetric": (False, r"group_1.weights.symmetric=False; known: True"),
    "strategy": ("block", r"group_1.weights.strategy='block'; known: 'group', 'channel'"),
    "actorder": ("group", r"group_1.weights.actorder='group'; known: None, False, 'weight', 'static'"),
    "type": ("float", r"group_1.weights.type='float'; known: 'int'"),
    "group_size": (None, r"group_1.weights.group_size=None; known: numbers of inputs"),
}
OF_ALL = {
    "format": ("int-quantized", r"format='int-quantized'; known: 'pack-quantized'"),
    "transform_config": ({"config_groups": {}}, "transform_config=.*; known: None, {}"),
    "kv_cache_scheme": ({"num_bits": 8}, "kv_cache_scheme=.*; known: None"),
    "config_groups": ({}, "config_groups={}; known: a table"),
}


@pytest.mark.parametrize("field", [*OF_GROUP, *OF_ALL])
def test_settings_that_cannot_be_read_are_named(packed: Path, field: str) -> None:
    value, message = (OF_GROUP | OF_ALL)[field]

    def change(described: dict[str, Any]) -> None:
        (described["config_groups"]["group_1"]["weights"] if field in OF_GROUP else described)[field] = value

    edit_config(packed, change)
    with pytest.raises(ConfigError, match=f"config.json: .*{message}") as caught:
        load(packed)
    assert "\n" not in str(caught.value)


DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "no scale": (lambda t: t.pop(f"{WEIGHT}_scale"), f"{WEIGHT}_packed in .* and {WEIGHT}_scale is missing"),
    "no weight": (lambda t: t.pop(f"{WEIGHT}_packed"), f"{WEIGHT}_s.* belongs to no packed weight"),
    "scales": (
        lambda t: t.update({f"{WEIGHT}_scale": torch.ones(64, 3)}),
        rf"{WEIGHT}_scale in .* is \[64, 3\] and groups of 32 of \[64, 64\] need \[64, 2\]",
    ),
    "words": (lambda t: t.update({f"{WEIGHT}_packed": torch.ones(64, 9).int()}), "has 9 words a row and 64 inputs"),
    "type": (lambda t: t.update({f"{WEIGHT}_packed": torch.ones(64, 16).long()}), "is of type I64; known: I32"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_tables_that_do_not_fit_are_named(packed: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    tensors = load_file(packed / "model.safetensors")
    change(tensors)
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message) as caught:
        load(packed)
    assert "\n" not in str(caught.value)


def test_packed_without_a_word_is_named(packed: Path) -> None:
    raw = json.loads((packed / "config.json").read_text(encoding="utf-8"))
    raw.pop("quantization_config")
    (packed / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(CheckpointError, match="does not say how it is packed"):
        load(packed)


def test_what_cannot_be_rounded_is_refused(plain: Path, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refusals: list[tuple[Callable[[], object], str]] = [
        (lambda: quantize_checkpoint(packed, out, 4), r"packed already \(compressed-tensors\)"),
        (lambda: quantize_checkpoint(plain, out, 3), "3 bits; known: 4, 8"),  # pyright: ignore[reportArgumentType]
        (lambda: quantize_checkpoint(plain, out, 4, head_bits=5), "5 bits; known: 4, 8, 16"),
        (lambda: quantize_checkpoint(plain, out, 4, group=48), "group 48; known: 32, 64, 128"),
        (lambda: quantize_checkpoint(plain, out, 4, group=64), r"groups of 64 do not divide the \d+ inputs of .*32"),
    ]
    for action, message in refusals:
        with pytest.raises(ConfigError, match=message) as caught:
            action()
        assert "\n" not in str(caught.value) and not out.exists()


def test_families_that_stack_their_experts_are_refused_by_name(tmp_path: Path) -> None:
    raw = {
        "model_type": "granitemoe", "vocab_size": 131, "hidden_size": 64, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3,
        "num_experts_per_tok": 2, "max_position_embeddings": 64, "attention_multiplier": 0.25,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="files of granitemoe stack the experts"):
        quantize_checkpoint(saved(tmp_path / "plain", raw), tmp_path / "out", 4)


def test_a_full_disk_leaves_what_was_there(plain: Path, packed: Path) -> None:
    before = (packed / "model.safetensors").read_bytes()
    with full_disk(4096), pytest.raises(CheckpointError, match="what was there is untouched"):
        quantize_checkpoint(plain, packed, 4)
    assert (packed / "model.safetensors").read_bytes() == before
