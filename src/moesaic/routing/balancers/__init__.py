"""The ways to keep experts evenly loaded, one decorated function each.

Losses that even the load out are reported so that 1.0 is perfect balance, whatever K; the others (router_z, entropy,
...) as their equations have them. Selection biases and penalties move once a step, without gradients.
"""

from moesaic.routing.balancers.counting import choice_counts
from moesaic.routing.balancers.load_losses import (
    communication_balance_loss,
    device_balance_loss,
    importance_loss,
    load_loss,
    sequence_balance_loss,
    switch_balance_loss,
)
from moesaic.routing.balancers.loss import BALANCE_LOSSES, BalanceLoss, mean_over_layers, refuse_unfit
from moesaic.routing.balancers.moves import move_penalty, update_selection_bias
from moesaic.routing.balancers.regularizers import (
    batch_entropy_loss,
    entropy_loss,
    orthogonal_loss,
    relu_sparsity_loss,
    router_z_loss,
    similarity_loss,
)

__all__ = [
    "BALANCE_LOSSES",
    "BalanceLoss",
    "batch_entropy_loss",
    "choice_counts",
    "communication_balance_loss",
    "device_balance_loss",
    "entropy_loss",
    "importance_loss",
    "load_loss",
    "mean_over_layers",
    "move_penalty",
    "orthogonal_loss",
    "refuse_unfit",
    "relu_sparsity_loss",
    "router_z_loss",
    "sequence_balance_loss",
    "similarity_loss",
    "switch_balance_loss",
    "update_selection_bias",
]
