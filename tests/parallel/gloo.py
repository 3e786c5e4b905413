"""Runs a function on several gloo ranks, each a process, and brings what they returned back. Never hangs.

The processes are forked from one that has imported everything and used no thread yet: four imports of torch at once
take longer than what is tested.
"""

import importlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 100
COLLECTIVE_TIMEOUT_S = 30


def on_ranks(size: int, function: str, argument: Any = None) -> list[Any]:
    """What "module:function"(ranks, argument) returned on each of `size` ranks. Raises when any of them does."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "argument").write_bytes(pickle.dumps(argument))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, "-m", "tests.parallel.gloo", str(size), function, folder]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(size)]


def _rank(rank: int, size: int, function: str, folder: str) -> None:
    import torch.distributed as dist

    from moesaic.parallel import ProcessGroup

    store = f"file://{folder}/store"
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timeout)
    module, name = function.split(":")
    argument = pickle.loads(Path(folder, "argument").read_bytes())
    result = getattr(importlib.import_module(module), name)(ProcessGroup(), argument)
    Path(folder, str(rank)).write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def _main() -> int:
    import torch

    torch.set_num_threads(1)
    size, function, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    importlib.import_module("moesaic.parallel")
    importlib.import_module(function.split(":")[0])
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_rank, args=(rank, size, function, folder), daemon=True) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT_S)
    return max(1 if process.exitcode is None else abs(process.exitcode) for process in processes)


if __name__ == "__main__":
    sys.exit(_main())
