"""2017: the LSTM with a sparsely-gated layer, against a dense layer of equal active parameters.

The next byte of text in many domains, each as likely as any other. B batch, S sequence, N windows.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  its common name
from ancestor_parts.common import Part, Row, less, median, talk
from torch import Tensor, nn

from moesaic.cli.text_source import read_corpus
from moesaic.config import MlpConfig, MoeConfig, RouterConfig
from moesaic.models.recurrent import RecurrentConfig, RecurrentModel
from moesaic.routing import RoutingTape
from moesaic.routing.balancers import mean_over_layers

HIDDEN, SEQUENCE, BATCH, STEPS, WARM_UP, RATE = 96, 32, 32, 400, 30, 1e-2
TRAIN_BYTES, HELD_BYTES = 1_000_000, 8_448  # of each domain
MOST_SEEDS = 3
MOE = MoeConfig(router=RouterConfig(name="noisy_topk", num_experts=32, top_k=4), intermediate_size=64)
BALANCE = (("importance", 0.1), ("load", 0.1))  # the paper's coefficients


class Text(NamedTuple):
    """Training bytes of each domain, and held-out windows [N, S + 1] of all of them."""

    domains: list[Tensor]
    held_NS: Tensor


def read_text(corpus: Path | None) -> Text:
    domains = read_corpus(corpus).domains
    held = [first_bytes(domain.held_out, HELD_BYTES).long() for domain in domains]
    window = SEQUENCE + 1
    windows = [part[: len(part) // window * window].view(-1, window) for part in held]
    return Text([first_bytes(domain.train, TRAIN_BYTES) for domain in domains], torch.cat(windows))


def first_bytes(documents: Iterable[str], num_bytes: int) -> Tensor:
    taken = bytearray()
    for document in documents:
        taken += document.encode()[: num_bytes - len(taken)]
        if len(taken) == num_bytes:
            break
    return torch.frombuffer(taken, dtype=torch.uint8)


def batches(text: Text, seed: int) -> Iterator[Tensor]:
    """As many batches [B, S + 1] as there are steps."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        rows = []
        for domain in torch.randint(len(text.domains), (BATCH,), generator=generator).tolist():
            source = text.domains[domain]
            start = int(torch.randint(len(source) - SEQUENCE, (), generator=generator))
            rows.append(source[start : start + SEQUENCE + 1])
        yield torch.stack(rows).long()


def rate_at(step: int) -> float:
    """A linear warm-up, then half a cosine down to a tenth."""
    return RATE * min(1, (step + 1) / WARM_UP) * (0.55 + 0.45 * math.cos(math.pi * step / STEPS))


def cross_entropy(model: RecurrentModel, batch_BS: Tensor, tape: RoutingTape) -> Tensor:
    return F.cross_entropy(model(batch_BS[:, :-1], tape=tape).flatten(0, 1), batch_BS[:, 1:].flatten())


def train(block: MoeConfig | MlpConfig, losses: Sequence[tuple[str, float]], seed: int, text: Text) -> RecurrentModel:
    """The same batches for every block."""
    model = RecurrentModel(RecurrentConfig(vocab_size=256, hidden_size=HIDDEN, feed_forward=block), seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), fused=True)
    torch.manual_seed(seed)  # the router's noise
    for step, batch_BS in enumerate(batches(text, seed)):
        optimizer.param_groups[0]["lr"] = rate_at(step)
        tape = RoutingTape()
        loss = cross_entropy(model, batch_BS, tape)
        for name, coefficient in losses:
            loss = loss + coefficient * mean_over_layers(name, tape.decisions.values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def measure(model: RecurrentModel, text: Text) -> Row:
    """Held-out perplexity a byte, and how uneven importance (sums of weights) and load (counts of rows) are."""
    tape = RoutingTape()
    nats = cross_entropy(model, text.held_NS, tape).item()
    row = {"perplexity": math.exp(nats), "bits a byte": nats / math.log(2)}
    for decision in tape.decisions.values():
        rows, load = decision.rows, decision.rows.counts_E.float()
        importance = torch.zeros(rows.num_experts).index_add(0, rows.expert_ids_R, rows.weights_R)
        largest = (load.max() / load.mean()).item()
        row |= {"CV importance": _cv(importance), "CV load": _cv(load), "largest load, of mean": largest}
    return row


def _cv(values: Tensor) -> float:
    return (values.std(correction=0) / values.mean()).item()


def contender(
    name: str, block: MoeConfig | MlpConfig, losses: Sequence[tuple[str, float]], seeds: int, text: Text
) -> Row:
    models = [train(block, losses, seed, text) for seed in range(seeds)]
    runs = [measure(model, text) for model in models]
    row = {"layer": name, "parameters": models[0].config.total, "active": models[0].config.active_all}
    row |= {key: median(run[key] for run in runs) for key in runs[0]}
    row["perplexity of each seed"] = " ".join(f"{run['perplexity']:.2f}" for run in runs)
    talk(f"2017  {name}: perplexity {row['perplexity']:.3f} a byte")
    return row


def part(seeds: int, corpus: Path | None) -> Part:
    """All of 2017."""
    text, seeds = read_text(corpus), min(seeds, MOST_SEEDS)
    active = sum(spec.active_numel for spec in MOE.tensors("", HIDDEN))
    dense = MlpConfig(intermediate_size=math.ceil(active / (3 * HIDDEN)))
    twin = contender("dense, equal active", dense, (), seeds, text)
    moe = contender("MoE, importance and load losses", MOE, BALANCE, seeds, text)
    unbalanced = contender("MoE, no balance loss", MOE, (), seeds, text)
    claims = [
        less("the MoE has the lower perplexity at equal active parameters", moe, twin, "perplexity"),
        less("the balance losses even out importance", moe, unbalanced, "CV importance"),
        less("the balance losses even out load", moe, unbalanced, "CV load"),
        less("the balance losses lower perplexity", moe, unbalanced, "perplexity"),
    ]
    task = (
        f"the next byte of {len(text.domains)} domains of text, {STEPS * BATCH * SEQUENCE} bytes seen, "
        f"{text.held_NS[:, 1:].numel()} held out; {seeds} seeds, medians"
    )
    return Part(task, {"LSTM, layer, LSTM": [twin, moe, unbalanced]}, claims)
