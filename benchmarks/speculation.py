"""How much faster drafts make texts, and how little slower where they are wrong: with and without, taking turns.

    python benchmarks/speculation.py MODEL [--bits 4] [--draft-model MODEL] [--clients 1,8] [--tokens 256] [--rounds 5]
        [--workloads edit,loop,drawn,wrong] [--drafts n-gram,known,model] [--no-guard] [--json FILE]

Workloads: "edit": a file of code, and the beginning of the same file once more; greedy. Only a model that copies gives
drafts from the text a chance: `right` says how many of the drafts were. "loop": a few tokens over and over; greedy.
"drawn": the edit at temperature 1. "wrong": a prompt in which all pairs of a few tokens occur, at temperature 2: drafts
are found everywhere, and hardly one is right. Drafts: "n-gram"; "model"; "known": what was written the first time,
which is what perfect drafts would give. Ratios: tokens a second with drafts over those without of each round, which of
the two comes first being drawn, their centre and the interval that holds the true one with 95% (see paired.py).
"""

import argparse
import inspect
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from paired import cost

from moesaic.cli import output
from moesaic.data.open_tokenizer import open_tokenizer
from moesaic.data.tokenizer import Tokenizer
from moesaic.engine.engine import Engine
from moesaic.engine.sampling import Sampling
from moesaic.serve.loop.runner import Runner
from moesaic.serve.loop.settings import LoopSettings
from moesaic.serve.request import Progress, Request
from moesaic.serve.speculation.drafter import Drafter, Wanted
from moesaic.serve.speculation.guard import guarded
from moesaic.serve.speculation.model import ModelDrafter, check_same_tokens
from moesaic.serve.speculation.ngram import NgramDrafter

T = TypeVar("T")
Texts = dict[tuple[int, ...], list[int]]
"""What was written behind each prompt."""


class Known(Drafter):
    """Drafts what is known to come."""

    free = True

    def __init__(self, texts: Texts) -> None:
        self._texts = texts

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        return [
            self._texts[each.writing.request.prompt_ids][each.writing.num_new :][: min(each.room, 8)] for each in wanted
        ]


class Ran(NamedTuple):
    """A run of all clients' texts: tokens a second, drafts, and those of them that were right."""

    tokens_per_s: float
    drafted: int
    accepted: int
    texts: Texts


def main() -> None:
    """Measure, and print a table."""
    args = parser_of(__doc__).parse_args()
    engine = Engine(args.model, bits=args.bits, threads=args.threads)
    tokenizer = open_tokenizer(args.model)
    drafters = drafters_of(args, engine, tokenizer)
    samples: list[dict[str, Any]] = []
    for clients in map(int, args.clients.split(",")):
        for workload, requests in chosen(workloads(tokenizer, clients, args.tokens), args.workloads).items():
            for name, make in chosen(drafters, args.drafts).items():
                samples += measure(engine, (workload, name, clients), requests, make, args)
    rows = summarize(samples)
    columns = ("workload", "drafts", "clients", "tokens/s", "without", "ratio", "from", "to", "drafted", "right")
    output.table(columns, [[str(value) for value in row.values()] for row in rows], "medians of the rounds")
    if args.json:
        args.json.write_text(json.dumps({"samples": samples, "medians": rows}, indent=1))


def parser_of(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, a .gguf file or a preset")
    parser.add_argument("--bits", type=int, choices=(4, 8))
    parser.add_argument("--draft-model", help="a smaller one with the same vocabulary")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clients", default="1,8")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workloads", help="of these, between commas (all)")
    parser.add_argument("--drafts", help="by these, between commas (all)")
    parser.add_argument("--no-guard", action="store_true", help="let all drafts through")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def chosen(found: dict[str, T], names: str | None) -> dict[str, T]:
    """Those of these names, which are between commas; None: all."""
    return found if names is None else {name: found[name] for name in names.split(",")}


Make = Callable[[Texts], Drafter]


def drafters_of(args: argparse.Namespace, engine: Engine, tokenizer: Tokenizer) -> dict[str, Make]:
    """By name, how to make a new one."""
    found: dict[str, Make] = {"n-gram": lambda _: NgramDrafter(), "known": Known}
    if args.draft_model:
        check_same_tokens(tokenizer, open_tokenizer(args.draft_model))
        smaller = Engine(args.draft_model, bits=args.bits, threads=args.threads)
        found["model"] = lambda _: ModelDrafter(smaller, engine.config.vocab_size)
    if args.no_guard:
        return found

    def under_guard(make: Make) -> Make:
        return lambda texts: guarded(make(texts), engine)

    return {name: under_guard(make) for name, make in found.items()}


def workloads(tokenizer: Tokenizer, clients: int, num_tokens: int) -> dict[str, list[Request]]:
    """Requests of each."""
    code = tokenizer.encode(inspect.getsource(argparse.ArgumentParser))
    prompts = {"edit": [], "loop": [], "wrong": []}
    for client in range(clients):
        part = code[client * 97 :][: num_tokens + 100]
        prompts["edit"].append((*part, *part[:40]))
        prompts["loop"].append(tuple(part[:7] * 20))
        few, choose = part[:12], random.Random(client)
        prompts["wrong"].append(tuple(choose.choices(few, k=300)))
    rules = {
        "edit": ("edit", Sampling()),
        "loop": ("loop", Sampling()),
        "drawn": ("edit", Sampling(temperature=1.0, seed=1)),
        "wrong": ("wrong", Sampling(temperature=2.0, seed=1)),
    }
    return {
        name: [Request(prompt_ids=prompt, max_new_tokens=num_tokens, sampling=sampling) for prompt in prompts[kind]]
        for name, (kind, sampling) in rules.items()
    }


def measure(
    engine: Engine, case: tuple[str, str, int], requests: Sequence[Request], make: Make, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Each round once without drafts and once with; who begins is drawn."""
    workload, drafts, clients = case
    room = max(map(int, args.clients.split(","))) * (2 * args.tokens + 500)
    texts = run(engine, requests, None, room).texts
    samples, chance = [], random.Random(0)
    for turn in range(args.rounds):
        found: dict[bool, Ran] = {}
        for with_drafts in chance.sample((False, True), 2):
            found[with_drafts] = run(engine, requests, make(texts) if with_drafts else None, room)
        assert found[True].texts == found[False].texts == texts, "drafts changed what is written"
        with_, without = found[True], found[False]
        samples.append(
            {
                "workload": workload,
                "drafts": drafts,
                "clients": clients,
                "round": turn,
                "tokens_per_s": with_.tokens_per_s,
                "without_per_s": without.tokens_per_s,
                "drafted": with_.drafted,
                "accepted": with_.accepted,
            }
        )
        output.talk(f"{case}: {with_.tokens_per_s:.1f} and {without.tokens_per_s:.1f} tokens/s")
    return samples


def run(engine: Engine, requests: Sequence[Request], drafter: Drafter | None, room: int) -> Ran:
    """All requests together; the time of writing, after all prompts have been read."""
    settings = LoopSettings(cache_tokens=room, share_prefixes=False)
    runner = Runner(engine, lambda ids: "", settings, drafter)
    texts: Texts = {each.prompt_ids: [] for each in requests}
    for number, request in enumerate(requests, 1):
        runner.add(number, runner.writing(request))
    began, first = time.perf_counter(), 0
    while runner.busy:
        runner.step()
        for number, event in runner.take_heard():
            if isinstance(event, Progress):
                texts[requests[number - 1].prompt_ids] += [info.token_id for info in event.tokens]
        if not first and all(texts.values()):
            began, first = time.perf_counter(), sum(map(len, texts.values()))
    written = sum(map(len, texts.values())) - first
    seconds = time.perf_counter() - began
    return Ran(written / seconds, runner.counts["drafted"], runner.counts["accepted"], texts)


def summarize(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians of each case."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for sample in samples:
        groups.setdefault((sample["workload"], sample["drafts"], sample["clients"]), []).append(sample)
    rows = []
    for (workload, drafts, clients), group in groups.items():
        drafted, accepted = (sum(each[name] for each in group) for name in ("drafted", "accepted"))
        ratio = cost([each["tokens_per_s"] / each["without_per_s"] for each in group])
        rows.append(
            {
                "workload": workload,
                "drafts": drafts,
                "clients": clients,
                "tokens_per_s": round(statistics.median(each["tokens_per_s"] for each in group), 2),
                "without_per_s": round(statistics.median(each["without_per_s"] for each in group), 2),
                **{
                    name: round(1 + ratio[key], 3)
                    for name, key in (("ratio", "overhead"), ("low", "low"), ("high", "high"))
                },
                "drafted": drafted // len(group),
                "right": round(accepted / drafted, 3) if drafted else 0.0,
            }
        )
    return rows


if __name__ == "__main__":
    main()
