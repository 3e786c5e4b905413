"""The ways to choose experts. Selection (which) and weighting (how much) are separate: a bias may move only which."""

from moesaic.routing.routers import assigned, drawn, hashed, ragged, sparsemixer, topk
from moesaic.routing.routers.hashed import hash_table
from moesaic.routing.routers.router import ROUTERS, Choice, Rechooser, Router, RouterInput

__all__ = ["ROUTERS", "Choice", "Rechooser", "Router", "RouterInput", "hash_table"]

_REGISTERED = (assigned, drawn, hashed, ragged, sparsemixer, topk)  # importing them is what registers their routers
