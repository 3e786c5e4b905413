"""The same step on several ranks: gloo processes on this machine, each with the user's own builder. Never hangs."""

import multiprocessing
import os
import pickle
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moesaic.train.lint.patterns import lopsided
from moesaic.train.lint.report import NotMeasured
from moesaic.train.lint.stand import Stand

TIMEOUT_S = 300.0


class Elsewhere(NamedTuple):
    """How to build the set-up anew in other processes. size: how many; below 2 for none."""

    build: Callable[[], Any]
    size: int

    def lopsided_step(self, stand: Stand) -> tuple[Tensor, Tensor]:
        """The gradients of routers, and of all outside the blocks, of a step in which every rank has the same batch.

        Raises NotMeasured where the builder cannot be called in another process, or a process fails.
        """
        if self.size < 2:
            raise NotMeasured("asked for less than 2 ranks")
        try:
            pickle.dumps(self.build)  # as starting a process will
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise NotMeasured(
                f"the builder cannot be sent to other processes ({error}); define it at the top of a module"
            ) from error
        with tempfile.TemporaryDirectory() as folder:
            job = Path(folder)
            self._run(job, dict(stand.model.state_dict()), stand.set_up.batch)
            return torch.load(job / "gradients", weights_only=True)

    def _run(self, job: Path, *start: Any) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=_rank, args=(rank, self.size, port, job, self.build, *start), daemon=True)
            for rank in range(self.size)
        ]
        for process in processes:
            process.start()
        _wait(processes, job / "gradients")
        for process in processes:
            process.terminate()
            process.join()
        if not (job / "gradients").exists():
            said = [path.read_text(encoding="utf-8") for path in sorted(job.glob("error-*"))]
            raise NotMeasured(f"{self.size} ranks did not finish: {said[0] if said else 'they took too long'}")


def _wait(processes: Sequence[BaseProcess], result: Path) -> None:
    """Until the result is there, or one has failed, for which the others would wait."""
    deadline = time.monotonic() + TIMEOUT_S
    while not result.exists() and (running := [process for process in processes if process.is_alive()]):
        if time.monotonic() > deadline or any(process.exitcode for process in processes):
            return
        wait([process.sentinel for process in running], timeout=1.0)


def _rank(
    rank: int, size: int, port: int, job: Path, build: Callable[[], Any], state: dict[str, Tensor], batch: Any
) -> None:
    """One process. What a rank of torchrun finds in its environment is there before the builder runs.

    It leaves without taking anything down: where a model in DDP is freed after its process group, torch may wait for a
    thread of its own for ever.
    """
    import torch.distributed as dist

    from moesaic.train.lint.suite import set_up_of

    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"})
    torch.set_num_threads(1)
    exit_code = 1
    try:
        # By a file: another process may have taken the port since it was found free, and ranks would wait for it.
        meeting = (job / "meeting").as_uri()
        dist.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT_S)
        )
        set_up = set_up_of(build())
        set_up.model.load_state_dict(state)
        stand = Stand(set_up)
        gradients = stand.run(lopsided(stand.num_experts), [batch]).gradients
        if rank == 0:
            torch.save((stand.routers(gradients), stand.others(gradients)), job / "unfinished")
            (job / "unfinished").rename(job / "gradients")
        dist.destroy_process_group()
        exit_code = 0
    except Exception as error:
        (job / f"error-{rank}").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
    finally:
        os._exit(exit_code)
