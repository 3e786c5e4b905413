"""How much memory this process used at most: of the machine, or of the GPU it computes on."""

import resource
import sys
from pathlib import Path

import torch

_CLEAR_PEAK = "5"  # what /proc/PID/clear_refs takes to set the peak back to the present use


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new measurement. Without Linux's /proc the peak of the whole process stands instead."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text(_CLEAR_PEAK)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory since `reset_peak_memory`, in bytes: resident, or on a GPU what its tensors took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
