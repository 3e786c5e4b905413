"""One dial for a whole recipe: a size names two numbers, and stated rules derive the rest, each with its reason.

The idea of one dial is nanochat's. A size is a recipe to start from: a field that is set otherwise keeps that value,
and the rules after it reckon with it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from moesaic.config import ModelConfig
from moesaic.errors import ConfigError
from moesaic.fields import shown
from moesaic.kernels.devices import AUTO, device_of
from moesaic.registry import unknown_name
from moesaic.train.recipe import Recipe, with_value

MOST_PASSES = 4  # over a corpus; more teach much less than new text (arXiv:2305.16264, sec. 6)
EVALUATIONS = 10  # of a run
MOST_TIMES = 30  # what wishes may make of a size's computation before somebody must say how many steps they want
# Of a training run on two CPU cores, a second: what the estimates of time are made with.
STEADY_FLOPS = {"fp32": 1e11, "bf16": 2e11}


class Size(NamedTuple):
    """The two numbers of the dial: layers, and training tokens for each active parameter.

    About 20 tokens a parameter would be the best use of the compute (Chinchilla, arXiv:2203.15556); the sizes for CPUs
    stop earlier, because their minutes or hours are the point.
    """

    layers: int
    tokens_per_parameter: float
    meant_for: str


SIZES = {
    "tiny": Size(4, 1.5, "2 to 3 minutes on 2 CPU cores"),
    "small": Size(6, 2.5, "about half an hour on 2 CPU cores"),
    "medium": Size(8, 5.0, "2 to 3 hours on 2 CPU cores"),
    "large": Size(24, 20.0, "a GPU"),
}
DEFAULT_SIZE = "tiny"
FAMILY = "qwen3_moe"


class TextFacts(NamedTuple):
    """What there is to train on, and the number of tokens that its tokenizer knows."""

    num_tokens: int
    vocab_size: int


class Derived(NamedTuple):
    """A field of the recipe, its value, and the rule that gave it; `is_set` where the user's value stands instead."""

    field: str
    value: Any
    reason: str
    is_set: bool


@dataclass(frozen=True, kw_only=True)
class SizedRecipe:
    """A recipe and how it came about. `flops` are those of the whole training run."""

    size: str
    recipe: Recipe
    derived: tuple[Derived, ...]
    tokens: int
    flops: float

    @property
    def seconds(self) -> float:
        """How long it may take on two CPU cores."""
        return self.flops / STEADY_FLOPS[self.recipe.train.precision]


class _Draft:
    """The recipe while it is being derived: what stands so far, and what the user wants."""

    def __init__(self, size: Size, wanted: dict[str, Any], has_fast_bf16: bool, text: TextFacts | None) -> None:
        self.size, self.wanted, self.has_fast_bf16, self.text = size, wanted, has_fast_bf16, text
        self.tree: dict[str, Any] = {"vocab_size": None, "model": dict(_CONSTANT), "train": {}}

    def number(self, path: str) -> int:
        """A whole number above 0 that has been derived or set before."""
        tree: Any = self.tree
        for name in path.split("."):
            tree = tree[name]
        if not isinstance(tree, int) or isinstance(tree, bool) or tree < 1:
            raise ConfigError(f"{path}={tree!r}; it must be a whole number above 0")
        return tree

    @property
    def config(self) -> ModelConfig:
        vocab_size = self.number("vocab_size")
        return Recipe(model=self.tree["model"], vocab_size=vocab_size).model_config(vocab_size, None)

    @property
    def tokens(self) -> int:
        """How many tokens the run should see: by the size, but not too many passes over the corpus."""
        wanted = round(self.size.tokens_per_parameter * self.config.active_gemm)
        return wanted if self.text is None else min(wanted, MOST_PASSES * self.text.num_tokens)

    @property
    def flops(self) -> float:
        """Of the run that the size asks for. Its exponents below move so slowly that a corpus' limit is left out."""
        return 6.0 * self.config.active_gemm * round(self.size.tokens_per_parameter * self.config.active_gemm)


Rule = Callable[[_Draft], tuple[Any, str]]

# Fields of the model that no size changes.
_CONSTANT = {"model_type": FAMILY, "norm_topk_prob": True, "rope_theta": 10_000.0}


def derive(
    size: str,
    wanted: Mapping[str, Any] | None = None,
    *,
    has_fast_bf16: bool | None = None,
    text: TextFacts | None = None,
) -> SizedRecipe:
    """The recipe of a size. `wanted` are fields that shall be otherwise, as {"train.steps": 500}.

    has_fast_bf16: whether the machine multiplies bf16 faster than fp32 (None: look). text: what there is to train
    on; None derives as if there were enough. Raises ConfigError for an unknown size, for impossible wishes, and for
    wishes with which the run would take far longer than the size is meant for.
    """
    if size not in SIZES:
        raise unknown_name("size", size, list(SIZES))
    wanted = dict(wanted or {})
    if wanted.get("model.model_type", FAMILY) != FAMILY:
        raise ConfigError(f"a size describes a {FAMILY} model; give another family whole, in a file with --config")
    if has_fast_bf16 is None:
        has_fast_bf16 = fast_bf16(str(wanted.get("train.device", AUTO)))
    draft = _Draft(SIZES[size], wanted, has_fast_bf16, text)
    for path, value in wanted.items():
        draft.tree = with_value(draft.tree, path, value)
    derived = [_apply(draft, path, rule) for path, rule in _RULES.items()]
    recipe = Recipe.from_dict(draft.tree)
    config = recipe.model_config(recipe.vocab_size, None)
    tokens = recipe.train.steps * recipe.train.tokens_per_step
    # A token of a sequence sees half of it on average; a backward pass costs two forward passes.
    flops = 3.0 * config.flops_per_token(recipe.train.sequence_length // 2) * tokens
    sized = SizedRecipe(size=size, recipe=recipe, derived=tuple(derived), tokens=tokens, flops=flops)
    if wanted and "train.steps" not in wanted:
        _check_length(sized, derive(size, has_fast_bf16=draft.has_fast_bf16, text=text), wanted)
    return sized


def _check_length(sized: SizedRecipe, plain: SizedRecipe, wanted: Mapping[str, Any]) -> None:
    """Refuse a run that its wishes have made much longer than the size promises: nobody meant to start that one."""
    times = sized.flops / plain.flops
    if times <= MOST_TIMES:
        return
    wishes = ", ".join(f"{path}={shown(value)}" for path, value in wanted.items())
    raise ConfigError(
        f"with {wishes} the {sized.size} size would compute {times:,.0f} times what it is meant for, about "
        f"{sized.seconds / 3600:,.0f} hours on 2 CPU cores; set train.steps as well, or choose smaller values"
    )


def fast_bf16(device: str = AUTO) -> bool:
    """Whether a device has instructions that multiply bf16 (AMX, AVX-512 BF16, a GPU)."""
    import torch

    if device_of(device, "train.device").type == "cuda":
        return torch.cuda.is_bf16_supported()
    return any(bool(has) for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


def _apply(draft: _Draft, path: str, rule: Rule) -> Derived:
    if path in draft.wanted:
        return Derived(path, draft.wanted[path], "set by you", True)
    value, reason = rule(draft)
    draft.tree = with_value(draft.tree, path, value)
    return Derived(path, value, reason, False)


def _power_of_two(value: float) -> int:
    """The largest power of two that is not above `value`, 1 at least."""
    return 2 ** max(0, math.floor(math.log2(max(1.0, value))))


def _layers(draft: _Draft) -> tuple[Any, str]:
    return draft.size.layers, f"the dial: for {draft.size.meant_for}"


def _hidden_size(draft: _Draft) -> tuple[Any, str]:
    return 32 * draft.number("model.num_hidden_layers"), "32 x layers; loss hardly depends on the shape (2001.08361)"


def _head_dim(draft: _Draft) -> tuple[Any, str]:
    return (32, "32 below a hidden size of 512") if draft.number("model.hidden_size") < 512 else (64, "64 from 512 on")


def _heads(draft: _Draft) -> tuple[Any, str]:
    return max(1, draft.number("model.hidden_size") // draft.number("model.head_dim")), "hidden size / head_dim"


def _key_value_heads(draft: _Draft) -> tuple[Any, str]:
    return draft.number("model.num_attention_heads"), "as many as heads: the cache is small"


def _top_k(draft: _Draft) -> tuple[Any, str]:
    return 4, "a few narrow experts instead of one or two wide ones (DeepSeekMoE, 2401.06066)"


def _experts(draft: _Draft) -> tuple[Any, str]:
    return 8 * draft.number("model.num_experts_per_tok"), "8 x the active ones, as OLMoE (2409.02060)"


def _expert_size(draft: _Draft) -> tuple[Any, str]:
    return max(1, draft.number("model.hidden_size") // 2), "hidden size / 2: a dense block has 8/3 x hidden, cut in 4-6"


def _dense_size(draft: _Draft) -> tuple[Any, str]:
    active = draft.number("model.num_experts_per_tok") * draft.number("model.moe_intermediate_size")
    return active, "as wide as the active experts (used by layers without experts)"


def _vocabulary(draft: _Draft) -> tuple[Any, str]:
    if draft.text is not None:
        return draft.text.vocab_size, "what the text's tokenizer knows"
    return 32 * draft.number("model.hidden_size"), "32 x hidden size: larger models want more (2407.13623)"


def _sequence(draft: _Draft) -> tuple[Any, str]:
    return _power_of_two(64 * draft.number("model.num_hidden_layers")), "64 x layers, down to a power of two"


def _whole_batch(draft: _Draft) -> int:
    """Sequences of a step (DeepSeek LLM, arXiv:2401.02954, eq. 1: 0.292 C^0.327 tokens), a power of two."""
    return _power_of_two(0.292 * draft.flops**0.3271 / draft.number("train.sequence_length"))


def _micro_batches(draft: _Draft) -> tuple[Any, str]:
    at_once = 64 * draft.number("model.hidden_size")
    count = _whole_batch(draft) * draft.number("train.sequence_length") / at_once
    return 2 ** max(0, math.ceil(math.log2(count))), f"so that at most 64 x hidden size = {at_once} tokens go at once"


def _batch(draft: _Draft) -> tuple[Any, str]:
    sequences = max(1, _whole_batch(draft) // draft.number("train.micro_batches"))
    return sequences, "a step of 0.292 C^0.327 tokens for C FLOPs, less to a power of two (2401.02954)"


def _steps(draft: _Draft) -> tuple[Any, str]:
    per_step = math.prod(draft.number(f"train.{name}") for name in ("micro_batches", "batch_size", "sequence_length"))
    steps = max(1, draft.tokens // per_step)
    by_size = f"{draft.size.tokens_per_parameter:g} tokens for each of {draft.config.active_gemm:,} active parameters"
    if draft.text is not None and draft.tokens == MOST_PASSES * draft.text.num_tokens:
        return steps, f"{MOST_PASSES} passes over {draft.text.num_tokens:,} tokens of text (2305.16264)"
    return steps, by_size


def _learning_rate(draft: _Draft) -> tuple[Any, str]:
    rate = float(f"{min(5e-3, 0.3118 * draft.flops**-0.125):.2g}")
    return rate, "0.312 C^-0.125 for C FLOPs (2401.02954), 5e-3 at most: routers collapse at 1e-2"


def _warmup(draft: _Draft) -> tuple[Any, str]:
    return min(500, draft.number("train.steps") // 10), "a tenth of the steps, 500 at most"


def _balance(draft: _Draft) -> tuple[Any, str]:
    points = [[0, 0.2], [500, 0.2], [1000, 0.01]]
    return [["switch", points]], "strong while experts may die, then Switch's 0.01 (2101.03961)"


def _precision(draft: _Draft) -> tuple[Any, str]:
    if not draft.has_fast_bf16:
        return "fp32", "this machine multiplies bf16 no faster"
    if draft.number("model.hidden_size") < 256:
        return "fp32", "matrices too small to gain from bf16"
    return "bf16", "this machine multiplies bf16 faster"


def _evaluate_every(draft: _Draft) -> tuple[Any, str]:
    return max(1, draft.number("train.steps") // EVALUATIONS), f"{EVALUATIONS} times a run"


def _evaluate_tokens(draft: _Draft) -> tuple[Any, str]:
    tokens = min(65_536, max(1024, _power_of_two(draft.tokens / 800)))
    return tokens, "of each domain: about a twentieth of the time for 17 domains"


def _checkpoint_every(draft: _Draft) -> tuple[Any, str]:
    return draft.number("train.evaluate_every"), "with every evaluation, so that the best can be kept"


_RULES: dict[str, Rule] = {
    "model.num_hidden_layers": _layers,
    "model.hidden_size": _hidden_size,
    "model.head_dim": _head_dim,
    "model.num_attention_heads": _heads,
    "model.num_key_value_heads": _key_value_heads,
    "model.num_experts_per_tok": _top_k,
    "model.num_experts": _experts,
    "model.moe_intermediate_size": _expert_size,
    "model.intermediate_size": _dense_size,
    "vocab_size": _vocabulary,
    "train.sequence_length": _sequence,
    "train.micro_batches": _micro_batches,
    "train.batch_size": _batch,
    "train.steps": _steps,
    "train.learning_rate": _learning_rate,
    "train.warmup_steps": _warmup,
    "train.balance_losses": _balance,
    "train.precision": _precision,
    "train.evaluate_every": _evaluate_every,
    "train.evaluate_tokens": _evaluate_tokens,
    "train.checkpoint_every": _checkpoint_every,
}
