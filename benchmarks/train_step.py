"""One training step of a 66M-parameter qwen3_moe (14M active): moesaic against transformers, interleaved, fp32.

8 x 256 tokens, 16 experts, top-2, balance loss on, fused AdamW, clipping off in both. Both models have the same shapes
and start from the same weights. Prints tokens/s (median, min-max) of each and the ratio of the medians.

    python benchmarks/train_step.py [--rounds 5] [--threads 2] [--json]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import moesaic
from moesaic.models.decoder import Decoder
from moesaic.routing import RoutingTape
from moesaic.train.loss import losses

BATCH, SEQUENCE = 8, 256
CONFIG = {
    "vocab_size": 8192,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 512,
    "intermediate_size": 1024,
    "norm_topk_prob": True,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.01,
    "use_cache": False,
}
Step = Callable[[torch.Tensor], None]


def transformers_step(model: transformers.PreTrainedModel, implementation: str) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)

    def step(tokens: torch.Tensor) -> None:
        model.set_experts_implementation(implementation)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def moesaic_step(model: Decoder) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)

    def step(tokens: torch.Tensor) -> None:
        losses(model, tokens[:, :-1], tokens[:, 1:], [("switch", 0.01)], RoutingTape()).total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**CONFIG), dtype=torch.float32).train()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = moesaic.load(folder).train()
    steps = {
        "moesaic": moesaic_step(ours),
        "transformers grouped_mm": transformers_step(theirs, "grouped_mm"),
        "transformers eager": transformers_step(theirs, "eager"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(args.rounds + 1):
        for name, step in steps.items():
            tokens = torch.randint(0, CONFIG["vocab_size"], (BATCH, SEQUENCE + (name == "moesaic")))
            started = time.perf_counter()
            step(tokens)
            if round_number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    rates = {name: [BATCH * SEQUENCE / s for s in spent] for name, spent in seconds.items()}
    medians = {name: statistics.median(rate) for name, rate in rates.items()}
    best = max(median for name, median in medians.items() if name != "moesaic")
    ratio = medians["moesaic"] / best
    if args.json:
        print(json.dumps({"tokens_per_s": medians, "ratio_to_best_peer": ratio, "rounds": args.rounds}))
        return
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {args.threads} threads, fp32")
    for name, rate in rates.items():
        print(f"{name:24s} {medians[name]:7.0f} tokens/s ({min(rate):.0f}-{max(rate):.0f})")
    print(f"moesaic / best transformers: {ratio:.2f}x")


if __name__ == "__main__":
    main()
