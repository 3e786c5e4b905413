import numpy as np
import pytest
import torch

from moesaic import hub
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import CheckpointError, DataError, TraceError
from moesaic.models.build import decoder_only
from moesaic.models.decoder import Decoder, route
from moesaic.telemetry.inspection import routed
from moesaic.telemetry.inspection.routed import open_routed, record
from moesaic.telemetry.inspection.windows import Window, Windows, file_windows
from moesaic.trace import Trace
from tests.cli.conftest import TEXT, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model") / "moe"
    tokenizer = Tokenizer.train([TEXT], vocab_size=300)
    hub.save(Decoder(tiny_config("mixtral", tokenizer.vocab_size)).initialize(seed=1), place, tokenizer=tokenizer)
    return place


def windows() -> Windows:
    random = np.random.default_rng(0)
    sizes = (17, 5, 40, 1)
    return Windows(("a", "b"), tuple(Window(random.integers(0, 290, size), at % 2) for at, size in enumerate(sizes)))


@pytest.mark.parametrize("engine", [True, False])
def test_a_window_goes_where_the_decoder_sends_it(folder, tmp_path, monkeypatch, engine):
    monkeypatch.setattr(routed, "STEP_TOKENS", 24)
    if not engine:
        monkeypatch.setattr(routed.backend, "name", "reference")
    model = open_routed(str(folder))
    assert type(model).__name__ == ("_EngineRouted" if engine else "_DecoderRouted")
    text = windows()
    assert sum(record(model, text, tmp_path / "t.npz")) == 63
    trace, plain = Trace.open(tmp_path / "t.npz"), decoder_only(hub.load(folder), "a test")
    assert len(trace) == 4
    for window, forward in zip(text.windows, trace, strict=True):
        assert forward.token_ids_T is not None and forward.token_ids_T.tolist() == window.token_ids_T.tolist()
        assert set(forward.domain_ids_T.tolist()) == {window.domain}  # type: ignore[union-attr]
        for layer, rows in route(plain, torch.from_numpy(window.token_ids_T)[None]).items():
            expert_ids, weights = rows.as_topk()
            assert forward.rows[layer].expert_ids_R.reshape(-1, 2).tolist() == expert_ids.tolist()
            assert forward.rows[layer].weights_R.reshape(-1, 2) == pytest.approx(weights.detach().numpy(), abs=1e-5)


def test_what_cannot_be_routed_is_refused(folder, tmp_path):
    hub.save(Decoder(tiny_config("llama", 300)).initialize(), tmp_path / "dense")
    with pytest.raises(TraceError, match="no layers that route; take one with experts"):
        open_routed(str(tmp_path / "dense"))
    beyond = Windows((), (Window(np.array([3, 9999]), 0),))
    with pytest.raises(DataError, match="it was made with another tokenizer"):
        list(record(open_routed(str(folder)), beyond, tmp_path / "t.npz"))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "weights.safetensors").touch()
    (tmp_path / "own" / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="give the run's model folder"):
        open_routed(str(tmp_path / "own"))


def test_a_file_is_read_all_over_and_no_further_than_asked(folder, tmp_path):
    tokenizer = Tokenizer.load(folder)
    path = tmp_path / "long.txt"
    path.write_text("".join(f"line {number}\n" for number in range(5000)))
    found = file_windows(path, tokenizer, length=16, max_tokens=64)
    assert (found.domains, found.num_tokens) == (("long",), 64)
    starts = [tokenizer.decode(window.token_ids_T.tolist()) for window in found.windows]
    assert len(set(starts)) == 4 and "line 0\n" in starts[0] and "line 9\n" not in starts[1]
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="holds no text"):
        file_windows(tmp_path / "empty.txt", tokenizer, 16, 64)
    (tmp_path / "picture.png").write_bytes(b"png")
    with pytest.raises(DataError, match="is no text"):
        file_windows(tmp_path / "picture.png", tokenizer, 16, 64)
