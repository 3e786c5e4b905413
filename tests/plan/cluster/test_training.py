"""A training step: hand counts of its length, and rows and bytes that arrive as they were sent."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic import families
from moesaic.errors import ConfigError
from moesaic.plan.cluster.loads import expert_loads
from moesaic.plan.cluster.placed import place
from moesaic.plan.cluster.simulate import simulate_training
from moesaic.plan.cluster.training import Job, LayerCost, Training
from moesaic.plan.cluster.troubles import Troubles
from moesaic.plan.formats import named
from moesaic.plan.hardware import find_device, find_machine
from tests.plan.cluster.cluster_models import MODEL


def job(*, pp: int = 2, dp: int = 4, ep: int = 4, micro_batches: int = 8, schedule: str = "1f1b") -> Job:
    return Job(
        config=MODEL,
        formats=named("bf16"),
        device=replace(find_device("h100"), network=1e30, link=1e30),
        placed=place(MODEL, expert_loads(MODEL), ranks=ep),
        pp=pp,
        dp=dp,
        ep=ep,
        micro_batches=micro_batches,
        sequence=64,
        schedule=schedule,
    )


def even(run: Training, computing: float, sending: float) -> Training:
    """The same with stages that all take equally long."""
    run.stages = [[(-1, LayerCost(computing, 0.0, sending, 0.0, 0))] for _ in run.stages]
    return run


@pytest.mark.parametrize(("pp", "micro_batches"), [(1, 3), (2, 8), (4, 8), (4, 2)])
def test_1f1b_takes_as_long_as_its_bubble_says(pp: int, micro_batches: int) -> None:
    run = even(Training(job(pp=pp, micro_batches=micro_batches)), 1.0, 0.5).run()
    forward, backward = 1.0 + 0.5, 2.0 + 0.5
    assert run.pipeline_s == pytest.approx((micro_batches + pp - 1) * (forward + backward))
    assert run.idle == pytest.approx((pp - 1) / (micro_batches + pp - 1))


@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 4), (4, 8), (4, 20)])
def test_dualpipe_takes_as_long_as_its_bubble_says(pp: int, micro_batches: int) -> None:
    # (PP/2 - 1)(F&B + B - 3W), DeepSeek-V3, arXiv:2412.19437, table 2, beside the work of all micro-batches.
    run = even(Training(job(pp=pp, micro_batches=micro_batches, schedule="dualpipe")), 1.0, 0.0).run()
    forward, backward, weights = 1.0, 2.0, 1.0
    pair = forward + backward
    bubble = (pp / 2 - 1) * (pair + backward - 3 * weights)
    assert run.pipeline_s == pytest.approx(micro_batches * pair + bubble)


def test_dualpipe_hides_sending_where_chunks_run_in_pairs() -> None:
    silent, sending = (
        even(Training(job(pp=4, micro_batches=40, schedule="dualpipe")), 1.0, each).run() for each in (0.0, 1.0)
    )
    assert sending.pipeline_s < 1.2 * silent.pipeline_s
    plain = even(Training(job(pp=4, micro_batches=40)), 1.0, 1.0).run()
    assert plain.exposed > 3 * sending.exposed


@settings(max_examples=15)
@given(
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
    st.sampled_from([2, 4, 8]),
    st.sampled_from(["1f1b", "dualpipe"]),
    st.integers(0, 3),
)
def test_what_is_sent_arrives(pp: int, groups: int, ep: int, schedule: str, seed: int) -> None:
    pp = 2 if schedule == "dualpipe" and pp == 1 else pp
    the_job = job(pp=pp, dp=groups * ep, ep=ep, micro_batches=8, schedule=schedule)
    run = Training(the_job, seed=seed).run()
    rows = groups * 8 * ep * 64 * 2 * len(MODEL.moe_layers)
    assert run.rows_sent == run.rows_computed == rows
    assert run.bytes_sent == pytest.approx(run.bytes_received)
    assert run.chunks == 2 * groups * pp * 8
    assert run.busiest_over_mean >= 1 and 0 <= run.idle < 1 and 0 <= run.exposed < 1


def test_failures_and_slow_devices_cost_time() -> None:
    fine = Training(job()).run()
    slow = Training(job(), Troubles(slow_share=1.0, slowdown=2.0)).run()
    failing = Training(job(), Troubles(hours_between=fine.step_s * 8 / 3600, repair_s=1.0)).run()
    assert slow.pipeline_s > 1.5 * fine.pipeline_s
    assert failing.failures > 0 and failing.step_s == pytest.approx(fine.step_s + failing.lost_s, rel=1e-6)


@pytest.mark.slow
def test_deepseek_v3_on_2048_devices() -> None:
    model, machine = families.find_preset("deepseek-v3"), find_machine("2048xh800")
    run = simulate_training(model, named("fp8"), machine, micro_batches=32)
    assert run.devices == 2048 and run.chunks == 2 * 2 * 16 * 32
    assert 150e3 < run.hours_per_trillion < 320e3  # disclosed: 180K with 120 micro-batches


def test_numbers_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"schedule='dualpipe' with pp=4 and micro_batches=6; it needs an even pp"):
        job(pp=4, micro_batches=6, schedule="dualpipe")
    with pytest.raises(ConfigError, match="ep=4 does not divide dp=6"):
        job(dp=6)
    with pytest.raises(ConfigError, match="unknown schedule 'gpipe'"):
        job(schedule="gpipe")
