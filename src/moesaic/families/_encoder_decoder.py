"""What the families of encoder-decoders share: which layers are sparse, what is alike in all, and names of tensors."""

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from moesaic.config import LayerConfig, MlpConfig, ModelConfig, MoeConfig, StackConfig
from moesaic.families._common import refusal, the_same
from moesaic.models.weight_map import Piece, WeightMap
from moesaic.tensor_spec import TensorSpec

T = TypeVar("T")
IsSparse = Callable[[int, int], bool]


def step_of(stack: StackConfig, is_sparse: IsSparse, family: str) -> int:
    """The step at which the layers of a stack are sparse; `is_sparse` tells it of a layer's index and a step.

    Raises ConfigError when there is none: `family` has one field for it.
    """
    wanted = [isinstance(layer.feed_forward, MoeConfig) for layer in stack.layers]
    for step in range(len(wanted) + 1):
        if [is_sparse(index, step) for index in range(len(wanted))] == wanted:
            return step
    listed = [index for index, sparse in enumerate(wanted) if sparse]
    raise refusal(family, f"its layers {listed} of {len(wanted)} are MoE layers, which is no step that it knows")


class Alike(NamedTuple):
    """What all layers of a model share: the first of each stands for all."""

    layer: LayerConfig
    moe: MoeConfig | None
    mlp: MlpConfig | None


def alike(config: ModelConfig, layers: tuple[LayerConfig, ...]) -> Alike:
    """The parts that these layers share. Raises ConfigError where they differ, apart from their attention."""
    the_same("the norm", config.family, [layer.norm for layer in layers])
    blocks = [layer.feed_forward for layer in layers]
    moes = [block for block in blocks if isinstance(block, MoeConfig)]
    mlps = [block for block in blocks if isinstance(block, MlpConfig)]
    if len(moes) + len(mlps) < len(blocks):
        raise refusal(config.family, "it has Soft MoE layers")
    moe = the_same("the MoE", config.family, moes) if moes else None
    return Alike(layers[0], moe, the_same("the dense block", config.family, mlps) if mlps else None)


def one_or_all(ids: tuple[int, ...]) -> int | list[int] | None:
    """Token ids as a config.json has them: one alone, or a list, or null."""
    return ids[0] if len(ids) == 1 else list(ids) or None


class ExpertNames(NamedTuple):
    """What a family calls the projections of an expert; `{e}` stands for the expert."""

    gate: str
    up: str
    down: str


class StackNames(NamedTuple):
    """What begins the names of a stack's layers, and the names in a layer: of our modules, and of experts."""

    prefix: str
    modules: dict[str, str]
    experts: ExpertNames


def weight_map(config: ModelConfig, outer: dict[str, str], encoder: StackNames, decoder: StackNames) -> WeightMap:
    """Our tensors and their names in files with a tensor per expert. `outer`: the modules outside of layers.

    Source, target and a tied head have one embedding. Where the head is not tied, transformers 5 looks for a table of
    each stack, too: these are copies.
    """
    tables = [names.prefix.rsplit(".", 2)[0] + ".embed_tokens.weight" for names in (encoder, decoder)]
    copies = () if config.tie_word_embeddings else tuple(Piece(name, is_copy=True) for name in tables)
    first = len(config.layers) - len(config.decoder.layers)

    def pieces(spec: TensorSpec) -> tuple[Piece, ...]:
        place, _, inner = spec.name.removeprefix("layers.").partition(".")
        if not spec.name.startswith("layers."):
            module, kind = spec.name.rsplit(".", 1)
            return (Piece(f"{outer[module]}.{kind}"), *(copies if module == "embedding" else ()))
        layer = int(place)
        names, index = (encoder, layer) if layer < first else (decoder, layer - first)
        return tuple(_layer_pieces(spec, inner, f"{names.prefix}{index}.", names))

    return {spec.name: pieces(spec) for spec in config.tensors()}


def _layer_pieces(spec: TensorSpec, inner: str, prefix: str, names: StackNames) -> Iterator[Piece]:
    module, kind = inner.rsplit(".", 1)
    if module != "feed_forward.experts":
        yield Piece(f"{prefix}{names.modules[module]}.{kind}")
        return
    part, kind = kind.removesuffix("_bias"), "bias" if kind.endswith("_bias") else "weight"
    num_experts, rows = spec.shape[:2]
    whole = {"up": names.experts.up, "down": names.experts.down}
    for expert in range(num_experts):
        if part in whole:
            yield Piece(f"{prefix}{whole[part].format(e=expert)}.{kind}", (expert,))
            continue
        halves = ((names.experts.gate, slice(0, rows // 2)), (names.experts.up, slice(rows // 2, rows)))
        for name, half in halves:
            yield Piece(f"{prefix}{name.format(e=expert)}.{kind}", (expert, half))
