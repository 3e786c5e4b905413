"""What a simulation of serving comes to, in the words of those who run and those who use it."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moesaic.plan.cluster.serving import Serving


@dataclass(frozen=True, kw_only=True)
class ServingOutcome:
    """Rates over the whole time and of all devices of a pool; `per_node` of that pool's nodes.

    first_token_s: from asking to the first token. between_tokens_s: of a text being written. busy: the share of time
    that units worked. Percentiles are of requests and of tokens.
    """

    seconds: float
    devices: int
    events: int
    requests: dict[str, int]
    input_per_s: float
    input_per_node_s: float
    computed_input_per_node_s: float
    output_per_s: float
    output_per_node_s: float
    first_token_s: dict[str, float]
    between_tokens_s: dict[str, float]
    tokens_per_user_s: float
    texts_per_rank: float
    prefill_busy: float
    decode_busy: float
    failures: int
    lost_state_bytes: float
    moved_state_bytes: float

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready tree."""
        return asdict(self)


def outcome(simulation: Serving) -> ServingOutcome:
    """Sum a finished simulation up."""
    ledger, pools, seconds = simulation.ledger, simulation.pools, simulation.seconds
    prefill_nodes, decode_nodes = (
        count * unit.ranks / unit.device.per_node
        for count, unit in ((pools.prefills, pools.prefill), (pools.decodes, pools.decode))
    )
    steps, texts = np.array(ledger.step_s), np.array(ledger.step_texts)
    between = _percentiles(steps / pools.tokens_per_step, texts)
    read = ledger.read_tokens + ledger.cached_tokens
    return ServingOutcome(
        seconds=seconds,
        devices=pools.devices,
        events=simulation.clock.num_events,
        requests=requests_by_place(simulation),
        input_per_s=read / seconds,
        input_per_node_s=read / seconds / prefill_nodes,
        computed_input_per_node_s=ledger.read_tokens / seconds / prefill_nodes,
        output_per_s=ledger.written / seconds,
        output_per_node_s=ledger.written / seconds / decode_nodes,
        first_token_s=_percentiles(np.array(ledger.first_s), np.ones(len(ledger.first_s))),
        between_tokens_s=between,
        tokens_per_user_s=1 / between["mean"] if between["mean"] else 0.0,
        texts_per_rank=float(texts.mean()) / pools.decode.ranks if len(texts) else 0.0,
        prefill_busy=min(1.0, sum(unit.busy_s for unit in simulation.prefills) / seconds / pools.prefills),
        decode_busy=min(1.0, sum(unit.busy_s for unit in simulation.decodes) / seconds / pools.decodes),
        failures=ledger.failures,
        lost_state_bytes=ledger.bytes_lost,
        moved_state_bytes=ledger.bytes_received,
    )


def requests_by_place(simulation: Serving) -> dict[str, int]:
    """Where every request is: what began warm and what came since is either finished or in one place."""
    ledger = simulation.ledger
    return {
        "warm": ledger.warm,
        "came": ledger.came,
        "finished": ledger.finished,
        "to_read": len(simulation.to_read),
        "reading": sum(len(unit.batch) for unit in simulation.prefills),
        "moving": simulation.num_moving,
        "to_write": len(simulation.to_write),
        "writing": sum(unit.texts for unit in simulation.decodes),
    }


def _percentiles(values: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """Mean, median and the value that one in a hundred lies above; zeros of nothing."""
    if not len(values) or not weights.sum():
        return {"mean": 0.0, "p50": 0.0, "p99": 0.0}
    order = np.argsort(values)
    share = np.cumsum(weights[order]) / weights.sum()
    at = {f"p{cut:.0f}": float(values[order][np.searchsorted(share, cut / 100)]) for cut in (50, 99)}
    return {"mean": float(np.average(values, weights=weights)), **at}
