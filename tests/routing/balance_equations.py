"""Every balance loss from its paper's equation, in plain Python floats: lists in, a float out.

scores[t][i], logits[t][i]; choices[t] are the experts that token t chose; mask[t] is false for padding.
Tokens that are padding are left out at the door, so the equations below never see them.
"""

import math


def best(values, k):
    """The k largest, ties to the lower index."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def kept(rows, mask):
    return [row for row, counts in zip(rows, mask, strict=True) if counts]


def as_shares(scores):
    """A token's scores divided by their sum; of a token without any, 1 / E each."""
    total = math.fsum(scores)
    return [s / total for s in scores] if total else [1 / len(scores)] * len(scores)


def mean(numbers):
    return math.fsum(numbers) / len(numbers)


def mean_probabilities(scores, num_experts):
    rows = [as_shares(row) for row in scores]
    return [mean([row[i] for row in rows]) for i in range(num_experts)]


def count(choices, num_experts):
    return [sum(row.count(i) for row in choices) for i in range(num_experts)]


def switch(scores, choices, mask, num_experts, counted=None):
    """Switch, eq. 4: E sum f P. `counted`: the choices of a wider scope."""
    scores, choices = kept(scores, mask), kept(choices, mask)
    counts = count(choices, num_experts) if counted is None else counted
    if not scores or not sum(counts):
        return 0.0
    shares = [number / sum(counts) for number in counts]
    return num_experts * math.fsum(f * p for f, p in zip(shares, mean_probabilities(scores, num_experts), strict=True))


def document(scores, k):
    """DeepSeek-V3, eqs. 17-20, without alpha, for one document."""
    num_tokens, num_experts = len(scores), len(scores[0])
    total = 0.0
    for i in range(num_experts):
        f = num_experts / (k * num_tokens) * sum(i in best(row, k) for row in scores)
        total += f * mean([as_shares(row)[i] for row in scores])
    return total


def sequence(scores, documents, mask, k):
    """The documents' losses, weighted by their tokens."""
    scores, documents = kept(scores, mask), kept(documents, mask)
    if not scores:
        return 0.0
    total = 0.0
    for number in set(documents):
        mine = [row for row, other in zip(scores, documents, strict=True) if other == number]
        total += document(mine, k) * len(mine)
    return total / len(scores)


def variation(amounts):
    """CV^2, with the population variance."""
    center = mean(amounts)
    return mean([(a - center) ** 2 for a in amounts]) / center**2 if center else 0.0


def importance(weights, choices, mask, num_experts):
    """Shazeer et al., eqs. 6-7, plus 1: weights[t][c] is that of token t's choice c."""
    amounts = [0.0] * num_experts
    for row, own in zip(kept(weights, mask), kept(choices, mask), strict=True):
        for weight, i in zip(row, own, strict=True):
            amounts[i] += weight
    return 1 + variation(amounts) if any(kept(choices, mask)) else 0.0


def load(logits, noisy, deviations, mask, k):
    """Shazeer et al., eqs. 8-11, plus 1."""
    logits, noisy, deviations = (kept(rows, mask) for rows in (logits, noisy, deviations))
    if not logits:
        return 0.0
    num_experts = len(logits[0])
    amounts = [0.0] * num_experts
    for z, h, std in zip(logits, noisy, deviations, strict=True):
        for i in range(num_experts):
            others = [h[j] for j in range(num_experts) if j != i]
            rival = sorted(others, reverse=True)[k - 1]
            if z[i] == -math.inf:
                continue  # no noise brings a closed expert in
            amounts[i] += 1.0 if rival == -math.inf else 0.5 * math.erfc(-(z[i] - rival) / std[i] / math.sqrt(2))
    return 1 + variation(amounts)


def device(scores, choices, mask, num_experts, num_groups):
    """DeepSeek-V2: sum over groups of mean f times summed P, where f_i = E / (K T) * choices of i."""
    scores, choices = kept(scores, mask), kept(choices, mask)
    if not any(choices):
        return 0.0
    per_choice = num_experts / sum(len(own) for own in choices)
    f = [per_choice * number for number in count(choices, num_experts)]
    p = mean_probabilities(scores, num_experts)
    size = num_experts // num_groups
    groups = [range(g * size, (g + 1) * size) for g in range(num_groups)]
    return math.fsum(mean([f[i] for i in group]) * math.fsum(p[i] for i in group) for group in groups)


def communication(scores, choices, mask, num_experts, num_groups, top_groups=None):
    """DeepSeek-V2: f''_g = G / (M T) * tokens sent to g. top_groups: the paper's M; None: as many as were sent."""
    scores, choices = kept(scores, mask), kept(choices, mask)
    if not any(choices):
        return 0.0
    size = num_experts // num_groups
    sent = [{i // size for i in own} for own in choices]
    pairs = sum(len(groups) for groups in sent) if top_groups is None else top_groups * len(scores)
    p = mean_probabilities(scores, num_experts)
    total = 0.0
    for g in range(num_groups):
        f = num_groups / pairs * sum(g in groups for groups in sent)
        total += f * math.fsum(p[g * size : (g + 1) * size])
    return total


def router_z(logits, mask):
    """ST-MoE, eq. 5."""
    logits = kept(logits, mask)
    return mean([math.log(math.fsum(math.exp(z) for z in row)) ** 2 for row in logits]) if logits else 0.0


def entropy_of(probabilities):
    return -math.fsum(p * math.log(p) for p in probabilities if p)


def entropy(scores, mask):
    scores = kept(scores, mask)
    return mean([entropy_of(as_shares(row)) for row in scores]) if scores else 0.0


def batch_entropy(scores, mask, num_experts):
    scores = kept(scores, mask)
    return math.log(num_experts) - entropy_of(mean_probabilities(scores, num_experts)) if scores else 0.0


def similarity(weight):
    """The sum of squared cosines of different rows."""
    total = 0.0
    for i, a in enumerate(weight):
        for j, b in enumerate(weight):
            if i != j:
                dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
                total += dot**2 / (math.fsum(x * x for x in a) * math.fsum(y * y for y in b))
    return total


def orthogonal(weight):
    """SimBal: the entries of W W^T - I, absolute, summed."""
    return math.fsum(
        abs(math.fsum(x * y for x, y in zip(a, b, strict=True)) - (i == j))
        for i, a in enumerate(weight)
        for j, b in enumerate(weight)
    )


def relu_sparsity(gates, choices, mask, num_experts, k):
    """ReMoE: sum over experts of f_i mean g_i, f_i = E / (K T) * tokens that use i."""
    gates, choices = kept(gates, mask), kept(choices, mask)
    if not gates:
        return 0.0
    f = [num_experts / (k * len(gates)) * number for number in count(choices, num_experts)]
    return math.fsum(f[i] * mean([row[i] for row in gates]) for i in range(num_experts))
