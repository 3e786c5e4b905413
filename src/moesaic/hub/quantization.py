"""Number formats of files, and how config.json says that weights are packed (`quantization_config`). No torch here."""

import re
from typing import Any, Literal, NamedTuple, get_args

from moesaic.errors import ConfigError

Method = Literal["fp8", "mxfp4", "compressed-tensors", "moesaic-uneven4"]
METHODS: tuple[Method, ...] = get_args(Method)
Format = Literal["fp32", "bf16", "fp16", "fp8", "mxfp4"]
PackedAs = Literal["scale_inv", "scale"]
"""How a family's packed weights lie in files: with fp32 scales called `weight_scale_inv` (DeepSeek-V3), or with powers
of two called `scale`, and experts in four bits beside other matrices in eight (DeepSeek-V4)."""
FORMATS: tuple[Format, ...] = get_args(Format)
FIELD, EXPERTS = "quantization_config", "expert_dtype"
FP8_BLOCK = 128
_SCALES = (None, "float", "ue8m0")


class IntGroups(NamedTuple):
    """Whole numbers of `bits` bits with a scale for each `group` of inputs (None: one for all), in modules `targets`.

    A target is a module's name, a regular expression after "re:", or the class of modules: "Linear" is all of them.
    """

    bits: int
    group: int | None
    targets: tuple[str, ...]

    def count(self, inputs: int) -> int:
        """Scales of a row."""
        return 1 if self.group is None else -(-inputs // self.group)


class Quantization(NamedTuple):
    """A way of packing that can be read: by name, and the type that unpacked weights take unless told.

    experts: how routed experts are packed where the method is fp8. groups: which modules how, in compressed-tensors.
    """

    method: Method
    unpacked: Literal["BF16", "F16", "F32"]
    experts: Literal["fp8", "fp4"] = "fp8"
    groups: tuple[IntGroups, ...] = ()

    @property
    def format(self) -> Format | None:
        """What makes such files in a conversion."""
        if self.method in ("compressed-tensors", "moesaic-uneven4"):
            return None
        return "mxfp4" if self.experts == "fp4" else self.method


def read_quantization(raw: dict[str, Any]) -> Quantization | None:
    """What a config.json says of its files; None where weights are plain.

    Raises ConfigError for methods and settings that cannot be read.
    """
    described = raw.get(FIELD)
    if described is None:
        return None
    if not isinstance(described, dict):
        raise ConfigError(f"{FIELD}={described!r}; it must be a table with its quant_method: {', '.join(METHODS)}")
    method = described.get("quant_method")
    if method not in METHODS:
        raise ConfigError(f"{FIELD} of method {method!r} is not supported; known: {', '.join(METHODS)}")
    stated = raw.get("dtype") or raw.get("torch_dtype")
    unpacked = "F32" if stated == "float32" else "BF16"
    if method == "compressed-tensors":
        return Quantization(method, "F16" if stated == "float16" else unpacked, groups=_int_groups(described))
    if method == "mxfp4":
        return Quantization(method, unpacked)
    if method == "moesaic-uneven4":
        return Quantization(method, "F16" if stated == "float16" else unpacked)
    _check_fp8(described)
    experts = described.get(EXPERTS) or raw.get(EXPERTS) or "fp8"
    if experts not in ("fp8", "fp4"):
        raise ConfigError(f"{EXPERTS}={experts!r}; known: 'fp8', 'fp4'")
    return Quantization(method, unpacked, experts)


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


_INT_FORMAT = "pack-quantized"
# What would change the numbers: absent or one of these.
_WHOLE = {"kv_cache_scheme": (None,), "sparsity_config": (None, {}), "transform_config": (None, {})}
_OF_WEIGHTS = {
    "type": ("int",), "num_bits": (4, 8), "symmetric": (True,), "strategy": ("group", "channel"),
    "dynamic": (False,), "actorder": (None, False, "weight", "static"), "block_structure": (None,),
}  # fmt: skip


def _int_groups(described: dict[str, Any]) -> tuple[IntGroups, ...]:
    """The groups of a compressed-tensors configuration. Raises ConfigError for what cannot be read."""
    _check_fields(FIELD, described, {"format": (_INT_FORMAT,)} | _WHOLE)
    groups = described.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ConfigError(f"{FIELD}.config_groups={groups!r}; known: a table of groups with targets and weights")
    return tuple(_int_group(f"{FIELD}.config_groups.{name}", group) for name, group in groups.items())


def _int_group(where: str, group: Any) -> IntGroups:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise ConfigError(f"{where} has no table of weights; known: groups whose weights are whole numbers")
    _check_fields(where, group, {"format": (None, _INT_FORMAT), "input_activations": (None,)})
    strategy = weights.get("strategy") or ("channel" if weights.get("group_size") == -1 else "group")
    stated: dict[str, Any] = {"type": "int", "num_bits": 8, "symmetric": True, "dynamic": False} | weights
    stated["strategy"] = strategy
    _check_fields(f"{where}.weights", stated, _OF_WEIGHTS)
    size, targets = weights.get("group_size"), group.get("targets")
    if strategy == "group" and not (isinstance(size, int) and size > 0):
        raise ConfigError(f"{where}.weights.group_size={size!r}; known: numbers of inputs, as 32 or 128")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ConfigError(f"{where}.targets={targets!r}; known: a list of names, as ['Linear']")
    return IntGroups(stated["num_bits"], size if strategy == "group" else None, tuple(targets))


def _check_fields(where: str, described: dict[str, Any], known: dict[str, tuple[Any, ...]]) -> None:
    for field, values in known.items():
        if described.get(field) not in values:
            listed = ", ".join(map(repr, values))
            raise ConfigError(f"{where}.{field}={described.get(field)!r}; known: {listed}")


def groups_of(module: str, groups: tuple[IntGroups, ...]) -> IntGroups:
    """The group of a module: the first that names it, else that matches it, else that is for its class.

    Raises ConfigError where there is none.
    """
    if len(groups) == 1:  # names may be those of another program's modules
        return groups[0]
    tests = (
        lambda target: target == module,
        lambda target: target.startswith("re:") and re.match(target[3:], module) is not None,
        lambda target: target == "Linear",
    )
    for test in tests:
        for group in groups:
            if any(map(test, group.targets)):
                return group
    known = ", ".join(target for group in groups for target in group.targets)
    raise ConfigError(f"{FIELD}.config_groups has none for {module}, which is packed; known: {known}")


def describe_ints(groups: tuple[IntGroups, ...], kept: list[str]) -> dict[str, Any]:
    """The fields of a config.json for whole numbers in groups. kept: modules whose weights stay as they are."""
    tables = {
        f"group_{number}": {
            "targets": list(group.targets),
            "weights": {
                "num_bits": group.bits,
                "type": "int",
                "symmetric": True,
                "strategy": "channel" if group.group is None else "group",
                "group_size": group.group,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": _INT_FORMAT,
        }
        for number, group in enumerate(groups)
    }
    return {
        FIELD: {
            "quant_method": "compressed-tensors",
            "format": _INT_FORMAT,
            "quantization_status": "compressed",
            "kv_cache_scheme": None,
            "ignore": kept,
            "config_groups": tables,
        }
    }


def describe_uneven(kept: list[str]) -> dict[str, Any]:
    """The fields of a config.json for uneven values. kept: modules whose weights stay as they are."""
    return {FIELD: {"quant_method": "moesaic-uneven4", "ignore": kept}}


def describe(format_: Format, style: PackedAs, kept: list[str]) -> dict[str, Any]:
    """The fields of a config.json for packed weights. kept: names of the modules whose weights stay as they are."""
    if format_ == "mxfp4" and style == "scale_inv":
        return {FIELD: {"quant_method": "mxfp4", "modules_to_not_convert": kept}}
    own: dict[str, Any] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        "modules_to_not_convert": kept,
    }
    if style == "scale_inv":
        return {FIELD: own}
    return {FIELD: own | {"scale_fmt": "ue8m0"}, EXPERTS: "fp4" if format_ == "mxfp4" else "fp8"}
