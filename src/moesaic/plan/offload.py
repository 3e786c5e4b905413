"""Experts that lie in the host's memory or on a disk: how often they are missed, and what that costs a step.

E experts of a layer, K chosen, C kept near.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from moesaic.checks import require
from moesaic.config import ModelConfig, MoeConfig
from moesaic.plan.formats import Formats
from moesaic.plan.hardware import Machine
from moesaic.plan.routing import Routing, Shares, Uniform

Policy = Literal["random", "static", "lru"]
MISS_S = 20e-6
"""What one transfer takes besides its bytes [M]."""
PCIE_BYTES = 25e9
"""What a device reads from its host where its entry does not say: PCIe 4, as it is in use."""


def hit_rate(shares_E: Sequence[float] | np.ndarray, cached: int, policy: Policy = "lru") -> float:
    """The share of choices that fall on experts which are kept, C of E, where choices are independent.

    random: C / E. static: the C busiest are kept, sum of the C largest shares / K. lru: those chosen last, by Che's
    approximation: the time t with sum_i (1 - exp(-q_i t)) = C, and hits of expert i are 1 - exp(-q_i t) (Che, Tung and
    Wang, doi:10.1109/JSAC.2002.801752). Texts repeat experts more than that, so it is a floor for lru.
    """
    shares = np.asarray(shares_E, dtype=float)
    require(0 <= cached <= len(shares), f"{cached} experts kept of {len(shares)}; use 0 to {len(shares)}")
    if cached == len(shares):
        return 1.0
    if policy == "random" or cached == 0:
        return cached / len(shares)
    if policy == "static":
        return float(np.sort(shares)[::-1][:cached].sum() / shares.sum())
    hits = 1.0 - np.exp(-shares * _characteristic_time(shares, cached))
    return float((shares * hits).sum() / shares.sum())


def _characteristic_time(shares: np.ndarray, cached: int) -> float:
    """t of Che's approximation, by bisection; experts that are never chosen are never kept."""
    reachable = int(np.count_nonzero(shares))
    if cached >= reachable:
        return math.inf
    low, high = 0.0, 1.0
    while (1.0 - np.exp(-shares * high)).sum() < cached:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        below = (1.0 - np.exp(-shares * middle)).sum() < cached
        low, high = (middle, high) if below else (low, middle)
    return high


@dataclass(frozen=True, kw_only=True)
class Tier:
    """Where experts lie: how many of each layer, and bytes a second on their way to where they are computed."""

    name: Literal["device", "host", "ssd"]
    experts: int
    bandwidth: float


class Offload(NamedTuple):
    """How experts are spread over memories, how often one is found near, and what fetching the others adds to a step.

    hit: of the choices of one text; seconds: of one step; missed_bytes: of it. computed_on_host: whether products of
    missing experts are quicker where they lie than their weights are fetched.
    """

    tiers: tuple[Tier, ...]
    hit: float
    missed_bytes: float
    seconds: float
    computed_on_host: bool


def offload(
    config: ModelConfig,
    formats: Formats,
    machine: Machine,
    near_bytes: float,
    batch: float,
    *,
    routing: Routing | None = None,
    policy: Policy = "lru",
) -> Offload | None:
    """Experts kept within `near_bytes` of the devices, the others in the host's memory, and then on its disk.

    None where all fit near, or where they fit nowhere. A step of a batch misses distinct experts: each is fetched once.
    """
    moes = [config.layers[index].feed_forward for index in config.moe_layers]
    assert all(isinstance(moe, MoeConfig) for moe in moes), "moe_layers says so"
    if not moes:
        return None
    moe = next(moe for moe in moes if isinstance(moe, MoeConfig))
    of_one = _expert_bytes(moe, config.hidden_size, formats)
    near = min(moe.num_experts, max(0, int(near_bytes / (of_one * len(moes)))))
    if near == moe.num_experts:
        return None
    tiers = _tiers(machine, moe.num_experts, near, of_one * len(moes))
    if tiers is None:
        return None
    shares = (
        routing.of(moe, 0)
        if isinstance(routing, Shares)
        else np.full(moe.num_experts, moe.router.top_k / moe.num_experts)
    )
    hit = hit_rate(shares, near, policy)
    distinct = (routing or Uniform()).distinct(moe, config.moe_layers[0], batch)
    missed = distinct * (1 - hit) * len(moes)
    far = moe.num_experts - near
    fetching = sum(
        missed * tier.experts / far * (of_one / tier.bandwidth + MISS_S) for tier in tiers if tier.name != "device"
    )
    device = machine.device
    on_host = _is_on_host(machine, device.host_link or PCIE_BYTES)
    return Offload(tiers, hit, missed * of_one, fetching, on_host)


def _is_on_host(machine: Machine, link: float) -> bool:
    """At a batch near 1 the host's processor reads an expert as fast as its memory gives it, and sends D numbers."""
    return machine.host_bandwidth > link


def _expert_bytes(moe: MoeConfig, size: int, formats: Formats) -> float:
    return sum(formats.tensor_bytes(spec) for spec in moe.tensors("", size) if spec.role == "experts") / moe.num_experts


def _tiers(machine: Machine, num_experts: int, near: int, of_one: float) -> tuple[Tier, ...] | None:
    """of_one: bytes of one expert of every layer."""
    device = machine.device
    link = (device.host_link or PCIE_BYTES) * machine.count
    if device.host_link == 0 and device.kind in ("cpu", "mac"):
        link = machine.host_bandwidth or device.bandwidth
    on_host = min(num_experts - near, int(machine.host_bytes / of_one))
    on_disk = num_experts - near - on_host
    if on_disk * of_one > machine.ssd_bytes:
        return None
    kept = (
        Tier(name="device", experts=near, bandwidth=device.bandwidth),
        Tier(name="host", experts=on_host, bandwidth=link),
        Tier(name="ssd", experts=on_disk, bandwidth=min(link, machine.ssd_bandwidth or link)),
    )
    return tuple(tier for tier in kept if tier.experts)
