"""Conversations as prompts, and answers as what was said, thought and called: what every chat protocol stands on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

from moesaic.data.chat import render_chat
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import GenerationError
from moesaic.serve.request import Grammar
from moesaic.serve.text import reasoning
from moesaic.serve.text.reasoning import AnswerParser, Marks
from moesaic.serve.tools.abilities import Abilities, abilities_of
from moesaic.serve.tools.formats import FORMATS, Format, format_of
from moesaic.serve.tools.grammar import GrammarWriter
from moesaic.serve.tools.parts import Tool
from moesaic.serve.tools.prompting import with_calls_as_text, with_tools_described

_FINAL = "<|channel|>final<|message|>"  # where gpt-oss answers


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """messages: as OpenAI has them, contents as texts, arguments of calls as objects. choice: whether tools may, must
    not or must be called; called: the one that must be. many: may several be called. variables: for the template.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Tool] = ()
    choice: Literal["auto", "none", "required"] = "auto"
    called: str | None = None
    many: bool = True
    documents: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    def __post_init__(self) -> None:
        names = [tool.name for tool in self.tools]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise GenerationError(f"two tools are named {doubled[0]!r}; give one another name")
        if self.called is not None and self.called not in names:
            raise GenerationError(f"the tool {self.called!r} is to be called, but is not among the tools")
        if self.choice == "required" and not names:
            raise GenerationError("a tool is to be called, but there are none")
        for tool in self.tools:
            _check_parameters(tool)

    @property
    def callable(self) -> Sequence[Tool]:
        """The tools that the answer may call."""
        if self.choice == "none":
            return ()
        return self.tools if self.called is None else [tool for tool in self.tools if tool.name == self.called]


def _check_parameters(tool: Tool) -> None:
    for name, kind in (("properties", dict), ("required", list)):
        if not isinstance(tool.parameters.get(name, kind()), kind):
            wanted = "an object" if kind is dict else "a list"
            raise GenerationError(f"the parameters of the tool {tool.name!r} have {name} that are not {wanted}")


class Prepared(NamedTuple):
    """A prompt, and how to read what follows it. grammar: that its answer must follow."""

    prompt_ids: tuple[int, ...]
    form: Format
    marks: Marks | None
    is_open: bool
    tools: Sequence[Tool]
    reads_calls: bool
    grammar: Grammar | None

    def parser(self) -> AnswerParser | None:
        """Of an answer; None: its text is what is said."""
        if self.marks is None and not self.reads_calls:
            return None
        parse, tools = self.form.parse, self.tools
        reading = (lambda source: parse(source, tools)) if self.reads_calls else None
        return AnswerParser(self.marks, self.is_open, reading)


class Speaker:
    """Prepares the conversations of a model, by its chat template. Raises nothing until it is used."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._template = tokenizer.chat_template or ""
        self._format_name = format_of(self._template)
        self._marks = reasoning.marks_of(self._template)

    @cached_property
    def _abilities(self) -> Abilities:
        return abilities_of(lambda messages, tools: self._render(Dialogue(messages=messages, tools=tools)))

    @cached_property
    def _grammars(self) -> GrammarWriter:
        return GrammarWriter(self._tokenizer)

    def prepare(self, dialogue: Dialogue, grammar: Grammar | None, time_s: float) -> Prepared:
        """grammar: of what is said. Raises GenerationError for a conversation that the template refuses."""
        form = FORMATS[self._format_name]
        prompt = self._render(self._fitted(dialogue, form), time_s)
        is_open = self._marks is not None and reasoning.opened(prompt, self._marks)
        in_channels = self._format_name == "harmony"
        prepared = Prepared(
            prompt_ids=tuple(self._tokenizer.encode(prompt)),
            form=form,
            marks=None if in_channels else self._marks,
            is_open=is_open,
            tools=dialogue.callable,
            reads_calls=in_channels or bool(dialogue.callable),
            grammar=grammar,
        )
        return prepared._replace(grammar=self._grammar(dialogue, prepared, in_channels))

    def _grammar(self, dialogue: Dialogue, prepared: Prepared, in_channels: bool) -> Grammar | None:
        closing = prepared.marks.closing if prepared.is_open and prepared.marks else None
        if dialogue.choice == "required":
            many = dialogue.many and dialogue.called is None
            return self._grammars.calls(prepared.form, prepared.tools, many=many, closing=closing)
        if prepared.grammar is None or (closing is None and not in_channels):
            return prepared.grammar
        return self._grammars.behind(prepared.grammar, _FINAL if in_channels else "", closing)

    def _fitted(self, dialogue: Dialogue, form: Format) -> Dialogue:
        """With what the template does not know written out."""
        tools = () if dialogue.choice == "none" else dialogue.tools
        messages = [_in_known_role(message, self._template) for message in dialogue.messages]
        if any(message.get("tool_calls") or message["role"] == "tool" for message in messages):
            able = self._abilities
            messages = able.fitted(messages) if able.writes_calls else with_calls_as_text(messages, form)
        if tools and not self._abilities.describes_tools:
            messages, tools = with_tools_described(messages, tools, form), ()
        return replace(dialogue, messages=messages, tools=tools, choice="auto", called=None)

    def _render(self, dialogue: Dialogue, time_s: float = 10.0) -> str:
        return render_chat(
            self._template,
            dialogue.messages,
            tools=[tool.to_dict() for tool in dialogue.tools],
            documents=dialogue.documents,
            bos_token=self._tokenizer.bos_token,
            eos_token=self._tokenizer.eos_token,
            add_generation_prompt=dialogue.add_generation_prompt,
            continue_final_message=dialogue.continue_final_message,
            variables=dialogue.variables,
            time_s=time_s,
        )


def _in_known_role(message: Mapping[str, Any], template: str) -> Mapping[str, Any]:
    """Few templates know developers."""
    unknown = message["role"] == "developer" and "developer" not in template
    return {**message, "role": "system"} if unknown else message
