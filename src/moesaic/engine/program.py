"""A model built once into flat native steps over preallocated buffers, for ragged batches.

T tokens of S texts, N rows of logits, V vocab.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moesaic.config import AttentionConfig, LayerConfig, MlaConfig, MlpConfig, MoeConfig
from moesaic.engine.builder import Builder, CacheShape, Label, longest, native_packed
from moesaic.engine.cache import BlockCache
from moesaic.engine.lower.attention import lower_attention
from moesaic.engine.lower.feed_forward import lower_mlp, lower_moe
from moesaic.engine.lower.mla import lower_mla
from moesaic.engine.lower.refusal import check_lowerable
from moesaic.engine.memory import give_back_freed
from moesaic.engine.packing import Packer
from moesaic.errors import GenerationError
from moesaic.kernels.backend import compiled
from moesaic.kernels.blocks import Format

_native = compiled()


class Batch(NamedTuple):
    """The tokens of one step, text by text in their order.

    token_ids_T, positions_T (in their texts): int64; text_of_T, tables_SW (the blocks of each text): int32;
    output_rows_N: of the tokens whose logits are wanted, int64.
    """

    token_ids_T: np.ndarray
    positions_T: np.ndarray
    text_of_T: np.ndarray
    tables_SW: np.ndarray
    output_rows_N: np.ndarray


class Routed(NamedTuple):
    """The experts that tokens chose, -1 where there is none, and their weights, 0 there."""

    expert_ids_TM: Tensor
    weights_TM: Tensor


class Program:
    """What runs: one native call for each batch.

    mtp: with the layers that predict further tokens, each a section of the program.
    packed_bytes: of its matrices, by part. formats: what most of these bytes are of.
    Raises ConfigError for parts that have no lowering.
    """

    def __init__(self, packer: Packer, *, threads: int, max_length: int | None = None, mtp: bool = False) -> None:
        self.config = config = packer.weights.config
        check_lowerable(config, mtp=mtp)
        self.max_length = min(longest(config), max_length or longest(config))
        self.num_ahead = len(config.mtp) if mtp else 0
        build = Builder(packer, threads, self.max_length)
        self.native, self.caches, self._normed = build.native, build.caches, build.normed
        _lower(build, self.num_ahead)
        self.packed_bytes = {part: formats.total() for part, formats in packer.bytes_by_format.items()}
        self.formats: dict[str, Format] = {
            part: formats.most_common(1)[0][0] for part, formats in packer.bytes_by_format.items()
        }

    def connect(self, cache: BlockCache) -> None:
        """Read and write this cache's blocks from now on."""
        self.native.set_caches(cache.layers, cache.format)

    def run(self, batch: Batch, choices: Mapping[int, Tensor] | None = None, *, depth: int = 0) -> Tensor:
        """logits_NV in fp32. choices: experts [T, M] that stand in for what layers would choose, weighed anew.

        depth: 0: the model itself; k: the layer that predicts one token more than k - 1 does, of which the batch has
        the tokens k places on (see models/mtp.py); the model, or layer k - 1, has run at all these places.
        Raises GenerationError where logits are infinite or no numbers, saying where that began.
        """
        # Of numpy: handing over a tensor takes longer, and lets go of the interpreter's lock on its way.
        logits_NV = np.empty((len(batch.output_rows_N), self.config.vocab_size), np.float32)
        dictated = choices or {}
        for layer, expert_ids_TM in dictated.items():
            self.native.dictate(layer, expert_ids_TM)
        try:
            if not self.native.run(*batch, logits_NV, depth):
                raise GenerationError(self._not_finite(batch, depth))
        finally:
            for layer in dictated:
                self.native.dictate(layer, None)
        return torch.from_numpy(logits_NV)

    def routed(self, num_tokens: int, *, depth: int = 0) -> dict[int, Routed]:
        """What the tokens of the newest batch, so many, chose in every layer that routes; depth: as it was run."""
        found, ahead = {}, len(self.config.layers)
        for layer, columns in self.native.routing_layers():
            if max(0, layer + 1 - ahead) != depth:
                continue
            ids_TM = torch.empty(num_tokens, columns, dtype=torch.int64)
            found[layer] = Routed(ids_TM, torch.empty(num_tokens, columns))
            self.native.read_choices(layer, *found[layer])
        return found

    def hidden_states(self, num_tokens: int) -> Tensor:
        """x_TD of the newest batch's tokens, so many: what the head reads, in fp32."""
        x_TD = torch.empty(num_tokens, self.config.hidden_size)
        self.native.read_rows(self._normed, x_TD)
        return x_TD

    @property
    def routing_columns(self) -> dict[int, int]:
        """How many experts a token may choose, by layer that routes; those that look further ahead are left out."""
        return {layer: columns for layer, columns in self.native.routing_layers() if layer < len(self.config.layers)}

    def read_choices(self, layer: int, expert_ids_TM: np.ndarray, weights_TM: np.ndarray) -> None:
        """Copy what the tokens of the newest batch chose in a layer into arrays of that size, int64 and fp32."""
        self.native.read_choices(layer, expert_ids_TM, weights_TM)

    def choice_tally(self) -> Any:
        """What adds up the newest batches' choices, of all layers that route (`routing_columns`), when told to.

        hear(): add the newest batch; nothing where that was one of `depth`. read(counts_N, distinct_L): copy the rows
        of each expert, layer after layer, and how many experts of each layer a batch had work for, added up, both
        int64; returns the number of tokens. clear(): begin again.
        """
        return _native.ChoiceTally(self.native)

    def _not_finite(self, batch: Batch, depth: int) -> str:
        """Where the first number is that is infinite or none: the batch is run again, looking at all that is written.

        The same tokens at the same places write the same to the cache, so nothing is lost.
        """
        logits_NV = torch.empty(len(batch.output_rows_N), self.config.vocab_size)
        found = self.native.run_checked(*batch, logits_NV, depth)
        where = "in the logits"
        if found is not None:
            part, layer, row, experts = found
            of = f", expert {' or '.join(map(str, experts))}" if experts else ""
            at = f"token {batch.positions_T[row]} of its text"
            where = f"{part}{of}, at {at}" if layer < 0 else f"{part} of layer {layer}{of}, at {at}"
        return f"a number that is infinite or none: {where}; look at the weights there (moesaic convert --check)"


def _lower(build: Builder, num_ahead: int) -> None:
    config = build.config
    table = build.packer.read("embedding.weight")
    table = (table if table.dtype == torch.bfloat16 else table.float()).contiguous()
    build.native.embed(table, build.residual, config.embedding_multiplier)
    for index, layer in enumerate(config.layers):
        _lower_layer(build, layer, f"layers.{index}", index)
    give_back_freed()  # before the largest matrix is read
    final = config.decoder.final_norm
    build.norm(Label("norm"), final, "final_norm", build.residual, build.normed, config.hidden_size)
    head = "embedding.weight" if config.tie_word_embeddings else "head.weight"
    packed = native_packed(build.packer.matrix([head], build.packer.precision.of_head, "head"))
    bias = build.floats("head.bias") if config.head_bias else None
    build.native.output(build.normed, packed, bias, config.logits_divisor)
    for depth in range(1, num_ahead + 1):
        before = _kept(build)
        build.native.begin_section()
        build.native.embed(table, build.residual, config.embedding_multiplier)
        _lower_ahead(build, depth, before)
        build.native.output(build.normed, packed, bias, config.logits_divisor)


def _kept(build: Builder) -> int:
    """The number of the cache where the program keeps what is normed now, of every token, for another section."""
    number, size = len(build.caches), build.config.hidden_size
    build.caches.append(CacheShape(1, size, size, shared=True, taken=True))
    build.native.keep(Label("further tokens"), build.normed, number, build.caches[number])
    return number


def _lower_ahead(build: Builder, depth: int, before: int) -> None:
    """norm(layer(M [norm(residual); norm(h^(depth - 1))])), as models/mtp.py defines it. before: of `_kept`."""
    config, size, name = build.config, build.config.hidden_size, f"mtp.{depth - 1}"
    layer, index = config.mtp[depth - 1], len(config.layers) + depth - 1
    assert layer.hyper_connection is None, "residual streams would have to be normed and projected each for itself"
    label, both = Label("further tokens", index), build.buffer("embedding and hidden state", 2 * size)
    hidden = both.after(size)
    build.norm(label, layer.norm, f"{name}.embedding_norm", build.residual, both, size)
    build.native.take(label, before, hidden, 1 / config.logits_divisor)
    build.norm(label, layer.norm, f"{name}.hidden_norm", hidden, hidden, size)
    build.linear(label, [f"{name}.projection"], both, build.residual)
    _lower_layer(build, layer, f"{name}.layer", index)
    build.norm(label, layer.norm, f"{name}.final_norm", build.residual, build.normed, size)


def _lower_layer(build: Builder, layer: LayerConfig, name: str, index: int) -> None:
    """norm → attention → add, norm → feed-forward → add."""
    size, multiplier = build.config.hidden_size, layer.residual_multiplier
    label = Label("norm", index)
    build.norm(label, layer.norm, f"{name}.attention_norm", build.residual, build.normed, size)
    if isinstance(layer.attention, AttentionConfig):
        lower_attention(build, layer.attention, f"{name}.attention", index, multiplier)
    elif isinstance(layer.attention, MlaConfig):
        lower_mla(build, layer.attention, f"{name}.attention", index, multiplier)
    build.norm(label, layer.norm, f"{name}.feed_forward_norm", build.residual, build.normed, size)
    if isinstance(layer.feed_forward, MoeConfig):
        lower_moe(build, layer.feed_forward, f"{name}.feed_forward", index, multiplier)
    elif isinstance(layer.feed_forward, MlpConfig):
        lower_mlp(build, layer.feed_forward, f"{name}.feed_forward", Label("mlp", index), build.residual, multiplier)
