"""How long moesaic's own engine takes on a machine whose kernels were measured one by one (rates.py). No torch here.

T tokens of a step, n rows of a matrix, E experts, K chosen, D hidden.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from moesaic.config import AttentionConfig, LayerConfig, MlaConfig, MlpConfig, ModelConfig, MoeConfig
from moesaic.errors import ConfigError
from moesaic.plan.flops import Step
from moesaic.plan.formats import Formats, total_bytes
from moesaic.plan.kinds import layer_kinds, part_specs
from moesaic.plan.rates import Curve, KernelRates, Scores, Speeds
from moesaic.plan.routing import Routing, Uniform


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
    speeds: Speeds | None = None,
    routing: Routing | None = None,
) -> EngineStep:
    """One step of moesaic's engine. speeds: of the machine at that moment; None: as when kernels were measured.

    Raises ConfigError for a format that was not measured.
    """
    return _Clock(rates, formats, step, speeds or rates.speeds, routing or Uniform(), config).step()


class _Clock:
    """Adds a step up. tokens T; outputs: rows of logits."""

    def __init__(
        self, rates: KernelRates, formats: Formats, step: Step, speeds: Speeds, routing: Routing, config: ModelConfig
    ) -> None:
        self.rates, self.formats, self.step_, self.speeds = rates, formats, step, speeds
        self.routing, self.config = routing, config
        self.pace = rates.pace(speeds)
        self.bytes = _Bytes.of(config, formats, step, self.routing)
        self.kept = rates.kept(self.bytes.read, speeds)
        self.parts: dict[str, float] = {}

    def step(self) -> EngineStep:
        config, step = self.config, self.step_
        for layer, index, count in layer_kinds(config.decoder.layers):
            self._layer(layer, index, count)
        self._small("norm", self._norm())
        self._add("head", self._product("head", "head", config.vocab_size * config.hidden_size, step.outputs))
        outside = self.rates.outside
        prompt = outside.token * step.tokens if step.new > 1 else 0.0
        logits = outside.logit * step.outputs * config.vocab_size
        self._small("outside kernels", outside.step + outside.text * step.texts + prompt + logits)
        return EngineStep(self.parts, self.bytes.read)

    def _layer(self, layer: LayerConfig, index: int, count: int) -> None:
        size, tokens = self.config.hidden_size, self.step_.tokens
        self._small("norm", 2 * self._norm() * count)
        self._add("projections", self._projections(layer.attention) * count)
        self._small("attention", self._attention(layer) * count)
        block = layer.feed_forward
        if isinstance(block, MoeConfig):
            route, weights = self.rates.route, block.num_experts * size
            each = route.layer + route.weight * weights + tokens * (route.token + route.token_weight * weights)
            self._small("router", each * count)
            self._add("experts", self._experts(block, index) * count)
            block = block.shared
        if isinstance(block, MlpConfig):
            numel = sum(spec.numel for spec in part_specs(block, size) if len(spec.shape) > 1)
            seconds = self._feed_forward(self.formats.by_role["mlp"], block.intermediate_size, tokens, self.kept)
            self._add("mlp", numel * float(seconds) * count)

    def _norm(self) -> float:
        once, number = self.rates.norm
        return once + number * self.step_.tokens * self.config.hidden_size

    def _projections(self, attention: Any) -> float:
        """Of latent attention as one: its matrices that heads read one by one have 8 bits where others have fewer, and
        are unpacked to bf16 where files hold them in FP8."""
        kind = "latent" if isinstance(attention, MlaConfig) else "linear"
        numel = sum(spec.numel for spec in part_specs(attention, self.config.hidden_size) if len(spec.shape) > 1)
        return self._product(kind, "attention", numel, self.step_.tokens)

    def _experts(self, moe: MoeConfig, index: int) -> float:
        """Rows of an expert are as many of T tokens as chance makes choose it: n with the probabilities of a binomial
        distribution, or where shares are known, as many as these let expect."""
        numel = sum(spec.numel for spec in part_specs(moe, self.config.hidden_size) if spec.role == "experts")
        each, tokens = numel / moe.num_experts, self.step_.tokens
        hit = self.routing.distinct(moe, index, tokens)
        kept = self._kept_experts(hit / moe.num_experts)
        packing, inner = self.formats.by_role["experts"], moe.intermediate_size
        if not isinstance(self.routing, Uniform):
            mean = tokens * moe.router.top_k / max(hit, 1e-9)
            return each * hit * float(self._feed_forward(packing, inner, mean, kept))
        chances = _binomial(round(tokens), moe.router.top_k / moe.num_experts)
        rows = np.arange(1, len(chances) + 1)
        return each * moe.num_experts * float(np.sum(chances * self._feed_forward(packing, inner, rows, kept)))

    def _kept_experts(self, chance: float) -> float:
        """The share of the experts' weights that a cache still holds since they were read: that was one step ago with
        this chance, two with the next one's, and what was read meanwhile grows."""
        if chance >= 1:
            return self.kept
        kept, left = 0.0, 1.0
        for steps in range(1, _STEPS_BACK + 1):
            between = self.bytes.others + self.bytes.experts * (1 - (1 - chance) ** steps)
            kept += left * chance * self.rates.kept(between, self.speeds)
            left *= 1 - chance
        return kept

    def _attention(self, layer: LayerConfig) -> float:
        """Scores and weighted values over what tokens see, and what is done to each new row."""
        attention, tokens, rates = layer.attention, self.step_.tokens, self.rates
        if isinstance(attention, MlaConfig):
            width, groups, kind = 2 * attention.latent_rank + attention.rope_dim, 1, "latent"
            own = attention.num_heads * attention.rope_dim + attention.latent_rank + attention.rope_dim
        elif isinstance(attention, AttentionConfig):
            width, groups = 2 * attention.head_dim, attention.num_key_value_heads
            kind = _shared(attention.num_heads // groups, rates.decode)
            own = (attention.num_heads + 2 * groups) * attention.head_dim
        else:
            raise ConfigError("compressed or recurrent attention does not run in the engine; it has no times here")
        reach = getattr(attention, "reach", None)
        seen = min(self.step_.seen, reach) if reach else self.step_.seen
        scores = (rates.prompt if self.step_.new > 1 else rates.decode)[kind]
        return scores.layer + tokens * (scores.at(seen) * seen * attention.num_heads * width + scores.row * own)

    def _product(self, kind: str, role: str, numel: float, rows: float) -> float:
        return float(numel * self._curve(kind, self.formats.by_role[role]).at(rows, self.pace, self.kept))  # pyright: ignore[reportArgumentType]

    def _feed_forward(self, packing: str, inner: int, rows: Any, kept: float) -> np.ndarray:
        """Seconds a weight: between those of wide and of narrow matrices by how many outputs a weight has."""
        wide, narrow = (self._curve(kind, packing).at(rows, self.pace, kept) for kind in ("experts", "fine"))
        first, last = self.rates.slender
        share = (slenderness(self.config.hidden_size, inner) - first) / (last - first)
        return wide + min(1.0, max(0.0, share)) * (narrow - wide)

    def _curve(self, kind: str, packing: str) -> Curve:
        curves: dict[str, Curve] = getattr(self.rates, kind)
        if packing not in curves:
            raise ConfigError(f"{kind} in {packing} were not measured here; known: {', '.join(curves)}")
        return curves[packing]

    def _small(self, part: str, seconds: float) -> None:
        """What waits for no memory."""
        self._add(part, seconds / self.pace.compute)

    def _add(self, part: str, seconds: float) -> None:
        self.parts[part] = self.parts.get(part, 0.0) + float(seconds)


_STEPS_BACK = 32
"""Beyond so many steps a cache holds nothing that was not read again."""


def slenderness(hidden: int, inner: int) -> float:
    """Outputs for each weight of a gated block: 2F + D of 3DF."""
    return (2 * inner + hidden) / (3 * hidden * inner)


class _Bytes(NamedTuple):
    """That a step reads: all; of what it reads in any case, and of all experts, read or not."""

    read: float
    others: float
    experts: float

    @classmethod
    def of(cls, config: ModelConfig, formats: Formats, step: Step, routing: Routing) -> "_Bytes":
        """Those of a step: weights, of experts those that its tokens choose, and the state of its texts."""
        others = total_bytes(config, formats) - config.vocab_size * config.hidden_size * 2.0 * (
            not config.tie_word_embeddings
        )
        experts = read = 0.0
        for layer, index, count in layer_kinds(config.decoder.layers):
            moe = layer.feed_forward
            if isinstance(moe, MoeConfig):
                specs = [spec for spec in part_specs(moe, config.hidden_size) if spec.role == "experts"]
                held = count * sum(map(formats.tensor_bytes, specs))
                experts += held
                read += held * routing.distinct(moe, index, step.tokens) / moe.num_experts
        others += step.texts * formats.state_bytes(config, round(step.context)) - experts
        return cls(others + read, others, experts)


def _shared(heads: int, table: Mapping[str, Scores]) -> str:
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
