"""Tiny checkpoints, made by moesaic itself, and a way to run a command line in this process."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from moesaic import hub
from moesaic.cli.main import main
from moesaic.config import AttentionConfig, LayerConfig, MlpConfig, ModelConfig, MoeConfig, RouterConfig, StackConfig
from moesaic.data.tokenizer import Tokenizer
from moesaic.models.decoder import Decoder

TEXT = "the quick brown fox jumps over the lazy dog, naïve café 12345. " * 20
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Ran(NamedTuple):
    exit_code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def own_state(monkeypatch, tmp_path_factory) -> None:
    """What moesaic keeps of this machine, such as predictions, is kept elsewhere while it is tested."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))


@pytest.fixture
def moesaic(capsys, monkeypatch) -> Callable[..., Ran]:
    """Run `moesaic <arguments>` with `stdin` as piped input."""

    def run(*arguments: str | Path, stdin: bytes = b"") -> Ran:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        exit_code = main([str(argument) for argument in arguments])
        return Ran(exit_code, *capsys.readouterr())

    return run


def tiny_config(family: str, vocab_size: int, eos_token_ids: tuple[int, ...] = ()) -> ModelConfig:
    attention = AttentionConfig(num_heads=4, num_key_value_heads=2, head_dim=6)
    feed_forward = (
        MoeConfig(router=RouterConfig(name="softmax_topk", num_experts=5, top_k=2), intermediate_size=20)
        if family == "mixtral"
        else MlpConfig(intermediate_size=40)
    )
    layer = LayerConfig(attention=attention, feed_forward=feed_forward)
    return ModelConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=24,
        context_length=96,
        decoder=StackConfig(layers=(layer, layer)),
        eos_token_ids=eos_token_ids,
    )


def save_tiny(folder: Path, family: str, chat_template: str | None, eos_token_ids: tuple[int, ...] = ()) -> Path:
    trained = Tokenizer.train([TEXT], vocab_size=300)
    tokenizer = Tokenizer(trained.backend, chat_template=chat_template)
    model = Decoder(tiny_config(family, tokenizer.vocab_size + 3, eos_token_ids)).initialize(seed=1)
    hub.save(model, folder, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="session")
def moe_folder(tmp_path_factory) -> Path:
    """A mixtral that can chat; it never ends a sequence by itself."""
    return save_tiny(tmp_path_factory.mktemp("models") / "moe", "mixtral", TEMPLATE)


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory) -> Path:
    """A llama without a chat template; token 0 ends its texts."""
    return save_tiny(tmp_path_factory.mktemp("models") / "dense", "llama", None, eos_token_ids=(0,))
