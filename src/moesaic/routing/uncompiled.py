"""What torch.compile leaves to Python. Only a compilation imports it: the decorator takes seconds to load."""

import torch

from moesaic.routing import capacity

# Its shapes depend on the load: compiling it takes minutes and gains nothing.
limit = torch.compiler.disable(capacity.limit)
