"""Writes a trace, forward by forward. N tokens, T tokens of one forward, R rows."""

import json
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from moesaic.errors import TraceError
from moesaic.trace.archive import ArrayParts, seal, write_archive
from moesaic.trace.checks import wrong_rows, wrong_tokens
from moesaic.trace.fingerprint import Fingerprint
from moesaic.trace.layout import (
    ABOUT,
    ALWAYS_KNOWN,
    FORMAT,
    FORWARD_OFFSETS,
    OFFSETS_DTYPE,
    ROW_ARRAYS,
    TOKEN_DTYPES,
    VERSION,
    WEIGHT_DTYPES,
    chosen_folder,
    id_dtype,
    layer_folder,
)
from moesaic.trace.rows import TokenRows, TracedForward
from moesaic.trace.spool import Spool


class TraceWriter:
    """Streams forwards into a trace, which appears at `path` when it is closed and not before.

    Use it in a `with` block: an exception inside leaves what was at `path` as it was. Of what is written at most
    64 KiB for each array of the file stay in memory. domains: the names of what `domain_ids_T` count.
    Raises TraceError for forwards that do not fit the fingerprint or those before them, OSError when the disk says no.
    """

    def __init__(self, path: str | Path, fingerprint: Fingerprint, *, domains: Sequence[str] = ()) -> None:
        self.path, self.fingerprint, self.domains = Path(path), fingerprint, tuple(domains)
        if self.path.is_dir():
            raise TraceError(f"{path} is a folder; name a file for the trace, such as {self.path / 'trace.npz'}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.num_forwards = self.num_tokens = 0
        self._num_experts = fingerprint.num_experts
        self._weight_on: dict[int, str] = {}
        self._spool = Spool(self.path.parent)
        self._spool.append(FORWARD_OFFSETS, np.zeros(1, OFFSETS_DTYPE))
        for layer in self._num_experts:
            self._begin(layer_folder(layer), layer)

    def append(self, forward: TracedForward) -> None:
        """Write one forward's rows; nothing of it is kept."""
        tokens = _tokens(forward)
        self._check(forward, tokens)
        for layer, rows in forward.rows.items():
            self._weight_on[layer] = rows.weight_on
            if layer in forward.chosen and not self._has_chosen(layer):
                self._begin_chosen(layer)
            self._append_rows(layer_folder(layer), rows)
            if self._has_chosen(layer):
                self._append_rows(chosen_folder(layer), forward.chosen.get(layer, rows))
        for name, values_T in tokens.items():
            self._spool.append(name, values_T.astype(TOKEN_DTYPES[name]))
        self.num_forwards += 1
        self.num_tokens += forward.num_tokens
        self._spool.append(FORWARD_OFFSETS, np.array([self.num_tokens], OFFSETS_DTYPE))

    def close(self) -> None:
        """Put the file in its place, where it replaces what stood there."""
        staged = self.path.with_name(f".{self.path.name}.new-{uuid.uuid4().hex[:8]}")
        try:
            if not self.num_forwards:
                self._append_nothing()
            with staged.open("w+b") as file:
                write_archive(file, self._arrays())
                seal(file)
                os.fsync(file.fileno())
            staged.replace(self.path)
        finally:
            staged.unlink(missing_ok=True)
            self._spool.close()

    def abandon(self) -> None:
        """Forget what was written."""
        self._spool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def _check(self, forward: TracedForward, tokens: dict[str, np.ndarray]) -> None:
        layers = self._num_experts.keys()
        if forward.rows.keys() != layers or not forward.chosen.keys() <= layers:
            seen = sorted({*forward.rows, *forward.chosen})
            raise TraceError(f"a forward with rows of layers {seen}; this trace takes {sorted(layers)}, all of them")
        for layer, rows in [*forward.rows.items(), *forward.chosen.items()]:
            if wrong := wrong_rows(rows, forward.num_tokens, self._num_experts[layer]):
                raise TraceError(f"layer {layer} of forward {self.num_forwards} has {wrong}")
        if wrong := wrong_tokens(tokens, forward.num_tokens, len(self.domains)):
            raise TraceError(f"forward {self.num_forwards} has {wrong}")
        if self.num_forwards:
            self._check_alike(forward, tokens)

    def _check_alike(self, forward: TracedForward, tokens: dict[str, np.ndarray]) -> None:
        """All forwards of a trace know the same of their tokens, and weigh alike."""
        before = sorted(name for name in TOKEN_DTYPES if name in self._spool.lengths)
        if sorted(tokens) != before:
            raise TraceError(f"forward {self.num_forwards} has {sorted(tokens)} and those before it {before}")
        for layer, rows in [*forward.rows.items(), *forward.chosen.items()]:
            now = (rows.weight_on, rows.weights_R.dtype)
            were = (self._weight_on[layer], self._spool.dtypes[f"{layer_folder(layer)}/weights"])
            if now != were:
                differs = f"has {now[1]} weights on the {now[0]}; before it had {were[1]} on the {were[0]}"
                raise TraceError(f"layer {layer} of forward {self.num_forwards} {differs}")

    def _begin(self, folder: str, layer: int) -> None:
        ids = np.zeros(0, id_dtype(self._num_experts[layer]))
        for name, values in zip(ROW_ARRAYS, (np.zeros(1, OFFSETS_DTYPE), ids, ids), strict=False):
            self._spool.append(f"{folder}/{name}", values)

    def _has_chosen(self, layer: int) -> bool:
        return f"{chosen_folder(layer)}/{ROW_ARRAYS[0]}" in self._spool.lengths

    def _begin_chosen(self, layer: int) -> None:
        """Until now the experts computed what the router chose."""
        if not self.num_forwards:
            self._begin(chosen_folder(layer), layer)
            return
        for name in ROW_ARRAYS:
            self._spool.copy(f"{layer_folder(layer)}/{name}", f"{chosen_folder(layer)}/{name}")

    def _append_rows(self, folder: str, rows: TokenRows) -> None:
        """As the arrays that were begun; the dtype of the weights is that of the first ones."""
        ids_dtype = self._spool.dtypes[f"{folder}/expert_ids"]
        arrays = (
            (rows.row_offsets[1:] + self._spool.lengths[f"{folder}/expert_ids"]).astype(OFFSETS_DTYPE),
            rows.expert_ids_R.astype(ids_dtype),
            rows.choices_R.astype(ids_dtype),
            rows.weights_R.astype(rows.weights_R.dtype.newbyteorder("<")),
        )
        for name, values in zip(ROW_ARRAYS, arrays, strict=True):
            self._spool.append(f"{folder}/{name}", values)

    def _append_nothing(self) -> None:
        """So that a trace without forwards has the same arrays as others."""
        for name in ALWAYS_KNOWN:
            self._spool.append(name, np.zeros(0, TOKEN_DTYPES[name]))
        for layer in self._num_experts:
            self._spool.append(f"{layer_folder(layer)}/weights", np.zeros(0, WEIGHT_DTYPES[0]))

    def _arrays(self) -> Iterator[ArrayParts]:
        """Everything, in the order of the file."""
        about = json.dumps(
            {
                "format": FORMAT,
                "version": VERSION,
                "fingerprint": self.fingerprint.to_json(),
                "domains": self.domains,
                "weight_on": {str(layer): self._weight_on.get(layer, "output") for layer in self._num_experts},
            }
        ).encode()
        yield ArrayParts(ABOUT, np.dtype("u1"), len(about), iter([about]))
        for name, length in self._spool.lengths.items():
            yield ArrayParts(name, self._spool.dtypes[name], length, self._spool.read(name))


def _tokens(forward: TracedForward) -> dict[str, np.ndarray]:
    """What is known of a forward's tokens, by the names it has in the file."""
    num_tokens = forward.num_tokens
    known = {
        "mask": np.ones(num_tokens, bool) if forward.mask_T is None else forward.mask_T,
        "document_ids": np.zeros(num_tokens, int) if forward.document_ids_T is None else forward.document_ids_T,
        "token_ids": forward.token_ids_T,
        "domain_ids": forward.domain_ids_T,
    }
    return {name: values_T for name, values_T in known.items() if values_T is not None}
