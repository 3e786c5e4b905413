"""The formats of tool calls, by name, and which of them a chat template writes."""

import secrets
import string
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from moesaic.registry import Registry
from moesaic.serve.tools import marked_calls, xml_calls
from moesaic.serve.tools.harmony import harmony
from moesaic.serve.tools.llama4 import llama4
from moesaic.serve.tools.parts import Parts, Tool
from moesaic.serve.tools.source import Source
from moesaic.serve.tools.spelling import Spelled, argument_call, json_call, named_call


def _any_id(name: str, number: int) -> str:
    return f"call_{secrets.token_hex(12)}"


def _nine_characters(name: str, number: int) -> str:
    """Mistral's templates refuse any other."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class Format(NamedTuple):
    """How calls are written.

    parse: reads them. spelled: writes one, for a grammar; opening, between, closing: what stands around them there.
    marks: what a template of this format holds, all of it. call_id: for a call by its name and number.
    """

    parse: Callable[[Source, Sequence[Tool]], Parts]
    spelled: Spelled
    marks: tuple[str, ...]
    opening: str = ""
    between: str = "\n"
    closing: str = ""
    call_id: Callable[[str, int], str] = _any_id


# In the order in which templates are asked: those with the most particular marks first.
FORMATS: Registry[Format] = Registry("tool call format")
GENERIC = "hermes"

FORMATS.register("harmony")(
    Format(
        harmony,
        named_call("<|channel|>commentary to=functions.", " <|constrain|>json<|message|>", "<|call|>"),
        ("<|channel|>", "<|message|>"),
        between="<|start|>assistant",
    )
)
FORMATS.register("minimax")(
    Format(
        partial(xml_calls.parse, style=xml_calls.MINIMAX),
        argument_call(
            '<invoke name="NAME">\n', lambda name, _: f'<parameter name="{name}">', "</parameter>\n", "</invoke>\n"
        ),
        ("<minimax:tool_call>",),
        opening="<minimax:tool_call>\n",
        between="",
        closing="</minimax:tool_call>",
    )
)


def _dsml(block: str) -> Format:
    return Format(
        partial(xml_calls.parse, style=xml_calls.dsml(block)),
        argument_call(
            '<｜DSML｜invoke name="NAME">\n',
            lambda name, is_text: f'<｜DSML｜parameter name="{name}" string="{str(is_text).lower()}">',
            "</｜DSML｜parameter>\n",
            "</｜DSML｜invoke>\n",
        ),
        (f"｜DSML｜{block}",),
        opening=f"<｜DSML｜{block}>\n",
        between="",
        closing=f"</｜DSML｜{block}>",
    )


FORMATS.register("deepseek_v32")(_dsml("function_calls"))
FORMATS.register("deepseek_v4")(_dsml("tool_calls"))
FORMATS.register("deepseek_v3")(
    Format(
        marked_calls.deepseek,
        named_call("<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```json\n", "\n```<｜tool▁call▁end｜>"),
        ("<｜tool▁call▁begin｜>", "```json"),
        opening="<｜tool▁calls▁begin｜>",
        closing="<｜tool▁calls▁end｜>",
    )
)
FORMATS.register("deepseek_v31")(
    Format(
        marked_calls.deepseek,
        named_call("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
        ("<｜tool▁call▁begin｜>",),
        opening="<｜tool▁calls▁begin｜>",
        between="",
        closing="<｜tool▁calls▁end｜>",
    )
)
FORMATS.register("kimi")(
    Format(
        marked_calls.kimi,
        named_call("<|tool_call_begin|>functions.", ":0<|tool_call_argument_begin|>", "<|tool_call_end|>"),
        ("<|tool_calls_section_begin|>",),
        opening="<|tool_calls_section_begin|>",
        between="",
        closing="<|tool_calls_section_end|>",
        call_id=lambda name, number: f"functions.{name}:{number}",
    )
)
FORMATS.register("mistral_args")(
    Format(
        marked_calls.mistral,
        named_call("[TOOL_CALLS]", "[ARGS]", ""),
        ("[TOOL_CALLS]", "[ARGS]"),
        between="",
        call_id=_nine_characters,
    )
)
FORMATS.register("mistral")(
    Format(
        marked_calls.mistral,
        json_call("", ""),
        ("[TOOL_CALLS]",),
        opening="[TOOL_CALLS][",
        between=", ",
        closing="]",
        call_id=_nine_characters,
    )
)
FORMATS.register("granite")(
    Format(
        marked_calls.granite,
        json_call("", ""),
        ("<|tool_call|>",),
        opening="<|tool_call|>[",
        between=", ",
        closing="]",
    )
)
FORMATS.register("glm")(
    Format(
        partial(xml_calls.parse, style=xml_calls.GLM),
        argument_call(
            "<tool_call>NAME\n",
            lambda name, _: f"<arg_key>{name}</arg_key>\n<arg_value>",
            "</arg_value>\n",
            "</tool_call>",
        ),
        ("<tool_call>", "<arg_key>"),
    )
)
FORMATS.register("qwen3_coder")(
    Format(
        partial(xml_calls.parse, style=xml_calls.QWEN3_CODER),
        argument_call(
            "<tool_call>\n<function=NAME>\n",
            lambda name, _: f"<parameter={name}>\n",
            "\n</parameter>\n",
            "</function>\n</tool_call>",
        ),
        ("<tool_call>", "<function="),
    )
)
FORMATS.register("hermes")(
    Format(marked_calls.hermes, json_call("<tool_call>\n", "\n</tool_call>"), ("<tool_call>",)),
)
FORMATS.register("llama4")(
    Format(llama4, json_call("", "", "parameters"), ("<|header_start|>",)),
)


def format_of(template: str) -> str:
    """The name of the first format that a template is of; the generic one for a template without any."""
    return next((name for name, form in FORMATS.items() if all(mark in template for mark in form.marks)), GENERIC)
