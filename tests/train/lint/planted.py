"""A small mixture of experts in plain torch that is right, and the same with one thing wrong at a time.

Names are odd on purpose: lint must not live on them. T tokens, D hidden, E experts, K choices, L layers.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moesaic.train.lint import OwnLoop

VOCABULARY, WIDTH, INNER, LAYERS, EXPERTS, TOP_K, GROUPS = 31, 12, 5, 3, 6, 2, 3
ROWS, COLUMNS = 4, 16
RATE, COEFFICIENT, CAPACITY = 0.01, 0.1, 1.25


class Worker(nn.Module):
    """An expert."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


class Office(nn.Module):
    """A block of sigmoid scores, groups, a bias that chooses, and a capacity; `wrong` names what is planted in it."""

    def __init__(self, wrong: str) -> None:
        super().__init__()
        self.wrong = wrong
        self.leaning: Tensor
        self.seen: Tensor
        self.clerk = nn.Parameter(torch.randn(EXPERTS, WIDTH) / 4)
        self.workers = nn.ModuleList(Worker() for _ in range(EXPERTS))
        self.register_buffer("leaning", None if wrong == "nothing" else torch.zeros(EXPERTS))
        self.register_buffer("seen", torch.zeros(EXPERTS))  # a counter, which lets nothing be chosen

    def forward(self, x: Tensor, is_token: Tensor) -> Tensor:
        x_TD = x.reshape(-1, WIDTH)
        scores_TE = (x_TD @ self.clerk.T).sigmoid()
        chosen_TK = self._choose(scores_TE)
        weights_TK = scores_TE.gather(1, chosen_TK)
        weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
        kept_TK = self._keep(chosen_TK, is_token.reshape(-1, 1))
        self._note(scores_TE, chosen_TK, kept_TK, is_token.reshape(-1))
        y_TD = torch.zeros_like(x_TD)
        for number, worker in enumerate(self.workers):
            tokens, choices = ((chosen_TK == number) & kept_TK).nonzero(as_tuple=True)
            done = worker(x_TD[tokens])
            if self.wrong == "idle" and number == 4:
                done = done.detach()
            y_TD = y_TD.index_add(0, tokens, done * weights_TK[tokens, choices, None])
        return y_TD.view_as(x)

    def _choose(self, scores_TE: Tensor) -> Tensor:
        ranked_TE = scores_TE.detach() + (0 if self.leaning is None else self.leaning)
        by_group = ranked_TE.unflatten(1, (GROUPS, -1))
        best = by_group.sum(-1).topk(2).indices
        is_allowed = torch.zeros(by_group.shape[:2], dtype=torch.bool).scatter(1, best, True)
        hidden = 0.0 if self.wrong == "zeros" else -math.inf
        return by_group.masked_fill(~is_allowed[..., None], hidden).flatten(1).topk(TOP_K).indices

    def _keep(self, chosen_TK: Tensor, is_token_T1: Tensor) -> Tensor:
        """The first rows of each expert up to the capacity, in which padding has no part."""
        most = math.ceil(CAPACITY * int(is_token_T1.sum()) * TOP_K / EXPERTS)
        one_hot = nn.functional.one_hot(chosen_TK, EXPERTS).mul(is_token_T1[..., None]).flatten(0, 1)
        place = (one_hot.cumsum(0) * one_hot).sum(1).view_as(chosen_TK)
        return (place <= most) & (is_token_T1 > 0)

    def _note(self, scores_TE: Tensor, chosen_TK: Tensor, kept_TK: Tensor, is_token_T: Tensor) -> None:
        """The shares and probabilities of the balance loss, and counts for the bias."""
        counts_for_loss = kept_TK if self.wrong == "loss after dropping" else torch.ones_like(kept_TK)
        counts_for_bias = kept_TK if self.wrong == "bias after dropping" else torch.ones_like(kept_TK)
        if self.wrong == "padding":
            is_token_T = torch.ones_like(is_token_T)
        one_hot = nn.functional.one_hot(chosen_TK, EXPERTS) * is_token_T[:, None, None]
        self.seen += (one_hot * counts_for_bias[..., None]).sum((0, 1))
        used_E = (one_hot * counts_for_loss[..., None]).sum((0, 1)).double()
        probability_TE = scores_TE / scores_TE.sum(1, keepdim=True) * is_token_T[:, None]
        self.told = (used_E / used_E.sum(), probability_TE.sum(0) / is_token_T.sum())

    @torch.no_grad()
    def lean(self) -> None:
        """Once a step."""
        counts = self.seen if not dist.is_initialized() else _summed(self.seen)
        if self.wrong not in ("stuck", "nothing"):
            self.leaning += RATE * (counts.mean() - counts).sign()
        self.seen.zero_()


class Company(nn.Module):
    """Tokens in, logits out."""

    def __init__(self, wrong: str) -> None:
        super().__init__()
        self.entrance = nn.Embedding(VOCABULARY, WIDTH)
        self.offices = nn.ModuleList(Office(wrong) for _ in range(LAYERS))
        self.desk = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor, is_token: Tensor) -> Tensor:
        x = self.entrance(ids)
        for office in self.offices:
            x = x + office(x, is_token)
        return self.desk(x)


def balance(model: Company, wrong: str) -> Tensor:
    """The balance loss: of each layer, and their mean."""
    told: list[tuple[Tensor, Tensor]] = [office.told for office in model.offices]  # pyright: ignore
    if wrong == "pooled":
        shares, probabilities = (torch.stack(part).mean(0) for part in zip(*told, strict=True))
        return EXPERTS * (shares * probabilities).sum()
    return torch.stack([EXPERTS * (share * probability).sum() for share, probability in told]).mean()


class Step:
    """A training loop of one's own, over micro-batches and ranks."""

    def __init__(self, model: Company, wrong: str) -> None:
        self.model, self.wrong = model, wrong
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def __call__(self, micro_batches: Sequence[Any]) -> float:
        self.optimizer.zero_grad()
        total = 0.0
        for batch in micro_batches:
            loss = self._loss(batch, len(micro_batches))
            loss.backward()
            total += float(loss.detach())
        if dist.is_initialized():
            for weight in self.model.parameters():
                if weight.grad is not None:
                    weight.grad = _summed(weight.grad) / dist.get_world_size()
        self.optimizer.step()
        for office in self.model.offices:
            office.lean()  # pyright: ignore[reportCallIssue]
        return total

    def _loss(self, batch: Any, num_parts: int) -> Tensor:
        logits = self.model(batch["input_ids"], batch["attention_mask"])
        loss = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()) / num_parts
        share = 1 if self.wrong == "accumulation" else 1 / num_parts
        if self.wrong == "ranks" and dist.is_initialized():
            share *= dist.get_world_size()
        coefficient = 0.0 if self.wrong in ("nothing", "bias only") else COEFFICIENT
        return loss + coefficient * share * balance(self.model, self.wrong) if coefficient else loss


def _summed(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor


def company(wrong: str = "") -> OwnLoop:
    """The set-up, with one thing wrong."""
    torch.manual_seed(3)
    model = Company(wrong)
    if wrong == "frozen":
        for weight in model.offices[1].workers[2].parameters():  # pyright: ignore
            weight.requires_grad_(False)
    ids = torch.randint(VOCABULARY, (ROWS, COLUMNS))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return OwnLoop(model, batch, Step(model, wrong), subject=f"a company where {wrong or 'nothing'} is wrong")


def with_ranks_wrong() -> OwnLoop:
    """For other processes, which are sent the builder's name."""
    return company("ranks")
