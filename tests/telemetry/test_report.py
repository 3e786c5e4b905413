import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from moesaic.errors import DataError, RunFolderError
from moesaic.telemetry.load import LayerLoad, StepLoad
from moesaic.telemetry.report import render_page, write_report
from moesaic.telemetry.report_data import Command, Continuation, HeldOut, ModelResult, ReportData, Verdict

VOID = {"meta", "input", "br", "line", "rect", "circle", "polyline"}
EVIL = "</script><b>&\"'"


class Balance(HTMLParser):
    """Checks that every element is closed in order, and collects names of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def load(step: int, *, domains: bool = False) -> StepLoad:
    counts_ME = np.array([[30, 10, 0], [5 + step, 20, 0]])
    layers = tuple(
        LayerLoad(
            layer=layer,
            top_k=1,
            counts_E=counts_ME.sum(0),
            num_tokens=int(counts_ME.sum()),
            router_entropy=0.7,
            domain_counts_ME=counts_ME if domains else None,
        )
        for layer in (0, 2)
    )
    return StepLoad(step=step, layers=layers)


def model(name: str, **changes) -> ModelResult:
    held_out = tuple(
        HeldOut(step=i, tokens=i * 1000, flops=i * 1e9, seconds=i * 2.0, bits_per_byte=3 - i / 4) for i in range(4)
    )
    fields = dict(
        name=name,
        label=name,
        note="16 experts",
        total_parameters=1_234_567,
        active_parameters=345_678,
        bits_per_byte=2.25,
        domain_bits_per_byte={"code": 1.75, "prose": math.nan},
        training_tokens=3000,
        training_tokens_per_s=1500.0,
        decoding_tokens_per_s=77.0,
        peak_memory_bytes=2.5e8,
        training_time_s=61.0,
        training_flops=3e9,
        held_out=held_out,
        training_loss=tuple((i * 10.0, 5.0 - i / 100) for i in range(400)),
    )
    return ModelResult(**{**fields, **changes})  # type: ignore[arg-type]


def full() -> ReportData:
    return ReportData(
        title=f"A run {EVIL}",
        subtitle="two layers",
        verdicts=(
            Verdict(text=f"better {EVIL}", is_good=True),
            Verdict(text="slower", is_good=False),
            Verdict(text="hm"),
        ),
        models=(model("MoE"), model(f"twin {EVIL}", bits_per_byte=2.5, decoding_tokens_per_s=math.nan)),
        domains=("code", f"prose {EVIL}"),
        loads=tuple(load(step) for step in range(1, 120)),
        domain_load=load(9, domains=True),
        continuations=(Continuation(prompt="Once", text=f" upon {EVIL}"),),
        commands=(Command(line="moesaic chat", purpose="talk"),),
        facts=(("Seed", "0"),),
    )


def check(page: str) -> Balance:
    balance = Balance()
    balance.feed(page)
    assert balance.open == []
    assert "http" not in page.lower().replace("http-equiv", "")
    assert not re.search(r"<(link|img|iframe)|\bsrc=|@import|url\(", page)
    return balance


def test_the_page_is_whole_and_asks_for_nothing():
    page = render_page(full())
    seen = check(page).seen
    assert "<b>&" not in page
    assert seen.count("script") == 2
    assert seen.count("figure") == 5 + 2 + 3 + 2
    for value in ("1.23M", "346k", "2.250", "1.750", "1 min 01 s", "250 MB", "3 GFLOP", "77", "moesaic chat", "0.7"):
        assert value in page
    assert "class=best>2.250" in page
    assert "Jensen-Shannon" in page


def test_the_slider_carries_at_most_48_windows():
    page = render_page(full())
    match = re.search(r'id="loads">(.*?)</script>', page)
    assert match
    data = json.loads(match[1])
    assert len(data["steps"]) == len(data["ratios"]) <= 48
    assert data["steps"][-1] == "step 119"
    assert len(data["ratios"][0]) == 2
    assert sum(data["ratios"][0][0]) == pytest.approx(3, abs=0.01)


def test_parts_that_were_not_measured_are_left_out():
    page = render_page(ReportData(title="bare"))
    assert check(page).seen.count("section") == 0
    dense = render_page(ReportData(title="dense", models=(model("dense", held_out=(), training_loss=()),)))
    assert check(dense).seen.count("section") == 1
    silent = StepLoad(
        step=1,
        layers=(LayerLoad(layer=0, top_k=1, counts_E=np.zeros(2, np.int64), num_tokens=0, router_entropy=math.nan),),
    )
    check(render_page(ReportData(title="silent", loads=(silent,))))


def test_layers_may_have_different_numbers_of_experts():
    layers = tuple(
        LayerLoad(layer=i, top_k=1, counts_E=np.full(n, 9), num_tokens=9 * n, router_entropy=0.1)
        for i, n in enumerate((2, 5, 1))
    )
    check(render_page(ReportData(title="mixed", loads=(StepLoad(step=1, layers=layers),))))


def test_data_survives_json():
    text = json.dumps(full().to_json(), allow_nan=False)
    again = ReportData.from_json(json.loads(text))
    assert render_page(again) == render_page(full())
    with pytest.raises(DataError, match="not the data of a report"):
        ReportData.from_json({"title": "x"})


def test_writing_replaces_the_old_page_or_leaves_it(tmp_path: Path):
    path = tmp_path / "report.html"
    path.write_text("old")
    assert write_report(ReportData(title="new"), path) == path
    assert "new" in path.read_text(encoding="utf-8")
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(RunFolderError, match="cannot write"):
        write_report(ReportData(title="lost"), tmp_path / "absent" / "report.html")


def test_a_capacity_shows_its_gap_and_what_it_dropped():
    loads = tuple(
        StepLoad(step=step.step, layers=tuple(dataclasses.replace(layer, dropped_rows=13) for layer in step.layers))
        for step in (load(0), load(1))
    )
    page = render_page(
        ReportData(title="capacity", models=(model("MoE", capacity_gap=0.0417), model("dense")), loads=loads)
    )
    check(page)
    # 4 layers of 65, 65, 66 and 66 rows lost 13 each.
    assert "Capacity gap, bits per byte" in page and "0.042" in page and "capacity dropped 19.8%" in page
    assert "apacity" not in render_page(full())
    again = ReportData.from_json(json.loads(json.dumps(full().to_json())))
    assert math.isnan(again.models[0].capacity_gap)
    tree = full().to_json()
    for result in tree["models"]:
        del result["capacity_gap"]
    assert math.isnan(ReportData.from_json(tree).models[0].capacity_gap)
