"""What the verbs that write text share: their options, opening a model, and one answer streamed and timed."""

import argparse
import importlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from moesaic.data.open_tokenizer import open_tokenizer
from moesaic.data.text_stream import TextStream
from moesaic.errors import ConfigError, DataError

if TYPE_CHECKING:  # at run time torch comes in only once a model is opened
    import torch

    from moesaic.config import ModelConfig
    from moesaic.data.tokenizer import Tokenizer
    from moesaic.engine.cache import Text
    from moesaic.engine.engine import Engine
    from moesaic.layers.kv_cache import KeyValueCache
    from moesaic.models.build import Model

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class Opened(NamedTuple):
    """A model in memory, and its tokenizer."""

    model: "Model"
    tokenizer: "Tokenizer"


class Writer(NamedTuple):
    """What writes text: the engine, or a model that the engine does not run; and the tokenizer."""

    model: "Model | Engine"
    tokenizer: "Tokenizer"


class Written(NamedTuple):
    """One answer: its tokens (an end-of-sequence token included), its text, and how long it took.

    `prefill_s` runs to the first token, `decode_s` from there to the last.
    """

    token_ids: list[int]
    text: str
    num_prompt_tokens: int
    prefill_s: float
    decode_s: float

    @property
    def tokens_per_s(self) -> float | None:
        """Speed after the first token; None when there was no second."""
        return (len(self.token_ids) - 1) / self.decode_s if len(self.token_ids) > 1 else None

    def summary(self) -> str:
        """The counts and speeds in one line."""
        speed = f", then {self.tokens_per_s:.1f} tokens/s" if self.tokens_per_s else ""
        return (
            f"{self.num_prompt_tokens} prompt tokens and the first new one in {self.prefill_s:.2f} s{speed}; "
            f"{len(self.token_ids)} new tokens"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "prompt_tokens": self.num_prompt_tokens,
            "new_tokens": len(self.token_ids),
            "seconds": round(self.prefill_s + self.decode_s, 6),
            "prefill_seconds": round(self.prefill_s, 6),
            "tokens_per_second": self.tokens_per_s and round(self.tokens_per_s, 3),
        }


def add_text_arguments(parser: argparse.ArgumentParser, *, max_new_tokens: int, temperature: float) -> None:
    """The options of generate and chat that say how to write."""
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", default=max_new_tokens, help="write at most N tokens (%(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, metavar="T", default=temperature, help="0 is always the likeliest (%(default)s)"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="choose among the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="choose among the likeliest that add up to P")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")
    parser.add_argument("--dtype", choices=list(DTYPES), help="compute in this format (the checkpoint's if not given)")
    parser.add_argument(
        "--device",
        metavar="DEVICE",
        default="cpu",
        help="cpu: the engine (the default); auto, cuda or cuda:1: the plain decoder, on a GPU",
    )
    parser.add_argument("--bits", type=int, choices=(4, 8), help="round the weights to 4 or 8 bits once they are read")
    parser.add_argument("--experts-bits", type=int, choices=(4, 8), help="those of routed experts (as --bits)")
    parser.add_argument(
        "--values",
        choices=("even", "uneven"),
        default="even",
        help="what 4 bits stand for: even steps, or uneven ones, which lose less and compute more (%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the text as it comes")


def open_writer(path_or_preset: str, args: argparse.Namespace, *, decoder_for: str | None = None) -> Writer:
    """The model as the engine runs it, or as the decoder that defines it where the engine does not, which is said.

    decoder_for: what has no use for a model with an encoder.
    """
    from moesaic.cli import output
    from moesaic.kernels import backend
    from moesaic.kernels.devices import described, device_of

    if args.bits is None and args.experts_bits is not None:
        raise ConfigError("--experts-bits without --bits, which says how many the other weights get; give both")
    if args.values == "uneven" and 4 not in (args.bits, args.experts_bits):
        raise ConfigError("--values uneven without --bits 4, which it is for; give both")
    config = _read_config(path_or_preset, decoder_for)
    device = device_of(args.device, "--device")
    if device.type != "cpu":
        if args.bits is not None:
            raise ConfigError(f"--bits {args.bits} with --device {device}: packed weights are for CPUs; leave one out")
        output.talk(f"the engine is for CPUs; the plain decoder writes on {described(device)}")
        return Writer(*open_model(path_or_preset, args.dtype, device=device))
    if backend.name != "native":
        return _without_engine(path_or_preset, args)
    from moesaic.engine.lower.refusal import refusal

    if reason := refusal(config):
        output.talk(f"{reason}, which the engine does not run; the plain decoder writes, several times as slowly")
        return _without_engine(path_or_preset, args)
    from moesaic.engine.engine import Engine

    tokenizer = open_tokenizer(path_or_preset)
    importlib.import_module("moesaic.tune.upcycle")  # makes known the preset whose weights it makes
    engine = Engine(
        path_or_preset,
        bits=args.bits,
        experts_bits=args.experts_bits,
        values=args.values,
        dtype=torch_dtype(args.dtype),
    )
    if args.bits is not None:
        output.talk(f"weights packed in {output.size(sum(engine.program.packed_bytes.values()))}")
    return Writer(engine, tokenizer)


def _without_engine(path_or_preset: str, args: argparse.Namespace) -> Writer:
    if args.values == "uneven":
        raise ConfigError("--values uneven is the engine's, and the plain decoder is to write; leave it out")
    opened = open_model(path_or_preset, args.dtype)
    if args.bits is not None:
        from moesaic.cli import output
        from moesaic.quantize.apply import pack_weights, summary

        output.talk(summary(pack_weights(opened.model, args.bits, experts_bits=args.experts_bits)))
    return Writer(*opened)


def torch_dtype(name: str | None) -> "torch.dtype | None":
    """The torch dtype of a --dtype option."""
    import torch

    return None if name is None else getattr(torch, DTYPES[name])


def decode_utf8(data: bytes, source: str) -> str:
    """Bytes as text. Raises DataError where they are not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 at byte {error.start}; convert it, with iconv for example") from error


def keep_quiet(_text: str) -> None:
    """Emit nothing: for --json, which prints the text once it is whole."""


def _read_config(path_or_preset: str, decoder_for: str | None) -> "ModelConfig":
    from moesaic import hub
    from moesaic.hub.resolve import locate

    locate(path_or_preset)  # a mistyped name is answered before seconds go into importing torch
    config = hub.read_config(path_or_preset)
    if decoder_for is not None:
        config.check_decoder_only(decoder_for)
    return config


def open_model(
    path_or_preset: str, dtype: str | None, *, decoder_for: str | None = None, device: "torch.device | str" = "cpu"
) -> Opened:
    """The model and the tokenizer of a checkpoint. decoder_for: what has no use for a model with an encoder."""
    from moesaic import hub

    _read_config(path_or_preset, decoder_for)
    importlib.import_module("moesaic.tune.upcycle")  # makes known the preset whose weights it makes
    tokenizer = open_tokenizer(path_or_preset)
    return Opened(hub.load(path_or_preset, dtype=torch_dtype(dtype), device=device), tokenizer)


def check_sampling(args: argparse.Namespace) -> None:
    """Complain about impossible options before minutes go into loading. Raises ConfigError."""
    from moesaic.engine.sampling import Sampling

    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {args.max_new_tokens}; give 1 or more")
    Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed)


def write_on(
    writer: Writer,
    prompt_ids: list[int],
    args: argparse.Namespace,
    emit: Callable[[str], None],
    held: "Text | KeyValueCache | None" = None,
    target_prefix: Sequence[int] = (),
) -> Written:
    """Continue a prompt as the options say; `emit` gets the text piece by piece, without the end-of-sequence token.

    held: what is remembered of the prompt's beginning. Where the model has an encoder, the prompt is a source, and what
    is written is its target after `target_prefix`.
    """
    from moesaic.engine.engine import Engine
    from moesaic.engine.generate import generate

    config = writer.model.config
    before = prompt_ids if config.encoder is None else list(target_prefix)
    stream = TextStream(writer.tokenizer.decode, emit, before)
    token_ids: list[int] = []
    times_s = [time.perf_counter()]

    def hear(_sequence: int, token_id: int) -> None:
        times_s.append(time.perf_counter())
        token_ids.append(token_id)
        if token_id not in config.eos_token_ids:
            stream.add(token_id)

    options: dict[str, Any] = {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "seed": args.seed,
        "on_token": hear,
    }
    if isinstance(writer.model, Engine):
        writer.model.generate(prompt_ids, args.max_new_tokens, text=cast("Text | None", held), **options)
    else:
        options |= {"cache": held, "target_prefix": target_prefix}
        generate(writer.model, prompt_ids, args.max_new_tokens, **options)
    text = stream.close()
    first_s = times_s[1] if token_ids else time.perf_counter()
    return Written(token_ids, text, len(prompt_ids), first_s - times_s[0], times_s[-1] - first_s if token_ids else 0.0)
