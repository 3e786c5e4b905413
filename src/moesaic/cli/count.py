"""`moesaic count`: what a model holds and what a token costs, from its description alone. Loads no torch."""

import argparse
from typing import Any

from moesaic import hub
from moesaic.cli import output
from moesaic.config import LayerConfig, ModelConfig, MoeConfig
from moesaic.errors import ConfigError
from moesaic.tensor_spec import ROLES

BYTES_PER_PARAMETER = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1, "int4": 0.5}
RULES = {
    "total": "every parameter once, tied tables once",
    "active_gemm": "multiplied for one token: chosen experts and all the rest, without an embedding that is looked up",
    "active_all": "active_gemm and the looked-up embedding",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moesaic count`."""
    parser.epilog = "example: moesaic count mixtral-8x7b --context 4096"
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a preset, a folder, a config.json or a .gguf file")
    parser.add_argument("--all", action="store_true", help="every preset, one line each")
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens that the counted token sees (the model's context if not given)"
    )
    parser.add_argument(
        "--dtype", choices=list(BYTES_PER_PARAMETER), default="bf16", help="number format of the weights (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Print what a model, or every preset, holds and costs. Returns the exit code."""
    if args.all == (args.model is not None):
        raise ConfigError("count takes one MODEL or --all; `moesaic count --all` lists the presets")
    if args.context is not None and args.context < 1:
        raise ConfigError(f"--context {args.context}; give a number of tokens above 0")
    if args.all:
        return _count_all(args)
    document = describe(args.model, hub.read_config(args.model), args.context, args.dtype)
    if args.json:
        output.print_json(document)
    else:
        _print_one(document)
    return 0


def describe(name: str, config: ModelConfig, context: int | None = None, dtype: str = "bf16") -> dict[str, Any]:
    """Everything `count` knows of a model, JSON-ready. Bytes and FLOPs are those of one token and one sequence.

    `sparsity` is the share of all parameters that one token leaves alone, 1 - active_all/total.
    """
    num_tokens = context or config.context_length
    state_element_bytes = 4 if dtype == "fp32" else 2  # weights of 8 and 4 bits still keep their states in 16
    return {
        "model": name,
        "family": config.family,
        "total": config.total,
        "active_gemm": config.active_gemm,
        "active_all": config.active_all,
        "sparsity": round(1 - config.active_all / config.total, 6),
        "roles": config.roles,
        "active_roles": _active_roles(config),
        "layers": len(config.layers),
        "moe_layers": len(config.moe_layers),
        "experts": sorted({_experts(layer) for layer in config.layers} - {""}),
        "context": num_tokens,
        "dtype": dtype,
        "weight_bytes": config.weight_bytes(BYTES_PER_PARAMETER[dtype]),
        "state_bytes_per_token": config.state_bytes(1, state_element_bytes),
        "state_bytes": config.state_bytes(num_tokens, state_element_bytes),
        "flops_per_token": config.flops_per_token(num_tokens),
    }


def _active_roles(config: ModelConfig) -> dict[str, int]:
    counts: dict[str, int] = dict.fromkeys(ROLES, 0)
    for tensor in config.parameters():
        counts[tensor.role] += tensor.active_numel
    return counts


def _experts(layer: LayerConfig) -> str:
    if not isinstance(layer.feed_forward, MoeConfig):
        return ""
    router = layer.feed_forward.router
    return f"{router.top_k} of {router.num_experts}" + (" + shared" if layer.feed_forward.shared else "")


def _print_one(document: dict[str, Any]) -> None:
    title = f"{document['model']} ({document['family']}), {_shape(document)}"
    counts = [[key, output.number(document[key]), f"{document[key]:,}", rule] for key, rule in RULES.items()]
    output.table(["count", "parameters", "exactly", "rule"], counts, title)
    output.write("\n")
    output.table(["role", "parameters", "active", "share"], _role_rows(document))
    output.write("\n")
    tokens = f"{document['context']:,} tokens"
    output.table(
        ["cost", "value"],
        [
            [f"weights in {document['dtype']}", output.size(document["weight_bytes"])],
            ["state (keys and values) of one token", output.size(document["state_bytes_per_token"])],
            [f"state of {tokens}", output.size(document["state_bytes"])],
            [f"FLOPs of a token that sees {tokens}", output.number(document["flops_per_token"])],
            ["sparsity: parameters that a token leaves alone", f"{document['sparsity']:.1%}"],
        ],
    )


def _shape(document: dict[str, Any]) -> str:
    layers = f"{document['layers']} layers"
    if not document["moe_layers"]:
        return f"{layers}, dense"
    return f"{layers}, {document['moe_layers']} of them MoE, {' and '.join(document['experts'])} experts a token"


def _role_rows(document: dict[str, Any]) -> list[list[str]]:
    return [
        [role, output.number(count), output.number(document["active_roles"][role]), f"{count / document['total']:.1%}"]
        for role, count in document["roles"].items()
        if count
    ]


def _count_all(args: argparse.Namespace) -> int:
    from moesaic import families

    documents = [
        {
            **describe(name, families.from_hf(preset.config), args.context, args.dtype),
            "licence": preset.licence,
            "source": preset.source,
        }
        for name, preset in families.presets().items()
    ]
    if args.json:
        output.print_json({"models": documents})
        return 0
    rows = [
        [
            document["model"],
            *(output.number(document[key]) for key in RULES),
            " and ".join(document["experts"]) or "-",
            output.size(document["weight_bytes"]),
            output.size(document["state_bytes_per_token"]),
            document["licence"],
        ]
        for document in documents
    ]
    weights = f"weights ({args.dtype})"
    output.table(["model", *RULES, "experts a token", weights, "state of a token", "licence"], rows)
    output.next_command(f"moesaic count {documents[0]['model']}")
    return 0
