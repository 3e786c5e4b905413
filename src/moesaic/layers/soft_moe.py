"""Soft MoE: experts compute slots, each a weighted mean of a whole text's tokens. Nothing is routed.

B batch, S sequence, T = B*S tokens, D hidden, E experts, P slots an expert, Z = E*P slots, N texts, n tokens of one.
"""

import torch
from torch import Tensor, nn

from moesaic.config import SoftMoeConfig
from moesaic.experts.grouped import GroupedExperts
from moesaic.kernels import ops
from moesaic.routing import TokenFacts


class SoftMoeLayer(nn.Module):
    """Y = C f(D^T X) (Puigcerver et al., arXiv:2308.00951, eqs. 1-3, with the normalisation of sec. 2.3).

    Scores are scale * (x / |x|) . (slot / |slot|); D is their softmax over the tokens of a text, C over all slots.
    A text is a row of the batch, or a document where there are several; padding has no part and gets zeros. Every token
    sees the whole text, also what follows it.
    """

    def __init__(self, config: SoftMoeConfig, hidden_size: int) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.empty(config.num_experts, config.slots_per_expert, hidden_size))
        self.scale = nn.Parameter(torch.empty(1))
        self.experts = GroupedExperts(config, hidden_size)

    def forward(self, x_BSD: Tensor, facts: TokenFacts | None = None) -> Tensor:
        """y_BSD, mixed in fp32 or wider."""
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        texts = _texts(x_BSD, facts or TokenFacts())
        if not texts:
            return torch.zeros_like(x_BSD)
        wide = torch.promote_types(x_BSD.dtype, torch.float32)
        tokens = [x_TD[ids_n].to(wide) for ids_n in texts]
        scores = [self._scores(x_nD) for x_nD in tokens]
        slots_NZD = torch.stack([s_nZ.softmax(0).T @ x_nD for s_nZ, x_nD in zip(scores, tokens, strict=True)])
        out_NZD = self._computed(slots_NZD.to(x_BSD.dtype)).to(wide)
        mixed = [s_nZ.softmax(1) @ out_ZD for s_nZ, out_ZD in zip(scores, out_NZD, strict=True)]
        y_TD = torch.zeros_like(x_TD).index_copy(0, torch.cat(texts), torch.cat(mixed).to(x_BSD.dtype))
        return y_TD.view_as(x_BSD)

    def _scores(self, x_nD: Tensor) -> Tensor:
        slots_ZD = _unit(self.slots.flatten(0, 1).to(x_nD.dtype))
        return self.scale.to(x_nD.dtype) * (_unit(x_nD) @ slots_ZD.T)

    def _computed(self, slots_NZD: Tensor) -> Tensor:
        """Every slot through its own expert."""
        num_texts, num_experts, hidden_size = len(slots_NZD), len(self.slots), slots_NZD.shape[-1]
        slots_ENPD = slots_NZD.unflatten(1, (num_experts, -1)).transpose(0, 1)
        rows_RD = slots_ENPD.reshape(-1, hidden_size)
        offsets = torch.arange(num_experts + 1) * (len(rows_RD) // num_experts)
        out_ENPD = self.experts(rows_RD, offsets).view(num_experts, num_texts, -1, hidden_size)
        return out_ENPD.transpose(0, 1).flatten(1, 2)


def _unit(x: Tensor) -> Tensor:
    """Vectors of length 1; the small number is that of the authors' code."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _texts(x_BSD: Tensor, facts: TokenFacts) -> list[Tensor]:
    """The ids of each text's tokens, in order; texts of nothing but padding are left out."""
    batch_size, length = x_BSD.shape[:2]
    text_ids_T = facts.document_ids_T
    if text_ids_T is None:
        text_ids_T = torch.arange(batch_size, device=x_BSD.device).repeat_interleave(length)
    num_texts = int(text_ids_T.max()) + 1 if text_ids_T.numel() else 0
    if facts.mask_T is not None:
        text_ids_T = torch.where(facts.mask_T, text_ids_T, -1)
    token_ids, _, offsets = ops.sort_rows(text_ids_T[:, None].contiguous(), num_texts)
    return [ids_n for ids_n in token_ids.split(offsets.diff().tolist()) if len(ids_n)]
