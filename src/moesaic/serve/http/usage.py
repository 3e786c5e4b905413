"""What a request has used, as OpenAI's clients read it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moesaic.serve.http.bodies import Answer
from moesaic.serve.http.running import Outcome
from moesaic.serve.request import Usage


class PromptTokensDetails(Answer):
    cached_tokens: int


class CompletionTokensDetails(Answer):
    reasoning_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class UsageAnswer(Answer):
    """expert_activation: by layer, how many tokens went to each expert; only where the request asked."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails
    expert_activation: dict[str, dict[str, int]] | None = None


class Used:
    """The usage of the choices of a request. A prompt counts once, whatever the number of its choices."""

    def __init__(self, choices_per_prompt: int = 1) -> None:
        self._choices_per_prompt = choices_per_prompt
        self._usages: dict[int, Usage] = {}
        self._experts: list[dict[int, np.ndarray]] = []
        self.reasoning_tokens = 0

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], choices_per_prompt: int = 1) -> "Used":
        used = cls(choices_per_prompt)
        for index, outcome in enumerate(outcomes):
            used.add(index, outcome.finished.usage)
            used.add_experts(outcome.experts)
        return used

    def add(self, index: int, usage: Usage) -> None:
        self._usages[index] = usage

    def add_experts(self, experts: Sequence[dict[int, np.ndarray]]) -> None:
        self._experts += experts

    def to_dict(self) -> dict[str, Any]:
        """As the protocol has it: a prompt counts once, however many choices it has."""
        firsts = [usage for index, usage in self._usages.items() if index % self._choices_per_prompt == 0]
        usages = list(self._usages.values())
        prompt, written = (sum(each.prompt_tokens for each in firsts), sum(each.completion_tokens for each in usages))
        accepted, drafted = sum(each.accepted for each in usages), sum(each.drafted for each in usages)
        found: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": sum(each.cached_tokens for each in firsts)},
            "completion_tokens_details": {
                "reasoning_tokens": self.reasoning_tokens,
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": drafted - accepted,
            },
        }
        if self._experts:
            found["expert_activation"] = activation(self._experts)
        return found


def activation(experts: Sequence[dict[int, np.ndarray]]) -> dict[str, dict[str, int]]:
    """By layer, the tokens that went to each expert that any went to."""
    layers = sorted({layer for each in experts for layer in each})
    return {str(layer): _counts([each[layer] for each in experts if layer in each]) for layer in layers}


def _counts(chosen: Sequence[np.ndarray]) -> dict[str, int]:
    ids, counts = np.unique(np.concatenate([each.ravel() for each in chosen]), return_counts=True)
    return {str(expert): int(count) for expert, count in zip(ids.tolist(), counts.tolist(), strict=True) if expert >= 0}
