"""A tiny model that is served: its folder, an engine over it, and requests run to their end."""

import atexit
import shutil
import threading
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from moesaic import hub
from moesaic.config import AttentionConfig, LayerConfig, ModelConfig, MoeConfig, RouterConfig, StackConfig
from moesaic.data.tokenizer import Tokenizer
from moesaic.engine.engine import Engine
from moesaic.serve.loop.loop import Loop
from moesaic.serve.request import Event, Finished, Heard, Progress, Request
from tests.tiny import lively_decoder

TEXT = "the quick brown fox jumps over the lazy dog, naïve café 12345. " * 20
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_config(vocab_size: int) -> ModelConfig:
    """Two layers of five experts, two chosen; texts of up to 512 tokens, which never end by themselves."""
    layer = LayerConfig(
        attention=AttentionConfig(num_heads=4, num_key_value_heads=2, head_dim=6),
        feed_forward=MoeConfig(router=RouterConfig(name="softmax_topk", num_experts=5, top_k=2), intermediate_size=20),
    )
    return ModelConfig(
        family="mixtral",
        vocab_size=vocab_size,
        hidden_size=24,
        context_length=512,
        decoder=StackConfig(layers=(layer, layer)),
    )


@cache
def folder() -> Path:
    """A checkpoint with a tokenizer and a chat template."""
    tokenizer = Tokenizer(Tokenizer.train([TEXT], vocab_size=300).backend, chat_template=TEMPLATE)
    place = Path(mkdtemp(prefix="moesaic-served-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    hub.save(lively_decoder(tiny_config(tokenizer.vocab_size + 3)), place, tokenizer=tokenizer)
    return place


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(folder())


def engine(**options: Any) -> Engine:
    return Engine(folder(), **{"threads": 1, **options})


class Listener:
    """Hears a loop, and waits for what it is to hear."""

    def __init__(self) -> None:
        self.events: dict[int, list[Event]] = defaultdict(list)
        self._changed = threading.Condition()

    def __call__(self, heard: Sequence[Heard]) -> None:
        with self._changed:
            for number, event in heard:
                self.events[number].append(event)
            self._changed.notify_all()

    def wait(self, number: int, timeout_s: float = 60) -> list[Event]:
        """All events of a request that ends."""

        def ended() -> bool:
            return bool(self.events[number]) and isinstance(self.events[number][-1], Finished)

        with self._changed:
            assert self._changed.wait_for(ended, timeout_s), f"request {number} did not end: {self.events[number]}"
            return list(self.events[number])


def run(loop: Loop, listener: Listener, requests: Sequence[Request]) -> list[list[Event]]:
    """All events of requests that are handed in together."""
    return [listener.wait(number) for number in [loop.submit(request) for request in requests]]


def new_ids(events: Sequence[Event]) -> list[int]:
    return [info.token_id for event in events if isinstance(event, Progress) for info in event.tokens]


def text_of(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Progress))
