"""Plans by a recorded trace: batches drawn from its tokens."""

import numpy as np
import pytest

from moesaic.config import ModelConfig, MoeConfig
from moesaic.errors import TraceError
from moesaic.families import find_preset
from moesaic.plan.layout import Layout
from moesaic.plan.plan import ServingPlan, make_plan
from moesaic.plan.traced import open_routing
from moesaic.trace import Fingerprint, TokenRows, TracedForward, TraceWriter

MIXTRAL = find_preset("mixtral-8x7b")
OLMOE = find_preset("olmoe-1b-7b")
NUM_EXPERTS, TOP_K = 64, 8


def rows_of(expert_ids_TK: np.ndarray) -> TokenRows:
    tokens, top_k = expert_ids_TK.shape
    offsets = np.arange(tokens + 1, dtype=np.int64) * top_k
    weights = np.full(tokens * top_k, 1 / top_k, np.float32)
    return TokenRows(offsets, expert_ids_TK.reshape(-1), np.tile(np.arange(top_k), tokens), weights)


def written(path, expert_ids_TK: np.ndarray, config: ModelConfig = OLMOE, mask_T: np.ndarray | None = None):
    with TraceWriter(path, Fingerprint.of(config)) as writer:
        if len(expert_ids_TK):
            writer.append(TracedForward(dict.fromkeys(config.moe_layers, rows_of(expert_ids_TK)), mask_T=mask_T))
    return path


def even(tokens: int) -> np.ndarray:
    """Every expert as often as the others, drawn without regard to the token."""
    generator = np.random.default_rng(3)
    return np.stack([generator.permutation(NUM_EXPERTS)[:TOP_K] for _ in range(tokens)])


def moe_of(config: ModelConfig) -> MoeConfig:
    moe = config.layers[0].feed_forward
    assert isinstance(moe, MoeConfig)
    return moe


def test_one_expert_group_for_all_is_all_that_is_read(tmp_path):
    """Where all tokens choose the same K experts, a batch of any size reads K."""
    routing = open_routing(str(written(tmp_path / "t.npz", np.tile(np.arange(TOP_K), (40, 1)))), OLMOE)
    for batch in (1, 3, 16, 500):
        assert routing.distinct(moe_of(OLMOE), 0, batch) == TOP_K
    assert routing.imbalance(moe_of(OLMOE), 0, 8, 4096) == pytest.approx(8, rel=0.05)


def test_even_choices_read_as_many_as_chance_says(tmp_path):
    routing = open_routing(str(written(tmp_path / "t.npz", even(2000))), OLMOE)
    for batch in (1, 4, 16, 64):
        expected = NUM_EXPERTS * (1 - (1 - TOP_K / NUM_EXPERTS) ** batch)
        assert routing.distinct(moe_of(OLMOE), 3, batch) == pytest.approx(expected, rel=0.06)
    assert routing.distinct(moe_of(OLMOE), 3, 1) == TOP_K


def test_beyond_the_longest_batch_shares_go_on(tmp_path):
    routing = open_routing(str(written(tmp_path / "t.npz", even(40))), OLMOE)
    read = [routing.distinct(moe_of(OLMOE), 0, batch) for batch in (16, 32, 64, 4096)]
    assert read == sorted(read) and read[-1] <= NUM_EXPERTS


def test_a_plan_by_a_trace_reads_fewer_experts(tmp_path):
    generator = np.random.default_rng(5)
    few = np.stack([generator.permutation(NUM_EXPERTS // 4)[:TOP_K] for _ in range(400)])
    path = str(written(tmp_path / "few.npz", few))
    settings = {"machine": "h100", "users": 32, "context": 1024}
    traced = make_plan("olmoe-1b-7b", routing=open_routing(path, OLMOE), **settings)
    uniform = make_plan("olmoe-1b-7b", **settings)
    assert isinstance(traced, ServingPlan) and isinstance(uniform, ServingPlan)
    assert traced.decode.seconds < uniform.decode.seconds
    assert traced.to_dict()["routing"] == "trace few.npz"


def test_ranks_that_hold_the_busy_experts_take_longer(tmp_path):
    path = str(written(tmp_path / "t.npz", np.tile(np.arange(TOP_K), (40, 1))))
    layout = Layout(dp=8, ep=8)
    plans = [
        make_plan("olmoe-1b-7b", machine="8xh100", users=4096, context=256, layout=layout, routing=routing)
        for routing in (open_routing(path, OLMOE), None)
    ]
    busy, spread = (next(op for op in plan.decode.ops if op.op.name == "experts") for plan in plans)  # pyright: ignore[reportAttributeAccessIssue]
    assert busy.op.flops > 6 * spread.op.flops


def test_padding_is_not_drawn(tmp_path):
    """Tokens of padding chose other experts: none of them are counted."""
    ids = np.concatenate([np.tile(np.arange(TOP_K), (30, 1)), np.tile(np.arange(TOP_K, 2 * TOP_K), (30, 1))])
    mask = np.arange(60) < 30
    routing = open_routing(str(written(tmp_path / "t.npz", ids, mask_T=mask)), OLMOE)
    assert routing.distinct(moe_of(OLMOE), 0, 16) == TOP_K
    assert routing.distinct(moe_of(OLMOE), 0, 5000) == pytest.approx(TOP_K)


def test_layers_that_predict_further_tokens_do_no_harm(tmp_path):
    config = find_preset("glm-4.5-air")
    assert config.mtp
    ids = np.tile(np.arange(8), (20, 1))
    path = tmp_path / "t.npz"
    with TraceWriter(path, fingerprint := Fingerprint.of(config)) as writer:
        writer.append(TracedForward(dict.fromkeys(fingerprint.num_experts, rows_of(ids))))
    plan = make_plan("glm-4.5-air", machine="8xh200", users=8, routing=open_routing(str(path), config))
    assert isinstance(plan, ServingPlan) and plan.decode.seconds > 0


@pytest.mark.parametrize(
    ("make", "seen"),
    [
        (lambda folder: folder / "none.npz", r"there is no trace .*none\.npz; record one with `moesaic trace"),
        (
            lambda folder: written(folder / "m.npz", np.tile([0, 1], (3, 1)), find_preset("mixtral-8x7b")),
            "another model",
        ),
        (lambda folder: written(folder / "e.npz", np.empty((0, 8), int)), "no tokens"),
        (lambda folder: written(folder / "p.npz", even(3), mask_T=np.zeros(3, bool)), "3 tokens that are all padding"),
    ],
    ids=["absent", "of another model", "empty", "all padding"],
)
def test_what_cannot_be_planned_by_is_one_line(tmp_path, make, seen):
    with pytest.raises(TraceError, match=seen):
        open_routing(str(make(tmp_path)), OLMOE)


def test_a_file_cut_short_is_refused(tmp_path):
    path = written(tmp_path / "t.npz", even(50))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(TraceError, match=r"t\.npz"):
        open_routing(str(path), OLMOE)
