"""What a tape wrote, another tape dictates, and the model computes the same bits."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesaic.config import ModelConfig, MoeConfig
from moesaic.config.capacity import CapacityConfig
from moesaic.config.router import ROUTER_KINDS, HashSettings, NullSettings, TopPSettings
from moesaic.engine.generate import generate
from moesaic.errors import ConfigError, TraceError
from moesaic.layers.moe import capacity_applied
from moesaic.models.decoder import Decoder
from moesaic.routing import RoutingDecision, RoutingTape, Rows
from moesaic.routing.taping import Both, ReplayTape, TraceTape, sorted_rows, token_rows
from moesaic.telemetry.recorder import LoadRecorder
from moesaic.trace import Fingerprint, Trace, TraceWriter
from moesaic.train.recompute import recompute_layers
from tests.tiny import tiny_config

PAGE = Path(__file__).parents[2] / "docs" / "trace.md"
SETTINGS = {
    "hash": HashSettings(vocab_size=61),
    "null_topk": NullSettings(num_null_experts=4),
    "top_p": TopPSettings(),
}
SIZES = {"switch": 1, "base": 1, "dense": 5}
THREE_LAYERS = (None, 5, None)


def model_with(
    router: str = "softmax_topk", *, capacity: CapacityConfig | None = None, shared: bool = False
) -> Decoder:
    """Layers 0 and 1 route, layer 2 does not."""
    config = tiny_config(windows=THREE_LAYERS, shared=shared)
    layers = tuple(
        replace(layer, feed_forward=_with_router(layer.feed_forward, router, capacity))
        if isinstance(layer.feed_forward, MoeConfig)
        else layer
        for layer in config.layers
    )
    model = Decoder(replace(config, decoder=replace(config.decoder, layers=layers))).initialize(seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model.eval()


def _with_router(moe: MoeConfig, router: str, capacity: CapacityConfig | None) -> MoeConfig:
    top_k, settings = SIZES.get(router, 2), SETTINGS.get(router)
    routing = replace(moe.router, name=router, top_k=top_k, settings=settings, renormalize=None)
    return replace(moe, router=routing, capacity=capacity)


def batch(seed: int = 0, rows: int = 3, length: int = 7) -> Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def record(model: Decoder, path: Path, token_ids_BS: Tensor, mask_BS: Tensor | None = None, **facts) -> Tensor:
    """The logits of a forward that was recorded."""
    with TraceWriter(path, Fingerprint.of(model.config)) as writer, torch.no_grad():
        return model(token_ids_BS, mask_BS, tape=TraceTape(writer), **facts)


def derail(model: Decoder) -> None:
    """Turn every router around, so that only who is told takes the recorded way."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".router." in name:
                parameter.neg_()
        for name, buffer in model.named_buffers():
            if name.endswith("table"):
                buffer.copy_(4 - buffer)


@pytest.mark.parametrize(
    ("router", "masked"), [*((router, True) for router in ROUTER_KINDS), ("softmax_topk", False), ("relu", False)]
)
def test_replayed_logits_are_the_recorded_bits(tmp_path, router, masked):
    model, token_ids = model_with(router, shared=True), batch()
    mask = torch.ones_like(token_ids, dtype=torch.bool) if masked else None
    if mask is not None:
        mask[0, 4:], mask[2, :3] = False, False
    with torch.no_grad():
        plain = model(token_ids, mask)
    recorded = record(model, tmp_path / "trace.npz", token_ids, mask)
    trace = Trace.open(tmp_path / "trace.npz")
    derail(model)
    with torch.no_grad():
        elsewhere = model(token_ids, mask)
        replayed = model(token_ids, mask, tape=ReplayTape(trace, model.config))
    assert torch.equal(plain, recorded)
    assert torch.equal(replayed, recorded)
    assert router == "dense" or not torch.equal(elsewhere, recorded)


def test_documents_and_micro_batches(tmp_path):
    model = model_with()
    batches = [batch(seed, rows=2 + seed, length=5 + seed) for seed in range(3)]
    documents = [(torch.arange(ids.shape[1]) // 3).expand_as(ids) for ids in batches]
    with TraceWriter(tmp_path / "trace.npz", Fingerprint.of(model.config)) as writer, torch.no_grad():
        tape = TraceTape(writer)
        wanted = [model(ids, tape=tape, document_ids_BS=ds) for ids, ds in zip(batches, documents, strict=True)]
    trace = Trace.open(tmp_path / "trace.npz")
    derail(model)
    with torch.no_grad():
        tape = ReplayTape(trace, model.config)
        found = [model(ids, tape=tape, document_ids_BS=ds) for ids, ds in zip(batches, documents, strict=True)]
        last = model(batches[2], tape=ReplayTape(trace, model.config, start=2), document_ids_BS=documents[2])
    for logits, replayed in zip([*wanted, wanted[2]], [*found, last], strict=True):
        assert torch.equal(logits, replayed)
    for forward, ids, ds in zip(trace, batches, documents, strict=True):
        assert forward.token_ids_T is not None and forward.document_ids_T is not None
        assert forward.token_ids_T.tolist() == ids.flatten().tolist()
        whose = [(row, d) for row, line in enumerate(ds.tolist()) for d in line]
        assert [sorted(set(whose)).index(pair) for pair in whose] == forward.document_ids_T.tolist()


def test_what_is_recorded_is_what_was_routed(tmp_path):
    model, token_ids = model_with("top_p"), batch()
    tape, recorder = RoutingTape(), LoadRecorder.for_model(model.config, num_domains=2)
    recorder.set_domains(1)
    with (
        TraceWriter(tmp_path / "trace.npz", Fingerprint.of(model.config), domains=("a", "b")) as writer,
        torch.no_grad(),
    ):
        traced = TraceTape(writer)
        traced.set_domains((token_ids > 30).long())
        model(token_ids, tape=Both(tape, recorder, traced))
    trace, load = Trace.open(tmp_path / "trace.npz"), recorder.finish_step()
    forward = trace.forward(0)
    assert forward.domain_ids_T is not None
    assert forward.domain_ids_T.tolist() == (token_ids > 30).long().flatten().tolist()
    for layer, decision in tape.decisions.items():
        rows = decision.rows
        by_hand = sorted(zip(rows.token_ids_R.tolist(), rows.choice_R.tolist(), range(len(rows.choice_R)), strict=True))
        order = [row for _, _, row in by_hand]
        traced_rows = forward.rows[layer]
        assert traced_rows.token_ids_R.tolist() == [token for token, _, _ in by_hand]
        assert traced_rows.choices_R.tolist() == [choice for _, choice, _ in by_hand]
        assert traced_rows.expert_ids_R.tolist() == rows.expert_ids_R[order].tolist()
        assert traced_rows.weights_R.tolist() == rows.weights_R[order].tolist()
        assert trace.counts(layer).tolist() == load.layers[layer].counts_E.tolist()
    assert set(trace.rows(0).rows_of_tokens.tolist()) != {2}  # indeed ragged


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rows_of_any_shape(tmp_path, weight_on, dtype):
    """Dictated by hand: tokens with 0 to 5 experts, an expert with no token, choices with gaps."""
    model, token_ids = model_with().to(dtype), batch(rows=1, length=6)
    experts = torch.tensor([[4, -1, 1], [-1, -1, -1], [-1, 1, -1], [1, 4, 0], [4, -1, -1], [0, 1, 4]])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.rand(6, 3, generator=torch.Generator().manual_seed(0), dtype=wide)
    rows = Rows.from_topk(experts, weights, 5, weight_on=weight_on, fixed_top_k=False)
    dictated = RoutingTape({0: rows, 1: rows})
    with TraceWriter(tmp_path / "trace.npz", Fingerprint.of(model.config)) as writer, torch.no_grad():
        wanted = model(token_ids, tape=Both(dictated, TraceTape(writer)))
        other = replace(rows, weight_on="input" if weight_on == "output" else "output")
        assert not torch.equal(model(token_ids, tape=RoutingTape({0: other, 1: other})), wanted)
        trace_tape = ReplayTape(_closed(writer), model.config)
        assert torch.equal(model(token_ids, tape=trace_tape), wanted)


def _closed(writer: TraceWriter) -> Trace:
    writer.close()
    return Trace.open(writer.path)


@pytest.mark.parametrize("overflow", ["residual", "next_best", "shared"])
def test_capacity_keeps_what_was_chosen_beside_what_was_computed(tmp_path, overflow):
    model = model_with(capacity=CapacityConfig(factor=0.5, overflow=overflow), shared=True)
    token_ids, tape = batch(), RoutingTape()
    with TraceWriter(tmp_path / "trace.npz", Fingerprint.of(model.config)) as writer, torch.no_grad():
        dropless = model(token_ids, tape=TraceTape(writer))
        with capacity_applied(model):
            limited = model(token_ids, tape=Both(tape, TraceTape(writer)))
    trace = Trace.open(tmp_path / "trace.npz")
    assert not torch.equal(dropless, limited)
    for layer, decision in tape.decisions.items():
        chosen, rows = trace.forward(1).chosen[layer], trace.forward(1).rows[layer]
        assert chosen.expert_ids_R.tolist() == decision.chosen.as_topk()[0].flatten().tolist()
        assert rows.num_rows == decision.rows.token_ids_R.numel()
        assert overflow == "next_best" or rows.num_rows < chosen.num_rows
        assert trace.forward(0).chosen[layer].equals(trace.forward(0).rows[layer])
    with torch.no_grad():
        replaying = ReplayTape(trace, model.config)
        assert torch.equal(model(token_ids, tape=replaying), dropless)
        with capacity_applied(model):
            if overflow == "shared":  # whose weight on the shared expert no row holds
                with pytest.raises(ConfigError, match="whose weights rows do not hold"):
                    model(token_ids, tape=replaying)
            else:
                assert torch.equal(model(token_ids, tape=replaying), limited)


def test_a_capacity_that_changed_nothing_leaves_no_second_rows(tmp_path):
    model = model_with(capacity=CapacityConfig(factor=9.0))
    with capacity_applied(model):
        record(model, tmp_path / "trace.npz", batch())
    assert Trace.open(tmp_path / "trace.npz").forward(0).chosen == {}


def test_generation_is_one_forward_for_the_prompt_and_one_for_each_token(tmp_path):
    model, prompts = model_with(), [[5, 6, 7, 8], [9, 10]]
    with TraceWriter(tmp_path / "trace.npz", Fingerprint.of(model.config)) as writer:
        written = generate(model, prompts, 6, tape=TraceTape(writer))
    assert written == generate(model, prompts, 6)
    trace = Trace.open(tmp_path / "trace.npz")
    assert [forward.num_tokens for forward in trace] == [8, 2, 2, 2, 2, 2]
    assert trace.token_facts["mask"].tolist() == [*[True] * 4, False, False, *[True] * 12]
    derail(model)
    assert generate(model, prompts, 6) != written
    heard = RoutingTape()
    assert generate(model, prompts, 6, tape=Both(ReplayTape(trace, model.config), heard)) == written
    with TraceWriter(tmp_path / "again.npz", Fingerprint.of(model.config)) as writer:
        generate(model, prompts, 6, tape=Both(ReplayTape(trace, model.config), TraceTape(writer)))
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "trace.npz").read_bytes()


def test_training_on_replayed_rows_with_and_without_recomputation(tmp_path):
    model, token_ids = model_with(), [batch(0), batch(1)]
    with TraceWriter(tmp_path / "trace.npz", Fingerprint.of(model.config)) as writer:
        tape = TraceTape(writer)
        for ids in token_ids:
            model.train()(ids, tape=tape)
    trace = Trace.open(tmp_path / "trace.npz")
    derail(model)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        tape = ReplayTape(trace, model.config)
        sum(model(ids, tape=tape).square().sum() for ids in token_ids).backward()  # pyright: ignore
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    with recompute_layers(model):
        again = gradients()
    assert {name for name, _ in model.named_parameters()} - plain.keys() == {
        "layers.0.feed_forward.router.weight",
        "layers.1.feed_forward.router.weight",
    }
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_recording_training_with_recomputation_hears_once(tmp_path):
    model = model_with().train()
    for path, context in ((tmp_path / "a.npz", False), (tmp_path / "b.npz", True)):
        with TraceWriter(path, Fingerprint.of(model.config)) as writer:
            recomputing = recompute_layers(model) if context else None
            model(batch(), tape=TraceTape(writer)).sum().backward()
            if recomputing:
                recomputing.remove()
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_half_a_forward_is_not_written(tmp_path):
    model = model_with()
    with TraceWriter(tmp_path / "trace.npz", Fingerprint.of(model.config)) as writer, torch.no_grad():
        tape = TraceTape(writer)
        decisions = RoutingTape()
        model(batch(), tape=decisions)
        tape.hear(0, decisions.decisions[0])  # and then the forward failed
        model(batch(), tape=tape)
    assert len(Trace.open(tmp_path / "trace.npz")) == 1


def test_layers_out_of_order_are_refused(tmp_path):
    model, heard = model_with(), RoutingTape()
    with torch.no_grad():
        model(batch(), tape=heard)
    writer = TraceWriter(tmp_path / "trace.npz", Fingerprint.of(model.config))
    with pytest.raises(TraceError, match="layer 1 routes where layer 0 should"):
        TraceTape(writer).hear(1, heard.decisions[1])
    writer.abandon()


def test_a_batch_that_was_not_recorded_is_refused(tmp_path):
    model, token_ids = model_with(), batch()
    mask = torch.ones_like(token_ids, dtype=torch.bool)
    mask[1, 5:] = False
    record(model, tmp_path / "trace.npz", token_ids, mask)
    trace = Trace.open(tmp_path / "trace.npz")
    changed, padding = token_ids.clone(), token_ids.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 61
    padding[1, 6] = (padding[1, 6] + 1) % 61
    with torch.no_grad():
        for ids, ms, seen in (
            (token_ids[:2], mask[:2], "layer 0 replays the rows of 21 tokens and this batch has 14"),
            (token_ids, None, "other padding than this batch, first at token 12"),
            (changed, mask, f"token 3 of forward 0 .* has id {token_ids[0, 3]} and this batch {changed[0, 3]}"),
        ):
            with pytest.raises(TraceError, match=seen):
                model(ids, ms, tape=ReplayTape(trace, model.config))
        tape = ReplayTape(trace, model.config)
        model(padding, mask, tape=tape)  # what stands where nothing is read does not matter
        with pytest.raises(TraceError, match="ends after 1 forwards"):
            model(token_ids, mask, tape=tape)
    with pytest.raises(TraceError, match=r"forward 1 of .* holds 1"):
        ReplayTape(trace, model.config, start=1)


def test_a_trace_of_another_model_is_refused(tmp_path):
    model = model_with()
    record(model, tmp_path / "trace.npz", batch())
    trace = Trace.open(tmp_path / "trace.npz")
    others: dict[str, ModelConfig] = {
        "layer 0 routing to 2 of 5 experts by softmax_topk, and here .* by sigmoid_topk": model_with(
            "sigmoid_topk"
        ).config,
        "2 layers that route, and here it is 1 layers": tiny_config(),
        "family qwen3_moe, and here it is family mixtral": replace(model.config, family="mixtral"),
    }
    for seen, config in others.items():
        with pytest.raises(TraceError, match=seen):
            ReplayTape(trace, config)
    dense = replace(model.config, decoder=replace(model.config.decoder, layers=model.config.layers[2:]))
    with pytest.raises(TraceError, match="no layers that route"):
        ReplayTape(trace, dense)


def test_decisions_made_elsewhere_need_no_token_ids(tmp_path):
    config = tiny_config(windows=(None,))
    rows = Rows.from_topk(torch.tensor([[4, 0], [1, 2]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]]), 5)
    scores = torch.zeros(2, 5)
    with TraceWriter(tmp_path / "trace.npz", Fingerprint.of(config)) as writer:
        TraceTape(writer).hear(0, RoutingDecision(rows, scores, scores))
    trace = Trace.open(tmp_path / "trace.npz")
    assert "token_ids" not in trace.token_facts
    tape = ReplayTape(trace, config)
    assert tape.replay[0].as_topk()[0].tolist() == [[4, 0], [1, 2]]
    tape.hear(0, RoutingDecision(tape.replay[0], scores, scores))


def test_rows_there_and_back():
    experts = torch.tensor([[3, 1], [1, 3], [0, 4], [2, 2]])
    weights = torch.rand(4, 2)
    for mask in (None, torch.tensor([True, False, True, True]), torch.zeros(4, dtype=torch.bool)):
        rows = Rows.from_topk(experts, weights, 6, mask_T=mask)
        back = sorted_rows(token_rows(rows), 6, 2)
        assert (back.top_k, back.num_tokens, back.weight_on) == (2, 4, "output")
        for name in ("token_ids_R", "expert_offsets", "weights_R", "choice_R"):
            assert torch.equal(getattr(back, name), getattr(rows, name)), name
    assert sorted_rows(token_rows(rows), 6, 3).top_k == 3  # no rows at all fit any K
    assert sorted_rows(token_rows(Rows.from_topk(experts, weights, 6)), 6, 3).top_k is None


def test_the_page_records_and_replays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = PAGE.read_text(encoding="utf-8").split("```python\n")[-1].split("```")[0]
    with torch.no_grad():
        exec(code, {"model": model_with(), "token_ids": batch(), "layer": 1})
