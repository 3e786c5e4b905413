"""The encoder-decoder, whatever the family: who sees whom, what is kept, how layers are numbered, what is refused."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.config import (
    AttentionConfig,
    CapacityConfig,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    MoeConfig,
    NormConfig,
    RelativeBiasConfig,
    RouterConfig,
    SinusoidConfig,
    StackConfig,
)
from moesaic.engine.generate import generate
from moesaic.errors import ConfigError, GenerationError
from moesaic.layers.kv_cache import KeyValueCache
from moesaic.models.build import build, decoder_only
from moesaic.models.decoder import Decoder
from moesaic.models.encoder_decoder import EncoderDecoder
from moesaic.routing import RoutingTape

SIZE, VOCAB = 20, 53
HEADS = AttentionConfig(num_heads=4, num_key_value_heads=2, head_dim=6, rope=None)
BIASES = RelativeBiasConfig(num_buckets=8, max_distance=12)
DENSE = MlpConfig(intermediate_size=17, activation="relu", gated=False, bias=True)


def moe(**settings: Any) -> MoeConfig:
    router = RouterConfig(name="softmax_topk", num_experts=5, top_k=2)
    return MoeConfig(router=router, intermediate_size=9, activation="relu", gated=False, bias=True, **settings)


def config(**changes: Any) -> ModelConfig:
    """Three layers that read, of which the second routes, and two that write, of which the first does."""
    first = dataclasses.replace(HEADS, relative_bias=BIASES)
    later = dataclasses.replace(HEADS, relative_bias=0)
    sparse = moe(**changes.pop("moe", {}))
    encoder = StackConfig(
        layers=(
            LayerConfig(attention=first, feed_forward=DENSE),
            LayerConfig(attention=later, feed_forward=sparse),
            LayerConfig(attention=later, feed_forward=DENSE),
        )
    )
    decoder = StackConfig(
        layers=(
            LayerConfig(attention=first, feed_forward=sparse, cross_attention=HEADS),
            LayerConfig(attention=later, feed_forward=DENSE, cross_attention=HEADS),
        ),
        final_norm=NormConfig(kind="layer", bias=True),
    )
    fields: dict[str, Any] = {
        "family": "switch_transformers",
        "vocab_size": VOCAB,
        "hidden_size": SIZE,
        "context_length": 40,
        "encoder": encoder,
        "decoder": decoder,
        "sinusoid": SinusoidConfig(first=2),
        "decoder_start_token_id": 0,
        "eos_token_ids": (1,),
    }
    return ModelConfig(**fields | changes)


def model(**changes: Any) -> EncoderDecoder:
    made = build(config(**changes), dtype=torch.float32)
    assert isinstance(made, EncoderDecoder)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.normal_(float("norm.weight" in name), 0.3, generator=generator)
    return made.eval()


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def test_tensors_are_the_built_models_in_their_order() -> None:
    made = model()
    assert [spec.name for spec in made.config.tensors()] == list(made.state_dict())
    assert made.config.total == sum(parameter.numel() for parameter in made.parameters())
    assert ModelConfig.from_dict(made.config.to_dict()) == made.config


def test_layers_are_numbered_through_both_stacks() -> None:
    made, tape = model(), RoutingTape()
    made(ids(2, 7), ids(2, 5), tape=tape)
    assert made.config.moe_layers == (1, 3) == tuple(tape.decisions)
    assert [tape.decisions[layer].rows.num_tokens for layer in (1, 3)] == [14, 10]
    documents_T = tape.decisions[3].document_ids_T
    assert documents_T is not None and documents_T.tolist() == [0] * 5 + [1] * 5


@torch.no_grad()
def test_a_target_sees_the_whole_source_and_its_own_past() -> None:
    made, source, target = model(), ids(1, 9), ids(1, 8)
    before = made(source, target)
    other_end = source.clone()
    other_end[0, -1] = 2 + (other_end[0, -1] - 1) % (VOCAB - 2)
    assert ((made(other_end, target) - before).abs().amax(-1) > 1e-4).all()
    later = target.clone()
    later[0, 5] = 2 + (later[0, 5] - 1) % (VOCAB - 2)
    changed_S = (made(source, later) - before)[0].abs().amax(-1) > 1e-4
    assert changed_S.tolist() == [False] * 5 + [True] * 3


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    made, source, target = model(), ids(2, 9), ids(2, 8)
    room = (3, 0) if side == "left" else (0, 3)
    wide_source, wide_target = (torch.nn.functional.pad(each, room, value=0) for each in (source, target))
    source_mask, mask = (
        torch.nn.functional.pad(torch.ones_like(each, dtype=torch.bool), room) for each in (source, target)
    )
    seen = made(wide_source, wide_target, source_mask, mask)
    assert seen.isfinite().all()
    assert torch.allclose(seen[mask].view(2, 8, VOCAB), made(source, target), atol=1e-5)


@torch.no_grad()
def test_sources_that_are_all_padding_stay_finite() -> None:
    made, mask = model(), torch.tensor([[True] * 4, [False] * 4])
    assert made.encode(ids(2, 4), mask).isfinite().all()


@torch.no_grad()
def test_a_source_is_read_once() -> None:
    made, source, target = model(), ids(2, 9), ids(2, 8)
    projected: list[int] = []
    for number, layer in enumerate(made.layers):
        if layer.cross_attention is not None:
            layer.get_submodule("cross_attention.k_proj").register_forward_hook(
                lambda *_, number=number: projected.append(number)
            )
    cache = KeyValueCache(made.config, batch_size=2, max_length=8)
    memory = made.encode(source)
    parts = [made.hidden(part, cache=cache, memory_BMD=memory) for part in target.split([3, 1, 1, 3], dim=1)]
    assert projected == [3, 4]
    assert torch.allclose(made.logits(torch.cat(parts, dim=1)), made(source, target), atol=1e-5)


@torch.no_grad()
def test_a_cache_knows_its_source() -> None:
    made, cache = model(), KeyValueCache(config(), batch_size=2, max_length=8)
    made.read(ids(2, 9), cache=cache)
    made.hidden(ids(2, 3), cache=cache)
    with pytest.raises(GenerationError, match="seen another source"):
        made.hidden(ids(2, 1), cache=cache, memory_BMD=made.encode(ids(2, 9)))


def test_a_target_needs_one_source() -> None:
    made, target = model(), ids(2, 3)
    with pytest.raises(ConfigError, match="a target without a source"):
        made.hidden(target)
    with pytest.raises(ConfigError, match="source ids and a memory; give one"):
        made.hidden(target, source_ids_BM=ids(2, 4), memory_BMD=made.encode(ids(2, 4)))
    with pytest.raises(ConfigError, match="1 sources for 2 targets"):
        made(ids(1, 4), target)
    with pytest.raises(ConfigError, match=r"source ids of shape \(4,\)"):
        made(ids(4), target)
    with pytest.raises(ConfigError, match=r"a mask of shape \(2, 3\) for source ids of \(2, 4\)"):
        made(ids(2, 4), target, torch.ones(2, 3))
    with pytest.raises(ConfigError, match=r"a source mask of shape \(2, 3\) for a memory of \(2, 4, 20\)"):
        made.hidden(target, memory_BMD=made.encode(ids(2, 4)), source_mask_BM=torch.ones(2, 3))


@torch.no_grad()
def test_a_capacity_by_document_is_each_rows_own() -> None:
    """Rows together lose what each loses alone, in evaluation, too; without one for evaluation nothing is lost."""
    limit = CapacityConfig(fixed=2, group_size="document")
    made, source, target = model(moe={"evaluation_capacity": limit}), ids(3, 11), ids(3, 9)
    tape = RoutingTape()
    together = made(source, target, tape=tape)
    assert tape.decisions[1].chosen.token_ids_R.numel() > tape.decisions[1].rows.token_ids_R.numel()
    alone = [made(source[row : row + 1], target[row : row + 1]) for row in range(3)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    dropless = model(moe={"capacity": limit})
    assert not torch.allclose(together, dropless(source, target), atol=1e-3)


def test_masked_outputs_are_as_large_in_evaluation_as_in_the_mean() -> None:
    x_TD = torch.randn(400, SIZE, generator=torch.Generator().manual_seed(8))
    torch.manual_seed(5)
    block = model(moe={"output_masking": 0.3}).get_submodule("layers.1.feed_forward")
    plain = model().get_submodule("layers.1.feed_forward")
    plain.load_state_dict(block.state_dict())
    with torch.no_grad():
        whole = plain(x_TD[None])[0]
        assert torch.allclose(block(x_TD[None])[0], 0.7 * whole, atol=1e-5)
        block.train()
        mean = torch.stack([block(x_TD[None])[0] for _ in range(300)]).mean(0)
    assert ((mean * whole).sum() / whole.square().sum()).item() == pytest.approx(0.7, abs=0.01)


def test_new_logits_and_scores_are_no_larger_for_being_undivided() -> None:
    """T5's scores are not divided by sqrt(head_dim), its tied logits are by sqrt(hidden_size)."""
    undivided = dataclasses.replace(HEADS, scale=1.0)
    assert [round(spec.gain, 6) for spec in undivided.tensors("", SIZE)] == [round(6**-0.5, 6), 1, 1, 1]
    assert all(spec.gain == 1 for spec in HEADS.tensors("", SIZE))
    tied = build(config(tie_word_embeddings=True, logits_divisor=SIZE**0.5), dtype=torch.float32).initialize(1)
    usual = build(config(tie_word_embeddings=True), dtype=torch.float32).initialize(1)
    assert torch.allclose(tied.head_weight / SIZE**0.5, usual.head_weight)


def test_the_right_class_is_built() -> None:
    with_encoder, without = config(), dataclasses.replace(config(), encoder=None, decoder=_without_cross())
    assert isinstance(build(with_encoder, device="meta"), EncoderDecoder)
    assert isinstance(build(without, device="meta"), Decoder)
    with pytest.raises(ConfigError, match="a model with an encoder"):
        Decoder(with_encoder)
    with pytest.raises(ConfigError, match="a model without an encoder"):
        EncoderDecoder(without)
    with pytest.raises(
        ConfigError, match=r"chat needs a model that only decodes.*`moesaic generate` writes its targets"
    ):
        decoder_only(build(with_encoder, device="meta"), "chat")


def _without_cross() -> StackConfig:
    stack = config().decoder
    return dataclasses.replace(
        stack, layers=tuple(dataclasses.replace(layer, cross_attention=None) for layer in stack.layers)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": _without_cross()}, "decoder layers without cross_attention"),
        ({"encoder": None}, "cross_attention without an encoder"),
        ({"encoder": config().decoder}, "cross_attention in an encoder"),
        ({"mtp": (_without_cross().layers[1],)}, "mtp with an encoder"),
    ],
)
def test_stacks_that_do_not_go_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_attention_that_an_encoder_cannot_have_is_refused() -> None:
    layers = (LayerConfig(attention=dataclasses.replace(HEADS, window=3), feed_forward=DENSE),)
    with pytest.raises(ConfigError, match="window in an encoder, which has none"):
        config(encoder=StackConfig(layers=layers))
    with pytest.raises(ConfigError, match="relative_bias in cross attention"):
        LayerConfig(
            attention=HEADS, feed_forward=DENSE, cross_attention=dataclasses.replace(HEADS, relative_bias=BIASES)
        )
    with pytest.raises(ConfigError, match="layer 0 takes the relative biases of layer 0"):
        StackConfig(layers=(LayerConfig(attention=dataclasses.replace(HEADS, relative_bias=0), feed_forward=DENSE),))


@torch.no_grad()
def test_targets_are_written_greedily() -> None:
    """Each token is the likeliest after those before it, whatever stands beside it in the batch."""
    made, sources = model(), [ids(9).tolist(), ids(4, seed=2).tolist(), ids(6, seed=5).tolist()]
    tape = RoutingTape()
    written = generate(made, sources, 7, target_prefix=[5], eos_token_ids=(), tape=tape)
    for source, target in zip(sources, written, strict=True):
        whole = torch.tensor([[0, 5, *target]])
        logits = made(torch.tensor([source]), whole)
        assert logits[0, 1:-1].argmax(-1).tolist() == target
    assert tape.decisions.keys() == {1, 3}
    assert generate(made, sources[1], 7, target_prefix=[5], eos_token_ids=()) == written[1]
    stop = written[1][0]
    assert generate(made, sources[1], 7, target_prefix=[5], eos_token_ids=(stop,)) == [stop]


def test_sampling_is_seeded() -> None:
    made, source = model(), ids(6).tolist()
    options: dict[str, Any] = {"temperature": 2.0, "eos_token_ids": ()}
    first = generate(made, source, 12, seed=1, **options)
    assert first == generate(made, source, 12, seed=1, **options) != generate(made, source, 12, seed=2, **options)


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"target_prefix": [VOCAB]}, {}, r"target_prefix=\[53\]; the model knows tokens 0 to 52"),
        ({"target_prefix": [2] * 39}, {}, "a target_prefix of 39 tokens leaves no room in a context of 40"),
        ({}, {"decoder_start_token_id": None}, "no decoder_start_token_id"),
    ],
)
def test_targets_that_cannot_begin_are_refused(options: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        generate(model(**changes), [2, 3], 4, **options)


def test_a_cache_is_no_option_for_targets() -> None:
    cache = KeyValueCache(config(), batch_size=1, max_length=8)
    with pytest.raises(GenerationError, match="a cache for a model with an encoder"):
        generate(model(), [2, 3], 4, cache=cache)
