"""Number formats of files, and how config.json says that weights are packed (`quantization_config`). No torch here."""

from typing import Any, Literal, NamedTuple, get_args

from moesaic.errors import ConfigError

Method = Literal["fp8", "mxfp4"]
Format = Literal["fp32", "bf16", "fp16", "fp8", "mxfp4"]
FORMATS: tuple[Format, ...] = get_args(Format)
FIELD = "quantization_config"
FP8_BLOCK = 128
_SCALES = (None, "float", "ue8m0")


class Quantization(NamedTuple):
    """A way of packing that can be read: by name, and the type that unpacked weights take unless told."""

    method: Method
    unpacked: Literal["BF16", "F32"]


def read_quantization(raw: dict[str, Any]) -> Quantization | None:
    """What a config.json says of its files; None where weights are plain.

    Raises ConfigError for methods and settings that cannot be read.
    """
    described = raw.get(FIELD)
    if described is None:
        return None
    method = described.get("quant_method") if isinstance(described, dict) else described
    if method not in ("fp8", "mxfp4"):
        raise ConfigError(f"{FIELD} of method {method!r} is not supported; known: fp8, mxfp4")
    if method == "fp8":
        _check_fp8(described)
    stated = raw.get("dtype") or raw.get("torch_dtype")
    return Quantization(method, "F32" if stated == "float32" else "BF16")


def _check_fp8(described: dict[str, Any]) -> None:
    block = described.get("weight_block_size")
    if block != [FP8_BLOCK, FP8_BLOCK]:
        raise ConfigError(f"{FIELD}.weight_block_size={block!r}; known: [{FP8_BLOCK}, {FP8_BLOCK}]")
    scheme = described.get("activation_scheme", "dynamic")
    if scheme != "dynamic":
        raise ConfigError(f"{FIELD}.activation_scheme={scheme!r}; known: 'dynamic'")
    format_ = str(described.get("fmt", "e4m3"))
    if format_ not in ("e4m3", "float8_e4m3fn"):
        raise ConfigError(f"{FIELD}.fmt={format_!r}; known: 'e4m3'")
    if described.get("scale_fmt") not in _SCALES:
        raise ConfigError(f"{FIELD}.scale_fmt={described['scale_fmt']!r}; known: 'float', 'ue8m0'")


def describe(method: Method, kept: list[str]) -> dict[str, Any]:
    """The `quantization_config` to write. kept: names of the modules whose weights stay as they are."""
    if method == "mxfp4":
        return {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        "modules_to_not_convert": kept,
    }
