"""Figures of load tests that were made up, and their pictures."""

import io
import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from moesaic.serve.loadtest import plot
from moesaic.serve.loadtest.asking import Asked
from moesaic.serve.loadtest.driving import Progress
from moesaic.serve.loadtest.summary import summarize
from moesaic.serve.loadtest.view import block_of, line_of


def asked(number: int, error: str | None = None) -> Asked:
    start = number * 0.5
    gaps = [0.1 + 0.001 * number] * 9
    first = start + 0.2
    return Asked(start, first, first + sum(gaps), gaps, prompt_tokens=50, output_tokens=10, error=error)


EVERYTHING = [asked(number, "429" if number % 10 == 9 else None) for number in range(50)]


def test_percentiles_are_numpys() -> None:
    found = summarize(EVERYTHING)
    gaps = [gap for each in EVERYTHING if each.error is None for gap in each.gaps_s]
    assert found.inter_token_s.percentiles[95] == pytest.approx(np.percentile(gaps, 95))
    assert found.first_token_s.mean == pytest.approx(0.2)
    assert (found.completed, found.errors, found.output_tokens) == (45, {"429": 5}, 450)
    assert found.seconds == pytest.approx(max(each.ended_s for each in EVERYTHING))
    assert found.output_tokens_per_s == pytest.approx(450 / found.seconds)
    assert json.loads(json.dumps(found.to_dict()))["end_to_end_s"]["p50"] > 1


def test_of_nothing_there_are_no_figures() -> None:
    found = summarize([]).to_dict()
    assert found["first_token_s"]["p50"] is None and found["output_tokens_per_s"] == 0


@pytest.mark.parametrize("requests", [EVERYTHING, EVERYTHING[:1], []], ids=["many", "one", "none"])
def test_pictures_stand_alone(requests: list[Asked], tmp_path) -> None:
    for name in ("load.svg", "load.html"):
        plot.write(tmp_path / name, "a <test>", requests)
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert text.count('class="chart"') + text.count('class="empty"') == 5
        assert "a &lt;test&gt;" in text and "http:" not in text.replace("http://www.w3.org/2000/svg", "")
    ElementTree.fromstring((tmp_path / "load.svg").read_text(encoding="utf-8"))


def test_the_live_view_says_how_it_goes() -> None:
    from rich.console import Console

    progress = Progress()
    progress.done, progress.running = list(EVERYTHING), 4
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(block_of(progress))
    text = console.export_text()
    assert "45 answered, 4 running, errors: 5 × 429" in text
    assert "first token p50 200 ms" in line_of(progress)
