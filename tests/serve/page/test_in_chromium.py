"""The server's page in a real browser: what is said, shown and asked for, by pointer and by keys alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from moesaic.serve.http.app import create_app
from moesaic.serve.served import Models, Served
from tests.chromium import background, launched, opened
from tests.serve import tiny
from tests.serve.page.scripted import LAYERS, Script, scripted_app, serving

pytestmark = pytest.mark.slow

# Chromium itself tells its console of every answer that is an error.
REFUSED = "Failed to load resource: the server responded with a status of"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as found:
        yield found


@contextmanager
def chat(browser: Any, script: Script, scheme: str = "light", **options: Any) -> Iterator[Any]:
    """The page, when it knows the model."""
    with serving(scripted_app(script)) as url, opened(browser, url, scheme, **options) as page:
        if script.key is None:
            page.wait_for_selector("#model:enabled")
        yield page


def ask(page: Any, text: str) -> None:
    page.locator("#prompt").fill(text)
    page.keyboard.press("Enter")


def answered(page: Any, text: str = "") -> Any:
    """The last answer, once it is complete."""
    page.wait_for_selector(f".message.assistant:last-of-type:not(.writing) .facts:text('{text}')")
    return page.locator(".message.assistant").last


def test_an_answer_appears_as_it_is_written(browser):
    script = Script()
    script.pieces, script.hold_from = ["Some ", "**bold**", " words"], 2
    with chat(browser, script) as page:
        ask(page, "hello")
        page.wait_for_selector(".message.assistant.writing strong:text('bold')")
        assert page.locator(".message.assistant .body").inner_text() == "Some bold"
        assert page.locator("#send").is_hidden()
        script.go.set()
        assert answered(page, "3 tokens").locator(".body").inner_text() == "Some bold words"
        assert page.locator("#stop").is_hidden()
        assert page.locator("#said").inner_text() == "the answer is complete"
    sent = script.asked[0]
    assert sent["messages"] == [{"role": "user", "content": "hello"}]
    assert sent["model"] == "scripted" and sent["stream"] and sent["experts"]
    assert not {"temperature", "top_p", "seed", "max_tokens"} & sent.keys()


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_leaves_what_there_is_and_the_server_hears_it(browser, how):
    script = Script()
    script.pieces, script.hold_from = ["begun ", "never"], 1
    with chat(browser, script) as page:
        ask(page, "hello")
        page.wait_for_selector(".message.assistant.writing .body:has-text('begun')")
        if how == "button":
            page.locator("#stop").click()
        else:
            page.keyboard.press("Escape")
        answer = answered(page, "stopped")
        assert answer.locator(".body").inner_text().strip() == "begun"
        assert script.left.wait(10)
        script.pieces, script.hold_from = ["again"], None
        answer.locator("button", has_text="Again").click()
        page.wait_for_selector(".message.assistant:not(.writing) .body:has-text('again')")
        assert page.locator(".message").count() == 2


def test_the_conversation_goes_on_is_kept_changed_and_cleared(browser):
    script = Script()
    with chat(browser, script) as page:
        ask(page, "first")
        answered(page, "tokens")
        ask(page, "second")
        page.wait_for_selector(".message.assistant:nth-of-type(4):not(.writing) .facts:text('tokens')")
        assert [message["content"] for message in script.asked[1]["messages"]] == ["first", "Hello there.", "second"]
        page.reload()
        page.wait_for_selector("#model:enabled")
        assert page.locator(".message").count() == 4
        page.locator("#prompt").focus()
        page.keyboard.press("ArrowUp")
        assert page.evaluate("document.activeElement.value") == "second"
        page.keyboard.press("Escape")
        page.locator(".message.user").first.locator("button", has_text="Edit").click()
        page.keyboard.press("Control+A")
        page.keyboard.type("other")
        page.keyboard.press("Enter")
        page.wait_for_selector(".message.assistant:nth-of-type(2):not(.writing) .facts:text('tokens')")
        assert page.locator(".message").count() == 2
        assert [message["content"] for message in script.asked[-1]["messages"]] == ["other"]
        page.locator("#new").click()
        assert page.locator(".message").count() == 0 and page.locator(".welcome").is_visible()
        page.reload()
        page.wait_for_selector(".welcome")


def test_choices_are_sent_and_kept(browser):
    script = Script()
    script.names = ["one", "two"]
    with chat(browser, script) as page:
        page.locator("#model").select_option("two")
        page.locator("#settings summary").click()
        page.locator("#system").fill("Be brief.")
        values = {
            "temperature": "0.7",
            "top_p": "0.9",
            "top_k": "40",
            "min_p": "0.05",
            "max_tokens": "99",
            "seed": "-3",
        }
        for name, value in values.items():
            page.locator(f"#fields [name={name}]").fill(value)
        page.locator("#want-experts").uncheck()
        page.reload()
        page.wait_for_selector("#model:enabled")
        ask(page, "hello")
        answered(page, "tokens")
        sent = script.asked[0]
        assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
        assert {name: sent[name] for name in values} == {name: float(value) for name, value in values.items()}
        assert sent["model"] == "two" and "experts" not in sent
        page.locator("#fields [name=top_p]").fill("7")  # impossible: not sent
        page.locator("#fields [name=seed]").fill("")
        ask(page, "more")
        page.wait_for_selector(".message.assistant:nth-of-type(4) .facts:text('tokens')")
        assert "top_p" not in script.asked[1] and "seed" not in script.asked[1]


def test_tokens_are_coloured_by_the_experts_of_a_layer(browser):
    script = Script()
    script.pieces = [f"word{place} " for place in range(8)]
    with chat(browser, script) as page:
        page.wait_for_selector("#experts:visible")
        ask(page, "hello")
        answered(page, "tokens").locator("button", has_text="Experts").click()
        tokens = page.locator(".tokens span")
        assert tokens.count() == 8
        hues = "spans => spans.map((span) => span.style.getPropertyValue('--hue'))"
        page.locator("#layer").select_option("0")
        first = tokens.evaluate_all(hues)
        assert first == [f"{(place * 137.508) % 360:.1f}" for place in range(8)]
        assert len(set(tokens.evaluate_all("spans => spans.map((s) => getComputedStyle(s).backgroundColor)"))) == 8
        page.locator("#layer").select_option("1")
        assert tokens.evaluate_all(hues)[:7] == first[1:]
        tokens.nth(2).hover()
        assert page.locator("#tip").inner_text() == "layer 1: experts 3, 10"
        assert page.locator("#token li").count() == LAYERS
        assert page.locator("#token li").nth(5).inner_text().split() == ["5", "7,", "6"]
        page.locator("#map").click(position={"x": 40, "y": 2})  # layer 0, expert 0: its tokens alone
        assert page.locator("#layer").input_value() == "0"
        bright = [place for place in range(8) if "dim" not in (tokens.nth(place).get_attribute("class") or "")]
        assert bright == [0]


def test_the_page_by_keys_alone(browser):
    script = Script()
    with chat(browser, script) as page:
        page.wait_for_selector("#experts:visible")
        assert page.evaluate("document.activeElement.id") == "prompt"
        page.keyboard.type("hello")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("you")
        page.keyboard.press("Enter")
        answered(page, "tokens")
        assert script.asked[0]["messages"][0]["content"] == "hello\nyou"
        page.keyboard.type("?e")  # in a field a key is a character
        assert page.locator("#prompt").input_value() == "?e"
        page.locator("#log").focus()
        page.keyboard.press("?")
        page.wait_for_selector("#help-box[open]")
        assert page.locator("#keys dt").count() > 8
        page.keyboard.press("Escape")
        page.wait_for_selector("#help-box", state="hidden")
        page.keyboard.press("e")
        page.locator(".tokens").focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        assert page.locator(".tokens span.chosen").inner_text() == " there"
        layer = int(page.locator("#layer").input_value())
        page.keyboard.press("]")
        assert int(page.locator("#layer").input_value()) == layer + 1
        page.locator("#map").focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowRight")
        assert page.locator("#map-cell").inner_text().startswith("layer 1, expert 1: ")
        page.keyboard.press("Enter")
        assert page.locator("#layer").input_value() == "1"
        page.keyboard.press("r")
        page.wait_for_selector(".message.assistant:not(.writing) .facts:text('tokens')")
        assert len(script.asked) == 2
        page.keyboard.press("?")
        page.locator("#single-keys").uncheck()
        page.keyboard.press("Escape")
        page.locator("#log").focus()
        page.keyboard.press("n")
        assert page.locator(".message").count() == 2
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement !== document.body")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_map_and_the_strip_are_drawn_in_both_schemes(browser, scheme):
    with chat(browser, Script(), scheme) as page:
        page.wait_for_selector("#experts:visible")
        assert (max(background(page)) < 60) == (scheme == "dark")
        drawn = "c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
        assert page.locator("#map").evaluate(drawn) > 20
        page.wait_for_selector("#strip[width]")
        page.locator("#map").hover(position={"x": 200, "y": 30})
        assert "× its fair share" in page.locator("#tip").inner_text()
        assert "25 %" in page.locator("#tiles").inner_text()
        for width in (1280, 901, 900, 390, 320):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), width


def test_a_phone_shows_one_side_at_a_time(browser):
    with chat(browser, Script(), viewport={"width": 390, "height": 800}, has_touch=True) as page:
        assert page.locator("#prompt").is_visible() and page.locator("#tiles").is_hidden()
        page.locator("#view-experts").tap()
        page.wait_for_selector("#map:visible")
        assert page.locator("#prompt").is_hidden()
        page.wait_for_selector("#map[width]")
        assert page.locator("#map").evaluate("map => map.width") > 200
        page.locator("#view-chat").tap()
        assert page.locator("#prompt").is_visible()


EVIL = "<img src=x onerror=\"window.evil=1\"><script>window.evil=1</script><svg onload='window.evil=1'>"
EVIL_MARKDOWN = [
    EVIL,
    f"\n```{EVIL}\n{EVIL}\n```\n",
    f"\n\n- {EVIL}\n  - `{EVIL}`\n\n| {EVIL} |\n|---|\n| {EVIL} |\n\n> {EVIL}\n\n# {EVIL}\n\n**{EVIL}** _{EVIL}_",
    "\n\n[a](javascript:window.evil=1) [b](data:text/html,<script>window.evil=1</script>) ![c](http://example.com/x.png)",
]


def test_what_models_and_names_say_is_never_markup(browser):
    script = Script()
    script.names, script.pieces, script.reasoning = [EVIL], EVIL_MARKDOWN, EVIL
    with chat(browser, script) as page:
        ask(page, EVIL)
        answer = answered(page, "tokens")
        assert EVIL in answer.locator("h3").first.inner_text()
        assert answer.locator(".body").inner_text().count("<img src=x") == 10
        for tag in ("pre", "ul ul", "table", "blockquote", "h4", "strong", "em"):
            assert answer.locator(f".body {tag}").count() == 1, tag
        answer.locator("button", has_text="Experts").click()
        page.reload()
        page.wait_for_selector(".message.assistant")
        assert page.evaluate("window.evil") is None
        assert page.locator("main :is(script, svg, img, iframe)").count() == 0
        links = page.locator(".message a").evaluate_all("links => links.map((link) => link.href)")
        assert links == ["http://example.com/x.png"]  # only those; the picture itself is not asked for


def test_errors_are_told_and_the_next_try_works(browser):
    script = Script()
    script.error = {"message": f"temperature=9; use 0 to 2 {EVIL}", "code": "invalid_value"}
    with serving(scripted_app(script)) as url:
        context = browser.new_context()
        page = context.new_page()
        page.goto(url)
        page.wait_for_selector("#model:enabled")
        ask(page, "hello")
        page.wait_for_selector(".trouble:text('temperature=9; use 0 to 2')")
        script.error = None
        page.locator("button", has_text="Again").click()
        answered(page, "tokens")
        assert page.locator(".trouble:visible").count() == 0
        context.close()


def test_a_key_is_asked_for_and_forgotten_with_the_tab(browser):
    script = Script()
    script.key = "secret"
    with serving(scripted_app(script)) as url:
        context = browser.new_context()
        page = context.new_page()
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(url)
        page.wait_for_selector("#ask-key:visible")
        page.locator("#key").fill("wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key-note:text('does not take this key')")
        page.locator("#key").fill("secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#ask-key", state="hidden")
        page.wait_for_selector("#experts:visible")
        ask(page, "hello")
        answered(page, "tokens")
        assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
        assert all(text.startswith(REFUSED) for text in complaints)
        other = context.new_page()
        other.goto(url)
        other.wait_for_selector("#ask-key:visible")
        context.close()


def test_a_dense_model_says_that_it_has_no_experts(browser):
    script = Script()
    script.dense = True
    with chat(browser, script) as page:
        page.wait_for_selector("#no-experts:text('This model is dense')")
        assert page.locator("#experts").is_hidden()
        ask(page, "hello")
        answered(page, "tokens")
        assert "experts" not in script.asked[0]


def test_a_model_without_a_template_goes_on_with_the_text(browser):
    script = Script()
    script.template = False
    with serving(scripted_app(script)) as url:
        context = browser.new_context()
        page = context.new_page()
        page.goto(url)
        page.wait_for_selector("#model:enabled")
        ask(page, "Once upon")
        assert answered(page, "tokens").locator(".body").inner_text() == "Hello there."
        assert (script.asked[-1]["prompt"], script.asked[-1]["max_tokens"]) == ("Once upon", 256)
        page.wait_for_selector("#mode:text('no chat template')")
        ask(page, " And then")
        page.wait_for_selector(".message.assistant:nth-of-type(4) .facts:text('tokens')")
        assert script.asked[-1]["prompt"] == "Once uponHello there. And then"
        assert len(script.asked) == 3  # the template is not asked for again
        context.close()


def test_a_long_answer_does_not_slow_the_page(browser):
    """What the last tokens of a long answer change on the page is no more than what the first did."""
    script = Script()
    paragraph = ["A ", "para", "graph ", "of ", "some ", "words, ", "`code` ", "and ", "**more**", ".\n\n"]
    script.pieces = paragraph * 400
    watch = """() => {
        window.changed = [];
        new MutationObserver((list) => window.changed.push(list.reduce((n, m) => n + m.addedNodes.length, 0)))
            .observe(document.querySelector('#log'), { childList: true, subtree: true });
    }"""
    with chat(browser, script) as page:
        page.evaluate(watch)
        ask(page, "hello")
        answered(page, "4000 tokens")
        assert page.locator(".message.assistant .body p").count() == 400
        changed = page.evaluate("window.changed")
        # Blocks once shown stay: in all, each paragraph is made a few times, not hundreds of times.
        assert sum(changed) < 4000 * 8


def test_with_a_model_of_its_own(browser):
    """The whole way: a served model, its chat, its experts, its live load."""
    model = Served.of_engine("tiny", tiny.engine(), tiny.tokenizer())
    with serving(create_app(Models([model]))) as url, opened(browser, url) as page:
        page.wait_for_selector("#experts:visible")
        page.locator("#settings summary").click()
        page.locator("#fields [name=max_tokens]").fill("24")
        ask(page, "the quick brown fox")
        answer = answered(page, "24 tokens")
        assert answer.locator("h3").first.inner_text() == "tiny"
        answer.locator("button", has_text="Experts").click()
        assert page.locator(".tokens span").count() == 24
        assert page.locator(".tokens span.none").count() == 0
        page.locator("#layer").select_option("1")
        page.locator(".tokens").focus()
        page.keyboard.press("ArrowRight")
        ids = page.locator("#token li.here span").nth(1).inner_text().split(", ")
        assert len(set(ids)) == 2 and all(0 <= int(expert) < 5 for expert in ids)
        total = model.routing.total() if model.routing else None
        assert total is not None and total.steps >= 24
        # The newest window is told within half a second of the last token.
        page.wait_for_selector(f"#tiles:has-text('{total.tokens} tok')")
