"""Recording routing into a trace, and dictating it from one. T tokens, E experts, K choices a token, R rows."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from moesaic.config import ModelConfig
from moesaic.errors import TraceError
from moesaic.routing.routing import RoutingDecision, RoutingTape, Rows
from moesaic.trace import Fingerprint, TokenRows, Trace, TracedForward, TraceWriter


class TraceTape(RoutingTape):
    """Writes every forward that it hears into a trace: a training micro-batch, a batch of text, a token of generation.

    It only reads: results with and without it are the same bits. Of a forward that fails halfway nothing is written.
    Raises TraceError for layers that the writer's fingerprint does not have, or not in this order.
    """

    def __init__(self, writer: TraceWriter) -> None:
        super().__init__()
        self.writer = writer
        self._layers = [layer.layer for layer in writer.fingerprint.layers]
        self._rows: dict[int, TokenRows] = {}
        self._chosen: dict[int, TokenRows] = {}
        self._domains: Tensor | int | None = None

    def set_domains(self, domains: Tensor | int | None) -> None:
        """Say which of the writer's domains the next forward's tokens belong to: one for all, or B x S integers.

        Holds until the next call. All forwards of a trace have domains, or none has.
        """
        self._domains = domains

    def hear(self, layer: int, decision: RoutingDecision) -> None:
        """Keep one layer's rows until the forward's last layer has been heard, then write them all."""
        if layer == self._layers[0]:
            self._rows, self._chosen = {}, {}
        expected = self._layers[len(self._rows)]
        if layer != expected:
            raise TraceError(f"layer {layer} routes where layer {expected} should; write the trace of one model alone")
        self._rows[layer] = token_rows(decision.rows)
        chosen = token_rows(decision.chosen) if decision.before_capacity is not None else self._rows[layer]
        if not chosen.equals(self._rows[layer]):
            self._chosen[layer] = chosen
        if len(self._rows) == len(self._layers):
            self.writer.append(self._forward(decision))
            self._rows, self._chosen = {}, {}

    def _forward(self, decision: RoutingDecision) -> TracedForward:
        return TracedForward(
            rows=self._rows,
            chosen=self._chosen,
            token_ids_T=_numpy(decision.token_ids_T),
            mask_T=_numpy(decision.mask_T),
            document_ids_T=_numpy(decision.document_ids_T),
            domain_ids_T=self._domain_ids(decision.rows.num_tokens),
        )

    def _domain_ids(self, num_tokens: int) -> np.ndarray | None:
        if isinstance(self._domains, int):
            return np.full(num_tokens, self._domains)
        return None if self._domains is None else _numpy(self._domains.reshape(-1))


class ReplayTape(RoutingTape):
    """Dictates the rows of a trace, weights included: its forwards from `start` on, one for each forward of the model.

    The same weights, number format, batch and kernels then give the same bits as when it was recorded; other weights
    are told where to send their tokens. Raises TraceError for a trace of another model, a batch of other tokens or
    padding than the recorded one, and a forward after the last.
    """

    def __init__(
        self, trace: Trace, config: ModelConfig, *, start: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.trace = trace.require(Fingerprint.of(config))
        self.next_forward, self.device = start, device
        self._forward: TracedForward | None = trace.forward(start)
        self._dictate()

    def hear(self, layer: int, decision: RoutingDecision) -> None:
        """Compare the batch with the recorded one; after the last layer go on to the next forward."""
        if self._forward is None:
            raise TraceError(f"{self.trace.path} ends after {len(self.trace)} forwards; record as many as are replayed")
        if layer == self.trace.layers[0]:
            self._check(self._forward, decision)
        if layer == self.trace.layers[-1]:
            self.next_forward += 1
            self._forward = self.trace.forward(self.next_forward) if self.next_forward < len(self.trace) else None
            self._dictate()

    def _dictate(self) -> None:
        # A new dictionary each time: a layer that is computed again for its gradient still holds the old one.
        rows = self._forward.rows if self._forward is not None else {}
        self.replay = rows_by_layer(rows, self.trace.fingerprint, self.device)

    def _check(self, forward: TracedForward, decision: RoutingDecision) -> None:
        which = f"forward {self.next_forward} of {self.trace.path}"
        remedy = "give the batches that were recorded, in their order, or say which is first with `start`"
        num_tokens = decision.logits_TE.shape[0]
        mask_T = np.ones(num_tokens, bool) if decision.mask_T is None else _numpy(decision.mask_T)
        assert mask_T is not None and forward.mask_T is not None
        if (at := np.flatnonzero(mask_T != forward.mask_T)).size:
            raise TraceError(f"{which} has other padding than this batch, first at token {at[0]}; {remedy}")
        if forward.token_ids_T is None or decision.token_ids_T is None:
            return
        ids_T = _numpy(decision.token_ids_T)
        assert ids_T is not None
        if (at := np.flatnonzero((ids_T != forward.token_ids_T) & mask_T)).size:
            ids = f"id {forward.token_ids_T[at[0]]} and this batch {ids_T[at[0]]}"
            raise TraceError(f"token {at[0]} of {which} has {ids}; {remedy}")


class Both(RoutingTape):
    """Several tapes at the same forwards: all of them hear, the first one dictates."""

    def __init__(self, first: RoutingTape, *others: RoutingTape) -> None:
        super().__init__(first.replay, choices=first.choices)
        self.tapes = (first, *others)

    def hear(self, layer: int, decision: RoutingDecision) -> None:
        """Pass the decision on to every tape, in their order."""
        for tape in self.tapes:
            tape.hear(layer, decision)
        self.replay, self.choices = self.tapes[0].replay, self.tapes[0].choices


def token_rows(rows: Rows) -> TokenRows:
    """Rows in token order, as a trace keeps them."""
    order_R, offsets = rows.by_token
    arrays = (offsets, *(array[order_R] for array in (rows.expert_ids_R, rows.choice_R, rows.weights_R.detach())))
    return TokenRows(*(array.cpu().numpy() for array in arrays), weight_on=rows.weight_on)


def sorted_rows(traced: TokenRows, num_experts: int, top_k: int, device: torch.device | str = "cpu") -> Rows:
    """The inverse: rows sorted by expert. top_k: what the model's configuration says; tokens may have other numbers."""
    expert_ids_R = torch.from_numpy(traced.expert_ids_R.astype(np.int64))
    order_R = torch.argsort(expert_ids_R, stable=True)  # inside an expert they stay by token, then choice
    offsets = torch.zeros(num_experts + 1, dtype=torch.int64)
    offsets[1:] = torch.bincount(expert_ids_R, minlength=num_experts).cumsum(0)
    arrays = (traced.token_ids_R, traced.weights_R, traced.choices_R.astype(np.int64))
    token_ids_R, weights_R, choice_R = (torch.tensor(array)[order_R].to(device) for array in arrays)
    return Rows(
        token_ids_R=token_ids_R,
        expert_offsets=offsets,
        weights_R=weights_R,
        choice_R=choice_R,
        num_tokens=traced.num_tokens,
        top_k=top_k if _has_topk(traced, top_k) else None,
        weight_on=traced.weight_on,
    )


def rows_by_layer(
    rows: Mapping[int, TokenRows], fingerprint: Fingerprint, device: torch.device | str = "cpu"
) -> dict[int, Rows]:
    """What a RoutingTape takes as `replay`, from a traced forward's rows."""
    return {
        layer.layer: sorted_rows(rows[layer.layer], layer.num_experts, layer.top_k, device)
        for layer in fingerprint.layers
        if layer.layer in rows
    }


def _has_topk(traced: TokenRows, top_k: int) -> bool:
    """Whether every token has its choices 0 to K-1, or no row at all."""
    counts_T = traced.rows_of_tokens
    if not np.isin(counts_T, (0, top_k)).all():
        return False
    return bool((traced.choices_R.reshape(-1, top_k) == np.arange(top_k)).all())


def _numpy(values: Tensor | None) -> np.ndarray | None:
    return None if values is None else values.cpu().numpy()
