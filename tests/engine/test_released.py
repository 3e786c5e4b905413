"""Checkpoints that are packed as they were released run so: MXFP4 (gpt-oss) and FP8 in blocks (DeepSeek-V3).

T tokens, V vocab.
"""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from moesaic import families, load, save
from moesaic.bench import reached
from moesaic.bench.bound import decode_work
from moesaic.engine.cache import Text
from moesaic.engine.engine import Engine, Piece
from moesaic.engine.memory import packed_bytes
from moesaic.engine.packing import Packer, Precision
from moesaic.engine.weights import FileWeights
from moesaic.hub.resolve import weights_place
from moesaic.hub.sources import open_source
from moesaic.hub.streaming import convert
from moesaic.kernels import blocks
from tests.tiny import lively_decoder

COMMON = {"vocab_size": 131, "max_position_embeddings": 64, "num_experts_per_tok": 2, "num_attention_heads": 4}
GPT_OSS = COMMON | {
    "model_type": "gpt_oss", "hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 18,
    "num_key_value_heads": 2, "num_local_experts": 5, "sliding_window": 4,
}  # fmt: skip
DEEPSEEK = COMMON | {
    "model_type": "deepseek_v3", "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128,
    "num_hidden_layers": 3, "q_lora_rank": 136, "kv_lora_rank": 112, "qk_nope_head_dim": 48, "qk_rope_head_dim": 16,
    "v_head_dim": 16, "n_routed_experts": 5, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
QWEN = COMMON | {
    "model_type": "qwen3_moe", "hidden_size": 200, "head_dim": 36, "moe_intermediate_size": 140,
    "num_hidden_layers": 2, "num_key_value_heads": 2, "num_experts": 3,
}  # fmt: skip

# What is converted, and to which format.
CASES: dict[str, tuple[dict[str, Any], Literal["fp8", "mxfp4"]]] = {
    "gpt_oss": (GPT_OSS, "mxfp4"),
    "deepseek_v3": (DEEPSEEK, "fp8"),
    "qwen3_moe": (QWEN, "fp8"),
}
PROMPT = [5, 9, 2, 77, 31, 8, 19, 4, 100, 3, 3, 60, 7, 12, 45, 99, 1, 2, 88, 50, 6]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(case: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    fields, format_ = CASES[case]
    made = tmp_path_factory.mktemp("released")
    save(lively_decoder(families.from_hf(fields)), made / "plain")
    convert(made / "plain", made / "packed", dtype=format_)
    return made / "packed"


def weights_of(folder: Path) -> FileWeights:
    return FileWeights(open_source(weights_place(folder)))


def rows(engine: Engine, text: Text, token_ids: list[int]) -> Tensor:
    return engine.step([Piece(text, token_ids, "all")])


def packed_names(weights: FileWeights) -> list[str]:
    return [spec.name for spec in weights.config.tensors() if weights.coded(spec.name) is not None]


def test_codes_stand_for_the_weights_to_the_bit(case: str, folder: Path) -> None:
    weights = weights_of(folder)
    packer = Packer(weights, Precision())
    names = packed_names(weights)
    model = load(folder, dtype=torch.float32)
    wanted = model.state_dict()
    assert names and all(".experts." in name for name in names) == (case == "gpt_oss")
    for name in names:
        expert_count = wanted[name].shape[0] if wanted[name].ndim == 3 else 0
        paired = name.endswith("gate_up")
        if expert_count:
            packed = packer.experts(name, expert_count, None, paired=paired)
        else:
            packed = packer.matrix([name], None, "projections")
        assert packed.shape.format == CASES[case][1]
        assert torch.equal(blocks.unpack(packed).view_as(wanted[name]), wanted[name]), name


@torch.no_grad()
def test_logits_are_those_of_the_decoder(folder: Path) -> None:
    """But for what bf16 and 8-bit rows cost, every token going to the same experts."""
    wanted = load(folder, dtype=torch.float32)(torch.tensor([PROMPT]))[0]
    exact = Engine(folder, threads=1, dtype=torch.float32)
    assert float((rows(exact, Text(), PROMPT) - wanted).norm()) <= 2e-5 * float(wanted.norm())
    choices = {layer: routed.expert_ids_TM for layer, routed in exact.routed().items()}
    found = Engine(folder, threads=1).step([Piece(Text(), PROMPT, "all")], choices)
    assert float((found - wanted).norm()) <= 0.03 * float(wanted.norm())


def test_a_token_has_the_same_bits_however_it_runs(folder: Path) -> None:
    wanted = rows(Engine(folder, threads=1), Text(), PROMPT)
    for threads in (1, 2, 3):
        engine, text, other = Engine(folder, threads=threads), Text(), Text()
        found = []
        for start, end in ((0, 1), (1, 18), (18, len(PROMPT))):
            pieces = [Piece(other, [3, 4], "all"), Piece(text, PROMPT[start:end], "all")]
            found.append(engine.step(pieces)[2:])
        assert torch.equal(torch.cat(found), wanted)


def test_a_packed_file_holds_them(folder: Path, tmp_path: Path) -> None:
    wanted = rows(Engine(folder, threads=1, packed_file=tmp_path / "packed"), Text(), PROMPT)
    assert torch.equal(rows(Engine(folder, threads=1, packed_file=tmp_path / "packed"), Text(), PROMPT), wanted)


def test_it_says_what_it_holds(case: str, folder: Path) -> None:
    engine, format_ = Engine(folder, threads=1), CASES[case][1]
    assert engine.program.formats["experts"] == format_ and engine.program.formats["head"] == "fp32"
    projections = "fp32" if case == "gpt_oss" else "fp8"
    assert case == "deepseek_v3" or engine.program.formats["projections"] == projections
    told = packed_bytes(engine.config, Precision(), 4, weights_of(folder).coded)
    assert told < packed_bytes(engine.config, Precision(), 4)


def test_bounds_count_its_bytes_and_its_products(case: str, folder: Path) -> None:
    engine, as_fp32 = Engine(folder, threads=1), Engine(folder, threads=1, dtype=torch.float32)
    kept, plain = (reached.held(each, torch.float32) for each in (engine, as_fp32))
    assert kept.of_experts == ("int8" if case == "gpt_oss" else "bf16") and plain.of_experts == "fp32"
    assert kept.packed_bytes["experts"] < 0.5 * plain.packed_bytes["experts"]
    assert decode_work(kept, 1, 8).num_bytes < decode_work(plain, 1, 8).num_bytes


@pytest.mark.parametrize(
    ("asked", "format_"),
    [({"bits": 8}, "int8"), ({"dtype": torch.bfloat16}, "bf16"), ({"dtype": torch.float32}, "fp32")],
)
def test_what_is_asked_for_goes_before_it(folder: Path, asked: dict[str, Any], format_: str) -> None:
    formats = Engine(folder, threads=1, **asked).program.formats
    assert formats["experts"] == formats["head"] == format_
