"""What the Qwen families share: which layers look at a window of tokens, which are routed, and their experts' names."""

from typing import Any

from moesaic.config import ModelConfig
from moesaic.errors import ConfigError
from moesaic.families._common import ExpertNames, HfFields, attentions, refusal, shared_dense, shared_moe

EXPERTS = ExpertNames(
    "mlp.gate",
    gate="mlp.experts.{e}.gate_proj",
    up="mlp.experts.{e}.up_proj",
    down="mlp.experts.{e}.down_proj",
)
_WINDOWED, _FULL = "sliding_attention", "full_attention"


def read_windows(hf: HfFields, usual: list[bool]) -> list[int | None]:
    """The window of every layer, None where it sees all: from `layer_types`, else of the layers that are `usual`.

    Nothing counts unless `use_sliding_window` says so. Raises ConfigError for kinds of layers that we do not know.
    """
    num_layers = hf.size("num_hidden_layers")
    if not hf.flag("use_sliding_window"):
        return [None] * num_layers
    window = hf.size("sliding_window", default=4096)
    kinds = hf.get("layer_types", default=[_WINDOWED if windowed else _FULL for windowed in usual])
    if not isinstance(kinds, list) or len(kinds) != num_layers or not all(kind in (_WINDOWED, _FULL) for kind in kinds):
        raise ConfigError(f"layer_types={kinds!r}; give {_FULL} or {_WINDOWED} for each of {num_layers} layers")
    return [window if kind == _WINDOWED else None for kind in kinds]


def late_windows(hf: HfFields) -> list[int | None]:
    """As `read_windows`, for families in which the layers from `max_window_layers` on have one."""
    first = max_window_layers(hf)
    return read_windows(hf, [layer >= first for layer in range(hf.size("num_hidden_layers"))])


def max_window_layers(hf: HfFields) -> int:
    """The layer at which windows begin or end, by family."""
    first = hf.get("max_window_layers", default=28)
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise ConfigError(f"max_window_layers={first!r}; it must be a whole number, 0 or more")
    return first


def window_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields of a config.json for the windows of a model's layers. Raises ConfigError for windows of two sizes."""
    windows = [attention.window for attention in attentions(config)]
    sizes = sorted({window for window in windows if window is not None})
    if len(sizes) > 1:
        raise refusal(config.family, f"its layers have windows of {sizes[0]} and {sizes[1]} tokens")
    return {
        "use_sliding_window": bool(sizes),
        "sliding_window": sizes[0] if sizes else None,
        "max_window_layers": next((i for i, window in enumerate(windows) if window is not None), len(windows)),
        "layer_types": [_FULL if window is None else _WINDOWED for window in windows],
    }


def which_route(hf: HfFields) -> list[bool]:
    """Layer i is an MoE unless `mlp_only_layers` lists it or `decoder_sparse_step` does not divide i + 1."""
    step, listed = hf.size("decoder_sparse_step", default=1), hf.get("mlp_only_layers", default=[])
    num_layers = hf.size("num_hidden_layers")
    if not isinstance(listed, list) or any(layer not in range(num_layers) for layer in listed):
        raise ConfigError(f"mlp_only_layers={listed!r}; it must be a list of layers from 0 to {num_layers - 1}")
    return [i not in listed and (i + 1) % step == 0 for i in range(num_layers)]


def moe_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields of a config.json for the experts, and for the dense layers among the MoE layers."""
    moe, dense = shared_moe(config), shared_dense(config)
    # Without a dense layer nothing reads its width, but transformers wants one: as wide as the active experts.
    width = dense.intermediate_size if dense else moe.router.top_k * moe.intermediate_size
    return {
        "intermediate_size": width,
        "moe_intermediate_size": moe.intermediate_size,
        "num_experts": moe.router.num_experts,
        "num_experts_per_tok": moe.router.top_k,
        "norm_topk_prob": moe.router.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(len(config.layers)) if i not in config.moe_layers],
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }
