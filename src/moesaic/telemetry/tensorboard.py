"""Writes scalars as TensorBoard event files. The format is small and frozen, so no package is needed to write it.

The `tensorboard` package would bring a web server and gRPC to every machine that trains; here only the one that looks
needs it. A file is a TFRecord: length (uint64), masked CRC-32C of it, data, masked CRC-32C of the data, little-endian;
the data are `Event` messages (tensorflow/core/util/event.proto), of which these fields are written.
"""

import math
import os
import struct
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import RunFolderError
from moesaic.telemetry.health import LayerHealth, RouterHealth
from moesaic.telemetry.load import StepLoad
from moesaic.telemetry.raw_file import write_whole

_VERSION = b"brain.Event:2"
_SESSION_START = 1


def line_scalars(line: Mapping[str, Any], load: StepLoad | None = None) -> dict[str, float]:
    """The scalars of a line of metrics.jsonl: its numbers, held-out losses per domain, and the routing's evenness.

    load: what the line has under that name, where it is at hand; else it is read from there.
    """
    scalars = {name: float(value) for name, value in line.items() if name != "step" and isinstance(value, int | float)}
    for table, values in line.items():
        if table.endswith("held_out_by_domain"):
            scalars |= {f"{table}/{domain}": value for domain, value in values.items()}
    if load is None and "load" in line:
        load = StepLoad.from_json(line["load"])
    if load is not None:
        scalars |= load_scalars(load)
    return scalars


def load_scalars(load: StepLoad) -> dict[str, float]:
    """A step's routing as scalars: evenness over all layers, and of each layer (see `telemetry.health`)."""
    if not load.layers:
        return {}
    health = RouterHealth.of(load)
    scalars = {
        "router/max_violation": health.max_violation,
        "router/load_entropy": health.load_entropy,
        "router/router_entropy": health.router_entropy,
    }
    if load.dropped_share:
        scalars["router/dropped_share"] = load.dropped_share
    for layer in health.layers:
        scalars |= {f"router/layer {layer.layer}/{name}": value for name, value in _layer_scalars(layer)}
    return scalars


def _layer_scalars(layer: LayerHealth) -> Iterator[tuple[str, float]]:
    yield "max_violation", layer.max_violation
    yield "load_entropy", layer.load_entropy
    yield "router_entropy", layer.router_entropy
    yield "effective_experts", layer.effective_experts
    yield "coefficient_of_variation", layer.coefficient_of_variation
    if not math.isnan(layer.average_entropy):
        yield "average_entropy", layer.average_entropy
    if layer.dropped_share:
        yield "dropped_share", layer.dropped_share
    if layer.logits is not None:
        for name in ("rms", "peak", "margin", "flips_bf16", "flips_noise"):
            yield f"logit_{name}", getattr(layer.logits, name)
    if layer.dead is not None:  # too few rows to tell
        yield "dead_experts", float(len(layer.dead))


class EventFile:
    """One event file in `folder`, made with the first scalars; `first_step` is the first step it will hold.

    A resumed run starts another file: its start makes TensorBoard forget what older files say of later steps.
    Raises RunFolderError where it cannot be written.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self.folder, self.first_step = folder, first_step
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        if self._file:
            self._file.close()

    def add(self, step: int, scalars: Mapping[str, float], wall_time_s: float | None = None) -> None:
        """Write scalars of a step; `wall_time_s` is seconds since the epoch (None: now)."""
        try:
            file = self._file or self._open()
            summary = b"".join(_head(tag) + struct.pack("<f", value) for tag, value in scalars.items())
            write_whole(file, _record(_event(step, wall_time_s) + _message(5, summary)))
        except OSError as error:
            raise RunFolderError(
                f"cannot write to {self.folder}: {error.strerror}; free space, or leave out --tensorboard"
            ) from error

    def _open(self) -> BinaryIO:
        self.folder.mkdir(parents=True, exist_ok=True)
        # Readers take the files of a folder in the order of their names.
        path = self.folder / f"events.out.tfevents.{time.time_ns():020d}.{os.getpid()}"
        self._file = path.open("xb", buffering=0)
        write_whole(self._file, _record(_event(0, None) + _message(3, _VERSION)))
        session = _message(7, _number(1, _SESSION_START))
        write_whole(self._file, _record(_event(self.first_step, None) + session))
        return self._file


def _event(step: int, wall_time_s: float | None) -> bytes:
    seconds = time.time() if wall_time_s is None else wall_time_s
    return b"\x09" + struct.pack("<d", seconds) + _number(2, step)


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + _masked_crc(length) + data + _masked_crc(data)


def _message(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())


@lru_cache(maxsize=1 << 14)
def _head(tag: str) -> bytes:
    """A scalar as a summary has it, but for the four bytes of its value, which end it."""
    parts = _text(1, tag) + _varint(2 << 3 | 5)
    return _varint(1 << 3 | 2) + _varint(len(parts) + 4) + parts


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    """Protocol Buffers' whole numbers: seven bits a byte, the lowest first, the top bit set on all but the last."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _masked_crc(data: bytes) -> bytes:
    crc = _crc(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _crc(data: bytes) -> int:
    """CRC-32C of at least four bytes. It is linear: what each bit leaves behind is added up, without carry."""
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    bits[:32] ^= 1  # the register starts full of ones
    remainders = _remainders(1 << len(data).bit_length())[-len(bits) :]
    return int(np.bitwise_xor.reduce(remainders * bits)) ^ 0xFFFFFFFF


@lru_cache(maxsize=8)
def _remainders(num_bytes: int) -> NDArray[np.uint32]:
    """What each bit of a message leaves in the register, [8 * num_bytes]."""
    after_byte = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        after_byte = after_byte >> 1 ^ (after_byte & 1) * np.uint32(0x82F63B78)  # Castagnoli's polynomial, reflected
    found = np.empty((num_bytes, 8), np.uint32)
    found[-1] = after_byte[1 << np.arange(8)]
    for place in range(num_bytes - 1, 0, -1):
        found[place - 1] = after_byte[found[place] & 0xFF] ^ (found[place] >> 8)
    return found.reshape(-1)
