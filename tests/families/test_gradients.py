"""The gradient of a loss at every parameter is the one that transformers' model has.

Gradients go the way of weights, both ones: under the names of files, by the family's weight map. They are compared by
their largest slope and along drawn directions (see golden.slopes), and in the slow tests whole.
"""

from pathlib import Path
from typing import Any

from moesaic.hub import load, save
from tests.families.decoder_oracle import gradient_ids, loss_of, put_gradients_in, save_their_gradients
from tests.families.same import assert_same_gradients, assert_same_slopes


def our_gradients(folder: Path) -> Any:
    """Our model of a folder, its parameters made their gradients."""
    model, ids_BS = load(folder), gradient_ids()
    loss_of(model(ids_BS), ids_BS).backward()
    put_gradients_in(model)
    return model


def test_every_slope_is_theirs(oracle: Any, tmp_path: Path) -> None:
    save(our_gradients(oracle.folder), tmp_path)
    assert_same_gradients(tmp_path, oracle)


def test_every_gradient_is_theirs(live: Any, tmp_path: Path) -> None:
    save_their_gradients(live.model, tmp_path)
    models = our_gradients(live.folder), load(tmp_path)
    assert_same_slopes(*(dict(model.named_parameters()) for model in models))
