"""How long moesaic's own engine takes on a machine whose kernels were measured one by one. No torch here.

What was measured are matrices of a made-up model, never one that is planned: seconds for each weight at so many rows,
with weights in memory (cold) and in the processor's last cache (hot); attention, norms, routing and what lies outside
of kernels for each number they touch. T tokens of a step, n rows of a matrix, E experts, K chosen, D hidden.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from moesaic.config import AttentionConfig, LayerConfig, MlaConfig, MlpConfig, ModelConfig, MoeConfig
from moesaic.errors import ConfigError
from moesaic.plan.flops import Step
from moesaic.plan.formats import Formats, total_bytes
from moesaic.plan.hardware import here_file
from moesaic.plan.kinds import layer_kinds, part_specs
from moesaic.plan.routing import Routing, Uniform

QUIET_SHARE, EVEN_SPREAD = 0.9, 1.6
"""Below this share of the processors, or above this ratio of fast to slow readings of memory, others were at work."""


class Curve(NamedTuple):
    """Seconds a weight of one matrix takes at so many rows: read from memory, and from the last cache."""

    rows: list[float]
    cold: list[float]
    hot: list[float]

    def at(self, rows: float | np.ndarray, speed: float, kept: float) -> np.ndarray:
        """At these rows. speed: of memory, over that when it was measured. kept: the share of weights in the cache.

        Faster memory makes the part of a cold product faster that waits for it; arithmetic takes what a hot one does.
        """
        cold = np.interp(rows, self.rows, self.cold)
        hot = np.minimum(np.interp(rows, self.rows, self.hot), cold)
        waiting = np.maximum(0.0, 1.0 - (hot / cold) ** 2)
        beyond = np.maximum(1.0, np.asarray(rows, dtype=float) / self.rows[-1])  # products of many rows only compute
        return beyond * (kept * hot + (1 - kept) * np.maximum(hot, cold * (1 + waiting * (1 / speed - 1))))


@dataclass(frozen=True, kw_only=True)
class KernelRates:
    """What was measured. linear, experts, head: by format. sizes and bandwidths: of repeated reads of so many bytes.

    score: seconds for each multiplication of a query's number with a key's, or of a weight with a value's, by how many
    query heads share a key (latent attention: all), of one new token a text; prompt_score: of a prompt's tokens.
    norm, row, prompt_row: seconds for each number of a row that is normed, or turned and written to the cache. route:
    for each number of a router's product. layer: of each layer that is no kernel's work. outside: of a step, of each
    text in it, of each logit. base_bytes: what a process takes before it holds a model. about: which machine, when, and
    how much of it this program had ("share", "spread": see bench/machine.py, WatchedProbe).
    """

    bandwidth: float
    sizes: list[float]
    bandwidths: list[float]
    linear: dict[str, Curve]
    experts: dict[str, Curve]
    head: dict[str, Curve]
    score: dict[str, float]
    prompt_score: dict[str, float]
    norm: float
    row: float
    prompt_row: float
    route: float
    layer: float
    outside: tuple[float, float, float]
    base_bytes: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def machine(self) -> str:
        """What was measured, in words."""
        about = self.about
        return f"{about['processor']}, {about['threads']} threads, {about['isa']}" if "isa" in about else ""

    @property
    def busy(self) -> str | None:
        """What other programs did meanwhile, in words; None: nothing that matters."""
        share, spread = self.about.get("share", 1.0), self.about.get("spread", 1.0)
        if share >= QUIET_SHARE and spread <= EVEN_SPREAD:
            return None
        return f"other programs had {1 - share:.0%} of the processors, and memory's bandwidth varied {spread:.1f}-fold"

    def kept(self, num_bytes: float) -> float:
        """The share of a step's bytes that the last cache still holds from the step before."""
        in_memory, in_cache = self.bandwidths[-1], self.bandwidths[0]
        if in_cache <= in_memory:
            return 0.0
        at = float(np.interp(math.log(num_bytes), np.log(self.sizes), self.bandwidths))
        return min(1.0, max(0.0, (1 / in_memory - 1 / at) / (1 / in_memory - 1 / in_cache)))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {
            kind: {name: curve._asdict() for name, curve in getattr(self, kind).items()}
            for kind in ("linear", "experts", "head")
        }

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "KernelRates":
        """The inverse of `to_dict`."""
        curves = {
            kind: {name: Curve(**curve) for name, curve in tree[kind].items()} for kind in ("linear", "experts", "head")
        }
        return cls(**{**tree, **curves, "outside": tuple(tree["outside"])})


def measured_rates() -> KernelRates | None:
    """What was measured of this machine before; None where nothing was. Raises ConfigError for a damaged file."""
    path = here_file()
    if not path.is_file():
        return None
    try:
        return KernelRates.from_dict(json.loads(path.read_text(encoding="utf-8"))["kernels"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error!r}); take it away, and this machine is measured again") from error


class EngineStep(NamedTuple):
    """Seconds of a step by the engine's parts, and bytes that it reads."""

    parts: dict[str, float]
    num_bytes: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def engine_step(
    rates: KernelRates,
    config: ModelConfig,
    formats: Formats,
    step: Step,
    *,
    bandwidth: float | None = None,
    routing: Routing | None = None,
) -> EngineStep:
    """One step of moesaic's engine. bandwidth: of memory at that moment; None: as when kernels were measured.

    Raises ConfigError for a format that was not measured.
    """
    clock = _Clock(rates, formats, step, (bandwidth or rates.bandwidth) / rates.bandwidth, routing or Uniform(), config)
    return clock.step()


class _Clock:
    """Adds a step up. tokens T; outputs: rows of logits."""

    def __init__(
        self, rates: KernelRates, formats: Formats, step: Step, speed: float, routing: Routing, config: ModelConfig
    ) -> None:
        self.rates, self.formats, self.step_, self.speed = rates, formats, step, speed
        self.routing, self.config = routing, config
        self.num_bytes = self._num_bytes()
        self.kept = rates.kept(self.num_bytes)
        self.parts: dict[str, float] = {}

    def step(self) -> EngineStep:
        config, tokens = self.config, self.step_.tokens
        for layer, index, count in layer_kinds(config.decoder.layers):
            self._layer(layer, index, count)
        self._add("norm", self.rates.norm * tokens * config.hidden_size)
        self._add("head", self._product("head", "head", config.vocab_size * config.hidden_size, self.step_.outputs))
        fixed, of_text, of_logit = self.rates.outside
        outside = fixed + of_text * self.step_.texts + of_logit * self.step_.outputs * config.vocab_size
        self._add("outside kernels", outside)
        return EngineStep(self.parts, self.num_bytes)

    def _layer(self, layer: LayerConfig, index: int, count: int) -> None:
        size, tokens = self.config.hidden_size, self.step_.tokens
        self._add("norm", 2 * self.rates.norm * tokens * size * count)
        self._add("layers", self.rates.layer * count)
        for packing, numel in _projections(layer.attention, size, self.formats):
            self._add("projections", self._curve("linear", packing, numel, tokens) * count)
        self._add("attention", self._attention(layer) * count)
        block = layer.feed_forward
        if isinstance(block, MoeConfig):
            self._add("router", self.rates.route * tokens * block.num_experts * size * count)
            self._add("experts", self._experts(block, index) * count)
            block = block.shared
        if isinstance(block, MlpConfig):
            numel = sum(spec.numel for spec in part_specs(block, size) if len(spec.shape) > 1)
            self._add("mlp", self._product("experts", "mlp", numel, tokens) * count)

    def _experts(self, moe: MoeConfig, index: int) -> float:
        """Rows of an expert are as many of T tokens as chance makes choose it: n with the probabilities of a binomial
        distribution, or where shares are known, as many as these let expect."""
        numel = sum(spec.numel for spec in part_specs(moe, self.config.hidden_size) if spec.role == "experts")
        each = numel / moe.num_experts
        tokens = self.step_.tokens
        if not isinstance(self.routing, Uniform):
            hit = self.routing.distinct(moe, index, tokens)
            mean = tokens * moe.router.top_k / max(hit, 1e-9)
            return hit * float(self._curve("experts", self.formats.by_role["experts"], each, mean))
        chances = _binomial(round(tokens), moe.router.top_k / moe.num_experts)
        rows = np.arange(1, len(chances) + 1)
        seconds = self._curve("experts", self.formats.by_role["experts"], each, rows)
        return moe.num_experts * float(np.sum(chances * seconds))

    def _attention(self, layer: LayerConfig) -> float:
        """Scores and weighted values over what tokens see, and what is done to each new row."""
        attention, tokens = layer.attention, self.step_.tokens
        if isinstance(attention, MlaConfig):
            width, groups, kind = 2 * attention.latent_rank + attention.rope_dim, 1, "latent"
            own = attention.num_heads * attention.rope_dim + attention.latent_rank + attention.rope_dim
        elif isinstance(attention, AttentionConfig):
            width, groups = 2 * attention.head_dim, attention.num_key_value_heads
            kind = _shared(attention.num_heads // groups, self.rates.score)
            own = (attention.num_heads + 2 * groups) * attention.head_dim
        else:
            raise ConfigError("compressed or recurrent attention does not run in the engine; it has no times here")
        seen = self.step_.seen
        reach = getattr(attention, "reach", None)
        seen = min(seen, reach) if reach else seen
        prompt = self.step_.new > 1
        score = (self.rates.prompt_score if prompt else self.rates.score)[kind]
        row = self.rates.prompt_row if prompt else self.rates.row
        return tokens * (score * seen * attention.num_heads * width + row * own)

    def _product(self, kind: str, role: str, numel: float, rows: float) -> float:
        return float(self._curve(kind, self.formats.by_role[role], numel, rows))  # pyright: ignore[reportArgumentType]

    def _curve(self, kind: str, packing: str, numel: float, rows: Any) -> Any:
        curves: dict[str, Curve] = getattr(self.rates, kind)
        if packing not in curves:
            raise ConfigError(f"{kind} in {packing} were not measured here; known: {', '.join(curves)}")
        return numel * curves[packing].at(rows, self.speed, self.kept)

    def _num_bytes(self) -> float:
        """Of weights and cache that a step reads."""
        config, tokens = self.config, self.step_.tokens
        whole = total_bytes(config, self.formats) - config.vocab_size * config.hidden_size * 2.0 * (
            not config.tie_word_embeddings
        )
        for layer, index, count in layer_kinds(config.decoder.layers):
            moe = layer.feed_forward
            if isinstance(moe, MoeConfig):
                held = sum(
                    self.formats.tensor_bytes(spec)
                    for spec in part_specs(moe, config.hidden_size)
                    if spec.role == "experts"
                )
                whole -= count * held * (1 - self.routing.distinct(moe, index, tokens) / moe.num_experts)
        return whole + self.step_.texts * self.formats.state_bytes(config, round(self.step_.context))

    def _add(self, part: str, seconds: float) -> None:
        self.parts[part] = self.parts.get(part, 0.0) + float(seconds)


def _projections(attention: Any, size: int, formats: Formats) -> list[tuple[str, float]]:
    """Numbers of weights by format. Matrices that heads read one by one have 8 bits where others have fewer, and are
    unpacked to bf16 where files hold them in FP8."""
    packing = formats.by_role["attention"]
    matrices = {spec.name: spec.numel for spec in part_specs(attention, size) if len(spec.shape) > 1}
    if not isinstance(attention, MlaConfig):
        return [(packing, float(sum(matrices.values())))]
    by_head = next(numel for name, numel in matrices.items() if "kv_b_proj" in name)
    one_by_one = {"int4": "int8", "uneven4": "int8", "fp8-128": "bf16"}.get(packing, packing)
    return [(packing, float(sum(matrices.values()) - by_head)), (one_by_one, float(by_head))]


def _shared(heads: int, table: Mapping[str, float]) -> str:
    """Of the measured numbers of query heads that share a key the nearest."""
    known = [name for name in table if name != "latent"]
    return min(known, key=lambda name: abs(math.log(int(name) / heads)))


def _binomial(trials: int, chance: float) -> np.ndarray:
    """The probabilities of 1 to `trials` hits."""
    if trials < 1:
        return np.zeros(0)
    hits = np.arange(1, trials + 1)
    if chance >= 1:
        return (hits == trials).astype(float)
    logs = math.lgamma(trials + 1) - np.array([math.lgamma(h + 1) + math.lgamma(trials - h + 1) for h in hits])
    return np.exp(logs + hits * math.log(chance) + (trials - hits) * math.log1p(-chance))
