"""For models of the package `transformers` (5.23): corrected balance losses, our expert compute, recorded routing.

losses: balance losses per layer, the same however a step is cut | experts: the implementation "moesaic" of their
experts registry | routing: what a model routes, as a moesaic trace | modules: where its experts are | opening: a model
from its folder

Nothing else in moesaic imports transformers, and nothing here is imported with moesaic.
"""

from moesaic.hub.transformers.experts import use_moesaic_experts
from moesaic.hub.transformers.losses import balance_loss, correct_balance_loss
from moesaic.hub.transformers.opening import open_model
from moesaic.hub.transformers.routing import RoutingRecorder, record_routing

__all__ = [
    "RoutingRecorder",
    "balance_loss",
    "correct_balance_loss",
    "open_model",
    "record_routing",
    "use_moesaic_experts",
]
