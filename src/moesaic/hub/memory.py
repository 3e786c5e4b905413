"""Memory for weights that is quick to fill."""

import ctypes
import sys
from typing import Any

import torch
from torch import Tensor

_HUGE_BYTES = 2**21
_MADV_HUGEPAGE = 14


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> Tensor:
    """`torch.empty`; large tensors ask Linux for huge pages, whose first touch costs half as much as reading them."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if sys.platform == "linux" and tensor.device.type == "cpu" and tensor.nbytes >= 2 * _HUGE_BYTES:
        start = -(-tensor.data_ptr() // _HUGE_BYTES) * _HUGE_BYTES
        length = (tensor.data_ptr() + tensor.nbytes - start) // _HUGE_BYTES * _HUGE_BYTES
        # Advice: a kernel without huge pages says no, and nothing else changes.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    return tensor
