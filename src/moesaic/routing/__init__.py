"""Deciding which expert serves which token, and keeping the load even."""

from moesaic.routing.routing import RoutingDecision, RoutingTape, Rows, TokenFacts, TokenOrder

__all__ = ["RoutingDecision", "RoutingTape", "Rows", "TokenFacts", "TokenOrder"]
