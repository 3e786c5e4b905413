"""How much memory this process used at most."""

import resource
import sys
from pathlib import Path

_CLEAR_PEAK = "5"  # what /proc/PID/clear_refs takes to set the peak back to the present use


def reset_peak_memory() -> None:
    """Begin a new measurement. Without Linux's /proc the peak of the whole process stands instead."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text(_CLEAR_PEAK)


def peak_memory_bytes() -> int:
    """The most resident memory since `reset_peak_memory`, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
