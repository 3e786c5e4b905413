"""Tiny models with unequal odd sizes, so that no transposition hides in a square."""

import dataclasses

import torch

from moesaic.config import (
    AttentionConfig,
    CompressedAttentionConfig,
    CompressionConfig,
    EntryIndexerConfig,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    MoeConfig,
    NormConfig,
    RopeConfig,
    RouterConfig,
    StackConfig,
)
from moesaic.models.decoder import Decoder


def tiny_config(
    *,
    windows: tuple[int | None, ...] = (None, 5),
    router: str = "softmax_topk",
    selection_bias: bool = False,
    shared: bool = False,
    tied: bool = False,
    vocab_size: int = 61,
    eos_token_ids: tuple[int, ...] = (),
) -> ModelConfig:
    """One layer a window, the last of them dense."""
    moe = MoeConfig(
        router=RouterConfig(name=router, num_experts=5, top_k=2, selection_bias=selection_bias),
        intermediate_size=13,
        shared=MlpConfig(intermediate_size=7) if shared else None,
    )
    layers = tuple(
        LayerConfig(
            attention=AttentionConfig(
                num_heads=4, num_key_value_heads=2, head_dim=6, window=window, head_norm=NormConfig()
            ),
            feed_forward=moe if index < len(windows) - 1 or len(windows) == 1 else MlpConfig(intermediate_size=17),
        )
        for index, window in enumerate(windows)
    )
    return ModelConfig(
        family="qwen3_moe",
        vocab_size=vocab_size,
        hidden_size=20,
        context_length=48,
        decoder=StackConfig(layers=layers),
        tie_word_embeddings=tied,
        eos_token_ids=eos_token_ids,
    )


def compressed_config(indexer: EntryIndexerConfig | None = None) -> ModelConfig:
    """A layer that sees the last tokens alone, one with an entry for every 2 tokens that overlap, one for every 5."""
    plain = tiny_config(windows=(3, 3, 3))
    attention = CompressedAttentionConfig(
        num_heads=6,
        head_dim=10,
        query_rank=9,
        window=3,
        output_groups=3,
        output_rank=7,
        rope=RopeConfig(layout="interleaved", rotary_dim=4),
    )
    overlapping = CompressionConfig(ratio=2, overlap=True, indexer=indexer)
    layers = tuple(
        dataclasses.replace(layer, attention=dataclasses.replace(attention, compression=compression))
        for layer, compression in zip(plain.layers, (None, overlapping, CompressionConfig(ratio=5)), strict=True)
    )
    return dataclasses.replace(plain, decoder=StackConfig(layers=layers))


def lively(config: ModelConfig, seed: int = 0) -> Decoder:
    """A model whose weights are large enough for every part to matter."""
    torch.manual_seed(seed)
    model = Decoder(config).initialize(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.3)
            if "norm" in name:
                parameter.add_(1.0)
        for name, buffer in model.named_buffers():
            if name.endswith(".selection_bias"):
                buffer.normal_(0.0, 0.1)
    return model.eval()


def lively_decoder(config: ModelConfig) -> Decoder:
    """A model in fp32 in which nothing is so small, or so nearly 0 or 1, that a mistake in it would not show."""
    model = Decoder(config, dtype=torch.float32).initialize(7)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float("norm" in name), 0.2, generator=generator)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand(buffer.shape, generator=generator) / 10)
    return model
