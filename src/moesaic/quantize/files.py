"""From files to files with weights rounded to whole numbers, in the format that compressed-tensors and vLLM read, or to
sixteen uneven values (hub/uneven_files.py), which moesaic alone reads.

What is rounded: the matrices of attention, MLPs, routed and shared experts, and the head where the files have one of
its own. What stays: embeddings, norms, routers, shared experts' gates, biases, convolutions; and whole indexers and
compressors, which choose what is attended to as routers choose experts, so that a small error is another choice.
MLA's projections are rounded, the second expansion (`kv_b_proj`) too, though layers read it as a tensor: it is unpacked
as it is read. Beside uneven values it stays, as the head does: the engine rounds both to more bits as it opens them.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from moesaic import families
from moesaic.errors import ConfigError
from moesaic.hub.checkpoint import CONFIG, read_json
from moesaic.hub.encodings import Plain
from moesaic.hub.layouts import fused
from moesaic.hub.packed_ints import SCALES
from moesaic.hub.quantization import IntGroups, describe_ints, describe_uneven, groups_of
from moesaic.hub.resolve import weights_place
from moesaic.hub.saving import SavesItself
from moesaic.hub.sources import GgufWeights, SafetensorsFolder, open_source
from moesaic.hub.stored import DTYPES
from moesaic.hub.streaming import Converted, convert
from moesaic.hub.targets import NEVER_PACKED, Target
from moesaic.hub.values import Part
from moesaic.kernels import uneven
from moesaic.kernels.blocks import GROUPS
from moesaic.kernels.rounding import BITS, GROUP, Bits, Values
from moesaic.quantize.encoding import RoundedInts, RoundedUneven, Squares
from moesaic.tensor_spec import Role

KEPT = 16
"""Bits of a head that stays as it is."""
_ROUNDED: tuple[Role, ...] = ("attention", "mlp", "experts", "shared_experts", "head")
_CHOOSERS = (".indexer.", ".compressor.", "relative_attention_bias")
_OF_EIGHT_BITS = ".kv_b_proj.weight"
_EXPERTS = r"re:.*\.experts\.(expert_)?\d+\..*"
_STATED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_LAYER = re.compile(r"(.*?)\blayers\.(\d+)\.")


class RoundedTensor(NamedTuple):
    """What became of one matrix. layer: its stack and number, as "3" or "encoder 3"; expert: None for all others."""

    name: str
    layer: str | None
    role: Role
    expert: int | None
    numel: int
    num_bytes: int
    bits: Bits
    squares: Squares

    @property
    def error(self) -> float:
        """|w - q| over |w|, 2-norms."""
        return self.squares.relative


class QuantizedCheckpoint(NamedTuple):
    """What was written, the bytes that the tensors took before, and every rounded matrix."""

    written: Converted
    num_bytes_before: int
    tensors: list[RoundedTensor]


def quantize_checkpoint(
    path_or_preset: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    bits: Bits,
    *,
    experts_bits: Bits | None = None,
    head_bits: int | None = None,
    group: int = GROUP,
    values: Values = "even",
    tokenizer: SavesItself | None = None,
    max_shard_bytes: int = 2_000_000_000,
    advance: Callable[[int, int], object] = lambda num_bytes, total_bytes: None,
) -> QuantizedCheckpoint:
    """Write a model's files with its matrices rounded to the nearest whole numbers; all else as `hub.convert` does.

    bits: of matrices; experts_bits: of routed experts (`bits` unless given); head_bits: 4, 8 (the usual), or 16 for one
    that stays. group: inputs that share a scale, 32, 64 or 128. values: what four bits stand for; "uneven" takes no
    other bits and groups, and the head stays. advance hears of bytes as they are written, and of all there will
    be. A few megabytes are in memory at a time. What is there is replaced only when the new folder is complete.
    Raises ConfigError for other bits, groups and values, groups that do not divide a matrix's inputs, files that are
    packed already, and families whose files stack experts; CheckpointError for files that are damaged or cannot be
    written.
    """
    head_bits = head_bits or (KEPT if values == "uneven" else 8)
    _check_options(bits, experts_bits or bits, head_bits, group)
    _check_values(values, (bits, experts_bits or bits), head_bits, group)
    source = open_source(weights_place(path_or_preset))
    _check_plain(source)
    packer_of = _UnevenPacker if values == "uneven" else _Packer
    packer = packer_of({"experts": experts_bits or bits, "head": head_bits}, bits, group, source)
    released = families.family(source.config.family).weight_map(source.config)
    written = convert(
        path_or_preset,
        folder,
        layout="per-expert" if source.config.moe_layers and fused(released) else None,
        max_shard_bytes=max_shard_bytes,
        tokenizer=tokenizer,
        packer=packer,
        advance=advance,
    )
    before = sum(header.num_bytes for header in source.tensors.values())
    return QuantizedCheckpoint(written, before, packer.tensors())


class _Packer:
    """Says of every tensor of a conversion whether it is rounded, and how; see the file."""

    def __init__(
        self, of_roles: dict[Role, int], bits: int, group: int, source: SafetensorsFolder | GgufWeights
    ) -> None:
        self._bits: dict[Role, int] = dict.fromkeys(_ROUNDED, bits) | of_roles
        self._group = group
        self._family, self._scales = source.config.family, _dtype_of_scales(source)
        self._rounded: list[tuple[Target, RoundedInts | RoundedUneven]] = []

    def encoding(
        self, name: str, shape: tuple[int, ...], parts: tuple[Part, ...]
    ) -> RoundedInts | RoundedUneven | None:
        """How a tensor of a file is rounded; None where it stays. Stacked experts and odd groups are a ConfigError."""
        role = parts[0].spec.role
        if role == "experts" and len(shape) > 1 and _expert(parts) is None:
            raise ConfigError(
                f"files of {self._family} stack the experts ({name}), and compressed-tensors packs single matrices; "
                "use `--bits` of `moesaic generate`, which packs as it loads"
            )
        if not self._is_rounded(name, shape, parts):
            return None
        inputs = max(shape[1:])  # of a matrix
        if inputs % self._group:
            fitting = [str(group) for group in GROUPS if inputs % group == 0]
            remedy = f"use --group {fitting[-1]}" if fitting else "no group fits, so convert to fp8 or bf16 instead"
            raise ConfigError(f"groups of {self._group} do not divide the {inputs} inputs of {name}; {remedy}")
        encoding = self._new_encoding(role)
        self._rounded.append((Target(name, shape, parts, encoding), encoding))
        return encoding

    def _new_encoding(self, role: Role) -> RoundedInts | RoundedUneven:
        bits: Any = self._bits[role]
        return RoundedInts(bits, self._group, self._scales)

    def _is_rounded(self, name: str, shape: tuple[int, ...], parts: tuple[Part, ...]) -> bool:
        spec = parts[0].spec
        is_matrix = len(shape) == 2 and min(shape) > 1 and name.endswith(".weight")
        is_kept = name.endswith(NEVER_PACKED) or any(word in name for word in _CHOOSERS) or spec.dtype is not None
        is_table = any(part.spec.role == "embedding" for part in parts)
        return is_matrix and not is_kept and not is_table and self._bits.get(spec.role, KEPT) != KEPT

    def describe(self, targets: list[Target]) -> dict[str, Any]:
        """The groups: that of most modules, and those of experts and head where these have other bits.

        In this order transformers 5.23, which takes one group for experts and one for all else, takes the right ones.
        """
        names: dict[Role, set[str]] = defaultdict(set)
        for target, _ in self._rounded:
            names[target.parts[0].spec.role].add(target.name.removesuffix(".weight"))
        by_role: dict[Role, list[str]] = {"experts": [_EXPERTS], "mlp": ["Linear"], "head": sorted(names["head"])}
        groups = tuple(
            IntGroups(self._bits[role], self._group, tuple(its_targets))
            for role, its_targets in by_role.items()
            if role == "mlp" or (names[role] and self._bits[role] != self._bits["mlp"])
        )
        for target, encoding in self._rounded:
            assert groups_of(target.name.removesuffix(".weight"), groups).bits == encoding.bits, target.name
        return describe_ints(groups, _kept(targets))

    def tensors(self) -> list[RoundedTensor]:
        """Every rounded matrix, once it is written."""
        return [_told(target, encoding) for target, encoding in self._rounded]


class _UnevenPacker(_Packer):
    """The same for uneven values."""

    def _new_encoding(self, role: Role) -> RoundedUneven:
        return RoundedUneven()

    def _is_rounded(self, name: str, shape: tuple[int, ...], parts: tuple[Part, ...]) -> bool:
        return not name.endswith(_OF_EIGHT_BITS) and super()._is_rounded(name, shape, parts)

    def describe(self, targets: list[Target]) -> dict[str, Any]:
        return describe_uneven(_kept(targets))


def _kept(targets: list[Target]) -> list[str]:
    """Modules whose matrices stay as they are."""
    return [
        target.name.removesuffix(".weight")
        for target in targets
        if isinstance(target.encoding, Plain) and len(target.shape) == 2 and target.name.endswith(".weight")
    ]


def _told(target: Target, encoding: RoundedInts | RoundedUneven) -> RoundedTensor:
    spec = target.parts[0].spec
    found = _LAYER.search(spec.name)
    layer = f"{found[1].replace('.', ' ').strip()} {found[2]}".strip() if found else None
    expert = _expert(target.parts) if spec.role == "experts" else None
    numel = target.shape[0] * target.shape[1]
    return RoundedTensor(
        target.name, layer, spec.role, expert, numel, target.num_bytes, encoding.bits, encoding.squares
    )


def _expert(parts: tuple[Part, ...]) -> int | None:
    """The one expert that a tensor of a file belongs to; None where it holds several."""
    firsts = [part.piece.index[0] if part.piece.index else None for part in parts]
    return firsts[0] if isinstance(firsts[0], int) and all(first == firsts[0] for first in firsts) else None


def _dtype_of_scales(source: SafetensorsFolder | GgufWeights) -> torch.dtype:
    """That of the model: transformers computes in the type of the scales, and other types cannot meet it there."""
    if isinstance(source, GgufWeights):
        return torch.float32  # in which the other tensors are written
    described = read_json(source.where / CONFIG)
    stated = str(described.get("dtype") or described.get("torch_dtype"))
    kinds = Counter(header.dtype for header in source.tensors.values() if header.dtype in SCALES)
    return DTYPES[_STATED.get(stated) or kinds.most_common(1)[0][0]]


def _check_options(bits: int, experts_bits: int, head_bits: int, group: int) -> None:
    for value, known in ((bits, BITS), (experts_bits, BITS), (head_bits, (*BITS, KEPT))):
        if value not in known:
            raise ConfigError(f"{value} bits; known: {', '.join(map(str, known))}")
    if group not in GROUPS:
        raise ConfigError(f"group {group}; known: {', '.join(map(str, GROUPS))}")


def _check_values(values: str, bits: tuple[int, ...], head_bits: int, group: int) -> None:
    if values not in get_args(Values):
        raise ConfigError(f"values={values!r}; known: {', '.join(get_args(Values))}")
    if values == "even":
        return
    if set(bits) != {4}:
        raise ConfigError(
            f"uneven values in {max(bits)} bits; they are what four bits stand for: use 4, or even values"
        )
    if head_bits != KEPT or group != uneven.BLOCK:
        raise ConfigError(
            f"uneven values with a head of {head_bits} bits and groups of {group}; the head stays (16), and 32 weights "
            "share a word of scales: leave both options out"
        )


def _check_plain(source: SafetensorsFolder | GgufWeights) -> None:
    """Raise ConfigError for weights that are packed already."""
    if isinstance(source, SafetensorsFolder) and source.quantization:
        raise ConfigError(
            f"the weights in {source.where} are packed already ({source.quantization.method}), and rounding twice adds "
            f"up; start from the original, or first run `moesaic convert {source.where} OUT_FOLDER --dtype bf16`"
        )


def default_folder(path_or_preset: str, bits: int) -> Path:
    """Where a model goes unless told: `NAME-4bit` in the current folder."""
    return Path(f"{weights_place(path_or_preset).path.resolve().name.removesuffix('.gguf')}-{bits}bit")
