"""Environment of vLLM's processes on so many processors."""

from ctypes.util import find_library
from pathlib import Path


def vllm_threads(peers: Path, threads: int) -> dict[str, str]:
    """As vLLM itself sets it for its worker processes: Intel's OpenMP, which its package brings, threads that stay.

    Preloaded, since torch and vLLM else come with an OpenMP each, whose threads wait in each other's way.
    peers: what install.py wrote.
    """
    own = {"OMP_NUM_THREADS": str(threads)}
    library = peers.resolve() / "vllm/lib/libiomp5.so"
    if not library.exists():
        return own
    malloc = find_library("tcmalloc_minimal")  # where the system has it
    preloaded = f"{library}:{malloc}" if malloc else str(library)
    places = ",".join(map(str, range(threads)))
    affinity = f"granularity=fine,explicit,proclist=[{places}]"
    return own | {"LD_PRELOAD": preloaded, "KMP_AFFINITY": affinity, "KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0"}
