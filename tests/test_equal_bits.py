"""The study of rounding in benchmarks/: tokens are told apart rightly, and errors are those of the right expert."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic import Engine
from moesaic.errors import ConfigError
from moesaic.evaluate.perplexity import held_out_loss
from moesaic.models.decoder import Decoder
from tests.benchmark_programs import imported
from tests.tiny import tiny_config
from tests.train.tiny_run import packed_text

MODULES = ("token_losses", "expert_errors", "ggml_rounding", "rounding_loss", "rounded_model", "equal_bits")
PACKED = packed_text()


@pytest.fixture(scope="module")
def programs() -> Iterator[Any]:
    with imported(MODULES) as found:
        yield found


@pytest.fixture
def model() -> Decoder:
    return Decoder(tiny_config(windows=(None, None, None))).initialize(0).eval()


def exact_of(model: Decoder) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def test_losses_are_those_of_evaluation_and_of_the_engine(programs: Any, model: Decoder) -> None:
    batches = programs.token_losses.held_out(PACKED, 16, 10_000)
    assert not all(batch.mask_BS.all() for batch in batches)  # the last window of a domain is shorter
    losses = programs.token_losses.model_losses(model, batches)
    whole = held_out_loss(model, PACKED, sequence_length=16, document_attention=True).bits_per_byte
    assert losses.bits_per_byte == pytest.approx(whole)  # both domains have equally many bytes
    assert losses.perplexity == pytest.approx(2**whole)  # a byte a token
    engine = programs.token_losses.engine_losses(Engine(model), batches)
    torch.testing.assert_close(engine.nats_N, losses.nats_N, rtol=1e-4, atol=1e-4)
    assert torch.equal(engine.window_N, losses.window_N)


def test_the_error_of_a_difference_is_that_of_its_windows(programs: Any) -> None:
    windows = torch.tensor([0, 0, 1, 1])
    before = programs.token_losses.Losses(torch.zeros(4, dtype=torch.float64), windows, 4)
    after = before._replace(nats_N=torch.tensor([1.0, 0, 3, 0], dtype=torch.float64))
    more = after.more_than(before)
    assert more.mean * math.log(2) == pytest.approx(1.0)
    assert more.error * math.log(2) == pytest.approx(0.5)  # of 1 and 3: deviation sqrt(2), over sqrt(2), 2 tokens each


def test_only_the_changed_expert_has_errors(programs: Any, model: Decoder) -> None:
    exact, errors = exact_of(model), programs.expert_errors
    served = errors.serve(model, programs.token_losses.held_out(PACKED, 16, 128))
    loads_LE = errors.loads(served)
    assert loads_LE.shape == (2, 5) and loads_LE.sum(-1).tolist() == [2 * 2 * 128] * 2
    name, layer = list(errors.expert_layers(model).items())[1]
    busiest = int(loads_LE[1].argmax())
    with torch.no_grad():
        layer.down[busiest] *= 1.1
    found = errors.expert_errors(model, exact, served)
    assert found.outputs_LE[1, busiest].item() == pytest.approx(0.1, rel=1e-3)
    share = (
        exact[f"{name}.down"][busiest].norm()
        / torch.cat([exact[f"{name}.{key}"][busiest].flatten() for key in ("gate_up", "down")]).norm()
    ).item()
    assert found.weights_LE[1, busiest].item() == pytest.approx(0.1 * share, rel=1e-3)
    for errors_LE in found:
        errors_LE[1, busiest] = 0
        assert errors_LE.nan_to_num().abs().max() == 0


def test_rare_choices_are_counted_token_by_token(programs: Any, model: Decoder) -> None:
    rare_LE, busy_LE = programs.expert_errors.quarters(torch.tensor([[5.0, 1, 3, 2, 4], [1, 1, 1, 9, 1]]))
    assert rare_LE.tolist() == [[False, True, False, False, False], [True, False, False, False, False]]
    assert busy_LE.long().argmax(-1).tolist() == [0, 3] and busy_LE.sum() == 2
    batches = programs.token_losses.held_out(PACKED, 16, 10_000)
    count = programs.expert_errors.rare_choices
    everything = count(model, batches, torch.ones(2, 5, dtype=torch.bool))
    assert everything.tolist() == [2 * 2] * sum(batch.mask_BS.sum() for batch in batches)
    assert torch.equal(count(model, batches, rare_LE) + count(model, batches, ~rare_LE), everything)


def test_all_matrices_are_rounded_and_nothing_else(programs: Any, model: Decoder) -> None:
    exact, rounded = exact_of(model), programs.rounded_model
    halved = rounded.Format("half", 1.0, lambda weight: weight / 2)
    assert rounded.round_all(model, exact, halved) == pytest.approx(0.5)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, exact[name])}
    assert changed == set(rounded.matrices(model))
    assert all(exact[name].dim() >= 2 for name in changed)
    assert not any("router" in name or "embedding" in name or name == "head.weight" for name in changed)
    assert sum("experts" in name for name in changed) == 2 * 2


def test_what_is_no_library_is_refused(programs: Any) -> None:
    with pytest.raises(ConfigError, match="is no libggml-base"):
        programs.ggml_rounding.Ggml(Path(__file__))
    assert [programs.ggml_rounding.bits_per_weight(name) for name in ("Q8_0", "Q4_0", "Q4_K")] == [8.5, 4.5, 4.5]


def test_tables_have_a_cell_for_every_column(programs: Any, model: Decoder) -> None:
    program = programs.equal_bits
    batches = programs.token_losses.held_out(PACKED, 16, 64)
    before = programs.token_losses.model_losses(model, batches)
    routing = program.routing_of(model, PACKED, batches, 16)
    exact = exact_of(model)
    format = programs.rounded_model.Format("half", 1.0, lambda weight: weight / 2)
    programs.rounded_model.round_all(model, exact, format)
    after = programs.token_losses.model_losses(model, batches)
    row = program.loss_row("half", 1.0, after, before, before) | {"weight_error": 0.5}
    row["experts"] = program.expert_row(model, exact, routing, after.nats_N - before.nats_N)
    assert len(program.cells(row)) == len(program.LOSS_COLUMNS)
    assert len(program.expert_cells(row)) == len(program.EXPERT_COLUMNS)
    assert row["experts"]["weights_LE"]["rare"] == pytest.approx(0.5)
    assert row["experts"]["no"]["share"] + row["experts"]["any"]["share"] == pytest.approx(1)
