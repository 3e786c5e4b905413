"""Where the experts of a transformers model are: those that its experts registry serves."""

from typing import Protocol, cast

from torch import Tensor, nn

from moesaic.errors import ConfigError, MissingDependencyError

try:
    import transformers.integrations.moe  # noqa: F401  what all files of this folder stand on
except ImportError as error:
    raise MissingDependencyError(
        "moesaic.hub.transformers works on models of transformers 5, which is not installed; "
        "pip install 'transformers>=5.23'"
    ) from error


class Experts(Protocol):
    """What `use_experts_implementation` makes of a class of experts; E experts, called with all T tokens.

    Weights: `gate_up_proj` [E, 2F, D] (or `up_proj` [E, F, D] without a gate) and `down_proj` [E, D, F]; [E, in, out]
    where `is_transposed`. Biases have the same names and `_bias`.
    """

    num_experts: int
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool
    is_concatenated: bool
    _is_expert_parallel: bool

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor: ...


def experts_by_layer(model: nn.Module) -> dict[int, nn.Module]:
    """The experts of each layer that has them, by the layer's number.

    Raises ConfigError for a model without, or whose experts the registry does not serve.
    """
    found = {
        _layer(name): module
        for name, module in model.named_modules()
        if hasattr(module, "_is_expert_parallel") and hasattr(module, "num_experts")
    }
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no experts that transformers' experts registry serves; give a "
            "mixture-of-experts model of transformers 5, such as MixtralForCausalLM"
        )
    return found


def as_experts(module: nn.Module) -> Experts:
    """The same module by the attributes that all such have."""
    return cast(Experts, module)


def _layer(name: str) -> int:
    """`model.layers.3.mlp.experts` is of layer 3."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else 0
