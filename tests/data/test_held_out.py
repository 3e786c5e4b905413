import numpy as np
import pytest

from moesaic.data.held_out import held_out_windows
from moesaic.data.packed import Packed


@pytest.mark.parametrize("sequence_length", [1, 7, 64, 100_000])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_held_out_token_is_scored_once(packed: Packed, sequence_length: int, batch_size: int) -> None:
    for domain in packed.domains:
        batches = list(held_out_windows(packed, sequence_length, batch_size=batch_size)[domain.name])
        targets = np.concatenate([batch.targets_BS[batch.mask_BS] for batch in batches])
        inputs = np.concatenate([batch.inputs_BS[batch.mask_BS] for batch in batches])
        assert np.array_equal(targets, domain.held_out[1:])
        assert np.array_equal(inputs, domain.held_out[:-1])
        assert sum(batch.num_bytes for batch in batches) == packed.byte_lengths[domain.held_out].sum()
        assert all(batch.inputs_BS.shape[1] == sequence_length for batch in batches)
        assert all(1 <= len(batch.inputs_BS) <= batch_size for batch in batches)


@pytest.mark.parametrize("sequence_length", [1, 7, 64, 1000])
def test_a_new_document_begins_at_each_eos_that_is_scored(packed: Packed, sequence_length: int) -> None:
    for batches in held_out_windows(packed, sequence_length, batch_size=2).values():
        for batch in batches:
            begins = (batch.inputs_BS == packed.eos_id) & batch.mask_BS
            begins[:, 0] = False
            assert np.array_equal(batch.document_ids_BS, begins.cumsum(axis=1))
            assert batch.document_ids_BS.dtype == np.int64


def test_a_maximum_takes_windows_from_all_over_the_held_out_text(packed: Packed) -> None:
    batches = list(held_out_windows(packed, 8, max_tokens_per_domain=40)["prose"])
    everything = list(held_out_windows(packed, 8)["prose"])
    assert len(batches) == 5
    assert not np.array_equal(batches[1].inputs_BS, everything[1].inputs_BS)
    for batch in batches:
        assert batch.num_bytes == packed.byte_lengths[batch.targets_BS[batch.mask_BS]].sum()
    assert len(list(held_out_windows(packed, 8, max_tokens_per_domain=1)["prose"])) == 1
