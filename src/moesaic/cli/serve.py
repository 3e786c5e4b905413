"""`moesaic serve`: models behind OpenAI's and Anthropic's protocols, for many users of one machine."""

import argparse
import importlib
import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.cli import output
from moesaic.cli.chat import DEFAULT_MODEL_BITS
from moesaic.cli.text import DTYPES
from moesaic.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:  # at run time these come in only once the options make sense
    from moesaic.serve.operation.keys import Keys
    from moesaic.serve.operation.settings import ModelSettings, ServeSettings
    from moesaic.serve.replicas.cluster import Cluster

DEFAULT_MODEL = "smollm2-moe"
# Options that are settings of the server, and of each model.
_OF_SERVER = ("host", "port", "api_key_file", "tls_cert", "tls_key", "drain_seconds")
_OF_MODELS = ("bits", "experts_bits", "values", "dtype", "threads", "max_length", "cache", "max_running")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moesaic serve`."""
    parser.epilog = (
        "example: moesaic serve runs/first/model --bits 4\n"
        "example: moesaic serve small=runs/small/model big=runs/big/model --host 0.0.0.0 --api-key-file keys.txt\n"
        "example: moesaic serve --config serve.toml --set limits.queue=64"
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="a checkpoint folder, a .gguf file or a preset, or NAME=MODEL (the embedded model if not given)",
    )
    parser.add_argument("--host", metavar="HOST", help="listen on this address (127.0.0.1: this machine alone)")
    parser.add_argument("--port", metavar="N", type=int, help="on this port (8000); 0: any that is free")
    _add_model_options(parser)
    parser.add_argument("--queue", metavar="N", type=int, help="let N requests wait, refuse more with 429 (256)")
    parser.add_argument(
        "--api-key-file", metavar="FILE", help="let in who has a key: one a line, name:key (also: $MOESAIC_API_KEYS)"
    )
    parser.add_argument(
        "--cors-origin",
        metavar="URL",
        action="append",
        help="let this site's pages ask from browsers; may be repeated",
    )
    parser.add_argument("--tls-cert", metavar="FILE", help="speak TLS with this certificate (PEM)")
    parser.add_argument("--tls-key", metavar="FILE", help="and this key")
    parser.add_argument(
        "--drain-seconds", metavar="S", type=float, help="let running requests finish for S seconds at the end (30)"
    )
    parser.add_argument("--replicas", metavar="N", type=int, help="serve from N processes of a Ray cluster")
    parser.add_argument(
        "--ray-address", metavar="ADDRESS", help="of that cluster ($RAY_ADDRESS, or a Ray of this machine alone)"
    )
    parser.add_argument("--log-format", choices=("text", "json", "none"), help="of the line for each request (text)")
    parser.add_argument("--log-prompts", action="store_true", help="write prompts and answers to the log, too")
    parser.add_argument("--config", metavar="FILE", type=Path, help="settings as TOML; options go before them")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="TABLE.FIELD=VALUE",
        action="append",
        default=[],
        help="change one field of the settings, such as limits.timeout_s=60",
    )
    parser.add_argument("--json", action="store_true", help="print address and models as a line of JSON once ready")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bits", type=int, choices=(4, 8), help="round the weights to 4 or 8 bits once they are read")
    parser.add_argument("--experts-bits", type=int, choices=(4, 8), help="those of routed experts (as --bits)")
    parser.add_argument(
        "--values",
        choices=("even", "uneven"),
        help="what 4 bits stand for: even steps, or uneven ones, which lose less and compute more (even)",
    )
    parser.add_argument("--dtype", choices=list(DTYPES), help="compute in this format (the checkpoint's if not given)")
    parser.add_argument("--threads", metavar="N", type=int, help="use N processors (all that this process may use)")
    parser.add_argument("--max-length", metavar="N", type=int, help="longest text, prompt included (the model's own)")
    parser.add_argument("--cache", metavar="SIZE", help="room for all texts: tokens, or bytes such as 4GiB (65536)")
    parser.add_argument("--max-running", metavar="N", type=int, help="run at most N requests at a time (32)")


def run(args: argparse.Namespace) -> int:
    """Serve until a signal ends it. Returns the exit code."""
    if args.replicas is None and args.ray_address is not None:
        raise ConfigError("--ray-address without --replicas N; give both")
    settings = _settings(args)
    _require_packages()
    from moesaic.kernels import backend
    from moesaic.serve.operation.keys import read_keys
    from moesaic.serve.operation.logs import set_up_logging
    from moesaic.serve.operation.server import Server, address_of, listen

    backend.choose("native")  # the engine has no other kernels: what is missing is said here
    keys = read_keys(settings.api_key_file)
    with listen(settings) as sock:
        address = address_of(settings, sock)
        _warn(settings, keys, address)
        cluster = _cluster(settings, args)
        server = Server(settings, keys, sock, output.talk, cluster and cluster.app())
        for name, model in settings.models.items():
            _say_needs(name, model)
        set_up_logging(settings.log)
        if cluster is not None:
            output.talk(f"starting {args.replicas} replicas on Ray")
        with cluster or nullcontext():
            server.run(_announcement(address, settings, bool(keys), args.json))
    return 0


def _cluster(settings: "ServeSettings", args: argparse.Namespace) -> "Cluster | None":
    """What answers in place of models of this process; None: they do. Raises ConfigError."""
    if args.replicas is None:
        return None
    from moesaic.serve.operation.replicated import cluster_of

    return cluster_of(settings, args.replicas, args.ray_address)


def _settings(args: argparse.Namespace) -> "ServeSettings":
    """What the file, --set and the options say together. Raises ConfigError for what is impossible."""
    from moesaic.serve.operation.settings import settings_of
    from moesaic.train.recipe import parse_overrides, read_toml, with_values

    tree = read_toml(args.config) if args.config is not None else {}
    tree = with_values(tree, {name: value for name in _OF_SERVER if (value := getattr(args, name)) is not None})
    if args.queue is not None:
        tree = with_values(tree, {"limits.queue": args.queue})
    if args.cors_origin is not None:
        tree["cors_origins"] = args.cors_origin
    if args.log_format is not None:
        tree = with_values(tree, {"log.format": args.log_format})
    if args.log_prompts:
        tree = with_values(tree, {"log.prompts": True})
    tree["models"] = _models(args, tree.get("models", {}))
    return settings_of(with_values(tree, parse_overrides(args.overrides)))


def _models(args: argparse.Namespace, tables: Any) -> dict[str, Any]:
    """The tables of models: the file's, those of the command line, or else the embedded one's."""
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise ConfigError("models must be tables: [models.NAME] with path = ...")
    given = {name: value for name in _OF_MODELS if (value := getattr(args, name)) is not None}
    if isinstance(given.get("cache"), str) and given["cache"].isdecimal():
        given["cache"] = int(given["cache"])
    found: dict[str, Any] = dict(tables)
    for word in args.models:
        name, path = _named(word)
        if name in found:
            raise ConfigError(f"two models are to be served as {name!r}; give one another name: NAME={path}")
        found[name] = {"path": path}
    if not found:
        bits = {} if args.bits is not None or args.dtype is not None else {"bits": DEFAULT_MODEL_BITS}
        found[DEFAULT_MODEL] = {"path": _default_model(), **bits}
    return {name: {**table, **given} for name, table in found.items()}


def _named(word: str) -> tuple[str, str]:
    """Name and model of NAME=MODEL, or of a model that goes by its own name."""
    name, separator, path = word.partition("=")
    if separator and "/" not in name:
        return name, path
    return Path(word).expanduser().resolve().name.removesuffix(".gguf") if Path(word).exists() else word, word


def _default_model() -> str:
    from moesaic.tune.upcycle import smollm2_moe

    with output.progress("finding the default model (made at first use)"):
        return str(smollm2_moe())


def _require_packages() -> None:
    for package in ("fastapi", "uvicorn", "httptools", "prometheus_client", "llguidance"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingDependencyError(f"moesaic serve needs {package}; run: pip install 'moesaic[serve]'") from error


def _warn(settings: "ServeSettings", keys: "Keys", address: str) -> None:
    from moesaic.serve.operation.application import is_loopback

    if not is_loopback(settings.host) and not keys:
        output.talk(
            f"WARNING: whoever reaches {address} may use this server, without any key; "
            "give --api-key-file FILE, or listen on 127.0.0.1"
        )
    if settings.log.prompts:
        output.talk("WARNING: prompts and answers are written to the log (--log-prompts)")


def _say_needs(name: str, model: "ModelSettings") -> None:
    """What a model takes, before it is loaded. Raises MoesaicError for one that is not there."""
    from moesaic.serve.operation.opening import needs_of

    needs = needs_of(model)
    free = "" if needs.free is None else f"; {output.size(needs.free)} of memory are free"
    later = "" if model.at_start else " (loaded when it is asked for)"
    output.talk(
        f"{name}{later}: {output.size(needs.weights)} of weights and {output.size(needs.cache)} of cache for "
        f"{needs.cache_tokens:,} tokens{free}"
    )
    if needs.free is not None and needs.weights + needs.cache > needs.free:
        raise ConfigError(
            f"{name} takes {output.size(needs.weights + needs.cache)}, {output.size(needs.free)} of memory are free; "
            "use a smaller --cache or fewer --bits, or end other programs"
        )


def _announcement(address: str, settings: "ServeSettings", has_keys: bool, as_json: bool) -> Callable[[], None]:
    """Says that the server is ready, and what to type next."""
    names = [name for name, model in settings.models.items() if model.at_start]

    def announce() -> None:
        output.talk(f"serving {', '.join(names)} at {address} (Ctrl-C ends it)")
        if as_json:
            output.write(json.dumps({"url": address, "models": names, "pid": os.getpid()}) + "\n")
        key = ' -H "authorization: Bearer $KEY"' if has_keys else ""
        body = {"model": names[0], "messages": [{"role": "user", "content": "Hello"}]}
        insecure = " --cacert CERT" if settings.tls_cert else ""
        output.next_command(
            f"curl{insecure} {address}/v1/chat/completions{key} -H 'content-type: application/json' "
            f"-d '{json.dumps(body)}'"
        )

    return announce
