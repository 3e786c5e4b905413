"""Profiling: no bit changes, every phase of the step is found, and the trace is one that viewers read."""

import dataclasses
import gzip
import json
from itertools import pairwise

import pytest
import torch

from moesaic.errors import ConfigError, RunFolderError
from moesaic.train import profile
from moesaic.train.phases import PHASES, STEP, Place, phase_times, spans
from moesaic.train.profile import StepProfiler
from tests.tiny import tiny_config
from tests.train.tiny_run import changed, state_of, trainer

SHARED = tiny_config(windows=(None, None), shared=True)


def event(name, start, end, *, sequence=None, category="cpu_op"):
    args = {} if sequence is None else {"Sequence number": sequence, "Fwd thread id": 0}
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": end - start, "pid": 1, "tid": 7, "args": args}


def region(name, start, end):
    return event(name, start, end, category="user_annotation")


EVENTS = [
    event("aten::mm", 1, 3),  # an evaluation before: not ours
    region(STEP, 10, 100),
    region("attention: layers.0.attention", 12, 20),
    event("aten::mm", 13, 19, sequence=1),
    region("moe, the rest: layers.0.feed_forward", 20, 40),
    region("router: layers.0.feed_forward.router", 20, 22),
    event("moesaic::gather_rows", 22, 24, sequence=2),
    region("experts: layers.0.feed_forward.experts", 24, 34),
    event("moesaic::grouped_gated", 24, 27, sequence=3),
    event("aten::mm", 25, 26),
    event("aten::mul", 27, 28, sequence=4),
    event("moesaic::grouped_linear", 28, 33, sequence=5),
    event("moesaic::combine_rows", 34, 40, sequence=6),
    event("_LinearCrossEntropy", 42, 50, sequence=7),
    event("autograd::engine::evaluate_function: _LinearCrossEntropyBackward", 50, 52, sequence=7),
    event("autograd::engine::evaluate_function: grouped", 52, 60, sequence=5),
    event("moesaic::grouped_linear_input_grad", 53, 59),
    event("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", 60, 61),
    event("autograd::engine::evaluate_function: gated", 61, 61.75, sequence=3),
    event("moesaic::silu_mul_grad", 61.25, 61.5),
    event("autograd::engine::evaluate_function: MmBackward0", 62, 66, sequence=1),
    region("router: layers.0.feed_forward.router", 63, 65),  # recomputed
    event("aten::linalg_vector_norm", 70, 72),
    region("optimizer: step", 75, 90),
    event("aten::mul_", 76, 80),
    event("aten::bincount", 92, 94),
    event("aten::mm", 200, 300),
]


def test_events_become_phases():
    found = spans(reversed(EVENTS))
    times = {(place.phase, place.is_backward): 0.0 for place, _, _ in found}
    for place, start, end in found:
        times[place.phase, place.is_backward] += end - start
    assert times == {
        ("attention", False): 8,
        ("router", False): 2,
        ("dispatch", False): 2,
        ("experts: gate and up", False): 3,
        ("experts: activation", False): 1,
        ("experts: down", False): 5,
        ("experts", False): 1,
        ("combine", False): 6,
        ("loss", False): 8,
        ("loss", True): 2,
        ("experts: down", True): 9,
        ("experts: gate and up", True): 0.5,
        ("experts: activation", True): 0.25,
        ("attention", True): 2,
        ("router", True): 2,
        ("gradient norm, statistics", False): 4,
        ("optimizer", False): 15,
        ("between", False): 19.25,
    }
    assert all(before.end_us <= after.start_us for before, after in pairwise(found))
    assert found[1].place == Place("attention", 0, False)


def test_times_are_a_step_and_add_up():
    times = phase_times(spans(EVENTS), num_steps=1)
    assert sum(time.share for time in times) == pytest.approx(1)
    assert sum(time.forward_ms + time.backward_ms for time in times) == pytest.approx(0.090)
    assert [time.phase for time in times] == [phase for phase in PHASES if phase in {time.phase for time in times}]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """A run of six steps with two of them profiled, its twin without, and the trace."""
    place = tmp_path_factory.mktemp("profile") / "trace.json.gz"
    plain, watched = trainer(config=SHARED), trainer(config=SHARED)
    plain.train()
    with StepProfiler(watched, place, 2) as profiler:
        watched.train()
    with gzip.open(place, "rt") as file:
        return plain, watched, profiler, json.load(file)


def test_no_bit_changes_and_nothing_stays(profiled):
    plain, watched, profiler, _ = profiled
    assert state_of(plain) == state_of(watched)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in watched.model.modules())
    assert watched.train_step.__func__ is type(watched).train_step
    assert watched.optimizer.step.__func__ is type(watched.optimizer).step
    assert [path.name for path in profiler.place.parent.iterdir()] == ["trace.json.gz"]


def test_every_phase_of_the_step_is_found(profiled):
    found = profiled[2].found
    assert found is not None and (found.first_step, found.num_steps) == (3, 2)
    phases = {time.phase: time for time in found.times}
    assert phases.keys() >= set(PHASES) - {"experts", "experts: activation"}  # which may be fused
    both_ways = set(PHASES) - {"experts", "experts: activation", "moe, the rest", "residual", "between", "optimizer"}
    for phase in both_ways - {"gradient norm, statistics"}:
        assert phases[phase].forward_ms > 0 and phases[phase].backward_ms > 0, phase
    assert phases["optimizer"].backward_ms == 0
    assert json.loads(json.dumps(found.to_json()))["num_steps"] == 2


def test_the_trace_has_a_track_of_phases(profiled):
    events = profiled[3]["traceEvents"]
    track = [event for event in events if event.get("cat") == "phase"]
    assert {(event["pid"], event["tid"]) for event in track} == {(track[0]["pid"], 1)}
    names = {event["name"] for event in track}
    assert {"router", "experts: gate and up", "experts: gate and up, backward", "optimizer"} <= names
    assert {event["args"].get("layer") for event in track if event["name"] == "attention"} == {0, 1}
    ordered = sorted(track, key=lambda event: event["ts"])
    assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-3 for a, b in pairwise(ordered))
    (name,) = [event for event in events if event.get("ph") == "M" and event.get("tid") == 1][:1]
    assert name["args"] == {"name": "phases"}


def test_recomputed_layers_count_as_backward(tmp_path):
    run = trainer(changed(recompute="layers"))
    with StepProfiler(run, tmp_path / "trace.json.gz", 1) as profiler:
        run.train()
    assert profiler.found is not None
    router = next(time for time in profiler.found.times if time.phase == "router")
    assert router.forward_ms > 0 and router.backward_ms > 0


def test_a_run_that_ends_early_is_profiled_as_far_as_it_went(tmp_path):
    run = trainer(stop_after=2)
    with StepProfiler(run, tmp_path / "trace.json.gz", 5) as profiler:
        run.train()
    assert profiler.found is not None and profiler.found.num_steps == 2
    with StepProfiler(run, tmp_path / "none.json.gz", 1) as profiler:
        run.train()
    assert profiler.found is None and not (tmp_path / "none.json.gz").exists()


def test_mistakes(tmp_path, monkeypatch):
    run = trainer()
    with pytest.raises(ConfigError, match="--profile 0; give the number of steps"):
        StepProfiler(run, tmp_path / "trace.json.gz", 0)
    run.settings = dataclasses.replace(run.settings, compile=True)
    with pytest.raises(ConfigError, match=r"--profile and train.compile=true"):
        StepProfiler(run, tmp_path / "trace.json.gz")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(profile.gzip, "open", full)
    run = trainer()
    with (
        pytest.raises(RunFolderError, match=r"cannot write .*trace.json.gz: No space left on device; free space"),
        StepProfiler(run, tmp_path / "trace.json.gz", 1),
    ):
        run.train()
    assert list(tmp_path.iterdir()) == []
    assert torch.is_grad_enabled()
