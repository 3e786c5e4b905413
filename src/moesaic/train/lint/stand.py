"""The stand on which experiments are made: a set-up whose routing lint decides, put back after each.

Z are router logits. A router's weight becomes [1 | 0] and its block's input Z, so that the block's own code routes by Z
whatever the model's weights. B batch, S sequence, T tokens, E experts, K choices a token, D hidden.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.train.lint.blocks import Block, find_blocks
from moesaic.train.lint.report import NotMeasured
from moesaic.train.lint.setups import SetUp
from moesaic.train.lint.theirs import their_own

Logits = Callable[[int, int, int], Tensor]
"""Z [B, S, E] of the block of this number, for B rows of S columns."""

Known = TypeVar("Known")
SEED = 0
STEEP = 30.0  # all of a softmax, or of sigmoids
CLEAR = 5.0  # every expert apart from the next, also in a sigmoid


class Measured(NamedTuple):
    """What came of a step: its loss, the gradients, and the blocks' tensors of E numbers after it."""

    loss: float
    gradients: dict[str, Tensor]
    after: dict[str, Tensor]


class Stand:
    """Makes experiments on a set-up. Its weights and buffers are after each what they were before."""

    def __init__(self, set_up: SetUp) -> None:
        self.set_up, self.model = set_up, set_up.model
        self.blocks = find_blocks(self.model)
        for block in self.blocks:
            _refuse_narrow(block, self.model.get_parameter(block.router))
        if len({block.num_experts for block in self.blocks}) > 1:
            numbers = sorted({block.num_experts for block in self.blocks})
            raise ConfigError(
                f"blocks with {numbers} experts; lint checks models whose blocks all have the same number"
            )
        self._state = {name: tensor.detach().clone() for name, tensor in _tensors(self.model)}
        self._chosen: dict[int, tuple[int, ...]] = {}
        self._known: dict[Any, Any] = {}

    def once(self, experiment: "Callable[[Stand], Known]") -> "Known":
        """What an experiment gives, which several checks look at; made the first time."""
        if experiment not in self._known:
            self._known[experiment] = experiment(self)
        return self._known[experiment]

    @property
    def first(self) -> Block:
        """The block on which a choice is looked at."""
        return self.blocks[0]

    @property
    def num_experts(self) -> int:
        """E of the first block."""
        return self.first.num_experts

    def run(
        self, logits: Logits, micro_batches: Sequence[Any] | None = None, *, silent: bool = True, steps: int = 1
    ) -> Measured:
        """Train a step (or several, of which gradients and loss are the first one's) with routing by `logits`.

        silent: the experts' output is multiplied by 0, so that what routers learn comes from balance losses alone.
        """
        batches = [self.set_up.batch] if micro_batches is None else micro_batches
        torch.manual_seed(SEED)
        columns = self.set_up.columns(batches[0])
        try:
            with self._forced(logits, columns, silent):
                loss = self._step(batches, is_needed=micro_batches is None)
                gradients = self.set_up.gradients()
                for _ in range(steps - 1):
                    self._step(batches)
            now = dict(_tensors(self.model))
            after = {name: now[name].detach().clone() for block in self.blocks for name in block.per_expert}
        finally:
            self.restore()
        return Measured(loss, gradients, after)

    def require_trained_routers(self) -> None:
        """Raise NotMeasured where no router's weight is trained at all."""
        if not any(self.model.get_parameter(block.router).requires_grad for block in self.blocks):
            raise NotMeasured("the routers are frozen (requires_grad is false): no balance loss can move them")

    def routers(self, gradients: dict[str, Tensor]) -> Tensor:
        """The routers' gradients in one vector; zeros where there are none."""
        names = [block.router for block in self.blocks]
        parts = [gradients.get(name, torch.zeros_like(self._state[name])) for name in names]
        return torch.cat([part.double().flatten() for part in parts])

    def others(self, gradients: dict[str, Tensor]) -> Tensor:
        """The gradients of all outside the blocks in one vector: what the prediction alone moves."""
        inside = tuple(f"{block.name}." for block in self.blocks)
        parts = [gradient for name, gradient in sorted(gradients.items()) if not name.startswith(inside)]
        return torch.cat([part.double().flatten() for part in parts]) if parts else torch.zeros(0)

    def chosen(self, first: int) -> tuple[int, ...]:
        """The experts of a token whose logits fall from expert `first` on."""
        if first not in self._chosen:
            with self.probing() as probe:
                self._chosen[first] = probe.chosen(falling(self.num_experts, first) * CLEAR)
        return self._chosen[first]

    @property
    def top_k(self) -> int:
        """K. Raises NotMeasured where logits do not decide."""
        chosen = self.chosen(0)
        if 0 not in chosen or len(chosen) == self.num_experts:
            raise NotMeasured("the router's weight does not decide which experts a token gets")
        return len(chosen)

    @cached_property
    def num_tokens(self) -> int:
        """T of the set-up's own micro-batch."""
        seen: list[int] = []
        _with_input(*self._arguments, lambda x: (seen.append(x.numel() // x.shape[-1]), x)[1])
        return seen[0]

    def steep(self, experts: Sequence[int]) -> Tensor:
        """z [E] that chooses these experts, all alike, and no others."""
        z_E = torch.full((self.num_experts,), -STEEP)
        z_E[list(experts)] = STEEP
        return z_E

    @contextmanager
    def probing(self) -> Iterator["Probe"]:
        """The first block by itself, with the arguments that training gives it."""
        args, kwargs = self._arguments  # by a step, after which everything is put back
        try:
            with self._prepared():
                yield Probe(self.model, self.first, args, kwargs)
        finally:
            self.restore()

    @cached_property
    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        block = self.first.module
        hook = block.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
        try:
            self._step([self.set_up.batch])
        finally:
            hook.remove()
            self._write_state()
        if not seen:
            raise NotMeasured(f"training did not call {self.first.name}, a {type(block).__name__}")
        return seen[0]

    def _step(self, batches: Sequence[Any], *, is_needed: bool = True) -> float:
        """One of the set-up's own; is_needed: without which nothing can be said at all. Its loss, a number."""
        with their_own(f"a step of {len(batches)} micro-batch{'es' if len(batches) > 1 else ''}", is_needed=is_needed):
            loss = self.set_up.step(batches)
        if not math.isfinite(loss):
            raise ConfigError(f"the set-up's loss is {loss}; build it with weights and data whose loss is a number")
        return loss

    @torch.no_grad()
    def restore(self) -> None:
        """Weights and buffers as they were built."""
        self._write_state()
        self.model.zero_grad()

    @torch.no_grad()
    def _write_state(self) -> None:
        for name, tensor in _tensors(self.model):
            tensor.copy_(self._state[name])

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """Routers that hand on what they are given, without any bias."""
        with torch.no_grad():
            tensors = dict(_tensors(self.model))
            for block in self.blocks:
                weight = tensors[block.router].zero_()
                (weight.T if block.is_transposed else weight)[:, : block.num_experts].fill_diagonal_(1.0)
                for name in block.per_expert:
                    tensors[name].zero_()
        yield

    @contextmanager
    def _forced(self, logits: Logits, columns: int, silent: bool) -> Iterator[None]:
        hooks = []
        for index, block in enumerate(self.blocks):
            hooks.append(block.module.register_forward_pre_hook(_giving(logits, index, columns), with_kwargs=True))
            if silent:
                hooks.append(block.module.register_forward_hook(_silenced))
        try:
            with self._prepared():
                yield
        finally:
            for hook in hooks:
                hook.remove()


class Probe:
    """One block, called by itself."""

    def __init__(self, model: nn.Module, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.model, self.block, self.args, self.kwargs = model, block, args, kwargs

    def tensor(self, name: str) -> Tensor:
        """A weight or buffer of the model, to be changed."""
        return dict(_tensors(self.model))[name]

    def outputs(self, z_TE: Tensor) -> Tensor:
        """y_TD of tokens with these logits (repeated to as many tokens as the block is used to), and its gradient."""
        args, kwargs = _with_input(self.args, self.kwargs, lambda x: _as_input(x, z_TE))
        y = _first_tensor(self.block.module(*args, **kwargs))
        return y.reshape(-1, y.shape[-1])[: len(z_TE)]

    def chosen(self, z_E: Tensor) -> tuple[int, ...]:
        """The experts that a token with these logits reaches: those that get a gradient."""
        weights = self.block.expert_weights(self.model)
        trained = {name: weight for name, weight in weights.items() if weight.is_floating_point()}
        were = {name: weight.requires_grad for name, weight in trained.items()}
        for weight in trained.values():
            weight.requires_grad_(True)
        with torch.enable_grad():
            y = self.outputs(z_E[None])
            pull = torch.rand(y.shape, generator=torch.Generator().manual_seed(SEED)).to(y)
            found = torch.autograd.grad((y * pull).sum(), list(trained.values()), allow_unused=True)
        for name, weight in trained.items():
            weight.requires_grad_(were[name])
        return tuple(sorted(reached(self.block, dict(zip(trained, found, strict=True)))))


def reached(block: Block, gradients: dict[str, Tensor | None]) -> set[int]:
    """The experts of a block with a gradient that is not zero."""
    experts: set[int] = set()
    for name, gradient in gradients.items():
        if gradient is None:
            continue
        if block.is_stacked:
            experts |= set(gradient.flatten(1).abs().amax(1).nonzero().flatten().tolist())
        elif gradient.abs().max() > 0:
            experts.add(block.expert_of(name))
    return experts


def falling(num_experts: int, first: int) -> Tensor:
    """z [E]: 1 at expert `first`, then less and less, around to the one before it."""
    return 1 - ((torch.arange(num_experts) - first) % num_experts) / num_experts


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _refuse_narrow(block: Block, weight: Tensor) -> None:
    width = weight.shape[0 if block.is_transposed else 1]
    if width < block.num_experts:
        raise ConfigError(
            f"{block.name} has {block.num_experts} experts and {width} inputs; lint gives every expert an input of its "
            "own: check a model whose hidden size is at least its number of experts"
        )


def _giving(logits: Logits, index: int, columns: int) -> Callable[..., Any]:
    """A hook that puts Z in place of a block's input. The input's graph stays: other ranks wait for all gradients."""

    def given(x: Tensor) -> Tensor:
        rows, width = (x.shape[0], x.shape[1]) if x.dim() == 3 else (x.shape[0] // columns, columns)
        return _as_input(x, logits(index, rows, width).flatten(0, 1)) + x * 0

    return lambda _, args, kwargs: _with_input(args, kwargs, given)


def _silenced(_: nn.Module, __: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return output * 0
    silenced = _first_tensor(output) * 0
    return (silenced, *output[1:])


def _first_tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else next(part for part in output if isinstance(part, Tensor))


def _with_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block, whose first tensor is its input, with another one."""
    if args and isinstance(args[0], Tensor):
        return (change(args[0]), *args[1:]), kwargs
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    return args, {**kwargs, name: change(kwargs[name])}


def _as_input(x: Tensor, z_TE: Tensor) -> Tensor:
    """Z in the first E places of an input like x, its tokens repeated as often as they must be."""
    num_tokens = x.numel() // x.shape[-1]
    repeated = z_TE.repeat(-(-num_tokens // len(z_TE)), 1)[:num_tokens]
    wide = torch.zeros(num_tokens, x.shape[-1], dtype=x.dtype, device=x.device)
    wide[:, : z_TE.shape[1]] = repeated.to(wide)
    return wide.view(x.shape)
