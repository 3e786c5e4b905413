"""FP8 blocks, by hand from the format, and as transformers reads them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations import finegrained_fp8 as theirs

from moesaic import families
from moesaic.errors import CheckpointError, ConfigError
from moesaic.hub import fp8, load, read_config, save
from moesaic.hub.sources import SafetensorsFolder
from moesaic.hub.streaming import convert
from moesaic.models.decoder import Decoder

QWEN = {
    "model_type": "qwen3_moe",
    "vocab_size": 131,
    "hidden_size": 256,
    "head_dim": 64,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
LATENT = {
    "model_type": "deepseek_v3",
    "vocab_size": 131,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 112,
    "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 5,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
}
INDEXED = LATENT | {"model_type": "deepseek_v32", "index_n_heads": 4, "index_head_dim": 32, "index_topk": 2}
PARTIAL = QWEN | {"hidden_size": 200, "moe_intermediate_size": 140, "head_dim": 36}
WEIGHT = "model.layers.1.mlp.experts.2.up_proj.weight"
IDS = torch.tensor([[3, 17, 99, 4, 8]])


def model_of(raw: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> Decoder:
    """Weights of very different sizes, so that scales matter."""
    model = Decoder(families.from_hf(raw), dtype=dtype).initialize(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(torch.linspace(0.1, 3, parameter.shape[-1]))
            if "norm" in name:
                parameter.add_(torch.linspace(-0.1, 0.1, parameter.shape[-1]))
    return model.eval()


@pytest.fixture(params=["whole", "partial"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save(model_of(QWEN if request.param == "whole" else PARTIAL), tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "fp8", dtype="fp8")
    return tmp_path / "fp8"


def edit(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def by_hand(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """One number at a time."""
    plain = torch.empty(weight.shape)
    for row in range(weight.shape[0]):
        for column in range(0, weight.shape[1], 7):
            plain[row, column] = float(weight[row, column]) * float(scale[row // 128, column // 128])
    return plain[:, ::7]


def test_a_file_is_what_the_format_says(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    packed = {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    assert {name.rsplit(".", 2)[-2] for name in packed} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert all(tensors[f"{name}_scale_inv"].dtype == torch.float32 for name in packed)
    plain = {name: each for name, each in tensors.items() if name not in packed and not name.endswith("_scale_inv")}
    assert {tensor.dtype for tensor in plain.values()} == {torch.bfloat16} and "lm_head.weight" in plain
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["model.embed_tokens", "model.layers.*.mlp.gate", "lm_head"],
    }
    assert read_config(folder) == read_config(folder.with_name("m"))


def test_reading_is_the_product_by_hand_and_as_theirs(folder: Path) -> None:
    tensors, source = load_file(folder / "model.safetensors"), SafetensorsFolder(folder)
    for name in (WEIGHT, "model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.experts.0.down_proj.weight"):
        weight, scale = tensors[name], tensors[f"{name}_scale_inv"]
        seen = source.read(name)
        assert seen.dtype == torch.float32 and torch.equal(seen[:, ::7], by_hand(weight, scale))
        expected = theirs._dequantize_fp8_weight(weight, scale, [128, 128], torch.float32)
        assert torch.equal(seen, expected)
        assert torch.equal(source.read(name, (slice(5, 133), slice(100, 131))), seen[5:133, 100:131])
        assert torch.equal(source.read(name, (3, slice(1, None, 2))), seen[3, 1::2])


def test_every_matrix_of_a_model_with_an_indexer_is_the_product(tmp_path: Path) -> None:
    partial = {"q_lora_rank": 130, "kv_lora_rank": 60, "v_head_dim": 35, "moe_intermediate_size": 140}
    save(model_of(INDEXED | partial, torch.float32), tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "fp8", dtype="fp8")
    exact, tensors = load_file(tmp_path / "m/model.safetensors"), load_file(tmp_path / "fp8/model.safetensors")
    source = SafetensorsFolder(tmp_path / "fp8")
    for name, plain in exact.items():
        if tensors[name].dtype != torch.float8_e4m3fn:
            assert torch.equal(tensors[name], plain), name
            continue
        rows, columns = (torch.arange(size) // 128 for size in plain.shape)
        expected = tensors[name].float() * tensors[f"{name}_scale_inv"][rows[:, None], columns]
        assert torch.equal(source.read(name), expected), name
        assert (expected - plain).abs().max() <= plain.abs().max() * 2**-4, name
    packed = {name.split(".", 3)[3] for name in tensors if f"{name}_scale_inv" in tensors}
    assert {"self_attn.indexer.wq_b.weight", "self_attn.indexer.wk.weight"} <= packed
    assert {"self_attn.indexer.weights_proj.weight", "mlp.gate.weight"}.isdisjoint(packed)


def test_packing_is_as_near_as_the_format_allows(folder: Path) -> None:
    plain = load_file(folder.with_name("m") / "model.safetensors")[WEIGHT].float()
    seen = SafetensorsFolder(folder).read(WEIGHT)
    scale = fp8.pack(plain).scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    scale = scale[: plain.shape[0], : plain.shape[1]]
    # Half a step: 2^-4 of a normal number, 2^-10 of the scale below the least of them.
    assert ((seen - plain).abs() <= torch.maximum(plain.abs() * 2**-4, scale * 2**-10) * 1.001).all()
    for block in (slice(0, 128), slice(128, None)):
        assert (seen[:128, block].abs().max() / plain[:128, block].abs().max() - 1).abs() < 1e-6


def test_packing_is_theirs() -> None:
    class Settings:
        weight_block_size, scale_fmt = (128, 128), "float"

    class Quantizer:
        quantization_config = Settings()

    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(1))
    quantize: Any = theirs.Fp8Quantize(Quantizer())
    expected = quantize.convert({"w.weight": weight})
    packed = fp8.pack(weight)
    assert torch.allclose(packed.scales, expected["w.weight_scale_inv"], rtol=1e-6, atol=0)
    # They multiply by the reciprocal, so a few values fall on the other side of a border.
    assert (packed.values.view(torch.uint8) != expected["w.weight"].view(torch.uint8)).float().mean() < 1e-3


def test_packed_weights_stay_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    for number, dtype in enumerate((None, "fp8")):
        convert(folder, tmp_path / f"{number}", dtype=dtype, max_shard_bytes=100_000)
        seen = {n: t for path in (tmp_path / f"{number}").glob("*.safetensors") for n, t in load_file(path).items()}
        expected = load_file(folder / "model.safetensors")
        assert seen.keys() == expected.keys()
        assert all(torch.equal(seen[n].view(torch.uint8), t.view(torch.uint8)) for n, t in expected.items())
        assert (tmp_path / f"{number}/config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_unpacked_and_packed_again_is_the_same(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "plain", dtype="fp32")
    convert(tmp_path / "plain", tmp_path / "again", dtype="fp8")
    seen, expected = (load_file(each / "model.safetensors") for each in (tmp_path / "again", folder))
    for name, tensor in expected.items():
        if tensor.dtype == torch.float8_e4m3fn:
            assert torch.equal(seen[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert load(tmp_path / "plain").config == load(folder).config


def test_loading_takes_the_dtype_of_the_rest(folder: Path) -> None:
    assert {tensor.dtype for tensor in load(folder).state_dict().values()} == {torch.bfloat16}
    exact = SafetensorsFolder(folder).read(WEIGHT)
    up = load(folder, dtype=torch.float32).state_dict()["layers.1.feed_forward.experts.gate_up"][2, exact.shape[0] :]
    assert torch.equal(up, exact)


@torch.no_grad()
@pytest.mark.parametrize("raw", [QWEN, LATENT, INDEXED], ids=lambda raw: raw["model_type"])
def test_transformers_reads_what_we_write(tmp_path: Path, raw: dict[str, Any]) -> None:
    """Whole blocks, since it cuts others into equal parts, at odds with the format (or refuses them, as V3's 576 rows).

    Both round the weights alike, so both choose the same experts and tokens.
    """
    save(model_of(raw, torch.float32), tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "fp8", dtype="fp8")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8", attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    ours, expected = load(tmp_path / "fp8", dtype=torch.float32)(IDS), loaded(IDS).logits
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not torch.equal(ours, load(tmp_path / "m")(IDS))


@pytest.mark.parametrize("kind", ["bytes", "e8m0", "fp32"])
def test_scales_that_are_powers_of_two(folder: Path, kind: str) -> None:
    exponents = {}

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            exponents[name] = tensors[name].log2().round()
            stored = (exponents[name] + 127).to(torch.uint8)
            as_kind = {"bytes": stored, "e8m0": stored.view(torch.float8_e8m0fnu), "fp32": exponents[name].exp2()}
            tensors[name] = as_kind[kind]

    edit(folder, change)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings["quantization_config"]["scale_fmt"] = "ue8m0"
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    weight = load_file(folder / "model.safetensors")[WEIGHT]
    expected = by_hand(weight, exponents[f"{WEIGHT}_scale_inv"].exp2())
    assert torch.equal(SafetensorsFolder(folder).read(WEIGHT)[:, ::7], expected)


SCALE = f"{WEIGHT}_scale_inv"
DAMAGES = {
    "no scale": (lambda t: t.pop(SCALE), f"{WEIGHT} in .* is FP8 and {SCALE} is missing"),
    "no weight": (lambda t: t.pop(WEIGHT), f"{SCALE} scales no FP8 weight"),
    "shape": (
        lambda t: t.update({SCALE: torch.ones(1, 3)}),
        rf"{SCALE} in .* is \[1, 3\] and blocks of 128 x 128 of \[\d+, \d+\] need \[\d, 2\]",
    ),
    "type": (
        lambda t: t.update({SCALE: t[SCALE].to(torch.float64)}),
        f"{SCALE} in .* is of type F64; known scales: F32, F8_E8M0, U8",
    ),
    "vector": (
        lambda t: t.update({"model.norm.weight": torch.ones(3).to(torch.float8_e4m3fn),
                            "model.norm.weight_scale_inv": torch.ones(1)}),
        r"model.norm.weight in .* is FP8 of shape \[3\]; known: matrices",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_tables_that_do_not_fit_are_named(folder: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_method": "awq"}, "quantization_config of method 'awq' is not supported; known: fp8, mxfp4"),
        ({"weight_block_size": [64, 128]}, r"weight_block_size=\[64, 128\]; known: \[128, 128\]"),
        ({"weight_block_size": None}, r"weight_block_size=None; known"),
        ({"activation_scheme": "static"}, "activation_scheme='static'; known: 'dynamic'"),
        ({"scale_fmt": "e5m2"}, "scale_fmt='e5m2'; known: 'float', 'ue8m0'"),
        ({"fmt": "e5m2"}, "fmt='e5m2'; known: 'e4m3'"),
    ],
)
def test_settings_that_cannot_be_read_are_named(folder: Path, fields: dict[str, Any], message: str) -> None:
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings["quantization_config"] |= fields
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    for action in (read_config, load):
        with pytest.raises(ConfigError, match=f"config.json: .*{message}") as caught:
            action(folder)
        assert "\n" not in str(caught.value)


def test_a_scale_that_is_no_number_is_found(folder: Path, tmp_path: Path) -> None:
    edit(folder, lambda tensors: tensors[SCALE].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=f"{WEIGHT} has NaN"):
        convert(folder, tmp_path / "out", dtype="bf16", check=True)
