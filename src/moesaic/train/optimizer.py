"""The optimizer: AdamW, and clipping."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moesaic.train.recipe import TrainSettings


def adamw(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101). Matrices decay; norms, biases and embeddings do not."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() >= 2 and not name.startswith("embedding")
        (decayed if is_matrix else free).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=1e-8, fused=True)


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale all gradients so that their joint 2-norm is at most `max_norm`; returns the norm before."""
    return float(nn.utils.clip_grad_norm_(model.parameters(), max_norm, foreach=True))


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Every tensor the optimizer keeps, as (parameter name + "|" + its name there, tensor)."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            yield f"{names[parameter]}|{key}", value


def restore_state(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `named_state`, on an optimizer that has not stepped yet."""
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        parameter_name, key = name.rsplit("|", 1)
        optimizer.state[parameters[parameter_name]][key] = value
