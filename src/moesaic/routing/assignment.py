"""The best even assignment of tokens to experts, exactly: shortest augmenting paths over experts.

T tokens, E experts.
"""

import numpy as np


def balanced_assignment(values_TE: np.ndarray) -> np.ndarray:
    """The expert of each token, int64, with the largest sum of values where experts get T / E tokens, down or up.

    Tokens come one by one. Each goes where that costs least, moving others from expert to expert if need be, and ends
    at an expert that is still short; so the assignment of all that came is the best at any time (successive shortest
    paths, Ahuja, Magnanti and Orlin, Network Flows, sec. 9.7). Values must be finite. The time grows with T E^2, and
    with T^2 for the search of those to move.
    """
    num_tokens, num_experts = values_TE.shape
    moves = _Moves(values_TE)
    for token in range(num_tokens):
        # The first T / E places of every expert must be filled before any has one more.
        limit = num_tokens // num_experts + (token >= num_tokens // num_experts * num_experts)
        moves.admit(token, moves.counts_E < limit)
    return moves.expert_ids_T


class _Moves:
    """The tokens admitted so far, and for each two experts the cheapest token to move from one to the other."""

    def __init__(self, values_TE: np.ndarray) -> None:
        num_tokens, num_experts = values_TE.shape
        self.values_TE = values_TE
        self.expert_ids_T = np.full(num_tokens, -1, dtype=np.int64)
        self.counts_E = np.zeros(num_experts, dtype=np.int64)
        self.costs_EE = np.full((num_experts, num_experts), np.inf)
        self.tokens_EE = np.zeros((num_experts, num_experts), dtype=np.int64)
        # Differences below this are rounding: following them could go round in a circle.
        self.rounding = 1e-14 * float(np.abs(values_TE).max(initial=0.0))

    def admit(self, token: int, is_open_E: np.ndarray) -> None:
        """Give a token a place, the last of those who move going to an open expert."""
        distances_E, before_E = self._shortest(token)
        expert = int(np.where(is_open_E, distances_E, np.inf).argmin())
        self.counts_E[expert] += 1
        left: list[int] = []
        while before_E[expert] >= 0:
            source = int(before_E[expert])
            self._put(int(self.tokens_EE[source, expert]), expert)
            left.append(source)
            expert = source
        self._put(token, expert)
        for source in left:
            self._search(source)

    def _shortest(self, token: int) -> tuple[np.ndarray, np.ndarray]:
        """What it costs to end at each expert, and the expert before it on the way; -1 where it is the first."""
        distances_E = -self.values_TE[token]
        before_E = np.full(len(distances_E), -1)
        experts_E = np.arange(len(distances_E))
        for _ in range(len(distances_E)):
            through_EE = distances_E[:, None] + self.costs_EE
            sources_E = through_EE.argmin(axis=0)
            best_E = through_EE[sources_E, experts_E]
            is_better_E = best_E < distances_E - self.rounding
            if not is_better_E.any():
                break
            distances_E = np.where(is_better_E, best_E, distances_E)
            before_E = np.where(is_better_E, sources_E, before_E)
        return distances_E, before_E

    def _put(self, token: int, expert: int) -> None:
        """Give a token to an expert, from which it could now be moved away."""
        self.expert_ids_T[token] = expert
        costs_E = self.values_TE[token, expert] - self.values_TE[token]
        is_cheaper_E = costs_E < self.costs_EE[expert]
        is_cheaper_E[expert] = False
        self.costs_EE[expert, is_cheaper_E] = costs_E[is_cheaper_E]
        self.tokens_EE[expert, is_cheaper_E] = token

    def _search(self, expert: int) -> None:
        """Find anew who could be moved away from an expert that has lost a token."""
        mine = np.flatnonzero(self.expert_ids_T == expert)
        costs = self.values_TE[mine, expert, None] - self.values_TE[mine]
        best_E = costs.argmin(axis=0)
        self.costs_EE[expert] = costs[best_E, np.arange(costs.shape[1])]
        self.tokens_EE[expert] = mine[best_E]
        self.costs_EE[expert, expert] = np.inf
