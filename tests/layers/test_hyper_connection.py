"""Residual streams: against plain loops, against transformers' modules, and what mixing must keep."""

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection, DeepseekV4HyperHead

from moesaic.config import HyperConnectionConfig
from moesaic.errors import ConfigError
from moesaic.layers.hyper_connection import HyperConnection, StreamJoin, doubly_stochastic

SIZE = 7


Module = TypeVar("Module", bound=torch.nn.Module)


def made(module: Module, seed: int = 0) -> Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    return module


def streams(num_streams: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, num_streams, SIZE, generator=generator, dtype=torch.float64).to(dtype)


def sigmoid(x: float) -> float:
    return torch.tensor(x, dtype=torch.float64).sigmoid().item()


def slow(own: HyperConnection, x_ND: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
    """One token's streams after a part, number by number."""
    config, n = own.config, len(x_ND)
    flat = x_ND.flatten()
    root = (flat.square().mean() + config.norm_eps).sqrt()
    raw = [(float(row @ flat) / float(root)) for row in own.weight.double()]
    scale, bias = own.scale.tolist(), own.bias.tolist()
    read = [sigmoid(scale[0] * raw[i] + bias[i]) + config.eps for i in range(n)]
    write = [2 * sigmoid(scale[1] * raw[n + i] + bias[n + i]) for i in range(n)]
    rows = [[scale[2] * raw[2 * n + i * n + j] + bias[2 * n + i * n + j] for j in range(n)] for i in range(n)]
    matrix = torch.tensor(rows, dtype=torch.float64).softmax(1) + config.eps
    for step in range(2 * config.sinkhorn_steps - 1):
        columns = step % 2 == 0
        for k in range(n):
            line = matrix[:, k] if columns else matrix[k]
            line /= line.sum() + config.eps
    out_D = part(sum(read[i] * x_ND[i] for i in range(n)))  # pyright: ignore[reportArgumentType]
    return torch.stack([write[j] * out_D + sum(matrix[i, j] * x_ND[i] for i in range(n)) for j in range(n)])


@torch.no_grad()
@pytest.mark.parametrize(("num_streams", "steps"), [(1, 1), (2, 20), (3, 2), (4, 20)])
def test_streams_are_read_written_and_mixed_as_the_equations_say(num_streams: int, steps: int) -> None:
    own = HyperConnection(HyperConnectionConfig(num_streams=num_streams, sinkhorn_steps=steps, eps=1e-3), SIZE)
    made(own).double()
    x_BSND = streams(num_streams)
    seen = own(x_BSND, torch.tanh)
    expected = torch.stack([torch.stack([slow(own, x_ND, torch.tanh) for x_ND in row]) for row in x_BSND])
    torch.testing.assert_close(seen, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_streams", [2, 3, 4])
def test_they_are_those_of_transformers(num_streams: int) -> None:
    theirs = DeepseekV4Config(hidden_size=SIZE, hc_mult=num_streams, hc_eps=1e-4, rms_norm_eps=1e-5)
    config = HyperConnectionConfig(num_streams=num_streams, eps=1e-4, norm_eps=1e-5)
    own, other = made(HyperConnection(config, SIZE)), DeepseekV4HyperConnection(theirs)
    other.load_state_dict({"fn": own.weight, "base": own.bias, "scale": own.scale})
    x_BSND = streams(num_streams, torch.float32)
    post, comb, x_BSD = other(x_BSND)
    expected = post[..., None] * x_BSD.tanh()[..., None, :] + comb.mT @ x_BSND
    torch.testing.assert_close(own(x_BSND, torch.tanh), expected)
    join, head = made(StreamJoin(config, SIZE)), DeepseekV4HyperHead(theirs)
    head.load_state_dict({"hc_fn": join.weight, "hc_base": join.bias, "hc_scale": join.scale})
    torch.testing.assert_close(join(x_BSND), head(x_BSND))


def test_columns_of_the_mixing_matrix_weigh_what_a_stream_is_made_of() -> None:
    """Rows and columns sum to 1, so a transposition would hide in sums: here one stream alone is not zero."""
    own = made(HyperConnection(HyperConnectionConfig(num_streams=3), SIZE))
    x_BSND = torch.zeros(1, 1, 3, SIZE)
    x_BSND[..., 1, :] = 1.0
    y_BSND = own(x_BSND, torch.zeros_like)
    mix = doubly_stochastic(own.coefficients(x_BSND)[2].unflatten(-1, (3, 3)), own.config)[0, 0]
    assert (mix - mix.mT).abs().max() > 0.01
    torch.testing.assert_close(y_BSND[0, 0, :, 0], mix[1])


def test_mixing_keeps_the_sum_of_streams() -> None:
    config = HyperConnectionConfig(num_streams=4, sinkhorn_steps=50)
    mix = doubly_stochastic(torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(2)), config)
    assert (mix > 0).all()
    for dim in (-1, -2):
        torch.testing.assert_close(mix.sum(dim), torch.ones(5, 4), rtol=0, atol=1e-4)


def test_streams_begin_alike_and_equal_streams_of_an_even_matrix_are_a_residual_connection() -> None:
    config = HyperConnectionConfig(num_streams=4)
    own, join = HyperConnection(config, SIZE), StreamJoin(config, SIZE)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.zero_()
    x_BSD = streams(1, torch.float32)[..., 0, :]
    y_BSND = own(join.split(x_BSD), lambda x: x * 0 + 1)
    torch.testing.assert_close(y_BSND, join.split(x_BSD + 1), rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_differences() -> None:
    config = HyperConnectionConfig(num_streams=3, sinkhorn_steps=3)
    own, join = made(HyperConnection(config, 2)).double(), made(StreamJoin(config, 2)).double()
    names = [name for name, _ in own.named_parameters()]

    def run(x_BSND: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(names, values[:3], strict=True)), dict(zip(names, values[3:], strict=True))
        y_BSND = torch.func.functional_call(own, given[0], (x_BSND, torch.tanh))
        return torch.func.functional_call(join, given[1], (y_BSND,))

    inputs = [streams(3)[:1, :1, :, :2], *own.parameters(), *join.parameters()]
    assert torch.autograd.gradcheck(run, [each.detach().requires_grad_() for each in inputs])


def test_coefficients_stay_fp32_in_a_narrow_model() -> None:
    own = made(HyperConnection(HyperConnectionConfig(num_streams=2), SIZE))
    x_BSND = streams(2, torch.bfloat16)
    before = own(x_BSND, torch.tanh)
    assert before.dtype == torch.bfloat16
    own.bfloat16()
    assert all(parameter.dtype == torch.float32 for parameter in own.parameters())
    assert torch.equal(own(x_BSND, torch.tanh), before)
    wide = own(x_BSND.float(), lambda x: x.bfloat16().tanh().float())
    assert torch.equal(wide.bfloat16(), before), "only the result is rounded"


@pytest.mark.parametrize("fields", [{"num_streams": 0}, {"sinkhorn_steps": 0}, {"eps": 0.0}, {"norm_eps": -1e-6}])
def test_impossible_settings_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        HyperConnectionConfig(**fields)  # pyright: ignore[reportArgumentType]
