"""The lightning indexer of DeepSeek Sparse Attention (DeepSeek-V3.2, arXiv:2512.02556, sec. 2.1).

B batch, S new tokens, N visible slots, D hidden, Z the queries' latent, J index heads, I their dim.
"""

import torch
from torch import Tensor, nn

from moesaic.config.indexer import KEY_NORM, IndexerConfig
from moesaic.layers.norm import norm
from moesaic.layers.rope import Rotation, rotate


class Indexer(nn.Module):
    """Chooses for every query the tokens that it attends to: I(t, s) = sum over j of w(t, j) relu(q(t, j) k(s)), eq. 1.

    No gradient of the language model's loss reaches it: it chooses, and weighs nothing. (The authors train it towards
    the attention's own weights, eq. 3-4.) Their orthogonal transform and FP8 rounding of q and k, which leave products
    the same but for rounding, are left out.
    """

    def __init__(self, config: IndexerConfig, hidden_size: int, query_rank: int) -> None:
        super().__init__()
        self.config = config
        self.q_proj = nn.Linear(query_rank, config.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, config.head_dim, bias=False)
        self.k_norm = norm(KEY_NORM, config.head_dim)
        self.head_weights = nn.Linear(hidden_size, config.num_heads, bias=False)

    @torch.no_grad()
    def keys(self, x_BSD: Tensor, turn: Rotation) -> Tensor:
        """k_B1SI of new tokens."""
        return rotate(self.k_norm(self.k_proj(x_BSD))[:, :, None], turn).transpose(1, 2)

    @torch.no_grad()
    def choose(
        self, x_BSD: Tensor, query_latent_BSZ: Tensor, keys_B1NI: Tensor, turn: Rotation, visible_B1SN: Tensor
    ) -> Tensor:
        """Which of the visible tokens each query attends to, bool [B, 1, S, N]; of equal ones the earlier."""
        config = self.config
        q_BSJI = rotate(self.q_proj(query_latent_BSZ).unflatten(-1, (config.num_heads, config.head_dim)), turn)
        scores_BSN = index_scores(q_BSJI, keys_B1NI[:, 0], x_BSD, self.head_weights.weight)
        scores_BSN = scores_BSN.masked_fill(~visible_B1SN[:, 0], float("-inf"))
        return leading(scores_BSN, config.top_k)[:, None] & visible_B1SN


def index_scores(q_BSJI: Tensor, keys_BNI: Tensor, x_BSD: Tensor, head_weight_JD: Tensor) -> Tensor:
    """I_BSN = sum over j of w(j) relu(q(j) k), in fp32; w is projected from x, and scaled by 1/sqrt(J I)."""
    num_heads, head_dim = q_BSJI.shape[2:]
    weights_BSJ = nn.functional.linear(x_BSD.float(), head_weight_JD.float()) * num_heads**-0.5
    keys_BIN = keys_BNI.float().mT
    scores_BSN = keys_BIN.new_zeros(*x_BSD.shape[:2], keys_BIN.shape[-1])
    for head in range(num_heads):  # one after the other: all at once would hold J * S * N numbers
        products_BSN = (q_BSJI[:, :, head].float() @ keys_BIN) * head_dim**-0.5
        scores_BSN += weights_BSJ[:, :, head, None] * products_BSN.relu()
    return scores_BSN


def leading(scores_BSN: Tensor, count: int) -> Tensor:
    """True for the `count` highest scores of each row, of equal ones the first; all where there are no more."""
    if scores_BSN.shape[-1] <= count:
        return torch.ones_like(scores_BSN, dtype=torch.bool)
    last_BS1 = scores_BSN.topk(count, dim=-1).values[..., -1:]
    above_BSN, equal_BSN = scores_BSN > last_BS1, scores_BSN == last_BS1
    room_BS1 = count - above_BSN.sum(-1, keepdim=True)
    return above_BSN | (equal_BSN & (equal_BSN.cumsum(-1) <= room_BS1))
