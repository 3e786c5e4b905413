"""Latent attention in its absorbed form: queries meet the latents themselves (see layers/mla.py, which defines it).

H heads, Z latent, P the part of a head without positions, R the turned part, V a head's value.
"""

from torch import Tensor

from moesaic.config.mla import INNER_NORM, MlaConfig
from moesaic.engine.builder import Builder, CacheShape, Label, Place


def lower_mla(build: Builder, config: MlaConfig, name: str, layer: int, multiplier: float) -> None:
    """residual += multiplier * attention(normed).

    One form for prompts and for single tokens, so that a token's numbers do not depend on how its prompt was cut.
    """
    label, projections = Label("attention", layer), Label("projections", layer)
    queries, latent = _projected(build, config, name, projections)
    keys = latent.after(config.latent_rank)
    build.norm(label, INNER_NORM, f"{name}.kv_a_norm", latent, latent, config.latent_rank)
    build.rotate(label, config.rope, keys, heads=1, stride=config.rope_dim, size=config.rope_dim)
    build.rotate(
        label,
        config.rope,
        queries.after(config.nope_dim),
        heads=config.num_heads,
        stride=config.head_dim,
        size=config.rope_dim,
    )

    def expansion() -> Tensor:
        return build.packer.read(f"{name}.kv_b_proj.weight").unflatten(0, (config.num_heads, -1))

    def keys_HZP() -> Tensor:
        return expansion()[:, : config.nope_dim].mT.contiguous()

    def values_HVZ() -> Tensor:
        return expansion()[:, config.nope_dim :].contiguous()

    width = config.latent_rank + config.rope_dim
    absorbed = build.buffer("absorbed queries", config.num_heads * width)
    build.per_head(projections, f"{name} keys", keys_HZP, queries, config.head_dim, absorbed, width)
    build.native.copy_heads(
        label,
        queries.after(config.nope_dim),
        config.head_dim,
        absorbed.after(config.latent_rank),
        width,
        heads=config.num_heads,
        size=config.rope_dim,
    )
    shape = CacheShape(1, width, config.latent_rank, shared=True)
    attended = build.buffer("attended latents", config.num_heads * config.latent_rank)
    build.native.attend(
        label,
        absorbed,
        latent,
        latent,
        attended,
        cache=len(build.caches),
        shape=shape,
        heads=config.num_heads,
        window=0,
        chunk=0,
        scale=config.scale,
        sinks=None,
    )
    build.caches.append(shape)
    values = build.buffer("attended", config.num_heads * config.value_dim)
    build.per_head(projections, f"{name} values", values_HVZ, attended, config.latent_rank, values, config.value_dim)
    build.linear(projections, [f"{name}.o_proj"], values, build.residual, bias=config.bias, adding=multiplier)


def _projected(build: Builder, config: MlaConfig, name: str, label: Label) -> tuple[Place, Place]:
    """Where the queries [H * (P + R)] are, and the latent [Z] with the shared key [R] behind it."""
    query_size = config.num_heads * config.head_dim
    width = config.latent_rank + config.rope_dim
    if config.query_rank is None:
        queries = build.buffer("queries and latent", query_size + width)
        build.linear(label, [f"{name}.q_proj"], build.normed, queries)
        build.linear(label, [f"{name}.kv_a_proj"], build.normed, queries.after(query_size), bias=config.bias)
        return queries, queries.after(query_size)
    latents = build.buffer("latents", config.query_rank + width)
    names = [f"{name}.q_a_proj", f"{name}.kv_a_proj"]
    build.linear(label, names, build.normed, latents, bias=config.bias)
    build.norm(label, INNER_NORM, f"{name}.q_a_norm", latents, latents, config.query_rank)
    queries = build.buffer("queries", query_size)
    build.linear(label, [f"{name}.q_b_proj"], latents, queries)
    return queries, latents.after(config.query_rank)
