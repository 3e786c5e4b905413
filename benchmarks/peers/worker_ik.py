"""ik_llama.cpp for run.py, in its own environment: `python worker_ik.py FILE.gguf THREADS REPACK`, REPACK being 0 or 1.

Through its Python package's C interface, since the package brings no benchmark program. Forward passes with random next
tokens, as llama-bench measures them.
"""

import ctypes
import sys
import time

from ik_llama_cpp import _ctypes_api as api  # pyright: ignore[reportMissingImports]
from ik_llama_cpp._internals import IkContext, IkModel  # pyright: ignore[reportMissingImports]
from worker import PROMPT_TOKENS, random_ids, serve

CONTEXT = 4096  # tokens of all texts together
MOST_TEXTS = 32


def load(path: str, threads: int, *, repack: bool) -> IkContext:
    """A context over a model whose tensors are rearranged as they are read, or are not."""
    defaults = api.llama_model_default_params

    def settings() -> api.llama_model_params:
        chosen = defaults()
        chosen.repack_tensors = repack
        return chosen

    api.llama_model_default_params = settings
    model = IkModel(path, use_mmap=not repack)
    # Its flash attention aborts on steps of several texts (0.1.5, iqk_flash_attn_noalibi).
    return IkContext(model, n_ctx=CONTEXT, n_threads=threads, flash_attn=False, n_seq_max=MOST_TEXTS)


def main() -> None:
    """Answer with tokens a second, sample by sample, until standard input ends."""
    context = load(sys.argv[1], int(sys.argv[2]), repack=sys.argv[3] == "1")

    def forward(texts: list[list[int]], position: int) -> None:
        """New tokens of texts that all have `position` tokens; the logits of each one's last."""
        count = sum(map(len, texts))
        batch = api.llama_batch_init(count, 0, 1)
        batch.n_tokens = at = 0
        for text, ids in enumerate(texts):
            for offset, token in enumerate(ids):
                batch.token[at], batch.pos[at] = token, position + offset
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, text
                batch.logits[at] = ctypes.c_int8(offset == len(ids) - 1)
                at += 1
        batch.n_tokens = at
        if context.decode(batch) != 0:
            raise RuntimeError("llama_decode failed")
        context.get_logits(count - 1)
        api.llama_batch_free(batch)

    def decode(batch: int, steps: int) -> float:
        context.kv_cache_clear()
        forward([random_ids(PROMPT_TOKENS) for _ in range(batch)], 0)
        ids_NB1 = [[[id] for id in random_ids(batch)] for _ in range(steps)]
        start = time.perf_counter()
        for step, ids_B1 in enumerate(ids_NB1):
            forward(ids_B1, PROMPT_TOKENS + step)
        return time.perf_counter() - start

    def prefill(tokens: int) -> float:
        context.kv_cache_clear()
        ids = random_ids(tokens)
        start = time.perf_counter()
        forward([ids], 0)
        return time.perf_counter() - start

    decode(1, 2)
    prefill(64)
    serve(decode, prefill)


main()
