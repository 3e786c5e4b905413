"""vLLM for run.py, in its own environment: `python worker_vllm.py MODEL THREADS`; zentorch by being on PYTHONPATH.

A decode's seconds are those of many new tokens less those of one; a prefill's are those of one new token.
"""

import os
import sys
import time

from worker import PROMPT_TOKENS, random_ids, serve

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{int(sys.argv[2]) - 1}")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    """Answer with tokens a second, sample by sample, until standard input ends."""
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]  # pyright: ignore[reportMissingImports]

    said, sys.stdout = sys.stdout, sys.stderr  # it prints to stdout, where answers go
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
