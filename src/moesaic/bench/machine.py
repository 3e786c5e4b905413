"""What this machine can do: bytes that it reads and operations that it computes in a second, and its instructions."""

import os
import platform
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from moesaic import _native
from moesaic.bench.bound import Number
from moesaic.engine.memory import available_bytes
from moesaic.hub.memory import empty

PEAK_SIZE, _TRIED_SIZE = 2048, 256
_PEAK_ROUNDS = 5
_PEAK_SECONDS = 0.2
"""Of one product: a machine without instructions for a number takes torch's plain loops, 200 times as slow."""
_LEAST_PROBE_BYTES = 2**30
_TELLING_BYTES = 2**28
"""In readings of fewer a thread sleeps for much of the time, whoever else runs: till it wakes up, and at the end."""
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
    here. Where products of wider numbers are quicker, these stand in for them, as in any good kernel.
    """

    processor: str
    threads: int
    isa: str
    missing: list[str]
    peaks: dict[Number, float | None]


class ReadProbe:
    """Memory that no cache holds, and threads that read it as the engine's read weights."""

    def __init__(self, threads: int, num_bytes: int | None = None) -> None:
        memory = empty((num_bytes or _probe_bytes(),), torch.uint8, "cpu")
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


class WatchedProbe:
    """A probe that notes how evenly memory gave, and what of the processors its threads got: whether others run."""

    def __init__(self, threads: int, num_bytes: int | None = None) -> None:
        self.probe = ReadProbe(threads, num_bytes)
        self._threads = threads
        self._rates: dict[int, list[float]] = {}
        self._wall = self._own = 0.0

    def bandwidth(self, num_bytes: int | None = None) -> float:
        """As ReadProbe has it."""
        wall, own = time.perf_counter(), time.process_time()
        rate = self.probe.bandwidth(num_bytes)
        if (num_bytes or self.probe.num_bytes) >= _TELLING_BYTES:
            self._wall += time.perf_counter() - wall
            self._own += time.process_time() - own
        self._rates.setdefault(num_bytes or self.probe.num_bytes, []).append(rate)
        return rate

    @property
    def share(self) -> float:
        """Of the processors' time that its threads got while they read, 0 to 1."""
        return min(1.0, self._own / (self._wall * self._threads)) if self._wall else 1.0

    @property
    def spread(self) -> float:
        """The ninth tenth of readings over the first, of the size that was read most often; 1 is even."""
        rates = sorted(max(self._rates.values(), key=len, default=[1.0]))
        tenth = len(rates) // 10
        return rates[-1 - tenth] / rates[tenth]


def measure_machine(threads: int) -> Machine:
    """The machine as far as it does not change from second to second."""
    isas = _native.available_isas()
    better = list(_EXTENSIONS)[list(_EXTENSIONS).index(_native.isa()) + 1 :] if _native.isa() in _EXTENSIONS else []
    if _native.isa() == "portable":
        better = list(_EXTENSIONS) if platform.machine().lower() in ("x86_64", "amd64") else []
    missing = [f"{_EXTENSIONS[isa]}{', which is switched off' * (isa in isas)}" for isa in better]
    with _torch_threads(threads):
        peaks = _with_wider({number: _peak(number) for number in _DTYPES})
    return Machine(_processor(), threads, _native.isa(), missing, peaks)


_DTYPES: dict[Number, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
"""From wide to narrow."""


def _with_wider(peaks: dict[Number, float | None]) -> dict[Number, float | None]:
    """Each at least what wider numbers reach."""
    best, found = 0.0, dict(peaks)
    for number, peak in peaks.items():
        best = max(best, peak or 0.0)
        found[number] = best if peak else None
    return found


def _peak(number: Number) -> float | None:
    """Operations a second of torch's products of square matrices (on CPUs the best that are installed everywhere), in
    the best of a few rounds; None where torch has no such product on this machine."""
    try:
        seconds = min(_seconds_of_products(number, _TRIED_SIZE, rounds=2))
    except RuntimeError:
        return None
    size = _TRIED_SIZE
    while size < PEAK_SIZE and seconds * 8 < _PEAK_SECONDS:
        size, seconds = 2 * size, 8 * seconds
    size = min(size, PEAK_SIZE)
    return 2 * size**3 / min(_seconds_of_products(number, size, _PEAK_ROUNDS))


def _seconds_of_products(number: Number, size: int, rounds: int) -> list[float]:
    square = torch.ones((size, size), dtype=_DTYPES[number])
    multiply = torch._int_mm if number == "int8" else torch.mm  # pyright: ignore[reportPrivateImportUsage]  no public one
    multiply(square, square)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        multiply(square, square)
        times.append(time.perf_counter() - start)
    return times


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
