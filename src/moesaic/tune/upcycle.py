"""An MoE from a dense model, with the same function at first ("virtual groups", arXiv:2410.07524, sec. 3.2).

E experts = C copies of the dense feed-forward block, each cut into G shards along its inner size: expert c*G + g holds
shard g. The G router rows of a copy are equal, so its shards tie, and the top K = m*G are m whole copies. The chosen
weights sum to 1 over m*G slots, in equal parts within a copy, so the shards of one copy together get the copy's weight
divided by G; a factor G puts it back. It goes wholly on the down projection: silu is not homogeneous, so spreading it
over gate and up would change the function.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moesaic import families
from moesaic.config import LayerConfig, MlpConfig, ModelConfig, MoeConfig, RouterConfig
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import ConfigError
from moesaic.hub.checkpoint import CONFIG, read_json
from moesaic.hub.embedded import cache_folder, embedded_gguf
from moesaic.hub.gguf import read_metadata
from moesaic.hub.loading import load
from moesaic.hub.resolve import PRESET_WEIGHTS
from moesaic.hub.saving import is_weight_file, write_checkpoint, write_json
from moesaic.hub.staging import replaced_folder
from moesaic.models.build import decoder_only
from moesaic.models.decoder import Decoder
from moesaic.models.init import ROUTER_STD

RECORD = "upcycle.json"
MEASURED_ON = (
    "A mixture of experts sends every token to a few of its experts. The router learns which ones: it scores them all, "
    "keeps the best, and the sum of their outputs, weighted by the scores, goes on to the next layer. 2 + 2 = 4."
)


class Cut(NamedTuple):
    """How a dense block becomes experts: C copies, G shards, K chosen."""

    copies: int
    shards: int
    top_k: int


def upcycle(dense: Decoder, *, copies: int = 2, shards: int = 4, top_k: int = 4, seed: int = 0) -> Decoder:
    """A new Mixtral-shaped model of `copies * shards` experts a layer that computes what `dense` computes.

    With top_k = shards a token multiplies as many parameters as before. The router's rows are drawn from `seed`; the
    weights keep their dtype. Raises ConfigError for a cut that cannot be made.
    """
    config = upcycled_config(dense.config, Cut(copies, shards, top_k))
    model = Decoder(config, device="meta")
    source = dense.state_dict()
    router_CD = _RouterRows(config.hidden_size, copies, seed)
    state: dict[str, Tensor] = {}
    for spec in config.tensors():
        if spec.name in source:
            state[spec.name] = source[spec.name].clone()
        elif spec.role == "router":
            state[spec.name] = router_CD.draw().repeat_interleave(shards, dim=0).to(dense.embedding.weight)
        else:
            state[spec.name] = _stacked(spec.name, spec.shape, source, copies, shards)
    model.load_state_dict(state, assign=True)
    return model


class _RouterRows:
    """One random row a copy, a new set for every layer."""

    def __init__(self, hidden_size: int, copies: int, seed: int) -> None:
        self.shape = (copies, hidden_size)
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> Tensor:
        return torch.empty(self.shape).normal_(0.0, ROUTER_STD, generator=self.generator)


def _stacked(name: str, shape: tuple[int, ...], source: dict[str, Tensor], copies: int, shards: int) -> Tensor:
    """An experts' tensor [E, ...], filled shard by shard from the dense block of the same layer."""
    block = name.removesuffix(".experts.gate_up").removesuffix(".experts.down")
    gate, up, down = (source[f"{block}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    stacked = torch.empty(shape, dtype=down.dtype, device=down.device)
    inner = down.shape[1] // shards
    for expert in range(copies * shards):
        start = expert % shards * inner
        held = slice(start, start + inner)
        if name.endswith(".down"):
            torch.mul(down[:, held], shards, out=stacked[expert])
        else:
            stacked[expert, :inner] = gate[held]
            stacked[expert, inner:] = up[held]
    return stacked


def upcycled_config(dense: ModelConfig, cut: Cut) -> ModelConfig:
    """The description of the MoE. Raises ConfigError, which says what would work."""
    if cut.copies < 1 or cut.shards < 1:
        raise ConfigError(f"copies={cut.copies}, shards={cut.shards}; both must be at least 1")
    if cut.top_k % cut.shards or not 0 < cut.top_k <= cut.copies * cut.shards:
        whole = [m * cut.shards for m in range(1, cut.copies + 1)]
        raise ConfigError(f"top_k={cut.top_k} does not choose whole copies of {cut.shards} shards; use one of {whole}")
    layers = tuple(_upcycled_layer(layer, cut) for layer in dense.layers)
    decoder = dataclasses.replace(dense.decoder, layers=layers)
    config = dataclasses.replace(dense, family="mixtral", decoder=decoder)
    families.to_hf(config)  # refuses what its files have no fields for, such as biases
    return config


def _upcycled_layer(layer: LayerConfig, cut: Cut) -> LayerConfig:
    mlp = layer.feed_forward
    if not isinstance(mlp, MlpConfig):
        raise ConfigError("the model to upcycle has MoE layers already; give a dense one")
    if mlp.bias:
        raise ConfigError("the model to upcycle has biases in its feed-forward block; experts have none")
    if mlp.intermediate_size % cut.shards:
        works = [n for n in range(1, min(mlp.intermediate_size, 64) + 1) if mlp.intermediate_size % n == 0]
        raise ConfigError(
            f"shards={cut.shards} does not divide intermediate_size={mlp.intermediate_size}; use one of {works}"
        )
    router = RouterConfig(name="softmax_topk", num_experts=cut.copies * cut.shards, top_k=cut.top_k)
    moe = MoeConfig(router=router, intermediate_size=mlp.intermediate_size // cut.shards, activation=mlp.activation)
    return dataclasses.replace(layer, feed_forward=moe)


@torch.no_grad()
def function_difference(dense: Decoder, moe: Decoder, token_ids_BS: Tensor) -> float:
    """The largest difference between the two models' logits, as a share of the largest logit of `dense`."""
    expected_BSV = dense(token_ids_BS)
    difference = (moe(token_ids_BS) - expected_BSV).abs().max()
    return float(difference / expected_BSV.abs().max())


@PRESET_WEIGHTS.register("smollm2-moe")
def smollm2_moe(cache: Path | None = None) -> Path:
    """The folder of the default chat model; made at first use from the embedded SmolLM2 (a few seconds, 860 MB).

    `cache` is where it is kept (see `cache_folder`). Its measured distance from the dense model lies beside it, see
    `read_record`. Raises MissingDependencyError when the embedded model is not installed.
    """
    folder = (cache or cache_folder()) / "smollm2-moe"
    if (folder / CONFIG).is_file():
        return folder
    gguf = embedded_gguf()
    cut = Cut(copies=2, shards=4, top_k=4)
    dense = decoder_only(load(gguf), "upcycling")
    moe = upcycle(dense, **cut._asdict())
    tokenizer = Tokenizer.from_gguf(read_metadata(gguf))
    difference = function_difference(dense, moe, torch.tensor([tokenizer.encode(MEASURED_ON)]))
    with replaced_folder(folder, is_weight_file) as new:
        write_checkpoint(moe, new)
        tokenizer.save(new)
        write_json(new / RECORD, {"source": gguf.name, **cut._asdict(), "max_logit_difference": difference})
    return folder


def read_record(folder: Path) -> dict[str, Any]:
    """What was measured when the model in `folder` was made: "max_logit_difference" is a share of the logits' scale."""
    return read_json(folder / RECORD)
