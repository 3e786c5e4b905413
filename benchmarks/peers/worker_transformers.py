"""transformers for run.py: `python worker_transformers.py MODEL THREADS EXPERTS`, EXPERTS being eager or grouped_mm.

Its forward pass in a loop with a cache and random next tokens: faster than its `generate`, which adds to it.
"""

import sys
import time

import torch
from transformers import AutoModelForCausalLM
from worker import PROMPT_TOKENS, random_ids, serve


@torch.inference_mode()
def main() -> None:
    """Answer with tokens a second, sample by sample, until standard input ends."""
    torch.set_num_threads(int(sys.argv[2]))
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
    if hasattr(model, "set_experts_implementation") and "moe" in type(model).__name__.lower() + model.config.model_type:
        model.set_experts_implementation(sys.argv[3])
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # out of the file's mapping, into memory like any other engine's

    def forward(ids_BS: list[list[int]], cache: object = None) -> tuple[torch.Tensor, object]:
        out = model(input_ids=torch.tensor(ids_BS), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits.argmax(-1), out.past_key_values

    def decode(batch: int, steps: int) -> float:
        _, cache = forward([random_ids(PROMPT_TOKENS) for _ in range(batch)])
        ids_NB1 = [[[id] for id in random_ids(batch)] for _ in range(steps)]
        start = time.perf_counter()
        for ids_B1 in ids_NB1:
            _, cache = forward(ids_B1, cache)
        return time.perf_counter() - start

    def prefill(tokens: int) -> float:
        ids = [random_ids(tokens)]
        start = time.perf_counter()
        forward(ids)
        return time.perf_counter() - start

    decode(1, 2)
    prefill(64)
    serve(decode, prefill)


main()
