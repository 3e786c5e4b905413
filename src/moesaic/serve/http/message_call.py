"""A body of /v1/messages as a conversation, and as the request that answers it."""

import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moesaic.engine.sampling import Sampling
from moesaic.serve.http.errors import ApiError, refused
from moesaic.serve.http.generation import likeliest, schema_grammar
from moesaic.serve.http.limits import room
from moesaic.serve.http.message_types import (
    CountBody,
    Message,
    MessagesBody,
    MessageTool,
    OtherBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from moesaic.serve.http.settings import HttpSettings
from moesaic.serve.request import Grammar, Request
from moesaic.serve.served import Served
from moesaic.serve.text.dialogue import Dialogue, Prepared
from moesaic.serve.tools.parts import Tool


class MessageCall(NamedTuple):
    """A request with what its answer is made of."""

    served: Served
    body: MessagesBody
    prepared: Prepared
    request: Request
    head: dict[str, Any]

    @property
    def many(self) -> bool:
        """Whether an answer may call several tools."""
        return self.body.tool_choice is None or not self.body.tool_choice.disable_parallel_tool_use


def message_call(body: MessagesBody, served: Served, settings: HttpSettings) -> MessageCall:
    """Slow: it renders a template. Raises ApiError, and GenerationError for what the template refuses."""
    if body.thread is not None:
        told = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
        raise ApiError(400, "no conversations are kept here; send all messages, without thread", details=told)
    prepared = prepare(body, served, settings)
    num_prompt = len(prepared.prompt_ids)
    fits = num_prompt + body.max_tokens <= served.max_length  # what does not is cut, and stop_reason says so
    request = Request(
        prompt_ids=prepared.prompt_ids,
        max_new_tokens=room(served, settings, num_prompt, body.max_tokens if fits else None),
        sampling=Sampling(
            temperature=1.0 if body.temperature is None else body.temperature,
            **likeliest(body.top_k, body.top_p),
        ),
        eos_token_ids=served.eos_token_ids,
        stop=tuple(body.stop_sequences or ()),
        grammar=prepared.grammar,
        experts=body.experts,
    )
    head = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": served.name}
    return MessageCall(served, body, prepared, request, head)


def prepare(body: CountBody, served: Served, settings: HttpSettings) -> Prepared:
    """The prompt, and how to read what follows it."""
    return served.speaker.prepare(_dialogue(body), _grammar(body), settings.template_time_s)


def _grammar(body: CountBody) -> Grammar | None:
    wanted = (body.output_config and body.output_config.format) or body.output_format
    return None if wanted is None else schema_grammar(wanted.schema_)


def _dialogue(body: CountBody) -> Dialogue:
    choice = body.tool_choice
    kind = "auto" if choice is None else choice.type
    if choice is not None and (kind == "tool") != (choice.name is not None):
        raise refused('a tool_choice has a name where its type is "tool", and only there', "tool_choice")
    said = body.messages[:-1] if _is_unsaid(body.messages) else body.messages
    messages = [*_system(body), *(each for index, one in enumerate(said) for each in _messages(one, index))]
    return Dialogue(
        messages=messages,
        tools=[_tool(tool, f"tools.{index}") for index, tool in enumerate(body.tools or ())],
        choice="required" if kind in ("any", "tool") else "none" if kind == "none" else "auto",
        called=choice.name if choice else None,
        many=choice is None or not choice.disable_parallel_tool_use,
        variables=_variables(body),
        continue_final_message=messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"),
    )


def _is_unsaid(messages: Sequence[Message]) -> bool:
    """Whether the last message only says that the assistant is next, as an empty one of its own may."""
    return len(messages) > 1 and messages[-1].role == "assistant" and not messages[-1].content


def _tool(tool: MessageTool, where: str) -> Tool:
    if tool.type not in (None, "custom"):
        raise refused(f"{where}: {tool.type} is not supported: nothing here runs tools for you", where)
    if unknown := sorted(tool.model_extra or ()):
        raise refused(f"Unrecognized request argument supplied: {where}.{unknown[0]}", where)
    if tool.input_schema is None:
        raise refused(f"Missing required parameter: '{where}.input_schema'.", where)
    return Tool(tool.name, tool.description or "", tool.input_schema)


def _variables(body: CountBody) -> dict[str, Any]:
    """By the names under which templates know whether to think."""
    if body.thinking is None:
        return {}
    thinks = body.thinking.type != "disabled"
    return {"enable_thinking": thinks, "thinking": thinks}


def _system(body: CountBody) -> list[Mapping[str, Any]]:
    if not body.system:
        return []
    text = body.system if isinstance(body.system, str) else "\n".join(block.text for block in body.system)
    return [{"role": "system", "content": text}]


def _messages(message: Message, index: int) -> list[Mapping[str, Any]]:
    """Results of tools are messages of their own, before what else the user says."""
    where = f"messages.{index}.content"
    if not message.content:
        raise refused(f"{where}: messages must have non-empty content", where)
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    for block in message.content:
        if isinstance(block, OtherBlock):
            raise refused(f"{where}: {block.type} is not supported: the models served here read text", where)
    found = [_result(block, where) for block in message.content if isinstance(block, ToolResultBlock)]
    text = "\n".join(block.text for block in message.content if isinstance(block, TextBlock))
    calls = [_called(block) for block in message.content if isinstance(block, ToolUseBlock)]
    thought = "\n".join(block.thinking for block in message.content if isinstance(block, ThinkingBlock))
    if text or calls or thought or not found:
        more = {"tool_calls": calls, "reasoning_content": thought, "thinking": thought}
        said = {key: value for key, value in more.items() if value}
        found.append({"role": message.role, "content": text, **said})
    return found


def _called(block: ToolUseBlock) -> Mapping[str, Any]:
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}


def _result(block: ToolResultBlock, where: str) -> Mapping[str, Any]:
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": _result_text(block.content, where)}


def _result_text(content: str | Sequence[TextBlock | OtherBlock] | None, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = [block.text for block in content if isinstance(block, TextBlock)]
    if len(texts) < len(content):
        raise refused(f"{where}: only texts are supported as results of tools", where)
    return "\n".join(texts)
