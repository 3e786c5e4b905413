"""`moesaic count`: what a model holds and what a token costs, from its description alone. Loads no torch."""

import argparse
from pathlib import Path
from typing import Any

from moesaic import families
from moesaic.cli import field_plot, output
from moesaic.config import LayerConfig, ModelConfig, MoeConfig, OutlinedModel
from moesaic.errors import ConfigError
from moesaic.families import _counted
from moesaic.families._counted import NOT_YET
from moesaic.families._published import PUBLISHED
from moesaic.hub.resolve import describe_config
from moesaic.tensor_spec import ROLES

BYTES_PER_PARAMETER = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1, "int4": 0.5}
RULES = {
    "total": "every parameter once, tied tables once",
    "active_gemm": "multiplied for one token: chosen experts and all the rest, without an embedding that is looked up",
    "active_all": "active_gemm and the looked-up embedding",
    "sparsity": "1 - active_all / total: the share of parameters that a token leaves alone",
    "mtp_total": "of layers that predict further tokens, in none of the counts above",
    "mtp_active": "those of mtp_total that one token uses",
}
COUNTS = ("total", "active_gemm", "active_all")
MTP_COUNTS = ("mtp_total", "mtp_active")
UNVERIFIED = "sizes from memory of the model card: not compared with the released files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moesaic count`."""
    parser.epilog = "example: moesaic count mixtral-8x7b --context 4096"
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a preset, a folder, a config.json or a .gguf file")
    parser.add_argument("--all", action="store_true", help="every preset, one line each")
    parser.add_argument(
        "--plot", metavar="FILE", help="with --all: draw total against active parameters as an SVG file"
    )
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
    if args.plot and not args.all:
        raise ConfigError("--plot draws the whole field; add --all, and give no MODEL")
    if args.context is not None and args.context < 1:
        raise ConfigError(f"--context {args.context}; give a number of tokens above 0")
    if args.all:
        return _count_all(args)
    document = describe(args.model, describe_config(args.model), args.context, args.dtype)
    if args.json:
        output.print_json(document)
    else:
        _print_one(document)
    return 0


def describe(name: str, model: ModelConfig, context: int | None = None, dtype: str = "bf16") -> dict[str, Any]:
    """Everything `count` knows of a model, JSON-ready. Bytes and FLOPs are those of one token and one sequence.

    `sparsity` is the share of all parameters that one token leaves alone, 1 - active_all/total. `published` is what the
    makers state, None where a name is no preset's. `verified` is false for sizes that nothing has confirmed.
    """
    preset = (families.presets() | _counted.PRESETS).get(name)
    published = PUBLISHED.get(name)
    return {
        "model": name,
        "family": model.family,
        "runs": not isinstance(model, OutlinedModel),
        "total": model.total,
        "active_gemm": model.active_gemm,
        "active_all": model.active_all,
        "sparsity": round(1 - model.active_all / model.total, 6),
        **{key: getattr(model, key) for key in MTP_COUNTS},
        "rules": RULES,
        "verified": preset is None or preset.is_verified,
        "published": published and published._asdict(),
        "licence": preset and preset.licence,
        "source": preset and preset.source,
        "roles": model.roles,
        "active_roles": _active_roles(model),
        "dtype": dtype,
        "weight_bytes": round(model.total * BYTES_PER_PARAMETER[dtype]),
        **_costs(model, context, dtype),
    }


def _costs(config: ModelConfig, context: int | None, dtype: str) -> dict[str, Any]:
    num_tokens = context or config.context_length
    state_element_bytes = 4 if dtype == "fp32" else 2  # weights of 8 and 4 bits still keep their states in 16
    return {
        "layers": len(config.layers),
        "encoder_layers": len(config.encoder.layers) if config.encoder else 0,
        "moe_layers": len(config.moe_layers),
        "experts": sorted({_experts(layer) for layer in config.layers} - {""}),
        "context": num_tokens,
        "state_bytes_per_token": config.state_bytes_per_token(state_element_bytes),
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
    title = f"{_name(document)} ({document['family']}), {_shape(document)}"
    counts = [_count_row(document, key) for key in COUNTS]
    counts.append(["sparsity", f"{document['sparsity']:.1%}", "", RULES["sparsity"]])
    if document["mtp_total"]:
        counts += [_count_row(document, key) for key in MTP_COUNTS]
    output.table(["count", "parameters", "exactly", "rule"], counts, title)
    output.write("\n")
    output.table(["role", "parameters", "active", "share"], _role_rows(document))
    output.write("\n")
    output.table(["cost", "value"], _cost_rows(document))
    if published := document["published"]:
        active = f", {published['active']} active" if published["active"] else ""
        output.write(f"\npublished: {published['total']} in total{active} (makers follow no common rule)\n")
    if document["licence"]:
        output.write(f"\nlicence {document['licence']}; source {document['source']}\n")
    if not document["verified"]:
        output.talk(f"unverified: {UNVERIFIED}")
    if not document["runs"]:
        output.talk(f"{document['model']} is {NOT_YET}")


def _name(document: dict[str, Any]) -> str:
    return document["model"] if document["verified"] else f"{document['model']} (unverified)"


def _count_row(document: dict[str, Any], key: str) -> list[str]:
    return [key, output.number(document[key]), f"{document[key]:,}", RULES[key]]


def _cost_rows(document: dict[str, Any]) -> list[list[str]]:
    tokens = f"{document['context']:,} tokens"
    another = "a token that sees"
    if document["encoder_layers"]:
        tokens = f"{tokens} read and as many written"
        another = "one read and one written token that see"
    return [
        [f"weights in {document['dtype']}", output.size(document["weight_bytes"])],
        ["state (keys and values) that a further token adds", output.size(document["state_bytes_per_token"])],
        [f"state of {tokens}", output.size(document["state_bytes"])],
        [f"FLOPs of {another} {tokens}", output.number(document["flops_per_token"])],
    ]


def _shape(document: dict[str, Any]) -> str:
    layers = f"{document['layers']} layers"
    if encoding := document["encoder_layers"]:
        layers = f"{encoding} layers that read and {document['layers'] - encoding} that write"
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
    models: dict[str, ModelConfig] = {name: families.find_preset(name) for name in families.presets()}
    models |= {name: _counted.count(preset.config) for name, preset in _counted.PRESETS.items()}
    documents = [describe(name, model, args.context, args.dtype) for name, model in models.items()]
    if args.plot:
        _plot(Path(args.plot), documents)
    if args.json:
        output.print_json({"rules": RULES, "models": documents})
        return 0
    rows = [_row(document) for document in documents]
    columns = ["model", *COUNTS, "published", "sparsity", "experts a token", f"weights ({args.dtype})"]
    output.table([*columns, "state a token adds", "licence"], rows)
    output.talk(f"{', '.join(_counted.PRESETS)}: {NOT_YET}")
    output.talk(f"unverified: {UNVERIFIED}")
    output.next_command(f"moesaic count {documents[0]['model']}")
    return 0


def _row(document: dict[str, Any]) -> list[str]:
    published = document["published"]
    return [
        _name(document),
        *(output.number(document[key]) for key in COUNTS),
        " / ".join(part for part in published.values() if part) if published else "-",
        f"{document['sparsity']:.1%}",
        " and ".join(document["experts"]) or "-",
        output.size(document["weight_bytes"]),
        output.size(document["state_bytes_per_token"]),
        document["licence"],
    ]


def _plot(path: Path, documents: list[dict[str, Any]]) -> None:
    keys = ("family", "total", "active_gemm", "runs")
    models = [field_plot.Model(_name(document), *(document[key] for key in keys)) for document in documents]
    picture = field_plot.draw(models)
    path.write_text(picture, encoding="utf-8")
    output.talk(f"drawn: {path}")
