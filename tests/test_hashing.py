"""Hashes of tensors and of multisets of points."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hessops import hashing
from hessops.hashing import SumOfPoints, hash_of_entries

PIECE = hashing._PIECE


def sum_of(*batches: tuple[Tensor, ...]) -> int:
    points = SumOfPoints()
    for batch in batches:
        points.add(batch, max(len(t) for t in batch if t.ndim))
    return int(points.taken())


def some_words(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randint(0, 100, shape).to(dtype)


DTYPES = [torch.uint8, torch.int16, torch.bfloat16, torch.float32, torch.int64, torch.complex128]
WIDTHS = [0, 1, 7, PIECE, 2 * PIECE + 3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("first", [0, PIECE - 2])
def test_sums_are_the_same_by_either_route(dtype: torch.dtype, width: int, first: int) -> None:
    words = hashing._bits_of(some_words(dtype, 3, width), longest=torch.int32)
    assert torch.equal(hashing._weighed(words, first), hashing._weighed_here(words, first))


def test_sums_are_those_of_words_and_weights() -> None:
    words, first = torch.randint(-(2**31), 2**31, (4, PIECE + 5), dtype=torch.int32), 3
    weights = hashing._weights(PIECE, torch.device("cpu")).tolist()
    factors = [hashing._weight_of_block(0), hashing._weight_of_block(1)]
    columns = range(first, first + words.shape[1])
    of_columns = [weights[c % PIECE] * factors[c // PIECE] for c in columns]
    expected = [
        sum(word * weight for word, weight in zip(row, of_columns, strict=True)) % 2**64
        for row in words.tolist()
    ]
    assert [s % 2**64 for s in hashing._weighed_here(words, first).tolist()] == expected
    assert all(weight % 2 for weight in of_columns)


@pytest.mark.parametrize("column", [0, PIECE - 1, PIECE, 2 * PIECE + 2])
def test_a_change_of_the_last_bit_of_a_wide_point_is_seen(column: int) -> None:
    x = some_words(torch.float32, 2, 2 * PIECE + 3)
    changed = x.clone()
    changed[1, column] += 2**-17
    assert sum_of((x,)) != sum_of((changed,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_entries_of_a_wide_point_that_are_exchanged_are_seen(dtype: torch.dtype) -> None:
    x = torch.arange(2.0 * PIECE, dtype=dtype).unsqueeze(0)
    exchanged = x.clone()
    exchanged[0, [1, PIECE]] = x[0, [PIECE, 1]]
    assert sum_of((x,)) != sum_of((exchanged,))
    assert not torch.equal(hash_of_entries(x), hash_of_entries(exchanged))


def test_points_that_exchange_an_entry_of_another_tensor_are_seen() -> None:
    x, y = torch.randn(4, 3), torch.arange(4)
    assert sum_of((x, y)) != sum_of((x, y.roll(1)))


def test_tensors_side_by_side_that_exchange_an_entry_are_seen() -> None:
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    assert sum_of((a, b)) != sum_of((b, a))
    assert sum_of((a, b)) != sum_of((torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 4.0]])))


@pytest.mark.parametrize("sizes", [[1] * 9, [4, 5], [8, 1]], ids=str)
def test_order_and_grouping_do_not_matter(
    sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, scale = torch.randn(9, 5), torch.tensor(2.0)
    whole = sum_of((x, scale))
    monkeypatch.setattr(hashing, "_MIXED_AT_ONCE", 3)
    parts = x[torch.randperm(9)].split(sizes)
    assert sum_of(*[(part, scale) for part in parts]) == whole


def test_what_a_tensor_holds_afterwards_does_not_count() -> None:
    x = torch.randn(3, 4)
    points = SumOfPoints()
    points.add([x], 3)
    expected = sum_of((x,))
    x.zero_()
    assert int(points.taken()) == expected


def test_a_sum_begins_again_when_it_is_taken() -> None:
    points = SumOfPoints()
    points.add([torch.ones(2, 3)], 2)
    points.taken()
    assert int(points.taken()) == 0


@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided", "offset"])
def test_the_layout_in_memory_does_not_count(layout: str) -> None:
    x = {
        "transposed": torch.randn(4, 3).T,
        "expanded": torch.randn(1, 4).expand(3, 4),
        "strided": torch.randn(6, 8)[::2, ::2],
        "offset": torch.randn(13)[1:].reshape(3, 4),
    }[layout]
    assert sum_of((x,)) == sum_of((x.contiguous().clone(),))


def test_points_of_a_transform_are_read_behind_it() -> None:
    seen = []

    def summed(x: Tensor) -> Tensor:
        seen.append(sum_of((x,)))
        return x.sum()

    x = torch.randn(3, 4)
    torch.func.grad(summed)(x)
    assert seen == [sum_of((x,))]
