"""Our pages in a real browser, which must neither complain nor ask anybody but the server that they are from."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def launched() -> Iterator[Any]:
    """Chromium, driven by playwright; skips the test where either is missing."""
    api = pytest.importorskip(
        "playwright.sync_api", reason="playwright, which the extra dev brings, drives the browser"
    )
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine; wherever one is installed, these tests run")
    with api.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@contextmanager
def opened(browser: Any, url: str, scheme: str = "light", **options: Any) -> Iterator[Any]:
    """A page at a URL. options: of the browser's context."""
    context = browser.new_context(**{"color_scheme": scheme, "viewport": {"width": 1280, "height": 900}, **options})
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


def background(page: Any) -> list[int]:
    """Its colour, as red, green and blue."""
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return [int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
