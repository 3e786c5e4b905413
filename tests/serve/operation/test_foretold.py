"""What a plan foretold beside what served steps took."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from moesaic import Engine
from moesaic.plan.flops import Step
from moesaic.plan.kernels import engine_step
from moesaic.plan.verify import load
from moesaic.serve.operation import foretold
from moesaic.serve.operation.foretold import FEWEST, NEWEST, step_times
from moesaic.serve.seen import RowsSeen, StepSeen
from tests.plan.test_here import LINE, RATES
from tests.serve import tiny
from tests.serve.operation.whole import serving, settings

KNOWN = replace(
    RATES,
    experts={"fp32": LINE},
    fine={"fp32": LINE},
    head={"fp32": LINE},
    about={"threads": 1, "processor": "P", "isa": "avx2"},
)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(foretold, "measured_rates", lambda: KNOWN)
    return tmp_path


def step(pieces: Sequence[tuple[int, int]], seconds: float, drafts: int = 0) -> StepSeen:
    """Of pieces with so many tokens from that place on."""
    rows = tuple(RowsSeen(number, 0, count, start) for number, (count, start) in enumerate(pieces, 1))
    return StepSeen(sum(count for count, _ in pieces), seconds, rows, drafts)


def test_steps_are_kept_by_kind_and_held_against_the_plan() -> None:
    engine = Engine(tiny.folder(), threads=1)
    times = step_times("m", engine)
    assert times is not None
    for number in range(FEWEST):
        times.hear(step([(1, 10 + number), (1, 30 + number)], 0.01 * (number + 1)))
        times.hear(step([(40, 0)], 0.5))
        times.hear(step([(40, 64)], 9.0))  # later in a prompt
        times.hear(step([(1, 5), (30, 0)], 9.0))  # both at once
        times.hear(step([(3, 5)], 9.0, drafts=2))
    for number in range(FEWEST - 1):
        times.hear(step([(1, number)], 9.0))
    decode, prefill = times.predictions()
    assert (decode.source, decode.quantity, decode.setting["case"]) == ("serve", "decode_s", "decode 2")
    assert decode.measured == pytest.approx(statistics.median(0.01 * (each + 1) for each in range(FEWEST)))
    assert decode.setting["steps"] == FEWEST and decode.machine == KNOWN.machine
    context = statistics.median(21.0 + each for each in range(FEWEST))
    formats = foretold.held_formats(foretold.held(engine, foretold.torch.float32))
    wanted = engine_step(KNOWN, engine.config, formats, Step(kind="decode", texts=2, new=1, context=context))
    assert decode.predicted == pytest.approx(wanted.seconds)
    assert (prefill.quantity, prefill.setting["case"], prefill.measured) == ("prefill_s", "prefill 40", 0.5)
    times.hear(step([(1, 0)], 1.0))
    for _ in range(2 * NEWEST):
        times.hear(step([(1, 0)], 2.0))
    newest = next(iter(times.predictions()))
    assert (newest.setting["case"], newest.setting["steps"], newest.measured) == ("decode 1", NEWEST, 2.0)


def test_other_threads_and_formats_are_held_against_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert step_times("m", Engine(tiny.folder(), threads=2)) is None
    times = step_times("m", Engine(tiny.folder(), threads=1, bits=4))
    assert times is not None
    for _ in range(FEWEST):
        times.hear(step([(1, 5)], 0.1))
    times.keep()
    assert "int4 were not measured" in caplog.text and not load()
    monkeypatch.setattr(foretold, "measured_rates", lambda: None)
    assert step_times("m", Engine(tiny.folder(), threads=1)) is None


@pytest.mark.slow
def test_a_served_model_leaves_its_steps() -> None:
    with serving(settings(load_models=True)) as client:
        body = {"model": "one", "prompt": "the fox", "max_tokens": 2 * FEWEST, "ignore_eos": True}
        assert client.post("/v1/completions", json=body, timeout=60).json()["usage"]["completion_tokens"] == 2 * FEWEST
        assert client.post("/v1/models/load", json={"model": "two"}, timeout=120).status_code == 200
        assert not load()
        assert client.post("/v1/models/unload", json={"model": "one"}, timeout=60).status_code == 200
        [found] = load()
    assert (found.source, found.model, found.setting["case"]) == ("serve", "one", "decode 1")
    assert found.measured > 0 and found.setting["steps"] >= 2 * FEWEST - 2
