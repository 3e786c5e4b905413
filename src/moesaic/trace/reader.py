"""Reads a trace. F forwards, N tokens, R rows, E experts, M domains."""

import json
import zipfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from moesaic.errors import TraceError
from moesaic.trace.archive import is_whole, read_archive
from moesaic.trace.checks import wrong_range, wrong_rows, wrong_tokens
from moesaic.trace.fingerprint import Fingerprint
from moesaic.trace.layout import (
    ABOUT,
    ALWAYS_KNOWN,
    FORMAT,
    FORWARD_OFFSETS,
    ROW_ARRAYS,
    TOKEN_DTYPES,
    VERSION,
    chosen_folder,
    layer_folder,
)
from moesaic.trace.rows import Counts, TokenRows, TracedForward

_CHUNK = 1 << 18  # tokens whose domains are counted at a time


class Trace:
    """A recorded trace: every byte verified, then mapped into memory, so that only what is looked at is read.

    len(trace) is the number of forwards; iterating gives them in the order of recording. Arrays are read-only views.
    domains: the names of what `domain_ids_T` count. forward_offsets [F+1]: forward f has the tokens from its offset to
    the next. token_facts: mask, document_ids and, where known, token_ids and domain_ids of all forwards' tokens [N].
    """

    def __init__(self, path: Path, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """See `open`. Raises KeyError, TypeError or ValueError where something does not fit together."""
        self.path = path
        self.fingerprint = Fingerprint.from_json(about["fingerprint"])
        self.domains = tuple(map(str, about["domains"]))
        self.forward_offsets = arrays[FORWARD_OFFSETS]
        self.token_facts = {name: arrays[name] for name in TOKEN_DTYPES if name in arrays or name in ALWAYS_KNOWN}
        self._rows: dict[int, TokenRows] = {}
        self._chosen: dict[int, TokenRows] = {}
        for layer in self.fingerprint.num_experts:
            weight_on = about["weight_on"][str(layer)]
            self._rows[layer] = _token_rows(arrays, layer_folder(layer), weight_on)
            if f"{chosen_folder(layer)}/{ROW_ARRAYS[0]}" in arrays:
                self._chosen[layer] = _token_rows(arrays, chosen_folder(layer), weight_on)
        if wrong := self._what_is_wrong():
            raise ValueError(wrong)

    @classmethod
    def open(cls, path: str | Path) -> "Trace":
        """Verify and map a file. Costs about a second a gigabyte.

        Raises TraceError when it is damaged, no trace, or of another version; OSError when it cannot be read.
        """
        path = Path(path)
        data = np.memmap(path, np.uint8, "r").view(np.ndarray) if path.stat().st_size else np.zeros(0, np.uint8)
        if not is_whole(data):
            raise TraceError(
                f"{path} is no whole routing trace: it does not end in the SHA-256 of its bytes (it was cut short, "
                "damaged, or something else wrote it); record it again with `moesaic trace`"
            )
        try:
            entries = read_archive(path, data)
            about = json.loads(dict([next(entries)])[ABOUT].tobytes())
            if about["format"] != FORMAT:
                raise ValueError(f"format {about['format']!r}")
            if about["version"] != VERSION:
                versions = f"version {about['version']} and this moesaic reads version {VERSION}"
                raise TraceError(f"{path} is a routing trace of {versions}; record it again, or update moesaic")
            return cls(path, about, dict(entries))
        except (KeyError, TypeError, ValueError, IndexError, StopIteration, zipfile.BadZipFile) as error:
            raise TraceError(f"{path} is not as moesaic writes routing traces ({error!r}); record it again") from error

    def __len__(self) -> int:
        return len(self.forward_offsets) - 1

    def __iter__(self) -> Iterator[TracedForward]:
        return map(self.forward, range(len(self)))

    @property
    def num_tokens(self) -> int:
        """N, padding included."""
        return int(self.forward_offsets[-1])

    @cached_property
    def num_routed_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(np.count_nonzero(self.token_facts["mask"]))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that route."""
        return tuple(self._rows)

    def forward(self, index: int) -> TracedForward:
        """One forward's rows and tokens. Raises TraceError for a number that is not there."""
        if not 0 <= index < len(self):
            allowed = f"use 0 to {len(self) - 1}" if len(self) else "record at least one"
            raise TraceError(f"forward {index} of {self.path}, which holds {len(self)}; {allowed}")
        first, last = map(int, self.forward_offsets[index : index + 2])
        return TracedForward(
            rows={layer: rows.tokens(first, last) for layer, rows in self._rows.items()},
            chosen={layer: rows.tokens(first, last) for layer, rows in self._chosen.items()},
            **{f"{name}_T": values[first:last] for name, values in self.token_facts.items()},
        )

    def rows(self, layer: int) -> TokenRows:
        """One layer's rows in all forwards, as the experts computed them. Raises TraceError for a layer without."""
        if layer not in self._rows:
            raise TraceError(f"layer {layer} of {self.path}, where layers {list(self._rows)} route; name one of them")
        return self._rows[layer]

    def chosen(self, layer: int) -> TokenRows:
        """One layer's rows in all forwards as its router chose them, before any capacity."""
        return self._chosen[layer] if layer in self._chosen else self.rows(layer)

    def counts(self, layer: int) -> Counts:
        """Rows of each expert in all forwards, [E]."""
        return self.rows(layer).counts(self.fingerprint.num_experts[layer])

    def domain_counts(self, layer: int) -> Counts:
        """Rows of each domain at each expert, [M, E]. Raises TraceError when domains were not recorded."""
        if "domain_ids" not in self.token_facts:
            raise TraceError(f"{self.path} does not know its tokens' domains; record it from a corpus with domains")
        shape = (len(self.domains), self.fingerprint.num_experts[layer])
        counts_ME = np.zeros(shape, np.int64)
        for first in range(0, self.num_tokens, _CHUNK):
            part = self.rows(layer).tokens(first, min(first + _CHUNK, self.num_tokens))
            domains_R = self.token_facts["domain_ids"][first : first + _CHUNK].astype(np.int64)[part.token_ids_R]
            cells_R = (domains_R * shape[1] + part.expert_ids_R)[domains_R >= 0]
            counts_ME += np.bincount(cells_R, minlength=counts_ME.size).reshape(shape)
        return counts_ME

    def domain_shares(self, layer: int) -> np.ndarray:
        """The part of each domain's rows that each expert serves, float64 [M, E]; a domain without rows has zeros."""
        counts_ME = self.domain_counts(layer)
        totals_M1 = counts_ME.sum(axis=1, keepdims=True)
        return np.divide(counts_ME, totals_M1, out=np.zeros(counts_ME.shape), where=totals_M1 > 0)

    def require(self, fingerprint: Fingerprint) -> Self:
        """This trace, if it is of such a model. Raises TraceError that names both sides if it is not."""
        difference = self.fingerprint.difference(fingerprint)
        if difference is None:
            return self
        raise TraceError(
            f"{self.path} was recorded with another model: {difference[0]}, and here it is {difference[1]}; take the "
            "model it was recorded with, or record this one with `moesaic trace`"
        )

    def require_tokens(self) -> Self:
        """This trace, if a token was routed in it. Raises TraceError for one of nothing, or of padding alone."""
        if self.num_routed_tokens:
            return self
        held = f"{self.num_tokens} tokens that are all padding" if self.num_tokens else "no tokens"
        raise TraceError(f"{self.path} is a whole trace and holds {held}; record one of some text with `moesaic trace`")

    def _what_is_wrong(self) -> str | None:
        offsets = self.forward_offsets
        if wrong := wrong_range(FORWARD_OFFSETS, offsets, 0, np.iinfo(np.int64).max):
            return wrong
        if offsets[0] != 0 or (np.diff(offsets) < 0).any():
            return f"{FORWARD_OFFSETS} that do not rise from 0"
        if wrong := wrong_tokens(self.token_facts, self.num_tokens, len(self.domains)):
            return wrong
        for by_layer in (self._rows, self._chosen):
            for layer, rows in by_layer.items():
                if wrong := wrong_rows(rows, self.num_tokens, self.fingerprint.num_experts[layer]):
                    return f"layer {layer} has {wrong}"
        return None


def _token_rows(arrays: dict[str, np.ndarray], folder: str, weight_on: Any) -> TokenRows:
    if weight_on not in ("output", "input"):
        raise ValueError(f"weight_on {weight_on!r}")
    return TokenRows(*(arrays[f"{folder}/{name}"] for name in ROW_ARRAYS), weight_on=weight_on)
