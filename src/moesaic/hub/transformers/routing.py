"""What a transformers model routes, as a moesaic trace. T tokens, E experts, K choices a token."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from moesaic import families
from moesaic.errors import MoesaicError, TraceError
from moesaic.hub.transformers.modules import as_experts, experts_by_layer
from moesaic.routing import Rows
from moesaic.routing.taping import token_rows
from moesaic.trace import Fingerprint, TokenRows, Trace, TracedForward, TraceWriter
from moesaic.trace.fingerprint import LayerFingerprint


class RoutingRecorder:
    """Writes each forward of a transformers model into a trace, inside a `with` block.

    Experts and weights are those that its experts were called with, whichever implementation computes them; padding
    (attention_mask) has no rows. Results are the same bits with and without it. A model of a family that moesaic reads
    gives the trace that moesaic would: `moesaic trace`, inspection and replay take it.
    domains: the names of what `set_domains` counts. Raises ConfigError for a model without experts, TraceError for a
    block in which nothing ran.
    """

    def __init__(self, model: nn.Module, path: str | Path, *, domains: Sequence[str] = ()) -> None:
        self.model, self.path, self.domains = model, Path(path), tuple(domains)
        self._experts = experts_by_layer(model)
        self._writer: TraceWriter | None = None
        self._hooks: list[Any] = []
        self._chosen: dict[int, tuple[Tensor, Tensor]] = {}
        self._domain_ids: Tensor | int | None = None

    def set_domains(self, domains: Tensor | int | None) -> None:
        """Say which domain the next forward's tokens are of: one for all, or B x S integers. Holds until called again.

        All forwards of a trace have domains, or none has.
        """
        self._domain_ids = domains

    def __enter__(self) -> Self:
        for layer, module in self._experts.items():
            self._hooks.append(module.register_forward_pre_hook(self._hear(layer), with_kwargs=True))
        self._hooks.append(self.model.register_forward_hook(self._finish, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._writer is not None:
            self._writer.__exit__(kind, error, trace)
        elif kind is None:
            raise TraceError("no forward pass was recorded; run the model inside the `with` block")

    def _hear(self, layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | kwargs
            self._chosen[layer] = (given["top_k_index"].detach(), given["top_k_weights"].detach())

        return hook

    def _finish(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The forward is over: write it, if it was the one of all layers."""
        chosen, self._chosen = self._chosen, {}
        missing = self._experts.keys() - chosen.keys()
        if missing:
            raise TraceError(
                f"layers {sorted(missing)} routed nothing in a forward; record whole forwards of one model"
            )
        token_ids = kwargs.get("input_ids", args[0] if args else None)
        mask_T = _mask(kwargs.get("attention_mask"), token_ids)
        rows = {layer: _token_rows(self._experts[layer], *chosen[layer], mask_T) for layer in sorted(chosen)}
        if self._writer is None:
            top_ks = {layer: ids.shape[1] for layer, (ids, _) in chosen.items()}
            self._writer = TraceWriter(self.path, _fingerprint(self.model, self._experts, top_ks), domains=self.domains)
        self._writer.append(
            TracedForward(
                rows=rows,
                token_ids_T=None if token_ids is None else token_ids.reshape(-1).cpu().numpy(),
                mask_T=None if mask_T is None else mask_T.cpu().numpy(),
                document_ids_T=_documents(token_ids),
                domain_ids_T=self._domains_of(next(iter(rows.values())).num_tokens),
            )
        )

    def _domains_of(self, num_tokens: int) -> np.ndarray | None:
        if isinstance(self._domain_ids, int):
            return np.full(num_tokens, self._domain_ids)
        return None if self._domain_ids is None else self._domain_ids.reshape(-1).cpu().numpy()


@torch.no_grad()
def record_routing(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Tensor] | tuple[str, Tensor | Mapping[str, Tensor]]],
    path: str | Path,
) -> Trace:
    """Run a transformers model over batches, write what it routes to `path`, and open it.

    A batch: token ids [B, S], or what the model takes by name (input_ids, attention_mask); or a pair of a domain's name
    and such a batch, for all of them or for none. The model is in evaluation for it, and as before afterwards.
    Raises ConfigError for a model without experts, TraceError for no batches, or domains for only some of them.
    """
    batches = list(batches)
    names = tuple(dict.fromkeys(batch[0] for batch in batches if isinstance(batch, tuple)))
    was_training = model.training
    model.eval()
    try:
        with RoutingRecorder(model, path, domains=names) as recorder:
            for batch in batches:
                domain, batch = batch if isinstance(batch, tuple) else (None, batch)
                recorder.set_domains(None if domain is None else names.index(domain))
                model(**(batch if isinstance(batch, Mapping) else {"input_ids": batch}))
    finally:
        model.train(was_training)
    return Trace.open(path)


def _token_rows(module: nn.Module, ids_TK: Tensor, weights_TK: Tensor, mask_T: Tensor | None) -> TokenRows:
    num_experts = as_experts(module).num_experts
    is_here = ids_TK < num_experts  # over ranks, number E is an expert of another rank
    ids_TK = torch.where(is_here, ids_TK, -1).long()
    if mask_T is not None and len(mask_T) != len(ids_TK):
        raise TraceError(f"an attention_mask of {len(mask_T)} tokens, of which {len(ids_TK)} were routed")
    rows = Rows.from_topk(ids_TK, weights_TK.float(), num_experts, mask_T=mask_T, fixed_top_k=bool(is_here.all()))
    return token_rows(rows)


def _mask(attention_mask: Tensor | None, token_ids: Tensor | None) -> Tensor | None:
    """True where there is a token. With a cache the mask is of all tokens so far, and the last ones are new."""
    if attention_mask is None or token_ids is None or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -token_ids.shape[1] :].reshape(-1).bool()


def _documents(token_ids: Tensor | None) -> np.ndarray | None:
    """Each row is a document."""
    if token_ids is None:
        return None
    return np.arange(token_ids.shape[0]).repeat(token_ids.shape[1])


def _fingerprint(model: nn.Module, experts: Mapping[int, nn.Module], top_ks: Mapping[int, int]) -> Fingerprint:
    """As moesaic has it where it reads such models; else what can be seen: the family's name and the experts."""
    config: Any = model.config
    try:
        known = Fingerprint.of(families.from_hf(config.to_dict()))
    except MoesaicError:  # a family, or a setting of it, that moesaic does not read
        known = None
    seen = {layer: (as_experts(module).num_experts, top_ks[layer]) for layer, module in sorted(experts.items())}
    if known is not None and {each.layer: (each.num_experts, each.top_k) for each in known.layers} == seen:
        return known
    layers = tuple(LayerFingerprint(layer, "transformers", *sizes) for layer, sizes in seen.items())
    return Fingerprint(str(config.model_type), layers)
