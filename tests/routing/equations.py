"""What each router chooses and how it weighs, in plain Python floats, written from the papers' equations.

A reference takes one batch of logits (a list a token) and returns for each token its choices in order, as
(expert, weight); None stands for a choice that came to nothing. `bias` has a number for every choice there is.
"""

import itertools
import math
import sys
from dataclasses import dataclass, field

INF = math.inf


@dataclass
class Batch:
    """What routers may see, and the random numbers they are to use."""

    logits: list[list[float]]
    top_k: int
    renormalize: bool = False
    scale: float = 1.0
    bias: list[float] | None = None
    groups: tuple[int, int, str] | None = None
    mask: list[bool] | None = None
    training: bool = False
    noise_std: list[list[float]] = field(default_factory=list)
    normal: list[list[float]] = field(default_factory=list)
    uniform: list[list[float]] = field(default_factory=list)
    exponential: list[list[list[float]]] = field(default_factory=list)

    @property
    def num_experts(self):
        return len(self.logits[0]) if self.logits else 1

    def counts(self, token):
        return self.mask is None or self.mask[token]


def softmax(z):
    powers = [math.exp(x - max(z)) for x in z]
    return [power / sum(powers) for power in powers]


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def best(values, count):
    """Ids of the largest values, best first; the lower id wins among equals."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def inside_best_groups(values, groups):
    """The ids in the best groups."""
    num_groups, top_groups, score = groups
    size = len(values) // num_groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(num_groups)]
    ranked = [sorted((values[e] for e in group), reverse=True) for group in members]
    worth = [values[0] if score == "max" else values[0] + values[1] for values in ranked]
    return {e for g in best(worth, top_groups) for e in members[g]}


def chosen_by(values, batch):
    """The K best of values plus bias, inside the best groups."""
    if batch.bias is not None:
        values = [value + b for value, b in zip(values, batch.bias, strict=True)]
    if batch.groups is not None:
        inside = inside_best_groups(values, batch.groups)
        return [e for e in best(values, len(values)) if e in inside][: batch.top_k]
    return best(values, batch.top_k)


def weighed(scores, ids, batch, tiny=0.0):
    """(expert, weight): the scores, divided by their sum if wanted, times the scale."""
    total = sum(scores[e] for e in ids if e is not None) + tiny if batch.renormalize else 1.0
    total = total if total >= sys.float_info.min else 1.0
    return [(e, batch.scale * (scores[e] / total)) if e is not None else None for e in ids]


def _topk(score, tiny=0.0, rank=None):
    def reference(batch):
        answer = []
        for z in batch.logits:
            scores = score(z)
            answer.append(weighed(scores, chosen_by(rank(z) if rank else scores, batch), batch, tiny))
        return answer

    return reference


def each(function):
    return lambda z: [function(x) for x in z]


def sqrt_softplus(x):
    return math.sqrt(softplus(x))


def topk_softmax(batch):
    answer = []
    for z in batch.logits:
        ids = chosen_by(z, batch)
        is_closed = all(z[e] == -INF for e in ids)
        shares = softmax([0.0 if is_closed else z[e] for e in ids])
        answer.append([(e, batch.scale * share) for e, share in zip(ids, shares, strict=True)])
    return answer


def noisy_topk(batch):
    """arXiv:1701.06538: H = z + N(0,1) * std; softmax over the K largest."""
    if not batch.training:
        return topk_softmax(batch)
    rows = zip(batch.logits, batch.normal, batch.noise_std, strict=True)
    noisy = [[x + n * s for x, n, s in zip(z, normal, std, strict=True)] for z, normal, std in rows]
    return topk_softmax(Batch(noisy, batch.top_k, scale=batch.scale))


def gshard_top2(batch):
    """arXiv:2006.16668: normalise the pair; the second stays if a uniform number is below twice its share."""
    answer = []
    for token, z in enumerate(batch.logits):
        p = softmax(z)
        first, second = best(p, 2)
        share = p[second] / (p[first] + p[second])
        stays = not batch.training or batch.uniform[token][0] < 2 * share
        answer.append([(first, batch.scale * (1 - share)), (second, batch.scale * share) if stays else None])
    return answer


def hashed(table, token_ids, score, tiny):
    def reference(batch):
        ids = [table[i] for i in token_ids]
        if score is None:
            return [[(e, batch.scale / batch.top_k) for e in row] for row in ids]
        return [weighed(score(z), row, batch, tiny) for z, row in zip(batch.logits, ids, strict=True)]

    return reference


def sparsemixer(batch, gap):
    """arXiv:2409.12136: rounds of one expert, drawn with Gumbel noise while training."""
    answer = []
    for token, z in enumerate(batch.logits):
        z = [max(x, -1.7976931348623157e308) for x in z]
        taken, row = set(), []
        for choice in range(batch.top_k):
            top = max(x for e, x in enumerate(z) if e not in taken)
            near = [e for e, x in enumerate(z) if e not in taken and not _far(x, top, gap)]
            shares = dict(zip(near, softmax([z[e] for e in near]), strict=True))
            largest = min(near, key=lambda e: (-shares[e], e))
            pick = largest
            if batch.training:
                draws = batch.exponential[choice][token]
                pick = min(near, key=lambda e: (-(z[e] - math.log(draws[e])), e))
            full = not batch.training or pick == largest or batch.uniform[token][choice] > 0.75
            row.append((pick, batch.scale * shares[pick] * (1.0 if full else 0.3333)))
            taken.add(pick)
        answer.append(row)
    return answer


def _far(x, top, gap):
    size = max(abs(x), top)
    return size != 0 and (top - x) / size > 2 * gap


def expert_choice(batch):
    """arXiv:2202.09368: each expert takes its best tokens; T K places, the first experts one more."""
    scores = [softmax(z) for z in batch.logits]
    tokens = [t for t in range(len(scores)) if batch.counts(t)]
    answer = [[] for _ in scores]
    for e in range(batch.num_experts):
        places = sum(1 for place in range(len(tokens) * batch.top_k) if place % batch.num_experts == e)
        for t in sorted(tokens, key=lambda t: (-scores[t][e], t))[:places]:
            answer[t].append((e, batch.scale * scores[t][e]))
    return [sorted(row, key=lambda pair: (-pair[1], pair[0])) for row in answer]


def best_balanced_sum(values):
    """The largest sum of one value a row where every column is taken T / E times, rounded down or up."""
    num_tokens, num_experts = len(values), len(values[0])
    low, high = num_tokens // num_experts, -(-num_tokens // num_experts)
    ways = itertools.product(range(num_experts), repeat=num_tokens)
    even = (way for way in ways if all(low <= way.count(e) <= high for e in range(num_experts)))
    return max(math.fsum(values[t][e] for t, e in enumerate(way)) for way in even)


def sinkhorn_scaled(logits, iterations):
    """exp(z) with rows and columns scaled in turn to equal sums; rows last, which does not change their order."""
    m = [[math.exp(x) for x in z] for z in logits]
    for _ in range(iterations):
        m = [[x / (sum(row) or 1.0) for x in row] for row in m]
        sums = [sum(column) or 1.0 for column in zip(*m, strict=True)]
        m = [[x / total for x, total in zip(row, sums, strict=True)] for row in m]
    return m


def relu(batch):
    """arXiv:2412.14711: every expert above 0, by its own value."""
    return [[(e, batch.scale * z[e]) for e in best(z, len(z)) if z[e] > 0] for z in batch.logits]


def top_p(batch, p):
    """arXiv:2403.07652: the best experts until their probabilities reach p."""
    answer = []
    for z in batch.logits:
        scores, ids, reached = softmax(z), [], 0.0
        for e in best(scores, batch.top_k):
            if reached < p:
                ids.append(e)
                reached += scores[e]
        answer.append(weighed(scores, ids, batch))
    return answer


def null_topk(batch, num_experts):
    """Choices from `num_experts` on are of null experts: nothing is computed for them."""
    answer = []
    for z in batch.logits:
        scores = softmax(z)
        ids = [e if e < num_experts else None for e in chosen_by(scores, batch)]
        answer.append(weighed(scores, ids, batch))
    return answer


PLAIN = {
    "softmax_topk": _topk(softmax),
    "switch": _topk(softmax),
    "dense": _topk(softmax),
    "topk_softmax": topk_softmax,
    "sigmoid_topk": _topk(each(sigmoid), tiny=1e-20),
    "sqrt_softplus_topk": _topk(each(sqrt_softplus), tiny=1e-20),
    "sigmoid_input": _topk(each(sigmoid), rank=lambda z: z),
    "noisy_topk": noisy_topk,
    "gshard_top2": gshard_top2,
    "expert_choice": expert_choice,
    "base": _topk(each(sigmoid), rank=lambda z: z),
    "sinkhorn": _topk(softmax, rank=lambda z: z),
    "relu": relu,
}
HASH_SCORES = {
    "uniform": (None, 0.0),
    "softmax": (softmax, 0.0),
    "sigmoid": (each(sigmoid), 1e-20),
    "sqrt_softplus": (each(sqrt_softplus), 1e-20),
}
