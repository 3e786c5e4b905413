import numpy as np
import pytest

from moesaic.errors import ConfigError
from moesaic.parallel import ALONE
from moesaic.train.micro_batches import IGNORED, Share, shares_of, tensors_of
from tests.train.step_helpers import batch


def padded(num_padding):
    """4 rows of 16, the first `num_padding` tokens of the first padding."""
    found = batch(0)
    found.document_ids_BS[0, :num_padding] = -1
    return found


class Two:
    """Two ranks, of which the other has these sizes."""

    rank, size = 0, 2

    def __init__(self, others):
        self.others = others

    def gather(self, item):
        return [item, self.others]

    def sum_(self, tensor):
        raise AssertionError


def test_padding_is_masked_and_its_targets_do_not_count():
    tensors = tensors_of(padded(5), document_attention=True)
    assert tensors.mask_BS is not None and tensors.document_ids_BS is not None
    assert tensors.mask_BS.sum() == 59 and not tensors.mask_BS[0, :5].any()
    assert (tensors.targets_BS[0, :5] == IGNORED).all() and (tensors.targets_BS[0, 5:] >= 0).all()
    assert (padded(5).targets_BS >= 0).all()  # the batch's own memory stays


def test_without_padding_there_is_no_mask():
    tensors = tensors_of(batch(0), document_attention=False)
    assert tensors.mask_BS is None and tensors.document_ids_BS is None
    assert np.shares_memory(tensors.inputs_BS.numpy(), tensors.inputs_BS.numpy())


def test_shares_are_of_what_counts():
    parts = [batch(1), padded(16)]
    parts[0].targets_BS[:, 0] = IGNORED
    assert shares_of(parts, ALONE) == [Share(60 / 108, 64 / 112, 0, 112), Share(48 / 108, 48 / 112, 0, 112)]
    assert shares_of([padded(16)], Two([(52, 16, 0)])) == [Share(0.48, 0.75, 0, 64)]


def test_nothing_but_padding_is_no_share():
    empty = batch(0)
    empty.document_ids_BS[:] = -1
    assert shares_of([empty], ALONE) == [Share(0.0, 0.0, 0.0, 0)]


def test_ranks_with_other_numbers_of_micro_batches_are_refused():
    with pytest.raises(ConfigError, match="ranks with 1, 2 micro-batches; give every rank the same number"):
        shares_of([batch(0)], Two([(1, 1), (1, 1)]))
