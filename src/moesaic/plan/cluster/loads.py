"""How unevenly a model's experts are chosen, for models whose routing nobody recorded, too. L MoE layers, E experts."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesaic.checks import require
from moesaic.config import ModelConfig, MoeConfig
from moesaic.errors import ConfigError
from moesaic.registry import unknown_name
from moesaic.trace.fingerprint import Fingerprint
from moesaic.trace.reader import Trace

Floats = NDArray[np.float64]

# fmt: off
RECORDED_QUANTILES = (
    0.090, 0.307, 0.391, 0.457, 0.510, 0.561, 0.620, 0.670, 0.718, 0.775, 0.826, 0.905, 0.977, 1.050, 1.148, 1.284,
    1.407, 1.563, 1.887, 2.260, 4.110,
)
# fmt: on
"""An expert's rows over the mean of its layer, at 0, 5, ... 100 % of the experts: DeepSeek-V2-Lite, 26 layers of 64
experts, three tasks in equal parts, 25 thousand tokens (github.com/deepseek-ai/ESFT at 579a771, results)."""

NAMED = ("uniform", "recorded")


def expert_loads(config: ModelConfig, source: str = "recorded", *, seed: int = 0) -> Floats:
    """The chance that a token chooses an expert, [L, E], K in all in each layer.

    source: "uniform"; "recorded", as unevenly as DeepSeek-V2-Lite was seen to (RECORDED_QUANTILES), drawn anew for each
    layer; a file of counts, JSON {"loads": [[...], ...]}; or a routing trace of this model. Raises ConfigError or
    TraceError for a source that is none of these or of another model.
    """
    moes = [layer.feed_forward for layer in config.layers if isinstance(layer.feed_forward, MoeConfig)]
    require(bool(moes), f"this {config.family} model has no experts to place; take one that has")
    num_experts, top_k = moes[0].num_experts, moes[0].router.top_k
    shape = (len(moes), num_experts)
    if source == "uniform":
        return np.full(shape, top_k / num_experts)
    if source == "recorded":
        counts = _drawn(shape, seed)
    elif Path(source).suffix == ".json":
        counts = _from_json(Path(source))
    elif Path(source).is_file():
        trace = Trace.open(source).require(Fingerprint.of(config)).require_tokens()
        counts = np.stack([trace.counts(layer) for layer in config.moe_layers]).astype(np.float64)
    else:
        raise unknown_name("routing", source, [*NAMED, "FILE.json", "a trace"])
    require(counts.shape == shape, f"loads of shape {counts.shape} for {shape[0]} MoE layers of {num_experts} experts")
    return _capped(counts, top_k)


def _drawn(shape: tuple[int, int], seed: int) -> Floats:
    """The recorded spread over E experts, in an order of each layer's own."""
    num_layers, num_experts = shape
    at = (np.arange(num_experts) + 0.5) / num_experts
    load_E = np.interp(at, np.linspace(0, 1, len(RECORDED_QUANTILES)), RECORDED_QUANTILES)
    generator = np.random.default_rng(seed)
    return np.stack([generator.permutation(load_E) for _ in range(num_layers)])


def _from_json(path: Path) -> Floats:
    try:
        counts = np.array(json.loads(path.read_text(encoding="utf-8"))["loads"], np.float64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        wanted = '{"loads": [[...], ...]}, one row of counts a MoE layer'
        raise ConfigError(f"{path}: {error!r}; write {wanted}") from error
    require(counts.ndim == 2 and bool((counts >= 0).all()), f"{path}: loads that are no table of counts of 0 or more")
    return counts


def _capped(counts_LE: Floats, top_k: int) -> Floats:
    """Counts as chances of K choices: none above 1, since a token chooses an expert once."""
    totals_L1 = counts_LE.sum(1, keepdims=True)
    require(bool((totals_L1 > 0).all()), "a layer without any load; give counts of a longer text")
    chances = counts_LE * (top_k / totals_L1)
    for _ in range(20):  # what is cut off goes to the others, which may lift some of them above 1
        over = chances > 1
        if not over.any():
            break
        free = np.where(over, 0.0, chances)
        left = top_k - over.sum(1, keepdims=True)
        chances = np.where(over, 1.0, free * left / np.maximum(free.sum(1, keepdims=True), 1e-300))
    return np.minimum(chances, 1.0)
