"""A body of /v1/responses as a conversation, and as the request that answers it."""

import time
import uuid
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moesaic.engine.sampling import Sampling
from moesaic.serve.http.calls import call_of
from moesaic.serve.http.errors import refused
from moesaic.serve.http.generation import likeliest, schema_grammar
from moesaic.serve.http.limits import room
from moesaic.serve.http.response_types import (
    LOGPROBS,
    FunctionCall,
    FunctionOutput,
    InputItem,
    ItemContent,
    ItemMedia,
    ItemText,
    PromptFields,
    Reasoning,
    ResponseAllowedTools,
    ResponseBody,
    ResponseNamedTool,
    ResponseTool,
)
from moesaic.serve.http.settings import HttpSettings
from moesaic.serve.request import Grammar, Request
from moesaic.serve.served import Served
from moesaic.serve.text.dialogue import Dialogue, Prepared
from moesaic.serve.tools.parts import Tool

Message = Mapping[str, Any]


class ResponseCall(NamedTuple):
    """A request with what its answer is made of. messages: of this turn and those before, without instructions."""

    served: Served
    body: ResponseBody
    prepared: Prepared
    request: Request
    messages: list[Message]
    head: dict[str, Any]

    @property
    def many(self) -> bool:
        """Whether an answer may call several tools."""
        return self.body.parallel_tool_calls is not False


def response_call(
    body: ResponseBody, before: Sequence[Message], served: Served, settings: HttpSettings
) -> ResponseCall:
    """before: the messages of the response that is gone on from. Slow: it renders a template.

    Raises ApiError, and GenerationError for what the template refuses.
    """
    messages = [*before, *_messages(body.input)]
    prepared = prepare(body, messages, served, settings, max(1, body.max_output_tokens or 1))
    request = Request(
        prompt_ids=prepared.prompt_ids,
        max_new_tokens=room(served, settings, len(prepared.prompt_ids), body.max_output_tokens, "max_output_tokens"),
        sampling=Sampling(
            temperature=1.0 if body.temperature is None else body.temperature, **likeliest(None, body.top_p)
        ),
        eos_token_ids=served.eos_token_ids,
        top_logprobs=(body.top_logprobs or 0) if LOGPROBS in (body.include or ()) else None,
        grammar=prepared.grammar,
        experts=body.experts,
    )
    return ResponseCall(served, body, prepared, request, messages, _head(body, served))


def count_input(body: PromptFields, before: Sequence[Message], served: Served, settings: HttpSettings) -> int:
    """The tokens of the prompt. Slow, and raises, as `response_call`."""
    return len(prepare(body, [*before, *_messages(body.input)], served, settings).prompt_ids)


def prepare(
    body: PromptFields, messages: Sequence[Message], served: Served, settings: HttpSettings, new_tokens: int = 1
) -> Prepared:
    """The prompt, and how to read what follows it; with truncation="auto" without the oldest messages, if need be, so
    that so many new tokens fit.
    """

    def of_last(count: int) -> Prepared:
        dialogue = _dialogue(body, messages[len(messages) - count :])
        return served.speaker.prepare(dialogue, _grammar(body), settings.template_time_s)

    def is_over(prepared: Prepared) -> bool:
        return len(prepared.prompt_ids) + new_tokens > served.max_length

    whole = of_last(len(messages))
    if body.truncation != "auto" or not is_over(whole):
        return whole
    fitting = bisect_left(range(1, len(messages)), True, key=lambda count: is_over(of_last(count)))
    return of_last(max(1, fitting))


def _head(body: ResponseBody, served: Served) -> dict[str, Any]:
    """What a response says from its beginning on."""
    choice = body.tool_choice
    wanted = body.text.format if body.text and body.text.format else None
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": time.time(),
        "status": "in_progress",
        "background": False,
        "model": served.name,
        "output": [],
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": body.reasoning.model_dump() if body.reasoning else None,
        "store": body.store is not False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": wanted.model_dump(by_alias=True, exclude_none=True) if wanted else {"type": "text"}},
        "tool_choice": choice or "auto" if choice is None or isinstance(choice, str) else choice.model_dump(),
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": body.truncation or "disabled",
        "usage": None,
    }


def _grammar(body: PromptFields) -> Grammar | None:
    wanted = body.text.format if body.text else None
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return Grammar("json_object")
    if wanted.schema_ is None:
        raise refused("Missing required parameter: 'text.format.schema'.", "text.format.schema")
    return schema_grammar(wanted.schema_)


def _dialogue(body: PromptFields, messages: Sequence[Message]) -> Dialogue:
    choice, called, tools = body.tool_choice or "auto", None, body.tools or ()
    if isinstance(choice, ResponseAllowedTools):
        names = {tool.name for tool in choice.tools}
        choice, tools = choice.mode, [tool for tool in tools if tool.name in names]
    elif isinstance(choice, ResponseNamedTool):
        choice, called = "required", choice.name
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    effort = body.reasoning.effort if body.reasoning else None
    return Dialogue(
        messages=[*system, *messages],
        tools=[_tool(tool) for tool in tools],
        choice=choice,
        called=called,
        many=body.parallel_tool_calls is not False,
        variables={} if effort is None else {"reasoning_effort": effort},
    )


def _tool(tool: ResponseTool) -> Tool:
    return Tool(tool.name, tool.description or "", tool.parameters or {"type": "object", "properties": {}})


def _messages(given: str | Sequence[InputItem]) -> list[Message]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not given:
        raise refused("the input is empty; send at least one item", "input")
    return joined([_message(item, f"input.{index}") for index, item in enumerate(given)])


def joined(messages: Sequence[Message]) -> list[Message]:
    """Thoughts, words and calls of the assistant, which are items of their own, as one message."""
    found: list[Message] = []
    for message in messages:
        if found and _goes_on(found[-1], message):
            last = found.pop()
            calls = [*last.get("tool_calls", ()), *message.get("tool_calls", ())]
            message = {**last, **message, "content": last["content"] or message["content"]}
            message = {**message, "tool_calls": calls} if calls else message
        found.append(message)
    return found


def _goes_on(last: Message, message: Message) -> bool:
    """Whether two messages are one: words come once, and before calls."""
    said = last["content"] or last.get("tool_calls")
    return last["role"] == message["role"] == "assistant" and not (message["content"] and said)


def _message(item: InputItem, where: str) -> Message:
    if isinstance(item, FunctionOutput):
        return {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output, where)}
    if isinstance(item, FunctionCall):
        call = call_of(item.call_id, item.name, item.arguments)
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    if isinstance(item, Reasoning):
        thought = "\n".join(text.text for text in item.content or item.summary or ())
        return {"role": "assistant", "content": "", "reasoning_content": thought, "thinking": thought}
    return {"role": item.role, "content": _text(item.content, where)}


def _text(content: str | Sequence[ItemContent], where: str) -> str:
    if isinstance(content, str):
        return content
    for part in content:
        if isinstance(part, ItemMedia):
            raise refused(f"{part.type} is not supported: the models served here read text", where)
    return "\n".join(part.text if isinstance(part, ItemText) else part.refusal for part in content)  # pyright: ignore
