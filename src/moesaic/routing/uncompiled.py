"""What torch.compile leaves to Python. Only a compilation imports it: the decorator takes seconds to load."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from moesaic.config.capacity import CapacityConfig
from moesaic.config.router import RouterConfig
from moesaic.routing import capacity
from moesaic.routing.routing import RoutingDecision

Limit = Callable[[RoutingDecision, CapacityConfig, RouterConfig, Tensor | None], RoutingDecision]

# Its shapes depend on the load: compiling it takes minutes and gains nothing.
limit = cast(Limit, torch.compiler.disable(capacity.limit))
