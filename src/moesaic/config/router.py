"""How tokens choose experts, as data: what every router is, its settings, and what goes with what. No torch here.

E experts, K choices a token, D hidden, V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from moesaic.checks import require, require_positive, require_share
from moesaic.errors import ConfigError
from moesaic.registry import unknown_name
from moesaic.tensor_spec import TensorSpec


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """Experts in groups (one a device), of which a token may use only its `top_groups` best.

    score: a group is as good as its best expert ("max": DeepSeek-V2, arXiv:2405.04434, sec. 2.2.2), or as the sum of
    its two best ("top2_sum": DeepSeek-V3, arXiv:2412.19437, sec. 2.1.2).
    """

    num_groups: int
    top_groups: int
    score: Literal["max", "top2_sum"] = "top2_sum"

    def __post_init__(self) -> None:
        require_positive(self, "num_groups", "top_groups")
        require(
            self.top_groups <= self.num_groups,
            f"top_groups={self.top_groups} is more than num_groups={self.num_groups}; use 1 to {self.num_groups}",
        )
        require(self.score in ("max", "top2_sum"), f"groups.score={self.score!r}; known: max, top2_sum")


@dataclass(frozen=True, kw_only=True)
class NoisySettings:
    """noise_epsilon is added to the learned standard deviation, so that it never reaches 0."""

    noise_epsilon: float = 1e-2

    def __post_init__(self) -> None:
        require(self.noise_epsilon >= 0, f"noise_epsilon={self.noise_epsilon}; use 0 or more")


@dataclass(frozen=True, kw_only=True)
class Top2Settings:
    """second: how the second expert is found while training. "random": it is the second best, and stays at random, the
    likelier the larger its share (GShard, arXiv:2006.16668, alg. 1). "all": it stays. "sampling": it is drawn from
    those that are left, by their probabilities (fairseq's `moe_second_expert_policy`).
    """

    second: Literal["random", "all", "sampling"] = "random"

    def __post_init__(self) -> None:
        known = ("random", "all", "sampling")
        require(self.second in known, f"second={self.second!r} of a top-2 router; known: {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class HashSettings:
    """A fixed table from token id to experts.

    table: "random" draws it by `seed`; "balanced" gives each id, in their order, to the experts with the fewest
    ids so far. weight: "uniform" is 1/K and needs no learned router; the others score logits as the routers do.
    vocab_size: V, the rows of the table.
    """

    vocab_size: int
    table: Literal["random", "balanced"] = "balanced"
    weight: Literal["uniform", "softmax", "sigmoid", "sqrt_softplus"] = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size")
        require(self.table in ("random", "balanced"), f"hash table={self.table!r}; known: random, balanced")
        is_seed = isinstance(self.seed, int) and not isinstance(self.seed, bool) and self.seed >= 0
        require(is_seed, f"hash seed={self.seed!r}; it must be a whole number, 0 or more")
        known = ("uniform", "softmax", "sigmoid", "sqrt_softplus")
        require(self.weight in known, f"hash weight={self.weight!r}; known: {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class SparseMixerSettings:
    """gap: experts whose logit is further than 2 * gap (relative) below the best take no part in a choice."""

    gap: float = 0.01

    def __post_init__(self) -> None:
        require(self.gap > 0, f"gap={self.gap}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class SinkhornSettings:
    """iterations: how often rows and columns are scaled in turn."""

    iterations: int = 20

    def __post_init__(self) -> None:
        require_positive(self, "iterations")


@dataclass(frozen=True, kw_only=True)
class ReluSettings:
    """The penalty that holds the mean number of active experts at K: where it starts, its factor a step."""

    start: float = 1e-8
    factor: float = 1.2

    def __post_init__(self) -> None:
        require(self.start > 0, f"start={self.start}; it must be above 0")
        require(self.factor > 1, f"factor={self.factor}; it must be above 1")


@dataclass(frozen=True, kw_only=True)
class TopPSettings:
    """p: a token takes its best experts until their probabilities reach p; one at least, K at most."""

    p: float = 0.4

    def __post_init__(self) -> None:
        require(0 < self.p <= 1, f"p={self.p}; it must be above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class NullSettings:
    """num_null_experts: further choices, after the E experts, that compute nothing."""

    num_null_experts: int

    def __post_init__(self) -> None:
        require_positive(self, "num_null_experts")


RouterSettings = (
    NoisySettings
    | Top2Settings
    | HashSettings
    | SparseMixerSettings
    | SinkhornSettings
    | ReluSettings
    | TopPSettings
    | NullSettings
)


@dataclass(frozen=True, kw_only=True)
class RouterKind:
    """What a router is, before any tensor.

    settings: the class of its settings. top_k: the only K it has. renormalize: whether it divides the chosen weights
    by their sum; None leaves that to the configuration, where it is true unless said otherwise.
    fixed_top_k: every token gets exactly K experts. ranks_scores: it takes the K best scores, so that selection
    biases can move the choice and groups can limit it. leaks: it gives experts their tokens by comparing
    these with later ones, at least while training: no such model writes on token by token.
    takes_capacity: experts may be given a limit; false where they choose, share evenly or are all used.
    balanceable: losses that even the load out can move its choice.
    picks_top_k: every token picks K experts of its own, which gating dropout can replace by others.
    """

    settings: type | None = None
    top_k: int | None = None
    renormalize: bool | None = None
    fixed_top_k: bool = True
    ranks_scores: bool = False
    leaks: bool = False
    takes_capacity: bool = True
    balanceable: bool = True
    picks_top_k: bool = True


ROUTER_KINDS: dict[str, RouterKind] = {
    "softmax_topk": RouterKind(ranks_scores=True),
    "topk_softmax": RouterKind(renormalize=True, ranks_scores=True),
    "sigmoid_topk": RouterKind(ranks_scores=True),
    "sqrt_softplus_topk": RouterKind(renormalize=True, ranks_scores=True),
    "noisy_topk": RouterKind(settings=NoisySettings, renormalize=True),
    "switch": RouterKind(top_k=1, renormalize=False),
    "gshard_top2": RouterKind(settings=Top2Settings, top_k=2, renormalize=True, fixed_top_k=False),
    "hash": RouterKind(settings=HashSettings, renormalize=True, balanceable=False, picks_top_k=False),
    "sigmoid_input": RouterKind(renormalize=False, ranks_scores=True),
    "sparsemixer": RouterKind(settings=SparseMixerSettings, renormalize=False),
    "expert_choice": RouterKind(
        renormalize=False, fixed_top_k=False, leaks=True, takes_capacity=False, balanceable=False, picks_top_k=False
    ),
    "base": RouterKind(
        top_k=1, renormalize=False, leaks=True, takes_capacity=False, balanceable=False, picks_top_k=False
    ),
    "sinkhorn": RouterKind(settings=SinkhornSettings),
    "relu": RouterKind(settings=ReluSettings, renormalize=False, fixed_top_k=False, picks_top_k=False),
    "top_p": RouterKind(settings=TopPSettings, fixed_top_k=False, picks_top_k=False),
    "null_topk": RouterKind(settings=NullSettings, fixed_top_k=False, ranks_scores=True),
    "dense": RouterKind(renormalize=False, takes_capacity=False, balanceable=False, picks_top_k=False),
}


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How tokens choose experts. `name` is a router of `moesaic.routing.routers`; the rest are its settings.

    renormalize divides the chosen weights by their sum; None is what the router always does, else true.
    scaling_factor multiplies them afterwards.
    selection_bias adds a bias per expert that takes part in choosing but never in weighting (arXiv:2408.15664).
    groups limits a token to experts of a few groups. settings: what only this router has; None is its defaults.
    jitter: while training, the router's input is multiplied by a random factor from 1 - jitter to 1 + jitter (Switch,
    arXiv:2101.03961, sec. 2.2). batch_norm: logits are normalised over the batch's tokens, expert by expert, and by
    running means outside of training. gating_dropout: while training, with this probability, a token's K experts are
    drawn at random instead of chosen, and weighed as ever. (Gating Dropout, arXiv:2205.14336, ignores the router for
    whole steps and keeps tokens on their own machine; here every token draws for itself, among all experts.)
    bias: a learned constant that is added to each logit, and so takes part in choosing and weighing (gpt-oss).
    fp32_weight: the learned matrix stays fp32 whatever the model's dtype, as what is not learned always does (ERNIE).

    Raises ConfigError for settings that do not go together.
    """

    name: str
    num_experts: int
    top_k: int
    renormalize: bool | None = None
    scaling_factor: float = 1.0
    selection_bias: bool = False
    groups: GroupConfig | None = None
    settings: RouterSettings | None = None
    jitter: float = 0.0
    batch_norm: bool = False
    gating_dropout: float = 0.0
    bias: bool = False
    fp32_weight: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "num_experts", "top_k")
        require_share(self, "jitter", "gating_dropout")
        require(
            0 < self.scaling_factor < math.inf, f"scaling_factor={self.scaling_factor}; it must be above 0 and finite"
        )
        if self.name not in ROUTER_KINDS:
            raise unknown_name("router", self.name, sorted(ROUTER_KINDS))
        self._check_top_k()
        self._settle()
        if self.selection_bias and not self.kind.ranks_scores:
            raise self._refusal("selection_bias", "does not choose by ranked scores alone", "ranks_scores")
        if self.gating_dropout and not self.kind.picks_top_k:
            raise self._refusal("gating_dropout", "does not pick K experts for each token", "picks_top_k")
        if self.groups is not None:
            self._check_groups(self.groups)
        require(
            self.has_weight or not (self.jitter or self.batch_norm or self.bias or self.fp32_weight),
            'jitter, batch_norm, bias or fp32_weight with hash weight="uniform", which learns nothing; leave them out',
        )

    @property
    def kind(self) -> RouterKind:
        return ROUTER_KINDS[self.name]

    @property
    def num_choices(self) -> int:
        """What a token chooses from: the experts, and null experts where there are some."""
        null = self.settings.num_null_experts if isinstance(self.settings, NullSettings) else 0
        return self.num_experts + null

    @property
    def has_weight(self) -> bool:
        """Whether there is a learned router at all."""
        return not (isinstance(self.settings, HashSettings) and self.settings.weight == "uniform")

    def tensors(self, prefix: str, hidden_size: int) -> Iterator[TensorSpec]:
        """The router's own tensors. What is not learned keeps its dtype whatever the model's."""
        noisy = self.name == "noisy_topk"
        if self.has_weight:
            shape, dtype = (self.num_choices, hidden_size), "float32" if self.fp32_weight else None
            yield TensorSpec(f"{prefix}.weight", shape, "router", dtype=dtype, start=0.0 if noisy else None)
            if noisy:
                yield TensorSpec(f"{prefix}.noise_weight", shape, "router", start=0.0)
        if self.bias:
            yield TensorSpec(f"{prefix}.bias", (self.num_choices,), "router", start=0.0)
        if self.selection_bias:
            yield _buffer(f"{prefix}.selection_bias", self.num_experts, 0.0)
        if isinstance(self.settings, HashSettings):
            shape = (self.settings.vocab_size, self.top_k)
            yield TensorSpec(f"{prefix}.table", shape, "router", is_parameter=False, dtype="int32")
        if isinstance(self.settings, ReluSettings):
            yield _buffer(f"{prefix}.penalty_coefficient", 1, self.settings.start)
        if self.batch_norm:
            yield _buffer(f"{prefix}.running_mean", self.num_choices, 0.0)
            yield _buffer(f"{prefix}.running_var", self.num_choices, 1.0)

    def _check_top_k(self) -> None:
        require(
            self.top_k <= self.num_experts,
            f"top_k={self.top_k} is more than num_experts={self.num_experts}; use 1 to {self.num_experts}",
        )
        only = self.num_experts if self.name == "dense" else self.kind.top_k
        require(
            only is None or self.top_k == only, f"top_k={self.top_k} with router {self.name!r}; it always has {only}"
        )

    def _settle(self) -> None:
        """Fill in what was left to the router."""
        always, wanted = self.kind.renormalize, self.renormalize
        habit = "always" if always else "never"
        require(
            always is None or wanted is None or wanted == always,
            f"renormalize={wanted} with router {self.name!r}, which {habit} renormalizes; leave it out",
        )
        object.__setattr__(self, "renormalize", (True if wanted is None else wanted) if always is None else always)
        expected: Any = self.kind.settings
        if expected is None or isinstance(self.settings, expected):
            require(
                expected is not None or self.settings is None,
                f"settings={self.settings!r} with router {self.name!r}, which has none; leave them out",
            )
            return
        if self.settings is not None:
            raise ConfigError(f"settings={self.settings!r} with router {self.name!r}; give {expected.__name__}")
        try:
            object.__setattr__(self, "settings", expected())
        except TypeError as error:
            raise ConfigError(f"router {self.name!r} needs its {expected.__name__}: {error}") from error

    def _check_groups(self, groups: GroupConfig) -> None:
        if not self.kind.ranks_scores:
            raise self._refusal("groups", "does not choose by ranked scores", "ranks_scores")
        require(
            not isinstance(self.settings, NullSettings),
            f"groups with router {self.name!r}, whose null experts are on no device; leave them out",
        )
        divisors = [n for n in range(1, self.num_experts + 1) if self.num_experts % n == 0]
        require(
            self.num_experts % groups.num_groups == 0,
            f"num_groups={groups.num_groups} does not divide num_experts={self.num_experts}; use one of {divisors}",
        )
        reachable = groups.top_groups * (self.num_experts // groups.num_groups)
        require(
            self.top_k <= reachable,
            f"top_k={self.top_k} of the {reachable} experts in top_groups={groups.top_groups} groups; "
            "raise top_groups or lower top_k",
        )
        require(
            groups.score != "top2_sum" or self.num_experts // groups.num_groups >= 2,
            f'groups.score="top2_sum" with one expert a group (num_groups={groups.num_groups}); use "max"',
        )

    def _refusal(self, field: str, why: str, needs: str) -> ConfigError:
        fitting = ", ".join(name for name, kind in ROUTER_KINDS.items() if getattr(kind, needs))
        return ConfigError(f"{field} with router {self.name!r}, which {why}; leave it out or use one of: {fitting}")


def _buffer(name: str, size: int, start: float) -> TensorSpec:
    return TensorSpec(name, (size,), "router", is_parameter=False, dtype="float32", start=start)
