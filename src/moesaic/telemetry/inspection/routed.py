"""Text through a model and its routing into a trace: with the engine where it runs the model, else with the decoder.

T tokens, M columns of choices.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from moesaic import hub
from moesaic.config import ModelConfig
from moesaic.errors import CheckpointError, DataError
from moesaic.hub.resolve import locate
from moesaic.kernels import backend
from moesaic.models.build import decoder_only
from moesaic.routing.taping import token_rows
from moesaic.telemetry.inspection.windows import Window, Windows
from moesaic.trace import Fingerprint, TokenRows, TracedForward, TraceWriter

STEP_TOKENS = 1024  # that go through together


class Routed(Protocol):
    """A model that tells which experts serve which tokens."""

    fingerprint: Fingerprint
    vocab_size: int
    context_length: int

    def route(self, windows: Sequence[Window]) -> list[dict[int, TokenRows]]:
        """Who serves each window's tokens, by layer: all windows in one step of the engine."""
        """The rows of each window's tokens, by layer."""
        ...


def open_routed(path_or_preset: str) -> Routed:
    """A checkpoint, ready to route.

    Raises TraceError for a model without experts (before its weights are read), CheckpointError for one that cannot be
    read, ConfigError for one with an encoder.
    """
    config = hub.read_config(path_or_preset)
    config.check_decoder_only("inspect")
    fingerprint = Fingerprint.of(config)
    place = locate(path_or_preset)
    if place.kind == "folder" and (place.path / "weights.safetensors").exists():
        raise CheckpointError(
            f"{place.path} keeps its weights under our own names, to go on with training; give the run's model folder"
        )
    if backend.name == "native":
        from moesaic.engine.lower.refusal import refusal

        if refusal(config) is None:
            return _EngineRouted(path_or_preset, config, fingerprint)
    return _DecoderRouted(path_or_preset, config, fingerprint)


def record(model: Routed, text: Windows, path: Path) -> Iterator[int]:
    """Route all windows and write their trace to `path`. Yields the number of tokens of each step that is done.

    Raises DataError for tokens that the model does not know.
    """
    check_known(text, model.vocab_size)
    with TraceWriter(path, model.fingerprint, domains=text.domains) as writer:
        for windows in _steps(text.windows):
            for window, rows in zip(windows, model.route(windows), strict=True):
                writer.append(_forward(window, rows))
            yield sum(len(window.token_ids_T) for window in windows)


def check_known(text: Windows, vocab_size: int) -> None:
    """Raise DataError for tokens that a model of this vocabulary does not know."""
    highest = max((int(window.token_ids_T.max()) for window in text.windows), default=0)
    if highest >= vocab_size:
        raise DataError(
            f"token id {highest} in the text, and the model knows 0 to {vocab_size - 1}; it was made with another "
            "tokenizer: put the model's own tokenizer.json beside its weights, and pack text with that (`moesaic pack "
            "--tokenizer MODEL_FOLDER`)"
        )


def _forward(window: Window, rows: dict[int, TokenRows]) -> TracedForward:
    size = len(window.token_ids_T)
    documents = np.zeros(size, np.int64) if window.document_ids_T is None else window.document_ids_T
    return TracedForward(
        rows=rows,
        token_ids_T=window.token_ids_T,
        mask_T=np.ones(size, bool),
        document_ids_T=documents,
        domain_ids_T=np.full(size, window.domain),
    )


def _steps(windows: Sequence[Window]) -> Iterator[list[Window]]:
    step: list[Window] = []
    for window in windows:
        if step and sum(len(each.token_ids_T) for each in [*step, window]) > STEP_TOKENS:
            yield step
            step = []
        step.append(window)
    if step:
        yield step


class _EngineRouted:
    """Reads the step's own routing buffers: no hooks, no logits."""

    def __init__(self, path_or_preset: str, config: ModelConfig, fingerprint: Fingerprint) -> None:
        from moesaic.engine.engine import Engine

        self.engine = Engine(path_or_preset)
        self.fingerprint, self.vocab_size, self.context_length = fingerprint, config.vocab_size, self.engine.max_length

    def route(self, windows: Sequence[Window]) -> list[dict[int, TokenRows]]:
        from moesaic.engine.cache import Text
        from moesaic.engine.engine import Piece

        pieces = [Piece(Text(), window.token_ids_T.tolist(), "none") for window in windows]
        try:
            self.engine.step(pieces)
            rows = {layer: _of_choices(*routed) for layer, routed in self.engine.routed().items()}
        finally:
            for piece in pieces:
                self.engine.free(piece.text)
        ends = np.cumsum([len(window.token_ids_T) for window in windows])
        starts = [0, *ends[:-1]]
        return [
            {layer: each.tokens(int(first), int(last)) for layer, each in rows.items()}
            for first, last in zip(starts, ends, strict=True)
        ]


def _of_choices(expert_ids_TM: torch.Tensor, weights_TM: torch.Tensor) -> TokenRows:
    """Rows of the engine's choices, where -1 is none."""
    there_TM = (expert_ids_TM >= 0).numpy()
    choices_TM = np.broadcast_to(np.arange(there_TM.shape[1]), there_TM.shape)
    return TokenRows(
        row_offsets=np.append(0, there_TM.sum(1).cumsum()),
        expert_ids_R=expert_ids_TM.numpy()[there_TM],
        choices_R=choices_TM[there_TM],
        weights_R=weights_TM.numpy()[there_TM],
    )


class _DecoderRouted:
    """The plain decoder, for models that the engine does not run."""

    def __init__(self, path_or_preset: str, config: ModelConfig, fingerprint: Fingerprint) -> None:
        self.fingerprint, self.vocab_size, self.context_length = fingerprint, config.vocab_size, config.context_length
        self.model = decoder_only(hub.load(path_or_preset), "inspect").eval()

    @torch.no_grad()
    def route(self, windows: Sequence[Window]) -> list[dict[int, TokenRows]]:
        from moesaic.models.decoder import route

        found = []
        for window in windows:
            rows = route(self.model, torch.from_numpy(window.token_ids_T.astype(np.int64))[None])
            found.append({layer: token_rows(rows[layer]) for layer in self.fingerprint.num_experts})
        return found
