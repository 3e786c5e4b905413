"""ERNIE 4.5's files also hold a layer that predicts further tokens; it is left out, and that is said."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic.hub import load


def test_layers_that_predict_further_tokens_are_left_out(made: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made("ernie4_5_moe/as released").folder
    plain = load(folder)
    tensors = load_file(folder / "model.safetensors")
    further = {f"model.mtp_{part}.0.weight": torch.ones(3) for part in ("block", "emb_norm", "linear_proj")}
    save_file(tensors | further, folder / "model.safetensors", metadata={"format": "pt"})
    try:
        capsys.readouterr()
        seen = load(folder)
    finally:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "3 tensors (model.mtp) are left out\n" in capsys.readouterr().err
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in seen.state_dict().items())
