"""Our experts in transformers, beside every implementation of its own: tokens a second of whole models.

    python benchmarks/transformers_experts.py [--shape olmoe mixtral qwen3_moe] [--dtype fp32 fp32-of-bf16 bf16]
        [--layers 2] [--prompt 256] [--context 64] [--new 16] [--batch 1] [--rounds 7] [--threads 2]
        [--only eager grouped_mm] [--most-copied 32] [--json]

Random weights in the sizes of released models, of which --layers layers are kept, and as much less of the vocabulary,
so that the head weighs what it does in the whole model. fp32: weights drawn in fp32; fp32-of-bf16: drawn in bf16, as
released ones are, and opened in fp32, of which ours holds the experts' in bf16 (`narrow`). One model serves all
implementations: only the experts' function changes between two measurements, and they take turns within every round.
Prefill: one forward of --prompt tokens. Decode: --new greedy tokens after --context of them, one by one, from
transformers' own cache. Printed are the medians of the rounds, and the median of the ratios within a round of ours to
the best of theirs; of whole forwards, and of the experts alone, with the share of a forward that theirs take (ours
can save no more than that). Logits of the prompt are compared, as a part of the largest. batched_mm copies the
experts of every token, and is left out of the prefill of more than --most-copied tokens.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from moesaic.hub.transformers import use_moesaic_experts
from moesaic.hub.transformers.modules import experts_by_layer
from moesaic.kernels import backend

OURS = "moesaic"
THEIRS = ("eager", "batched_mm", "grouped_mm")
NARROW = "fp32-of-bf16"
DTYPES = {"fp32": torch.float32, NARROW: torch.bfloat16, "bf16": torch.bfloat16}


class Shape(NamedTuple):
    """A released model: transformers' names for its classes, its fields, its layers and its vocabulary."""

    name: str
    fields: dict[str, Any]
    layers: int
    vocabulary: int


SHAPES = {
    "olmoe": Shape(
        "Olmoe",
        {
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
        },
        16,
        50304,
    ),
    "qwen3_moe": Shape(
        "Qwen3Moe",
        {
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
        },
        48,
        151936,
    ),
    "mixtral": Shape(
        "Mixtral",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        32,
        32000,
    ),
}


def model_of(shape: Shape, layers: int, dtype: torch.dtype) -> Any:
    """A model of so many of its layers, drawn where it lies: its weights are never there twice."""
    vocabulary = max(64, shape.vocabulary * layers // shape.layers)
    ids = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    config = getattr(transformers, f"{shape.name}Config")(
        **shape.fields, **ids, num_hidden_layers=layers, vocab_size=vocabulary
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return getattr(transformers, f"{shape.name}ForCausalLM")(config).eval()
    finally:
        torch.set_default_dtype(before)


class Implementations:
    """One model with everybody's experts. narrow: ours hold their weights in bf16, which others cannot."""

    def __init__(self, model: Any, narrow: bool) -> None:
        weights = [weight for module in experts_by_layer(model).values() for weight in module.parameters()]
        wide = [weight.data for weight in weights]
        self.model, self._weights = use_moesaic_experts(model, narrow=narrow), weights
        self._data = {False: wide, True: [weight.data for weight in weights]}
        assert narrow == any(weight.dtype != self.model.dtype for weight in weights)

    def choose(self, name: str) -> Any:
        """The model, with the experts of this name."""
        for weight, data in zip(self._weights, self._data[name == OURS], strict=True):
            weight.data = data
        self.model.set_experts_implementation(name)
        return self.model


class Spent(NamedTuple):
    """Seconds of a forward (or several), and those of them that its experts took."""

    whole: float
    experts: float


class ExpertsWatch:
    """Adds up what the experts of a model take."""

    def __init__(self, model: Any) -> None:
        self.seconds, self._began = 0.0, 0.0
        for module in experts_by_layer(model).values():
            module.register_forward_pre_hook(self._begin)
            module.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._began


def prefill_s(model: Any, watch: ExpertsWatch, ids: Tensor) -> Spent:
    started, before = time.perf_counter(), watch.seconds
    model(ids, logits_to_keep=1, use_cache=True)
    return Spent(time.perf_counter() - started, watch.seconds - before)


def decode_s(model: Any, watch: ExpertsWatch, ids: Tensor, new: int) -> Spent:
    """Of the tokens after the first, which comes with the prompt."""
    output = model(ids, logits_to_keep=1, use_cache=True)
    started, before = time.perf_counter(), watch.seconds
    for _ in range(new):
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
    return Spent(time.perf_counter() - started, watch.seconds - before)


def rounds(
    args: argparse.Namespace, experts: Implementations, ids: Tensor, names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """What each implementation takes, in turn; the first of the order moves on from round to round."""
    watch = ExpertsWatch(experts.model)
    for number in range(args.rounds + 1):
        found: dict[str, Any] = {}
        for name in (*names[number % len(names) :], *names[: number % len(names)]):
            model = experts.choose(name)
            found[name] = {"decode": decode_s(model, watch, ids[:, : args.context], args.new)}
            if name != "batched_mm" or ids.numel() <= args.most_copied:
                found[name]["prefill"] = prefill_s(model, watch, ids)
        if number:  # the first one warms up
            yield found


def summary(found: list[dict[str, Any]], what: str, tokens: int) -> dict[str, Any]:
    """Medians, and the median ratios of the best of the others to ours in the same round; experts: of these alone.
    experts_share: of the time of the best of the others."""
    names = [name for name in found[0] if what in found[0][name]]
    medians = {name: tokens / statistics.median(each[name][what].whole for each in found) for name in names}
    best = [min((each[name][what] for name in names if name != OURS), key=lambda spent: spent.whole) for each in found]
    ratios = [theirs.whole / each[OURS][what].whole for theirs, each in zip(best, found, strict=True)]
    alone = [theirs.experts / each[OURS][what].experts for theirs, each in zip(best, found, strict=True)]
    return {
        "tokens_per_s": medians,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "experts": statistics.median(alone),
        "experts_share": statistics.median(theirs.experts / theirs.whole for theirs in best),
    }


def error_of(experts: Implementations, ids: Tensor, names: Sequence[str]) -> float:
    """The largest difference of our logits from the first implementation's, as a part of the largest logit."""
    logits = []
    for name in (names[0], OURS):
        logits.append(experts.choose(name)(ids, use_cache=False).logits.float())
    return float((logits[1] - logits[0]).abs().max() / logits[0].abs().max())


@torch.no_grad()
def measure(args: argparse.Namespace, name: str, dtype: str) -> dict[str, Any]:
    """One shape in one precision: what `show` prints."""
    torch.manual_seed(0)
    model = model_of(SHAPES[name], args.layers, DTYPES[dtype])
    experts = Implementations(model.float() if dtype == NARROW else model, dtype == NARROW)
    ids = torch.randint(2, model.config.vocab_size, (args.batch, args.prompt))
    names = [*args.only, OURS]
    error = error_of(experts, ids, names)
    found = list(rounds(args, experts, ids, names))
    return {
        "shape": name,
        "dtype": dtype,
        "weight_bytes": sum(weight.nbytes for weight in model.parameters()),
        "logit_error": error,
        "prefill": summary(found, "prefill", ids.numel()),
        "decode": summary(found, "decode", len(ids) * args.new),
    }


def show(result: dict[str, Any]) -> None:
    size, error = result["weight_bytes"] / 1e9, result["logit_error"]
    print(f"{result['shape']} {result['dtype']}, {size:.1f} GB, logits differ by {error:.1e} of the largest")
    for what in ("prefill", "decode"):
        part = result[what]
        rates = ", ".join(f"{name} {rate:.1f}" for name, rate in part["tokens_per_s"].items())
        low, high = min(part["ratios"]), max(part["ratios"])
        print(
            f"  {what}: {part['ratio']:.2f} times their best ({low:.2f} to {high:.2f}); experts alone "
            f"{part['experts']:.2f} times, {part['experts_share']:.0%} of their time; tokens/s: {rates}",
            flush=True,
        )


def main() -> None:
    """Time every implementation in turn, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["olmoe"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--only", nargs="+", choices=THEIRS, default=list(THEIRS), help="which of theirs take part")
    for option, default in (("layers", 2), ("prompt", 256), ("context", 64), ("new", 16), ("batch", 1), ("rounds", 7)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--most-copied", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    for name in args.shape:
        for dtype in args.dtype:
            results.append(measure(args, name, dtype))
            if not args.json:
                show(results[-1])
    if args.json:
        about = {"kernels": backend.describe(), "torch": torch.__version__, "transformers": transformers.__version__}
        print(json.dumps({**about, "results": results}, indent=2))


if __name__ == "__main__":
    main()
