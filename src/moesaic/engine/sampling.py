"""From logits to the next token.

B batch, V vocab.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from moesaic.errors import ConfigError

GREATEST_PENALTY = 2.0  # presence and frequency, either sign, as OpenAI has it; so is the next
GREATEST_BIAS = 100.0


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn, in this order; each rule works on what the one before has left.

    1. repetition_penalty: logits of tokens in the prompt or the text are divided by it where positive, else multiplied
       (arXiv:1909.05858, sec. 4.1, as transformers has it). 1: none.
    2. frequency_penalty and presence_penalty: logits of tokens written so far, without the prompt's, lose the one times
       how often, and the other once (as OpenAI defines them).
    3. logit_bias: added to the logits of these token ids.
    4. temperature divides; 0 takes the likeliest token, and what follows does not matter.
    5. top_k keeps the likeliest k, and those that are as likely as the last of them; top_p the likeliest whose share
       reaches it; min_p those at least so many times as likely as the likeliest (arXiv:2407.01082).

    seed: of the random numbers; None: another each time.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature={self.temperature}; use 0 (always the likeliest token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} tokens to sample from; use 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}; use a probability above 0 and up to 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p={self.min_p}; use a share of the likeliest token's probability, 0 to 1")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise ConfigError(f"seed={self.seed}; use a number of 64 bits")
        self._check_changes()

    def _check_changes(self) -> None:
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"repetition_penalty={self.repetition_penalty}; use a number above 0 (1 changes nothing)")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not abs(value) <= GREATEST_PENALTY:
                raise ConfigError(f"{name}={value}; use {-GREATEST_PENALTY} to {GREATEST_PENALTY}")
        for token_id, bias in self.logit_bias.items():
            if token_id < 0 or not abs(bias) <= GREATEST_BIAS:
                raise ConfigError(
                    f"logit_bias {token_id}: {bias}; use token ids from 0 on, and {-GREATEST_BIAS} to {GREATEST_BIAS}"
                )

    @property
    def penalizes(self) -> bool:
        """Whether logits depend on the tokens before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def for_choice(self, index: int) -> "Sampling":
        """Of the n continuations of one prompt, numbered from 0: the same but for the seed, which 0 keeps."""
        if self.seed is None or index == 0:
            return self
        other = np.random.Philox(key=self.seed % 2**64, counter=[0, 0, 0, index]).random_raw()
        return replace(self, seed=int(other))

    def generator(self) -> torch.Generator:
        """A generator seeded with `seed`, or from the system when there is none."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def sample(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Token ids [B], drawn row by row. Raises ConfigError for penalties, which need the tokens before (see `serve`)."""
    if sampling.penalizes:
        raise ConfigError("penalties of tokens written before, which only the server counts; leave them out here")
    logits_BV = _biased(logits_BV, sampling.logit_bias)
    if sampling.temperature == 0:
        return likeliest(logits_BV)
    probabilities_BV = torch.softmax(_cut_tail(logits_BV.float() / sampling.temperature, sampling), dim=-1)
    return torch.multinomial(probabilities_BV, 1, generator=generator)[:, 0]


def likeliest(logits_BV: Tensor) -> Tensor:
    """The first of the greatest of each row. torch would wake threads for it that then look for work for a while, on
    the processors that the engine's own threads need."""
    return torch.from_numpy(logits_BV.numpy().argmax(-1)) if logits_BV.is_cpu else logits_BV.argmax(-1)


def _biased(logits_BV: Tensor, logit_bias: Mapping[int, float]) -> Tensor:
    if not logit_bias:
        return logits_BV
    vocab = logits_BV.shape[-1]
    if max(logit_bias) >= vocab:
        raise ConfigError(f"logit_bias of token {max(logit_bias)}; the model knows 0 to {vocab - 1}")
    added_V = torch.zeros(vocab, device=logits_BV.device)
    added_V[list(logit_bias)] = torch.tensor(list(logit_bias.values()), device=logits_BV.device)
    return logits_BV + added_V


def _cut_tail(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        smallest_kept = logits_BV.topk(sampling.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_kept, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, ids = logits_BV.sort(descending=True)
        before = torch.softmax(ordered, -1).cumsum(-1) - torch.softmax(ordered, -1)
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, ids, before >= sampling.top_p)
        logits_BV = logits_BV.masked_fill(dropped, -torch.inf)
    if sampling.min_p:
        smallest_kept = logits_BV.max(-1, keepdim=True).values + math.log(sampling.min_p)
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_kept, -torch.inf)
    return logits_BV
