"""The pages in a real browser: drawn, answering to pointer and keys, in light and dark, asking nobody else.

Needs Chromium and the package playwright (only to drive it; it brings no browser here).
"""

import shutil
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
from tests.telemetry.inspection.known import known_trace, tokenizer
from tests.telemetry.watching.lines import append, line, run_folder

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with api.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@contextmanager
def opened(browser: Any, url: str, scheme: str = "light") -> Iterator[Any]:
    """A page that must neither complain nor ask anybody but the place that it is from."""
    context = browser.new_context(color_scheme=scheme, viewport={"width": 1280, "height": 900})
    page, complaints, asked = context.new_page(), [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.set_default_timeout(20_000)
    page.goto(url)
    yield page
    assert complaints == []
    own = url.rsplit("/", 1)[0] + "/"
    assert asked and all(each.startswith(own) for each in asked)
    context.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder, texts = tmp_path_factory.mktemp("report"), TokenTexts(tokenizer())
    left, right = known_trace(folder / "a.npz"), known_trace(folder / "b.npz", seed=3)
    write_page(Inspection(subjects=[subject_of("one", "a", left, texts)]), folder / "one.html")
    two = [subject_of("one", "a", left, texts), subject_of("other", "b", right, texts)]
    write_page(Inspection(subjects=two, agreement=agree(["b"], [right], left)), folder / "two.html")
    return folder


def background(page: Any) -> list[int]:
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return [int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]


def test_the_report_answers_to_pointer_and_keys(browser, report):
    with opened(browser, (report / "one.html").as_uri()) as page:
        assert page.locator("#load rect[data-at]").count() == 12
        # The layer that goes by domain is looked at first.
        assert page.locator("#choose-layer").evaluate("e => e.selectedOptions[0].text") == "0"
        page.locator("#load rect[data-at='2,1']").hover()
        assert "layer 5, expert" in page.locator("#tip").inner_text()
        page.locator("#load rect[data-at='1,0']").click()
        assert page.locator("#card h3").inner_text().startswith("Layer 2, expert")
        page.locator("#load svg").press("ArrowDown")
        assert page.locator("#card h3").inner_text().startswith("Layer 5, expert")
        assert page.evaluate("document.activeElement.closest('#load') !== null")
        page.locator("#choose-layer").select_option(label="0")
        page.locator("#choose-expert").select_option("3")
        assert page.locator("#card h3").inner_text() == "Layer 0, expert 3"
        assert "2.0×" in page.locator("#card .row", has_text="prose").inner_text()
        page.locator("#choose-domain").select_option(label="prose")
        assert page.locator("#texts .sample").count() == 1
        page.locator("#query").fill("dog")
        assert "dog" in "".join(page.locator("#texts .token:not(.dim)").all_inner_texts())
        assert page.locator("#texts .token.dim").count() > 0
        page.locator("#query").fill("o")
        assert all("o" in text for text in page.locator("#ways tbody th").all_inner_texts())
        page.locator("#query").fill("")
        page.locator("#texts .token").first.hover()
        assert "experts 2, 3" in page.locator("#tip").inner_text()
        page.locator("#only").check()
        assert page.locator("#texts .token.dim").count() == 0  # all of prose goes to 2 and 3
        page.locator("#grouped").uncheck()
        labels = page.locator("#company svg text.tick").all_text_contents()
        assert labels[:4] == ["0", "1", "2", "3"]
        page.locator("svg.chart").first.focus()
        page.keyboard.press("ArrowLeft")
        assert "layer: " in page.locator("#tip").inner_text()


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
