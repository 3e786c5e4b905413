"""What this machine can do: bytes that it reads and operations that it computes in a second, and its instructions."""

import os
import platform
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic import _native
from moesaic.bench.bound import Number
from moesaic.engine.memory import available_bytes
from moesaic.hub.memory import empty

PEAK_SIZE = 2048
_PEAK_ROUNDS = 5
_LEAST_PROBE_BYTES = 2**30
_CACHES_OF_PROBE = 8  # so that next to nothing of one pass is in the last cache when the next begins

_EXTENSIONS = {
    "avx2": "AVX2",
    "avx512": "AVX-512",
    "avx512_vnni": "VNNI (products of 8-bit numbers)",
    "avx512_bf16": "AVX-512 BF16 (products of bf16)",
    "amx": "AMX (products of tiles)",
}
"""Of x86, each with all before it: our names and the makers'."""


class Machine(NamedTuple):
    """A processor's name, threads in use, instruction set in use, and what better ones moesaic knows that it lacks.

    peaks: operations a second of each kind of number, a multiplication and an addition being two; None: not computed
    here.
    """

    processor: str
    threads: int
    isa: str
    missing: list[str]
    peaks: dict[Number, float | None]


class ReadProbe:
    """Memory that no cache holds, and threads that read it as the engine's read weights."""

    def __init__(self, threads: int) -> None:
        memory = empty((_probe_bytes(),), torch.uint8, "cpu")
        self._memory = memory.fill_(1)  # pages that were never written are all one and the same page
        self._native = _native.ReadProbe(threads)

    @property
    def num_bytes(self) -> int:
        """That a pass reads at most."""
        return self._memory.nbytes

    def bandwidth(self, num_bytes: int | None = None) -> float:
        """Bytes a second, of one pass over all, or over the first so many (a multiple of 64)."""
        memory = self._memory if num_bytes is None else self._memory[:num_bytes]
        return memory.nbytes / self._native.seconds(memory)


def measure_machine(threads: int) -> Machine:
    """The machine as far as it does not change from second to second."""
    isas = _native.available_isas()
    better = list(_EXTENSIONS)[list(_EXTENSIONS).index(_native.isa()) + 1 :] if _native.isa() in _EXTENSIONS else []
    if _native.isa() == "portable":
        better = list(_EXTENSIONS) if platform.machine().lower() in ("x86_64", "amd64") else []
    missing = [f"{_EXTENSIONS[isa]}{', which is switched off' * (isa in isas)}" for isa in better]
    with _torch_threads(threads):
        peaks: dict[Number, float | None] = {number: _peak(multiply) for number, multiply in _products().items()}
    return Machine(_processor(), threads, _native.isa(), missing, peaks)


def _products() -> dict[Number, Callable[[], Tensor]]:
    """Torch's products of square matrices: on CPUs the best that are installed everywhere."""
    square = (PEAK_SIZE, PEAK_SIZE)
    fp32 = torch.ones(square)
    bf16, int8 = fp32.bfloat16(), torch.ones(square, dtype=torch.int8)
    return {
        "fp32": lambda: torch.mm(fp32, fp32),
        "bf16": lambda: torch.mm(bf16, bf16),
        "int8": lambda: torch._int_mm(int8, int8),  # pyright: ignore[reportPrivateImportUsage]  # pyright: ignore[reportPrivateImportUsage]  there is no public one
    }


def _peak(multiply: Callable[[], Tensor]) -> float | None:
    """Operations a second, in the best of a few rounds; None where torch has no such product on this machine."""
    try:
        multiply()
    except RuntimeError:
        return None
    times = []
    for _ in range(_PEAK_ROUNDS):
        start = time.perf_counter()
        multiply()
        times.append(time.perf_counter() - start)
    return 2 * PEAK_SIZE**3 / min(times)


@contextmanager
def _torch_threads(threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _probe_bytes() -> int:
    wanted = max(_LEAST_PROBE_BYTES, _CACHES_OF_PROBE * last_cache_bytes())
    free = available_bytes()
    return (wanted if free is None else min(wanted, free // 4)) // 64 * 64


def last_cache_bytes() -> int:
    """Of the largest cache that the first processor sees; 0 where the system does not say."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        sizes.append(int(text.rstrip("KMG")) * 1024 ** "_KMG".find(text[-1]) if text[-1] in "KMG" else int(text))
    return max(sizes)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine() or os.name
