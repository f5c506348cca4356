"""Edits change the parts of a tensor to what they are of the whole that was changed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from axolotl_layersel.engines import edits


def edit_by_hand(whole: torch.Tensor, rows: dict, columns: torch.Tensor, factors: torch.Tensor, change) -> torch.Tensor:
    """Return what a matrix becomes by all kinds of edits, one after the other."""
    whole = whole.clone()
    for row, value in rows.items():
        whole[row] = value
    whole[:, columns] = 0.5
    return whole * factors + change


@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    ranks=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_a_tensor_is_changed_part_by_part_as_it_is_as_a_whole(shape, ranks, dtype, data):
    height, width = shape
    torch.manual_seed(data.draw(st.integers(0, 99)))
    whole, factors = torch.randn(shape, dtype=dtype), torch.randint(-2, 3, (width,)).to(dtype)
    change = torch.randn(shape, dtype=dtype)
    rows = {row: data.draw(st.sampled_from([0.0, torch.randn(width)])) for row in range(0, height, 2)}
    columns = torch.tensor(data.draw(st.lists(st.integers(0, width - 1), unique=True)), dtype=torch.long)
    length = -(-height * width // ranks)
    padded = torch.nn.functional.pad(whole.flatten(), (0, ranks * length - height * width), value=7.0)
    for rank in range(ranks):
        part = padded[rank * length : (rank + 1) * length]
        for edit in (
            edits.write_rows(rows),
            edits.fill(columns, 1, 0.5),
            edits.multiply_columns(factors),
            edits.add(change),
            edits.multiply(1.5),
        ):
            edit(part, rank * length, torch.Size(shape))
    expected = edit_by_hand(whole, rows, columns, factors, change) * 1.5
    assert torch.equal(padded[: height * width].view(shape), expected)
    assert (padded[height * width :] == 7).all()


def test_codes_are_translated_but_not_those_of_padding():
    codes = torch.arange(256, dtype=torch.uint8)
    part = torch.tensor([0, 3, 255, 7], dtype=torch.uint8)
    edits.translate(codes.flip(0))(part, 2, torch.Size((1, 5)))
    assert part.tolist() == [255, 252, 0, 7]


@pytest.mark.parametrize("dim", [0, 1])
def test_lines_are_filled_and_all_else_stays_bit_for_bit(dim):
    whole = torch.tensor([[float("nan"), -0.0, 1.0], [2.0, float("inf"), 3.0]])
    expected = whole.clone().index_fill_(dim, torch.tensor([1]), 9.0)
    edits.fill(torch.tensor([1]), dim, 9.0)(whole.view(-1), 0, whole.shape)
    assert torch.equal(whole.view(torch.int32), expected.view(torch.int32))


def test_a_tensor_whose_elements_lie_in_another_order_is_changed_where_it_lies():
    whole = torch.arange(6.0).view(2, 3).T
    address, expected = whole.data_ptr(), whole.clone()
    expected[:, 1] = 9
    edits.edit_data(whole, 0, whole.shape, edits.fill(torch.tensor([1]), 1, 9.0))
    assert torch.equal(whole, expected)
    assert whole.data_ptr() == address
