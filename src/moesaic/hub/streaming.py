"""From files to files: another layout, number format or shard size, a few megabytes in memory at a time.

Headers are read and written first; then every tensor of the new files is made box by box, each box from wherever its
values lie in the old ones.
"""

import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moesaic import families
from moesaic.errors import CheckpointError
from moesaic.hub import checkpoint
from moesaic.hub.encodings import Plain
from moesaic.hub.layouts import Layout
from moesaic.hub.parts import Box, box_shape, slices
from moesaic.hub.quantization import EXPERTS, FIELD, Format, describe
from moesaic.hub.resolve import weights_place
from moesaic.hub.safetensors_header import ITEM_BYTES, header_bytes
from moesaic.hub.saving import SavesItself, generation_fields, in_shards, is_weight_file, shard_names, write_json
from moesaic.hub.sources import GgufWeights, SafetensorsFolder, open_source
from moesaic.hub.staging import replaced_folder
from moesaic.hub.tables import check_table
from moesaic.hub.targets import PLAIN, Packer, Plan, Target
from moesaic.hub.values import Values, fill
from moesaic.models.init import hash_routers

BOX_ELEMENTS = 4 * 2**20  # 16 MB in fp32, of which packing needs a handful
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".npz", ".index.json")


class Converted(NamedTuple):
    """What was written: bytes and number of tensors, files of weights, files copied, and tensors left out."""

    num_bytes: int
    num_tensors: int
    weight_files: list[str]
    kept_files: list[str]
    left_out: list[str]


def convert(
    path_or_preset: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    dtype: Format | None = None,
    layout: Layout | None = None,
    max_shard_bytes: int = 2_000_000_000,
    tokenizer: SavesItself | None = None,
    allow_extra: bool = False,
    check: bool = False,
    packer: Packer | None = None,
    advance: Callable[[int, int], object] = lambda num_bytes, total_bytes: None,
) -> Converted:
    """Write the model of a folder or .gguf file as a folder of safetensors; all else in its folder is copied.

    dtype: None keeps every tensor as it is, packed ones too. fp8 packs the matrices of attention, MLPs and experts
    (hub/fp8.py), mxfp4 stacked experts (hub/mxfp4.py), or DeepSeek-V4's (hub/fp4.py) and its other matrices as fp8;
    all else stays as it is. layout: None keeps that of the files.
    packer: packs some tensors in a way of its own (quantize/files.py).
    check: refuse NaN and infinities; formats that could make some are always checked. allow_extra: as for `load`.
    advance hears of bytes as they are written, and of all there will be. A folder that is already there is replaced
    only when the new one is complete. Raises CheckpointError for files that are damaged or cannot be written,
    ConfigError for what a family's files cannot hold.
    """
    source = open_source(weights_place(path_or_preset))
    if isinstance(source, SafetensorsFolder) and source.quantization and source.quantization.format == dtype:
        dtype = None  # packed once is enough
    plan = Plan(source, dtype, layout, allow_extra=allow_extra, packer=packer)
    total_bytes = sum(target.num_bytes for target in plan.targets)
    shards = in_shards(plan.targets, max_shard_bytes)
    files = dict(zip(shard_names(len(shards)), shards, strict=True))
    index = {name: file for file, shard in files.items() for target in shard for name in target.stored}
    writer = _Writer(plan, check, lambda num_bytes: advance(num_bytes, total_bytes))
    with replaced_folder(Path(folder), is_weight_file) as new:
        kept = copy_others(source, new)
        _write_config(plan, new)
        if tokenizer is not None:
            tokenizer.save(new)
        for file, shard in files.items():
            writer.write(new / file, shard)
        if len(files) > 1:
            write_json(new / checkpoint.INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": index})
    return Converted(total_bytes, len(index), list(files), kept, plan.left_out)


class _Writer:
    """Writes files of tensors, a box at a time."""

    def __init__(self, plan: Plan, check: bool, advance: Callable[[int], object]) -> None:
        self._source, self._check, self._advance = plan.source, check, advance
        self._values = Values(plan.source, plan.as_stored)
        self._tables = hash_routers(plan.source.config)

    def write(self, path: Path, targets: list[Target]) -> None:
        """One file. Wide types come first, so that every tensor starts on a multiple of its item size."""
        named = [item for target in targets for item in target.stored.items()]
        stored = dict(sorted(named, key=lambda item: -ITEM_BYTES[item[1][0]]))
        header = header_bytes(stored)
        offsets: dict[str, int] = {}
        end = len(header)
        for name, (dtype, shape) in stored.items():
            offsets[name] = end
            end += ITEM_BYTES[dtype] * math.prod(shape)
        with path.open("wb", buffering=0) as file:
            file.write(header)
            for target in targets:
                for box in target.encoding.boxes(target.shape, BOX_ELEMENTS):
                    for part in target.encoding.encode(target.name, target.shape, box, self._box(target, box)):
                        values = part.values.contiguous().reshape(-1)
                        file.seek(offsets[part.name] + part.start * values.element_size())
                        _write_all(file, values)
                        self._advance(values.nbytes)

    def _box(self, target: Target, box: Box) -> Tensor:
        if not target.parts:
            assert isinstance(self._source, SafetensorsFolder)
            return self._source.stored.read(target.name, slices(box))
        values = torch.empty(box_shape(box), dtype=target.encoding.dtype)
        for part in target.parts:
            fill(values, box, target.shape, part, self._values)
            if router := self._tables.get(part.spec.name):
                check_table(values, router, f"{target.name} in {self._source.where}", first_token=box[0][0])
        is_plain = isinstance(target.encoding, Plain) and values.dtype != torch.float16
        if values.is_floating_point() and (self._check or not is_plain):
            _check_finite(target.name, values)
        return values


def _write_all(file: Any, values: Tensor) -> None:
    """An unbuffered file may take less than it is given."""
    rest = values.view(torch.uint8).numpy().data
    while rest:
        rest = rest[file.write(rest) :]


def _check_finite(name: str, values: Tensor) -> None:
    """Raise CheckpointError for NaN or infinite values. Least and largest tell, and faster than isfinite."""
    if values.numel() and not all(end.isfinite() for end in torch.aminmax(values)):
        is_fp16 = values.dtype == torch.float16
        beyond = ", or some beyond ±65504, which fp16 cannot hold" if is_fp16 else ""
        remedy = "choose another number format" if is_fp16 else "copy the weights again"
        raise CheckpointError(f"{name} has NaN or infinite values{beyond}; mend it or {remedy}")


def _write_config(plan: Plan, new: Path) -> None:
    """The config.json as it was, but for number formats; made anew where there was none, or one of more than text."""
    source, dtype = plan.source, plan.dtype
    if isinstance(source, GgufWeights):
        described = families.to_hf(source.config)
        write_json(new / checkpoint.GENERATION, generation_fields(source.config, described))
        dtype = dtype or "fp32"
    elif source.is_whole:
        described = checkpoint.read_json(source.where / checkpoint.CONFIG)
    else:
        described = families.to_hf(source.config)
    if dtype is not None:
        described.pop(FIELD, None)
        described.pop(EXPERTS, None)
    if dtype in PLAIN:
        spelled = str(PLAIN[dtype]).removeprefix("torch.")
        # transformers 5 reads `dtype`, other readers `torch_dtype`.
        described |= {"dtype": spelled, "torch_dtype": spelled}
    if dtype == "fp8" or dtype == "mxfp4":
        described |= describe(dtype, plan.style, _kept_modules(plan.targets))
    if plan.packer:
        described |= plan.packer.describe(plan.targets)
    write_json(new / checkpoint.CONFIG, described)


def _kept_modules(targets: list[Target]) -> list[str]:
    """Modules whose matrices stay unpacked, with `*` for the layer, as readers expect them."""
    kept = [
        re.sub(r"\.\d+\.", ".*.", target.name.removesuffix(".weight"))
        for target in targets
        if len(target.shape) == 2 and target.name.endswith(".weight") and isinstance(target.encoding, Plain)
    ]
    return list(dict.fromkeys(kept))


def copy_others(source: SafetensorsFolder | GgufWeights, folder: Path, *, apart: tuple[str, ...] = ()) -> list[str]:
    """Tokenizer, chat template, licence, notices, README: every plain file without weights, `apart` from these names.

    A GGUF file has its licence in its header, which becomes that of a README.
    """
    if isinstance(source, GgufWeights):
        licence = source.file.metadata.get("general.license")
        if not licence:
            return []
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n", encoding="utf-8")
        return ["README.md"]
    kept: list[str] = []
    for path in sorted(source.where.iterdir()):
        is_other = path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHTS)
        if is_other and path.name not in apart:
            shutil.copy2(path, folder / path.name)
            kept.append(path.name)
    return kept
