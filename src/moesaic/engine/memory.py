"""Whether a packed model fits into memory, said before it is read."""

import ctypes
import os
from collections.abc import Callable
from itertools import chain

from moesaic.config import ModelConfig
from moesaic.engine.packing import Precision
from moesaic.errors import ConfigError
from moesaic.hub.codes import BITS, CodedTensor
from moesaic.kernels.rounding import GROUP, Bits
from moesaic.tensor_spec import Role, TensorSpec

CodedOf = Callable[[str], CodedTensor | None]
"""See engine.weights.Weights."""


def packed_bytes(
    config: ModelConfig,
    precision: Precision,
    bytes_per_parameter: float,
    coded_of: CodedOf = lambda _: None,
    *,
    mtp: bool = False,
) -> int:
    """What a model's tensors will take, scales included. bytes_per_parameter: of what is not rounded.

    mtp: with the layers that predict further tokens.
    """

    def each(bits: Bits | None) -> float:
        return bytes_per_parameter if bits is None else bits / 8 + 2 / GROUP

    def of(spec: TensorSpec) -> float:
        if spec.role == "embedding":
            return bytes_per_parameter
        if len(spec.shape) == 1:
            return 4.0
        by_role: dict[Role, Bits | None] = {"experts": precision.of_experts, "head": precision.of_head}
        bits = by_role.get(spec.role, precision.bits)
        coded = coded_of(spec.name)
        is_kept = coded is not None and precision.keeps_codes(bits, coded.format)
        return BITS[coded.format] / 8 if coded and is_kept else each(bits)

    parameters = chain(config.parameters(), config.mtp_parameters() if mtp else ())
    total = sum(spec.numel * of(spec) for spec in parameters)
    if config.tie_word_embeddings:
        total += config.vocab_size * config.hidden_size * each(precision.of_head)
    return round(total)


def require_memory(
    config: ModelConfig,
    precision: Precision,
    bytes_per_parameter: float,
    coded_of: CodedOf = lambda _: None,
    *,
    mtp: bool = False,
) -> None:
    """Raise ConfigError where the packed weights are more than there is memory now."""
    needed = packed_bytes(config, precision, bytes_per_parameter, coded_of, mtp=mtp)
    available = available_bytes()
    if available is not None and needed > available:
        advice = "use fewer bits (8 or 4)" if precision.bits != 4 else "use a smaller model"
        raise ConfigError(
            f"the weights take {needed / 1e9:,.1f} GB packed, and {available / 1e9:,.1f} GB of memory are free; "
            f"{advice}, or end other programs"
        )


def give_back_freed() -> None:
    """Give memory that was freed back to the system: glibc keeps what lies between parts that are still in use, which
    after packing a model is up to a fifth of it. Nothing happens with other libraries."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def available_bytes() -> int | None:
    """Memory that a program can have without others being swapped out; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = {name: value for name, _, value in (line.partition(":") for line in lines)}
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
