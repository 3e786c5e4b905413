"""What llama.cpp's formats make of a matrix: rounded by its own library, then read back by the package gguf.

Needs `pip install gguf` and a libggml-base (libggml-base.so, .dylib or ggml-base.dll) from a build of llama.cpp.
"""

import ctypes
from pathlib import Path

import gguf
import torch

from moesaic.errors import ConfigError

BLOCK = 256
"""Weights that every format here can take by themselves: one super-block of the K formats, eight blocks of others."""


class Ggml:
    """The library. Raises ConfigError where the file is none."""

    def __init__(self, library: Path) -> None:
        try:
            self._quantize = ctypes.CDLL(str(library.resolve())).ggml_quantize_chunk
        except (OSError, AttributeError) as error:
            raise ConfigError(f"{library} is no libggml-base ({error}); give the one of a build of llama.cpp") from None
        sizes = [ctypes.c_int64] * 3
        self._quantize.restype = ctypes.c_size_t
        self._quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *sizes, ctypes.c_void_p]

    def rounded(self, weight: torch.Tensor, format: str) -> torch.Tensor:
        """Weights as fp32 numbers that the format ("Q4_0", "Q4_K", "Q8_0") holds.

        Nothing is told about activations, as in `llama-quantize` without an importance matrix. Then each block is
        rounded by itself, so the weights are handed over as rows of one block; a matrix whose own rows are no multiple
        of 256 (which llama.cpp would give another format) has blocks that run on over the ends of its rows.
        """
        kind = gguf.GGMLQuantizationType[format]
        blocks = weight.detach().float().reshape(-1, BLOCK).contiguous()
        out = torch.empty(len(blocks), round(BLOCK * bits_per_weight(format)) // 8, dtype=torch.uint8)
        written = self._quantize(int(kind), blocks.data_ptr(), out.data_ptr(), 0, len(blocks), BLOCK, None)
        assert written == out.nbytes, (format, written, out.nbytes)
        return torch.from_numpy(gguf.quants.dequantize(out.numpy(), kind)).view(weight.shape)


def bits_per_weight(format: str) -> float:
    """Of a block, its scales included."""
    weights, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[format]]
    return num_bytes * 8 / weights
