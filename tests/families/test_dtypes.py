"""One rule for number formats: all takes the dtype that is asked for, but what its description gives one of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from moesaic import families
from moesaic.hub import load
from moesaic.hub.streaming import convert
from tests.families.cases import CASES

# Of every family one: the rule knows nothing of what else is special.
FIRST = {name.partition("/")[0]: name for name in reversed(CASES)}
# Tables of integers may be wider than they need to be, as the files have them.
DTYPES = {None: (torch.bfloat16,), "float32": (torch.float32,), "int32": (torch.int32, torch.int64)}
SPELLED = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int32: "I32", torch.int64: "I64"}


@pytest.mark.parametrize("family", FIRST)
def test_loading_keeps_what_has_a_dtype_of_its_own(made: Callable[[str], Any], family: str) -> None:
    oracle = made(FIRST[family])
    folder, exact = oracle.folder, oracle.ours
    loaded, moved = load(folder, dtype=torch.bfloat16), load(folder).bfloat16()
    for spec in exact.config.tensors():
        stored = exact.state_dict()[spec.name]
        for model in (loaded, moved) if spec.role == "router" else (loaded,):
            seen = model.state_dict()[spec.name]
            assert seen.dtype in DTYPES[spec.dtype], spec.name
            assert torch.equal(seen, stored.to(seen.dtype)), spec.name


@pytest.mark.slow
@pytest.mark.parametrize("family", FIRST)
def test_routers_have_their_dtype_there_too(made: Callable[[str], Any], family: str) -> None:
    """No learned weight of a router is wider or narrower than transformers has it; selection biases are fp32."""
    oracle = made(FIRST[family])
    theirs = type(oracle.model).from_pretrained(oracle.folder, dtype=torch.bfloat16)
    ours = load(oracle.folder, dtype=torch.bfloat16)
    learned = {tuple(each.shape): each.dtype for name, each in theirs.named_parameters() if is_router(name)}
    specs = [spec for spec in ours.config.tensors() if spec.role == "router"]
    assert len(learned) >= bool([spec for spec in specs if spec.is_parameter])
    for spec in specs:
        dtype = ours.state_dict()[spec.name].dtype
        if spec.is_parameter:
            assert dtype == learned[spec.shape], spec.name
        elif spec.dtype == "float32":
            assert dtype == torch.float32


def is_router(name: str) -> bool:
    return any(f".{part}." in name for part in ("gate", "router")) and "proj" not in name


@pytest.mark.parametrize("family", FIRST)
def test_converting_keeps_it_too(made: Callable[[str], Any], tmp_path: Path, family: str) -> None:
    oracle = made(FIRST[family])
    convert(oracle.folder, tmp_path / "bf16", dtype="bf16")
    exact, seen = oracle.ours, load(tmp_path / "bf16")
    with safe_open(tmp_path / "bf16" / "model.safetensors", "pt") as file:
        stored = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no iteration)
    weight_map = families.family(exact.config.family).weight_map(exact.config)
    for spec in exact.config.tensors():
        values = seen.state_dict()[spec.name]
        assert values.dtype in DTYPES[spec.dtype], spec.name
        assert torch.equal(values, exact.state_dict()[spec.name].to(values.dtype)), spec.name
        pieces = [piece.name for piece in weight_map[spec.name] if piece.name in stored]
        assert {stored[name] for name in pieces} <= {SPELLED[values.dtype]}, spec.name
