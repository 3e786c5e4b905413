"""Weights of tiny models, drawn from the bytes of a hash of their names: the same on every machine.

torch's generators are not: how they round normal numbers depends on the processor.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def noise(name: str, shape: Sequence[int]) -> Tensor:
    """Numbers of mean 0 and std 1, uniform, 16 random bits each."""
    bits = hashlib.shake_256(name.encode()).digest(2 * math.prod(shape))
    numbers = torch.from_numpy(np.frombuffer(bits, "<u2").astype(np.float32))
    return (numbers - 32767.5).mul_(math.sqrt(12) / 65536).view(*shape)


def drawn(case: str, name: str, shape: Sequence[int], config: dict[str, Any]) -> Tensor:
    """What a case's file holds under a name: weights of std 0.2, those of norms around 1, and tables of experts.

    Embeddings have std 1 where logits are divided, and selection biases and queries less where a sharp choice or an
    undivided score would magnify rounding errors.
    """
    name = re.sub(r"(en|de)coder\.embed_tokens", "shared", name)  # copies of one table, where there are some
    values = noise(f"{case}: {name}", (shape[0], config["n_routed_experts"]) if name.endswith("tid2eid") else shape)
    if name.endswith("tid2eid"):
        return values.argsort(dim=1, stable=True)[:, : shape[1]].contiguous()
    std = 0.2
    if name.endswith(("e_score_correction_bias", "gate.bias")):
        std = 0.1
    elif "Attention.q." in name:
        std = 0.06
    elif name == "shared.weight" and config["tie_word_embeddings"]:
        std = 1.0
    return values.mul_(std).add_(float(bool(re.search(r"norm[^.]*\.weight$", name))))
