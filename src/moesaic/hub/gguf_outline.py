"""Models of GGUF files whose architecture does not run here, described from the header for counts and plans.

What parts they have is seen from the names of their tensors (github.com/ggml-org/llama.cpp, gguf-py/gguf/constants.py);
sizes are read as those of usual decoders are. What the file holds and the description does not is said.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moesaic.config import OutlinedModel
from moesaic.errors import ConfigError
from moesaic.families._usual import Usual, counted
from moesaic.hub.gguf_header import GgufHeader, GgufTensor
from moesaic.tensor_spec import Role

_STATES = re.compile(r"blk\.\d+\.(ssm_|shortconv|time_mix|linear_attn|indexer|hc_)")
_ROLES: tuple[tuple[str, Role], ...] = (
    (r"token_embd|per_layer|position_embd", "embedding"),
    (r"^output\.", "head"),
    (r"norm", "norm"),
    (r"ffn_gate_inp|exp_probs_b", "router"),
    (r"ffn_\w+_exps", "experts"),
    (r"ffn_\w+_shexp|ffn_latent", "shared_experts"),
    (r"ffn_", "mlp"),
    (r"", "attention"),
)


def outline_of_header(header: GgufHeader, architecture: str) -> OutlinedModel:
    """The description. Raises ConfigError where a size is missing, or a part is there that has no usual form."""
    tensors, fields = header.tensors, _own(header.metadata, architecture)
    if strange := next((name for name in tensors if _STATES.match(name)), None):
        raise ConfigError(
            f"architecture {architecture!r} does not run here, and {strange} belongs to a part that cannot be "
            "described from a header alone; plan it from its config.json"
        )
    layers = _layers(fields)
    model = counted(_hf_fields(architecture, fields, tensors, layers), _kind(tensors))
    held = sum(math.prod(each.shape) for name, each in tensors.items() if _is_counted(name, layers))
    more = "" if held == model.total else f"; the file holds {held:,} numbers of it, {model.total:,} are planned with"
    how = f"architecture {architecture!r} does not run here: described by its header as a usual decoder{more}"
    return replace(model, assumed=how)


def role_of(tensor: str) -> Role:
    """What a tensor is for, by its name in the file."""
    return next(role for pattern, role in _ROLES if re.search(pattern, tensor))


def _is_counted(name: str, layers: int) -> bool:
    """Not selection biases and frequencies, which are no parameters, nor layers that predict further tokens."""
    block = re.match(r"blk\.(\d+)\.", name)
    return not ("exp_probs_b" in name or "rope_" in name or (block is not None and int(block[1]) >= layers))


def _own(metadata: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    prefix = f"{architecture}."
    return {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}


def _layers(fields: Mapping[str, Any]) -> int:
    found = fields.get("block_count", 0) - fields.get("nextn_predict_layers", 0)
    if not isinstance(found, int) or not 0 < found < 100_000:
        raise ConfigError(f"block_count={fields.get('block_count')!r}; it must be a whole number above 0")
    return found


def _kind(tensors: Mapping[str, GgufTensor]) -> Usual:
    first = {name.removeprefix("blk.0."): each for name, each in tensors.items() if name.startswith("blk.0.")}
    norms = sum(name in first for name in ("post_attention_norm.weight", "post_ffw_norm.weight"))
    normal = "ffn_norm.weight" in first
    return Usual(
        head_norm="attn_q_norm.weight" in first,
        output_bias="attn_output.bias" in first,
        biased="attn_q.bias" in first,
        sinks="attn_sinks.weight" in first,
        norms=norms if normal else 0,
        expert_bias="ffn_up_exps.bias" in first,
        router_bias="ffn_gate_inp.bias" in first,
    )


def _hf_fields(
    architecture: str, fields: Mapping[str, Any], tensors: Mapping[str, GgufTensor], layers: int
) -> dict[str, Any]:
    embedding = tensors.get("token_embd.weight")
    heads = _one(fields, "attention.head_count")
    shared = next((each.shape[0] for name, each in tensors.items() if name.endswith("ffn_up_shexp.weight")), None)
    latent, turned = fields.get("attention.kv_lora_rank"), fields.get("rope.dimension_count")
    head = fields.get("attention.key_length_mla", fields.get("attention.key_length"))
    found = {
        "model_type": architecture,
        "vocab_size": embedding.shape[0] if embedding else None,
        "hidden_size": fields.get("embedding_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": _one(fields, "attention.head_count_kv") or heads,
        "head_dim": head,
        "intermediate_size": _one(fields, "feed_forward_length"),
        "moe_intermediate_size": fields.get("expert_feed_forward_length", _one(fields, "feed_forward_length")),
        "num_experts": fields.get("expert_count") or None,
        "num_experts_per_tok": fields.get("expert_used_count") or None,
        "shared_expert_intermediate_size": shared,
        "mlp_layer_types": [
            "sparse" if f"blk.{layer}.ffn_gate_inp.weight" in tensors else "dense" for layer in range(layers)
        ],
        "max_position_embeddings": fields.get("context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    window, pattern = fields.get("attention.sliding_window"), fields.get("attention.sliding_window_pattern")
    if window and isinstance(pattern, list):
        kinds = ["sliding_attention" if slides else "full_attention" for slides in pattern]
        found |= {"sliding_window": window, "layer_types": kinds}
    elif window and architecture == "gpt-oss":  # every second layer, which the file does not say
        kinds = ["full_attention" if index % 2 else "sliding_attention" for index in range(layers)]
        found |= {"sliding_window": window, "layer_types": kinds}
    if latent:
        found |= {
            "kv_lora_rank": latent,
            "q_lora_rank": fields.get("attention.q_lora_rank"),
            "qk_rope_head_dim": turned,
            "qk_nope_head_dim": head - turned if isinstance(head, int) and isinstance(turned, int) else None,
            "v_head_dim": fields.get("attention.value_length_mla", fields.get("attention.value_length")),
        }
    return {name: value for name, value in found.items() if value is not None}


def _one(fields: Mapping[str, Any], name: str) -> Any:
    """A number, or the one that all layers of a list have; layers of zeros have no such part."""
    value = fields.get(name)
    if not isinstance(value, list):
        return value
    distinct = {each for each in value if each}
    if len(distinct) > 1:
        raise ConfigError(f"{name}={value[:6]!r}... differs between layers; one value for all of them is known")
    return next(iter(distinct), None)
