"""Engines against each other on this machine, taking turns; see README.md.

    python benchmarks/peers/run.py A --models MODELS --gguf GGUF --peers PEERS [--rounds 5]
        [--engines moesaic,llama.cpp] [--variants "4-bit;Q4_0"] [--cases "decode 1,prefill 512"] [--json FILE]

Every sample stands between two readings of the memory's bandwidth, and is compared with the bound that these imply for
the bytes that this engine's format must read. Rounds go through all cases and engines, each from another one on.
"""

import argparse
import json
import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from contender import Case, Contender, EngineError
from peers import PEERS, MissingPeerError, Setup
from table import add_bounds, print_table, summarize

from moesaic.bench.machine import ReadProbe, measure_machine
from moesaic.cli import output
from moesaic.engine.memory import available_bytes
from moesaic.hub import read_config

CASES = "decode 1,decode 8,decode 32,prefill 512"
SPARE_BYTES = 6_000_000_000  # memory that has to be free before another engine starts


class Arena:
    """The contenders that have started; the one that rested longest ends where memory runs short."""

    def __init__(self) -> None:
        self._started: deque[Contender] = deque()
        self.failed: dict[str, str] = {}

    def prepare(self, contender: Contender) -> bool:
        """Have it loaded; false for one that failed, now or before."""
        if contender.name in self.failed:
            return False
        if contender in self._started:
            self._started.remove(contender)
        else:
            while self._started and (available_bytes() or SPARE_BYTES) < SPARE_BYTES:
                self._started.popleft().source.close()
            try:
                contender.source.start()
            except EngineError as error:
                return self._fail(contender, error)
            except BaseException:  # the run ends while this one loads
                contender.source.close()
                raise
        self._started.append(contender)
        return True

    def sample(self, contender: Contender, case: Case) -> float | None:
        """Tokens a second; None from one that fails."""
        try:
            return contender.source.sample(case)
        except EngineError as error:
            self._fail(contender, error)
            return None

    def _fail(self, contender: Contender, error: EngineError) -> Literal[False]:
        self.failed[contender.name] = str(error)
        contender.source.close()
        return False

    def close(self) -> None:
        for contender in self._started:
            contender.source.close()


def find_contenders(setup: Setup, model: str, engines: Sequence[str], variants: Sequence[str]) -> list[Contender]:
    """All that are installed; the others are said on stderr with the command that installs them."""
    found = []
    for engine in engines:
        try:
            found += PEERS[engine](setup, model)
        except MissingPeerError as missing:
            output.talk(f"{engine} is not installed; run `{missing}`")
    return [contender for contender in found if not variants or contender.variant in variants]


def measure(
    contenders: Sequence[Contender], cases: Sequence[Case], rounds: int, probe: ReadProbe, arena: Arena
) -> list[dict[str, Any]]:
    """All samples, in the order in which they were taken."""
    samples = []
    with output.progress("sampling", total=rounds * len(cases) * len(contenders)) as advance:
        for number in range(rounds):
            for case in cases:
                for contender in _from(contenders, number):
                    advance(1, note=f"{contender.name}, {case.name}")
                    if not arena.prepare(contender):
                        continue
                    before = probe.bandwidth()
                    speed = arena.sample(contender, case)
                    bandwidth = (before + probe.bandwidth()) / 2
                    if speed is not None:
                        samples.append(_sample(contender, case, speed, bandwidth, number))
    return samples


def _from(contenders: Sequence[Contender], first: int) -> list[Contender]:
    start = first % max(1, len(contenders))
    return [*contenders[start:], *contenders[:start]]


def _sample(contender: Contender, case: Case, speed: float, bandwidth: float, number: int) -> dict[str, Any]:
    return {
        "engine": contender.engine,
        "variant": contender.variant,
        "case": case.name,
        "tokens_per_second": speed,
        "bandwidth": bandwidth,
        "round": number,
        "at": time.time(),
    }


def _name(sample: dict[str, Any]) -> str:
    return f"{sample['engine']} {sample['variant']}"


def parser_of(description: str, *, engines: str, variants: str) -> argparse.ArgumentParser:
    """With what says whom to sample: which model, where it and the engines lie; the defaults of two options."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", help="a name that make_models.py knows")
    parser.add_argument("--models", type=Path, required=True, help="what make_models.py wrote")
    parser.add_argument("--gguf", type=Path, required=True, help="what to_gguf.py wrote")
    parser.add_argument("--peers", type=Path, required=True, help="what install.py wrote")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--engines", default=engines, help="comma-separated (%(default)s)")
    parser.add_argument(
        "--variants", default=variants, help="only these formats, separated by semicolons; '': all (%(default)s)"
    )
    return parser


def chosen_contenders(options: argparse.Namespace) -> list[Contender]:
    """Those that the options of `parser_of` name, as far as they are installed."""
    setup = Setup(models=options.models, gguf=options.gguf, peers=options.peers, threads=options.threads)
    variants = options.variants.split(";") if options.variants else []
    return find_contenders(setup, options.model, options.engines.split(","), variants)


def main() -> None:
    """Take the samples in turns, print the table, and write all samples where asked."""
    parser = parser_of("Engines against each other on this machine.", engines=",".join(PEERS), variants="")
    parser.add_argument("--cases", default=CASES, help="comma-separated (%(default)s)")
    parser.add_argument("--json", type=Path, help="write everything, every sample included, to this file")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by the way on which engines that are stopped are ended
    config, cases = read_config(options.models / options.model), [Case.named(name) for name in options.cases.split(",")]
    contenders = chosen_contenders(options)
    machine, probe, arena = measure_machine(options.threads), ReadProbe(options.threads), Arena()
    try:
        samples = measure(contenders, cases, options.rounds, probe, arena)
    finally:
        arena.close()
    for name, why in arena.failed.items():
        output.talk(f"{name} failed: {why}")
    if not samples:
        sys.exit("no samples; see above")
    able = [contender for contender in contenders if contender.name in {_name(sample) for sample in samples}]
    add_bounds(samples, able, config, machine)
    rows = summarize(samples, able, cases, config)
    print_table(options.model, machine, rows, cases, samples)
    if options.json:
        document = {"model": options.model, "machine": machine._asdict(), "rows": rows, "failed": arena.failed}
        options.json.write_text(json.dumps(document | {"samples": samples}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
