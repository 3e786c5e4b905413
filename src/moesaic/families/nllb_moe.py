"""NLLB-MoE (No Language Left Behind, arXiv:2207.04672): an encoder-decoder for translation, GShard's top-2 routing.

Where transformers 5.23 differs from the authors' fairseq, this follows fairseq:
- its experts take the mask of first choices for expert ids, so that expert 1 computes every token's first choice and
  expert 0 its second, and all others nothing; transformers 4 sent tokens to the experts they chose, as is done here;
- it draws second experts ("sampling", "random") in evaluation, too; here evaluation takes the second best;
- with "random" it compares the second expert's probability, not its share of the two (GShard, alg. 1);
- `expert_capacity` holds for the tokens of a whole batch while training, as here; but once it has evaluated, it trains
  on with the capacity of the last batch that it saw.

`moe_token_dropout` masks whole outputs of experts, as the paper has it (sec. 6.2.1), and makes all of them smaller in
evaluation. `activation_dropout` is that of the experts' inner activations. LayerDrop and other dropout there is none.
"""

import math
from collections.abc import Iterator
from typing import Any

from moesaic.config import (
    AttentionConfig,
    CapacityConfig,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    MoeConfig,
    NormConfig,
    RouterConfig,
    SinusoidConfig,
    StackConfig,
    Top2Settings,
)
from moesaic.errors import ConfigError
from moesaic.families import _encoder_decoder as shared
from moesaic.families._common import HfFields, Preset, refusal
from moesaic.models.weight_map import WeightMap

NAME = "nllb_moe"
ALIASES = ("nllb-moe",)  # as its files call it
_NORM = NormConfig(eps=1e-5, kind="layer", bias=True)
_ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu")
# What transformers takes for granted.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 128112,
    "max_position_embeddings": 1024,
    "d_model": 1024,
    **{f"{stack}_layers": 12 for stack in ("encoder", "decoder")},
    **{f"{stack}_ffn_dim": 4096 for stack in ("encoder", "decoder")},
    **{f"{stack}_attention_heads": 16 for stack in ("encoder", "decoder")},
    **{f"{stack}_sparse_step": 4 for stack in ("encoder", "decoder")},
    "activation_function": "relu",
    "scale_embedding": True,
    "num_experts": 128,
    "expert_capacity": 64,
    "second_expert_policy": "all",
    "moe_eval_capacity_token_fraction": 1.0,
    "moe_token_dropout": 0.2,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "tie_word_embeddings": True,
}


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A config.json of `model_type` nllb-moe. Raises ConfigError for what we cannot express."""
    hf = HfFields(_DEFAULTS | {name: value for name, value in raw.items() if value is not None})
    if (dtype := hf.get("router_dtype", default="float32")) != "float32":
        raise ConfigError(f"router_dtype={dtype!r} is not supported; known: float32")
    if hf.flag("router_ignore_padding_tokens"):
        raise ConfigError("router_ignore_padding_tokens=True routes padding; it is not supported, use False")
    size, pad = hf.size("d_model"), hf.token_id("pad_token_id")
    assert pad is not None, "there is a default"
    return HfFields(hf.raw | {"hidden_size": size}).model(
        encoder=StackConfig(layers=tuple(_layers(hf, "encoder")), final_norm=_NORM),
        decoder=StackConfig(layers=tuple(_layers(hf, "decoder")), final_norm=_NORM),
        sinusoid=SinusoidConfig(first=pad + 1),
        embedding_multiplier=math.sqrt(size) if hf.flag("scale_embedding") else 1.0,
        decoder_start_token_id=hf.token_id("decoder_start_token_id"),
    )


def _layers(hf: HfFields, stack: str) -> Iterator[LayerConfig]:
    step = hf.get(f"{stack}_sparse_step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ConfigError(f"{stack}_sparse_step={step!r}; it must be a whole number, 0 (none) or more")
    attention = _attention(hf, stack)
    for index in range(hf.size(f"{stack}_layers")):
        yield LayerConfig(
            attention=attention,
            cross_attention=attention if stack == "decoder" else None,
            feed_forward=(_moe if is_sparse(index, step) else _mlp)(hf, hf.size(f"{stack}_ffn_dim")),
            norm=_NORM,
        )


def is_sparse(index: int, step: int) -> bool:
    """Whether the layer is an MoE layer: the last of every `step`."""
    return step > 0 and (index + 1) % step == 0


def _attention(hf: HfFields, stack: str) -> AttentionConfig:
    size, heads = hf.size("d_model"), hf.size(f"{stack}_attention_heads")
    if size % heads:
        raise ConfigError(f"d_model={size} does not divide over {stack}_attention_heads={heads}; change one of them")
    return AttentionConfig(
        num_heads=heads,
        num_key_value_heads=heads,
        head_dim=size // heads,
        rope=None,
        qkv_bias=True,
        output_bias=True,
    )


def _activation(hf: HfFields) -> str:
    name = hf.get("activation_function")
    if name not in _ACTIVATIONS:
        raise ConfigError(f"activation_function={name!r} is not supported; known: {', '.join(_ACTIVATIONS)}")
    return name


def _mlp(hf: HfFields, inner: int) -> MlpConfig:
    return MlpConfig(intermediate_size=inner, activation=_activation(hf), bias=True, gated=False)


def _moe(hf: HfFields, inner: int) -> MoeConfig:
    router = RouterConfig(
        name="gshard_top2",
        num_experts=hf.size("num_experts"),
        top_k=2,
        settings=Top2Settings(second=hf.get("second_expert_policy")),
        bias=hf.flag("router_bias"),
    )
    capacity, evaluation_capacity = _capacities(hf)
    return MoeConfig(
        router=router,
        intermediate_size=inner,
        activation=_activation(hf),
        bias=True,
        gated=False,
        capacity=capacity,
        evaluation_capacity=evaluation_capacity,
        expert_dropout=hf.number("activation_dropout", 0.0),
        output_masking=hf.number("moe_token_dropout", 0.0),
    )


def _capacities(hf: HfFields) -> tuple[CapacityConfig, CapacityConfig | None]:
    """While training, and in evaluation: a share of the tokens, of which all are no limit, or the same."""
    how: dict[str, Any] = {
        "drop": "batch_prioritized" if hf.flag("batch_prioritized_routing") else "position",
        "renormalize": not hf.flag("normalize_router_prob_before_dropping"),
    }
    training = CapacityConfig(fixed=hf.size("expert_capacity"), **how)
    share = hf.number("moe_eval_capacity_token_fraction", 1.0)
    if share <= 0:
        return training, training
    return training, None if share >= 1 else CapacityConfig(token_share=share, **how)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Its config.json. Raises ConfigError for layers that differ where it has one field."""
    encoder, decoder = config.encoder, config.decoder
    if encoder is None:
        raise refusal(NAME, "it has no encoder")
    stacks = {"encoder": shared.alike(config, encoder.layers), "decoder": shared.alike(config, decoder.layers)}
    moe = next((own.moe for own in stacks.values() if own.moe is not None), None)
    if moe is None or moe.capacity is None or moe.capacity.fixed is None:
        raise refusal(NAME, "it has no MoE layer" if moe is None else "its experts have no fixed capacity")
    if not isinstance(moe.router.settings, Top2Settings):
        raise refusal(NAME, f"its router is {moe.router.name!r}")
    sizes: dict[str, Any] = {}
    for name, stack in (("encoder", encoder), ("decoder", decoder)):
        layer, block = stacks[name].layer, stacks[name].moe or stacks[name].mlp
        assert block is not None, "a stack has layers"
        if not isinstance(layer.attention, AttentionConfig):
            raise refusal(NAME, "its attention keeps latents (MlaConfig)")
        sizes |= {
            f"{name}_layers": len(stack.layers),
            f"{name}_ffn_dim": block.intermediate_size,
            f"{name}_attention_heads": layer.attention.num_heads,
            f"{name}_sparse_step": shared.step_of(stack, is_sparse, NAME),
            f"{name}_layerdrop": 0.0,
        }
    return {
        "architectures": ["NllbMoeForConditionalGeneration"],
        "model_type": ALIASES[0],
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "max_position_embeddings": config.context_length,
        **sizes,
        "activation_function": moe.activation,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": moe.expert_dropout,
        "scale_embedding": config.embedding_multiplier != 1,
        "num_experts": moe.num_experts,
        "router_bias": moe.router.bias,
        "router_dtype": "float32",
        "router_ignore_padding_tokens": False,
        "second_expert_policy": moe.router.settings.second,
        **_capacity_fields(moe.capacity, moe.evaluation_capacity),
        "moe_token_dropout": moe.output_masking,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": shared.one_or_all(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
        "decoder_start_token_id": config.decoder_start_token_id,
        "use_cache": True,
    }


def _capacity_fields(training: CapacityConfig, evaluation: CapacityConfig | None) -> dict[str, Any]:
    share = 1.0 if evaluation is None else evaluation.token_share
    return {
        "expert_capacity": training.fixed,
        "batch_prioritized_routing": training.drop == "batch_prioritized",
        "normalize_router_prob_before_dropping": not training.renormalize,
        "moe_eval_capacity_token_fraction": -1.0 if share is None else share,
    }


def weight_map(config: ModelConfig) -> WeightMap:
    """Our tensors and their names in NLLB-MoE's files."""
    outer = {
        "embedding": "model.shared",
        "encoder_final_norm": "model.encoder.layer_norm",
        "final_norm": "model.decoder.layer_norm",
        "head": "lm_head",
    }
    return shared.weight_map(config, outer, _names("encoder"), _names("decoder"))


def _names(stack: str) -> shared.StackNames:
    kinds = {"attention": "self_attn", "cross_attention": "cross_attention"}
    modules = {
        **{f"{ours}_norm": f"{theirs}_layer_norm" for ours, theirs in kinds.items()},
        **{f"{ours}.{part}_proj": f"{theirs}.{part}_proj" for ours, theirs in kinds.items() for part in "qkv"},
        **{f"{ours}.o_proj": f"{theirs}.out_proj" for ours, theirs in kinds.items()},
        "feed_forward_norm": "ff_layer_norm",
        "feed_forward.up_proj": "ffn.fc1",
        "feed_forward.down_proj": "ffn.fc2",
        "feed_forward.router": "ffn.router.classifier",
    }
    inside = "ffn.experts.expert_{e}"
    experts = shared.ExpertNames(gate="", up=f"{inside}.fc1", down=f"{inside}.fc2")
    return shared.StackNames(f"model.{stack}.layers.", modules, experts)


PRESETS = {
    "nllb-moe-54b": Preset(
        _DEFAULTS
        | {
            "model_type": ALIASES[0],
            "vocab_size": 256206,
            "d_model": 2048,
            **{f"{stack}_layers": 24 for stack in ("encoder", "decoder")},
            **{f"{stack}_ffn_dim": 8192 for stack in ("encoder", "decoder")},
            "batch_prioritized_routing": True,
            "normalize_router_prob_before_dropping": True,
        },
        licence="CC-BY-NC-4.0",
        source="facebook/nllb-moe-54b; arXiv:2207.04672, sec. 8.1",
    ),
}
