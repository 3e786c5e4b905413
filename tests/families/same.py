"""When what is seen here is what transformers' models answer."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from moesaic import families
from moesaic.hub import read_config
from tests.families.golden import golden, slopes

TOLERANCE = 1e-5  # of the logits' scale
GRADIENT_TOLERANCE = 1e-4  # of the largest slope in a tensor
# Of the largest slope of all, below which a slope is a rounding error: that of a renormalised only choice, of a key's
# bias, which moves all scores of a query alike, and of an index that only chooses.
NOISE = 1e-6


def assert_same(seen: Tensor, expected: Tensor) -> None:
    """Of logits."""
    assert expected.abs().max() > 1, "degenerate logits prove nothing"
    assert (seen - expected).abs().max() <= TOLERANCE * expected.abs().max()


def assert_same_bytes(seen: Path, expected: Path) -> None:
    """Of the tensors of two checkpoints, the first of them with the names that are released."""
    family, ours = read_config(expected).family, load_file(seen / "model.safetensors")
    tensors = load_file(expected / "model.safetensors")
    theirs = {families.released_name(family, name): tensor for name, tensor in tensors.items()}
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


@torch.no_grad()
def assert_same_slopes(seen: dict[str, Any], expected: dict[str, Any]) -> None:
    """By names of tensors: their gradients, or rows that begin with the largest slope in each (see golden.slopes)."""
    assert seen.keys() == expected.keys()
    noise = NOISE * max(slope.abs().max().item() for slope in expected.values())
    for name, theirs in expected.items():
        scale, error = theirs.abs().max().item(), (seen[name] - theirs).abs().max().item()
        vanishes = max(scale, seen[name].abs().max().item()) < noise
        assert vanishes or error <= GRADIENT_TOLERANCE * scale, f"{name}: off by {error:.1e} of {scale:.1e}"


def assert_same_gradients(folder: Path, oracle: Any) -> None:
    """Of those that are saved as a checkpoint of ours, and the answer about slopes."""
    gradients, family = load_file(folder / "model.safetensors"), oracle.case.partition("/")[0]
    released = {name: families.released_name(family, name) for name in sorted(golden(oracle.case).shapes)}
    assert gradients.keys() == set(released.values())
    ours = {name: gradients[released[name]] for name in released}
    ours = {name: slope for name, slope in ours.items() if slope.is_floating_point()}
    assert_same_slopes(*(dict(zip(ours, rows, strict=True)) for rows in (slopes(ours), oracle.answer("slopes"))))
