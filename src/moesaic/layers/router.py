"""The learned part of a router, and the way from hidden states to a routing decision.

T tokens, D hidden, E experts, K choices a token, M columns of choices.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from moesaic.config.router import RouterConfig
from moesaic.routing import RoutingDecision, Rows, TokenFacts
from moesaic.routing.routers import ROUTERS, Choice, Rechooser, RouterInput
from moesaic.tensor_spec import TensorSpec

BATCH_NORM_EPSILON = 1e-5
BATCH_NORM_MOMENTUM = 0.1


class RouterLayer(nn.Module):
    """A router with its tensors, of which it has those that `config.tensors` names.

    Learned: `weight` [E, D], noisy top-k's `noise_weight` [E, D], and `bias` [E]. Never narrower than fp32: `weight`
    where `fp32_weight` says so, and what no gradient reaches: `selection_bias` [E]; the hash `table` [V, K], int32;
    `penalty_coefficient` [1] of ReLU routing; `running_mean` and `running_var` [E] of logits that are normalised.
    """

    weight: Tensor | None
    noise_weight: Tensor | None
    bias: Tensor | None
    selection_bias: Tensor | None
    table: Tensor | None
    penalty_coefficient: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None

    def __init__(self, config: RouterConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.choose = ROUTERS[config.name]
        specs = {spec.name.removeprefix("router."): spec for spec in config.tensors("router", hidden_size)}
        for name in ("weight", "noise_weight", "bias"):
            self.register_parameter(name, _learned(specs[name]) if name in specs else None)
        for name in ("selection_bias", "table", "penalty_coefficient", "running_mean", "running_var"):
            self.register_buffer(name, _started(specs[name]) if name in specs else None)

    def forward(
        self, x_TD: Tensor, facts: TokenFacts, choices: Rows | None = None, *, is_replayed: bool = False
    ) -> RoutingDecision:
        """Choose experts for every token, in fp32 (or wider) whatever the model's dtype.

        choices: rows whose experts are taken instead; they are weighed anew. is_replayed: that the rows of another run
        will stand in for these. Running means move in neither case.
        """
        seen = self._look(x_TD, facts, choices, first_time=choices is None and not is_replayed)
        choice = self.choose(seen, self.config)
        return RoutingDecision(
            rows=self._rows(choice, facts, choices),
            logits_TE=seen.logits_TE,
            scores_TE=choice.scores_TE,
            mask_T=facts.mask_T,
            token_ids_T=facts.token_ids_T,
            document_ids_T=facts.document_ids_T,
            ranked_TE=choice.ranked_TE,
            noise_std_TE=choice.noise_std_TE,
            router_weight_ED=self.weight,
            groups=self.config.groups,
            top_k=self.config.top_k,
            rechoose=self._rechooser(),
        )

    def _rechooser(self) -> Rechooser | None:
        is_decided = self.weight is not None and self.config.kind.balanceable
        return Rechooser(self.config, self.selection_bias) if is_decided else None

    def _look(self, x_TD: Tensor, facts: TokenFacts, choices: Rows | None, first_time: bool) -> RouterInput:
        """What the router sees. Random numbers are drawn whether or not choices are dictated, so that a second run
        with the generator's first state draws the same."""
        config = self.config
        wide = torch.promote_types(x_TD.dtype if self.weight is None else self.weight.dtype, torch.float32)
        x_TD = x_TD.to(wide)
        if self.training and config.jitter:
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - config.jitter, 1 + config.jitter)
        logits_TE = x_TD.new_zeros(len(x_TD), config.num_choices)
        if self.weight is not None:
            logits_TE = linear(x_TD, self.weight.to(wide), None if self.bias is None else self.bias.to(wide))
        if config.batch_norm:
            logits_TE = self._normalized(logits_TE, facts.mask_T, first_time)
        noise_weight = self.noise_weight if self.training else None
        return RouterInput(
            logits_TE,
            token_ids_T=facts.token_ids_T,
            selection_bias_E=self.selection_bias,
            dictated_TM=None if choices is None else _wide_enough(choices.choices(), config.top_k),
            mask_T=facts.mask_T,
            training=self.training,
            noise_logits_TE=None if noise_weight is None else linear(x_TD, noise_weight.to(wide)),
            table_VK=self.table,
            random_ids_TK=self._random_ids(len(x_TD), x_TD.device) if self.training else None,
        )

    def _normalized(self, logits_TE: Tensor, mask_T: Tensor | None, first_time: bool) -> Tensor:
        """Each expert's logits with mean 0 and variance 1 over the tokens that count (arXiv:1502.03167, alg. 1).

        Outside of training, by running means; these move in the first forward of a step that has gradients, only.
        """
        assert self.running_mean is not None and self.running_var is not None
        mean_E, var_E = self.running_mean.to(logits_TE.dtype), self.running_var.to(logits_TE.dtype)
        routed_TE = logits_TE if mask_T is None else logits_TE[mask_T]
        if self.training and len(routed_TE):
            var_E, mean_E = torch.var_mean(routed_TE, dim=0, correction=0)
            if first_time and torch.is_grad_enabled():
                self._move(mean_E.detach(), var_E.detach() * len(routed_TE) / max(1, len(routed_TE) - 1))
        return (logits_TE - mean_E) * torch.rsqrt(var_E + BATCH_NORM_EPSILON)

    @torch.no_grad()
    def _move(self, mean_E: Tensor, var_E: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        self.running_mean.lerp_(mean_E.to(self.running_mean), BATCH_NORM_MOMENTUM)
        self.running_var.lerp_(var_E.to(self.running_var), BATCH_NORM_MOMENTUM)

    def _random_ids(self, num_tokens: int, device: torch.device) -> Tensor | None:
        """random_ids_TK: different experts for the tokens whose own choice is dropped, -1 for the others."""
        if not self.config.gating_dropout:
            return None
        order_TE = torch.rand(num_tokens, self.config.num_experts, device=device).argsort(dim=1)
        is_dropped_T1 = torch.rand(num_tokens, 1, device=device) < self.config.gating_dropout
        return torch.where(is_dropped_T1, order_TE[:, : self.config.top_k], -1)

    def _rows(self, choice: Choice, facts: TokenFacts, choices: Rows | None) -> Rows:
        if choices is not None:
            return choices.weighed(choice.weights_TM)
        return Rows.from_topk(
            choice.expert_ids_TM,
            choice.weights_TM,
            self.config.num_experts,
            mask_T=facts.mask_T,
            weight_on=choice.weight_on,
            fixed_top_k=self.config.kind.fixed_top_k,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As nn.Module's, but what no gradient reaches stays fp32, since its small steps would vanish in bf16; so does
        a weight that is to."""
        kept = list(self._buffers.values())
        if self.config.fp32_weight and self.weight is not None:
            kept += [self.weight, self.weight.grad]

        def apply(values: Tensor) -> Tensor:
            changed = fn(values)
            narrowed = changed.dtype in (torch.bfloat16, torch.float16)
            return values.to(changed.device) if narrowed and any(values is each for each in kept) else changed

        return super()._apply(apply, recurse)


def _learned(spec: TensorSpec) -> nn.Parameter:
    return nn.Parameter(torch.empty(spec.shape, dtype=torch.float32 if spec.dtype == "float32" else None))


def _started(spec: TensorSpec) -> Tensor:
    """A buffer as it starts; a table, which must be made or loaded, with ids that no expert has."""
    dtype = torch.int32 if spec.dtype == "int32" else torch.float32
    return torch.full(spec.shape, -1 if spec.start is None else spec.start, dtype=dtype)


def _wide_enough(expert_ids_TM: Tensor, top_k: int) -> Tensor:
    """At least K columns."""
    return pad(expert_ids_TM, (0, max(0, top_k - expert_ids_TM.shape[1])), value=-1)
