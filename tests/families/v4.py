"""What the tests of DeepSeek-V4 share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.hub import load
from moesaic.models.decoder import Decoder

CASE = "deepseek_v4/all kinds of attention, scaled positions"
AHEAD = "deepseek_v4/two further tokens, the second of entries"


def token_ids(length: int = 13) -> Tensor:
    return torch.randint(131, (2, length), generator=torch.Generator().manual_seed(3))


def close(seen: Tensor, expected: Tensor) -> bool:
    assert expected.abs().max() > 0.5
    return bool((seen - expected).abs().max() <= 1e-5 * expected.abs().max())


def folder_of(made: Callable[[str], Any], case: str = CASE) -> Path:
    return made(case).folder


def changed(folder: Path, out: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a folder with other tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    out.mkdir()
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def decoder(folder: Path, **options: Any) -> Decoder:
    """The model of a folder."""
    model = load(folder, **options)
    assert isinstance(model, Decoder)
    return model
