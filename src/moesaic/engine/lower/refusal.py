"""What the engine does not run, told from a configuration before any weight is read."""

from moesaic.checks import require
from moesaic.config import AttentionConfig, LayerConfig, MlaConfig, MlpConfig, ModelConfig, MoeConfig, OutlinedModel
from moesaic.errors import ConfigError
from moesaic.kernels.native_routing import NATIVE_ROUTERS


def refusal(config: ModelConfig, *, mtp: bool = False) -> str | None:
    """Why a model has no program, in words; None where it has one.

    mtp: with the layers that predict further tokens.
    """
    if isinstance(config, OutlinedModel):
        return "this model is only described, for counts and plans"
    if config.encoder is not None:
        return "this model has an encoder"
    if config.sinusoid is not None:
        return "this model adds sinusoids to its embeddings"
    reasons = ((index, _of_layer(layer)) for index, layer in enumerate(config.every_layer if mtp else config.layers))
    return next((f"layer {index} {reason}" for index, reason in reasons if reason is not None), None)


def check_lowerable(config: ModelConfig, *, mtp: bool = False) -> None:
    """Raise ConfigError for a model without a program, saying what runs it, and for `mtp` without such layers."""
    config.check_decodable()
    require(not mtp or bool(config.mtp), "mtp, and this model has no layers that predict further tokens; leave it out")
    reason = refusal(config, mtp=mtp)
    if reason is not None:
        raise ConfigError(f"{reason}, which the engine does not run; moesaic.load and moesaic.generate do")


def _of_layer(layer: LayerConfig) -> str | None:
    if layer.hyper_connection is not None:
        return "has hyper-connections"
    attention, part = layer.attention, layer.feed_forward
    if not isinstance(attention, AttentionConfig | MlaConfig):
        return "attends to compressed tokens"
    if isinstance(attention, AttentionConfig) and attention.relative_bias is not None:
        return "has relative position biases"
    if isinstance(attention, MlaConfig) and attention.indexer is not None:
        return "chooses its tokens by an indexer"
    return _of_experts(part) if isinstance(part, MoeConfig) else None if isinstance(part, MlpConfig) else "is Soft MoE"


def _of_experts(part: MoeConfig) -> str | None:
    if part.evaluation_capacity is not None:
        return "limits its experts' tokens outside of training"
    return None if part.router.name in NATIVE_ROUTERS else f"has router {part.router.name!r}"
