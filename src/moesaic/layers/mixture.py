"""Adaptive mixtures of local experts (Jacobs, Jordan, Nowlan & Hinton, Neural Computation 3:79-87, 1991).

Every expert answers every case; a gate says how much each answer counts. Three objectives train the same parts, and
the difference between them is the point: what an expert is told about its own mistake decides whether it becomes a
part of a sum (cooperative) or the owner of a region (likelihood).

T cases, D inputs, E experts, O outputs. For one case with target d: experts answer o_i, the gate's logits are a_i, and
p = softmax(a).
"""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.registry import Registry


class Mixture(NamedTuple):
    """What the parts say about T cases: outputs_TEO of the experts (o), logits_TE of the gate (a)."""

    outputs_TEO: Tensor
    logits_TE: Tensor

    @property
    def gates_TE(self) -> Tensor:
        """p = softmax(a)."""
        return torch.softmax(self.logits_TE, dim=-1)

    @property
    def mean_TO(self) -> Tensor:
        """sum_i p_i o_i: the mixture's answer."""
        return torch.einsum("te,teo->to", self.gates_TE, self.outputs_TEO)


class Objective(Protocol):
    """A mixture and the targets in, the error of every case out, with its gradient."""

    def __call__(self, mixture: Mixture, targets_TO: Tensor) -> Tensor: ...


OBJECTIVES: Registry[Objective] = Registry("objective")


@OBJECTIVES.register("cooperative")
def cooperative(mixture: Mixture, targets_TO: Tensor) -> Tensor:
    """E = |d - sum_i p_i o_i|^2, [T].

    dE/do_i = -2 p_i (d - sum_j p_j o_j): each expert is told what all of them together still lack, so that many end up
    in use for every case.
    """
    return (targets_TO - mixture.mean_TO).square().sum(-1)


@OBJECTIVES.register("competitive")
def competitive(mixture: Mixture, targets_TO: Tensor) -> Tensor:
    """E = sum_i p_i |d - o_i|^2, [T]: the expected error of one expert drawn by the gate.

    dE/do_i = -2 p_i (d - o_i): each expert is to give the whole answer; the worst is pulled hardest.
    """
    return (mixture.gates_TE * _squared_errors(mixture, targets_TO)).sum(-1)


@OBJECTIVES.register("likelihood")
def likelihood(mixture: Mixture, targets_TO: Tensor) -> Tensor:
    """E = -log sum_i p_i exp(-|d - o_i|^2 / 2), [T]: Gaussian experts of variance 1, up to a constant.

    With the posterior h: dE/do_i = -h_i (d - o_i) and dE/da_i = p_i - h_i. The expert that is already best learns
    fastest, and the gate follows it.
    """
    return -torch.logsumexp(_log_joint(mixture, targets_TO), dim=-1)


def posterior(mixture: Mixture, targets_TO: Tensor) -> Tensor:
    """h_i = p_i exp(-|d - o_i|^2 / 2) / sum_j p_j exp(-|d - o_j|^2 / 2), [T, E]: who gave the answer, seeing it."""
    _check_targets(mixture, targets_TO)
    return torch.softmax(_log_joint(mixture, targets_TO), dim=-1)


def gate_entropy(logits_TE: Tensor) -> Tensor:
    """The entropy of every case's gate in nats, [T]: 0 where one expert answers alone, log E where all do alike."""
    log_gates_TE = torch.log_softmax(logits_TE, dim=-1)
    return torch.special.entr(log_gates_TE.exp()).sum(-1)


class AdaptiveMixture(nn.Module):
    """Experts and a gate, any modules, trained together by one objective.

    experts: each maps x_TD to [T, O]. gate: maps x_TD to logits [T, E]. objective: a name in OBJECTIVES.
    Raises ConfigError for no experts and for an unknown objective.
    """

    def __init__(self, experts: Iterable[nn.Module], gate: nn.Module, objective: str = "likelihood") -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        if not self.experts:
            raise ConfigError("a mixture of 0 experts; give at least 1")
        self.gate = gate
        self.objective = OBJECTIVES[objective]

    def mixture(self, x_TD: Tensor) -> Mixture:
        """What experts and gate say. Raises ConfigError for a gate of another width than the number of experts."""
        logits_TE = self.gate(x_TD)
        if logits_TE.shape != (x_TD.shape[0], len(self.experts)):
            seen = f"gate logits of shape {tuple(logits_TE.shape)} for {len(self.experts)} experts"
            raise ConfigError(f"{seen}; the gate must give {(x_TD.shape[0], len(self.experts))}")
        return Mixture(torch.stack([expert(x_TD) for expert in self.experts], dim=1), logits_TE)

    def forward(self, x_TD: Tensor) -> Tensor:
        """The answers [T, O]: sum_i p_i o_i."""
        return self.mixture(x_TD).mean_TO

    def loss(self, x_TD: Tensor, targets_TO: Tensor) -> Tensor:
        """The objective's mean over the cases. Raises ConfigError for targets that are not shaped as the answers."""
        mixture = self.mixture(x_TD)
        _check_targets(mixture, targets_TO)
        return self.objective(mixture, targets_TO).mean()


def _squared_errors(mixture: Mixture, targets_TO: Tensor) -> Tensor:
    return (targets_TO[:, None] - mixture.outputs_TEO).square().sum(-1)


def _log_joint(mixture: Mixture, targets_TO: Tensor) -> Tensor:
    return torch.log_softmax(mixture.logits_TE, dim=-1) - 0.5 * _squared_errors(mixture, targets_TO)


def _check_targets(mixture: Mixture, targets_TO: Tensor) -> None:
    num_cases, _, num_outputs = mixture.outputs_TEO.shape
    if targets_TO.shape != (num_cases, num_outputs):  # broadcasting would train on the wrong pairs
        raise ConfigError(f"targets of shape {tuple(targets_TO.shape)}; they must be {(num_cases, num_outputs)}")
