"""The one description of a model: a frozen tree of parts that knows its own tensors, sizes and costs. No torch here.

One file a kind of part; `model.py` joins them. Every number that a planner, a cache or a checkpoint reader needs is
derived from `ModelConfig.tensors()` and `ModelConfig.states()`; the built model has exactly these tensors, and a test
holds that.
"""

from moesaic.config.activation import ClampedSwiglu
from moesaic.config.attention import AttentionConfig, StateSpec, TemperatureConfig
from moesaic.config.capacity import CapacityConfig
from moesaic.config.compressed import CompressedAttentionConfig, CompressionConfig, EntryIndexerConfig
from moesaic.config.feed_forward import MlpConfig, MoeConfig, SoftMoeConfig
from moesaic.config.hyper_connection import HyperConnectionConfig
from moesaic.config.indexer import IndexerConfig
from moesaic.config.mla import MlaConfig
from moesaic.config.model import LayerConfig, ModelConfig, OutlinedModel, StackConfig
from moesaic.config.norm import NormConfig
from moesaic.config.outline import AbsentConfig, OutlinedAttention, OutlinedMla, OutlinedMoe, RecurrentConfig
from moesaic.config.positions import RelativeBiasConfig, SinusoidConfig
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
    Top2Settings,
    TopPSettings,
)
from moesaic.tensor_spec import Role, TensorSpec

__all__ = [
    "AbsentConfig",
    "AttentionConfig",
    "CapacityConfig",
    "ClampedSwiglu",
    "CompressedAttentionConfig",
    "CompressionConfig",
    "EntryIndexerConfig",
    "GroupConfig",
    "HashSettings",
    "HyperConnectionConfig",
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
    "OutlinedAttention",
    "OutlinedMla",
    "OutlinedModel",
    "OutlinedMoe",
    "RecurrentConfig",
    "RelativeBiasConfig",
    "ReluSettings",
    "Role",
    "RopeConfig",
    "RouterConfig",
    "SinkhornSettings",
    "SinusoidConfig",
    "SoftMoeConfig",
    "SparseMixerSettings",
    "StackConfig",
    "StateSpec",
    "TemperatureConfig",
    "TensorSpec",
    "Top2Settings",
    "TopPSettings",
    "YarnConfig",
]
