"""The ways to choose experts. Selection (which) and weighting (how much) are separate: a bias may move only which."""

from moesaic.routing.routers import topk as _topk  # registers its routers  # noqa: F401
from moesaic.routing.routers.router import ROUTERS, Choice, Router, RouterInput

__all__ = ["ROUTERS", "Choice", "Router", "RouterInput"]
