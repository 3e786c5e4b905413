"""Whole plans: quick, without torch, right about what binds; disclosed costs; what cannot be is said."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest

from moesaic import families
from moesaic.errors import ConfigError, MoesaicError
from moesaic.plan import cost, dense, formats, hardware
from moesaic.plan.memory import Training
from moesaic.plan.plan import ServingPlan, TrainingPlan, make_plan
from moesaic.plan.roofline import Speculation, decode_step, step_time
from moesaic.plan.routing import Shares
from moesaic.plan.which import which
from tests.tiny import tiny_config


def serving(model: str, **settings) -> ServingPlan:
    plan = make_plan(model, **settings)
    assert isinstance(plan, ServingPlan)
    return plan


def test_no_torch_on_the_path() -> None:
    code = (
        "import sys, json\nfrom moesaic.plan.plan import make_plan\n"
        "json.dumps(make_plan('deepseek-v3', machine='8xh200').to_dict())\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert "moesaic.plan.plan" in done.stderr and "torch" not in done.stderr


LARGE = ["deepseek-v3", "deepseek-v4-pro", "kimi-k2", "llama-3.1-405b", "qwen3-235b-a22b", "gpt-oss-120b", "glm-5"]
SMALL = [name for name in families.presets() if name not in LARGE]


@pytest.mark.parametrize("name", [*LARGE, *(pytest.param(name, marks=pytest.mark.slow) for name in SMALL)])
def test_a_preset_has_a_plan_within_a_second(name: str) -> None:
    """Of processor time, so that a busy machine does not fail it."""
    start = time.process_time()
    plan = make_plan(name, machine="8xh200", users=4, context=512)
    assert time.process_time() - start < 1.0
    json.dumps(plan.to_dict())


def test_the_first_line_says_what_binds() -> None:
    short = serving("deepseek-v3", machine="8xh100", users=50)
    assert short.verdict.binds == "capacity" and not short.fits
    assert short.verdict.line.startswith("capacity binds:") and "16xh100" in short.verdict.line
    fast = serving("mixtral-8x7b", machine="8xh100", users=50)
    assert fast.verdict.binds == "bandwidth" and 0.5 < fast.verdict.share < 1
    many = serving("qwen3-30b-a3b", machine="h100", users=256, context=512, format="int4")
    assert many.verdict.reliefs


def test_as_few_devices_as_hold_it() -> None:
    assert serving("qwen3-30b-a3b").serving.machine.name == "h100"
    assert serving("deepseek-v3").serving.machine.name == "16xh100"


def test_offload_says_what_a_miss_costs() -> None:
    machine = hardware.find_machine("rtx4090")
    behind = hardware.Machine(device=machine.device, host_bytes=64e9)
    found = serving("mixtral-8x7b", machine=behind, format="int4").offload
    assert found is not None and [tier.name for tier in found.tiers] == ["device", "host"]
    assert sum(tier.experts for tier in found.tiers) == 8
    assert found.seconds > 2 * (1 - found.hit) * 32 * 0.0985e9 / 25e9  # as many bytes over PCIe, and their latency
    assert serving("mixtral-8x7b", machine="rtx4090", format="int4").offload is None


def test_experts_of_a_draft_are_read_too() -> None:
    """DeepSeek-V3 with one draft reads 15.75 / 8 of the experts of one token (docs of systems: 1.97)."""
    config, device = families.find_preset("deepseek-v3"), hardware.find_device("h200")
    packed = formats.named("fp8")

    def read(drafts: int) -> float:
        step = decode_step(1, 128, Speculation(drafts=drafts, acceptance=0.85))
        ops = step_time(config, packed, step, device).ops
        return next(op.op.weight_bytes for op in ops if op.op.name == "experts")

    assert read(1) / read(0) == pytest.approx(15.75 / 8, rel=1e-6)
    assert Speculation(drafts=2, acceptance=0.5).tokens_per_step == 1.75


def test_routing_with_shares_reads_fewer_experts() -> None:
    config = families.find_preset("olmoe-1b-7b")
    shares = np.random.default_rng(0).dirichlet(np.full(64, 0.5), size=16) * 8
    skewed = serving("olmoe-1b-7b", machine="h100", users=8, context=1024, routing=Shares(np.minimum(shares, 1)))
    even = serving("olmoe-1b-7b", machine="h100", users=8, context=1024)
    assert skewed.decode.seconds < even.decode.seconds
    with pytest.raises(ConfigError, match="shares of 5 experts"):
        serving("olmoe-1b-7b", machine="h100", routing=Shares(np.full((16, 5), 0.2)))
    assert config.moe_layers


def test_an_moe_against_dense_models() -> None:
    """Slower than its active twin in between, never slower than its total twin; equal again at large batches."""
    config = families.find_preset("mixtral-8x7b")
    twins = dense.dense_equals(config)
    assert twins["total"].total == pytest.approx(config.total, rel=1e-3)
    assert twins["active"].total == pytest.approx(config.active_all, rel=1e-3)
    device, packed = hardware.find_device("h100"), formats.named("bf16")
    active = dense.crossover(config, twins["active"], packed, device, 1000)
    assert max(active.ratios) > 2 and active.ratios[-1] == pytest.approx(1, abs=0.03)
    total = dense.crossover(config, twins["total"], packed, device, 1000)
    assert max(total.ratios) <= dense.NEAR and total.in_words == "as fast or faster at every batch"
    with pytest.raises(ConfigError, match="is dense"):
        dense.dense_equals(families.find_preset("qwen3-8b"))


def test_disclosed_costs() -> None:
    """DeepSeek-V3: 2,788K H800 hours at $2 are $5.576M; a node's hour of $16 at 14.8k tokens/s is $0.30 a million."""
    machine = hardware.find_machine("2048xh800")
    assert cost.cost_of_hours(2_788_000, machine).dollars == pytest.approx(5.576e6)
    assert cost.cost_of_hours(180_000, machine).days == pytest.approx(3.66, abs=0.01)
    assert cost.dollars_per_million(16, 14_800) == pytest.approx(0.30, abs=0.001)
    assert cost.break_even_tokens(1e6, 1.0, 3.0) == pytest.approx(5e11)
    assert cost.break_even_tokens(1e6, 3.0, 1.0) is None
    day = cost.Workload(input_tokens=608e9, output_tokens=168e9, requests=1, cached=342 / 608)
    assert cost.find_price("deepseek-r1-2025-02").month(day) == pytest.approx(562_027, rel=0.001)  # a day's revenue


def test_training_plans() -> None:
    plan = make_plan("deepseek-v3", task="train", machine="2048xh800", train_tokens=14.8e12, format="fp8")
    assert isinstance(plan, TrainingPlan) and plan.cost is not None
    assert plan.cost.flops == pytest.approx(3 * families.find_preset("deepseek-v3").flops_per_token(2048) * 14.8e12)
    assert 0.1 < plan.flops_utilisation < 1
    crowded = make_plan("mixtral-8x7b", task="train", machine="8xh100", training=Training(tokens=8192))
    assert crowded.verdict.binds == "capacity" and "would fit" in crowded.verdict.line


def test_which_models_fit() -> None:
    found = which(hardware.find_machine("h100"), users=8, context=4096)
    assert found == sorted(found, key=lambda choice: -choice.size)
    assert {"gpt-oss-120b", "qwen3-30b-a3b"} <= {choice.model for choice in found}
    with pytest.raises(ConfigError, match=r"needs .*xl4"):
        which(hardware.find_machine("l4"), users=5000, context=32768)


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        ("mixtral-8x8b", {}, "nearest presets: mixtral-8x7b"),
        ("mixtral-8x7b", {"machine": "8xh1000"}, "near it: h100"),
        ("mixtral-8x7b", {"context": 10**6}, "takes 1 to 32,768"),
        ("mixtral-8x7b", {"users": 0}, "0 users; use 1 or more"),
        ("mixtral-8x7b", {"format": "int5"}, "unknown format 'int5'"),
        ("mixtral-8x7b", {"format": "bf16,expert=int4"}, "is not ROLE=FORMAT"),
        ("mixtral-8x7b", {"machine": "7xh100", "task": "serve", "overlap": 2.0}, "overlap=2.0"),
    ],
)
def test_what_cannot_be(model: str, settings: dict, words: str) -> None:
    with pytest.raises(MoesaicError, match=words):
        make_plan(model, **settings)


def test_a_plan_of_a_description() -> None:
    plan = serving(tiny_config(), machine="rtx4090", context=32)  # pyright: ignore[reportArgumentType]
    assert plan.fits and plan.to_dict()["parameters"]["total"] == tiny_config().total
