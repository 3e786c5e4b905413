"""What every family of encoder-decoders must do, against transformers' own model of it.

NLLB-MoE's experts are the ones they should be there (see `experts_as_chosen`); everything else of it is transformers'.
"""

import copy
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from moesaic import families
from moesaic.config import CapacityConfig, MoeConfig
from moesaic.engine.generate import generate
from moesaic.hub import load, read_config, save
from moesaic.layers.kv_cache import KeyValueCache
from moesaic.models.build import build
from moesaic.models.encoder_decoder import EncoderDecoder
from moesaic.models.weight_map import check_weight_map
from moesaic.routing import RoutingTape
from tests.families.encoder_decoder_cases import CASES
from tests.families.encoder_decoder_oracle import (
    Seq2SeqOracle,
    make,
    num_learned,
    padded,
    put_gradients_in,
    words,
)

pytestmark = pytest.mark.usefixtures("nllb_as_chosen")

TOLERANCE = 1e-5  # of the logits' scale
GRADIENT_TOLERANCE = 1e-4  # of the largest slope in a tensor
NOISE = 1e-6  # of the largest slope of all: below it a slope is a rounding error (a bias of keys moves no score)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Seq2SeqOracle]:
    transformers.utils.logging.disable_progress_bar()
    return cache(lambda case: make(case, tmp_path_factory.mktemp("seq2seq")))


@pytest.fixture(params=CASES)
def oracle(request: pytest.FixtureRequest, made: Callable[[str], Seq2SeqOracle]) -> Seq2SeqOracle:
    return made(request.param)


def ours(folder: Path) -> EncoderDecoder:
    model = load(folder)
    assert isinstance(model, EncoderDecoder)
    return model


@torch.no_grad()
def their_logits(model: Any, source: Tensor, target: Tensor, **masks: Tensor) -> Tensor:
    return model(input_ids=source, decoder_input_ids=target, use_cache=False, **masks).logits


def assert_same(seen: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 1, "degenerate logits prove nothing"
    assert (seen - expected).abs().max() <= TOLERANCE * expected.abs().max()


@torch.no_grad()
def test_their_checkpoint_gives_their_logits(oracle: Seq2SeqOracle) -> None:
    source, target = words(3, 15), words(3, 11, seed=4)
    assert_same(ours(oracle.folder)(source, target), their_logits(oracle.model, source, target))


@torch.no_grad()
def test_more_tokens_than_slots_lose_the_same_rows(oracle: Seq2SeqOracle) -> None:
    """And distances beyond the last bucket."""
    source, target = words(2, 40), words(2, 33, seed=4)
    assert_same(ours(oracle.folder)(source, target), their_logits(oracle.model, source, target))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_the_tokens(oracle: Seq2SeqOracle, side: str) -> None:
    """Switch's rows alone, for transformers' padding on the left takes up slots; NLLB's slots are the whole batch's."""
    source, source_mask = padded(words(3, 15), side, oracle.pad_id)
    target, mask = padded(words(3, 13, seed=4), side, oracle.pad_id)
    seen = ours(oracle.folder)(source, target, source_mask, mask)[mask.bool()]
    assert seen.isfinite().all()
    if oracle.share_counts_padding:
        return  # see test_padding_is_no_part_of_the_share
    if oracle.model.config.model_type == "nllb-moe":
        expected = their_logits(oracle.model, source, target, attention_mask=source_mask, decoder_attention_mask=mask)[
            mask.bool()
        ]
    else:
        rows = zip(source, source_mask.bool(), target, mask.bool(), strict=True)
        alone = [their_logits(oracle.model, ids[kept][None], own[held][None])[0] for ids, kept, own, held in rows]
        expected = torch.cat(alone)
    assert_same(seen, expected)


@torch.no_grad()
def test_padding_is_no_part_of_the_share(made: Callable[[str], Seq2SeqOracle]) -> None:
    """C is a share of the tokens. transformers' is one of tokens and padding: so as many tokens as there are without
    padding give its numbers, and padding changes none of ours."""
    oracle = made("nllb_moe/limited by tokens, prioritised, divided before")
    source, target = words(1, 15), words(1, 11, seed=4)
    model, expected = ours(oracle.folder), their_logits(oracle.model, source, target)
    for side in ("left", "right"):
        wide = torch.nn.functional.pad(source, (9, 0) if side == "left" else (0, 9), value=oracle.pad_id)
        assert_same(model(wide, target, wide != oracle.pad_id), expected)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * 13, [5, 1, 1, 6]])
def test_the_cache_gives_what_theirs_gives(oracle: Seq2SeqOracle, chunks: list[int]) -> None:
    """Chunk by chunk: a capacity is that of the tokens of one pass, there as here."""
    model, source, target = ours(oracle.folder), words(3, 15), words(3, 13, seed=4)
    cache = KeyValueCache(model.config, batch_size=3, max_length=13)
    model.read(source, cache=cache)
    past, memory, seen, expected = None, oracle.model.get_encoder()(source), [], []
    for part in target.split(chunks, dim=1):
        seen.append(model.logits(model.hidden(part, cache=cache)))
        out = oracle.model(encoder_outputs=memory, decoder_input_ids=part, past_key_values=past, use_cache=True)
        past = out.past_key_values
        expected.append(out.logits)
    assert_same(torch.cat(seen, dim=1), torch.cat(expected, dim=1))
    if not any(_evaluation_capacities(model)):
        assert_same(torch.cat(seen, dim=1), their_logits(oracle.model, source, target))


@torch.no_grad()
def test_they_load_what_we_save(oracle: Seq2SeqOracle, tmp_path: Path) -> None:
    save(ours(oracle.folder), tmp_path / "ours")
    if not oracle.loaded_by_them:
        return
    theirs = _loaded_by_them(tmp_path / "ours")
    source, target = words(3, 15), words(3, 11, seed=4)
    assert torch.equal(their_logits(theirs, source, target), their_logits(oracle.model, source, target))
    assert theirs.config.eos_token_id == oracle.model.config.eos_token_id
    assert theirs.generation_config.decoder_start_token_id == read_config(oracle.folder).decoder_start_token_id


def _loaded_by_them(folder: Path) -> Any:
    loaded: Any = AutoModelForSeq2SeqLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, dtype="auto"
    )
    theirs, report = loaded
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return theirs.eval()


@torch.no_grad()
def test_they_load_a_model_born_here(oracle: Seq2SeqOracle, tmp_path: Path) -> None:
    model = build(read_config(oracle.folder), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(11)
    for spec, tensor in zip(model.config.tensors(), model.state_dict().values(), strict=True):
        tensor.normal_(float(spec.role == "norm"), 0.2 * spec.gain, generator=generator)
    save(model, tmp_path / "ours", max_shard_bytes=20_000)
    if oracle.loaded_by_them:
        source, target = words(3, 15), words(3, 11, seed=4)
        assert_same(model(source, target), their_logits(_loaded_by_them(tmp_path / "ours"), source, target))


def test_a_round_trip_keeps_every_byte(oracle: Seq2SeqOracle, tmp_path: Path) -> None:
    save(ours(oracle.folder), tmp_path / "ours")
    theirs, again = (load_file(folder / "model.safetensors") for folder in (oracle.folder, tmp_path / "ours"))
    assert again.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert read_config(tmp_path / "ours") == read_config(oracle.folder)


def test_counts_are_the_built_models(oracle: Seq2SeqOracle) -> None:
    config = read_config(oracle.folder)
    model = build(config, device="meta")
    described = {spec.name: spec.shape for spec in config.tensors()}
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == described
    assert config.total == sum(parameter.numel() for parameter in model.parameters()) == num_learned(oracle.model)


def test_the_family_describes_itself_both_ways(oracle: Seq2SeqOracle) -> None:
    config = read_config(oracle.folder)
    assert families.from_hf(families.to_hf(config)) == config
    assert type(config).from_dict(config.to_dict()) == config
    check_weight_map(config.tensors(), families.family(config.family).weight_map(config))


def loss_of(logits_BSV: Tensor, ids_BS: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten())


def test_every_gradient_is_theirs(oracle: Seq2SeqOracle, tmp_path: Path) -> None:
    source, target = words(3, 15, seed=9), words(3, 13, seed=10)
    twin = copy.deepcopy(oracle.model)
    loss_of(twin(input_ids=source, decoder_input_ids=target).logits, target).backward()
    put_gradients_in(twin)
    twin.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((oracle.folder / "config.json").read_bytes())
    theirs, model = load(tmp_path).state_dict(), ours(oracle.folder)
    loss_of(model(source, target), target).backward()
    noise = NOISE * max(slope.abs().max().item() for slope in theirs.values())
    for name, parameter in model.named_parameters():
        slope = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        scale, error = theirs[name].abs().max().item(), (slope - theirs[name]).abs().max().item()
        vanishes = max(scale, slope.abs().max().item()) < noise
        assert vanishes or error <= GRADIENT_TOLERANCE * scale, f"{name}: off by {error:.1e} of {scale:.1e}"


@torch.no_grad()
def test_every_layer_chooses_and_weighs_the_same_experts(oracle: Seq2SeqOracle) -> None:
    source, target, tape = words(4, 17), words(4, 19, seed=5), RoutingTape()
    model = ours(oracle.folder)
    model(source, target, tape=tape)
    theirs = list(_their_weights(oracle.model, source, target))
    assert len(theirs) == len(tape.decisions) == len(model.config.moe_layers)
    for (layer, decision), expected_TE in zip(sorted(tape.decisions.items()), theirs, strict=True):
        rows = decision.rows
        seen_TE = torch.zeros_like(expected_TE).index_put((rows.token_ids_R, rows.expert_ids_R), rows.weights_R)
        assert torch.equal(seen_TE > 0, expected_TE > 0), f"layer {layer}"
        assert (seen_TE - expected_TE).abs().max() <= 1e-5


def _their_weights(model: Any, source: Tensor, target: Tensor) -> Iterator[Tensor]:
    """The weight of every expert for every token [T, E], 0 where it has none, of each MoE layer."""
    heard: list[Tensor] = []

    def hear(_module: Any, _args: Any, out: Any) -> None:
        first, second = out[0], out[1]  # Switch: choices and the chosen weights; NLLB: first choices and all weights
        weights = second if second.shape == first.shape else first * second
        heard.append(weights.reshape(-1, weights.shape[-1]))

    hooks = [module.register_forward_hook(hear) for name, module in model.named_modules() if name.endswith(".router")]
    model(input_ids=source, decoder_input_ids=target)
    for hook in hooks:
        hook.remove()
    return iter(heard)


@torch.no_grad()
def test_greedy_targets_are_theirs(oracle: Seq2SeqOracle) -> None:
    """Sources of three lengths; NLLB is told a language first, where the batch's tokens share no slots: these are
    those of one pass, and transformers takes two for what the target begins with."""
    model = ours(oracle.folder)
    shared_slots = any(capacity and capacity.group_size is None for capacity in _evaluation_capacities(model))
    source, mask = padded(words(3, 15), "right", oracle.pad_id)
    if oracle.share_counts_padding:
        source, mask = words(3, 15), torch.ones_like(source)
    prefix = [77] if oracle.model.config.model_type == "nllb-moe" and not shared_slots else []
    written = generate(
        model, [row[kept].tolist() for row, kept in zip(source, mask.bool(), strict=True)], 12, target_prefix=prefix
    )
    theirs = oracle.model.generate(
        input_ids=source,
        attention_mask=mask,
        max_new_tokens=12 + len(prefix),
        do_sample=False,
        num_beams=1,
        decoder_start_token_id=model.config.decoder_start_token_id,
        forced_bos_token_id=prefix[0] if prefix else None,
    )
    assert model.config.tie_word_embeddings or len({token for row in written for token in row}) > 2
    for row, expected in zip(written, theirs[:, 1 + len(prefix) :].tolist(), strict=True):
        assert row == expected[: len(row)]
        assert len(row) == 12 or row[-1] in model.config.eos_token_ids


def _evaluation_capacities(model: EncoderDecoder) -> list[CapacityConfig | None]:
    blocks = (layer.feed_forward for layer in model.config.layers)
    return [block.evaluation_capacity for block in blocks if isinstance(block, MoeConfig)]


@torch.no_grad()
def test_their_nllb_still_has_two_experts_at_work(
    made: Callable[[str], Seq2SeqOracle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5.23: the first choice's weight goes to expert 1, the second's to expert 0, whoever was chosen.

    Should this fail, transformers has been put right: then `experts_as_chosen` may go.
    """
    monkeypatch.undo()
    block = next(
        each for each in made("nllb_moe/as released").model.modules() if type(each).__name__ == "NllbMoeSparseMLP"
    )
    x_TD = torch.randn(9, 48, generator=torch.Generator().manual_seed(2))
    first_TE, weights_TE, _ = block.router(x_TD)
    first_T1, all_T1 = (first_TE * weights_TE).sum(1, keepdim=True), weights_TE.sum(1, keepdim=True)
    expected = first_T1 * block.experts["expert_1"](x_TD) + (all_T1 - first_T1) * block.experts["expert_0"](x_TD)
    expected = expected * (1 - block.experts.moe_token_dropout)
    assert torch.allclose(block(x_TD[None])[0], expected, atol=1e-5)
