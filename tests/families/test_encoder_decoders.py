"""What every family of encoder-decoders must do, against what transformers' own model of it answers.

NLLB-MoE's experts are the ones they should be there (see `experts_as_chosen`); everything else of it is transformers'.
Answers are the recorded ones (see golden.py), and in the slow tests live.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
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
from tests.families.decoder_oracle import loaded, loss_of, put_gradients_in
from tests.families.encoder_decoder_cases import NOT_LOADED_BY_THEM, SHARE_COUNTS_PADDING
from tests.families.encoder_decoder_oracle import (
    CHOOSING,
    CHUNKS,
    LONG,
    PAIR,
    PARTS,
    ROW,
    SLOPING,
    num_learned,
    padded,
    prefix,
    save_their_gradients,
    sources,
    their_logits,
    their_model,
    words,
)
from tests.families.golden import golden
from tests.families.same import assert_same, assert_same_bytes, assert_same_gradients, assert_same_slopes


@pytest.fixture
def oracle(oracle_of_pairs: Any) -> Any:
    return oracle_of_pairs


@pytest.fixture
def live(live_of_pairs: Any) -> Any:
    return live_of_pairs


def ours(folder: Path) -> EncoderDecoder:
    model = load(folder)
    assert isinstance(model, EncoderDecoder)
    return model


def pad_id(oracle: Any) -> int:
    return golden(oracle.case).config["pad_token_id"]


@torch.no_grad()
@pytest.mark.parametrize(("question", "pair"), [("logits", PAIR), ("logits, long", LONG), ("logits, whole", PARTS)])
def test_their_checkpoint_gives_their_logits(oracle: Any, question: str, pair: tuple[Tensor, Tensor]) -> None:
    assert_same(oracle.ours(*pair)[..., oracle.columns], oracle.answer(question))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_the_tokens(oracle: Any, side: str) -> None:
    source, source_mask = padded(words(3, 15), side, pad_id(oracle))
    target, mask = padded(words(3, 13, seed=4), side, pad_id(oracle))
    seen = oracle.ours(source, target, source_mask, mask)[mask.bool()]
    assert seen.isfinite().all()
    if oracle.case not in SHARE_COUNTS_PADDING:  # see test_padding_is_no_part_of_the_share
        assert_same(seen[..., oracle.columns], oracle.answer(f"logits, padded {side}"))


@torch.no_grad()
def test_padding_is_no_part_of_the_share(made: Any) -> None:
    """C is a share of the tokens. transformers' is one of tokens and padding: so as many tokens as there are without
    padding give its numbers, and padding changes none of ours."""
    oracle = made("nllb_moe/limited by tokens, prioritised, divided before")
    source, target = ROW
    for side in ("left", "right"):
        wide = torch.nn.functional.pad(source, (9, 0) if side == "left" else (0, 9), value=pad_id(oracle))
        seen = oracle.ours(wide, target, wide != pad_id(oracle))
        assert_same(seen[..., oracle.columns], oracle.answer("logits, one row"))


@torch.no_grad()
@pytest.mark.parametrize("how", CHUNKS)
def test_the_cache_gives_what_theirs_gives(oracle: Any, how: str) -> None:
    """Chunk by chunk: a capacity is that of the tokens of one pass, there as here."""
    model, (source, target) = oracle.ours, PARTS
    cache = KeyValueCache(model.config, batch_size=3, max_length=13)
    model.read(source, cache=cache)
    parts = target.split(CHUNKS[how], dim=1)
    seen = torch.cat([model.logits(model.hidden(part, cache=cache)) for part in parts], dim=1)[..., oracle.columns]
    assert_same(seen, oracle.answer(f"logits, {how}"))
    if not any(_evaluation_capacities(model)):
        assert_same(seen, oracle.answer("logits, whole"))


@torch.no_grad()
def test_they_load_what_we_save(live: Any, tmp_path: Path) -> None:
    save(live.ours, tmp_path / "ours")
    if live.case in NOT_LOADED_BY_THEM:
        return
    theirs = their_model(live.case, tmp_path / "ours")
    assert_same(their_logits(theirs, *PAIR), live.answer("logits"))
    assert theirs.config.eos_token_id == live.model.config.eos_token_id
    assert theirs.generation_config.decoder_start_token_id == read_config(live.folder).decoder_start_token_id


@torch.no_grad()
def test_they_load_a_model_born_here(live: Any, tmp_path: Path) -> None:
    model = build(read_config(live.folder), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(11)
    for spec, tensor in zip(model.config.tensors(), model.state_dict().values(), strict=True):
        tensor.normal_(float(spec.role == "norm"), 0.2 * spec.gain, generator=generator)
    save(model, tmp_path / "ours", max_shard_bytes=20_000)
    if live.case not in NOT_LOADED_BY_THEM:
        assert_same(model(*PAIR), their_logits(their_model(live.case, tmp_path / "ours"), *PAIR))


def test_they_write_the_checkpoint_that_we_read(live: Any, tmp_path: Path) -> None:
    live.model.save_pretrained(tmp_path)
    theirs, drawn = (load_file(folder / "model.safetensors") for folder in (tmp_path, live.folder))
    assert theirs.keys() == drawn.keys()
    assert all(torch.equal(theirs[name].view(torch.uint8), drawn[name].view(torch.uint8)) for name in drawn)


def test_a_round_trip_keeps_every_byte(oracle: Any, tmp_path: Path) -> None:
    save(oracle.ours, tmp_path / "ours")
    assert_same_bytes(tmp_path / "ours", oracle.folder)
    assert read_config(tmp_path / "ours") == read_config(oracle.folder)


def test_counts_are_the_built_models(oracle: Any) -> None:
    config = read_config(oracle.folder)
    model = build(config, device="meta")
    described = {spec.name: spec.shape for spec in config.tensors()}
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == described
    assert config.total == sum(parameter.numel() for parameter in model.parameters()) == golden(oracle.case).num_learned


def test_counts_are_theirs_now(live: Any) -> None:
    assert read_config(live.folder).total == num_learned(live.model)


def test_the_family_describes_itself_both_ways(oracle: Any) -> None:
    config = read_config(oracle.folder)
    assert families.from_hf(families.to_hf(config)) == config
    assert type(config).from_dict(config.to_dict()) == config
    check_weight_map(config.tensors(), families.family(config.family).weight_map(config))


def test_every_slope_is_theirs(oracle: Any, tmp_path: Path) -> None:
    model, (source, target) = ours(oracle.folder), SLOPING
    loss_of(model(source, target), target).backward()
    put_gradients_in(model)
    save(model, tmp_path)
    assert_same_gradients(tmp_path, oracle)


def test_every_gradient_is_theirs(live: Any, tmp_path: Path) -> None:
    save_their_gradients(live.model, tmp_path)
    (tmp_path / "config.json").write_bytes((live.folder / "config.json").read_bytes())
    theirs, model, (source, target) = ours(tmp_path), ours(live.folder), SLOPING
    loss_of(model(source, target), target).backward()
    put_gradients_in(model)
    assert_same_slopes(*(dict(each.named_parameters()) for each in (model, theirs)))


@torch.no_grad()
def test_every_layer_chooses_and_weighs_the_same_experts(oracle: Any) -> None:
    tape, model = RoutingTape(), oracle.ours
    model(*CHOOSING, tape=tape)
    assert len(tape.decisions) == len(model.config.moe_layers)
    seen = []
    for _, decision in sorted(tape.decisions.items()):
        rows = decision.rows
        weights_TE = torch.zeros(rows.num_tokens, len(rows.expert_offsets) - 1)
        seen.append(weights_TE.index_put((rows.token_ids_R, rows.expert_ids_R), rows.weights_R))
    seen_TE, expected_TE = torch.cat(seen), oracle.answer("weights")
    assert torch.equal(seen_TE > 0, expected_TE > 0)
    assert (seen_TE - expected_TE).abs().max() <= 1e-5


@torch.no_grad()
def test_greedy_targets_are_theirs(oracle: Any) -> None:
    model = oracle.ours
    source, mask = sources(oracle.case, pad_id(oracle))
    texts = [row[kept].tolist() for row, kept in zip(source, mask.bool(), strict=True)]
    written = generate(model, texts, 12, target_prefix=prefix(oracle.case))
    assert model.config.tie_word_embeddings or len({token for row in written for token in row}) > 2
    for row, expected in zip(written, oracle.answer("greedy").tolist(), strict=True):
        assert row == expected[: len(row)]
        assert len(row) == 12 or row[-1] in model.config.eos_token_ids


def _evaluation_capacities(model: EncoderDecoder) -> list[CapacityConfig | None]:
    blocks = (layer.feed_forward for layer in model.config.layers)
    return [block.evaluation_capacity for block in blocks if isinstance(block, MoeConfig)]


@torch.no_grad()
def test_their_nllb_still_has_two_experts_at_work(made: Any) -> None:
    """transformers 5.23: the first choice's weight goes to expert 1, the second's to expert 0, whoever was chosen.

    Should this fail, transformers has been put right: then `experts_as_chosen` may go.
    """
    model = loaded(AutoModelForSeq2SeqLM, made("nllb_moe/as released").folder)
    block = next(each for each in model.modules() if type(each).__name__ == "NllbMoeSparseMLP")
    x_TD = torch.randn(9, 48, generator=torch.Generator().manual_seed(2))
    first_TE, weights_TE, _ = block.router(x_TD)
    first_T1, all_T1 = (first_TE * weights_TE).sum(1, keepdim=True), weights_TE.sum(1, keepdim=True)
    expected = first_T1 * block.experts["expert_1"](x_TD) + (all_T1 - first_T1) * block.experts["expert_0"](x_TD)
    expected = expected * (1 - block.experts.moe_token_dropout)
    assert torch.allclose(block(x_TD[None])[0], expected, atol=1e-5)
