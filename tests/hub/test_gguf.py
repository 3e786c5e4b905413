"""GGUF in: figures, tensors and the head order that llama.cpp's converter changes."""

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from moesaic import families
from moesaic.errors import CheckpointError, ConfigError, MissingDependencyError
from moesaic.families import find_preset
from moesaic.hub import load, read_config
from moesaic.hub.embedded import embedded_gguf
from moesaic.hub.gguf import GgufFile, read_metadata
from moesaic.hub.streaming import convert
from moesaic.models.decoder import Decoder

ARCHITECTURES = {
    "llama": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen2_moe": "qwen2moe", "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}  # fmt: skip
TINY: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e5,
    "eos_token_id": 2,
}
SPARSE = {
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 6,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    "qwen2_moe": {
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 6,
        "shared_expert_intermediate_size": 14,
        "norm_topk_prob": False,
    },
}


def interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, family: str, model: Decoder, **more: Any) -> None:
    """What llama.cpp's converter would write for this model."""
    hf = families.to_hf(model.config)
    writer = gguf.GGUFWriter(path, ARCHITECTURES[family])
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf["num_key_value_heads"])
    writer.add_key_length(hf["head_dim"])
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    writer.add_rope_freq_base(hf["rope_theta"])
    writer.add_eos_token_id(hf["eos_token_id"])
    if family in SPARSE:
        writer.add_expert_count(model.config.layers[1].feed_forward.router.num_experts)  # pyright: ignore
        writer.add_expert_used_count(hf["num_experts_per_tok"])
    if "moe_intermediate_size" in hf:
        writer.add_expert_feed_forward_length(hf["moe_intermediate_size"])
    for name, value in more.items():
        writer.add_string(f"{ARCHITECTURES[family]}.{name.replace('_', '.')}", value)
    state = model.state_dict()
    for spec in model.config.tensors():
        for name, values in named(spec.name, state[spec.name].numpy(), hf, ARCHITECTURES[family] == "llama"):
            writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


NAMES = {
    "attention_norm": "attn_norm", "feed_forward_norm": "ffn_norm", "attention.q_proj": "attn_q",
    "attention.k_proj": "attn_k", "attention.v_proj": "attn_v", "attention.o_proj": "attn_output",
    "attention.q_norm": "attn_q_norm", "attention.k_norm": "attn_k_norm", "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up", "feed_forward.down_proj": "ffn_down", "feed_forward.router": "ffn_gate_inp",
    "feed_forward.shared_experts.gate_proj": "ffn_gate_shexp", "feed_forward.shared_experts.up_proj": "ffn_up_shexp",
    "feed_forward.shared_experts.down_proj": "ffn_down_shexp", "feed_forward.shared_gate": "ffn_gate_inp_shexp",
}  # fmt: skip


def named(name: str, values: np.ndarray, hf: dict[str, Any], permute: bool) -> list[tuple[str, np.ndarray]]:
    if not name.startswith("layers."):
        outer = {"embedding": "token_embd", "final_norm": "output_norm", "head": "output"}
        return [(f"{outer[name.removesuffix('.weight')]}.weight", values)]
    _, layer, inner = name.split(".", 2)
    prefix = f"blk.{layer}."
    if inner.endswith("experts.down"):
        return [(f"{prefix}ffn_down_exps.weight", values)]
    if inner.endswith("experts.gate_up"):
        gate, up = np.split(values, 2, axis=1)
        return [(f"{prefix}ffn_gate_exps.weight", gate), (f"{prefix}ffn_up_exps.weight", up)]
    heads = {"attention.q_proj.weight": "num_attention_heads", "attention.k_proj.weight": "num_key_value_heads"}
    if permute and inner in heads:
        values = interleaved(values, hf[heads[inner]])
    module, kind = inner.rsplit(".", 1)
    return [(f"{prefix}{NAMES[module]}.{kind}", values.squeeze())]  # as its converter squeezes matrices of one row


def tiny(family: str, **more: Any) -> Decoder:
    config = families.from_hf({"model_type": family, **TINY, **SPARSE.get(family, {}), **more})
    return Decoder(config, dtype=torch.float32).initialize(seed=4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_figures_and_tensors_come_back(tmp_path: Path, family: str, tied: bool) -> None:
    model = tiny(family, tie_word_embeddings=tied)
    write(tmp_path / "m.gguf", family, model)
    loaded = load(tmp_path / "m.gguf")
    assert loaded.config == model.config == read_config(tmp_path / "m.gguf")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_names_are_those_of_the_gguf_package(tmp_path: Path, family: str) -> None:
    """Its own map of released names to GGUF's, and ours of both: the same tensors."""
    write(tmp_path / "m.gguf", family, tiny(family, mlp_only_layers=[]))
    file = GgufFile(tmp_path / "m.gguf")
    released, stored = families.family(family).weight_map(file.config), file.weight_map()
    (architecture,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[family])
    theirs = gguf.get_tensor_name_map(architecture, len(file.config.layers))
    for ours, pieces in released.items():
        joined = {re.sub(r"experts\.\d+\.", "experts.", piece.name) for piece in pieces}
        names = {theirs.get_name(name, try_suffixes=(".weight", ".bias")) for name in joined}
        assert names == {piece.name for piece in stored[ours]}, ours


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "qwen2_moe", "qwen3_moe"])
def test_transformers_reads_the_same_model(tmp_path: Path, family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = tiny(family, mlp_only_layers=[])
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.3)
    write(tmp_path / "m.gguf", family, model)
    described = AutoConfig.for_model(**families.to_hf(model.config))  # its reading of the header lacks some widths
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", config=described, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    ids = torch.tensor([[3, 17, 9, 4, 8, 30]])
    expected = theirs(ids).logits
    assert expected.abs().max() > 0.1
    assert (load(tmp_path / "m.gguf")(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_file_becomes_a_folder(tmp_path: Path, family: str) -> None:
    model = tiny(family)
    write(tmp_path / "m.gguf", family, model)
    convert(tmp_path / "m.gguf", tmp_path / "plain")
    convert(tmp_path / "m.gguf", tmp_path / "bf16", dtype="bf16", max_shard_bytes=8_000)
    assert load(tmp_path / "plain").config == model.config == load(tmp_path / "bf16").config
    for name, tensor in model.state_dict().items():
        assert torch.equal(load(tmp_path / "plain").state_dict()[name], tensor), name
        assert torch.equal(load(tmp_path / "bf16").state_dict()[name], tensor.bfloat16()), name


def test_metadata_are_plain_values(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", "llama", tiny("llama"))
    metadata = read_metadata(tmp_path / "m.gguf")
    assert metadata["general.architecture"] == "llama" and metadata["llama.block_count"] == 2
    assert not any(name.startswith("GGUF.") for name in metadata)


@pytest.mark.parametrize("share", [0.0005, 0.002, 0.02, 0.2, 0.9])
def test_a_file_cut_short_is_one_line(tmp_path: Path, share: float) -> None:
    path = tmp_path / "m.gguf"
    write(path, "llama", tiny("llama"))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(CheckpointError, match=r"m.gguf (is cut short or damaged|does not start like)") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="does not start like a GGUF file"):
        read_config(tmp_path / "m.gguf")


def test_scaled_positions_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", "llama", tiny("llama"), rope_scaling_type="yarn")
    with pytest.raises(ConfigError, match="scaled rotary positions are not supported"):
        load(tmp_path / "m.gguf")


def test_an_unknown_architecture_lists_the_known(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ConfigError, match="architecture 'gemma3' is not supported; known: llama, qwen2, qwen2moe, qwen3"
    ):
        read_config(tmp_path / "m.gguf")


def smollm2() -> Path:
    try:
        return embedded_gguf()
    except MissingDependencyError as error:
        pytest.skip(str(error))


def test_smollm2_is_read_as_its_preset() -> None:
    file = GgufFile(smollm2())
    assert file.config == find_preset("smollm2-135m-instruct")
    assert file.read("blk.29.attn_k.weight").shape == (192, 576)


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_gives_the_logits_of_transformers_reading() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = smollm2()
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    text = "The capital of France is Paris. A router sends every token to a few experts, and 2 + 2 = 4."
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    token_ids = torch.tensor([tokenizer.encode(text)])
    expected, seen = theirs(token_ids).logits, load(path)(token_ids)
    assert expected.abs().max() > 1 and token_ids.shape[1] > 20
    assert (seen - expected).abs().max() <= 1e-4 * expected.abs().max()
