"""The compiled kernels under the names and signatures of reference.py. Importing this fails where they were not built.

What they do not take (other dtypes than fp32 and bf16, tensors that are not on the CPU) goes to the reference.
Results are bit-equal for any number of threads, but for those of torch.mm (see `describe`). `MOESAIC_ISA` forces a
lower instruction set than the best.
"""

import math
import os
import re
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import torch  # before _native, whose OpenMP is the libgomp.so.1 that torch brings
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # pyright: ignore[reportPrivateImportUsage]  documented, not exported

from moesaic.config.activation import ClampedSwiglu
from moesaic.errors import ConfigError
from moesaic.kernels import reference
from moesaic.kernels.adam import AdamStep
from moesaic.kernels.blocks import ExpertRows, PackedExperts, PackedMatrices
from moesaic.kernels.paged import PagedCache, PagedTokens

_FLOATS = (torch.float32, torch.bfloat16)


def _openmp_runtimes() -> set[str]:
    """Files of OpenMP runtimes mapped into this process (Linux; elsewhere none are seen)."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return set()
    return set(re.findall(r"/\S*/lib(?:g|i)?omp\S*\.so\S*", maps.read_text(encoding="utf-8", errors="replace")))


_before = _openmp_runtimes()  # torch's, counted before _native is loaded
_native = import_module("moesaic._native")

ADDED_RUNTIMES = _openmp_runtimes() - _before
"""OpenMP runtimes beside torch's that our extension brought along; a sound installation has none."""

_THREADED = _native.has_threads() and not ADDED_RUNTIMES

if ADDED_RUNTIMES:
    print(
        f"moesaic: {', '.join(sorted(ADDED_RUNTIMES))} is a second OpenMP beside torch's, whose threads would fight; "
        "the kernels run on one thread. Reinstall moesaic into the environment that holds torch.",
        file=sys.stderr,
    )


def _choose_isa(name: str | None) -> None:
    """Take the instruction set that MOESAIC_ISA names. Raises ConfigError for one that this machine lacks."""
    if name and not _native.use_isa(name):
        raise ConfigError(f"MOESAIC_ISA={name!r} cannot run here; use one of {', '.join(_native.available_isas())}")


def _tell_what_is_lost(isa: str, asked: str | None) -> None:
    """One line where plain loops serve that nobody asked for.

    Packed products of one row took 4.0 (bf16) to 6.6 (int4) times as long as with AVX2, 1024 x 1024, one thread.
    """
    if isa == "portable" and not asked:
        print(
            "moesaic: this processor has none of the instruction sets that the kernels know (x86: AVX2 or better; "
            "arm64: NEON). Plain loops serve; with AVX2 tokens would come 4 to 7 times as fast, prompts more.",
            file=sys.stderr,
        )


_choose_isa(os.environ.get("MOESAIC_ISA"))
_tell_what_is_lost(_native.isa(), os.environ.get("MOESAIC_ISA"))


def describe() -> str:
    """Which instruction set, on how many threads, and which experts' products go to torch.mm."""
    return f"{_native.isa()}, {_threads()} thread{'s' if _threads() > 1 else ''}; experts: {_describe_classes()}"


def _describe_classes() -> str:
    """Who multiplies an expert's rows, by dtype and number of rows: "fp32 native, bf16 native to 64 rows, then ..."."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    limits = {name: _own_rows(dtype) for dtype, name in names.items()}
    products = [
        f"{name} native" if rows == _NEVER else f"{name} native to {rows} rows, then torch.mm"
        for name, rows in limits.items()
    ]
    if (of_weights := _LIBRARY_GRAD_ROWS.get(_native.isa(), _NEVER)) < limits["fp32"]:
        products.append(f"fp32 gradients of large weights native to {of_weights} rows, then torch.mm")
    return ", ".join(products)


def _threads() -> int:
    return torch.get_num_threads() if _THREADED else 1


def _takes(tensor: Tensor, other: Tensor | None = None) -> bool:
    """Whether the tensors are on the CPU and of one dtype that the kernels know."""
    if tensor.dtype not in _FLOATS or not tensor.is_cpu:
        return False
    return other is None or (other.dtype == tensor.dtype and other.is_cpu)


def _takes_product(x_RI: Tensor, weight_EOI: Tensor) -> bool:
    """The same, or bf16 weights beside rows in fp32: the products are those of the weights in fp32, bit for bit."""
    is_narrow = (x_RI.dtype, weight_EOI.dtype) == (torch.float32, torch.bfloat16)
    return _takes(x_RI) and weight_EOI.is_cpu if is_narrow else _takes(x_RI, weight_EOI)


def _matrix(tensor: Tensor) -> Tensor:
    """Contiguous, all dimensions but the last in one."""
    return (tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])).contiguous()


def _array(tensor: Tensor) -> object:
    """The tensor's memory as a DLPack capsule: much quicker to make than through Tensor.__dlpack__."""
    return to_dlpack(tensor)


def select_topk(scores_TE: Tensor, top_k: int) -> Tensor:
    """See reference.select_topk."""
    if scores_TE.dtype != torch.float32 or not _takes(scores_TE):
        return reference.select_topk(scores_TE, top_k)
    ids_TK = torch.empty(scores_TE.shape[0], top_k, dtype=torch.int64)
    _native.select_topk(_array(scores_TE.contiguous()), _array(ids_TK), _threads())
    return ids_TK


def sort_rows(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """See reference.sort_rows. Raises ValueError for an expert id that is not below `num_experts`."""
    if expert_ids_TK.dtype != torch.int64 or not expert_ids_TK.is_cpu:
        return reference.sort_rows(expert_ids_TK, num_experts)
    token_ids = torch.empty(expert_ids_TK.numel(), dtype=torch.int64)
    choices = torch.empty_like(token_ids)
    offsets = torch.empty(num_experts + 1, dtype=torch.int64)
    rows = _native.sort_rows(_array(expert_ids_TK.contiguous()), _array(token_ids), _array(choices), _array(offsets))
    return token_ids[:rows], choices[:rows], offsets


def gather_rows(x_TD: Tensor, token_ids_R: Tensor) -> Tensor:
    """See reference.gather_rows."""
    if not _takes(x_TD):
        return reference.gather_rows(x_TD, token_ids_R)
    x_RD = x_TD.new_empty(token_ids_R.shape[0], x_TD.shape[1])
    _native.gather_rows(_array(x_TD.contiguous()), _array(token_ids_R.contiguous()), _array(x_RD), _threads())
    return x_RD


def combine_rows(out_RD: Tensor, weights_R: Tensor, row_ids_R: Tensor, token_offsets: Tensor) -> Tensor:
    """See reference.combine_rows."""
    if weights_R.dtype != torch.float32 or not _takes(out_RD):
        return reference.combine_rows(out_RD, weights_R, row_ids_R, token_offsets)
    y_TD = out_RD.new_empty(token_offsets.shape[0] - 1, out_RD.shape[1])
    inputs = (out_RD.contiguous(), weights_R.contiguous(), row_ids_R.contiguous(), token_offsets.contiguous())
    _native.combine_rows(*map(_array, inputs), _array(y_TD), _threads())
    return y_TD


def combine_rows_grad(dy_TD: Tensor, out_RD: Tensor, weights_R: Tensor, token_ids_R: Tensor) -> tuple[Tensor, Tensor]:
    """See reference.combine_rows_grad."""
    if weights_R.dtype != torch.float32 or not _takes(dy_TD, out_RD):
        return reference.combine_rows_grad(dy_TD, out_RD, weights_R, token_ids_R)
    d_out_RD = torch.empty(out_RD.shape, dtype=out_RD.dtype)
    d_weights_R = torch.empty(weights_R.shape, dtype=weights_R.dtype)
    inputs = (dy_TD.contiguous(), out_RD.contiguous(), weights_R.contiguous(), token_ids_R.contiguous())
    _native.combine_rows_grad(*map(_array, inputs), _array(d_out_RD), _array(d_weights_R), _threads())
    return d_out_RD, d_weights_R


# Rows an expert up to which reading weights in strips beats packing (benchmarks/native_kernels.py --rows).
_FEW_ROWS = {torch.float32: 16, torch.bfloat16: 4}
if _native.isa() == "avx2":  # in stretches of k (csrc/multiply_strips.cpp)
    _FEW_ROWS = {torch.float32: 24, torch.bfloat16: 16}

# Rows an expert above which torch.mm is the faster, as benchmarks/grouped_gemm.py --classes measured it with
# oneDNN and MKL held to the same instructions. Not measured on NEON: there torch.mm keeps what it had before.
_LIBRARY_ROWS = {("portable", torch.float32): 16, ("neon", torch.float32): 16, ("neon", torch.bfloat16): 4}
_NEVER = 2**62

# The same of fp32 gradients of weights, for matrices of so many elements: at 512 rows ours takes 1.1 to 1.3 times as
# long as torch.mm, at 256 about as long, and of smaller matrices less at any number of rows.
_LIBRARY_GRAD_ROWS = {"avx512": 256, "avx512_vnni": 256, "avx512_bf16": 256, "amx": 256}
_LARGE_MATRIX = 1 << 18

# A tensor of more bytes always gets new pages from the system: glibc keeps smaller blocks for reuse
# (DEFAULT_MMAP_THRESHOLD_MAX).
_REUSED_BYTES = 32 << 20


def _own_rows(dtype: torch.dtype) -> int:
    """Rows an expert up to which its products are computed here; torch.mm takes those with more."""
    return _LIBRARY_ROWS.get((_native.isa(), dtype), _NEVER)


def _own_rows_of_grad(dw_EOI: Tensor, dtype: torch.dtype) -> int:
    """The same for the gradient of its weights, from rows of this dtype."""
    if dw_EOI.dtype != dtype:
        return _NEVER  # torch.mm would round in between
    large = dtype == torch.float32 and dw_EOI.shape[1] * dw_EOI.shape[2] >= _LARGE_MATRIX
    return min(_own_rows(dtype), _LIBRARY_GRAD_ROWS.get(_native.isa(), _NEVER) if large else _NEVER)


def _left_over(offsets: Tensor, own_rows: int) -> list[tuple[int, int, int]]:
    """(expert, start, end) of the experts with more rows than that."""
    if own_rows == _NEVER:
        return []
    spans = enumerate(pairwise(offsets.tolist()))
    return [(expert, start, end) for expert, (start, end) in spans if end - start > own_rows]


def grouped_linear(x_RI: Tensor, weight_EOI: Tensor, offsets: Tensor) -> Tensor:
    """See reference.grouped_linear."""
    if not _takes_product(x_RI, weight_EOI):
        return reference.grouped_linear(x_RI, weight_EOI, offsets)
    y_RO = torch.empty(x_RI.shape[0], weight_EOI.shape[1], dtype=x_RI.dtype)
    inputs = (x_RI.contiguous(), weight_EOI.contiguous(), offsets.contiguous())
    own_rows = _own_rows(x_RI.dtype)
    _native.grouped_linear(*map(_array, inputs), _array(y_RO), _FEW_ROWS[x_RI.dtype], own_rows, _threads())
    for expert, start, end in _left_over(offsets, own_rows):
        torch.mm(x_RI[start:end], weight_EOI[expert].to(x_RI.dtype).T, out=y_RO[start:end])
    return y_RO


def packed_linear(x_RI: Tensor, packed: PackedMatrices, offsets: Tensor, bias_EO: Tensor | None = None) -> Tensor:
    """See reference.packed_linear."""
    if not _takes_packed(x_RI, packed):
        return reference.packed_linear(x_RI, packed, offsets, bias_EO)
    y_RO = torch.empty(len(x_RI), packed.shape.outputs)
    _packed_linear(x_RI, packed, offsets, y_RO, bias_EO, None)
    return y_RO


def add_packed_linear(
    x_RI: Tensor,
    packed: PackedMatrices,
    offsets: Tensor,
    sum_RO: Tensor,
    multiplier: float,
    bias_EO: Tensor | None = None,
) -> None:
    """See reference.add_packed_linear."""
    if not (_takes_packed(x_RI, packed) and _takes_packed(sum_RO, packed) and sum_RO.stride(-1) == 1):
        reference.add_packed_linear(x_RI, packed, offsets, sum_RO, multiplier, bias_EO)
        return
    _packed_linear(x_RI, packed, offsets, sum_RO, bias_EO, multiplier)


def _packed_linear(
    x_RI: Tensor,
    packed: PackedMatrices,
    offsets: Tensor,
    y_RO: Tensor,
    bias_EO: Tensor | None,
    multiplier: float | None,
) -> None:
    shape = packed.shape
    inputs = (_with_whole_rows(x_RI), packed.data.contiguous(), offsets.contiguous())
    settings = (shape.format, shape.group, shape.paired, _threads())
    _native.packed_linear(*map(_array, inputs), _array(y_RO), *settings, _array_or_none(bias_EO), multiplier)


def packed_experts(
    x_TD: Tensor, experts: PackedExperts, rows: ExpertRows | None, out_TD: Tensor, multiplier: float = 1.0
) -> None:
    """See reference.packed_experts."""
    into, down = experts.into, experts.down
    taken = _takes_packed(x_TD, into) and _takes_packed(out_TD, down) and out_TD.stride(-1) == 1
    if not taken:
        reference.packed_experts(x_TD, experts, rows, out_TD, multiplier)
        return
    activation, figures = experts.activation, (math.inf, 1.0, 0.0)
    if isinstance(activation, ClampedSwiglu):
        activation, figures = "silu", (activation.limit, activation.alpha, activation.shift)
    choice = (None, None, None) if rows is None else (rows.offsets, rows.weights_R, rows.row_of_TK)
    _native.packed_experts(
        *map(_array, (_with_whole_rows(x_TD), into.data.contiguous(), down.data.contiguous(), out_TD)),
        _array_or_none(experts.into_bias_EG),
        _array_or_none(experts.down_bias_ED),
        (into.shape.format, into.shape.group),
        (down.shape.format, down.shape.group),
        down.shape.inputs,
        into.shape.paired,
        activation,
        figures,
        *map(_array_or_none, choice),
        rows is not None and rows.weight_on_input,
        multiplier,
        _threads(),
    )


def _takes_packed(x: Tensor, packed: PackedMatrices) -> bool:
    return x.dtype == torch.float32 and x.is_cpu and packed.data.is_cpu


def _with_whole_rows(x: Tensor) -> Tensor:
    """Rows may be apart, what is in one may not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _array_or_none(tensor: Tensor | None) -> object:
    return None if tensor is None else _array(tensor.contiguous())


def grouped_gated(x_RI: Tensor, gate_up_EGI: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """See reference.grouped_gated."""
    if not _takes_product(x_RI, gate_up_EGI):
        return reference.grouped_gated(x_RI, gate_up_EGI, offsets)
    if _left_over(offsets, _own_rows(x_RI.dtype)):
        gate_up_RG = grouped_linear(x_RI, gate_up_EGI, offsets)
        return silu_mul(gate_up_RG), gate_up_RG
    rows, outputs = x_RI.shape[0], gate_up_EGI.shape[1]
    gate_up_RG = torch.empty(rows, outputs, dtype=x_RI.dtype)
    y_RF = torch.empty(rows, outputs // 2, dtype=x_RI.dtype)
    inputs = (x_RI.contiguous(), gate_up_EGI.contiguous(), offsets.contiguous())
    _native.grouped_gated(*map(_array, inputs), _array(gate_up_RG), _array(y_RF), _FEW_ROWS[x_RI.dtype], _threads())
    return y_RF, gate_up_RG


def grouped_linear_input_grad(dy_RO: Tensor, weight_EOI: Tensor, offsets: Tensor) -> Tensor:
    """See reference.grouped_linear_input_grad."""
    if not _takes(dy_RO, weight_EOI):
        return reference.grouped_linear_input_grad(dy_RO, weight_EOI, offsets)
    dx_RI = torch.empty(dy_RO.shape[0], weight_EOI.shape[2], dtype=dy_RO.dtype)
    inputs = (dy_RO.contiguous(), weight_EOI.contiguous(), offsets.contiguous())
    own_rows = _own_rows(dy_RO.dtype)
    _native.grouped_linear_input_grad(*map(_array, inputs), _array(dx_RI), own_rows, _threads())
    for expert, start, end in _left_over(offsets, own_rows):
        torch.mm(dy_RO[start:end], weight_EOI[expert], out=dx_RI[start:end])
    return dx_RI


def grouped_linear_weight_grad(dy_RO: Tensor, x_RI: Tensor, offsets: Tensor) -> Tensor:
    """See reference.grouped_linear_weight_grad."""
    if not _takes(dy_RO, x_RI):
        return reference.grouped_linear_weight_grad(dy_RO, x_RI, offsets)
    dw_EOI = torch.empty(offsets.shape[0] - 1, dy_RO.shape[1], x_RI.shape[1], dtype=x_RI.dtype)
    _weight_grad(dy_RO, x_RI, offsets, dw_EOI, fresh=dw_EOI.nbytes > _REUSED_BYTES)
    return dw_EOI


def add_grouped_linear_weight_grad(
    dy_RO: Tensor, x_RI: Tensor, offsets: Tensor, sum_EOI: Tensor, accumulate: bool
) -> None:
    """See reference.add_grouped_linear_weight_grad."""
    if not (_takes(dy_RO, x_RI) and sum_EOI.dtype == torch.float32 and sum_EOI.is_contiguous()):
        reference.add_grouped_linear_weight_grad(dy_RO, x_RI, offsets, sum_EOI, accumulate)
        return
    _weight_grad(dy_RO, x_RI, offsets, sum_EOI, accumulate=accumulate)


def _weight_grad(
    dy_RO: Tensor, x_RI: Tensor, offsets: Tensor, dw_EOI: Tensor, *, fresh: bool = False, accumulate: bool = False
) -> None:
    inputs = (dy_RO.contiguous(), x_RI.contiguous(), offsets.contiguous())
    own_rows = _own_rows_of_grad(dw_EOI, x_RI.dtype)
    _native.grouped_linear_weight_grad(*map(_array, inputs), _array(dw_EOI), fresh, accumulate, own_rows, _threads())
    for expert, start, end in _left_over(offsets, own_rows):
        if accumulate:
            dw_EOI[expert].addmm_(dy_RO[start:end].T, x_RI[start:end])
        else:
            torch.mm(dy_RO[start:end].T, x_RI[start:end], out=dw_EOI[expert])


def silu_mul(gate_up: Tensor) -> Tensor:
    """See reference.silu_mul."""
    if not _takes(gate_up):
        return reference.silu_mul(gate_up)
    rows = _matrix(gate_up)
    y = rows.new_empty(rows.shape[0], rows.shape[1] // 2)
    _native.silu_mul(_array(rows), _array(y), _threads())
    return y if gate_up.dim() == 2 else y.view(*gate_up.shape[:-1], y.shape[1])


def silu_mul_grad(dy: Tensor, gate_up: Tensor) -> Tensor:
    """See reference.silu_mul_grad."""
    if not _takes(dy, gate_up):
        return reference.silu_mul_grad(dy, gate_up)
    rows = _matrix(gate_up)
    d_rows = torch.empty(rows.shape, dtype=rows.dtype)
    _native.silu_mul_grad(_array(_matrix(dy)), _array(rows), _array(d_rows), _threads())
    return d_rows.view(gate_up.shape)


def cross_entropy_(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """See reference.cross_entropy_."""
    if not _takes(logits_NV) or not logits_NV.is_contiguous():
        return reference.cross_entropy_(logits_NV, targets_N)
    losses_N = torch.empty(len(targets_N), dtype=torch.float32)
    _native.cross_entropy(_array(logits_NV), _array(targets_N.contiguous()), _array(losses_N), _threads())
    return losses_N


def causal_attention(q_BSHA: Tensor, k_BSGA: Tensor, v_BSGA: Tensor) -> tuple[Tensor, Tensor]:
    """See reference.causal_attention."""
    if not (_takes(q_BSHA, k_BSGA) and _takes(q_BSHA, v_BSGA)):
        return reference.causal_attention(q_BSHA, k_BSGA, v_BSGA)
    batch, length, heads, _ = q_BSHA.shape
    out_BSHA = torch.empty(q_BSHA.shape, dtype=q_BSHA.dtype)
    log_sum_BHS = torch.empty(batch, heads, length)
    inputs = (q_BSHA.contiguous(), k_BSGA.contiguous(), v_BSGA.contiguous())
    _native.causal_attention(*map(_array, inputs), _array(out_BSHA), _array(log_sum_BHS), _threads())
    return out_BSHA, log_sum_BHS


def causal_attention_grad(
    d_out_BSHA: Tensor, q_BSHA: Tensor, k_BSGA: Tensor, v_BSGA: Tensor, out_BSHA: Tensor, log_sum_BHS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See reference.causal_attention_grad."""
    if not (_takes(q_BSHA, k_BSGA) and _takes(q_BSHA, v_BSGA) and _takes(q_BSHA, d_out_BSHA)):
        return reference.causal_attention_grad(d_out_BSHA, q_BSHA, k_BSGA, v_BSGA, out_BSHA, log_sum_BHS)
    inputs = [tensor.contiguous() for tensor in (d_out_BSHA, q_BSHA, k_BSGA, v_BSGA, out_BSHA, log_sum_BHS)]
    dq, dk, dv = (torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in (q_BSHA, k_BSGA, v_BSGA))
    _native.causal_attention_grad(*map(_array, (*inputs, dq, dk, dv)), _threads())
    return dq, dk, dv


def write_cache(cache: PagedCache, tokens: PagedTokens, k_TGA: Tensor, v_TGV: Tensor | None) -> None:
    """See reference.write_cache."""
    new = [tensor for tensor in (k_TGA, v_TGV) if tensor is not None]
    if not _is_paged(cache) or any(tensor.dtype != torch.float32 or not tensor.is_cpu for tensor in new):
        reference.write_cache(cache, tokens, k_TGA, v_TGV)
        return
    k, v = (None if tensor is None else _array(_rows(tensor)) for tensor in (k_TGA, v_TGV))
    _native.write_cache(*_of_cache(cache), *map(_array, tokens), k, v, _threads())


def paged_attention(
    q_THA: Tensor,
    cache: PagedCache,
    tokens: PagedTokens,
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """See reference.paged_attention."""
    if not _is_paged(cache) or q_THA.dtype != torch.float32 or not q_THA.is_cpu:
        return reference.paged_attention(q_THA, cache, tokens, scale=scale, window=window, chunk=chunk, sinks_H=sinks_H)
    out_THV = torch.empty(*q_THA.shape[:2], cache.value_dim)
    sinks = None if sinks_H is None else _array(sinks_H.float().contiguous())
    settings = (window or 0, chunk or 0, scale, sinks, _threads())
    arrays = (*map(_array, tokens), _array(_rows(q_THA)), _array(out_THV))
    _native.paged_attention(*_of_cache(cache), *arrays, *settings)
    return out_THV


def _is_paged(cache: PagedCache) -> bool:
    """Whether the kernels know such a cache; it is written in place, so that it must lie without gaps."""
    parts = [tensor for tensor in (cache.keys, cache.values) if tensor is not None]
    known = cache.keys.dtype == torch.uint8 or cache.keys.dtype in _FLOATS
    return known and all(part.is_cpu and part.dtype == cache.keys.dtype and part.is_contiguous() for part in parts)


def _of_cache(cache: PagedCache) -> tuple[object, ...]:
    values = None if cache.values is None else _array(cache.values)
    return _array(cache.keys), values, cache.key_dim, cache.value_dim


def _rows(x_THA: Tensor) -> Tensor:
    """Tokens may lie apart, as parts of wider rows do; what is of one token lies without gaps."""
    dense = x_THA.stride(2) == 1 and x_THA.stride(1) == x_THA.shape[2] and x_THA.stride(0) >= 0
    return x_THA.detach() if dense else x_THA.detach().contiguous()


def rotate(x_BSHA: Tensor, cos: Tensor, sin: Tensor, sign: float = 1.0) -> Tensor:
    """See reference.rotate."""
    if not (_takes(x_BSHA, cos) and _takes(x_BSHA, sin)):
        return reference.rotate(x_BSHA, cos, sin, sign)
    y_BSHA = torch.empty(x_BSHA.shape, dtype=x_BSHA.dtype)
    heads, turns = (x_BSHA.contiguous(), y_BSHA), (cos.contiguous(), sin.contiguous())
    x, y = (_array(tensor.view(-1, *x_BSHA.shape[2:])) for tensor in heads)
    _native.rotate(x, *(_array(tensor.view(-1, tensor.shape[-1])) for tensor in turns), y, sign, _threads())
    return y_BSHA


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See reference.rms_norm."""
    if not _takes(x, weight):
        return reference.rms_norm(x, weight, eps)
    rows = _matrix(x)
    y = torch.empty(rows.shape, dtype=rows.dtype)
    inverse = torch.empty(rows.shape[0], dtype=torch.float32)
    _native.rms_norm(_array(rows), _array(weight.contiguous()), _array(y), _array(inverse), eps, _threads())
    return y.view(x.shape), inverse.view(x.shape[:-1])


def rms_norm_grad(dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """See reference.rms_norm_grad."""
    if not (_takes(dy, x) and _takes(x, weight)):
        return reference.rms_norm_grad(dy, x, weight, inverse)
    rows = _matrix(x)
    dx = torch.empty(rows.shape, dtype=rows.dtype)
    d_weight = torch.empty(weight.shape, dtype=torch.float32)
    inputs = (_matrix(dy), rows, weight.contiguous(), inverse.contiguous().flatten())
    _native.rms_norm_grad(*map(_array, inputs), _array(dx), _array(d_weight), _threads())
    return dx.view(x.shape), d_weight.to(weight.dtype)


def adamw_(
    weight: Tensor,
    gradient: Tensor,
    moments: tuple[Tensor, Tensor],
    step: AdamStep,
    *,
    rounded: Tensor | None = None,
    average: Tensor | None = None,
) -> None:
    """See reference.adamw_."""
    wide = [tensor for tensor in (weight, gradient, *moments, average) if tensor is not None]
    known = all(tensor.is_cpu and tensor.dtype == torch.float32 for tensor in wide)
    if not known or (rounded is not None and rounded.dtype != torch.bfloat16):
        reference.adamw_(weight, gradient, moments, step, rounded=rounded, average=average)
        return
    tensors = (weight, gradient.contiguous(), *moments, rounded, average)
    arrays = (None if tensor is None else _array(tensor.detach().view(-1)) for tensor in tensors)
    _native.adamw(*arrays, step, _threads())
