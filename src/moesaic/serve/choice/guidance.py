"""Text that must be JSON, or of a schema, an expression or a grammar: which tokens may come next.

llguidance parses and computes the masks; here grammars are compiled once, beside the engine, and each request has its
place in one. V vocab.
"""

import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers

from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import GenerationError, MissingDependencyError
from moesaic.serve.request import Grammar, Request

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_CHARACTERS = 65_536
COMPILE_S = 5.0
SLOW_MASK_S = 0.0005
KEPT_GRAMMARS = 64
MAX_SYMBOLS = 50_000  # of a grammar; llguidance's own limit, ten times that, lets it work for half a minute
# Small models write spaces without end where they may: what llama.cpp's schemas allow instead.
JSON_SPACE = r" ?|\n{1,2}[ \t]{0,20}"
_END = "<|end of the grammar|>"  # a token of llguidance's alone: which of the model's tokens end a text, requests say


class Guidance:
    """Compiles grammars for a tokenizer, and computes masks while the engine runs.

    vocab_size: of the model, whose logits may be more than the tokenizer has tokens; those are never allowed.
    Thread-safe.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._compilers = ThreadPoolExecutor(2, "grammars")
        self._masks = ThreadPoolExecutor(1, "masks")
        self._lock = threading.Lock()
        self._compiled: OrderedDict[Grammar, Future[LLMatcher]] = OrderedDict()
        # At once: it takes seconds for large vocabularies, of which no request's limit should know.
        self._vocabulary = self._compilers.submit(self._make_vocabulary)

    def guide(self, request: Request) -> "Guide | None":
        """A place at the beginning of a request's grammar, if it has one; waits until that is compiled.

        Raises GenerationError for one that is too large, wrong, impossible, or takes too long, and
        MissingDependencyError without llguidance.
        """
        grammar = request.grammar
        if grammar is None:
            return None
        if len(grammar.text) > MAX_CHARACTERS:
            raise GenerationError(
                f"a {_name(grammar)} of {len(grammar.text):,} characters; use {MAX_CHARACTERS:,} or fewer"
            )
        vocabulary, end_id = self._vocabulary.result()
        try:
            matcher = self._future(grammar).result(COMPILE_S)
        except TimeoutError as error:
            raise GenerationError(f"a {_name(grammar)} that takes more than {COMPILE_S:g} s to compile") from error
        known = self._tokenizer.vocab_size
        eos_ids = sorted(token for token in request.eos_token_ids if token < self.vocab_size)
        ends = [
            token
            for token in eos_ids
            if token == self._tokenizer.eos_id or token >= known or vocabulary.is_special_token(token)
        ]
        return Guide(matcher.deep_copy(), end_id, ends, self.vocab_size)

    def look_ahead(self, guides: Sequence[tuple["Guide", Sequence[int]]]) -> None:
        """Begin to compute what each of these may write next, and after each of its drafts, where that takes long.

        Most masks take less time than handing them to another thread, which would take its processor from the engine.
        """
        slow = [(guide, drafts) for guide, drafts in guides if guide.mask_s > SLOW_MASK_S]
        if slow:
            done = self._masks.submit(lambda: [guide.compute(drafts) for guide, drafts in slow])
            for guide, _ in slow:
                guide.wait_for(done)

    def close(self) -> None:
        """End the threads, once they have done what they are at."""
        self._compilers.shutdown(wait=False, cancel_futures=True)
        self._masks.shutdown(wait=False, cancel_futures=True)

    def _future(self, grammar: Grammar) -> "Future[LLMatcher]":
        with self._lock:
            future = self._compiled.get(grammar)
            if future is None:
                future = self._compiled[grammar] = self._compilers.submit(self._compile, grammar)
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > KEPT_GRAMMARS:
                self._compiled.popitem(last=False)
            return future

    def _compile(self, grammar: Grammar) -> "LLMatcher":
        vocabulary, end_id = self._vocabulary.result()
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_grammar_size=MAX_SYMBOLS, verbose_errors=False)
        try:
            matcher = LLMatcher(vocabulary, _source(grammar), log_level=0, limits=limits)
        except ValueError as error:
            raise GenerationError(f"a {_name(grammar)} that cannot be used: {_line(str(error))}") from error
        if matcher.is_error():
            raise GenerationError(f"a {_name(grammar)} that cannot be used: {_line(matcher.get_error())}")
        first, _ = _bits(matcher, end_id)
        if matcher.is_error() or not any(first):
            raise GenerationError(f"a {_name(grammar)} that no text fulfils, or only the empty one")
        return matcher

    def _make_vocabulary(self) -> "tuple[LLTokenizer, int]":
        """The tokenizer with a token more, that ends texts, and the id of that."""
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise MissingDependencyError(
                'schemas, expressions and grammars need the package llguidance; run: pip install "moesaic[serve]"'
            ) from error
        backend = tokenizers.Tokenizer.from_str(self._tokenizer.backend.to_str())
        backend.add_special_tokens([tokenizers.AddedToken(_END, special=True, normalized=False)])
        end_id = backend.token_to_id(_END)
        assert end_id is not None and self._tokenizer.backend.id_to_token(end_id) is None
        return LLTokenizer(backend.to_str(), eos_token=end_id), end_id


class Guide:
    """One request's place in its grammar.

    ended: nothing may follow; error: what went wrong on the way, which ends the request too. mask_s: that its newest
    masks took, each.
    """

    def __init__(self, matcher: "LLMatcher", end_id: int, ends: Sequence[int], vocab_size: int) -> None:
        self.ended, self.error, self.mask_s = False, "", 0.0
        self._matcher, self._end_id = matcher, end_id
        self._ends, self._mask_bytes = list(ends), (vocab_size + 7) // 8
        self._pending: Future[Any] | None = None
        self._drafts: list[int] = []
        self._masks: list[np.ndarray] = []  # what may follow the text, and each of the drafts

    def num_valid(self, drafts: Sequence[int]) -> int:
        """How many of these the grammar allows, one after another."""
        self._settle()
        return self._num_valid(drafts)

    def allowed(self, drafts: Sequence[int] = ()) -> np.ndarray:
        """Which tokens may follow the text and these drafts, uint8 [V / 8, rounded up], token t's bit t % 8 of byte
        t // 8 (others of the last byte mean nothing); none where the text has ended.

        All, after drafts that are not valid themselves.
        """
        self._settle()
        count = len(drafts)
        if self._drafts[:count] != list(drafts) or not self._masks:
            self.compute(drafts)
        return self._masks[count] if count < len(self._masks) else np.full(self._mask_bytes, 255, np.uint8)

    def add(self, token_id: int) -> bool:
        """Go on by a token. False: the grammar does not take it, and the text ends before it."""
        self._settle()
        mask = self._masks[0] if self._masks else None
        self._masks, self._drafts = [], []
        if token_id in self._ends:
            self.ended = True
            return self._matcher.is_accepting()
        # A mask says it faster, but not of tokens that are valid where another spelling of the same text is forced.
        if not (mask is not None and _has(mask, token_id)) and not self._num_valid([token_id]):
            self.ended = True
            if not (self._matcher.is_accepting() or self.error):
                self.error = f"token {token_id} is not of the grammar"
            return False
        self._matcher.consume_token(token_id)
        self._check()
        self.ended = self.ended or self._matcher.is_stopped()
        return True

    def wait_for(self, done: "Future[Any]") -> None:
        """`compute` runs elsewhere until this is done; everything else waits for it."""
        self._pending = done

    def compute(self, drafts: Sequence[int]) -> None:
        """Find what may follow the text, and each of the drafts that are valid."""
        began = time.perf_counter()
        valid = list(drafts[: self._num_valid(drafts)])
        masks = [self._mask()]
        for token in valid:
            self._matcher.consume_token(token)
            masks.append(self._mask())
        if valid:
            self._matcher.rollback(len(valid))
        self._masks, self._drafts = masks, list(drafts)
        self.mask_s = (time.perf_counter() - began) / len(masks)
        self._check()

    def _num_valid(self, token_ids: Sequence[int]) -> int:
        known = list(itertools.takewhile(lambda token: token < self._end_id, token_ids))  # others break a matcher
        return self._matcher.validate_tokens(known) if known else 0

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _mask(self) -> np.ndarray:
        bits, may_end = _bits(self._matcher, self._end_id)
        bits.extend(bytes(max(0, self._mask_bytes - len(bits))))
        for token in self._ends:
            if may_end:
                bits[token >> 3] |= 1 << (token & 7)
            else:
                bits[token >> 3] &= ~(1 << (token & 7))
        return np.frombuffer(bits, np.uint8, self._mask_bytes)

    def _check(self) -> None:
        """What llguidance has met on the way, a limit of its own for example."""
        if self._matcher.is_error():
            self.error = self.error or f"the grammar: {_line(self._matcher.get_error())}"
            self.ended = True


def _source(grammar: Grammar) -> str:
    """As llguidance takes it. Raises ValueError for a schema that is not JSON."""
    from llguidance import LLMatcher

    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "lark":
        return LLMatcher.grammar_from_lark(grammar.text)
    schema = '{"type": "object"}' if grammar.kind == "json_object" else grammar.text
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": JSON_SPACE})


def _bits(matcher: "LLMatcher", end_id: int) -> tuple[bytearray, bool]:
    """Which tokens may be next, the end apart: token t's bit t % 8 of byte t // 8; and whether the end may."""
    bits = bytearray(matcher.compute_bitmask())
    place, bit = end_id >> 3, 1 << (end_id & 7)
    may_end = bool(bits[place] & bit)
    bits[place] &= ~bit
    return bits, may_end


def _has(mask: np.ndarray, token_id: int) -> bool:
    return token_id < 8 * len(mask) and bool(mask[token_id >> 3] >> (token_id & 7) & 1)


def _name(grammar: Grammar) -> str:
    return {"regex": "regular expression", "lark": "grammar"}.get(grammar.kind, "JSON schema")


def _line(message: str) -> str:
    """The first line of a message, and the last sentence where that says what is wrong."""
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    error = next((line for line in lines if line.startswith("error:")), "")
    return " ".join(part for part in (lines[0] if lines else "unknown", error) if part)
