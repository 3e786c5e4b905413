"""Conversations by the templates of published models."""

import json
from typing import Any

import pytest

from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import GenerationError
from moesaic.serve.request import Grammar
from moesaic.serve.text.dialogue import Dialogue, Prepared, Speaker
from moesaic.serve.tools.parts import Tool
from tests.serve import tiny

QWEN3_LIKE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    'Write <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call><|im_end|>\n{% endif %}'
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
R1_LIKE = QWEN3_LIKE.replace("<|im_start|>assistant\n{% if enable", "<|im_start|>assistant\n<think>\n{% if enable")
DEEPSEEK_LIKE = (
    "{% for message in messages %}{% if message['content'] is none %}{% for tool in message['tool_calls'] %}"
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{{ tool['type'] + '<｜tool▁sep｜>' + tool['function']['name']"
    " + '\n```json\n' + tool['function']['arguments'] + '\n```<｜tool▁call▁end｜>' }}{% endfor %}{% else %}"
    "<{{ message.role }}>{{ message['content'] }}{% endif %}{% endfor %}<assistant>"
)
NOW = Tool("now", "the time", {"type": "object", "properties": {"zone": {"type": "string"}}, "required": ["zone"]})
USER = {"role": "user", "content": "Time?"}
CALL = {"id": "c", "type": "function", "function": {"name": "now", "arguments": {"zone": "UTC"}}}
CALLED = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "noon"},
]


def speaker(template: str) -> Speaker:
    return Speaker(Tokenizer(tiny.tokenizer().backend, chat_template=template))


def prepared(template: str, grammar: Grammar | None = None, **more: Any) -> Prepared:
    return speaker(template).prepare(Dialogue(**{"messages": [USER], **more}), grammar, 5)


def prompt(found: Prepared) -> str:
    return tiny.tokenizer().decode(found.prompt_ids, skip_special_tokens=False)


def test_tools_go_to_a_template_that_knows_them() -> None:
    text = prompt(prepared(QWEN3_LIKE, tools=[NOW], messages=CALLED))
    assert json.dumps(NOW.to_dict()) in text
    assert '<tool_call>\n{"name": "now", "arguments": {"zone": "UTC"}}\n</tool_call>' in text


def test_arguments_are_text_for_a_template_that_adds_them_to_text() -> None:
    text = prompt(prepared(DEEPSEEK_LIKE, messages=CALLED))
    assert 'now\n```json\n{"zone": "UTC"}\n```' in text


def test_tools_are_described_to_a_template_that_knows_none() -> None:
    text = prompt(prepared(tiny.TEMPLATE, tools=[NOW], messages=CALLED))
    assert text.startswith("<|im_start|>system\n# Tools") and '"name": "now"' in text
    assert '<tool_call>\n{"name": "now", "arguments": {"zone": "UTC"}}\n</tool_call>' in text
    assert "<|im_start|>user\n<tool_response>\nnoon\n</tool_response>" in text


def test_tools_that_must_not_be_called_are_not_mentioned() -> None:
    found = prepared(QWEN3_LIKE, tools=[NOW], choice="none")
    assert "tool_call" not in prompt(found) and not found.reads_calls


def test_developers_are_the_system_where_the_template_knows_none() -> None:
    assert "<|im_start|>system\nBe" in prompt(
        prepared(tiny.TEMPLATE, messages=[{"role": "developer", "content": "Be"}])
    )


@pytest.mark.parametrize(("template", "is_open"), [(QWEN3_LIKE, False), (R1_LIKE, True)])
def test_thoughts_that_the_prompt_opens(template: str, is_open: bool) -> None:
    found = prepared(template)
    assert found.marks is not None and found.is_open is is_open


def test_thoughts_that_the_prompt_closes() -> None:
    assert not prepared(QWEN3_LIKE, variables={"enable_thinking": False}).is_open


def test_an_answer_of_a_schema_comes_behind_open_thoughts() -> None:
    schema = Grammar("json_schema", '{"type": "integer"}')
    assert prepared(QWEN3_LIKE, schema).grammar == schema
    behind = prepared(R1_LIKE, schema).grammar
    assert behind is not None and behind.kind == "lark" and "thoughts" in behind.text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tools": [NOW, NOW]}, "two tools are named 'now'"),
        ({"tools": [NOW], "choice": "required", "called": "then"}, "'then' is to be called"),
        ({"choice": "required"}, "there are none"),
        ({"continue_final_message": True, "messages": [{"role": "user", "content": ""}]}, "no final message"),
    ],
)
def test_what_cannot_be(more: dict[str, Any], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        prepared(QWEN3_LIKE, **more)


def test_a_model_without_a_template() -> None:
    with pytest.raises(GenerationError, match="no chat template"):
        prepared("")
