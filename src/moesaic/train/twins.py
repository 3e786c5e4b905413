"""The dense models that an MoE is honestly compared with. Descriptions in, descriptions out: no torch."""

import dataclasses
from typing import Literal

from moesaic.config import AbsentConfig, MlpConfig, ModelConfig, MoeConfig, SoftMoeConfig
from moesaic.errors import ConfigError


def dense_twin(config: ModelConfig, equal: Literal["active", "total"], family: str = "qwen3") -> ModelConfig:
    """The same model with dense feed-forward blocks, as wide as gives it the MoE's active or total parameters.

    Routers count too, so the widths are rounded to the nearest whole channel. Raises ConfigError for a dense model, and
    for one with an encoder.
    """
    config.check_decoder_only("a dense twin")
    if not config.moe_layers:
        raise ConfigError("a dense model has no twins; give a model with experts")
    layers = tuple(
        dataclasses.replace(layer, feed_forward=_dense(layer.feed_forward, config.hidden_size, equal))
        for layer in config.layers
    )
    decoder = dataclasses.replace(config.decoder, layers=layers)
    return dataclasses.replace(config, family=family, decoder=decoder)


def _dense(
    block: MlpConfig | MoeConfig | SoftMoeConfig | AbsentConfig, hidden_size: int, equal: Literal["active", "total"]
) -> MlpConfig:
    assert not isinstance(block, AbsentConfig), "only described models lack a part, and these are not trained"
    if isinstance(block, MlpConfig):
        return block
    tensors = tuple(block.tensors("", hidden_size))
    wanted = sum(tensor.active_numel if equal == "active" else tensor.numel for tensor in tensors)
    return MlpConfig(intermediate_size=max(1, round(wanted / (3 * hidden_size))), activation=block.activation)
