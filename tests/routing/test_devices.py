"""On a GPU every router, balance loss and capacity decides and computes what it does on the CPU."""

import copy

import pytest
import torch
from torch import Tensor

from moesaic.config import MlpConfig, MoeConfig
from moesaic.layers.moe import MoeLayer, capacity_applied
from moesaic.routing import RoutingDecision, RoutingTape, TokenFacts
from moesaic.routing.balancers import BALANCE_LOSSES
from moesaic.routing.combinations import CAPACITIES, VOCAB_SIZE, examples, loss_refusal, mode_refusal
from moesaic.routing.routers import hash_table

BATCH, LENGTH, HIDDEN = 2, 13, 10
ROUTERS = examples()


def layer_of(name: str, mode: str | None) -> MoeLayer:
    """In fp64, without chance: in evaluation."""
    capacity = None if mode is None else CAPACITIES[mode]
    config = MoeConfig(
        router=ROUTERS[name], intermediate_size=7, shared=MlpConfig(intermediate_size=5), capacity=capacity
    )
    layer = MoeLayer(config, HIDDEN, 0).double().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
        if layer.router.table is not None:
            layer.router.table.copy_(hash_table(ROUTERS[name]))
    return layer


def routed(layer: MoeLayer, device: torch.device) -> tuple[Tensor, Tensor, RoutingDecision]:
    """(x, y, decision) of a batch with padding and three documents."""
    generator = torch.Generator().manual_seed(3)
    x_BSD = torch.randn(BATCH, LENGTH, HIDDEN, dtype=torch.float64, generator=generator).to(device).requires_grad_()
    mask_BS = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask_BS[1, -4:] = False
    documents_BS = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    documents_BS[0, 6:], documents_BS[1] = 1, 2
    ids_T = torch.randint(VOCAB_SIZE, (BATCH * LENGTH,), generator=generator)
    facts = TokenFacts(*(tensor.flatten().to(device) for tensor in (ids_T, mask_BS, documents_BS)))
    tape = RoutingTape()
    with capacity_applied(layer):
        y_BSD = layer(x_BSD, facts, tape)
    return x_BSD, y_BSD, tape.decisions[0]


@pytest.mark.parametrize("mode", [None, *CAPACITIES])
@pytest.mark.parametrize("name", ROUTERS)
def test_the_same_as_on_the_cpu(name: str, mode: str | None, gpu: torch.device) -> None:
    if mode is not None and mode_refusal(ROUTERS[name], mode) is not None:
        pytest.skip("no such combination")
    here = layer_of(name, mode)
    there = copy.deepcopy(here).to(gpu)
    (x, y, decision), (gpu_x, gpu_y, gpu_decision) = routed(here, torch.device("cpu")), routed(there, gpu)
    for rows, gpu_rows in ((decision.rows, gpu_decision.rows), (decision.chosen, gpu_decision.chosen)):
        assert torch.equal(gpu_rows.expert_offsets, rows.expert_offsets)
        assert torch.equal(gpu_rows.token_ids_R.cpu(), rows.token_ids_R)
        assert torch.equal(gpu_rows.expert_ids_R.cpu(), rows.expert_ids_R)
        torch.testing.assert_close(gpu_rows.weights_R.cpu(), rows.weights_R)
    torch.testing.assert_close(gpu_y.cpu(), y)
    total, gpu_total = y.square().sum(), gpu_y.square().sum()
    for loss in BALANCE_LOSSES:
        if loss_refusal(ROUTERS[name], loss) is None and loss != "load":  # which needs the noise of training
            value, gpu_value = BALANCE_LOSSES[loss].of(decision), BALANCE_LOSSES[loss].of(gpu_decision)
            torch.testing.assert_close(gpu_value.cpu(), value)
            total, gpu_total = total + value, gpu_total + gpu_value
    total.backward()
    gpu_total.backward()
    pairs = [(x, gpu_x), *zip(here.parameters(), there.parameters(), strict=True)]
    for one, other in pairs:
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None and other.grad is not None:
            torch.testing.assert_close(other.grad.cpu(), one.grad)
