"""The numbers of one AdamW step, computed once a step in double precision."""

import math
from typing import NamedTuple


class AdamStep(NamedTuple):
    """What one step of AdamW (arXiv:1711.05101, alg. 2) multiplies and adds; the moments' bias corrections included.

    clip: what the gradient is multiplied by. kept: what decay leaves of the weight. fresh1, fresh2: 1 - beta1 and
    1 - beta2, what the moments take of the newest gradient. rate: the learning rate over the first moment's correction.
    second_root: the root of the second moment's correction. newest: what the average takes of the newest weight.
    """

    clip: float
    kept: float
    fresh1: float
    beta2: float
    fresh2: float
    rate: float
    second_root: float
    eps: float
    newest: float

    @classmethod
    def number(
        cls,
        step: int,
        *,
        learning_rate: float,
        betas: tuple[float, float],
        weight_decay: float,
        clip: float = 1.0,
        newest: float = 1.0,
        eps: float = 1e-8,
    ) -> "AdamStep":
        """Of step `step`, counted from 1."""
        beta1, beta2 = betas
        return cls(
            clip=clip,
            kept=1 - learning_rate * weight_decay,
            fresh1=1 - beta1,
            beta2=beta2,
            fresh2=1 - beta2,
            rate=learning_rate / (1 - beta1**step),
            second_root=math.sqrt(1 - beta2**step),
            eps=eps,
            newest=newest,
        )
