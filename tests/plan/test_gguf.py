"""Plans of GGUF files by their headers alone: no tensor's bytes are there."""

import json
import subprocess
import sys

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesaic.errors import CheckpointError, ConfigError, MoesaicError
from moesaic.hub.gguf import GgufFile
from moesaic.hub.gguf_header import BLOCKS, read_gguf_header
from moesaic.hub.resolve import describe_config
from moesaic.plan.formats import total_bytes
from moesaic.plan.plan import ServingPlan, make_plan

Q = GGMLQuantizationType
HIDDEN, HEADS, GROUPS, HEAD, INNER, EXPERTS, VOCAB = 256, 4, 2, 64, 512, 8, 1000


def header(path, types: dict[str, Q], *, architecture: str = "qwen3moe", leave_out: str = "", **more: int):
    """A file of two layers with what llama.cpp's converter writes before the tensors; `types` by parts of names."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(2)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_key_length(HEAD)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(INNER)
    writer.add_token_list([f"word{number}" for number in range(VOCAB)])
    writer.add_array("tokenizer.ggml.scores", [0.5] * VOCAB)
    for name, value in more.items():
        writer.add_uint32(f"{architecture}.{name}", value)
    for name, shape in shapes().items():
        if name == leave_out:
            continue
        kind = next((kind for part, kind in types.items() if part in name), Q.F32 if len(shape) == 1 else Q.BF16)
        add_info(writer, name, shape, kind)
    write_header(writer)
    return path


def add_info(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> None:
    block, size = GGML_QUANT_SIZES[kind]
    stored = (*shape[:-1], shape[-1] // block * size)
    writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=kind)


def write_header(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,), "output.weight": (VOCAB, HIDDEN),
    }  # fmt: skip
    for layer in range(2):
        found |= {
            f"blk.{layer}.{name}.weight": shape
            for name, shape in {
                "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_q": (HEADS * HEAD, HIDDEN),
                "attn_k": (GROUPS * HEAD, HIDDEN), "attn_v": (GROUPS * HEAD, HIDDEN),
                "attn_output": (HIDDEN, HEADS * HEAD), "attn_q_norm": (HEAD,), "attn_k_norm": (HEAD,),
                "ffn_gate_inp": (EXPERTS, HIDDEN), "ffn_gate_exps": (EXPERTS, INNER, HIDDEN),
                "ffn_up_exps": (EXPERTS, INNER, HIDDEN), "ffn_down_exps": (EXPERTS, HIDDEN, INNER),
            }.items()
        }  # fmt: skip
    return found


def test_blocks_are_those_of_the_gguf_package():
    ours = {name: (numbers, size) for name, numbers, size in BLOCKS.values()}
    theirs = {kind.name: tuple(GGML_QUANT_SIZES[kind]) for kind in GGML_QUANT_SIZES if int(kind) in BLOCKS}
    assert ours == theirs and all(Q(number).name == block[0] for number, block in BLOCKS.items())


MIXED = {
    "ffn_down_exps": Q.Q6_K,
    "exps": Q.Q4_K,
    "attn_v": Q.Q8_0,
    "attn": Q.Q4_K,
    "token_embd": Q.Q4_K,
    "output": Q.Q6_K,
}


@pytest.mark.parametrize(
    ("types", "experts", "like"),
    [
        ({}, 16.0, "bf16"),
        ({"exps": Q.Q8_0, "attn": Q.Q8_0}, 8.5, "int8"),
        ({"exps": Q.MXFP4}, 4.25, "int4"),
        (MIXED, (2 * 4.5 + 6.5625) / 3, "int4"),
        ({"exps": Q.IQ2_XXS}, 2.0625, "int4"),
    ],
    ids=["bf16", "Q8_0", "MXFP4", "Q4_K with Q6_K", "IQ2_XXS"],
)
def test_weights_take_what_the_file_says(tmp_path, types, experts, like):
    path = header(tmp_path / "m.gguf", types)
    plan = make_plan(path, machine="rtx4090", context=1024)
    assert isinstance(plan, ServingPlan)
    formats, config = plan.serving.formats, plan.serving.config
    assert formats.bits["experts"] == pytest.approx(experts) and formats.by_role["experts"] == like
    matrices = {name: each for name, each in read_gguf_header(path).tensors.items() if len(each.shape) > 1}
    vectors = sum(np.prod(shape) for shape in shapes().values() if len(shape) == 1)
    assert total_bytes(config, formats) == pytest.approx(
        sum(each.num_bytes for each in matrices.values()) + 2 * vectors
    )
    assert config.total == sum(int(np.prod(shape)) for shape in shapes().values())


def test_a_header_says_what_the_whole_file_says(tmp_path):
    """The same model as by the gguf package, which wants the tensors' bytes, too."""
    path = header(tmp_path / "m.gguf", MIXED)
    with path.open("ab") as file:
        file.write(bytes(32 + sum(each.num_bytes + 32 for each in read_gguf_header(path).tensors.values())))
    whole = GgufFile(path)
    found = read_gguf_header(path)
    assert describe_config(path) == whole.config
    assert {name: each.num_bytes for name, each in found.tensors.items()} == whole.stored_bytes
    assert {name: each.shape for name, each in found.tensors.items()} == {
        name: each.shape for name, each in whole.tensors.items()
    }
    known = {name: value for name, value in whole.metadata.items() if name != "tokenizer.ggml.tokens"}
    assert {name: value for name, value in found.metadata.items() if name in known} == known
    assert found.metadata["tokenizer.ggml.tokens"] == VOCAB


def latent(path, more=(), *, architecture="deepseek2", split=None, part=slice(None)):
    """A file as llama.cpp's converter writes of DeepSeek-V3: a dense layer and one of experts, latent attention."""
    writer = gguf.GGUFWriter(path, architecture)
    own = {
        "context_length": 4096, "embedding_length": 256, "block_count": 2, "feed_forward_length": 384,
        "attention.head_count": 4, "attention.head_count_kv": 1, "attention.q_lora_rank": 96,
        "attention.kv_lora_rank": 64, "attention.key_length": 96, "attention.value_length": 64,
        "attention.key_length_mla": 96, "attention.value_length_mla": 64, "rope.dimension_count": 32,
        "expert_count": 8, "expert_used_count": 2, "expert_shared_count": 1, "expert_feed_forward_length": 128,
        "leading_dense_block_count": 1,
    }  # fmt: skip
    for name, value in own.items():
        writer.add_uint32(f"{architecture}.{name}", value)
    if split:
        writer.add_uint16("split.count", split)
    for name, shape in list({**LATENT_TENSORS, **dict(more)}.items())[part]:
        add_info(writer, name, shape, Q.F32 if len(shape) == 1 else Q.Q8_0)
    write_header(writer)
    return path


def _latent_layer(layer: int) -> dict[str, tuple[int, ...]]:
    parts: dict[str, tuple[int, ...]] = {
        "attn_norm": (256,), "ffn_norm": (256,), "attn_q_a": (96, 256), "attn_q_a_norm": (96,), "attn_q_b": (384, 96),
        "attn_kv_a_mqa": (96, 256), "attn_kv_a_norm": (64,), "attn_k_b": (4, 64, 64), "attn_v_b": (4, 64, 64),
        "attn_output": (256, 256),
    }  # fmt: skip
    dense = {"ffn_gate": (384, 256), "ffn_up": (384, 256), "ffn_down": (256, 384)}
    moe = {
        "ffn_gate_inp": (8, 256), "ffn_gate_exps": (8, 128, 256), "ffn_up_exps": (8, 128, 256),
        "ffn_down_exps": (8, 256, 128), "ffn_gate_shexp": (128, 256), "ffn_up_shexp": (128, 256),
        "ffn_down_shexp": (256, 128),
    }  # fmt: skip
    named = {f"blk.{layer}.{name}.weight": shape for name, shape in (parts | (moe if layer else dense)).items()}
    return named | ({f"blk.{layer}.exp_probs_b.bias": (8,)} if layer else {})


LATENT_TENSORS: dict[str, tuple[int, ...]] = {
    "token_embd.weight": (VOCAB, 256), "output_norm.weight": (256,), "output.weight": (VOCAB, 256),
    **_latent_layer(0), **_latent_layer(1),
}  # fmt: skip


def test_a_file_of_latent_attention_is_planned_by_its_header(tmp_path, capsys):
    path = latent(tmp_path / "m.gguf")
    plan = make_plan(path, machine="rtx4090", context=1024)
    assert isinstance(plan, ServingPlan)
    config, held = plan.serving.config, read_gguf_header(path).tensors
    counted = {name: each for name, each in held.items() if "exp_probs_b" not in name}
    assert config.total == sum(int(np.prod(each.shape)) for each in counted.values())
    assert config.state_bytes_per_token() == 2 * (64 + 32) * 2 and config.moe_layers == (1,)
    matrices = sum(each.num_bytes for each in counted.values() if len(each.shape) > 1)
    vectors = sum(2 * int(np.prod(each.shape)) for each in counted.values() if len(each.shape) == 1)
    assert total_bytes(config, plan.serving.formats) == pytest.approx(matrices + vectors)
    said = capsys.readouterr().err
    assert (
        "architecture 'deepseek2' does not run here: described by its header" in said and "the file holds" not in said
    )


def test_what_a_header_holds_beyond_its_plan_is_said(tmp_path, capsys):
    make_plan(latent(tmp_path / "m.gguf", {"blk.0.sparkle.weight": (64, 256)}.items()), machine="rtx4090", context=64)
    assert "; the file holds" in capsys.readouterr().err
    strange = latent(tmp_path / "s.gguf", {"blk.0.ssm_in.weight": (64, 256)}.items())
    with pytest.raises(ConfigError, match=r"blk\.0\.ssm_in\.weight belongs to a part that cannot be"):
        make_plan(strange, machine="rtx4090")


def test_a_model_in_several_files(tmp_path):
    whole = make_plan(latent(tmp_path / "m.gguf"), machine="rtx4090", context=64)
    first = latent(tmp_path / "m-00001-of-00002.gguf", split=2, part=slice(10))
    with pytest.raises(CheckpointError, match=r"one of 2 parts, and m-00002-of-00002\.gguf is not beside it"):
        make_plan(first)
    latent(tmp_path / "m-00002-of-00002.gguf", split=2, part=slice(10, None))
    assert isinstance(whole, ServingPlan) and whole.serving.config.total == describe_config(first).total


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_cut_anywhere_it_is_refused(tmp_path, share):
    path = header(tmp_path / "whole.gguf", MIXED)
    text = path.read_bytes()
    short = tmp_path / "short.gguf"
    short.write_bytes(text[: int(share * (len(text) - 40))])
    with pytest.raises(CheckpointError, match=r"short\.gguf (is cut short|does not start)"):
        make_plan(short)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(4, 20_000), byte=st.integers(0, 255))
def test_a_wrong_byte_is_no_traceback(tmp_path, at, byte):
    path = header(tmp_path / "whole.gguf", MIXED)
    text = bytearray(path.read_bytes())
    text[at % len(text)] = byte
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(text)
    try:
        make_plan(wrong, machine="rtx4090", context=64)
    except MoesaicError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("settings", "error", "seen"),
    [
        ({"architecture": "mamba3", "leave_out": "token_embd.weight"}, ConfigError, "no vocab_size"),
        ({"architecture": "qwen3"}, ConfigError, "architecture 'qwen3' with 8 experts is not supported"),
        ({"leave_out": "blk.1.ffn_up_exps.weight"}, CheckpointError, "has no tensor blk.1.ffn_up_exps.weight"),
        ({"leave_out": "token_embd.weight"}, ConfigError, "vocab_size"),
    ],
    ids=["unknown architecture", "experts of a dense one", "a tensor is absent", "no embedding"],
)
def test_what_cannot_be_planned_is_told(tmp_path, settings, error, seen):
    with pytest.raises(error, match=seen):
        make_plan(header(tmp_path / "m.gguf", MIXED, **settings))


def test_an_unknown_type_of_numbers_is_named(tmp_path):
    path = header(tmp_path / "m.gguf", {"exps": Q.Q8_0})
    text = path.read_bytes()
    at = text.index(b"blk.1.ffn_down_exps.weight") + len("blk.1.ffn_down_exps.weight") + 4 + 3 * 8
    path.write_bytes(text[:at] + (99).to_bytes(4, "little") + text[at + 4 :])
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_down_exps\.weight is of type 99, which is not known"):
        make_plan(path)


def test_neither_torch_nor_the_gguf_package_is_asked_for(tmp_path):
    path = header(tmp_path / "m.gguf", MIXED)
    code = (
        "import json, sys; from moesaic.plan.plan import make_plan; plan = make_plan(sys.argv[1], machine='rtx4090');"
        "print(json.dumps([name in sys.modules for name in ('torch', 'gguf', 'transformers')]))"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == [False, False, False]
