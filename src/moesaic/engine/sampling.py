"""From logits to the next token.

B batch, V vocab.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. temperature 0 takes the likeliest token; top_k and top_p cut the tail first."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"temperature={self.temperature}; use 0 (always the likeliest token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} tokens to sample from; use 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}; use a probability above 0 and up to 1")

    def generator(self) -> torch.Generator:
        """A generator seeded with `seed`, or from the system when there is none."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def sample(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Token ids [B], drawn row by row."""
    if sampling.temperature == 0:
        return likeliest(logits_BV)
    probabilities_BV = torch.softmax(_cut_tail(logits_BV.float() / sampling.temperature, sampling), dim=-1)
    return torch.multinomial(probabilities_BV, 1, generator=generator)[:, 0]


def likeliest(logits_BV: Tensor) -> Tensor:
    """The first of the greatest of each row. torch would wake threads for it that then look for work for a while, on
    the processors that the engine's own threads need."""
    return torch.from_numpy(logits_BV.numpy().argmax(-1)) if logits_BV.is_cpu else logits_BV.argmax(-1)


def _cut_tail(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        smallest_kept = logits_BV.topk(sampling.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_kept, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, ids = logits_BV.sort(descending=True)
        before = torch.softmax(ordered, -1).cumsum(-1) - torch.softmax(ordered, -1)
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, ids, before >= sampling.top_p)
        logits_BV = logits_BV.masked_fill(dropped, -torch.inf)
    return logits_BV
