"""The LSTM language model that carried the sparsely-gated layer (Shazeer et al., arXiv:1701.06538, sec. 5.1).

Embedding → LSTM → feed-forward, for every position → LSTM → head, with a residual connection around each of the three
in the middle. The feed-forward block is the package's own: a MoeLayer (in the paper with the router "noisy_topk" and
the balance losses "importance" and "load"), or a dense Mlp to compare it with. Two things stay plain: the experts are
gated (SwiGLU) and their sum joins the residual stream as it is; and there is no dropout.

B batch, S sequence, D hidden, V vocab.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moesaic.checks import require_positive
from moesaic.config import MlpConfig, MoeConfig
from moesaic.config.router import HashSettings
from moesaic.errors import ConfigError
from moesaic.layers.documents import row_numbers
from moesaic.layers.mlp import Mlp
from moesaic.layers.moe import MoeLayer
from moesaic.models.init import initial_std
from moesaic.routing import RoutingTape, TokenFacts
from moesaic.routing.routers import hash_table
from moesaic.tensor_spec import TensorSpec

_NUM_BLOCKS = 3  # that write to the residual stream


@dataclass(frozen=True, kw_only=True)
class RecurrentConfig:
    """Two LSTMs of one width with a feed-forward block between them.

    Parameters are counted as a ModelConfig counts them: `total` all of them, `active_all` with top_k of num_experts of
    the experts' parameters.
    """

    vocab_size: int
    hidden_size: int
    feed_forward: MoeConfig | MlpConfig

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "hidden_size")

    def feed_forward_tensors(self) -> list[TensorSpec]:
        """The tensors between the LSTMs, under their names in the built model."""
        return list(self.feed_forward.tensors("feed_forward", self.hidden_size))

    @property
    def total(self) -> int:
        return self._outside + sum(spec.numel for spec in self.feed_forward_tensors() if spec.is_parameter)

    @property
    def active_all(self) -> int:
        return self._outside + sum(spec.active_numel for spec in self.feed_forward_tensors() if spec.is_parameter)

    @property
    def _outside(self) -> int:
        lstm = 4 * (2 * self.hidden_size**2 + 2 * self.hidden_size)
        return 2 * lstm + 2 * self.vocab_size * self.hidden_size


class RecurrentModel(nn.Module):
    """A causal language model of two LSTMs. Its weights are drawn from `seed`; the global random state stays."""

    def __init__(self, config: RecurrentConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        size, block = config.hidden_size, config.feed_forward
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(config.vocab_size, size)
            self.lower = nn.LSTM(size, size, batch_first=True)
            self.feed_forward = MoeLayer(block, size, 0) if isinstance(block, MoeConfig) else Mlp(block, size)
            self.upper = nn.LSTM(size, size, batch_first=True)
            self.head = nn.Linear(size, config.vocab_size, bias=False)
            self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        """LSTMs keep torch's draw, uniform within 1 / sqrt(D); a noisy router starts at 0: all noise, and so even."""
        for table in (self.embedding.weight, self.head.weight):
            nn.init.normal_(table, std=self.config.hidden_size**-0.5)
        tensors = self.state_dict(keep_vars=True)
        for spec in self.config.feed_forward_tensors():
            if spec.start is not None:
                tensors[spec.name].fill_(spec.start)
            elif spec.is_parameter:
                nn.init.normal_(tensors[spec.name], std=initial_std(spec, _NUM_BLOCKS))
        block = self.config.feed_forward
        if isinstance(block, MoeConfig) and isinstance(block.router.settings, HashSettings):
            tensors["feed_forward.router.table"].copy_(hash_table(block.router))

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix [V, D]."""
        return self.head.weight

    @property
    def head_bias(self) -> Tensor | None:
        """What the head adds to the logits: nothing."""
        return None

    def hidden(self, token_ids_BS: Tensor, mask_BS: Tensor | None = None, *, tape: RoutingTape | None = None) -> Tensor:
        """x_BSD before the head. Arguments as in `forward`."""
        _check(token_ids_BS, mask_BS)
        x_BSD = self.embedding(token_ids_BS)
        x_BSD = x_BSD + self.lower(x_BSD)[0]
        if isinstance(self.feed_forward, MoeLayer):
            x_BSD = x_BSD + self.feed_forward(x_BSD, _facts(token_ids_BS, mask_BS, tape), tape)
        else:
            x_BSD = x_BSD + self.feed_forward(x_BSD)
        return x_BSD + self.upper(x_BSD)[0]

    def forward(
        self, token_ids_BS: Tensor, mask_BS: Tensor | None = None, *, tape: RoutingTape | None = None
    ) -> Tensor:
        """logits_BSV of every token.

        mask_BS: true (or 1) where there is a token. Padding must follow the tokens, since an LSTM would remember what
        comes before them; it is not routed. tape: hears the routing as layer 0, or dictates it. Raises ConfigError for
        wrong shapes, and for padding before a token.
        """
        return self.head(self.hidden(token_ids_BS, mask_BS, tape=tape))


def _check(token_ids_BS: Tensor, mask_BS: Tensor | None) -> None:
    if token_ids_BS.dim() != 2:
        raise ConfigError(f"token ids of shape {tuple(token_ids_BS.shape)}; give [batch, sequence]")
    if mask_BS is None:
        return
    if mask_BS.shape != token_ids_BS.shape:
        shapes = f"{tuple(mask_BS.shape)} for token ids of {tuple(token_ids_BS.shape)}"
        raise ConfigError(f"a mask of shape {shapes}; they must match")
    if bool((mask_BS[:, 1:].bool() & ~mask_BS[:, :-1].bool()).any()):
        raise ConfigError("padding before a token, which an LSTM would remember; put all padding at the end of its row")


def _facts(token_ids_BS: Tensor, mask_BS: Tensor | None, tape: RoutingTape | None) -> TokenFacts:
    mask_T = None if mask_BS is None else mask_BS.bool().reshape(-1)
    rows_T = None if tape is None else row_numbers(token_ids_BS).reshape(-1)
    return TokenFacts(token_ids_BS.reshape(-1), mask_T, rows_T)
