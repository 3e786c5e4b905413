import dataclasses
import math

import numpy as np
import pytest

from moesaic.telemetry.load import LayerLoad, StepLoad
from moesaic.telemetry.report_data import HeldOut, ModelResult
from moesaic.train.compare import Outcome
from moesaic.train.verdicts import bits_per_byte_at, verdicts, where_it_stands
from tests.tiny import lively, tiny_config


def result(name, curve, seconds_per_step=1.0, flops_per_token=10.0, domains=None):
    held_out = tuple(
        HeldOut(
            step=step,
            tokens=100 * step,
            flops=flops_per_token * 100 * step,
            seconds=seconds_per_step * step,
            bits_per_byte=bits,
        )
        for step, bits in curve
    )
    last = held_out[-1]
    return ModelResult(
        name=name,
        label=name,
        total_parameters=10,
        active_parameters=5,
        bits_per_byte=last.bits_per_byte,
        domain_bits_per_byte=domains or {"prose": 2.0, "code": 1.0},
        training_tokens=last.tokens,
        training_tokens_per_s=last.tokens / last.seconds,
        decoding_tokens_per_s=1.0,
        peak_memory_bytes=1.0,
        training_time_s=last.seconds,
        training_flops=last.flops,
        held_out=held_out,
    )


def load(counts):
    layer = LayerLoad(layer=0, top_k=1, counts_E=np.array(counts), num_tokens=sum(counts), router_entropy=0.5)
    return StepLoad(step=1, layers=(layer,))


def outcome(numbers, counts=(250, 250, 250, 250)):
    return Outcome(numbers, lively(tiny_config()), (load(counts),), load(counts))


ACTIVE = result("active", [(0, 4.0), (10, 3.0), (20, 2.0)])
TOTAL = result("total", [(0, 4.0), (10, 2.0)], flops_per_token=40.0)


def test_a_curve_is_read_between_its_points_and_not_outside():
    assert bits_per_byte_at(ACTIVE, "tokens", 1500) == pytest.approx(2.5)
    assert bits_per_byte_at(ACTIVE, "seconds", 5) == pytest.approx(3.5)
    assert bits_per_byte_at(ACTIVE, "flops", 10_000) == pytest.approx(3.0)
    assert math.isnan(bits_per_byte_at(ACTIVE, "tokens", 2001))


def test_an_moe_may_win_by_tokens_and_lose_by_the_clock():
    """Twice as slow a step: after the dense twin's 20 s the MoE has done 10 steps."""
    moe = result("MoE", [(0, 4.0), (10, 2.5), (20, 1.8)], seconds_per_step=2.0)
    tokens, compute, clock, between, *_ = verdicts(outcome(moe), ACTIVE, TOTAL)
    assert tokens.is_good and "beats" in tokens.text and "1.800 against 2.000" in tokens.text
    assert compute.is_good
    assert clock.is_good is False and "loses to" in clock.text and "2.500 against 2.000" in clock.text
    assert "50% of the way" in between.text and "4.0x the compute" in between.text


@pytest.mark.parametrize(
    ("moe", "active", "total", "words"),
    [
        (2.5, 3.0, 2.0, "50% of the way"),
        (3.1, 3.0, 2.0, "-10% of the way"),
        (1.9, 3.0, 2.0, "ahead of both twins"),
        (2.9, 3.0, 3.1, "ahead of both twins"),
        (3.2, 3.0, 3.1, "not ahead of its equal-active twin, and neither"),
    ],
)
def test_where_it_stands(moe, active, total, words):
    assert words in where_it_stands(moe, active, total)


def test_domains_behind_are_named():
    moe = dataclasses.replace(ACTIVE, domain_bits_per_byte={"prose": 1.9, "code": 1.1})
    verdict = verdicts(outcome(moe), ACTIVE, TOTAL)[4]
    assert "1 of 2 domains; behind in code" in verdict.text
    assert not verdict.is_good


def test_a_sick_router_is_bad_news():
    sick = verdicts(outcome(ACTIVE, counts=(997, 1, 1, 1)), ACTIVE, TOTAL)[-1]
    assert sick.is_good is False and "dead" in sick.text
    assert verdicts(outcome(ACTIVE), ACTIVE, TOTAL)[-1].is_good
