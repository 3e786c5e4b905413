"""The one description of a model: a frozen tree of parts that knows its own tensors, sizes and costs. No torch here.

One file a kind of part; `model.py` joins them. Every number that a planner, a cache or a checkpoint reader needs is
derived from `ModelConfig.tensors()` and `ModelConfig.states()`; the built model has exactly these tensors, and a test
holds that.
"""

from moesaic.config.activation import ClampedSwiglu
from moesaic.config.attention import AttentionConfig, StateSpec, TemperatureConfig
from moesaic.config.capacity import CapacityConfig
from moesaic.config.feed_forward import MlpConfig, MoeConfig, SoftMoeConfig
from moesaic.config.indexer import IndexerConfig
from moesaic.config.mla import MlaConfig
from moesaic.config.model import LayerConfig, ModelConfig, StackConfig
from moesaic.config.norm import NormConfig
from moesaic.config.rope import LinearConfig, Llama3Config, LongRopeConfig, RopeConfig, YarnConfig
from moesaic.config.router import (
    GroupConfig,
    HashSettings,
    NoisySettings,
    NullSettings,
    ReluSettings,
    RouterConfig,
    SinkhornSettings,
    SparseMixerSettings,
    TopPSettings,
)
from moesaic.tensor_spec import Role, TensorSpec

__all__ = [
    "AttentionConfig",
    "CapacityConfig",
    "ClampedSwiglu",
    "GroupConfig",
    "HashSettings",
    "IndexerConfig",
    "LayerConfig",
    "LinearConfig",
    "Llama3Config",
    "LongRopeConfig",
    "MlaConfig",
    "MlpConfig",
    "ModelConfig",
    "MoeConfig",
    "NoisySettings",
    "NormConfig",
    "NullSettings",
    "ReluSettings",
    "Role",
    "RopeConfig",
    "RouterConfig",
    "SinkhornSettings",
    "SoftMoeConfig",
    "SparseMixerSettings",
    "StackConfig",
    "StateSpec",
    "TemperatureConfig",
    "TensorSpec",
    "TopPSettings",
    "YarnConfig",
]
