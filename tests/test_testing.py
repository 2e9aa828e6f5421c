"""The conformance kit: every operator of ours passes it, and broken ones do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reference import random_spd
from torch import Tensor, nn

from hessops import (
    BlockDiagonalOperator,
    CgOperator,
    DiagonalOperator,
    DirectSolveOperator,
    GaussNewtonOperator,
    GeneralizedGaussNewtonOperator,
    HessianOperator,
    IdentityOperator,
    InverseHarmonicMeanOperator,
    LowRankOperator,
    LowRankProductOperator,
    LowRankProductRepresentation,
    MatrixOperator,
    ParameterSpace,
    TensorDictOperator,
    TensorOperator,
)
from hessops.errors import ConformanceError
from hessops.testing import check_operator

DTYPES = [torch.float64, torch.float32]


def matrix(size: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return random_spd(size, 100.0, dtype=dtype)


def general(dtype: torch.dtype) -> Tensor:
    return matrix(dtype=dtype) + torch.ones(5, 5, dtype=dtype).triu()


def representation(dtype: torch.dtype) -> LowRankProductRepresentation:
    basis, _ = torch.linalg.qr(matrix(5, dtype)[:, :2])
    return LowRankProductRepresentation(torch.tensor([3.0, 0.5], dtype=dtype), basis)


def curvature(operator_type: type, dtype: torch.dtype, **keywords: float) -> TensorOperator:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)
    x = torch.randn(7, 2, generator=generator).to(dtype)
    y = torch.randint(2, (7,), generator=generator)
    data = [(x[:3], y[:3]), (x[3:], y[3:])]
    return operator_type(model, nn.CrossEntropyLoss(), data, **keywords)


Case = Callable[[torch.dtype], tuple[TensorOperator, Tensor | None]]

CASES: dict[str, Case] = {
    "identity": lambda d: (IdentityOperator(4, d), torch.eye(4)),
    "diagonal": lambda d: (DiagonalOperator(torch.arange(1, 5).to(d)), torch.arange(1, 5).diag()),
    "matrix": lambda d: (MatrixOperator(matrix(dtype=d)), matrix(dtype=d)),
    "general matrix": lambda d: (MatrixOperator(general(d)), general(d)),
    "transposed": lambda d: (MatrixOperator(general(d)).T, general(d).T),
    "sum": lambda d: (
        MatrixOperator(general(d)) + DiagonalOperator(torch.ones(5, dtype=d)),
        general(d) + torch.eye(5, dtype=d),
    ),
    "composed": lambda d: (
        MatrixOperator(general(d)) @ MatrixOperator(matrix(dtype=d)),
        general(d) @ matrix(dtype=d),
    ),
    "shifted": lambda d: (
        MatrixOperator(matrix(dtype=d)).shift(0.5),
        matrix(dtype=d) + 0.5 * torch.eye(5, dtype=d),
    ),
    "scaled": lambda d: (-3 * MatrixOperator(matrix(dtype=d)), -3 * matrix(dtype=d)),
    "block diagonal": lambda d: (
        BlockDiagonalOperator([MatrixOperator(general(d)), IdentityOperator(2, d)]),
        torch.block_diag(general(d), torch.eye(2, dtype=d)),
    ),
    "direct solve": lambda d: (
        DirectSolveOperator(general(d), 0.1),
        torch.linalg.inv(general(d).double() + 0.1 * torch.eye(5).double()),
    ),
    "low rank": lambda d: (
        LowRankProductOperator(representation(d)),
        representation(d).to_dense(),
    ),
    "low-rank inverse": lambda d: (
        LowRankOperator(representation(d), 0.1),
        torch.linalg.inv(representation(d).to_dense().double() + 0.1 * torch.eye(5).double()),
    ),
    "low-rank inverse on its range": lambda d: (
        LowRankOperator(representation(d), exact=False),
        torch.linalg.pinv(representation(d).to_dense().double(), rtol=1e-5),
    ),
    "block-diagonal inverse": lambda d: (
        BlockDiagonalOperator([MatrixOperator(general(d)), IdentityOperator(2, d)])
        .shift(0.2)
        .inverse(),
        torch.linalg.inv(
            torch.block_diag(general(d), torch.eye(2, dtype=d)).double()
            + 0.2 * torch.eye(7).double()
        ),
    ),
    "diagonal inverse": lambda d: (
        DiagonalOperator(torch.arange(1, 5).to(d)).inverse(),
        (1 / torch.arange(1, 5).double()).diag(),
    ),
    "hessian": lambda d: (curvature(HessianOperator, d), None),
    "gauss-newton": lambda d: (curvature(GaussNewtonOperator, d), None),
    "generalized gauss-newton": lambda d: (curvature(GeneralizedGaussNewtonOperator, d), None),
    "inverse harmonic mean": lambda d: (
        curvature(InverseHarmonicMeanOperator, d, regularization=0.1),
        None,
    ),
    "composite of curvatures": lambda d: (
        0.9 * curvature(HessianOperator, d)
        + 0.1 * curvature(GaussNewtonOperator, d)
        + 0.5 * IdentityOperator(17, d),
        None,
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_operator_conforms(name: str, dtype: torch.dtype) -> None:
    operator, dense = CASES[name](dtype)
    report = check_operator(operator, dense)
    allowed = {"adjointness", "closed forms", "definiteness", "dictionaries", "true residuals"}
    if dense is None:
        allowed |= {"dense reference"}
    assert set(report.skipped) <= allowed


def test_half_precision_conforms() -> None:
    check_operator(curvature(HessianOperator, torch.bfloat16), accuracy=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_iterative_inverse_conforms_within_its_accuracy(dtype: torch.dtype) -> None:
    operator = CgOperator(MatrixOperator(matrix(dtype=dtype)), regularization=0.01)
    dense = torch.linalg.inv(matrix(dtype=dtype).double() + 0.01 * torch.eye(5).double())
    report = check_operator(operator, dense, accuracy=1e-4 if dtype == torch.float64 else 3e-2)
    assert "true residuals" in report.passed


def test_cg_on_a_curvature_operator_takes_dictionaries() -> None:
    operator = curvature(GeneralizedGaussNewtonOperator, torch.float64)
    report = check_operator(CgOperator(operator, 0.1, rtol=1e-12), accuracy=1e-8)
    assert "dictionaries" in report.passed


class Broken(TensorOperator):
    """The identity on R^4 with one promise broken."""

    def __init__(self, apply: Callable[[Tensor], Tensor], *, symmetric: bool = False) -> None:
        super().__init__(4, torch.float64, "cpu", symmetric=symmetric, positive_semidefinite=None)
        self.function = apply

    def _apply_rows(self, rows: Tensor) -> Tensor:
        return self.function(rows)


def cyclic(rows: Tensor) -> Tensor:
    return rows.roll(1, dims=1)


BROKEN: dict[str, tuple[TensorOperator, str]] = {
    "affine": (Broken(lambda r: r + 1), "linearity"),
    "quadratic": (Broken(lambda r: r * r), "linearity"),
    "couples rows": (Broken(lambda r: r + 1e-3 * r.mean(0)), "rows against stacks"),
    "drops rows": (Broken(lambda r: r[:1]), "shapes"),
    "random": (Broken(lambda r: r * torch.rand(())), "linearity|repeatability"),
    "writes to its argument": (Broken(lambda r: r.mul_(2)), "writes to its argument"),
    "returns its argument": (Broken(lambda r: r), "side effects"),
    "claims symmetry": (Broken(cyclic, symmetric=True), "adjointness"),
    "advances the random state": (
        Broken(lambda r: r.clone() + 0 * torch.rand(())),
        "side effects",
    ),
    "casts": (Broken(lambda r: r.float()), "shapes"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_operators_are_caught(name: str) -> None:
    operator, check = BROKEN[name]
    with pytest.raises((ConformanceError, ValueError), match=check + "|contract"):
        check_operator(operator)


def test_a_move_that_looks_at_values_is_caught() -> None:
    class Looks(Broken):
        def _move(self, device: torch.device) -> TensorOperator:
            assert torch.zeros(1, device=device).item() == 0
            return self._copy_on(device)

    with pytest.raises(ConformanceError, match=r"devices.*must not look at their"):
        check_operator(Looks(torch.clone))


# A hook with a mistake in it, for the diagonal matrix of 1, 2 and 4.
WRONG_FORMS: dict[str, Callable[..., object]] = {
    "_closed_form_inverse": lambda A, shift: DiagonalOperator(1 / A.diagonal),  # forgets the shift
    "_exact_trace": lambda A: 8.0,
    "_exact_diagonal": lambda A: A.diagonal.flip(0),
    "_exact_squared_norm": lambda A: 7.0,
    "_exact_eigenvalues": lambda A: A.diagonal.sqrt(),
    "_exact_logdet": lambda A, scale, shift: A.diagonal.add(shift).log().sum().item(),
}


@pytest.mark.parametrize("hook", WRONG_FORMS)
def test_a_wrong_closed_form_is_caught(hook: str) -> None:
    diagonal = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    kind = type("Wrong", (DiagonalOperator,), {hook: WRONG_FORMS[hook]})
    assert "closed forms" in check_operator(DiagonalOperator(diagonal)).passed
    with pytest.raises(ConformanceError, match=f"closed forms: .*{hook}"):
        check_operator(kind(diagonal))


def test_a_wrong_dense_reference_is_caught() -> None:
    wrong = torch.eye(5) * (1 + 1e-6)
    with pytest.raises(ConformanceError, match="dense reference"):
        check_operator(IdentityOperator(5, torch.float64), wrong)


def test_a_subclass_with_one_vector_hook_conforms() -> None:
    class ByVector(TensorDictOperator):
        def _apply_vector(self, vector: Tensor) -> Tensor:
            return vector.flip(0)

    space = ParameterSpace.from_tensors({"a": torch.ones(2).double(), "b": torch.ones(1).double()})
    report = check_operator(ByVector(space, symmetric=True), torch.eye(3).flip(0))
    assert "dictionaries" in report.passed
    assert "devices" in report.skipped


def test_a_subclass_without_a_hook_is_abstract() -> None:
    class Nothing(TensorOperator):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Nothing(3, torch.float64, "cpu")
