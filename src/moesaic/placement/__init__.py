"""Experts -> ranks with replicas, from measured load (numpy only): for the planner and for real deployments.

placed: what a placement is | eplb: DeepSeek's two policies, to the digit | refine: exchanges that even it out further
"""

from moesaic.placement.place import METHODS, place_experts
from moesaic.placement.placed import Placement

__all__ = ["METHODS", "Placement", "place_experts"]
