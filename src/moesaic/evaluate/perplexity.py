"""Held-out loss in bits per byte: comparable between tokenizers, and told apart by domain.

B batch, S sequence.
"""

import math
from dataclasses import dataclass

import torch

from moesaic.data.held_out import HeldOutBatch, held_out_windows
from moesaic.data.packed import Packed
from moesaic.models.decoder import Decoder
from moesaic.telemetry.load import StepLoad
from moesaic.telemetry.recorder import LoadRecorder


@dataclass(frozen=True, kw_only=True)
class HeldOutLoss:
    """Bits per byte of text: of each domain, and of all domains with equal weight."""

    by_domain: dict[str, float]

    @property
    def bits_per_byte(self) -> float:
        """The mean over domains."""
        return sum(self.by_domain.values()) / len(self.by_domain)


def held_out_loss(
    model: Decoder,
    packed: Packed,
    *,
    sequence_length: int,
    max_tokens: int | None = None,
    recorder: LoadRecorder | None = None,
    document_attention: bool = False,
) -> HeldOutLoss:
    """The loss on held-out text, at most `max_tokens` tokens a domain (None: all of it), spread evenly over the text.

    `recorder` hears the routing, domain by domain. document_attention: whether a token sees only its own document, as
    in the training of the model; otherwise its whole window.
    """
    was_training = model.training
    model.eval()
    by_domain = {}
    batches = held_out_windows(packed, sequence_length, max_tokens, batch_size=max(1, 4096 // sequence_length))
    for index, (name, held_out) in enumerate(batches.items()):
        if recorder is not None:
            recorder.set_domains(index)
        nats, num_bytes = 0.0, 0
        for batch in held_out:
            nats += _nats(model, batch, recorder, document_attention)
            num_bytes += batch.num_bytes
        by_domain[name] = nats / math.log(2) / num_bytes
    model.train(was_training)
    return HeldOutLoss(by_domain=by_domain)


def held_out_load(
    model: Decoder, packed: Packed, *, sequence_length: int, max_tokens: int, document_attention: bool = False
) -> StepLoad:
    """Which experts serve which domain of the held-out text."""
    recorder = LoadRecorder.for_model(model.config, num_domains=len(packed.domains))
    held_out_loss(
        model,
        packed,
        sequence_length=sequence_length,
        max_tokens=max_tokens,
        recorder=recorder,
        document_attention=document_attention,
    )
    return recorder.finish_step()


@torch.no_grad()
def _nats(model: Decoder, batch: HeldOutBatch, recorder: LoadRecorder | None, document_attention: bool) -> float:
    """The summed cross-entropy of the scored tokens. Padding stands at the end, where causality hides it."""
    device = model.embedding.weight.device
    mask_BS = torch.from_numpy(batch.mask_BS).to(device)
    logits_BSV = model(
        torch.from_numpy(batch.inputs_BS).to(device),
        None if batch.mask_BS.all() else mask_BS,
        tape=recorder,
        document_ids_BS=torch.from_numpy(batch.document_ids_BS).to(device) if document_attention else None,
    )
    targets = torch.from_numpy(batch.targets_BS).to(device)
    return torch.nn.functional.cross_entropy(logits_BSV[mask_BS].float(), targets[mask_BS], reduction="sum").item()
