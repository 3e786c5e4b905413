"""vLLM for run.py, in its own environment: `python worker_vllm.py MODEL THREADS`; zentorch by being on PYTHONPATH.

All in one process, whose threads are not kept from the processors by others of its own that wait. A decode's seconds
are those of many new tokens less those of one; a prefill's are those of one new token.
"""

import json
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from worker import PROMPT_TOKENS, random_ids, serve

SIZES_OF_LATENTS = (320, 512, 576)  # that its latent attention takes (MLACommonBackend.get_supported_head_sizes)


def choose(model: Path) -> None:
    """Settings that have to stand before it is imported."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    latent = (config.get("kv_lora_rank") or 0) + (config.get("qk_rope_head_dim") or 0)
    if latent and latent not in SIZES_OF_LATENTS:
        os.environ.setdefault("VLLM_MLA_DISABLE", "1")  # it then expands latents to keys and values of all heads


def take_zentorch() -> None:
    """Have vLLM take it on any processor: it looks for AMD's alone, and the kernels ask for AVX-512 and no more."""
    import vllm.platforms  # pyright: ignore[reportMissingImports]
    import zentorch  # pyright: ignore[reportMissingImports]  # noqa: F401  its own words where it cannot be imported

    vllm.platforms._is_amd_zen_cpu = lambda: True


def main() -> None:
    """Answer with tokens a second, sample by sample, until standard input ends."""
    said, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)  # it prints to where answers go
    choose(Path(sys.argv[1]))
    if find_spec("zentorch") is not None:
        take_zentorch()
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    engine = LLM(
        sys.argv[1],
        dtype="bfloat16",
        max_model_len=1024,
        enable_prefix_caching=False,
        max_num_seqs=32,
        max_num_batched_tokens=2048,
        disable_log_stats=True,
    )

    def generate(batch: int, tokens: int, new: int) -> float:
        prompts = [{"prompt_token_ids": random_ids(tokens)} for _ in range(batch)]
        settings = SamplingParams(temperature=1.0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        engine.generate(prompts, settings, use_tqdm=False)
        return time.perf_counter() - start

    def decode(batch: int, steps: int) -> float:
        return generate(batch, PROMPT_TOKENS, steps + 1) - generate(batch, PROMPT_TOKENS, 1)

    def prefill(tokens: int) -> float:
        return generate(1, tokens, 1)

    for batch in (1, 8, 32):
        generate(batch, PROMPT_TOKENS, 3)
    prefill(512)
    sys.stdout = said
    serve(decode, prefill)


if __name__ == "__main__":  # its own processes import this file anew
    main()
