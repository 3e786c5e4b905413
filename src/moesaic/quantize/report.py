"""What rounding cost, summed up: by layer and role, the worst tensors, the worst experts, and bits a weight."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

from moesaic.quantize.encoding import Squares
from moesaic.quantize.files import QuantizedCheckpoint, RoundedTensor

NUM_WORST = 5
Key = TypeVar("Key", bound=Hashable)


def report(quantized: QuantizedCheckpoint, num_parameters: int) -> dict[str, Any]:
    """JSON-ready. bits_per_weight: scales and padding included; `all` also counts what stays as it is.

    Errors are |w - q| over |w| (2-norms), of a tensor or of several together.
    """
    tensors = quantized.tensors
    experts = [tensor for tensor in tensors if tensor.role == "experts"]
    by_expert = _errors(experts, lambda tensor: (tensor.layer, tensor.expert))
    return {
        "bytes_before": quantized.num_bytes_before,
        "bytes_after": quantized.written.num_bytes,
        "bits_per_weight": {
            "all": 8 * quantized.written.num_bytes / num_parameters,
            "rounded": bits_per_weight(tensors),
            "experts": bits_per_weight(experts),
        },
        "error": together(tensors),
        "by_layer": _by_layer(tensors),
        "worst_tensors": [
            {"name": tensor.name, "bits": tensor.bits, "error": tensor.error}
            for tensor in sorted(tensors, key=lambda tensor: -tensor.error)[:NUM_WORST]
        ],
        "worst_experts": [
            {"layer": layer, "expert": expert, "error": error}
            for (layer, expert), error in sorted(by_expert.items(), key=lambda item: -item[1])[:NUM_WORST]
        ],
    }


def bits_per_weight(tensors: list[RoundedTensor]) -> float | None:
    """On average; None without any."""
    numel = sum(tensor.numel for tensor in tensors)
    return 8 * sum(tensor.num_bytes for tensor in tensors) / numel if numel else None


def together(tensors: Iterable[RoundedTensor]) -> float:
    """The error of several tensors as if they were one."""
    squares = [tensor.squares for tensor in tensors]
    return Squares(sum(each.error for each in squares), sum(each.weight for each in squares)).relative


def _errors(tensors: list[RoundedTensor], key: Callable[[RoundedTensor], Key]) -> dict[Key, float]:
    groups: dict[Key, list[RoundedTensor]] = defaultdict(list)
    for tensor in tensors:
        groups[key(tensor)].append(tensor)
    return {name: together(group) for name, group in groups.items()}


def _by_layer(tensors: list[RoundedTensor]) -> list[dict[str, Any]]:
    groups: dict[tuple[str | None, str, int], list[RoundedTensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.layer, tensor.role, tensor.bits].append(tensor)
    return [
        {
            "layer": layer,
            "role": role,
            "bits": bits,
            "tensors": len(group),
            "weights": sum(tensor.numel for tensor in group),
            "error": together(group),
            "worst_error": max(tensor.error for tensor in group),
        }
        for (layer, role, bits), group in groups.items()
    ]
