"""A sweep: one recipe in many variants, each a run of its own in a folder of its own, and a table of how they did.

OUT/sweep.json     every point: its changes, whether it is done, its held-out loss or why it failed
OUT/report.html    the best of them side by side
OUT/<point>/       a run like any other, named after its changes
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from moesaic.errors import OUT_OF_MEMORY, ConfigError, MoesaicError, RunFolderError, ran_out_of_memory
from moesaic.telemetry.report import write_report
from moesaic.telemetry.report_data import HeldOut, ModelResult, ReportData
from moesaic.train.recipe import parse_value
from moesaic.train.resume import write_beside

MOST_POINTS = 1000
MOST_IN_REPORT = 6
LONGEST_NAME = 100
_NAME = re.compile(r"[A-Za-z0-9_.+,=-]*=[A-Za-z0-9_.+,=-]*")  # of a folder; so it is never ".."

Axes = dict[str, list[Any]]
"""A field ("train.learning_rate") and the values it takes."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run has reached. `by_domain` and `bits_per_byte` are of held-out text.

    other_sources: the bits per byte of an encoder-decoder that is given the sources of other targets; None for others.
    """

    model: str
    steps: int
    bits_per_byte: float
    by_domain: dict[str, float]
    training_seconds: float
    total_parameters: int
    active_parameters: int
    other_sources: float | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready tree."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One variant. `error` says why it failed; `result` is there when it is done."""

    name: str
    changes: dict[str, Any]
    status: Literal["waiting", "done", "failed"] = "waiting"
    error: str | None = None
    result: RunResult | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready tree."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "Point":
        """The inverse of `to_json`."""
        result = tree["result"]
        return cls(**{**tree, "result": None if result is None else RunResult(**result)})


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """("table.field", values) from "table.field=a,b,c" or "table.field=[a, b]" in TOML. Raises ConfigError."""
    path, separator, values_text = text.partition("=")
    values_text = values_text.strip()
    if not separator or not path.strip() or not values_text:
        raise ConfigError(f"--sweep {text!r}; write table.field=value,value, as train.learning_rate=1e-3,3e-3")
    values = parse_value(values_text) if values_text.startswith("[") else None
    if not isinstance(values, list):
        values = [parse_value(one.strip()) for one in values_text.split(",")]
    return path.strip(), values


def axes_of_table(table: Any, prefix: str = "") -> Axes:
    """The axes of a [sweep] table: `train.learning_rate = [1e-3, 3e-3]` or nested tables. Raises ConfigError."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"sweep={table!r}; it must be a table of fields and lists of values")
    axes: Axes = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            axes |= axes_of_table(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            axes[f"{prefix}{name}"] = value
        else:
            raise ConfigError(f"sweep: {prefix}{name}={value!r}; it must be a list of values")
    return axes


def points_of(axes: Axes, earlier: Sequence[Point] = ()) -> list[Point]:
    """Every combination, the last axis moving fastest. Raises ConfigError for axes that make none, or too many.

    Those among `earlier` keep their names, and done ones stay so; what failed waits again: the reason may be gone.
    """
    if not axes:
        raise ConfigError(
            "--sweep without anything to vary; name a field and its values, as --sweep train.seed=0,1,2, or have a "
            "[sweep] table in --config"
        )
    for path, values in axes.items():
        if not values:
            raise ConfigError(f"sweep: {path} has no values; give one or more")
        if any(value in values[:index] for index, value in enumerate(values)):
            raise ConfigError(f"sweep: {path}={values} has a value twice; leave one out")
    count = math.prod(len(values) for values in axes.values())
    if count > MOST_POINTS:
        raise ConfigError(f"a sweep of {count} points; at most {MOST_POINTS}, so vary fewer fields at once")
    known = {_key(point.changes): point for point in earlier}
    taken = {point.name for point in earlier}
    points: list[Point] = []
    for values in itertools.product(*axes.values()):
        changes = dict(zip(axes, values, strict=True))
        before = known.get(_key(changes))
        if before is not None and before.status == "done":
            points.append(before)
            continue
        name = before.name if before is not None else _name(changes, taken)
        taken.add(name)
        points.append(Point(name=name, changes=changes))
    return points


def _key(changes: Mapping[str, Any]) -> str:
    """Equal for equal changes, in whatever order."""
    return json.dumps(changes, sort_keys=True, default=str)


def _name(changes: Mapping[str, Any], taken: Collection[str]) -> str:
    """A readable folder name, "learning_rate=0.001,seed=0", that no other point has."""
    fields = [path.rpartition(".")[2] for path in changes]
    parts = []
    for (path, value), short in zip(changes.items(), fields, strict=True):
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        label = _for_folder(path if fields.count(short) > 1 else short).lstrip(".-")
        parts.append(f"{label}={_for_folder(text)}")
    name = ",".join(parts)[:LONGEST_NAME]
    numbers = (f"{name}-{number}" for number in itertools.count(2))
    return next(one for one in itertools.chain([name], numbers) if one not in taken)


def _for_folder(text: str) -> str:
    """Without what a folder's name should not hold; a number's minus stays."""
    name = re.sub(r"[^A-Za-z0-9_.+-]+", "-", text).rstrip("-")
    return name if text.startswith("-") else name.lstrip("-")


@dataclass
class Sweep:
    """The points of a sweep in `folder`, and what is known of them so far."""

    folder: Path
    axes: Axes
    points: list[Point]

    @classmethod
    def begin(cls, folder: Path, axes: Axes, *, resume: bool) -> "Sweep":
        """The sweep of `axes`, with what an earlier one in this folder has finished.

        Raises RunFolderError when there was an earlier one and `resume` is false, or when its record is damaged.
        """
        place = folder / "sweep.json"
        if not place.exists():
            return cls(folder, axes, points_of(axes))
        try:
            tree = json.loads(place.read_text(encoding="utf-8"))
            earlier = [Point.from_json(point) for point in tree["points"]]
            if foreign := [point.name for point in earlier if not _NAME.fullmatch(point.name)]:
                raise ValueError(f"the name {foreign[0]!r}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunFolderError(f"{place} cannot be read ({error}); delete it to look at every point again") from error
        if not resume:
            done = sum(point.status == "done" for point in earlier)
            raise RunFolderError(
                f"{folder} holds a sweep with {done} of {len(earlier)} points done; "
                "add --resume to go on, or choose another folder with --out"
            )
        return cls(folder, axes, points_of(axes, earlier))

    @property
    def best_first(self) -> list[Point]:
        """Points by their held-out loss; those without one at the end."""
        return sorted(self.points, key=lambda point: point.result.bits_per_byte if point.result else math.inf)

    def run(self, train: Callable[[Point], RunResult], say: Callable[[str], object]) -> None:
        """Train what is not done yet, one after another. A point that fails is recorded, and the others go on.

        Raises RunFolderError when the sweep's own files cannot be written; an interruption passes through.
        """
        self._write()
        for index, point in enumerate(self.points):
            where = f"point {index + 1} of {len(self.points)}: {point.name}"
            if point.status == "done":
                say(f"{where}: done before")
                continue
            say(where)
            self.points[index] = _attempt(point, train)
            if self.points[index].error:
                say(f"{where}: failed: {self.points[index].error}")
            self._write()

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready tree."""
        return {"axes": self.axes, "points": [point.to_json() for point in self.points]}

    def _write(self) -> None:
        write_beside(self.folder / "sweep.json", json.dumps(self.to_json(), indent=2) + "\n")
        best = [point for point in self.best_first if point.result][:MOST_IN_REPORT]
        if best:
            write_report(_report(self.folder, best, len(self.points)), self.folder / "report.html")


def _attempt(point: Point, train: Callable[[Point], RunResult]) -> Point:
    try:
        result = train(point)
    except MoesaicError as error:
        return replace(point, status="failed", error=" ".join(str(error).split()))
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        return replace(point, status="failed", error=OUT_OF_MEMORY)
    return replace(point, status="done", error=None, result=result)


def _report(folder: Path, best: Sequence[Point], num_points: int) -> ReportData:
    return ReportData(
        title="A sweep",
        subtitle=f"{num_points} points; the best {len(best)} of those that are done",
        models=tuple(_model(folder, point) for point in best),
    )


def _model(folder: Path, point: Point) -> ModelResult:
    """A point as the report shows a model, with the curves of its metrics.jsonl."""
    assert point.result is not None
    result = point.result
    lines = _metrics(folder / point.name / "metrics.jsonl")
    last = lines[-1] if lines else {"tokens": 0}
    return ModelResult(
        name=point.name,
        label="",
        total_parameters=result.total_parameters,
        active_parameters=result.active_parameters,
        bits_per_byte=result.bits_per_byte,
        domain_bits_per_byte=result.by_domain,
        training_tokens=last["tokens"],
        training_tokens_per_s=last["tokens"] / result.training_seconds if result.training_seconds else math.nan,
        decoding_tokens_per_s=math.nan,
        peak_memory_bytes=float(last.get("peak_memory_bytes", math.nan)),
        training_time_s=result.training_seconds,
        training_flops=math.nan,
        held_out=tuple(
            HeldOut(
                step=line["step"],
                tokens=line["tokens"],
                flops=math.nan,
                seconds=line["seconds"],
                bits_per_byte=line["held_out_bits_per_byte"],
            )
            for line in lines
            if "held_out_bits_per_byte" in line
        ),
        training_loss=tuple((float(line["tokens"]), line["loss"]) for line in lines),
        capacity_gap=next((line["capacity_gap"] for line in reversed(lines) if "capacity_gap" in line), math.nan),
    )


def _metrics(place: Path) -> list[dict[str, Any]]:
    """The steps of a run's metrics.jsonl; none where it is missing."""
    if not place.exists():
        return []
    return [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines() if line.startswith('{"step"')]
