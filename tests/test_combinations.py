"""Every router with every balance loss and every capacity: what goes together trains, what does not says why."""

import inspect
import itertools
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesaic.cli.routing_reference import COMMAND, reference
from moesaic.config import MlpConfig, MoeConfig
from moesaic.config.capacity import CapacityConfig
from moesaic.config.router import ROUTER_KINDS, GroupConfig, RouterConfig
from moesaic.errors import ConfigError
from moesaic.layers.moe import MoeLayer
from moesaic.routing import RoutingDecision, RoutingTape, TokenFacts
from moesaic.routing.balancers import BALANCE_LOSSES, refuse_unfit, update_selection_bias
from moesaic.routing.combinations import (
    CAPACITIES,
    OPTIONS,
    VOCAB_SIZE,
    example,
    examples,
    loss_refusal,
    mode_refusal,
    option_refusal,
)
from moesaic.routing.routers import ROUTERS, hash_table
from moesaic.train.recipe import Recipe

PAGE = Path(__file__).parents[1] / "docs" / "routing.md"
BATCH, LENGTH, HIDDEN = 2, 13, 10
ROUTER_EXAMPLES = examples()
SHARED = MlpConfig(intermediate_size=5)


def layer_of(router: RouterConfig, capacity: CapacityConfig | None) -> MoeLayer:
    """A layer in fp64, in training, with lively weights."""
    config = MoeConfig(router=router, intermediate_size=7, shared=SHARED, capacity=capacity)
    layer = MoeLayer(config, HIDDEN, 0).double()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, 0.5)
        if layer.router.table is not None:
            layer.router.table.copy_(hash_table(router))
    return layer


def routed(layer: MoeLayer) -> tuple[Tensor, Tensor, RoutingDecision]:
    """(x, y, decision) of a batch with padding and three documents."""
    generator = torch.Generator().manual_seed(3)
    x_BSD = torch.randn(BATCH, LENGTH, HIDDEN, dtype=torch.float64, generator=generator).requires_grad_()
    mask_BS = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask_BS[1, -4:] = False
    documents_BS = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    documents_BS[0, 6:], documents_BS[1] = 1, 2
    ids_T = torch.randint(VOCAB_SIZE, (BATCH * LENGTH,), generator=generator)
    tape = RoutingTape()
    y_BSD = layer(x_BSD, TokenFacts(ids_T, mask_BS.flatten(), documents_BS.flatten()), tape)
    return x_BSD, y_BSD, tape.decisions[0]


def assert_well_formed(decision: RoutingDecision, router: RouterConfig) -> None:
    """Sorted by expert, no pair twice, no padding, weights finite."""
    assert decision.mask_T is not None
    for rows in (decision.rows, decision.chosen):
        pairs = list(zip(rows.expert_ids_R.tolist(), rows.token_ids_R.tolist(), strict=True))
        assert rows.num_experts == router.num_experts and rows.num_tokens == BATCH * LENGTH
        assert pairs == sorted(set(pairs))
        assert decision.mask_T[rows.token_ids_R].all()
        assert rows.weights_R.isfinite().all() and (rows.weights_R >= 0).all()
        if rows.top_k is not None:
            counts_T = torch.bincount(rows.token_ids_R, minlength=rows.num_tokens)
            assert torch.equal(counts_T, decision.mask_T.long() * rows.top_k)


def assert_finite_gradients(value: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether any tensor has a gradient other than 0; all that there are must be finite."""
    if not value.requires_grad:
        return False
    found = [
        gradient
        for gradient in torch.autograd.grad(value, tensors, retain_graph=True, allow_unused=True)
        if gradient is not None
    ]
    assert all(gradient.isfinite().all() for gradient in found)
    return any(bool(gradient.any()) for gradient in found)


@pytest.mark.parametrize("mode", [None, *CAPACITIES])
@pytest.mark.parametrize("name", ROUTER_EXAMPLES)
def test_what_goes_together_trains(name: str, mode: str | None) -> None:
    router = ROUTER_EXAMPLES[name]
    if mode is not None and mode_refusal(router, mode) is not None:
        return
    layer = layer_of(router, None if mode is None else CAPACITIES[mode])
    x_BSD, y_BSD, decision = routed(layer)
    assert_well_formed(decision, router)
    parameters = [*layer.parameters()]
    assert y_BSD.isfinite().all()
    assert assert_finite_gradients(y_BSD.square().sum(), [x_BSD, *parameters])
    for loss in BALANCE_LOSSES:
        if loss_refusal(router, loss) is not None:
            continue
        value = BALANCE_LOSSES[loss].of(decision)
        assert value.shape == () and value.isfinite()
        assert not BALANCE_LOSSES[loss].evens or value > 0
        router_parameters = [parameter for key, parameter in layer.named_parameters() if key.startswith("router.")]
        assert assert_finite_gradients(value, router_parameters), f"{loss} teaches this router nothing"


@pytest.mark.parametrize("name", ROUTER_EXAMPLES)
def test_a_capacity_that_cannot_be_is_refused_with_the_reason(name: str) -> None:
    router = ROUTER_EXAMPLES[name]
    for mode, shared in itertools.product(CAPACITIES, (SHARED, None)):
        reason = mode_refusal(router, mode, has_shared=shared is not None)
        if reason is None:
            MoeConfig(router=router, intermediate_size=7, shared=shared, capacity=CAPACITIES[mode])
            continue
        with pytest.raises(ConfigError) as caught:
            MoeConfig(router=router, intermediate_size=7, shared=shared, capacity=CAPACITIES[mode])
        assert str(caught.value) == reason and "\n" not in reason


@pytest.mark.parametrize("name", ROUTER_EXAMPLES)
def test_a_loss_that_cannot_be_is_refused_with_the_reason(name: str) -> None:
    router = ROUTER_EXAMPLES[name]
    for loss in BALANCE_LOSSES:
        reason = loss_refusal(router, loss)
        if reason is None:
            refuse_unfit([loss], [router])
            continue
        with pytest.raises(ConfigError) as caught:
            refuse_unfit([loss], [router])
        assert str(caught.value) == reason and "\n" not in reason


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ROUTER_KINDS)
def test_options_work_or_say_who_has_them(name: str, option: str) -> None:
    reason = option_refusal(name, option)
    if reason is not None:
        assert option in reason and "\n" not in reason
        return
    layer = layer_of(example(name, **OPTIONS[option]), None)
    _, y_BSD, decision = routed(layer)
    assert_well_formed(decision, layer.router.config)
    assert assert_finite_gradients(y_BSD.square().sum(), [*layer.parameters()])
    if layer.router.selection_bias is not None:
        update_selection_bias(layer.router.selection_bias, decision.chosen.counts_E, 0.1)
        counts_E = decision.chosen.counts_E.double()
        assert torch.equal(layer.router.selection_bias.sign().double(), (counts_E.mean() - counts_E).sign())


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in ROUTER_EXAMPLES if name.endswith(", groups")])
def test_groups_hold_with_low_biases(name: str) -> None:
    """Biases down to -1 make every score negative: masking with 0 would let outsiders win."""
    router = example(name.removesuffix(", groups"), groups=GroupConfig(num_groups=4, top_groups=1), selection_bias=True)
    layer = layer_of(router, None)
    assert layer.router.selection_bias is not None
    layer.router.selection_bias.copy_(torch.linspace(-1.0, -0.9, 8))
    _, _, decision = routed(layer)
    group_R = decision.rows.expert_ids_R // 2
    for token in decision.rows.token_ids_R.unique().tolist():
        assert group_R[decision.rows.token_ids_R == token].unique().numel() == 1


def test_no_part_is_missing() -> None:
    assert set(ROUTERS) == set(ROUTER_KINDS)
    assert {router.name for router in ROUTER_EXAMPLES.values()} == set(ROUTER_KINDS)


def test_every_equation_is_explained() -> None:
    explained = [*ROUTERS.values(), *(loss.equation for loss in BALANCE_LOSSES.values())]
    assert all(len(inspect.getdoc(each) or "") > 50 for each in explained)


def test_every_example_of_the_page_can_be_built() -> None:
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 5}
    model = {"model_type": "moesaic", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    blocks = [tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", reference(), re.DOTALL)]
    assert len(blocks) == len(ROUTER_KINDS) + 2
    for block in blocks:
        of_model = model | sizes | block
        if "soft_slots_per_expert" in block:
            del of_model["num_experts_per_tok"]
        whole = block if "model" in block else {"model": of_model, "train": {"balance_losses": []}}
        assert Recipe.from_dict(whole).model_config(64, 0)


def test_the_page_is_fresh() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), f"docs/routing.md is stale; run `{COMMAND}`"
