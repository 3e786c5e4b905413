"""The engine that benchmarks of serving use: of a given model, or of weights drawn for a shape that is known."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from moesaic import hub
from moesaic.config import ModelConfig
from moesaic.data.tokenizer import Tokenizer
from moesaic.engine.engine import Engine
from moesaic.families import family
from moesaic.models.decoder import Decoder

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "num_experts": 8, "moe_intermediate_size": 64},
    "small": {"hidden_size": 512, "num_hidden_layers": 8, "num_experts": 32, "moe_intermediate_size": 256},
}
_COMMON: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 32_000,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--model, --bits, --threads."""
    parser.add_argument("--model", default="small", help=f"a folder, or weights drawn for a shape: {', '.join(SHAPES)}")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--threads", type=int, default=2)


def engine_and_decode(args: argparse.Namespace) -> tuple[Engine, Callable[[list[int]], str]]:
    """An engine, and what makes text of its tokens; of drawn weights a letter for each."""
    if args.model in SHAPES:
        model = Decoder(shape(args.model)).initialize(0)
        return Engine(model, bits=args.bits, threads=args.threads), letters
    torch.set_num_threads(args.threads)
    tokenizer = Tokenizer.load(Path(args.model))
    return Engine(args.model, bits=args.bits, threads=args.threads), tokenizer.decode


@contextmanager
def folder_of(args: argparse.Namespace) -> Iterator[Path]:
    """The model as a server takes it; drawn weights with a tokenizer that knows few of their tokens."""
    if args.model not in SHAPES:
        yield Path(args.model)
        return
    with TemporaryDirectory() as folder:
        tokenizer = Tokenizer.train(["the quick brown fox"], vocab_size=300)
        hub.save(Decoder(shape(args.model)).initialize(0), Path(folder), tokenizer=tokenizer)
        yield Path(folder)


def shape(name: str) -> ModelConfig:
    return family("qwen3_moe").from_hf({**_COMMON, **SHAPES[name]})


def letters(token_ids: list[int]) -> str:
    return "".join(chr(97 + token % 26) for token in token_ids)


def prompt(size: int, seed: int, vocab_size: int) -> tuple[int, ...]:
    """Tokens that hardly occur in another prompt."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(vocab_size, (size,), generator=generator).tolist())
