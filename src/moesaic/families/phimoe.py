"""Phi-3.5-MoE (arXiv:2404.14219, arXiv:2409.12136): SparseMixer chooses, LayerNorm with biases, LongRoPE.

transformers 5.23 turns long texts by the factors for short ones (its rotary embedding never tells how long the text is)
but multiplies by `long_mscale`; the authors' code, and transformers 4, take `long_factor`, as is done here.
"""

from typing import Any

from moesaic.config import (
    AttentionConfig,
    LayerConfig,
    LongRopeConfig,
    ModelConfig,
    MoeConfig,
    NormConfig,
    RouterConfig,
    SparseMixerSettings,
    StackConfig,
)
from moesaic.errors import ConfigError
from moesaic.families._common import (
    ExpertNames,
    HfFields,
    Preset,
    decoder_weight_map,
    hf_fields,
    refusal,
    shared_attention,
    shared_moe,
)
from moesaic.models.weight_map import WeightMap

NAME = "phimoe"
_CHOICES = 2  # SparseMixer's rounds, whatever num_experts_per_tok says


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A config.json of `model_type` phimoe. Raises ConfigError for what we cannot express.

    `input_jitter_noise` becomes the jitter of the router's input; while training, transformers jitters what the
    experts see, too.
    """
    hf = HfFields(raw)
    norm = NormConfig(eps=hf.number("rms_norm_eps", 1e-5), kind="layer", bias=True)
    layer = LayerConfig(attention=_attention(hf), feed_forward=_moe(hf), norm=norm)
    return hf.model(
        decoder=StackConfig(layers=(layer,) * hf.size("num_hidden_layers"), final_norm=norm),
        head_bias=hf.flag("lm_head_bias"),
    )


def _attention(hf: HfFields) -> AttentionConfig:
    bias, window = hf.flag("attention_bias"), hf.window()  # q, k, v and o alike
    return AttentionConfig(
        num_heads=hf.size("num_attention_heads"),
        num_key_value_heads=hf.size("num_key_value_heads", default=8),
        head_dim=hf.head_dim(),
        rope=hf.rope(default_theta=1e6),
        # The released one is as long as the context, and so hides nothing.
        window=None if window is None or window >= hf.size("max_position_embeddings") else window,
        qkv_bias=bias,
        output_bias=bias,
    )


def _moe(hf: HfFields) -> MoeConfig:
    if hf.get("num_experts_per_tok", default=_CHOICES) != _CHOICES:
        raise ConfigError(f"num_experts_per_tok={hf.raw['num_experts_per_tok']!r} is not supported; known: {_CHOICES}")
    router = RouterConfig(
        name="sparsemixer",
        num_experts=hf.size("num_local_experts", "num_experts", default=16),
        top_k=_CHOICES,
        settings=SparseMixerSettings(gap=hf.number("router_jitter_noise", 0.01)),
        jitter=hf.number("input_jitter_noise", 0.0),
    )
    return MoeConfig(router=router, intermediate_size=hf.size("intermediate_size"), activation=hf.activation())


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Its config.json. Raises ConfigError for layers that differ where it has one field."""
    attention, moe = shared_attention(config), shared_moe(config)
    if len(config.moe_layers) != len(config.layers):
        raise refusal(NAME, "some of its layers are dense")
    settings = moe.router.settings
    if not isinstance(settings, SparseMixerSettings):
        raise refusal(NAME, f"its router is {moe.router.name!r}")
    scaling = attention.rope.scaling if attention.rope else None
    if scaling is not None and not isinstance(scaling, LongRopeConfig):
        raise refusal(NAME, f"its positions are stretched by {type(scaling).__name__}")
    own = {
        "intermediate_size": moe.intermediate_size,
        "num_local_experts": moe.router.num_experts,
        "num_experts_per_tok": moe.router.top_k,
        "router_jitter_noise": settings.gap,
        "input_jitter_noise": moe.router.jitter,
        "attention_bias": attention.qkv_bias,
        "lm_head_bias": config.head_bias,
        "sliding_window": attention.window,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
    }
    if scaling is not None:  # the authors' code looks for it here
        own["original_max_position_embeddings"] = scaling.original_length
    return hf_fields(config, "PhimoeForCausalLM") | own


def weight_map(config: ModelConfig) -> WeightMap:
    """Our tensors and their names in Phi-3.5-MoE's files, which are Mixtral's: w1 is the gate, w3 up, w2 down."""
    inside = "block_sparse_moe.experts.{e}"
    names = ExpertNames("block_sparse_moe.gate", gate=f"{inside}.w1", up=f"{inside}.w3", down=f"{inside}.w2")
    return decoder_weight_map(config, names)


# One factor for each pair of dimensions, as fp32 has them.
_SHORT = [
    1.0, 1.04, 1.04, 1.04, 1.05, 1.05, 1.05, 1.05, 1.05, 1.05,
    1.05, 1.05, 1.05, 1.05, 1.06, 1.06, 1.0699999, 1.0699999, 1.0699999, 1.0699999,
    1.14, 1.16, 1.16, 1.16, 1.16, 1.18, 1.1999999, 1.3199999, 1.3399999, 1.3499999,
    1.3999999, 1.4799999, 1.4999999, 1.5899998, 1.6499999, 1.7199999, 1.8999999, 1.9099998, 1.9099998, 1.9899999,
    1.9999999, 1.9999999, 2.01, 2.01, 2.01, 2.01, 2.01, 2.01, 2.01, 2.01,
    2.01, 2.01, 2.01, 2.01, 2.01, 2.01, 2.01, 2.01, 2.01, 2.1,
    2.32, 2.4199998, 2.59, 2.79,
]  # fmt: skip
_LONG = [
    1.02, 1.03, 1.04, 1.05, 1.05, 1.05, 1.06, 1.06, 1.06, 1.06,
    1.06, 1.06, 1.0999999, 1.18, 1.18, 1.37, 1.4899999, 2.11, 2.8899999, 3.9499998,
    4.2999997, 6.43, 8.09, 10.690001, 12.05, 18.23, 18.84, 19.9, 21.42, 26.2,
    34.280003, 34.590004, 38.730003, 40.220005, 42.540005, 44.000004, 47.590004, 54.750004, 56.190002, 57.440002,
    57.49, 61.2, 61.54, 61.75, 61.78, 62.07, 63.11, 63.43, 63.56, 63.710003,
    63.920002, 63.940002, 63.940002, 63.960003, 63.980003, 64.03001, 64.03001, 64.03001, 64.04001, 64.100006,
    64.19, 64.21, 64.75, 64.96,
]  # fmt: skip

PRESETS = {
    "phi-3.5-moe": Preset(
        {
            "model_type": NAME,
            "vocab_size": 32064,
            "hidden_size": 4096,
            "intermediate_size": 6400,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 16,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e4,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": _SHORT,
                "long_factor": _LONG,
                "short_mscale": 1.243163121016122,
                "long_mscale": 1.243163121016122,
                "original_max_position_embeddings": 4096,
            },
            "router_jitter_noise": 0.01,
            "input_jitter_noise": 0.01,
            "attention_bias": True,
            "lm_head_bias": True,
            "bos_token_id": 1,
            "eos_token_id": 32000,
        },
        licence="MIT",
        source="microsoft/Phi-3.5-MoE-instruct; arXiv:2404.14219",
    ),
}
