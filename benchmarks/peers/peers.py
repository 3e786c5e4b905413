"""The engines that run.py compares: one function each, which lists what it would run for a model.

Raises MissingPeerError, with the command that installs it (see README.md for what these build).
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from contender import Case, Contender, Program, Worker
from held import of_folder, of_gguf
from vllm_threads import vllm_threads

HERE = Path(__file__).parent
GGUF_KINDS = ("bf16", "Q8_0", "Q4_0", "Q4_K_M")


class MissingPeerError(Exception):
    """An engine that is not there; the command that puts it there."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Folders of models, of GGUF files and of installed peers (install.py), and processors for each engine."""

    models: Path
    gguf: Path
    peers: Path
    threads: int


def moesaic(setup: Setup, model: str) -> list[Contender]:
    """Ours: as the files are, and packed in 8 and 4 bits as it loads."""
    found = []
    for name, bits in (("bf16", ()), ("8-bit", ("8",)), ("4-bit", ("4",))):
        worker = _worker("moesaic", sys.executable, setup, str(setup.models / model), *bits)
        found.append(Contender("moesaic", name, worker, lambda worker=worker: worker.facts["packed_bytes"]))
    return found


def llama_cpp(setup: Setup, model: str) -> list[Contender]:
    """Each format, with weights rearranged as they load and without where that makes a difference."""
    programs = setup.peers / "llama.cpp/build/bin"
    for program in ("llama-bench", "llama-batched-bench"):
        _require(programs / program, setup, "llama.cpp")
    found = []
    for kind in GGUF_KINDS:
        path = setup.gguf / f"{model}-{kind}.gguf"
        for name, repack, tiles in _llama_ways(kind):
            program = _llama_program(programs, path, setup.threads, repack=repack, tiles=tiles)
            found.append(Contender("llama.cpp", name, program, partial(of_gguf, path)))
    return found


def _llama_ways(kind: str) -> list[tuple[str, bool, bool]]:
    """What to call it, whether weights are rearranged as they load, and whether they may be for AMX."""
    if kind == "bf16":
        return [(kind, True, True)]
    ways = [(kind, True, True), (f"{kind}, not repacked", False, True)]
    has_tiles = "amx_int8" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return [*ways, (f"{kind}, without AMX", True, False)] if has_tiles else ways


def ik_llama_cpp(setup: Setup, model: str) -> list[Contender]:
    """The fork with other kernels for few bits, through its Python package."""
    python = setup.peers / "ik_llama.cpp/bin/python"
    _require(python, setup, "ik_llama.cpp")
    found = []
    for kind in GGUF_KINDS:
        path = setup.gguf / f"{model}-{kind}.gguf"
        for repack in (True, False):
            worker = _worker("ik", python, setup, str(path), str(int(repack)), environment={"PYTHONPATH": ""})
            name = kind if repack else f"{kind}, not repacked"
            found.append(Contender("ik_llama.cpp", name, worker, partial(of_gguf, path)))
    return found


def vllm(setup: Setup, model: str) -> list[Contender]:
    """Its CPU build in bf16, and in 8 and 4 bits on what to_int8.py and `moesaic quantize` wrote, where they did."""
    return _vllm(setup, model, "vllm", "")


def vllm_zentorch(setup: Setup, model: str) -> list[Contender]:
    """The same with AMD's kernels (worker_vllm.py has it take them on other processors too)."""
    folder = setup.peers / "zentorch"
    _require(folder, setup, "zentorch")
    return _vllm(setup, model, "vllm+zentorch", str(folder))


def transformers(setup: Setup, model: str) -> list[Contender]:
    """In this environment, in bf16, with either way to compute experts."""
    if find_spec("transformers") is None:
        raise MissingPeerError(f"{sys.executable} -m pip install transformers==5.23.0")
    path = setup.models / model
    return [
        Contender(
            "transformers",
            f"bf16, {way}",
            _worker("transformers", sys.executable, setup, str(path), way),
            partial(of_folder, path),
        )
        for way in ("grouped_mm", "eager")
    ]


PEERS: dict[str, Callable[[Setup, str], list[Contender]]] = {
    "moesaic": moesaic,
    "llama.cpp": llama_cpp,
    "ik_llama.cpp": ik_llama_cpp,
    "vllm": vllm,
    "vllm+zentorch": vllm_zentorch,
    "transformers": transformers,
}


def _vllm(setup: Setup, model: str, engine: str, python_path: str) -> list[Contender]:
    python = setup.peers / "vllm/bin/python"
    _require(python, setup, "vllm")
    found = []
    for name, folder in (("bf16", model), ("8-bit", f"{model}-8bit"), ("4-bit", f"{model}-4bit")):
        path = setup.models / folder
        if path.is_dir():
            environment = vllm_threads(setup.peers, setup.threads) | {"PYTHONPATH": python_path}
            worker = _worker("vllm", python, setup, str(path), environment=environment)
            found.append(Contender(engine, name, worker, partial(of_folder, path)))
    return found


def _require(path: Path, setup: Setup, name: str) -> None:
    if not path.exists():
        raise MissingPeerError(f"{sys.executable} {HERE / 'install.py'} {setup.peers} {name}")


def _worker(
    name: str, python: str | Path, setup: Setup, *words: str, environment: Mapping[str, str] | None = None
) -> Worker:
    """environment: beside this one's; with a PYTHONPATH wherever another environment's Python runs."""
    environment = {"OMP_NUM_THREADS": str(setup.threads)} | dict(environment or {})
    model, *more = words
    return Worker([str(python), str(HERE / f"worker_{name}.py"), model, str(setup.threads), *more], environment)


def _llama_program(programs: Path, path: Path, threads: int, *, repack: bool, tiles: bool) -> Program:
    environment = [] if tiles else ["env", "GGML_WITHOUT_AMX=1"]

    def command(case: Case) -> list[str]:
        model = ["-m", str(path), "-t", str(threads)]
        if case.kind == "prefill" or case.size == 1:
            tokens = ["-p", str(case.size), "-n", "0"] if case.kind == "prefill" else ["-p", "0", "-n", "128"]
            settings = [*tokens, "-r", "1", "--repack", str(int(repack)), "-o", "jsonl"]
            return [*environment, str(programs / "llama-bench"), *model, *settings]
        many = ["-c", "4096", "-b", "2048", "-ub", "512", "-npp", "32", "-ntg", "32", "-npl", str(case.size)]
        settings = [*many, *([] if repack else ["--no-repack"]), "--output-format", "jsonl"]
        return [*environment, str(programs / "llama-batched-bench"), *model, *settings]

    def read(case: Case, printed: str) -> float:
        answers = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
        return answers[-1]["avg_ts" if case.kind == "prefill" or case.size == 1 else "speed_tg"]

    return Program(command, read)
