"""How far FP8 blocks move the logits of a tiny random model, and how much of that is other experts and other tokens.

DeepSeek-V3 and V3.2 with weights as they are drawn, converted to FP8 and read back, are compared with the model they
were made from: as they choose, and with the choices of the exact model dictated to them, those of its routers, of its
indexers, or both. Beside them, as a control, the exact weights with the same rounding errors, shuffled within each
tensor. Prints the root mean square of the difference, relative to that of the logits, over five seeds.

    python benchmarks/fp8_choices.py
"""

import copy
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from moesaic import families
from moesaic.hub import load, save
from moesaic.hub.streaming import convert
from moesaic.layers.indexer import Indexer
from moesaic.models.decoder import Decoder
from moesaic.routing import RoutingDecision, RoutingTape, Rows

V3 = {
    "model_type": "deepseek_v3",
    "vocab_size": 131,
    "hidden_size": 256,
    "intermediate_size": 300,
    "moe_intermediate_size": 140,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "q_lora_rank": 130,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
}
INDEXED = V3 | {"model_type": "deepseek_v32", "index_n_heads": 4, "index_head_dim": 32, "index_topk": 8}
MODELS = {"V3": V3, "V3.2, 8 of 48 tokens": INDEXED, "V3.2, all tokens": INDEXED | {"index_topk": 64}}
IDS = torch.randint(131, (2, 48), generator=torch.Generator().manual_seed(1))


class Heard(RoutingTape):
    """Keeps every layer's rows."""

    def __init__(self, choices: dict[int, Rows] | None = None) -> None:
        super().__init__(choices=choices)
        self.rows: dict[int, Rows] = {}

    def hear(self, layer: int, decision: RoutingDecision) -> None:
        self.rows[layer] = decision.rows


@contextmanager
def indexers(told: list[Tensor] | None = None) -> Iterator[list[Tensor]]:
    """Keeps what indexers choose, in order, or tells them."""
    own, chosen, rest = Indexer.choose, [], iter(told or [])

    def choose(self: Indexer, *arguments: Any) -> Tensor:
        chosen.append(own(self, *arguments) if told is None else next(rest))
        return chosen[-1]

    with patch.object(Indexer, "choose", choose):
        yield chosen


def with_shuffled_errors(exact: Decoder, rounded: Decoder) -> Decoder:
    """The exact model with the errors of the other, tensor by tensor, each at another place."""
    generator, model = torch.Generator().manual_seed(5), copy.deepcopy(exact)
    for mine, right, near in zip(*(each.state_dict().values() for each in (model, exact, rounded)), strict=True):
        errors = (near - right).flatten()
        mine.copy_(right + errors[torch.randperm(errors.numel(), generator=generator)].view_as(right))
    return model


def moved(model: Decoder, logits: Tensor, experts: dict[int, Rows], tokens: list[Tensor]) -> list[float]:
    """How far the logits are off: as it chooses, and with tokens, experts or both dictated."""
    found = []
    for told_tokens, told_experts in ((None, None), (tokens, None), (None, experts), (tokens, experts)):
        with indexers(told_tokens):
            seen = model(IDS, tape=Heard(told_experts))
        found.append(((seen - logits).square().mean() / logits.square().mean()).sqrt().item())
    return found


@torch.no_grad()
def measure(raw: dict[str, Any], seed: int) -> dict[str, list[float]]:
    """Of the model in FP8, and of the control."""
    exact = Decoder(families.from_hf(raw), dtype=torch.float32).initialize(seed).eval()
    with tempfile.TemporaryDirectory() as folder:
        save(exact, Path(folder) / "exact")
        convert(Path(folder) / "exact", Path(folder) / "fp8", dtype="fp8")
        rounded = load(Path(folder) / "fp8", dtype=torch.float32)
    assert isinstance(rounded, Decoder)
    tape = Heard()
    with indexers() as tokens:
        logits = exact(IDS, tape=tape)
    control = with_shuffled_errors(exact, rounded)
    return {name: moved(each, logits, tape.rows, tokens) for name, each in (("fp8", rounded), ("shuffled", control))}


def main() -> None:
    print("| model | weights | as it chooses | tokens dictated | experts dictated | both |")
    print("|---|---|---|---|---|---|")
    for name, raw in MODELS.items():
        runs = [measure(raw, seed) for seed in range(5)]
        for weights in runs[0]:
            means = [statistics.fmean(figures) for figures in zip(*(run[weights] for run in runs), strict=True)]
            print(f"| {name} | {weights} | {' | '.join(f'{mean:.0%}' for mean in means)} |")


if __name__ == "__main__":
    main()
