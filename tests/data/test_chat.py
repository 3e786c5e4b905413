from datetime import datetime
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from moesaic.data.chat import render_chat
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import GenerationError

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}\n"
        "    {% if loop.first and message['role'] != 'system' %}\n"
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "    {% endif %}\n"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "tokens and json": "{{ bos_token }}{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ eos_token }}",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}!{% endfor %}",
    "tools and undefined names": "{% if tools %}T{% endif %}{{ nothing }}{% if documents is none %}D{% endif %}",
}
MESSAGES = [
    {"role": "user", "content": "Hello <b>&'\" é 日本"},
    {"role": "assistant", "content": "Hi.\n"},
    {"role": "user", "content": "Why?"},
]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(["some text"], 260).save(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_prompts_equal_those_of_transformers(
    oracle: PreTrainedTokenizerFast, name: str, add_generation_prompt: bool
) -> None:
    expected = oracle.apply_chat_template(
        MESSAGES, chat_template=TEMPLATES[name], add_generation_prompt=add_generation_prompt, tokenize=False
    )
    found = render_chat(
        TEMPLATES[name],
        MESSAGES,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        add_generation_prompt=add_generation_prompt,
    )
    assert found == expected


def test_the_date_comes_from_the_clock_that_is_handed_in() -> None:
    found = render_chat("{{ strftime_now('%d %b %Y') }}", MESSAGES, now=lambda: datetime(2026, 2, 3))
    assert found == "03 Feb 2026"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "this model has no chat template; continue plain text with `moesaic generate`"),
        (
            "{{ raise_exception('roles must alternate') }}",
            "the chat template refuses these messages: roles must alternate",
        ),
        ("x\n{% if %}", "the chat template is broken at line 2"),
        ("{{ messages[0].content + 1 }}", "the chat template failed .TypeError"),
        ("{{ messages.append(1) }}", "the chat template failed .SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "the chat template failed .SecurityError"),
        ("{{ absent.field }}", "the chat template failed .UndefinedError"),
        ("{{ range(10**9) | list }}", "the chat template failed .OverflowError"),
        ("{{ messages.__init__.__globals__ }}", "the chat template failed .SecurityError"),
        ("{{ strftime_now.__globals__['__builtins__'] }}", "the chat template failed .SecurityError"),
        ("{{ '{0.__class__.__mro__}'.format('x') }}", "the chat template failed .SecurityError"),
        ("{{ 'x' * 10**10 }}", "the chat template was stopped: it wrote more than 16,000,000 characters"),
        ("{{ 10 ** 1000000000 }}", "the chat template was stopped: it wrote more"),
        ("{{ '%1000000000d' % 1 }}", "the chat template was stopped: it wrote more"),
        ("{{ 'x'.ljust(1000000000) }}", "the chat template was stopped: it wrote more"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "the chat template failed .RecursionError"),
        (
            "{% set n = namespace(s='xxxx') %}{% for i in range(64) %}{% set n.s = n.s + n.s %}{% endfor %}",
            "the chat template was stopped: it wrote more",
        ),
        ("{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "the chat template was stopped: it wrote more"),
    ],
)
def test_bad_templates_are_one_line(template: str | None, message: str) -> None:
    with pytest.raises(GenerationError, match=message) as caught:
        render_chat(template, MESSAGES)
    assert "\n" not in str(caught.value)


def test_a_message_without_a_role() -> None:
    with pytest.raises(GenerationError, match='message 1 needs "role" and "content"; it has text'):
        render_chat("x", [MESSAGES[0], {"text": "hello"}])


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    ],
)
def test_a_template_that_never_ends(template: str) -> None:
    with pytest.raises(GenerationError, match=r"was stopped: it ran for more than 0\.05 s"):
        render_chat("{% set r = range(99999) %}" + template, MESSAGES, time_s=0.05)


def test_loops_that_are_counted_know_their_place() -> None:
    inside = "{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ loop.nextitem is defined }} "
    found = render_chat("{% for m in messages %}" + inside + "{% endfor %}", MESSAGES)
    assert found == "1/3FalseTrue 2/3FalseTrue 3/3TrueFalse "


@pytest.mark.parametrize("words", ["So it", "  So it ", "Hi.\n"])
def test_a_final_message_to_continue(oracle: PreTrainedTokenizerFast, words: str) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": words}]
    for template in (
        TEMPLATES["chatml"],
        TEMPLATES["chatml"].replace("message['content']", "message['content'] | trim"),
    ):
        expected = oracle.apply_chat_template(
            messages, chat_template=template, continue_final_message=True, tokenize=False
        )
        assert render_chat(template, messages, continue_final_message=True) == expected


def test_tools_documents_and_variables(oracle: PreTrainedTokenizerFast) -> None:
    template = "{{ tools | tojson }}{{ documents | tojson }}{{ enable_thinking }}"
    tools: list[Any] = [
        {"type": "function", "function": {"name": "now", "description": "é", "parameters": {"type": "object"}}}
    ]
    documents = [{"title": "t", "text": "x"}]
    expected = oracle.apply_chat_template(
        MESSAGES, tools=tools, documents=documents, chat_template=template, tokenize=False, enable_thinking=False
    )
    found = render_chat(template, MESSAGES, tools=tools, documents=documents, variables={"enable_thinking": False})
    assert found == expected


def test_variables_cannot_stand_in_for_the_messages() -> None:
    with pytest.raises(GenerationError, match="messages is no variable"):
        render_chat("x", MESSAGES, variables={"messages": []})
