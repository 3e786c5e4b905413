"""A training step of a 66M-parameter qwen3_moe (14M active): moesaic against transformers, and against its dense twin.

8 x 256 tokens, 16 experts, top-2, balance loss on, fused AdamW. Both libraries start from the same weights. Ours does
all that its trainer does (clipping, telemetry, schedules); theirs does forward, backward and AdamW. In bf16, ours keeps
bf16 weights with fp32 masters; theirs runs under autocast, as its Trainer does, and for comparison with plain bf16
weights, which keep no masters and so cannot learn as well. Steps are interleaved in one process; peak memory is that
of one process for each engine alone.

    python benchmarks/train_step.py [--precision fp32 bf16] [--rounds 5] [--best-peers 3] [--threads 2] [--json]
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import moesaic
from moesaic.data.loader import Batch
from moesaic.models.build import decoder_only
from moesaic.models.decoder import Decoder
from moesaic.telemetry.recorder import LoadRecorder
from moesaic.train.memory import peak_memory_bytes
from moesaic.train.precision import Precision
from moesaic.train.recipe import TrainSettings
from moesaic.train.step import Stepper
from moesaic.train.twins import dense_twin

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
    "tie_word_embeddings": False,
    "use_cache": False,
}
OURS, TWIN = "moesaic", "moesaic, dense twin"
PEERS: dict[Precision, tuple[str, ...]] = {
    "fp32": ("transformers grouped_mm", "transformers eager"),
    "bf16": (
        "transformers grouped_mm, autocast",
        "transformers eager, autocast",
        "transformers grouped_mm, bf16 weights",
    ),
}
Step = Callable[[], None]


def transformers_model() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(Qwen3MoeConfig(**CONFIG), dtype=torch.float32).train()


def same_weights(theirs: transformers.PreTrainedModel) -> Decoder:
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return decoder_only(moesaic.load(folder), "this measurement")


def transformers_step(name: str) -> Step:
    model = transformers_model()
    if name.endswith("bf16 weights"):
        torch.nn.Module.to(model, torch.bfloat16)
    model.set_experts_implementation("eager" if "eager" in name else "grouped_mm")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)

    def step() -> None:
        tokens = torch.randint(0, CONFIG["vocab_size"], (BATCH, SEQUENCE))
        autocast = torch.autocast("cpu", dtype=torch.bfloat16) if "autocast" in name else contextlib.nullcontext()
        with autocast:
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def moesaic_step(name: str, precision: Precision) -> Step:
    """A step of our trainer, telemetry included, on fresh random tokens: the MoE's, or its dense twin's."""
    model = same_weights(transformers_model())
    if name == TWIN:
        model = Decoder(dense_twin(model.config, "active")).initialize(0)
    balance = () if name == TWIN else (("switch", 0.01),)
    settings = TrainSettings(
        batch_size=BATCH, sequence_length=SEQUENCE, precision=precision, learning_rate=3e-4, balance_losses=balance
    )
    stepper = Stepper(model, settings)
    recorder = LoadRecorder.for_model(model.config, num_domains=2)
    taken = 0

    def step() -> None:
        nonlocal taken
        tokens = np.random.randint(0, CONFIG["vocab_size"], (BATCH, SEQUENCE + 1))
        domains, documents = np.arange(BATCH) % 2, np.zeros((BATCH, SEQUENCE), dtype=np.int64)
        stepper.run(taken, [Batch(tokens[:, :-1], tokens[:, 1:], domains, documents)], recorder)
        taken += 1

    return step


def make_step(name: str, precision: Precision) -> Step:
    return moesaic_step(name, precision) if name in (OURS, TWIN) else transformers_step(name)


def interleaved(names: tuple[str, ...], precision: Precision, rounds: int) -> dict[str, list[float]]:
    """Tokens/s of each engine in each round, after one round that warms up."""
    steps = {name: make_step(name, precision) for name in names}
    rates: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name, step in steps.items():
            step()  # whatever ran before has emptied the caches
            started = time.perf_counter()
            for _ in range(2):
                step()
            if number:
                rates[name].append(2 * BATCH * SEQUENCE / (time.perf_counter() - started))
    return rates


def peak_memory(name: str, precision: Precision, threads: int) -> int:
    """Peak resident bytes of a process that takes three steps with this engine alone."""
    arguments = ["--memory-of", name, "--precision", precision, "--threads", str(threads)]
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def compare(precision: Precision, rounds: int, threads: int, num_peers: int) -> dict[str, object]:
    """Medians and ranges of every engine's tokens/s, its peak memory, and our ratios to the best peer and the twin."""
    names = (OURS, TWIN, *PEERS[precision][:num_peers])
    rates = interleaved(names, precision, rounds)
    medians = {name: statistics.median(rate) for name, rate in rates.items()}
    best = max((name for name in names[2:] if not name.endswith("bf16 weights")), key=medians.__getitem__)
    return {
        "precision": precision,
        "tokens_per_s": {name: [min(rate), medians[name], max(rate)] for name, rate in rates.items()},
        "peak_memory_bytes": {name: peak_memory(name, precision, threads) for name in names},
        "best_peer": best,
        "ratio_to_best_peer": medians[OURS] / medians[best],
        "ratio_to_dense_twin": medians[OURS] / medians[TWIN],
        "rounds": rounds,
    }


def show(result: dict) -> None:
    print(f"\n{result['precision']}")
    for name, (low, median, high) in result["tokens_per_s"].items():
        memory = result["peak_memory_bytes"][name] / 1e6
        print(f"  {name:40s} {median:7.0f} tokens/s ({low:.0f}-{high:.0f})  peak {memory:6.0f} MB")
    print(f"  moesaic / {result['best_peer']}: {result['ratio_to_best_peer']:.2f}x")
    print(f"  moesaic / its dense twin: {result['ratio_to_dense_twin']:.2f}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", choices=tuple(PEERS), default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--best-peers",
        type=int,
        default=3,
        metavar="N",
        help="only the first N peers: 1 is the quickest everywhere so far",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        step = make_step(args.memory_of, args.precision[0])
        for _ in range(3):
            step()
        print(peak_memory_bytes(torch.device("cpu")))
        return
    if not args.json:
        print(f"torch {torch.__version__}, transformers {transformers.__version__}, {args.threads} threads")
    results = []
    for precision in args.precision:
        results.append(compare(precision, args.rounds, args.threads, args.best_peers))
        if not args.json:
            show(results[-1])
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
