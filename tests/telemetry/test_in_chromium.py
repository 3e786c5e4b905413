"""The pages in a real browser: drawn, answering to pointer and keys, in light and dark, asking nobody else.

Needs Chromium and the package playwright (only to drive it; it brings no browser here).
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from moesaic.telemetry.inspection.inspection import Inspection, agree, subject_of
from moesaic.telemetry.inspection.page import write_page
from moesaic.telemetry.inspection.tokens import TokenTexts
from moesaic.telemetry.watching.run import WatchedRun
from moesaic.telemetry.watching.server import WatchServer
from tests.chromium import background, launched, opened
from tests.telemetry.inspection.known import known_trace, tokenizer
from tests.telemetry.watching.lines import append, line, run_folder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder, texts = tmp_path_factory.mktemp("report"), TokenTexts(tokenizer())
    left, right = known_trace(folder / "a.npz"), known_trace(folder / "b.npz", seed=3)
    write_page(Inspection(subjects=[subject_of("one", "a", left, texts)]), folder / "one.html")
    two = [subject_of("one", "a", left, texts), subject_of("other", "b", right, texts)]
    write_page(Inspection(subjects=two, agreement=agree(["b"], [right], left)), folder / "two.html")
    return folder


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["one.html", "two.html"])
def test_the_report_in_both_schemes(browser, report, scheme, name):
    with opened(browser, (report / name).as_uri(), scheme) as page:
        assert (max(background(page)) < 60) == (scheme == "dark")
        sides = 2 if name == "two.html" else 1
        assert page.locator("#card .card").count() == sides
        assert page.locator("#domains svg.heat").count() == sides
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.set_viewport_size({"width": 390, "height": 800})
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@contextmanager
def watched(folder: Path) -> Iterator[str]:
    with WatchServer(WatchedRun(folder)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_live_page_follows_a_run(browser, tmp_path, scheme):
    folder = run_folder(tmp_path / "run", steps=12)
    with watched(folder) as url, opened(browser, url, scheme) as page:
        page.wait_for_selector("#status.waiting")
        assert (max(background(page)) < 60) == (scheme == "dark")
        append(folder, *(line(step) for step in range(1, 9)))
        page.wait_for_selector("#heats canvas")
        assert page.locator("#heats canvas").count() == 2
        assert "8\nof 12" in page.locator("#tiles").inner_text()
        canvas = page.locator("#heats canvas").first
        canvas.scroll_into_view_if_needed()
        canvas.hover()
        assert "× the fair share" in page.locator("#tip").inner_text()
        drawn = "c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
        assert canvas.evaluate(drawn) > 4
        page.locator("#loss svg.chart").focus()
        page.keyboard.press("ArrowLeft")
        assert "4.93" in page.locator("#tip").inner_text()
        append(folder, *(line(step) for step in range(9, 13)))
        page.wait_for_selector("#status.finished")
        # Taken up again from a checkpoint: the later steps are forgotten.
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        (folder / "metrics.jsonl").write_text("".join(lines[:6]))
        page.wait_for_selector("#status:has-text('taken up again')")
        assert "6\nof 12" in page.locator("#tiles").inner_text()
