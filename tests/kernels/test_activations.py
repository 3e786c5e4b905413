"""Gated activations: the clamped SwiGLU against its formula, and its gradient."""

import pytest
import torch

from moesaic.config import ClampedSwiglu
from moesaic.errors import ConfigError
from moesaic.kernels.activations import gated_activation

GPT_OSS = ClampedSwiglu(limit=7.0, alpha=1.702, shift=1.0)


def by_hand(gate: float, up: float, settings: ClampedSwiglu) -> float:
    gate, up = min(gate, settings.limit), min(max(up, -settings.limit), settings.limit)
    return (up + settings.shift) * gate / (1 + 2.718281828459045 ** (-settings.alpha * gate))


@pytest.mark.parametrize("settings", [GPT_OSS, ClampedSwiglu(limit=0.5)])
@pytest.mark.parametrize(("gate", "up"), [(0.3, -0.2), (9.0, 9.0), (-9.0, -9.0), (0.5, -0.5), (0.0, 0.0)])
def test_clamped_swiglu_is_its_formula(settings: ClampedSwiglu, gate: float, up: float) -> None:
    seen = gated_activation(settings)(torch.tensor([[gate, up]], dtype=torch.float64))
    assert seen.shape == (1, 1)
    assert seen.item() == pytest.approx(by_hand(gate, up, settings), rel=1e-12, abs=1e-12)


def test_without_a_limit_that_matters_it_is_swiglu() -> None:
    gate_up = torch.randn(5, 14, generator=torch.Generator().manual_seed(0))
    clamped = gated_activation(ClampedSwiglu(limit=100.0))(gate_up)
    assert torch.allclose(clamped, gated_activation("silu")(gate_up), rtol=1e-5, atol=1e-6)


def test_its_gradient_and_its_dtype() -> None:
    gate_up = (torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2).requires_grad_()
    settings = ClampedSwiglu(limit=1.3, alpha=1.702, shift=1.0)
    assert ((gate_up.abs() - settings.limit).abs() > 1e-3).all(), "finite differences would cross a corner"
    assert torch.autograd.gradcheck(gated_activation(settings), (gate_up,))
    assert gated_activation(settings)(gate_up.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("figures", [{"limit": 0.0}, {"limit": float("inf")}, {"limit": 1.0, "alpha": -1.0}])
def test_impossible_figures_are_refused(figures: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="in ClampedSwiglu; it must be above 0 and finite"):
        ClampedSwiglu(**figures)
