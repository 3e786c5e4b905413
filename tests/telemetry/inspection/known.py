"""A trace whose routing is known: layer 0 goes by domain, layer 2 by the token, layer 5 by nothing."""

from pathlib import Path

import numpy as np

from moesaic.data.tokenizer import Tokenizer
from moesaic.trace import Fingerprint, LayerFingerprint, TokenRows, Trace, TracedForward, TraceWriter

DOMAINS = ("code", "prose")
TEXTS = {"code": "x = f(12) + 3;\n", "prose": "The quick foxes jumped over 2 lazy dogs, again. "}
NUM_EXPERTS, TOP_K = 4, 2
LAYERS = (0, 2, 5)


def tokenizer() -> Tokenizer:
    return Tokenizer.train([text * 20 for text in TEXTS.values()], vocab_size=290)


def known_trace(path: Path, *, windows: int = 12, seed: int = 0, num_experts: int = NUM_EXPERTS) -> Trace:
    """`windows` of each domain. Layer 0: domain d at experts 2d and 2d + 1."""
    words, random = tokenizer(), np.random.default_rng(seed)
    layers = tuple(LayerFingerprint(layer, "softmax_topk", num_experts, TOP_K) for layer in LAYERS)
    with TraceWriter(path, Fingerprint("mixtral", layers), domains=DOMAINS) as writer:
        for _ in range(windows):
            for domain, text in enumerate(TEXTS.values()):
                ids = np.array(words.encode(text * 3))
                by_domain = np.tile([2 * domain, 2 * domain + 1], (len(ids), 1))
                by_token = np.stack([ids % num_experts, (ids + 1) % num_experts], 1)
                at_random = np.stack([random.permutation(num_experts)[:TOP_K] for _ in ids])
                writer.append(
                    TracedForward(
                        rows=dict(zip(LAYERS, map(_rows, (by_domain, by_token, at_random)), strict=True)),
                        token_ids_T=ids,
                        domain_ids_T=np.full(len(ids), domain),
                        document_ids_T=np.zeros(len(ids), int),
                    )
                )
    return Trace.open(path)


def _rows(experts_TK: np.ndarray) -> TokenRows:
    num_tokens, top_k = experts_TK.shape
    return TokenRows(
        row_offsets=np.arange(num_tokens + 1) * top_k,
        expert_ids_R=experts_TK.reshape(-1),
        choices_R=np.tile(np.arange(top_k), num_tokens),
        weights_R=np.full(num_tokens * top_k, 0.5, np.float32),
    )
