"""Hierarchical mixtures of experts with EM (Jordan & Jacobs, Neural Computation 6:181-214, 1994).

A tree: the gate of each inner node shares a case out among its children; each leaf is a linear model with Gaussian
noise. With two levels, p(y|x) = sum_i g_i sum_j g_{j|i} P_ij(y|x). The E-step asks which path through the tree gave
y; the M-step fits every leaf and every gate on its own, weighted by the answers. No step lowers the likelihood.

T cases, D inputs, F = D + 1 features (the last is the constant 1), O outputs, M leaves; N nodes of one level of gates,
each with J children. Leaves and nodes are numbered in the order of the tree: child j of node n is number n * J + j.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError

_MOST_HALVINGS = 12


class EmStep(NamedTuple):
    """What one EM step did.

    log_likelihood: before the step, the sum over the cases in nats. sweeps: how often the step went through the cases,
    the gates' inner loops included.
    """

    log_likelihood: float
    sweeps: int


class _FittedGates(NamedTuple):
    weight_NJF: Tensor
    sweeps: int


class _Climb(NamedTuple):
    weight_NJF: Tensor
    gain_N: Tensor
    sweeps: int


class HierarchicalMixture(nn.Module):
    """A tree of softmax gates over linear-Gaussian leaves.

    branching: children of a node at each level: (4, 2) is 4 branches of 2 leaves, as in the paper; (8,) a mixture
    without hierarchy. seed: draws the weights. EM never takes a leaf's variance below min_variance: without a bound, a
    leaf that owns a single case has no finite likelihood.
    Raises ConfigError for no level, a level of fewer than 1 child, sizes below 1, or a min_variance not above 0.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        branching: Iterable[int] = (2, 2),
        *,
        min_variance: float = 1e-6,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        self.branching = tuple(branching)
        self.min_variance = min_variance
        self._check(input_size, output_size)
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> nn.Parameter:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return nn.Parameter((0.5 * values / math.sqrt(shape[-1])).to(dtype))

        nodes = [math.prod(self.branching[:level]) for level in range(len(self.branching))]
        features, num_leaves = input_size + 1, math.prod(self.branching)
        self.gates = nn.ParameterList(drawn(n, j, features) for n, j in zip(nodes, self.branching, strict=True))
        self.leaf_MOF = drawn(num_leaves, output_size, features)
        self.log_variance_MO = nn.Parameter(torch.zeros(num_leaves, output_size, dtype=dtype))

    def _check(self, input_size: int, output_size: int) -> None:
        for name, size in (("input_size", input_size), ("output_size", output_size)):
            if size < 1:
                raise ConfigError(f"{name}={size}; it must be a whole number above 0")
        if not self.branching or min(self.branching) < 1:
            raise ConfigError(f"branching={self.branching}; give the children of a node at each level, as in (4, 2)")
        if not self.min_variance > 0:
            raise ConfigError(f"min_variance={self.min_variance}; it must be above 0")

    def forward(self, x_TD: Tensor) -> Tensor:
        """The expected outputs [T, O]: the leaves' means, weighed by the gates."""
        x_TF = self._features(x_TD)
        return torch.einsum("tm,tmo->to", self._log_gates(x_TF).exp(), self._means(x_TF))

    def log_likelihood(self, x_TD: Tensor, y_TO: Tensor) -> Tensor:
        """sum_t ln sum_ij g_i g_{j|i} P_ij(y_t|x_t), in nats, with its gradient.

        Raises ConfigError for inputs or outputs of another shape than [T, input_size] and [T, output_size].
        """
        return torch.logsumexp(self._log_joint(self._features(x_TD), self._outputs(x_TD, y_TO)), dim=1).sum()

    def posteriors(self, x_TD: Tensor, y_TO: Tensor) -> Tensor:
        """h_ij of every case, [T, M]: the probability that leaf ij gave y. Sums over leaves give h_i."""
        return torch.softmax(self._log_joint(self._features(x_TD), self._outputs(x_TD, y_TO)), dim=1)

    @torch.no_grad()
    def em_step(self, x_TD: Tensor, y_TO: Tensor, *, gate_steps: int = 4) -> EmStep:
        """One E-step and one M-step over all cases, in place. The log-likelihood does not fall.

        gate_steps: at most so many steps of iteratively reweighted least squares for each gate. A part whose fit does
        not raise its own share of the expected log-likelihood (rounding; a leaf that owns nothing) stays as it was.
        Raises ConfigError for wrong shapes and for gate_steps below 1.
        """
        if gate_steps < 1:
            raise ConfigError(f"gate_steps={gate_steps}; it must be a whole number above 0")
        x_TF, y_TO = self._features(x_TD), self._outputs(x_TD, y_TO)
        log_joint_TM = self._log_joint(x_TF, y_TO)
        log_likelihood = torch.logsumexp(log_joint_TM, dim=1).sum().item()
        posterior_TM = torch.softmax(log_joint_TM, dim=1)
        self._fit_leaves(posterior_TM, x_TF, y_TO)
        sweeps = 2  # the E-step, the leaves
        for gate in self.gates:
            targets_TNJ = posterior_TM.view(len(x_TF), *gate.shape[:2], -1).sum(-1)
            fitted = fit_gates(gate, targets_TNJ, x_TF, gate_steps)
            gate.copy_(fitted.weight_NJF)
            sweeps += fitted.sweeps
        return EmStep(log_likelihood, sweeps)

    def _fit_leaves(self, posterior_TM: Tensor, x_TF: Tensor, y_TO: Tensor) -> None:
        """Weighted least squares and the weighted mean squared residual: the maximum for a Gaussian leaf."""
        root_MT1 = posterior_TM.T.sqrt()[..., None]
        solution_MFO = torch.linalg.lstsq(root_MT1 * x_TF, root_MT1 * y_TO, driver="gelsd").solution
        squared_TMO = (y_TO[:, None] - torch.einsum("tf,mfo->tmo", x_TF, solution_MFO)).square()
        variance_MO = torch.einsum("tm,tmo->mo", posterior_TM, squared_TMO) / posterior_TM.sum(0)[:, None]
        log_variance_MO = variance_MO.clamp(min=self.min_variance).log()

        before_TMO = self._log_densities(self._means(x_TF), self.log_variance_MO, y_TO)
        after_TMO = _log_normal(squared_TMO, log_variance_MO)
        gain_MO = torch.einsum("tm,tmo->mo", posterior_TM, after_TMO - before_TMO)
        is_better_MO = gain_MO > 0  # false for NaN: a leaf that owns nothing
        self.leaf_MOF.copy_(torch.where(is_better_MO[..., None], solution_MFO.mT, self.leaf_MOF))
        self.log_variance_MO.copy_(torch.where(is_better_MO, log_variance_MO, self.log_variance_MO))

    def _log_joint(self, x_TF: Tensor, y_TO: Tensor) -> Tensor:
        densities_TMO = self._log_densities(self._means(x_TF), self.log_variance_MO, y_TO)
        return self._log_gates(x_TF) + densities_TMO.sum(-1)

    def _log_gates(self, x_TF: Tensor) -> Tensor:
        """ln of the product of the gates on the way to each leaf, [T, M]."""
        log_path_TN = x_TF.new_zeros(len(x_TF), 1)
        for gate in self.gates:
            log_path_TN = (log_path_TN[..., None] + _log_shares(gate, x_TF)).flatten(1)
        return log_path_TN

    def _means(self, x_TF: Tensor) -> Tensor:
        return torch.einsum("tf,mof->tmo", x_TF, self.leaf_MOF)

    @staticmethod
    def _log_densities(means_TMO: Tensor, log_variance_MO: Tensor, y_TO: Tensor) -> Tensor:
        return _log_normal((y_TO[:, None] - means_TMO).square(), log_variance_MO)

    def _features(self, x_TD: Tensor) -> Tensor:
        input_size = self.leaf_MOF.shape[-1] - 1
        if x_TD.dim() != 2 or x_TD.shape[1] != input_size:
            raise ConfigError(f"inputs of shape {tuple(x_TD.shape)}; they must be [cases, {input_size}]")
        x_TD = x_TD.to(self.leaf_MOF.dtype)
        return torch.cat([x_TD, x_TD.new_ones(len(x_TD), 1)], dim=1)

    def _outputs(self, x_TD: Tensor, y_TO: Tensor) -> Tensor:
        shape = (len(x_TD), self.leaf_MOF.shape[1])
        if y_TO.shape != shape:  # broadcasting would fit the wrong pairs
            raise ConfigError(f"targets of shape {tuple(y_TO.shape)}; they must be {shape}")
        return y_TO.to(self.leaf_MOF.dtype)


def fit_gates(weight_NJF: Tensor, targets_TNJ: Tensor, x_TF: Tensor, steps: int) -> _FittedGates:
    """Multinomial logit fits of N gates at once, by iteratively reweighted least squares (Newton's method).

    Raises sum_tj targets_tnj ln g_tnj of each node n; its targets are h_n h_{j|n}, so that a node weighs a case as much
    as the case belongs to it. Returns the new weights and the number of sweeps through the cases.
    """
    sweeps = 0
    for _ in range(steps):
        log_shares_TNJ = _log_shares(weight_NJF, x_TF)
        value_N = _expected(targets_TNJ, log_shares_TNJ)
        step_NJF = _newton_step(targets_TNJ, log_shares_TNJ.exp(), x_TF)
        climb = _climb(weight_NJF, step_NJF, value_N, targets_TNJ, x_TF)
        weight_NJF, sweeps = climb.weight_NJF, sweeps + climb.sweeps
        if bool((climb.gain_N <= 1e-9 * (1 + value_N.abs())).all()):
            break
    return _FittedGates(weight_NJF, sweeps)


def _climb(weight_NJF: Tensor, step_NJF: Tensor, value_N: Tensor, targets_TNJ: Tensor, x_TF: Tensor) -> _Climb:
    """Take for each node the longest of step, step / 2, step / 4 … that does not lower its sum; none, if all do."""
    scale_N, sweeps = torch.ones_like(value_N), 0
    while True:
        candidate_NJF = weight_NJF + scale_N[:, None, None] * step_NJF
        gain_N = _expected(targets_TNJ, _log_shares(candidate_NJF, x_TF)) - value_N
        sweeps += 1
        falls_N = ~(gain_N >= 0)  # true for NaN
        if sweeps > _MOST_HALVINGS or not bool(falls_N.any()):
            break
        scale_N = torch.where(falls_N, scale_N / 2, scale_N)
    kept_NJF = torch.where(falls_N[:, None, None], weight_NJF, candidate_NJF)
    return _Climb(kept_NJF, torch.where(falls_N, 0.0, gain_N), sweeps)


def _newton_step(targets_TNJ: Tensor, shares_TNJ: Tensor, x_TF: Tensor) -> Tensor:
    """(X' W X)^-1 X' (h - w g) for each node: w is a case's weight there, W the curvature of ln softmax.

    The same constant added to all children's logits changes nothing; a small ridge keeps that direction solvable.
    """
    mass_TN = targets_TNJ.sum(-1)
    error_TNJ = targets_TNJ - mass_TN[..., None] * shares_TNJ
    slope_NJF = torch.einsum("tnj,tf->njf", error_TNJ, x_TF)
    curvature_TNJK = torch.diag_embed(shares_TNJ) - shares_TNJ[..., :, None] * shares_TNJ[..., None, :]
    curvature_TNJK = mass_TN[..., None, None] * curvature_TNJK
    weighed = torch.einsum("tnjk,tf->tnjkf", curvature_TNJK, x_TF)
    hessian = torch.einsum("tnjkf,tg->njfkg", weighed, x_TF)
    num_nodes, num_children, num_features = slope_NJF.shape
    size = num_children * num_features
    hessian = hessian.reshape(num_nodes, size, size)
    tiny, epsilon = torch.finfo(x_TF.dtype).tiny, torch.finfo(x_TF.dtype).eps
    ridge_N = epsilon**0.5 * hessian.diagonal(dim1=1, dim2=2).amax(-1) + tiny**0.5
    hessian = hessian + ridge_N[:, None, None] * torch.eye(size, dtype=x_TF.dtype, device=x_TF.device)
    return torch.linalg.solve(hessian, slope_NJF.reshape(num_nodes, size, 1)).view_as(slope_NJF)


def _expected(targets_TNJ: Tensor, log_shares_TNJ: Tensor) -> Tensor:
    return (targets_TNJ * log_shares_TNJ).sum((0, 2))


def _log_shares(gate_NJF: Tensor, x_TF: Tensor) -> Tensor:
    """ln g_{j|n} of every case, [T, N, J]."""
    return torch.log_softmax(torch.einsum("tf,njf->tnj", x_TF, gate_NJF), dim=-1)


def _log_normal(squared: Tensor, log_variance: Tensor) -> Tensor:
    return -0.5 * (math.log(2 * math.pi) + log_variance + squared * (-log_variance).exp())
