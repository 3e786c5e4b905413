"""Weights in: the model is built on the meta device, then its tensors are filled piece by piece, several at a time."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.errors import CheckpointError
from moesaic.hub import checkpoint
from moesaic.hub.memory import empty
from moesaic.hub.parts import boxes, slices, within
from moesaic.hub.resolve import weights_place
from moesaic.hub.sources import WeightSource, open_source
from moesaic.hub.stored import DTYPES, known_dtype
from moesaic.hub.tables import check_table
from moesaic.models.build import build
from moesaic.models.decoder import Decoder
from moesaic.models.encoder_decoder import EncoderDecoder
from moesaic.models.init import hash_routers
from moesaic.models.weight_map import Index, Piece, WeightMap
from moesaic.tensor_spec import TensorSpec

_INTEGERS = {"I64": torch.int64, "I32": torch.int32}
# What one thread reads at a time: large enough for the disk, small enough that what a conversion holds beside the
# model (a part in another number format, or to be transposed) does not count.
PART_ELEMENTS = 16 * 2**20
# Reading is copying within memory once the disk has been read ahead; beyond four threads nothing was gained.
NUM_THREADS = min(4, os.cpu_count() or 1)


def load(
    path_or_preset: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    allow_extra: bool = False,
) -> Decoder | EncoderDecoder:
    """A model from a folder (config.json and safetensors), a .gguf file, or a preset that brings its weights.

    It is in evaluation mode. dtype: None keeps every tensor's own (fp32 from GGUF; FP8 and MXFP4 unpack to the dtype
    that the configuration states, else to bf16). What has a dtype of its own in the description (`TensorSpec.dtype`)
    keeps it whatever is asked: fp32 selection biases, hash tables of integers, ERNIE's fp32 routers. allow_extra: leave
    out tensors that the configuration does not describe, instead of refusing them.
    Values are not looked at: that would take half as long again as reading them (`moesaic convert --check` does).
    Raises CheckpointError for files that are missing, damaged or at odds with their configuration, ConfigError for a
    model that cannot be expressed, MissingDependencyError for a preset whose package is not installed.
    """
    source = open_source(weights_place(path_or_preset))
    weight_map = source.weight_map()
    checkpoint.check_tensors(source.config, weight_map, source.tensors, source.where, allow_extra=allow_extra)
    state: dict[str, Tensor] = {}
    jobs: list[_Part] = []
    for spec in source.config.tensors():
        pieces = weight_map[spec.name]
        state[spec.name] = empty(spec.shape, _dtype(spec, pieces, source, dtype), device)
        originals = (piece for piece in pieces if not piece.is_copy)
        jobs += [part for piece in originals for part in _parts(state[spec.name], piece, source)]
    _read_all(source, jobs)
    _check_copies(source, weight_map, state)
    for name, router in hash_routers(source.config).items():
        check_table(state[name], router, f"{weight_map[name][0].name} in {source.where}")
    model = build(source.config, device="meta")
    model.load_state_dict(state, assign=True)
    return model.eval()  # routers may draw noise, and experts have limits, while training


class _Part(NamedTuple):
    """A view of one of our tensors, and what of a file's tensor fills it."""

    out: Tensor
    name: str
    file_index: Index


def _read_all(source: WeightSource, parts: list[_Part]) -> None:
    """Fill every part. The first error ends it, and so does Ctrl-C."""
    threads = ThreadPoolExecutor(NUM_THREADS if source.is_sliced else 1)
    try:
        for running in [threads.submit(source.read_into, *part) for part in parts]:
            running.result()
    finally:
        threads.shutdown(cancel_futures=True)


def _check_copies(source: WeightSource, weight_map: WeightMap, state: dict[str, Tensor]) -> None:
    """Raise CheckpointError for a tensor that files repeat and that is not the same there."""
    for name, pieces in weight_map.items():
        for part in (part for piece in pieces if piece.is_copy for part in _parts(state[name], piece, source)):
            copy = torch.empty_like(part.out)
            source.read_into(copy, part.name, part.file_index)
            if not torch.equal(copy, part.out):
                original = next(piece.name for piece in pieces if not piece.is_copy)
                raise CheckpointError(
                    f"{part.name} in {source.where} differs from {original}, of which it should be a copy; "
                    "make them equal or remove it"
                )


def _parts(tensor: Tensor, piece: Piece, source: WeightSource) -> Iterator[_Part]:
    """A piece, cut up where parts of it can be read for themselves."""
    out = tensor[piece.index]
    out = out.mT if piece.transposed else out
    stored_shape = source.tensors[piece.name].shape
    for box in boxes(out.shape, PART_ELEMENTS if source.is_sliced else out.numel()):
        yield _Part(out[slices(box)], piece.name, within(stored_shape, piece.file_index, box))


def _dtype(
    spec: TensorSpec, pieces: tuple[Piece, ...], source: WeightSource, wanted: torch.dtype | None
) -> torch.dtype:
    """The dtype that our tensor gets: its own where it never takes the model's, else as wanted, else as stored."""
    known = _INTEGERS if spec.dtype == "int32" else DTYPES
    kinds = {known_dtype(piece.name, source.tensors[piece.name], known) for piece in pieces}
    if spec.dtype == "float32":
        return torch.float32
    if spec.dtype == "int32":  # or wider, where files have it so: what is saved again is then the same bits
        return kinds.pop()
    # Experts of one layer in different precisions: the widest holds them all.
    return wanted or max(kinds, key=lambda kind: (kind.itemsize, kind == torch.bfloat16))
