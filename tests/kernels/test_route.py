"""Compiled routing against moesaic.routing.routers in fp64, over the batches that those are tested with.

T tokens, E experts, C what a token chooses from, K choices a token, M columns of choices.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from moesaic.config import GroupConfig, HashSettings, RouterConfig
from moesaic.config.router import ROUTER_KINDS
from moesaic.errors import ConfigError
from moesaic.layers.router import BATCH_NORM_EPSILON
from moesaic.routing import Rows
from moesaic.routing.routers import ROUTERS, Choice, RouterInput, hash_table
from tests.routing.test_routers import GROUPING, RANKING, batches, configs, make_config, seen_by_router

pytest.importorskip("moesaic.kernels.native", reason="the kernels were not built: no C++ compiler")
from moesaic.kernels.native_routing import NATIVE_ROUTERS, NativeRouter, RouterTensors, sort_by_expert

TIE = 1e-6  # scores nearer than this, relative, may change places between fp32 and fp64
CASES = [(name, False, False) for name in NATIVE_ROUTERS]
CASES += [(name, True, groups) for name in RANKING for groups in (False, True) if not groups or name in GROUPING]


def native_router(config: RouterConfig, seen: RouterInput) -> NativeRouter:
    bias = seen.selection_bias_E
    return NativeRouter(
        config, RouterTensors(selection_bias=None if bias is None else bias.float(), table=seen.table_VK)
    )


def as_fp32_sees(seen: RouterInput) -> RouterInput:
    """The fp64 input whose numbers fp32 holds."""
    bias = seen.selection_bias_E
    return seen._replace(
        logits_TE=seen.logits_TE.float().double(), selection_bias_E=None if bias is None else bias.float().double()
    )


def routed(config: RouterConfig, seen: RouterInput) -> tuple[Tensor, Tensor]:
    return native_router(config, seen).route(seen.logits_TE.float(), seen.token_ids_T)


def has_near_tie(choice: Choice, config: RouterConfig, seen: RouterInput, token: int) -> bool:
    """Whether the token's ranking, or the sum that ends its choices, is undecided in fp32."""
    ranked = seen.logits_TE if choice.ranked_TE is not None else choice.scores_TE
    if config.name in ("null_topk", "sparsemixer"):
        ranked = seen.logits_TE.softmax(-1) if config.name == "null_topk" else seen.logits_TE
    values = ranked[token].float().double()  # what fp32 can tell apart: scores may fall below its smallest
    if seen.selection_bias_E is not None:
        values = values.clone()
        values[: config.num_experts] += seen.selection_bias_E
    if config.groups is not None and config.groups.score == "top2_sum":
        by_group = values.clamp(min=-3e38).view(config.groups.num_groups, -1)
        values = torch.cat((values, by_group.topk(2).values.sum(-1)))
    ordered = values[values.isfinite()].sort().values
    gaps, sizes = ordered.diff(), ordered.abs()
    near = (gaps <= TIE * torch.maximum(sizes[1:], sizes[:-1])) | (gaps < 1e-30)
    if config.name == "sparsemixer":
        return bool(near.any())
    sums = choice.scores_TE[token].sort(descending=True).values.cumsum(-1)
    p = getattr(config.settings, "p", 2.0)
    return bool(near.any()) or bool(((sums - p).abs() < TIE).any())


def narrowed(seen: RouterInput) -> RouterInput:
    """The same in fp32, where scores far below the largest are 0."""
    bias = seen.selection_bias_E
    return seen._replace(logits_TE=seen.logits_TE.float(), selection_bias_E=None if bias is None else bias.float())


def assert_agrees(config: RouterConfig, seen: RouterInput, ids_TM: Tensor, weights_TM: Tensor) -> int:
    """Every token agrees with the definition in fp64 or in fp32. The number that an almost equal score excused."""
    choices = [ROUTERS[config.name](each, config) for each in (seen, narrowed(seen))]
    excused = 0
    for token in range(len(ids_TM)):
        if any(agrees(choice, token, ids_TM, weights_TM) for choice in choices):
            continue
        assert has_near_tie(choices[0], config, seen, token), (ids_TM[token], weights_TM[token], choices)
        excused += 1
    return excused


def agrees(choice: Choice, token: int, ids_TM: Tensor, weights_TM: Tensor) -> bool:
    missing = ids_TM.shape[1] - choice.expert_ids_TM.shape[1]
    wanted_ids = pad(choice.expert_ids_TM[token], (0, missing), value=-1)
    wanted = pad(choice.weights_TM[token].double(), (0, missing)).masked_fill(wanted_ids < 0, 0.0)
    near = torch.isclose(weights_TM[token].double(), wanted, rtol=1e-5, atol=1e-7)
    return torch.equal(ids_TM[token], wanted_ids) and bool(near.all())


@pytest.mark.parametrize(("name", "bias", "groups"), CASES)
def test_routers_choose_and_weigh_as_their_definitions(name: str, bias: bool, groups: bool) -> None:
    tokens, excused = 0, 0

    @settings(max_examples=40)
    @given(st.data())
    def run(data: Any) -> None:
        nonlocal tokens, excused
        config = data.draw(configs((name,), bias=bias, groups=groups))
        seen = as_fp32_sees(seen_by_router(config, data.draw(batches(config))))._replace(mask_T=None)
        excused += assert_agrees(config, seen, *routed(config, seen))
        tokens += len(seen.logits_TE)

    run()
    assert excused <= 1 + tokens // 20


@pytest.mark.parametrize("name", NATIVE_ROUTERS)
def test_routers_of_many_experts(name: str) -> None:
    config, seen = many(name, 128, 8, tokens=200)
    assert assert_agrees(config, seen, *routed(config, seen)) <= 2


@pytest.mark.parametrize("name", NATIVE_ROUTERS)
def test_choices_made_before_are_weighed_anew(name: str) -> None:
    @settings(max_examples=40)
    @given(st.data())
    def run(data: Any) -> None:
        config = data.draw(configs((name,)))
        seen = as_fp32_sees(seen_by_router(config, data.draw(batches(config))))._replace(mask_T=None)
        dictated_TM = dictated(config, len(seen.logits_TE), data.draw(st.integers(0, 2**31)))
        weights_TM = native_router(config, seen).weigh_choices(seen.logits_TE.float(), dictated_TM)
        undecided = name in ("sparsemixer", "gshard_top2")  # which make choices of their own in place of -1
        wide, narrow = (
            ROUTERS[name](each._replace(dictated_TM=dictated_TM), config) for each in (seen, narrowed(seen))
        )
        for token in range(len(dictated_TM)):
            if undecided and bool((dictated_TM[token] < 0).any()) and has_near_tie(wide, config, seen, token):
                continue
            wanted = [each._replace(expert_ids_TM=dictated_TM) for each in (wide, narrow)]
            assert any(agrees(each, token, dictated_TM, weights_TM) for each in wanted), (wanted, weights_TM)

    run()


def dictated(config: RouterConfig, tokens: int, seed: int) -> Tensor:
    """Different experts for each token; some have gone, but never the first of a pair."""
    generator = torch.Generator().manual_seed(seed)
    order_TE = torch.rand(tokens, config.num_experts, generator=generator).argsort(dim=1)
    ids_TK = order_TE[:, : config.top_k]
    gone_TK = torch.rand(ids_TK.shape, generator=generator) < 0.3
    gone_TK[:, 0] &= config.name != "gshard_top2"
    return ids_TK.masked_fill(gone_TK, -1)


def many(name: str, num_experts: int, top_k: int, tokens: int) -> tuple[RouterConfig, RouterInput]:
    fields = {"groups": GroupConfig(num_groups=8, top_groups=4)} if name == "sigmoid_topk" else {}
    config = make_config(name, num_experts, top_k, **fields)
    logits_TC = torch.randn(tokens, config.num_choices, generator=torch.Generator().manual_seed(3)) * 2
    ids_T = torch.arange(tokens) % 17
    table = hash_table(config) if name == "hash" else None
    return config, RouterInput(logits_TC.double(), token_ids_T=ids_T, table_VK=table)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", NATIVE_ROUTERS)
def test_a_token_has_the_same_bits_alone_and_on_any_number_of_threads(name: str) -> None:
    config, seen = many(name, 64, 6, tokens=300)
    router, ids_T = native_router(config, seen), seen.token_ids_T
    assert ids_T is not None
    ids_TM, weights_TM = router.route(seen.logits_TE.float(), ids_T)
    for count in (2, 3):
        with threads(count):
            again = router.route(seen.logits_TE.float(), ids_T)
            assert torch.equal(again[0], ids_TM) and torch.equal(again[1], weights_TM)
            assert torch.equal(router.weigh_choices(seen.logits_TE.float(), ids_TM), weights_TM)
    for token in (0, 17, 299):
        one = slice(token, token + 1)
        alone = router.route(seen.logits_TE[one].float(), ids_T[one])
        assert torch.equal(alone[0], ids_TM[one]) and torch.equal(alone[1], weights_TM[one])


@pytest.mark.parametrize("name", NATIVE_ROUTERS)
def test_no_tokens(name: str) -> None:
    config, seen = many(name, 16, 2, tokens=0)
    ids_TM, weights_TM = routed(config, seen)
    assert len(ids_TM) == len(weights_TM) == 0
    assert native_router(config, seen).weigh_choices(seen.logits_TE.float(), ids_TM).shape == ids_TM.shape


@pytest.mark.parametrize("name", [name for name in NATIVE_ROUTERS if name not in ("hash", "relu")])
def test_among_equals_the_lower_id_wins(name: str) -> None:
    config = make_config(name, 6, 3)
    logits_TC = torch.zeros(2, config.num_choices)
    logits_TC[1, 4] = 1.0
    router = NativeRouter(config, RouterTensors())
    ids_TM, _ = router.route(logits_TC)
    assert ids_TM[0][ids_TM[0] >= 0].tolist() == list(range(int((ids_TM[0] >= 0).sum())))
    own = [each for each in ids_TM[1].tolist() if each >= 0]
    assert own == [4, 0, 1, 2, 3, 5][: len(own)]


@pytest.mark.parametrize("name", NATIVE_ROUTERS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_with_its_token(name: str, poison: float) -> None:
    config, seen = many(name, 16, 3, tokens=4)
    logits_TC = seen.logits_TE.float()
    router = native_router(config, seen)
    clean = router.route(logits_TC, seen.token_ids_T)
    for poisoned in (slice(5, 6), slice(None)):
        logits_TC[1] = seen.logits_TE[1].float()
        logits_TC[1, poisoned] = poison
        ids_TM, weights_TM = router.route(logits_TC, seen.token_ids_T)
        assert int(ids_TM.min()) >= -1 and int(ids_TM.max()) < config.num_experts
        for token in (0, 2, 3):
            assert torch.equal(ids_TM[token], clean[0][token]) and torch.equal(weights_TM[token], clean[1][token])
        if poison != poison and name not in ("hash", "relu"):
            assert weights_TM[1][ids_TM[1] >= 0].isnan().any()


def test_bias_and_running_means_come_before_everything() -> None:
    config = RouterConfig(name="sigmoid_topk", num_experts=12, top_k=3, batch_norm=True, bias=True)
    logits_TC, bias = torch.randn(40, 12), torch.randn(12)
    mean, var = torch.randn(12), torch.rand(12) + 0.1
    router = NativeRouter(config, RouterTensors(bias=bias, running_mean=mean, running_var=var))
    normal = (logits_TC.double() + bias - mean) / (var.double() + BATCH_NORM_EPSILON).sqrt()
    assert assert_agrees(config, RouterInput(normal), *router.route(logits_TC)) == 0


@settings(max_examples=60)
@given(st.integers(0, 9), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31))
def test_sorting_is_what_rows_are(tokens: int, columns: int, num_experts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids_TM = torch.randint(-1, num_experts, (tokens, columns), generator=generator)
    weights_TM = torch.rand(tokens, columns, generator=generator)
    rows = Rows.from_topk(ids_TM, weights_TM, num_experts, fixed_top_k=False)
    found = sort_by_expert(ids_TM, weights_TM, num_experts)
    assert torch.equal(found.offsets, rows.expert_offsets) and torch.equal(found.token_ids_R, rows.token_ids_R)
    assert torch.equal(found.weights_R, rows.weights_R)
    wanted = torch.full((tokens, columns), -1)
    wanted[rows.token_ids_R, rows.choice_R] = torch.arange(len(rows.token_ids_R))
    assert torch.equal(found.row_of_TM, wanted)


def test_what_cannot_be_routed_is_refused() -> None:
    assert set(ROUTER_KINDS) - set(NATIVE_ROUTERS) == {"expert_choice"}
    with pytest.raises(ConfigError, match="router 'expert_choice' chooses over a whole batch"):
        NativeRouter(RouterConfig(name="expert_choice", num_experts=4, top_k=2), RouterTensors())
    config = RouterConfig(name="hash", num_experts=4, top_k=2, settings=HashSettings(vocab_size=5))
    router = NativeRouter(config, RouterTensors(table=hash_table(config)))
    with pytest.raises(ValueError, match="token_ids_T are missing"):
        router.route(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="token_ids_T holds an index outside 0 to 4"):
        router.route(None, torch.tensor([5]))
    unmade = NativeRouter(config, RouterTensors(table=torch.full((5, 2), -1, dtype=torch.int32)))
    with pytest.raises(ValueError, match="table names experts that there are not"):
        unmade.route(None, torch.tensor([0]))
    with pytest.raises(ValueError, match="ids_TM holds an id outside -1 to 3"):
        router.weigh_choices(None, torch.tensor([[0, 4]]))
    with pytest.raises(ValueError, match="ids_TM holds an id outside -1 to 1"):
        sort_by_expert(torch.tensor([[2]]), torch.ones(1, 1), 2)
