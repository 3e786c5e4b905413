"""What the layers that predict further tokens learn from (Multi-Token Prediction, DeepSeek-V3, arXiv:2412.19437).

B batch, S sequence, D hidden.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from moesaic.models.decoder import Decoder
from moesaic.routing import RoutingTape
from moesaic.train.micro_batches import IGNORED


def hidden_and_targets(
    model: Decoder,
    carried: Tensor,
    inputs_BS: Tensor,
    targets_BS: Tensor,
    tape: RoutingTape,
    *,
    mask_BS: Tensor | None = None,
    document_ids_BS: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each `mtp` layer k = 1, 2, ... in turn: h^k [B, S - k, D], and the tokens that its logits should predict.

    carried: h^0, of `model.carried`. targets_BS: token i + 1 at place i, as the model itself should predict it.
    A place whose tokens i to i + k are not all there, or not all of one document, is padding to layer k.
    A sequence of k tokens or fewer has no place for layer k, which then does not run.
    """
    inside_BS = torch.ones_like(inputs_BS, dtype=torch.bool) if mask_BS is None else mask_BS.bool()
    for depth in range(1, min(len(model.mtp), inputs_BS.shape[1] - 1) + 1):
        carried = carried[:, :-1]
        here_BS, there_BS = inside_BS[:, :-depth], inside_BS[:, depth:]
        inside = here_BS & there_BS
        documents_BS = None
        if document_ids_BS is not None:
            documents_BS = document_ids_BS[:, :-depth]
            inside &= documents_BS == document_ids_BS[:, depth:]
        carried = model.hidden_ahead(
            carried,
            inputs_BS[:, depth:],
            None if bool(inside.all()) else inside,
            depth=depth,
            tape=tape,
            document_ids_BS=documents_BS,
        )
        yield model.before_head(carried, depth=depth), targets_BS[:, depth:].masked_fill(~inside, IGNORED)
