"""What a process of moesaic's engine holds at most on this machine: all parts are allocated by rules of our own."""

from moesaic.config import AbsentConfig, AttentionConfig, LayerConfig, MlaConfig, MlpConfig, ModelConfig, MoeConfig
from moesaic.plan.formats import PACKINGS, Formats, total_bytes
from moesaic.plan.kinds import layer_kinds, part_specs
from moesaic.plan.rates import KernelRates


def engine_peak_bytes(
    rates: KernelRates, config: ModelConfig, formats: Formats, *, tokens: int, texts: int, cache_tokens: int
) -> float:
    """The most that a process takes: the program's own, packed weights, the cache, buffers of a step, logits.

    While the head is packed, the last, its matrix as the files have it is there, too, and no cache yet.
    tokens: of the largest step; texts: whose logits are computed at once; cache_tokens: for which there are blocks.
    """
    cache = formats.state_bytes(config, 1) * cache_tokens  # also while it is copied to twice as much: two halves
    buffers = 4.0 * tokens * _buffer_widths(config)
    logits = 2 * 4.0 * texts * config.vocab_size  # beside what is sampled from them
    unpacked = config.vocab_size * config.hidden_size * formats.of("embedding").bits / 8
    return rates.base_bytes + held_bytes(config, formats) + max(cache + buffers + logits, unpacked)


def held_bytes(config: ModelConfig, formats: Formats) -> float:
    """Packed weights as the engine holds them: routers in fp32; latent attention's matrices that heads read one by one
    in 8 bits or bf16; a tied table twice, since the head is packed beside the embedding."""
    total = total_bytes(config, formats)
    if config.tie_word_embeddings:
        total += config.vocab_size * config.hidden_size * formats.of("head").bits / 8
    for layer, _, count in layer_kinds(config.layers):
        if isinstance(layer.attention, MlaConfig):
            by_head = sum(s.numel for s in part_specs(layer.attention, config.hidden_size) if "kv_b_proj" in s.name)
            packing = formats.by_role["attention"]
            wide = {"int4": "int8", "uneven4": "int8", "fp8-128": "bf16"}.get(packing, packing)
            total += count * by_head * (PACKINGS[wide].bits - formats.of("attention").bits) / 8
    return total


def _buffer_widths(config: ModelConfig) -> float:
    """Numbers of a token in all of a program's buffers, which layers share."""
    kinds = [kind.layer for kind in layer_kinds(config.layers)]
    return 2 * config.hidden_size + max(map(_attention_width, kinds)) + max(_rows_width(config, kind) for kind in kinds)


def _attention_width(layer: LayerConfig) -> float:
    attention = layer.attention
    if isinstance(attention, AttentionConfig):
        return (2 * attention.num_heads + 2 * attention.num_key_value_heads) * attention.head_dim
    if isinstance(attention, MlaConfig):
        width = attention.latent_rank + attention.rope_dim
        heads = attention.num_heads
        own = heads * (attention.head_dim + width + attention.latent_rank + attention.value_dim)
        return own + (attention.query_rank or 0) + width
    return 0.0 if isinstance(attention, AbsentConfig) else 3 * attention.num_heads * attention.head_dim


def _rows_width(config: ModelConfig, layer: LayerConfig) -> float:
    """Of experts: rows rounded on the way in, and their outputs in fp32 before they are added up (in scratch)."""
    block = layer.feed_forward
    if isinstance(block, MoeConfig):
        return block.router.top_k * (0.3 * config.hidden_size + block.intermediate_size)
    return float(block.intermediate_size) if isinstance(block, MlpConfig) else 0.0
