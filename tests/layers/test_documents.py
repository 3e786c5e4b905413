import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic.layers.documents import has_several, number_documents, positions, row_numbers, segments


@st.composite
def packed(draw):
    """Document ids [B, S] that begin anew at random places, and a mask."""
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    begins = [[draw(st.booleans()) for _ in range(length)] for _ in range(batch)]
    mask = [[draw(st.booleans()) for _ in range(length)] for _ in range(batch)]
    return torch.tensor(begins).long().cumsum(1), torch.tensor(mask)


@given(packed())
def test_documents_are_numbered_over_the_batch_and_positions_count_their_tokens(drawn):
    ids_BS, mask_BS = drawn
    documents, expected = number_documents(ids_BS), torch.zeros_like(ids_BS)
    number, seen = -1, 0
    for row in range(ids_BS.shape[0]):
        for slot in range(ids_BS.shape[1]):
            if slot == 0 or ids_BS[row, slot] != ids_BS[row, slot - 1]:
                number, seen = number + 1, 0
            assert documents[row, slot] == number
            expected[row, slot] = seen
            seen += int(mask_BS[row, slot])
    assert torch.equal(positions(documents, mask_BS), expected)
    assert torch.equal(positions(documents, None), positions(documents, torch.ones_like(mask_BS)))
    assert has_several(documents) == any(len(set(row.tolist())) > 1 for row in ids_BS)


def test_an_id_that_comes_back_begins_another_document():
    assert number_documents(torch.tensor([[4, 4, 0, 4], [4, 4, 4, 4]])).tolist() == [[0, 0, 1, 2], [3, 3, 3, 3]]


def test_rows_of_one_document_each():
    ids = torch.zeros(3, 4, dtype=torch.int64)
    assert torch.equal(number_documents(ids), row_numbers(ids))
    assert not has_several(row_numbers(ids))
    assert not has_several(number_documents(ids[:, :0]))


@given(packed())
def test_bundles_hold_every_document_and_go_back(drawn):
    documents = number_documents(drawn[0])
    cut = segments(documents)
    x = torch.randn(*documents.shape, 3, 2).transpose(1, 2)
    numbers = documents[:, None, :, None].double().requires_grad_()
    bundles = cut.cut(numbers)
    found = [int(document) for bundle in bundles for document in bundle[:, 0, 0, 0]]
    assert sorted(found) == list(range(int(documents.max()) + 1))
    assert all((bundle == bundle[:, :, :1]).all() for bundle in bundles)
    assert torch.equal(cut.paste(cut.cut(x), x), x)
    assert torch.equal(cut.paste(bundles, numbers), numbers)
    (gradient,) = torch.autograd.grad((cut.paste(bundles, numbers) * numbers.detach()).sum(), numbers)
    assert torch.equal(gradient, numbers.detach())


def test_documents_of_like_length_share_a_bundle():
    lengths = [100, 110, 280, 3, 20, 260]
    documents = torch.repeat_interleave(torch.arange(6), torch.tensor(lengths))[None]
    assert segments(documents).shapes == [(2, 20), (2, 110), (2, 280)]
