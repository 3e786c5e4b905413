"""Several documents in one row: where each begins, what position each of its tokens has, and how to cut them out.

B batch, S sequence, T = B*S tokens, H heads, A head dim; a bundle is N documents, padded at their ends to length L.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


def number_documents(document_ids_BS: Tensor) -> Tensor:
    """Documents numbered from 0 over the whole batch, int64 [B, S].

    A document is a run of equal ids within a row: an id that comes back later begins another document.
    """
    begins_BS = torch.ones_like(document_ids_BS, dtype=torch.bool)
    begins_BS[:, 1:] = document_ids_BS[:, 1:] != document_ids_BS[:, :-1]
    return begins_BS.flatten().cumsum(0).view_as(document_ids_BS) - 1


def row_numbers(token_ids_BS: Tensor) -> Tensor:
    """What `number_documents` says of rows that are one document each."""
    return torch.arange(token_ids_BS.shape[0], device=token_ids_BS.device)[:, None].expand_as(token_ids_BS)


def has_several(documents_BS: Tensor) -> bool:
    """Whether any row holds more than one document. Takes what `number_documents` returned."""
    return documents_BS.numel() > 0 and bool((documents_BS[:, 0] != documents_BS[:, -1]).any())


def positions(documents_BS: Tensor, mask_BS: Tensor | None) -> Tensor:
    """Each token's place in its document, padding not counted, int64 [B, S]."""
    ones_BS = torch.ones_like(documents_BS) if mask_BS is None else mask_BS.long()
    before_BS = ones_BS.cumsum(1) - ones_BS
    begins_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    begins_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    before_document_BS = before_BS.masked_fill(~begins_BS, 0).cummax(1).values
    return before_BS - before_document_BS


class Segments(NamedTuple):
    """A batch's documents in bundles of like length.

    Attention within a bundle is plainly causal: no token looks ahead into the padding, what padding sees is dropped.
    slots_P: the token (of T) at each place of all bundles, one bundle after the other; padding repeats a token.
    places_T: where each token stands among them. shapes: (N, L) of each bundle.
    """

    slots_P: Tensor
    places_T: Tensor
    shapes: list[tuple[int, int]]

    def cut(self, x_BHSA: Tensor) -> list[Tensor]:
        """The bundles [N, H, L, A]."""
        heads, head_dim = x_BHSA.shape[1], x_BHSA.shape[3]
        flat_PF: Any = _Cut.apply(_by_token(x_BHSA), self.slots_P, self.places_T)
        bundles = flat_PF.split([number * length for number, length in self.shapes])
        return [
            bundle.view(*shape, heads, head_dim).transpose(1, 2)
            for bundle, shape in zip(bundles, self.shapes, strict=True)
        ]

    def paste(self, bundles: Sequence[Tensor], like_BHSA: Tensor) -> Tensor:
        """The way back, without the padding; as wide as the bundles are."""
        batch, heads, length, _ = like_BHSA.shape
        flat_TF: Any = _Paste.apply(torch.cat([_by_token(bundle) for bundle in bundles]), self.places_T)
        return flat_TF.view(batch, length, heads, -1).transpose(1, 2)


def segments(documents_BS: Tensor) -> Segments:
    """Cut a batch at its documents. Takes what `number_documents` returned."""
    lengths = torch.bincount(documents_BS.flatten())
    starts = lengths.cumsum(0) - lengths
    # Within a bundle no document is more than 1.5 times as long as another, or all are short.
    sizes = torch.tensor([max(8, math.ceil(math.log(length, 1.5))) for length in lengths.tolist()])
    slots, shapes = [], []
    places_T = torch.empty(documents_BS.numel(), dtype=torch.int64, device=documents_BS.device)
    num_places = 0
    for size in sizes.unique().tolist():
        members = (sizes == size).nonzero()
        length_N1, step_L = lengths[members], torch.arange(int(lengths[members].max()), device=documents_BS.device)
        slots_NL = starts[members] + torch.minimum(step_L, length_N1 - 1)
        real_NL = step_L < length_N1
        places_T[slots_NL[real_NL]] = num_places + real_NL.flatten().nonzero()[:, 0]
        num_places += slots_NL.numel()
        slots.append(slots_NL.flatten())
        shapes.append((slots_NL.shape[0], slots_NL.shape[1]))
    return Segments(torch.cat(slots), places_T, shapes)


def _by_token(x_BHSA: Tensor) -> Tensor:
    return x_BHSA.transpose(1, 2).reshape(x_BHSA.shape[0] * x_BHSA.shape[2], -1)


class _Cut(torch.autograd.Function):
    """x[slots]. Padding has no gradient, so each token's comes from its one place and nothing is summed."""

    @staticmethod
    def forward(ctx: Any, x_TF: Tensor, slots_P: Tensor, places_T: Tensor) -> Tensor:
        ctx.save_for_backward(places_T)
        return x_TF.index_select(0, slots_P)

    @staticmethod
    def backward(ctx: Any, *dx_PF: Tensor) -> tuple[Tensor, None, None]:
        return dx_PF[0].index_select(0, ctx.saved_tensors[0]), None, None


class _Paste(torch.autograd.Function):
    """x[places]; its gradient leaves zeros at the padding."""

    @staticmethod
    def forward(ctx: Any, x_PF: Tensor, places_T: Tensor) -> Tensor:
        ctx.save_for_backward(places_T)
        ctx.num_places = x_PF.shape[0]
        return x_PF.index_select(0, places_T)

    @staticmethod
    def backward(ctx: Any, *dy_TF: Tensor) -> tuple[Tensor, None]:
        zeros_PF = dy_TF[0].new_zeros(ctx.num_places, dy_TF[0].shape[1])
        return zeros_PF.index_copy_(0, ctx.saved_tensors[0], dy_TF[0]), None
