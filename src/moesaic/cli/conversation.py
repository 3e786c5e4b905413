"""A conversation with a model: its messages, kept within the context, and the cache that remembers them."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from moesaic.cli.text import Writer, Written, write_on
from moesaic.errors import GenerationError

if TYPE_CHECKING:
    from moesaic.engine.cache import Text
    from moesaic.layers.kv_cache import KeyValueCache
    from moesaic.models.build import Model

Message = dict[str, str]


class Conversation:
    """Turns in, answers out.

    `on_forget(num_turns)` hears that the oldest turns no longer fit the context. Raises GenerationError when the model
    has no chat template, or when one turn alone does not fit.
    """

    def __init__(
        self, writer: Writer, args: argparse.Namespace, on_forget: Callable[[int], None], system: str | None = None
    ) -> None:
        if writer.tokenizer.chat_template is None:
            raise GenerationError("this model has no chat template; use `moesaic generate` to continue a text")
        self._writer = writer
        self._args = args
        self._on_forget = on_forget
        self._held: Text | KeyValueCache | None = None
        self._held_ids: list[int] = []
        self.system = system
        self.turns: list[Message] = []

    def reset(self, system: str | None) -> None:
        """Start over, with this system message."""
        self.system = system
        self.turns = []

    def ask(self, text: str, emit: Callable[[str], None]) -> Written:
        """Answer one turn; `emit` gets the answer piece by piece. A turn that fails is forgotten."""
        self.turns.append({"role": "user", "content": text})
        try:
            prompt_ids = self._fit()
            held = self._take_held(prompt_ids)
            written = write_on(self._writer, prompt_ids, self._args, emit, held)
        except GenerationError:
            self.turns.pop()
            raise
        self._held = held
        self._held_ids = (prompt_ids + written.token_ids)[: held.length]
        self.turns.append({"role": "assistant", "content": written.text})
        return written

    def _fit(self) -> list[int]:
        """The conversation as token ids, oldest turns dropped until an answer fits."""
        context = self._writer.model.config.context_length
        room = min(self._args.max_new_tokens, context // 4)
        num_turns = len(self.turns)
        prompt_ids = self._encode()
        while len(prompt_ids) + room > context and len(self.turns) > 1:
            del self.turns[:2]  # a question and its answer
            prompt_ids = self._encode()
        if forgotten := (num_turns - len(self.turns)) // 2:
            self._on_forget(forgotten)
        return prompt_ids

    def _encode(self) -> list[int]:
        from moesaic.data.chat import render_chat

        system = [{"role": "system", "content": self.system}] if self.system else []
        tokenizer = self._writer.tokenizer
        text = render_chat(
            tokenizer.chat_template,
            [*system, *self.turns],
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
        )
        return tokenizer.encode(text)

    def _take_held(self, prompt_ids: list[int]) -> "Text | KeyValueCache":
        """What is remembered, cut back to what it shares with the prompt; or new where it cannot be cut."""
        from moesaic.engine.cache import Text
        from moesaic.engine.engine import Engine

        held, self._held = self._held, None  # taken out, so that an interrupted answer leaves nothing half written
        shared = min(_shared_length(self._held_ids, prompt_ids), len(prompt_ids) - 1)
        if isinstance(self._writer.model, Engine):
            text = held if isinstance(held, Text) else Text()
            self._writer.model.cache.cut(text, shared)
            return text
        return self._take_cache(None if isinstance(held, Text) else held, shared, len(prompt_ids))

    def _take_cache(self, cache: "KeyValueCache | None", shared: int, num_prompt_tokens: int) -> "KeyValueCache":
        config = self._writer.model.config
        needed = min(num_prompt_tokens + self._args.max_new_tokens, config.context_length)
        can_rollback = all(state.can_rollback for state in config.states())
        if cache is None or cache.max_length < needed or (shared < cache.length and not can_rollback):
            return self._new_cache(min(2 * needed, config.context_length))
        if shared < cache.length:
            cache.rollback(shared)
        return cache

    def _new_cache(self, max_length: int) -> "KeyValueCache":
        from moesaic.layers.kv_cache import KeyValueCache

        model = cast("Model", self._writer.model)
        weight = model.embedding.weight
        return KeyValueCache(
            model.config, batch_size=1, max_length=max_length, dtype=weight.dtype, device=weight.device
        )


def _shared_length(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
