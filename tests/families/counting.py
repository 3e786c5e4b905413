"""How many parameters transformers' models learn."""

from typing import Any


def num_learned(model: Any) -> int:
    """All of them, less the selection biases, which no gradient reaches: ERNIE's are parameters, others' buffers."""
    biases = [each for name, each in model.named_parameters() if name.endswith("e_score_correction_bias")]
    return model.num_parameters() - sum(bias.numel() for bias in biases)
