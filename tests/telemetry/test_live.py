import dataclasses
import io
import math

import numpy as np
import pytest
from rich.console import Console

from moesaic.telemetry.live import TrainingStatus, load_bars, render, render_line
from moesaic.telemetry.load import LayerLoad, StepLoad


def layer_load(counts: list[int], layer: int = 0) -> LayerLoad:
    return LayerLoad(
        layer=layer,
        top_k=1,
        counts_E=np.array(counts),
        num_tokens=sum(counts),
        router_entropy=math.log(len(counts)) / 2,
    )


def status(**changes) -> TrainingStatus:
    fields = dict(name="MoE", step=30, num_steps=120, elapsed_s=60.0, tokens_per_s=12_345.0, loss=3.21)
    return TrainingStatus(**{**fields, **changes})  # type: ignore[arg-type]


def shown(what: TrainingStatus, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(render(what))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_bars_put_the_fair_share_in_the_middle():
    assert load_bars(layer_load([100, 100, 200, 0])) == "▄▄█×"
    assert load_bars(layer_load([100, 100, 100])) == "▄▄▄"
    assert load_bars(layer_load([0, 0])) == "××"
    assert len(load_bars(layer_load([5] * 256))) == 32


def test_the_block_shows_progress_and_health():
    load = StepLoad(step=30, layers=(layer_load([90] * 7 + [0]), layer_load([90] * 8, layer=1)))
    text = shown(status(bits_per_byte=2.5, load=load))
    for part in ("step 30 of 120", "3 min 00 s left", "12.3k tokens/s", "loss 3.210", "2.500", "▄▄▄▄▄▄▄▄"):
        assert part in text
    assert "1 of 16 experts dead: layer 0 expert 7" in text
    assert max(map(len, text.splitlines())) <= 100


def test_dense_models_and_first_steps_have_no_router_block():
    text = shown(status(step=0))
    assert "router" not in text
    assert status(step=0).eta_s is None
    assert status(step=40, first_step=30).eta_s == pytest.approx(480)


def test_many_layers_are_cut_short():
    load = StepLoad(step=1, layers=tuple(layer_load([40] * 4, layer=i) for i in range(20)))
    assert "and 8 more layers" in shown(status(load=load))


def test_one_line_is_plain():
    load = StepLoad(step=30, layers=(layer_load([90] * 8),))
    line = render_line(status(load=load))
    assert line == (
        "MoE: step 30/120, loss 3.210, held-out n/a bits/byte, 12.3k tokens/s, 3 min 00 s left, "
        "MaxVio 0.00, router healthy"
    )
    assert line.isascii()


def test_a_capacity_shows_its_gap_and_what_it_dropped():
    load = StepLoad(step=30, layers=(dataclasses.replace(layer_load([60, 40, 60, 40]), dropped_rows=30),))
    limited = status(load=load, bits_per_byte=2.5, capacity_gap=0.0321)
    for text in (shown(limited), render_line(limited)):
        assert "capacity gap 0.032" in text and "15.0% of rows dropped" in text
    assert "capacity gap -0.004" in render_line(status(load=load, capacity_gap=-0.0042))
    without = status(load=load, bits_per_byte=2.5)
    assert "capacity" not in shown(without) + render_line(without)
