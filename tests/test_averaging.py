"""Averaging: weighted means of the values of batches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hessops import Averaging, BatchOperator, ChunkAveraging, HessianBatchOperation, PointAveraging
from hessops.errors import ArgumentError, ArgumentTypeError, DataError, HessopsError, ShapeError

SIZES = (4, 4, 1)


class Weighted(Averaging):
    """Any function of the number of points."""

    def __init__(self, value: float) -> None:
        self.value = value

    def weight(self, num_points: int) -> float:
        return self.value


class SquareRoot(Averaging):
    def weight(self, num_points: int) -> float:
        return math.sqrt(num_points)


WEIGHTS: dict[str, tuple[Averaging, list[float]]] = {
    "points": (PointAveraging(), [4.0, 4.0, 1.0]),
    "chunks": (ChunkAveraging(), [1.0, 1.0, 1.0]),
    "square root": (SquareRoot(), [2.0, 2.0, 1.0]),
}


def values(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 3, dtype=dtype) for _ in SIZES]


@pytest.mark.parametrize("name", WEIGHTS)
def test_reduce_is_the_weighted_mean(name: str) -> None:
    averaging, weights = WEIGHTS[name]
    expected = sum(w * v for w, v in zip(weights, values(), strict=True)) / sum(weights)
    result = averaging.reduce(zip(values(), SIZES, strict=True))
    torch.testing.assert_close(result, expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("split", [[9], [4, 4, 1], [3, 3, 3], [1] * 9, [8, 1]], ids=str)
def test_point_averaging_does_not_depend_on_the_split_into_batches(split: list[int]) -> None:
    torch.manual_seed(0)
    per_point = torch.randn(9, 3, dtype=torch.float64)
    pairs = [(part.mean(dim=0), len(part)) for part in per_point.split(split)]
    result = PointAveraging().reduce(pairs)
    torch.testing.assert_close(result, per_point.mean(dim=0), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("name", WEIGHTS)
def test_one_batch_is_its_own_mean(name: str) -> None:
    averaging, _ = WEIGHTS[name]
    value = values()[0]
    torch.testing.assert_close(averaging.reduce([(value, 5)]), value, rtol=1e-15, atol=0)


@pytest.mark.parametrize("name", WEIGHTS)
def test_order_of_the_batches_does_not_matter(name: str) -> None:
    averaging, _ = WEIGHTS[name]
    pairs = list(zip(values(), SIZES, strict=True))
    torch.testing.assert_close(
        averaging.reduce(pairs), averaging.reduce(pairs[::-1]), rtol=1e-14, atol=1e-15
    )


def test_the_values_are_left_as_they_were() -> None:
    pairs = list(zip(values(), SIZES, strict=True))
    PointAveraging().reduce(pairs)
    assert all(
        torch.equal(value, before) for (value, _), before in zip(pairs, values(), strict=True)
    )


def test_the_result_shares_no_memory_with_a_value() -> None:
    value = values()[0]
    assert PointAveraging().reduce([(value, 1)]).data_ptr() != value.data_ptr()


def test_a_batch_of_weight_zero_counts_nothing() -> None:
    class AboveOne(Averaging):
        def weight(self, num_points: int) -> float:
            return float(num_points > 1)

    first, second, last = values()
    result = AboveOne().reduce([(first, 4), (second, 4), (last, 1)])
    torch.testing.assert_close(result, (first + second) / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_summed_in_single_precision(dtype: torch.dtype) -> None:
    # Summed in half precision, ones beyond 2048 (256 for bfloat16) would be lost.
    result = PointAveraging().reduce((torch.ones(2, dtype=dtype), 3) for _ in range(3000))
    assert result.dtype == dtype
    assert result.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    assert PointAveraging().reduce(zip(values(dtype), SIZES, strict=True)).dtype == dtype


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), -0.5], ids=str)
def test_weights_that_are_negative_or_not_finite_are_refused(weight: float) -> None:
    with pytest.raises(ArgumentError, match=r"Weighted\.weight\(4\)"):
        Weighted(weight).reduce(zip(values(), SIZES, strict=True))


NOTHING: dict[str, tuple[Averaging, list[tuple[Tensor, int]]]] = {
    "no batches": (PointAveraging(), []),
    "no weight": (Weighted(0.0), list(zip(values(), SIZES, strict=True))),
}


@pytest.mark.parametrize("case", NOTHING)
def test_a_mean_of_nothing_is_refused(case: str) -> None:
    averaging, pairs = NOTHING[case]
    with pytest.raises(DataError, match="nothing to average"):
        averaging.reduce(pairs)


def test_values_of_different_shapes_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(3,\) and \(1,\)"):
        PointAveraging().reduce([(torch.zeros(3), 1), (torch.zeros(1), 1)])


def test_averaging_is_abstract() -> None:
    with pytest.raises(TypeError, match="weight"):
        Averaging()  # type: ignore[abstract]


@pytest.mark.parametrize("averaging", [PointAveraging, "points", None], ids=str)
def test_an_operator_takes_instances_of_averaging_only(averaging: object) -> None:
    operation = HessianBatchOperation(nn.Linear(2, 1), nn.MSELoss())
    data = [(torch.zeros(3, 2), torch.zeros(3, 1))]
    with pytest.raises(ArgumentTypeError, match="averaging") as caught:
        BatchOperator(operation, data, averaging)  # type: ignore[arg-type]
    assert isinstance(caught.value, HessopsError)


def test_an_operator_averages_by_the_users_subclass() -> None:
    operation = HessianBatchOperation(nn.Linear(1, 1, bias=False).double(), nn.MSELoss())
    # Hessians 2 and 8 of batches of four points and of one.
    data = [
        (torch.ones(4, 1).double(), torch.zeros(4, 1).double()),
        (2 * torch.ones(1, 1).double(), torch.zeros(1, 1).double()),
    ]
    result = BatchOperator(operation, data, SquareRoot()).apply(torch.ones(1).double())
    assert result.tolist() == [(2 * 2 + 1 * 8) / 3]
