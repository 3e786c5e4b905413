"""The feed-forward parts: a block, gated or not, an MoE of such blocks, and its soft relative. No torch here."""

from collections.abc import Iterator
from dataclasses import dataclass

from moesaic.checks import require, require_positive, require_share
from moesaic.config.activation import Activation
from moesaic.config.capacity import CapacityConfig, refusal
from moesaic.config.router import RouterConfig
from moesaic.tensor_spec import Role, TensorSpec


@dataclass(frozen=True, kw_only=True)
class MlpConfig:
    """A gated feed-forward block: down(act(gate(x)) * up(x)) (SwiGLU, arXiv:2002.05202, eq. 6).

    gated: false leaves the gate out: down(act(up(x))) (arXiv:1706.03762, eq. 2).
    """

    intermediate_size: int
    activation: Activation = "silu"
    bias: bool = False
    gated: bool = True

    def __post_init__(self) -> None:
        require_positive(self, "intermediate_size")

    def tensors(self, prefix: str, hidden_size: int, role: Role = "mlp") -> Iterator[TensorSpec]:
        shapes = {
            "gate_proj": (self.intermediate_size, hidden_size),
            "up_proj": (self.intermediate_size, hidden_size),
            "down_proj": (hidden_size, self.intermediate_size),
        }
        if not self.gated:
            del shapes["gate_proj"]
        for name, shape in shapes.items():
            yield TensorSpec(f"{prefix}.{name}.weight", shape, role)
            if self.bias:
                yield TensorSpec(f"{prefix}.{name}.bias", shape[:1], role)


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """A router over experts, and optionally a shared expert that every token passes (arXiv:2401.06066).

    capacity: the limit to an expert's rows while training, evaluation_capacity: otherwise; None: dropless.
    expert_dropout: of the routed experts' inner activations while training (Switch, arXiv:2101.03961, sec. 2.4).
    output_masking: the share of rows whose output is left out while training; otherwise all outputs are that much
    smaller (NLLB, arXiv:2207.04672, sec. 6.2.1). bias: of all projections of the routed experts. gated: as MlpConfig's.
    shared_gate: the shared expert's output is multiplied by the sigmoid of a learned number of the token (Qwen2-MoE,
    arXiv:2407.10671).
    """

    router: RouterConfig
    intermediate_size: int
    activation: Activation = "silu"
    bias: bool = False
    shared: MlpConfig | None = None
    shared_gate: bool = False
    capacity: CapacityConfig | None = None
    evaluation_capacity: CapacityConfig | None = None
    expert_dropout: float = 0.0
    output_masking: float = 0.0
    gated: bool = True

    def __post_init__(self) -> None:
        require_positive(self, "intermediate_size")
        require_share(self, "expert_dropout", "output_masking")
        require(
            self.shared is not None or not self.shared_gate,
            "shared_gate without a shared expert; add one (`shared`), or leave it out",
        )
        for capacity in (self.capacity, self.evaluation_capacity):
            reason = None if capacity is None else refusal(self.router, capacity, has_shared=self.shared is not None)
            require(reason is None, reason or "")

    @property
    def num_experts(self) -> int:
        return self.router.num_experts

    def tensors(self, prefix: str, hidden_size: int) -> Iterator[TensorSpec]:
        """The router, the stacked experts and the shared expert, in the order of the state_dict."""
        num_experts, top_k = self.num_experts, self.router.top_k
        yield from self.router.tensors(f"{prefix}.router", hidden_size)
        into = ("gate_up", 2 * self.intermediate_size) if self.gated else ("up", self.intermediate_size)
        for name, shape in (
            (into[0], (num_experts, into[1], hidden_size)),
            ("down", (num_experts, hidden_size, self.intermediate_size)),
        ):
            yield TensorSpec(f"{prefix}.experts.{name}", shape, "experts", top_k_of=(top_k, num_experts))
            if self.bias:
                yield TensorSpec(
                    f"{prefix}.experts.{name}_bias", shape[:2], "experts", top_k_of=(top_k, num_experts), start=0.0
                )
        if self.shared:
            yield from self.shared.tensors(f"{prefix}.shared_experts", hidden_size, "shared_experts")
        if self.shared_gate:
            yield TensorSpec(f"{prefix}.shared_gate.weight", (1, hidden_size), "shared_experts")


@dataclass(frozen=True, kw_only=True)
class SoftMoeConfig:
    """Experts whose inputs, `slots_per_expert` each, are weighted means of a text's tokens (arXiv:2308.00951).

    Every slot is computed however many tokens there are. All parameters count as active, since each of them has a part
    in every token; the FLOPs of a token are those of the slots, shared by the tokens of a text.
    expert_dropout: as MoeConfig's.
    """

    num_experts: int
    slots_per_expert: int
    intermediate_size: int
    activation: Activation = "silu"
    expert_dropout: float = 0.0

    def __post_init__(self) -> None:
        require_positive(self, "num_experts", "slots_per_expert", "intermediate_size")
        require_share(self, "expert_dropout")

    def tensors(self, prefix: str, hidden_size: int) -> Iterator[TensorSpec]:
        yield TensorSpec(f"{prefix}.slots", (self.num_experts, self.slots_per_expert, hidden_size), "router")
        yield TensorSpec(f"{prefix}.scale", (1,), "router", start=1.0)
        inner = self.intermediate_size
        yield TensorSpec(f"{prefix}.experts.gate_up", (self.num_experts, 2 * inner, hidden_size), "experts")
        yield TensorSpec(f"{prefix}.experts.down", (self.num_experts, hidden_size, inner), "experts")

    def flops_per_token(self, hidden_size: int, num_tokens: int) -> int:
        """FLOPs for each of the `num_tokens` tokens of a text: its scores, into the slots and out, and the slots."""
        num_slots = self.num_experts * self.slots_per_expert
        slot = 2 * 3 * self.intermediate_size * hidden_size
        return 3 * 2 * num_slots * hidden_size + num_slots * slot // num_tokens
