"""What a terminal shows while a model trains: a block for people, one line for logs."""

from dataclasses import dataclass

import numpy as np
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moesaic.telemetry.health import LayerHealth, RouterHealth, load_shares
from moesaic.telemetry.load import LayerLoad, StepLoad
from moesaic.telemetry.scale import MISSING, duration, fixed, short

BLOCKS = "▁▂▃▄▅▆▇█"
DEAD = "×"
MOST_BARS = 32  # of a layer; more experts are shown in groups, each by its heaviest
MOST_LAYERS = 12


@dataclass(frozen=True, kw_only=True)
class TrainingStatus:
    """Where a training run stands. `load` is the routing of the last steps (a window summed), None for dense models.

    loss is in nats per token; bits_per_byte is the last held-out value, None before the first, and capacity_gap what
    more it would be with training's capacity (None without one). elapsed_s counts this run only, over the steps since
    `first_step`.
    """

    name: str
    step: int
    num_steps: int
    elapsed_s: float
    tokens_per_s: float
    loss: float
    bits_per_byte: float | None = None
    capacity_gap: float | None = None
    load: StepLoad | None = None
    first_step: int = 0

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the pace so far; None before the first step."""
        done = self.step - self.first_step
        return self.elapsed_s / done * (self.num_steps - self.step) if done > 0 else None


def load_bars(load: LayerLoad) -> str:
    """One character an expert: ▄ is the fair share, █ twice that or more, × below a tenth of it."""
    ratios = load_shares(load.counts_E) * load.num_experts
    groups = np.array_split(ratios, min(MOST_BARS, len(ratios)))
    # A group is dead only as a whole: its heaviest member stands for it.
    return "".join(_block(float(group.max())) for group in groups)


def _block(ratio: float) -> str:
    if ratio < 0.1:
        return DEAD
    return BLOCKS[min(len(BLOCKS) - 1, max(0, round(ratio * 4) - 1))]


def render(status: TrainingStatus) -> RenderableType:
    """Progress, and the router's health where there is a router, for rich's Live."""
    grid = Table.grid(padding=(0, 2))
    grid.add_row(
        Text(status.name, style="bold"),
        ProgressBar(total=max(1, status.num_steps), completed=status.step, width=32),
        f"step {status.step} of {status.num_steps}",
        f"{duration(status.eta_s)} left",
    )
    numbers = Table.grid(padding=(0, 3))
    numbers.add_row(
        f"loss {fixed(status.loss)}",
        f"held-out {fixed(status.bits_per_byte)} bits per byte",
        f"{short(status.tokens_per_s)} tokens/s",
        f"{duration(status.elapsed_s)} gone",
    )
    if status.capacity_gap is not None:
        numbers.add_row(f"capacity gap {fixed(status.capacity_gap)}", *_dropped(status.load))
    parts: list[RenderableType] = [grid, numbers]
    if status.load is not None and status.load.layers:
        parts += _router_block(status.load)
    return Group(*parts)


def _dropped(load: StepLoad | None) -> list[str]:
    return [f"{load.dropped_share:.1%} of rows dropped"] if load is not None and load.layers else []


def _router_block(load: StepLoad) -> list[RenderableType]:
    health = RouterHealth.of(load)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for head, side in (
        ("layer", "right"),
        ("load per expert", "left"),
        ("MaxVio", "right"),
        ("entropy", "right"),
        ("dead", "right"),
    ):
        table.add_column(head, justify="right" if side == "right" else "left", no_wrap=True)
    for layer, judged in list(zip(load.layers, health.layers, strict=True))[:MOST_LAYERS]:
        bars = Text(load_bars(layer))
        bars.highlight_regex(DEAD, "bold red")
        table.add_row(
            str(layer.layer), bars, fixed(judged.max_violation, 2), fixed(judged.load_entropy, 3), _dead_count(judged)
        )
    hidden = len(load.layers) - MOST_LAYERS
    if hidden > 0:
        table.add_row("", Text(f"and {hidden} more layers", style="dim"), "", "", "")
    verdict = Text("router: ")
    verdict.append(health.verdict, style="green" if health.is_healthy else "yellow")
    return [table, verdict]


def _dead_count(layer: LayerHealth) -> str:
    return MISSING if layer.dead is None else str(len(layer.dead))


def render_line(status: TrainingStatus) -> str:
    """The same as one line of plain ASCII, for a stderr that is not a terminal."""
    parts = [
        f"{status.name}: step {status.step}/{status.num_steps}",
        f"loss {_ascii(fixed(status.loss))}",
        f"held-out {_ascii(fixed(status.bits_per_byte))} bits/byte",
        f"{_ascii(short(status.tokens_per_s))} tokens/s",
        f"{_ascii(duration(status.eta_s))} left",
    ]
    if status.load is not None and status.load.layers:
        health = RouterHealth.of(status.load)
        parts.append(f"MaxVio {_ascii(fixed(health.max_violation, 2))}, router {health.verdict}")
    if status.capacity_gap is not None:
        parts += [f"capacity gap {_ascii(fixed(status.capacity_gap))}", *_dropped(status.load)]
    return ", ".join(parts)


def _ascii(text: str) -> str:
    return "n/a" if text == MISSING else text
