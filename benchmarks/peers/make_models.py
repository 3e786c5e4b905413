"""Models with random weights for timing engines against each other, as folders that every engine reads (bf16).

    python benchmarks/peers/make_models.py FOLDER [--only A,C]

Makes FOLDER/A ... FOLDER/E: A, 32 experts of which 4 serve a token; B, Mixtral's shape; C, 64 fine-grained experts of
which 6, a shared one, and latent attention; D and E, A's dense twins of equal active and of equal total size. And two
of A's shape in the formats that models are released in: F, gpt-oss's parts with experts in MXFP4; G, A in FP8 blocks.
Their vocabularies are one byte-level BPE of 32,000 tokens, trained on the sources of Python's own library. Random
weights route almost evenly, and take the same time as trained ones wherever time does not depend on values.
"""

import argparse
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import moesaic
from moesaic import families
from moesaic.data.tokenizer import Tokenizer
from moesaic.hub.quantization import Format
from moesaic.hub.streaming import convert
from moesaic.models.decoder import Decoder

VOCAB_SIZE = 32_000
TOKENIZER_BYTES = 16_000_000

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "max_position_embeddings": 4096, "tie_word_embeddings": False, "hidden_act": "silu",
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "rope_theta": 10_000.0, "rms_norm_eps": 1e-6,
}  # fmt: skip
_GROUPED: dict[str, Any] = _COMMON | {
    "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64,
}  # fmt: skip
_EXPERT_SIZE = 512

MODELS: dict[str, dict[str, Any]] = {
    "A": _GROUPED | {
        "model_type": "qwen3_moe", "num_hidden_layers": 16, "num_experts": 32, "num_experts_per_tok": 4,
        "moe_intermediate_size": _EXPERT_SIZE, "intermediate_size": 4 * _EXPERT_SIZE, "norm_topk_prob": True,
    },
    "B": _GROUPED | {
        "model_type": "mixtral", "num_hidden_layers": 12, "num_local_experts": 8, "num_experts_per_tok": 2,
        "intermediate_size": 2816, "sliding_window": None,
    },
    "C": _COMMON | {
        "model_type": "deepseek_v3", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_key_value_heads": 12, "n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 1,
        "moe_intermediate_size": 256, "intermediate_size": 2048, "first_k_dense_replace": 1, "n_group": 1,
        "topk_group": 1, "q_lora_rank": 384, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
        "v_head_dim": 64, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "num_nextn_predict_layers": 0,
    },
    "D": _GROUPED | {"model_type": "qwen3", "num_hidden_layers": 16, "intermediate_size": 4 * _EXPERT_SIZE},
    "E": _GROUPED | {"model_type": "qwen3", "num_hidden_layers": 16, "intermediate_size": 32 * _EXPERT_SIZE},
    "F": _GROUPED | {
        "model_type": "gpt_oss", "num_hidden_layers": 16, "num_local_experts": 32, "num_experts_per_tok": 4,
        "intermediate_size": _EXPERT_SIZE, "sliding_window": 128,
    },
}  # fmt: skip
MODELS["G"] = MODELS["A"]
FORMATS: dict[str, Format] = {"F": "mxfp4", "G": "fp8"}


def make_tokenizer() -> Tokenizer:
    """Of exactly VOCAB_SIZE tokens."""
    tokenizer = Tokenizer.train(_sources(), VOCAB_SIZE, max_bytes=TOKENIZER_BYTES)
    assert tokenizer.vocab_size == VOCAB_SIZE, f"{tokenizer.vocab_size} tokens; more text is needed"
    return tokenizer


def _sources() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in path.parts:
            yield path.read_text(encoding="utf-8", errors="replace")


def make_model(name: str, folder: Path, tokenizer: Tokenizer) -> None:
    """Draw one model's weights by its name and write it."""
    config = families.from_hf(MODELS[name])
    model = Decoder(config, dtype=torch.bfloat16).initialize(seed=ord(name))
    with TemporaryDirectory(dir=folder.parent) as plain:
        moesaic.save(model, plain if name in FORMATS else folder, tokenizer=tokenizer)
        if name in FORMATS:
            convert(plain, folder, dtype=FORMATS[name])
    print(json.dumps({"model": name, "folder": str(folder), "total": config.total, "active": config.active_gemm}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Models with random weights for timing engines.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default=",".join(MODELS), help="names, comma-separated (%(default)s)")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    for name in options.only.split(","):
        make_model(name, options.folder / name, tokenizer)


if __name__ == "__main__":
    main()
