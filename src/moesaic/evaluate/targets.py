"""Held-out loss of encoder-decoders in bits per byte of the targets, told apart by domain or direction.

B batch, S sequence, M source.
"""

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from moesaic.data.sourced import IGNORED_TARGET, SourcedBatch
from moesaic.evaluate.perplexity import HeldOutLoss
from moesaic.models.encoder_decoder import EncoderDecoder
from moesaic.telemetry.recorder import LoadRecorder


def target_loss(
    model: EncoderDecoder,
    batches: Mapping[str, Iterable[SourcedBatch]],
    byte_lengths: np.ndarray,
    *,
    recorder: LoadRecorder | None = None,
) -> HeldOutLoss:
    """The loss of all scored targets over the bytes of text in them; sentinels and eos are scored and have no bytes.

    byte_lengths [V]: of each token. recorder: hears the routing, name by name.
    """
    was_training = model.training
    model.eval()
    by_domain = {}
    for index, (name, of_domain) in enumerate(batches.items()):
        if recorder is not None:
            recorder.set_domains(index)
        nats, num_bytes = 0.0, 0
        for batch in of_domain:
            nats += _nats(model, batch, recorder)
            num_bytes += int(byte_lengths[batch.targets_BS[batch.targets_BS >= 0]].sum())
        by_domain[name] = nats / math.log(2) / num_bytes
    model.train(was_training)
    return HeldOutLoss(by_domain=by_domain)


@torch.no_grad()
def _nats(model: EncoderDecoder, batch: SourcedBatch, recorder: LoadRecorder | None) -> float:
    """The summed cross-entropy of the scored targets."""
    device = model.embedding.weight.device
    mask_BM, mask_BS = (
        None if mask is None or mask.all() else torch.from_numpy(mask).to(device)
        for mask in (batch.source_mask_BM, batch.mask_BS)
    )
    source_BM, inputs_BS = (torch.from_numpy(ids).to(device) for ids in (batch.source_ids_BM, batch.inputs_BS))
    logits_BSV = model(source_BM, inputs_BS, mask_BM, mask_BS, tape=recorder)
    targets_T = torch.from_numpy(batch.targets_BS).to(device).flatten()
    return torch.nn.functional.cross_entropy(
        logits_BSV.float().flatten(0, 1), targets_T, reduction="sum", ignore_index=IGNORED_TARGET
    ).item()
