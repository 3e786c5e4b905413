"""What a request's rules make of a row of logits: penalties of the tokens before, biases, and ends that are too early.

V vocab, N tokens that occur in the text.
"""

import secrets
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moesaic.engine.sampling import Sampling
from moesaic.errors import GenerationError
from moesaic.serve.request import Request


def check_rules(request: Request, vocab_size: int) -> None:
    """Raise GenerationError for biases of tokens that the model does not have."""
    unknown = max(request.sampling.logit_bias, default=0)
    if unknown >= vocab_size:
        raise GenerationError(f"logit_bias of token {unknown}; the model knows 0 to {vocab_size - 1}")


class Rules:
    """The rules of a request, and what of its text they depend on, kept up as that grows.

    sampling: with a seed in any case.
    """

    def __init__(self, request: Request) -> None:
        seed = request.sampling.seed
        self.sampling = replace(request.sampling, seed=secrets.randbits(63) if seed is None else seed)
        self._num_prompt, self._earliest_end = len(request.prompt_ids), request.min_new_tokens
        self._eos_ids = np.array(sorted(request.eos_token_ids), np.int64)
        bias = request.sampling.logit_bias
        self._bias_ids = np.array(list(bias), np.int64)
        self._biases = np.array(list(bias.values()), np.float32)
        self._occurring = _Occurring(request.prompt_ids) if self.sampling.penalizes else None

    def apply(self, logits_V: np.ndarray, token_ids: Sequence[int], drafts: Sequence[int] = ()) -> np.ndarray:
        """The logits by the rules, of what follows a text (its prompt included) and drafts; a copy if they change."""
        num_new = len(token_ids) - self._num_prompt + len(drafts)
        too_early = num_new < self._earliest_end and len(self._eos_ids) > 0
        if not (too_early or self._occurring or len(self._bias_ids)):
            return logits_V
        logits_V = logits_V.copy()
        if self._occurring:
            self._occurring.catch_up(token_ids)
            self._occurring.penalize(logits_V, self.sampling, drafts)
        logits_V[self._bias_ids] += self._biases
        if too_early:
            logits_V[self._eos_ids] = -np.inf
        return logits_V


class _Occurring:
    """The tokens of a text, each once: whether the prompt has it, and how often it was written since."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self._num_counted = len(prompt_ids)
        ids_N = np.array(list(dict.fromkeys(prompt_ids)), np.int64)
        self._slots = {int(token): slot for slot, token in enumerate(ids_N)}
        self._num_in_prompt = len(ids_N)
        self._ids, self._counts = ids_N, np.zeros(len(ids_N), np.float32)

    def catch_up(self, token_ids: Sequence[int]) -> None:
        """Count the tokens that were written since the last time."""
        for token in token_ids[self._num_counted :]:
            slot = self._slot(token)
            self._counts[slot] += 1
        self._num_counted = len(token_ids)

    def penalize(self, logits_V: np.ndarray, sampling: Sampling, drafts: Sequence[int]) -> None:
        """Change the logits by the penalties, as if the drafts were written too."""
        slots = [self._slot(token) for token in drafts]
        size = len(self._slots)
        counts_N = self._counts[:size].copy()
        np.add.at(counts_N, slots, 1)
        occurs_N = counts_N > 0
        occurs_N[: self._num_in_prompt] = True
        ids_N, counts_N = self._ids[:size][occurs_N], counts_N[occurs_N]
        values_N = logits_V[ids_N]
        penalty = np.float32(sampling.repetition_penalty)
        values_N = np.where(values_N < 0, values_N * penalty, values_N / penalty)
        values_N -= np.float32(sampling.frequency_penalty) * counts_N
        values_N -= np.float32(sampling.presence_penalty) * (counts_N > 0)
        logits_V[ids_N] = values_N

    def _slot(self, token: int) -> int:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.append(self._ids, np.zeros(slot + 64, np.int64))
            self._counts = np.append(self._counts, np.zeros(slot + 64, np.float32))
        self._ids[slot] = token
        return slot
