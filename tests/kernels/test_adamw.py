"""AdamW in one pass: native against the reference, against torch's own optimizer, over odd sizes."""

import pytest
import torch

from moesaic.kernels import ops, reference
from moesaic.kernels.adam import AdamStep

native = pytest.importorskip("moesaic.kernels.native", reason="the kernels were not built: no C++ compiler")

SIZES = [0, 1, 15, 16, 17, 63, 4096, 4097, 70_001]


@pytest.fixture(params=["reference", *native._native.available_isas()])
def kernels(request: pytest.FixtureRequest):
    """The reference, and the compiled kernels with each instruction set."""
    if request.param == "reference":
        yield reference
        return
    before = native._native.isa()
    assert native._native.use_isa(request.param)
    yield native
    native._native.use_isa(before)


def _run(kernels, numel, *, steps=3, clip=0.5, decay=0.9):
    """(weight, moments, rounded, average) after a few steps."""
    generator = torch.Generator().manual_seed(numel)
    weight, *gradients = (torch.randn(numel + 1, generator=generator)[1:] for _ in range(steps + 1))
    moments = (torch.zeros(numel), torch.zeros(numel))
    rounded, average = torch.empty(numel, dtype=torch.bfloat16), torch.zeros(numel)
    for number, gradient in enumerate(gradients, 1):
        newest = (1 - decay) / (1 - decay**number)
        step = AdamStep.number(number, learning_rate=0.1, betas=(0.9, 0.95), weight_decay=0.1, clip=clip, newest=newest)
        kernels.adamw_(weight, gradient, moments, step, rounded=rounded, average=average)
    return weight, *moments, rounded, average, gradients


@pytest.mark.parametrize("numel", SIZES)
def test_it_is_torch_s_adamw(kernels, numel):
    """A few units in the last place of a weight near 1 or of its moments: a handful of roundings a step, 3 steps."""
    weight, first, second, rounded, average, gradients = _run(kernels, numel)
    start = torch.randn(numel + 1, generator=torch.Generator().manual_seed(numel))[1:].double()
    exact = torch.nn.Parameter(start)
    theirs = torch.optim.AdamW([exact], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    wanted_average = torch.zeros(numel, dtype=torch.float64)
    for number, gradient in enumerate(gradients, 1):
        exact.grad = gradient.double() * 0.5
        theirs.step()
        wanted_average.lerp_(exact.detach(), 0.1 / (1 - 0.9**number))
    state = theirs.state[exact]
    torch.testing.assert_close(weight.double(), exact.detach(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(first.double(), state["exp_avg"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(second.double(), state["exp_avg_sq"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(average.double(), wanted_average, rtol=2e-6, atol=2e-6)
    assert torch.equal(rounded, weight.bfloat16())


@pytest.mark.parametrize("numel", SIZES)
def test_threads_and_copies_do_not_change_a_bit(numel):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = _run(native, numel)
        torch.set_num_threads(3)
        together = _run(native, numel)
    finally:
        torch.set_num_threads(before)
    for one, other in zip(alone[:-1], together[:-1], strict=True):
        assert torch.equal(one, other)


def test_tensors_that_the_kernel_does_not_take_go_to_the_reference():
    weight, gradient = torch.ones(5, dtype=torch.float64), torch.full((5,), 0.5, dtype=torch.float64)
    step = AdamStep.number(1, learning_rate=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    ops.adamw_(weight, gradient, (torch.zeros(5).double(), torch.zeros(5).double()), step)
    assert torch.allclose(weight, torch.full((5,), 0.9, dtype=torch.float64))


def test_a_first_average_is_the_weight_itself(kernels):
    weight, average = torch.randn(37), torch.randn(37)
    step = AdamStep.number(1, learning_rate=0.1, betas=(0.9, 0.95), weight_decay=0.1, newest=1.0)
    kernels.adamw_(weight, torch.randn(37), (torch.zeros(37), torch.zeros(37)), step, average=average)
    assert torch.equal(average, weight)
