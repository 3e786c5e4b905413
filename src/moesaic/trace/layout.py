"""What stands where in a trace.

The file is an uncompressed zip of .npy arrays (`numpy.load` opens it; nothing is pickled), all little-endian:

about                   uint8: UTF-8 JSON with format, version, fingerprint, domains, weight_on
forward_offsets         int64 [F+1]: forward f has the tokens forward_offsets[f] to forward_offsets[f+1]
mask                    bool [N]: false for padding
document_ids            uint32 [N]: numbered from 0 in each forward
token_ids, domain_ids   uint32 and int16 [N], where known; domain -1 is none
layers/3/row_offsets    int64 [N+1]: token n has the rows row_offsets[n] to row_offsets[n+1], its first choice first
layers/3/expert_ids     [R], the smallest of uint8, uint16 and uint32 that holds E
layers/3/choices        [R], likewise: which of its token's choices a row is
layers/3/weights        float32 (or float64) [R]: what multiplied the expert's output, or its input
layers/3/chosen/...     the same four before a capacity took or moved rows; only for layers where one did

The last 64 bytes are the SHA-256, in hex digits, of all bytes before them; to zip they are the archive's comment.

F forwards, N tokens of all forwards, R rows, E experts.
"""

import numpy as np

FORMAT, VERSION = "moesaic routing trace", 1
DIGEST_BYTES = 64
ABOUT, FORWARD_OFFSETS = "about", "forward_offsets"
TOKEN_DTYPES = {"mask": "|b1", "document_ids": "<u4", "token_ids": "<u4", "domain_ids": "<i2"}
ALWAYS_KNOWN = ("mask", "document_ids")
OFFSETS_DTYPE = np.dtype("<i8")
WEIGHT_DTYPES = (np.dtype("<f4"), np.dtype("<f8"))
ROW_ARRAYS = ("row_offsets", "expert_ids", "choices", "weights")


def layer_folder(layer: int) -> str:
    """The prefix of a layer's arrays."""
    return f"layers/{layer}"


def chosen_folder(layer: int) -> str:
    """The prefix of what a layer's router chose, before any capacity."""
    return f"layers/{layer}/chosen"


def id_dtype(num_experts: int) -> np.dtype:
    """Of a layer's expert ids and choices."""
    return np.min_scalar_type(num_experts).newbyteorder("<")
