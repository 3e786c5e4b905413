"""Layers of a model that are alike, told apart once: plans ask for them again and again."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from moesaic.config import IndexerConfig, LayerConfig, MlaConfig, ModelConfig, StackConfig
from moesaic.tensor_spec import TensorSpec


class LayerKind(NamedTuple):
    """Equal layers: one of them, the number of the first, and how often there is one."""

    layer: LayerConfig
    first: int
    times: int


def layer_kinds(layers: Sequence[LayerConfig]) -> list[LayerKind]:
    """The different layers, in the order of their first ones."""
    counts: list[int] = []
    firsts: list[int] = []
    places: dict[int, int] = {}  # by identity: most equal layers are one and the same object, see `with_shared_layers`
    for index, layer in enumerate(layers):
        place = places.get(id(layer))
        if place is None:
            place = next((at for at, first in enumerate(firsts) if layers[first] == layer), len(firsts))
            places[id(layer)] = place
            if place == len(firsts):
                firsts.append(index)
                counts.append(0)
        counts[place] += 1
    return [LayerKind(layers[first], first, count) for first, count in zip(firsts, counts, strict=True)]


def with_shared_layers(config: ModelConfig) -> ModelConfig:
    """The same model, of which layers that cost the same are one object, so that they are told apart quickly.

    Whose choice of tokens a layer takes makes no difference where all choose as many: it takes the first one's.
    """
    return replace(
        config, decoder=_shared(config.decoder), encoder=None if config.encoder is None else _shared(config.encoder)
    )


def _shared(stack: StackConfig) -> StackConfig:
    known: dict[LayerConfig, LayerConfig] = {}
    first: dict[object, int] = {}
    layers = []
    for index, layer in enumerate(stack.layers):
        attention = layer.attention
        if isinstance(attention, MlaConfig) and isinstance(attention.indexer, IndexerConfig):
            first.setdefault(attention.indexer, index)
        elif isinstance(attention, MlaConfig) and isinstance(attention.indexer, int):
            chooser = stack.layers[attention.indexer].attention
            source = first[chooser.indexer]  # pyright: ignore[reportAttributeAccessIssue]  StackConfig checked it
            layer = replace(layer, attention=replace(attention, indexer=source))
        layers.append(known.setdefault(layer, layer))
    return replace(stack, layers=tuple(layers))


@lru_cache(maxsize=512)
def layer_specs(layer: LayerConfig, hidden_size: int) -> tuple[TensorSpec, ...]:
    """A layer's tensors."""
    return tuple(layer.tensors("layer", hidden_size))


@lru_cache(maxsize=512)
def part_specs(part: object, hidden_size: int) -> tuple[TensorSpec, ...]:
    """The tensors of an attention or a feed-forward part."""
    return tuple(part.tensors("", hidden_size))  # pyright: ignore[reportAttributeAccessIssue]  every part has them
