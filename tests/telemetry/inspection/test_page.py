import json
import re
from html.parser import HTMLParser

import pytest

from moesaic.errors import RunFolderError
from moesaic.telemetry.inspection.inspection import Inspection, agree, subject_of
from moesaic.telemetry.inspection.page import render, write_page
from moesaic.telemetry.inspection.tokens import TokenTexts
from tests.telemetry.inspection.known import known_trace, tokenizer


@pytest.fixture(scope="module")
def inspection(tmp_path_factory) -> Inspection:
    folder, texts = tmp_path_factory.mktemp("page"), TokenTexts(tokenizer())
    left, right = known_trace(folder / "a.npz"), known_trace(folder / "b.npz", seed=2)
    subjects = [subject_of("</script><b>", "a", left, texts), subject_of("b & co", "b", right, texts)]
    way = agree(["step 10", "step 20"], [right, left], left)
    return Inspection(subjects=subjects, agreement=agree(["b"], [right], left), saturation=way)


class _Links(HTMLParser):
    """Everything in a page that could make a browser ask for something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")]
        self.ids += [value or "" for name, value in attrs if name == "id"]


def test_the_page_asks_nobody_and_escapes_names(inspection):
    page = render(inspection, [("text", "<folder>")])
    links = _Links()
    links.feed(page)
    assert links.found == ["data:,"]
    assert len(set(links.ids)) == len(links.ids)
    assert "http://" not in page.replace("http://www.w3.org", "") and "@import" not in page
    assert "Content-Security-Policy" in page
    assert "<b>" not in re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert "&lt;folder&gt;" in page
    payload = re.search(r'id="inspection">(.*?)</script>', page, re.S)
    assert payload is not None
    assert json.loads(payload[1])["subjects"][0]["name"] == "</script><b>"


def test_the_page_has_its_curves_and_numbers_without_a_script(inspection):
    page = render(inspection)
    for part in ("Saturation", "Choices that both make", "What experts go by", "The numbers", "<noscript>"):
        assert part in page
    alone = render(Inspection(subjects=inspection.subjects[:1]))
    assert "How far routers agree" not in alone and 'class="sides two"' not in alone


def test_a_page_that_cannot_be_written_leaves_nothing_behind(inspection, tmp_path):
    write_page(inspection, tmp_path / "new" / "page.html")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="choose another place with --out"):
        write_page(inspection, tmp_path / "file" / "page.html")
