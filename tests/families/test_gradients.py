"""The gradient of a loss at every parameter is the one that transformers' model has.

Their gradients go the way of weights: saved under the names of files, and read by the family's weight map.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.hub import load

TOLERANCE = 1e-4  # of the largest slope in a tensor
# Of the largest slope of all, below which a slope is a rounding error: that of a renormalised only choice, of a key's
# bias, which moves all scores of a query alike, and of an index that only chooses.
NOISE = 1e-6


def loss_of(logits_BSV: Tensor, ids_BS: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten())


def their_gradients(model: Any, ids_BS: Tensor, folder: Path) -> dict[str, Tensor]:
    """By our names."""
    twin = copy.deepcopy(model)
    loss_of(twin(input_ids=ids_BS).logits, ids_BS).backward()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    twin.save_pretrained(folder)
    return load(folder).state_dict()


def test_every_gradient_is_theirs(oracle: Any, tmp_path: Path) -> None:
    # Without the ids of padding, at which their embedding has no gradient. With these nothing that is cut off or
    # clamped stands within a rounding error of its edge.
    ids_BS = torch.randint(4, 131, (3, 13), generator=torch.Generator().manual_seed(9))
    theirs = their_gradients(oracle.model, ids_BS, tmp_path)
    ours = load(oracle.folder)
    loss_of(ours(ids_BS), ids_BS).backward()
    noise = NOISE * max(slope.abs().max().item() for slope in theirs.values())
    for name, parameter in ours.named_parameters():
        slope = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        scale, error = theirs[name].abs().max().item(), (slope - theirs[name]).abs().max().item()
        vanishes = max(scale, slope.abs().max().item()) < noise
        assert vanishes or error <= TOLERANCE * scale, f"{name}: off by {error:.1e} where slopes reach {scale:.1e}"
