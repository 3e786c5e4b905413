"""A body of /v1/chat/completions as a conversation, and as the requests that answer it."""

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moesaic.serve.http.calls import call_of
from moesaic.serve.http.chat_types import (
    AllowedChoice,
    ChatBody,
    ChatMessage,
    ChatTool,
    ContentPart,
    MediaPart,
    NamedTool,
)
from moesaic.serve.http.errors import refused
from moesaic.serve.http.limits import room
from moesaic.serve.http.settings import HttpSettings
from moesaic.serve.request import Request
from moesaic.serve.served import Served
from moesaic.serve.text.dialogue import Dialogue, Prepared
from moesaic.serve.tools.parts import Tool


class ChatCall(NamedTuple):
    """A request with what its answer is made of."""

    served: Served
    body: ChatBody
    prepared: Prepared
    requests: list[Request]
    head: dict[str, Any]

    @property
    def many(self) -> bool:
        """Whether an answer may call several tools."""
        return self.body.parallel_tool_calls is not False


async def chat_call(body: ChatBody, served: Served, settings: HttpSettings) -> ChatCall:
    """Raises ApiError, and GenerationError for a conversation that the model's template refuses."""
    if (body.n or 1) > settings.max_choices:
        raise refused(f"n={body.n}; ask for at most {settings.max_choices}", "n")
    if body.top_logprobs and not body.logprobs:
        raise refused("top_logprobs needs logprobs to be true", "top_logprobs")
    prepared = await prepare(dialogue_of(body), body, served, settings)
    name, most = ("max_completion_tokens", body.max_completion_tokens)
    if most is None:
        name, most = "max_tokens", body.max_tokens
    most = room(served, settings, len(prepared.prompt_ids), most, name)
    head = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": served.name,
        "system_fingerprint": None,
    }
    call = ChatCall(served, body, prepared, [], head)
    call.requests.extend(_request(call, most, index) for index in range(body.n or 1))
    return call


async def prepare(dialogue: Dialogue, body: Any, served: Served, settings: HttpSettings) -> Prepared:
    """In a thread: templates are programs, and long prompts take a while to become tokens."""
    grammar = body.grammar()
    return await asyncio.to_thread(served.speaker.prepare, dialogue, grammar, settings.template_time_s)


def _request(call: ChatCall, most: int, index: int) -> Request:
    body = call.body
    return Request(
        prompt_ids=call.prepared.prompt_ids,
        max_new_tokens=most,
        sampling=body.sampling(call.served.config.vocab_size).for_choice(index),
        eos_token_ids=body.ends(call.served.eos_token_ids),
        stop=body.stops,
        include_stop=body.include_stop_str_in_output,
        min_new_tokens=body.min_tokens,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        grammar=call.prepared.grammar,
        priority=body.priority,
        experts=body.experts,
    )


def dialogue_of(body: ChatBody) -> Dialogue:
    """Raises ApiError for content that no text model reads."""
    choice, called, tools = "auto", None, body.tools or ()
    if isinstance(body.tool_choice, NamedTool):
        choice, called = "required", body.tool_choice.function.name
    elif isinstance(body.tool_choice, AllowedChoice):
        choice = body.tool_choice.allowed_tools.mode
        names = {tool.function.name for tool in body.tool_choice.allowed_tools.tools}
        tools = [tool for tool in tools if tool.function.name in names]
    elif body.tool_choice is not None:
        choice = body.tool_choice
    effort = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
    return Dialogue(
        messages=_messages(body.messages),
        tools=[_tool(tool) for tool in tools],
        choice=choice,
        called=called,
        many=body.parallel_tool_calls is not False,
        documents=body.documents or (),
        variables={**effort, **(body.chat_template_kwargs or {})},
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message or bool(body.messages[-1].prefix),
    )


def _tool(tool: ChatTool) -> Tool:
    function = tool.function
    return Tool(function.name, function.description or "", function.parameters or {"type": "object", "properties": {}})


def _messages(messages: Sequence[ChatMessage]) -> list[Mapping[str, Any]]:
    names: dict[str, str] = {}
    found = []
    for index, message in enumerate(messages):
        names |= {call.id: call.function.name for call in message.tool_calls or ()}
        found.append(_message(message, f"messages.{index}", names))
    return found


def _message(message: ChatMessage, where: str, names: Mapping[str, str]) -> Mapping[str, Any]:
    """As templates read it; fields that say nothing are left out."""
    content = content_text(message.content, f"{where}.content")
    if content is None and message.role != "assistant":
        raise refused(f"Invalid value for '{where}.content': a {message.role} message needs one", f"{where}.content")
    if message.role == "tool" and message.tool_call_id is None:
        raise refused(f"Missing required parameter: '{where}.tool_call_id'.", f"{where}.tool_call_id")
    thought = message.reasoning_content or message.reasoning
    name = message.name or names.get(message.tool_call_id or "")
    calls = [call_of(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    given = {
        "name": name,
        "tool_calls": calls or None,
        "tool_call_id": message.tool_call_id,
        "reasoning_content": thought,
        "thinking": thought,
    }
    return {"role": message.role, "content": content or "", **{key: value for key, value in given.items() if value}}


def content_text(content: str | Sequence[ContentPart] | None, where: str) -> str | None:
    """Parts as lines of a text. Raises ApiError for images and sounds."""
    if content is None or isinstance(content, str):
        return content
    for part in content:
        if isinstance(part, MediaPart):
            raise refused(f"{part.type} is not supported: the models served here read text", where)
    return "\n".join(part.text if part.type == "text" else part.refusal for part in content)  # pyright: ignore
