"""What routing adds to a prompt: the router, and gathering, rounding and combining rows around the experts.

    python benchmarks/routing_share.py MODEL [--bits 4] [--tokens 512] [--threads 2] [--rounds 7] [--json]

The router has steps of its own in the program. What lies around the experts' products has none, so one layer's experts
of the model's sizes are timed in turn with the same rows that belong to no token: their products are made as before (of
what the call before left there), and nothing is rounded, gathered or added up. A dense block rounds each token, too,
once: that is in the share. Experts get rows at random. Medians.
"""

import argparse
import json
import statistics
import time

import torch
from packed_experts import matrices

from moesaic import Engine
from moesaic.config import MoeConfig
from moesaic.kernels import native
from moesaic.kernels.blocks import ExpertRows, PackedExperts


def rows_at_random(tokens: int, num_experts: int, top_k: int) -> ExpertRows:
    """Rows sorted by expert of tokens that choose different experts, all as likely."""
    chosen_TK = torch.rand(tokens, num_experts).topk(top_k).indices
    order = chosen_TK.flatten().argsort(stable=True)
    row_of = torch.empty_like(order)
    row_of[order] = torch.arange(len(order))
    offsets = torch.zeros(num_experts + 1, dtype=torch.int64)
    offsets[1:] = chosen_TK.flatten().bincount(minlength=num_experts).cumsum(0)
    return ExpertRows(offsets, torch.full((tokens * top_k,), 1 / top_k), row_of.view(tokens, top_k))


def seconds_around(moe: MoeConfig, hidden: int, kind: str, tokens: int, rounds: int) -> tuple[float, float]:
    """Of one layer: all of its experts' step, and what of it is not their products."""
    inner = moe.intermediate_size
    into = matrices(kind, moe.num_experts, 2 * inner, hidden, paired=True)
    experts = PackedExperts(into, matrices(kind, moe.num_experts, hidden, inner, paired=False), "silu")
    x_TD, out_TD = torch.randn(tokens, hidden), torch.zeros(tokens, hidden)
    rows = rows_at_random(tokens, moe.num_experts, moe.router.top_k)
    of_nobody = rows._replace(row_of_TK=torch.full_like(rows.row_of_TK, -1))
    taken: list[list[float]] = []
    for _ in range(rounds + 1):
        now = []
        for each in (rows, of_nobody):
            start = time.perf_counter()
            native.packed_experts(x_TD, experts, each, out_TD)
            now.append(time.perf_counter() - start)
        taken.append(now)
    whole, products = (statistics.median(times) for times in zip(*taken[1:], strict=True))
    return whole, whole - products


def main() -> None:
    """Time a prompt and one layer's experts, and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    engine = Engine(options.model, bits=options.bits, threads=options.threads)
    config = engine.config
    prompt = torch.randint(config.vocab_size, (options.tokens,)).tolist()
    engine.generate(prompt, 1)
    prompts, routers = [], []
    for _ in range(options.rounds):
        engine.program.native.reset_times()
        start = time.perf_counter()
        engine.generate(prompt, 1)
        prompts.append(time.perf_counter() - start)
        routers.append(sum(spent for part, _, spent in engine.program.native.times() if part == "router"))
    layers = [config.layers[index].feed_forward for index in config.moe_layers]
    moe = layers[0]
    assert isinstance(moe, MoeConfig)
    kind = f"int{options.bits}/32"
    whole, around = seconds_around(moe, config.hidden_size, kind, options.tokens, options.rounds)
    prompt_s = statistics.median(prompts)
    told = {
        "prompt_ms": 1e3 * prompt_s,
        "router": statistics.median(routers) / prompt_s,
        "around_experts": len(layers) * around / prompt_s,
        "experts_and_around": len(layers) * whole / prompt_s,
    }
    told["routing"] = told["router"] + told["around_experts"]
    print(json.dumps(told) if options.json else "  ".join(f"{name} {value:.4g}" for name, value in told.items()))


if __name__ == "__main__":
    main()
