"""Two ways to lay out experts in files: a tensor per expert, as most are released, or stacked, as transformers 5 does.

Stacked tensors have the names of transformers' modules, which it reads from files, too; all others keep the released
ones. Families whose released files are stacked in a way of their own have that one layout. No torch here.
"""

import re
from collections.abc import Container
from typing import Literal, get_args

from moesaic.config import ModelConfig
from moesaic.errors import ConfigError
from moesaic.models.weight_map import Piece, WeightMap

Layout = Literal["per-expert", "fused"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

_ONE_EXPERT = re.compile(r"(.+)\.(?:mlp|block_sparse_moe|ffn)\.experts\.\d+\.\w+\.weight")
_STACKED = {".experts.gate_up": "gate_up_proj", ".experts.down": "down_proj"}


def fused(released: WeightMap) -> dict[str, Piece]:
    """The experts' tensors that a family's files hold one by one -> the one piece that holds them stacked.

    [E, 2F, D] with gate rows before up rows, and [E, D, F], as ours.
    """
    found: dict[str, Piece] = {}
    for name, pieces in released.items():
        suffix = next((suffix for suffix in _STACKED if name.endswith(suffix)), None)
        match = _ONE_EXPERT.fullmatch(pieces[0].name)
        if suffix and match:
            found[name] = Piece(f"{match[1]}.mlp.experts.{_STACKED[suffix]}")
    return found


def as_stored(released: WeightMap, names: Container[str]) -> WeightMap:
    """The map of files that hold these names: in either layout, layer by layer."""
    stacked = {name: piece for name, piece in fused(released).items() if piece.name in names}
    return released | {name: (piece,) for name, piece in stacked.items() if released[name][0].name not in names}


def in_layout(config: ModelConfig, released: WeightMap, layout: Layout | None) -> WeightMap:
    """The map of files to write; None is the released layout. Raises ConfigError for one that no other reader has."""
    stacked = fused(released)
    if layout is None or (layout == "per-expert" and stacked):
        return released
    if not config.moe_layers:
        raise ConfigError(f"this {config.family} has no experts to lay out; leave out --layout")
    if not stacked:
        raise ConfigError(
            f"{config.family} files have one layout of experts, and nothing else reads another; leave out --layout"
        )
    return released | {name: (piece,) for name, piece in stacked.items()}
