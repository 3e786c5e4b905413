"""A conversation as the prompt that a model was trained on, by the chat template that came with it."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from moesaic.data.chat_template import TIME_S, render_template
from moesaic.errors import GenerationError

Message = Mapping[str, Any]

_OURS = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now", "bos_token", "eos_token")


def render_chat(
    template: str | None,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    bos_token: str | None = None,
    eos_token: str | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
    now: Callable[[], datetime] = datetime.now,
    time_s: float = TIME_S,
) -> str:
    """The prompt for messages like {"role": "user", "content": "..."}, ending where the assistant's answer begins.

    An assistant's message may have "tool_calls" and no content. tools: functions as OpenAI describes them.
    continue_final_message: end inside the last message instead, which is to be gone on with. variables: more for the
    template, such as enable_thinking. `now` is the clock of templates that print the date.
    Raises GenerationError for a missing or broken template, one that runs for more than time_s, and for messages that
    the template refuses.
    """
    if not template:
        raise GenerationError("this model has no chat template; continue plain text with `moesaic generate` instead")
    _check(messages)
    if taken := sorted(set(variables or ()) & set(_OURS)):
        raise GenerationError(f"{taken[0]} is no variable to give to a chat template; it has one of that name already")
    tokens = {"bos_token": bos_token, "eos_token": eos_token}
    text = render_template(
        template,
        {
            **(variables or {}),
            "messages": [dict(message) for message in messages],
            "tools": list(tools) if tools else None,
            "documents": list(documents) if documents else None,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
            "strftime_now": lambda form: now().strftime(form),
            **{name: token for name, token in tokens.items() if token is not None},
        },
        time_s=time_s,
    )
    return _cut_behind(text, messages) if continue_final_message else text


def _check(messages: Sequence[Message]) -> None:
    for index, message in enumerate(messages):
        said = "content" in message or message.get("tool_calls")
        if not isinstance(message.get("role"), str) or not said:
            seen = ", ".join(message) or "neither"
            raise GenerationError(f'message {index} needs "role" and "content"; it has {seen}')


def _cut_behind(text: str, messages: Sequence[Message]) -> str:
    """The prompt up to the end of the last message's words, as transformers cuts it."""
    words = messages[-1].get("content") if messages else None
    if not isinstance(words, str) or not words.strip():
        raise GenerationError("there is no final message to continue; its content must be a text")
    place = text.rfind(words.strip())
    if place < 0:
        raise GenerationError("the chat template changes the final message, so it cannot be continued")
    kept = words.lstrip() if text.startswith(words.lstrip(), place) else words.strip()
    return text[:place] + kept
