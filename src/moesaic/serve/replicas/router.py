"""Ray Serve's choice of a replica, made by the prompt's beginning."""

from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from moesaic.serve.replicas.prefixes import PrefixMap


class PrefixRouter(RequestRouter):
    """Ranks replicas by PrefixMap; requests name their beginnings as `prefix`.

    Ray asks in the process of the handle, so that one map sees all requests of an ingress.
    """

    def initialize_state(self, **settings: Any) -> None:
        """Ray calls this with the settings of the deployment: those of PrefixMap."""
        self._map = PrefixMap(**settings)
        self._running: Counter[ReplicaID] = Counter()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of one replica each."""
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        running = {name: self._running[replica.replica_id] for name, replica in by_name.items()}
        prefix = pending_request.kwargs.get("prefix", []) if pending_request else []
        return [[by_name[name]] for name in self._map.choose(prefix, running)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """The request is on its way."""
        self._running[replica_id] += 1
        self._map.remember(pending_request.kwargs.get("prefix", []), replica_id.unique_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """It has ended, in whatever way."""
        self._running[replica_id] = max(0, self._running[replica_id] - 1)
