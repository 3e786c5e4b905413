"""Held-out bits per byte of a trained model with its matrices rounded: by bits, by group, and by how scales are found.

"largest": the largest magnitude over -8, as llama.cpp's Q4_0 has it (over 127 in 8 bits); "search": moesaic's.

    python benchmarks/rounding_loss.py runs/first/model --corpus my-texts
"""

import argparse
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import cast

import torch

from moesaic import hub
from moesaic.cli import output
from moesaic.cli.text_source import gather_text
from moesaic.data.packed import Packed
from moesaic.evaluate.perplexity import held_out_loss
from moesaic.experts.grouped import GroupedExperts
from moesaic.kernels import rounding
from moesaic.kernels.rounding import Bits, dequantized, round_to_ints
from moesaic.models.build import decoder_only

Rule = Callable[[torch.Tensor, Bits, int], torch.Tensor]


def largest(weight: torch.Tensor, bits: Bits, group: int) -> torch.Tensor:
    """Rounded with the scale that uses the whole range, in fp32 again."""
    groups = weight.float().unflatten(-1, (-1, group))
    scales = rounding._whole_range(groups, bits, rounding._in_fp16)
    return (rounding._nearest(groups, scales, bits) * scales[..., None]).flatten(-2)


def search(weight: torch.Tensor, bits: Bits, group: int) -> torch.Tensor:
    """Rounded as `moesaic quantize` does."""
    return dequantized(round_to_ints(weight, bits, group), group)


@torch.no_grad()
def main() -> None:
    """Print the held-out loss at 16 bits and, for every number of bits and group, of both ways of choosing scales."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--max-tokens", type=int, default=16_384, help="a domain")
    parser.add_argument("--sequence-length", type=int, default=256)
    args = parser.parse_args()
    text = cast(Packed, gather_text(args.corpus, 0, Path(args.model)).packed)
    model = decoder_only(hub.load(args.model, dtype=torch.float32), "this")
    exact = {name: value.clone() for name, value in model.state_dict().items()}

    def loss() -> float:
        found = held_out_loss(
            model, text, sequence_length=args.sequence_length, max_tokens=args.max_tokens, document_attention=True
        )
        return found.bits_per_byte

    def round_all(rule: Rule, bits: Bits, group: int, *, experts: bool, others: bool) -> float:
        model.load_state_dict(exact)
        error = total = 0.0
        for name, module in model.named_modules():
            weights = [module.weight] if isinstance(module, torch.nn.Linear) and others and name != "head" else []
            weights = [module.into[0], module.down] if isinstance(module, GroupedExperts) and experts else weights
            for weight in weights:
                rounded = rule(weight, bits, group)
                error, total = error + (rounded - weight).square().sum().item(), total + weight.square().sum().item()
                weight.copy_(rounded)
        return (error / total) ** 0.5

    rows = [("16", "-", "-", "all", "-", f"{(before := loss()):.4f}", "-")]
    for bits, group, rule in product((8, 4), (32, 128), (largest, search)):
        for what in ("all", "experts", "others") if (bits, group) == (4, 32) and rule is search else ("all",):
            error = round_all(rule, bits, group, experts=what != "others", others=what != "experts")
            found = f"{error:.2%}", f"{(after := loss()):.4f}", f"{after - before:+.4f}"
            rows.append((str(bits), str(group), rule.__name__, what, *found))
            output.talk("  ".join(rows[-1]))
    output.table(("bits", "group", "scales", "rounded", "error", "bits a byte", "more"), rows)


if __name__ == "__main__":
    main()
