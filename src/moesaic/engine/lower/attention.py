"""Grouped-query attention over cached keys and values (see layers/attention.py, which defines it).

H heads, G key/value heads, A head dim.
"""

from moesaic.config import AttentionConfig
from moesaic.engine.builder import Builder, CacheShape, Label


def lower_attention(build: Builder, config: AttentionConfig, name: str, layer: int, multiplier: float) -> None:
    """residual += multiplier * attention(normed)."""
    label = Label("attention", layer)
    query_size, key_size = config.num_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    queries = build.buffer("queries, keys and values", query_size + 2 * key_size)
    keys, values = queries.after(query_size), queries.after(query_size + key_size)
    projections = [f"{name}.{part}_proj" for part in "qkv"]
    build.linear(Label("projections", layer), projections, build.normed, queries, bias=config.qkv_bias)
    sizes = ((queries, "q_norm", config.num_heads), (keys, "k_norm", config.num_key_value_heads))
    for place, norm_name, heads in sizes:
        if config.head_norm is not None:
            build.norm(label, config.head_norm, f"{name}.{norm_name}", place, place, config.head_dim, heads)
        if config.projection_norm is not None:
            build.norm(label, config.projection_norm, f"{name}.{norm_name}", place, place, heads * config.head_dim)
    if config.clip is not None:
        build.native.clip(label, queries, query_size + 2 * key_size, config.clip)
    both = config.num_heads + config.num_key_value_heads
    if config.rope is not None:
        build.rotate(label, config.rope, queries, heads=both, stride=config.head_dim, size=config.head_dim)
    if config.rotated_norm is not None:
        build.norm(label, config.rotated_norm, None, queries, queries, config.head_dim, both)
    if config.temperature is not None:
        build.native.temperature(label, queries, query_size, config.temperature.interval, config.temperature.scale)
    shape = CacheShape(config.num_key_value_heads, config.head_dim, config.head_dim, shared=False)
    attended = build.buffer("attended", query_size)
    build.native.attend(
        label,
        queries,
        keys,
        values,
        attended,
        cache=len(build.caches),
        shape=shape,
        heads=config.num_heads,
        window=config.window or 0,
        chunk=config.chunk or 0,
        scale=config.scale or config.head_dim**-0.5,
        sinks=build.floats(f"{name}.sinks") if config.sinks else None,
    )
    build.caches.append(shape)
    output = [f"{name}.o_proj"]
    build.linear(
        Label("projections", layer), output, attended, build.residual, bias=config.output_bias, adding=multiplier
    )
