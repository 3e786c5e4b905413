"""The engine: a program, a cache, and texts that go through them, one at a time or many together."""

import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moesaic.engine.cache import BLOCK_TOKENS, BlockCache, Text
from moesaic.engine.generate import check_prompts
from moesaic.engine.memory import require_memory
from moesaic.engine.packed_store import PackedStore
from moesaic.engine.packing import Packer, Precision
from moesaic.engine.program import Batch, Program, Routed
from moesaic.engine.sampling import Sampling, sample
from moesaic.engine.weights import FileWeights, ModelWeights, Weights
from moesaic.errors import ConfigError, GenerationError
from moesaic.hub.resolve import weights_place
from moesaic.hub.sources import open_source
from moesaic.kernels.paged import CACHE_FORMATS, CacheFormat
from moesaic.kernels.rounding import Bits, Values
from moesaic.models.base import LanguageModel

_log = logging.getLogger(__name__)

# Of a prompt that go through the program together: enough that weights are read for many tokens at once, few enough
# that the rows in between stay small.
PREFILL_TOKENS = 512


class Piece(NamedTuple):
    """New tokens of a text, in their order, and of which of them logits are wanted."""

    text: Text
    token_ids: Sequence[int]
    wants: Literal["last", "all", "none"] = "last"


class Engine:
    """A model packed for this machine's processors.

    path_or_model: a folder, a .gguf file, a preset that brings its weights, a model in memory, or any Weights.
    bits: 8 or 4, of projections and experts; None: as the files have them. experts_bits: of routed experts, where
    these differ. values: what four bits stand for, "even" steps or "uneven" ones, which lose less and compute more
    (docs/quantize.md).
    dtype: of what is not rounded, fp32 or bf16; None: as the files have it, be it FP8 in blocks or MXFP4.
    threads: None: every processor that this process may use. max_length: the most tokens of a text; None: as many as
    the model was made for. cache_format: of keys and values, "fp32", "bf16" or "int8" (8.5 bits a number, see
    kernels.paged); None: bf16 where the model is in bf16, or is packed in few bits, else fp32.
    packed_file: where the packed weights are kept: mapped into memory if it is there, else written, so that the next
    start need not read and pack them. mtp: be ready to run the layers that predict further tokens (`ahead`), too; else
    they are not even read.

    Within one instruction set and one packed format a token gets the same bits whatever batch, pieces, number of
    threads or blocks of the cache it runs with.
    Raises ConfigError for a model with parts that have no lowering, CheckpointError for damaged files.
    """

    def __init__(
        self,
        path_or_model: str | os.PathLike[str] | LanguageModel | Weights,
        *,
        bits: Bits | None = None,
        experts_bits: Bits | None = None,
        values: Values = "even",
        dtype: torch.dtype | None = None,
        threads: int | None = None,
        max_length: int | None = None,
        cache_format: CacheFormat | None = None,
        packed_file: str | os.PathLike[str] | None = None,
        mtp: bool = False,
    ) -> None:
        weights = _weights(path_or_model)
        for name, value in (("threads", threads), ("max_length", max_length)):
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}; use 1 or more, or leave it out")
        if cache_format not in (None, *CACHE_FORMATS):
            raise ConfigError(f"cache_format={cache_format!r}; use {', '.join(CACHE_FORMATS)}, or leave it out")
        precision = Precision(bits=bits, experts_bits=experts_bits, values=values, dtype=dtype)
        if values == "uneven" and isinstance(weights, FileWeights) and 4 in weights.even_bits:
            _log.warning(
                "%s holds four bits of even steps, and rounding them to uneven values adds up; leave values out, or "
                "take the original",
                weights.where,
            )
        dtype = dtype or weights.dtype
        require_memory(weights.config, precision, dtype.itemsize, weights.coded, mtp=mtp)
        store = None if packed_file is None else PackedStore(Path(packed_file), weights, precision)
        packer = Packer(weights, precision, store.read() if store else {})
        self.program = Program(packer, threads=threads or _processors(), max_length=max_length, mtp=mtp)
        if store is not None:
            store.write(packer)
        self.config, self.max_length = weights.config, self.program.max_length
        if cache_format is None:
            cache_format = "bf16" if bits is not None or dtype == torch.bfloat16 else "fp32"
        self.cache = BlockCache(self.program.caches, format=cache_format)
        self.program.connect(self.cache)
        self._routed = (0, 0)

    def step(self, pieces: Sequence[Piece], choices: Mapping[int, Tensor] | None = None) -> Tensor:
        """Run new tokens of any number of texts, each once: logits [N, V], of the wanted tokens in their order.

        choices: by layer, the experts [T, M] of all these tokens, which stand in for what it would choose (`routed`).
        Raises GenerationError for token ids that the model does not know, texts that would become too long, and
        numbers that are infinite or none (where they first appear is said).
        """
        batch = self._batch(pieces)
        logits_NV = self.program.run(batch, choices)
        for piece in pieces:
            piece.text.forget_ahead()
            piece.text.length += len(piece.token_ids)
        self._routed = (len(batch.token_ids_T), 0)
        return logits_NV

    def ahead(self, pieces: Sequence[Piece], depth: int = 1) -> Tensor:
        """Run layer k = `depth` of those that predict further tokens: logits [N, V] of token i + k + 1 at place i.

        The places of a piece are those that come next for this layer (`text.ahead`); its tokens are k places on, i + k.
        The last of them may be tokens that the text does not hold: the next one, and drafts. What came of these is
        forgotten when the text goes on or is cut. `step`, or layer k - 1, has seen all these places before.
        Raises GenerationError as `step` does, and for a layer that there is not or places that it cannot see yet.
        """
        self._check_depth(depth)
        for piece in pieces:
            _check_places(piece, depth)
        batch = self._batch(pieces, depth)
        logits_NV = self.program.run(batch, depth=depth)
        for piece in pieces:
            piece.text.ahead[depth] = piece.text.ahead.get(depth, 0) + len(piece.token_ids)
        self._routed = (len(batch.token_ids_T), depth)
        return logits_NV

    def routed(self) -> dict[int, Routed]:
        """The experts that the tokens of the newest step (or `ahead`) went to, and their weights, by layer."""
        num_tokens, depth = self._routed
        return self.program.routed(num_tokens, depth=depth)

    def hidden_states(self) -> Tensor:
        """x_TD of the newest `step`'s tokens, fp32: what comes of the last norm, from which logits are made.

        Of pieces that want no logits, too. Raises GenerationError where `ahead` came since, or no step.
        """
        if not self.num_routed:
            raise GenerationError("no hidden states are at hand; they are those of the newest step")
        return self.program.hidden_states(self.num_routed)

    @property
    def num_routed(self) -> int:
        """How many tokens the newest `step` had; 0 after `ahead`."""
        num_tokens, depth = self._routed
        return 0 if depth else num_tokens

    def reserve(self, num_tokens: int) -> None:
        """Make room for so many tokens in the cache now, and for no more later. Raises GenerationError as it does."""
        self.cache.reserve(-(-num_tokens // BLOCK_TOKENS))
        self.program.connect(self.cache)

    def free(self, text: Text) -> None:
        """Forget a text; its blocks serve others."""
        self.cache.cut(text, 0)

    def generate(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        eos_token_ids: Iterable[int] | None = None,
        on_token: Callable[[int, int], None] | None = None,
        text: Text | None = None,
    ) -> list[int]:
        """Continue one prompt; see `moesaic.generate` for the arguments. text: holds a prefix of the prompt already,
        and all but the last new token afterwards."""
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        texts = None if text is None else [text]
        return self._generate([list(prompt_ids)], max_new_tokens, sampling, eos_token_ids, on_token, texts)[0]

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        eos_token_ids: Iterable[int] | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """Continue several prompts together. `on_token(prompt, token_id)` hears each token as it is made."""
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        lists = [list(prompt) for prompt in prompts]
        return self._generate(lists, max_new_tokens, sampling, eos_token_ids, on_token, None)

    def _generate(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        sampling: Sampling,
        eos_token_ids: Iterable[int] | None,
        on_token: Callable[[int, int], None] | None,
        texts: list[Text] | None,
    ) -> list[list[int]]:
        check_prompts(self.config, prompts, max_new_tokens, self.max_length)
        stops = frozenset(self.config.eos_token_ids if eos_token_ids is None else eos_token_ids)
        owned = [Text() for _ in prompts] if texts is None else []
        writing = texts or owned
        try:
            return self._write(prompts, writing, max_new_tokens, sampling, stops, on_token)
        finally:
            for text in owned:
                self.free(text)

    def _write(
        self,
        prompts: list[list[int]],
        texts: list[Text],
        max_new_tokens: int,
        sampling: Sampling,
        stops: frozenset[int],
        on_token: Callable[[int, int], None] | None,
    ) -> list[list[int]]:
        written: list[list[int]] = [[] for _ in prompts]
        budgets = [min(max_new_tokens, self.max_length - len(prompt)) for prompt in prompts]
        running = [index for index, budget in enumerate(budgets) if budget > 0]
        generator = sampling.generator()
        new_ids = {index: prompts[index][texts[index].length :] for index in running}
        while running:
            steps = in_steps([(texts[index], new_ids[index]) for index in running])
            logits_NV = torch.cat([self.step(pieces) for pieces in steps])
            chosen = sample(logits_NV, sampling, generator).tolist()
            for index, token in zip(running, chosen, strict=True):
                written[index].append(token)
                new_ids[index] = [token]
                if on_token:
                    on_token(index, token)
            running = [
                index for index in running if written[index][-1] not in stops and len(written[index]) < budgets[index]
            ]
        return written

    def _check_depth(self, depth: int) -> None:
        num_ahead = self.program.num_ahead
        if not 1 <= depth <= num_ahead:
            advice = "" if num_ahead else "; make it with mtp=True"
            raise GenerationError(
                f"depth={depth}; this engine has {num_ahead} layers that predict further tokens{advice}"
            )

    def _batch(self, pieces: Sequence[Piece], depth: int = 0) -> Batch:
        token_ids_T = self._checked(pieces, depth)
        counts = [len(piece.token_ids) for piece in pieces]
        starts = [_places(piece.text, depth) for piece in pieces]
        for piece, start, count in zip(pieces, starts, counts, strict=True):
            if self.cache.make_room(piece.text, start + count, start):
                self.program.connect(self.cache)  # at once: the blocks that it knew are gone
        # Number by number: much of what numpy and torch do lets go of the interpreter's lock, which a server's
        # other threads wait for, and does not get it back before these have told all clients of the step before.
        spans = [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
        return Batch(
            token_ids_T,
            np.fromiter(itertools.chain.from_iterable(spans), np.int64),
            np.fromiter((text for text, span in enumerate(spans) for _ in span), np.int32),
            _tables([piece.text.blocks for piece in pieces]),
            np.fromiter(_output_rows(pieces), np.int64),
        )

    def _checked(self, pieces: Sequence[Piece], depth: int) -> np.ndarray:
        """All token ids, int64, of pieces that can be run."""
        if len({id(piece.text) for piece in pieces}) < len(pieces):
            raise GenerationError("two pieces of one text in a step; put their tokens into one piece")
        longest = max((_places(piece.text, depth) + len(piece.token_ids) for piece in pieces), default=0)
        if longest > self.max_length:
            raise GenerationError(f"a text of {longest} tokens; this engine's texts have {self.max_length} or fewer")
        token_ids_T = np.fromiter((token for piece in pieces for token in piece.token_ids), np.int64)
        vocab = self.config.vocab_size
        if len(token_ids_T) and not 0 <= int(token_ids_T.min()) <= int(token_ids_T.max()) < vocab:
            seen = f"token ids {token_ids_T.min()} to {token_ids_T.max()}"
            raise GenerationError(f"{seen}; the model knows 0 to {vocab - 1}")
        return token_ids_T


def _places(text: Text, depth: int) -> int:
    """How many of a text's places the model, or a layer that predicts further tokens, has seen."""
    return text.ahead.get(depth, 0) if depth else text.length


def _check_places(piece: Piece, depth: int) -> None:
    wanted, seen = _places(piece.text, depth) + len(piece.token_ids), _places(piece.text, depth - 1)
    if wanted > seen:
        before = f"ahead(..., depth={depth - 1})" if depth > 1 else "step"
        raise GenerationError(f"{wanted} places of a text of which {before} has seen {seen}; run that first")


def in_steps(texts: list[tuple[Text, list[int]]]) -> Iterator[list[Piece]]:
    """New tokens of texts in steps of limited size; of each text's last one logits are wanted."""
    pieces: list[Piece] = []
    room = PREFILL_TOKENS
    for text, left in texts:
        while left:
            now, left = left[:room], left[room:]
            pieces.append(Piece(text, now, "none" if left else "last"))
            room -= len(now)
            if room == 0:
                yield pieces
                pieces, room = [], PREFILL_TOKENS
    if pieces:
        yield pieces


def _tables(blocks: Sequence[list[int]]) -> np.ndarray:
    """Of each text its blocks, int32, in a row as wide as the longest."""
    width = max(map(len, blocks), default=0)
    rows = [each + [0] * (width - len(each)) for each in blocks]
    return np.array(rows, np.int32).reshape(len(blocks), width)


def _output_rows(pieces: Sequence[Piece]) -> Iterator[int]:
    end = 0
    for piece in pieces:
        start, end = end, end + len(piece.token_ids)
        if piece.wants != "none" and end > start:
            yield from range(end - 1 if piece.wants == "last" else start, end)


def _weights(path_or_model: str | os.PathLike[str] | LanguageModel | Weights) -> Weights:
    if isinstance(path_or_model, str | os.PathLike):
        return FileWeights(open_source(weights_place(path_or_model)))
    return ModelWeights(path_or_model) if isinstance(path_or_model, LanguageModel) else path_or_model


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
