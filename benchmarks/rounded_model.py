"""A model with its matrices rounded, by moesaic's rule or into llama.cpp's formats."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from expert_errors import expert_layers
from ggml_rounding import Ggml, bits_per_weight
from rounding_loss import search
from torch import Tensor

from moesaic.kernels import uneven
from moesaic.kernels.rounding import BITS
from moesaic.models.decoder import Decoder


class Format(NamedTuple):
    """bits: of a weight, scales included."""

    name: str
    bits: float
    rounded: Callable[[Tensor], Tensor]


def formats(ggml: Path) -> list[Format]:
    """moesaic's and llama.cpp's; of equal bits ours first."""
    theirs = Ggml(ggml)
    known = [
        Format(f"moesaic {bits} bits / {group}", bits + 16 / group, partial(search, bits=bits, group=group))
        for bits in BITS
        for group in (32, 128)
    ]
    known.append(Format("moesaic 4 bits, uneven", 4.5, uneven_values))
    for name in ("Q8_0", "Q4_0", "Q4_K"):
        known.append(Format(f"llama.cpp {name}", bits_per_weight(name), partial(theirs.rounded, format=name)))
    return sorted(known, key=lambda each: -each.bits)


def uneven_values(weight: Tensor) -> Tensor:
    """Rounded as the engine does with values="uneven"."""
    return uneven.dequantized(uneven.round_to_codes(weight))


def matrices(model: Decoder) -> dict[str, torch.nn.Parameter]:
    """By name, what is rounded."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "head":
            found[f"{name}.weight"] = module.weight
    for name, module in expert_layers(model).items():
        found |= {f"{name}.{module.into_name}": module.into[0], f"{name}.down": module.down}
    return found


@torch.no_grad()
def round_all(model: Decoder, exact: dict[str, Tensor], format: Format) -> float:
    """Put the format's weights in place of all matrices; how far they are from those, relatively."""
    error = total = 0.0
    for name, weight in matrices(model).items():
        weight.copy_(format.rounded(exact[name]))
        error += (weight - exact[name]).square().sum().item()
        total += exact[name].square().sum().item()
    return math.sqrt(error / total)
