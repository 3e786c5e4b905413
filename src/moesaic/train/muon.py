"""Muon: momentum, made orthogonal matrix by matrix.

E matrices in a tensor, O outputs, I inputs.
"""

import math

import torch
from torch import Tensor

from moesaic.train.precision import Copies

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # steepest at 0, so that small singular values grow in few steps
NEWTON_SCHULZ_STEPS = 5
ELEMENTS_AT_ONCE = 2**22  # of the matrices that are made orthogonal together


class Muon:
    """Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/) of one tensor of equal matrices.

    Nesterov momentum, Newton-Schulz, then Moonlight's decay and scale (arXiv:2502.16982, eq. 4): an update has the
    root mean square of AdamW's, so that AdamW's learning rate and weight decay serve both.

    A matrix of m x n, m <= n, costs 5 (4 m^2 n + 2 m^3) FLOPs a step however few tokens its expert saw; forward and
    backward cost 6 m n a token. So this pays with steps of several times m tokens an expert.
    """

    def __init__(self, master: Tensor, *, matrix_shape: tuple[int, int], momentum: float, weight_decay: float) -> None:
        self.master, self.matrices_EOI = master, master.view(-1, *matrix_shape)
        self.momentum, self.weight_decay = momentum, weight_decay
        self.scale = 0.2 * math.sqrt(max(matrix_shape))
        self.state = {"momentum_buffer": torch.zeros_like(master)}

    def update(self, gradient: Tensor, learning_rate: float, clip: float, copies: Copies) -> None:
        """Multiply the gradient by `clip`, move the tensor by it, and bring its copies up to date.

        The gradient's memory is used up.
        """
        buffer = self.state["momentum_buffer"].view_as(self.matrices_EOI)
        size = self.matrices_EOI[0].numel()
        at_once = max(1, ELEMENTS_AT_ONCE // size)
        for start in range(0, len(self.matrices_EOI), at_once):
            some = slice(start, start + at_once)
            slope, momentum, matrices = gradient.view_as(buffer)[some], buffer[some], self.matrices_EOI[some]
            if clip < 1:  # multiplying by 1 would be a pass for nothing
                slope.mul_(clip)
            momentum.lerp_(slope, 1 - self.momentum)
            update = orthogonalize(slope.lerp_(momentum, self.momentum))
            matrices.mul_(1 - learning_rate * self.weight_decay)
            matrices.add_(update, alpha=-learning_rate * self.scale)
            copies.follow(self.master, slice(start * size, (start + at_once) * size))


def orthogonalize(matrices_EOI: Tensor) -> Tensor:
    """Each matrix with its singular values brought near 1 (0.7 to 1.2), bf16: Newton-Schulz with quintic steps.

    bf16 is enough, since the values only come near 1 anyway, and twice to ten times as fast where matrices are
    multiplied in bf16.
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices_EOI.shape[-2] > matrices_EOI.shape[-1]
    x = matrices_EOI.bfloat16()
    x = x.mT if is_tall else x  # the smaller Gram matrix
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # singular values of 1 at most
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
