"""What clusters get of their devices' stated rates."""

from dataclasses import replace

from moesaic.plan.flops import Op
from moesaic.plan.hardware import Device, Efficiency
from moesaic.plan.roofline import OpTime, op_time

KERNELS = Efficiency(memory=3000 / 3350, network=0.88)
"""Of published micro-benchmarks on H800: 3,000 GB/s of the 3,350 that NVIDIA states (deepseek-ai/FlashMLA 066b5ba,
README, read 2026-11), and 43 to 47 of 50 GB/s between nodes: 43 over 16 ranks (deepseek-ai/DeepEP 0297fc8,
docs/legacy.md, read 2026-11), up to 47 over 32 and 64 in its first release [M]. Later releases state 50 to 58 there,
which counts what stays in the node."""

ATTENTION = 660 / 989
"""Of stated operations a second what attention gets: 660 of 989 TFLOP/s (deepseek-ai/FlashMLA 066b5ba, README, read
2026-11)."""

OBSERVED = replace(KERNELS, compute=0.275, network=0.88 * 0.6)
"""What fits disclosed speeds of large clusters best (`moesaic plan disclosed`): all that keeps them from their kernels'
rates in one number for computing and one for sending."""

TRAINING = 0.7
"""Of `OBSERVED.compute` what training gets, by the same fit."""


def observed(device: Device, *, training: bool = False) -> Device:
    """The device as clusters use it."""
    share = OBSERVED.compute * (TRAINING if training else 1.0)
    return replace(device, efficiency=replace(OBSERVED, compute=share))


def timed(op: Op, device: Device) -> OpTime:
    """An operation's time; attention has kernels of its own, whatever matrix products get."""
    if op.name != "attention":
        return op_time(op, device)
    return op_time(op, replace(device, efficiency=replace(device.efficiency, compute=ATTENTION)))
