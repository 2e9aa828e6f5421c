"""Dominant eigenpairs and Nyström sketches against dense eigendecompositions."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch
from reference import DenseReference, random_spd, relative_error
from torch import Tensor, nn

import hessops
from hessops import DiagonalOperator, HessianOperator, MatrixOperator, functional
from hessops.errors import (
    ArgumentError,
    ConvergenceWarning,
    DtypeError,
    IndefiniteSketchWarning,
    NonFiniteProductError,
    ShapeError,
    StructureError,
)
from hessops.functional.krylov import ritz_pairs

P = 40


def symmetric(size: int = P, seed: int = 0) -> Tensor:
    """A full-rank matrix with eigenvalues of both signs and well separated sizes."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(size, size, generator=generator, dtype=torch.float64)
    basis, _ = torch.linalg.qr(drawn)
    values = 1.3 ** -torch.arange(size, dtype=torch.float64) * (-1.0) ** torch.arange(size)
    return (basis * values) @ basis.T


def dominant(matrix: Tensor, rank: int) -> Tensor:
    values = torch.linalg.eigvalsh(matrix)
    return values[values.abs().argsort(descending=True)[:rank]]


def lanczos(matrix: Tensor, **options: object) -> hessops.LowRankProductRepresentation:
    return functional.lanczos_low_rank_hessian_approx(
        lambda v: matrix @ v, tuple(matrix.shape), torch_dtype=matrix.dtype, **options
    )


def assert_eigenpairs(
    result: hessops.LowRankProductRepresentation, matrix: Tensor, tolerance: float
) -> None:
    vectors, values = result.projections, result.eigen_vals
    assert result.is_orthonormal()
    assert (matrix @ vectors - vectors * values).norm() <= tolerance * values.abs().max()
    sizes = values.abs()
    assert torch.equal(sizes, sizes.sort(descending=True).values)


# --- eigenpairs --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("perturbation", [0.0, 0.3])
@pytest.mark.parametrize("rank", [1, 5, P - 1, P, P + 5])
def test_lanczos_finds_the_largest_in_absolute_value(
    rank: int, perturbation: float, dtype: torch.dtype
) -> None:
    matrix = symmetric().to(dtype)
    result = lanczos(matrix, rank_estimate=rank, hessian_perturbation=perturbation)
    perturbed = matrix + perturbation * torch.eye(P, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float64 else 1e-3
    assert result.rank == min(rank, P)
    assert result.dtype == dtype
    assert not result.clipped
    assert_eigenpairs(result, perturbed, tolerance)
    assert relative_error(result.eigen_vals, dominant(perturbed, rank)) < tolerance


def test_lanczos_is_exact_with_machine_precision() -> None:
    result = lanczos(symmetric(), rank_estimate=5, tol=0.0)
    assert_eigenpairs(result, symmetric(), 1e-12)


def test_the_historical_spelling_is_the_same_function() -> None:
    assert hessops.lanzcos_low_rank_hessian_approx is hessops.lanczos_low_rank_hessian_approx


@pytest.mark.parametrize("rank", [2, 6])
def test_lanczos_of_a_matrix_of_low_rank(rank: int) -> None:
    vectors = torch.linalg.qr(torch.randn(P, 3, dtype=torch.float64))[0]
    matrix = (vectors * torch.tensor([3.0, 2.0, -1.0], dtype=torch.float64)) @ vectors.T
    result = lanczos(matrix, rank_estimate=rank)
    expected = [3.0, 2.0, -1.0, 0.0, 0.0, 0.0][:rank]
    assert torch.allclose(result.eigen_vals, torch.tensor(expected).double(), atol=1e-10)


def test_equal_calls_give_equal_results_and_leave_the_global_state() -> None:
    matrix = symmetric()
    before = torch.get_rng_state()
    first, second = lanczos(matrix, rank_estimate=4), lanczos(matrix, rank_estimate=4)
    assert torch.equal(first.projections, second.projections)
    seeded = [
        functional.randomized_nystroem_approximation(
            random_spd(P, 1e3), P, 5, torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (1, 1, 2)
    ]
    assert torch.equal(seeded[0].projections, seeded[1].projections)
    assert not torch.equal(seeded[0].projections, seeded[2].projections)
    assert torch.equal(torch.get_rng_state(), before)


def test_only_converged_pairs_are_returned_with_a_warning_that_counts_them() -> None:
    matrix = torch.diag(1 - 1e-4 * torch.arange(400, dtype=torch.float64))
    with pytest.warns(ConvergenceWarning, match=r"\d+ of 10 eigenpairs converged"):
        result = lanczos(matrix, rank_estimate=10, max_iter=1, krylov_dimension=11)
    assert result.rank < 10
    assert (matrix @ result.projections - result.projections * result.eigen_vals).norm() < 1e-3


LANCZOS_MISUSES = {
    "not square": ({"shape": (3, 4)}, ShapeError, "square"),
    "rank": ({"rank_estimate": 0}, ArgumentError, "rank_estimate"),
    "tol": ({"tol": -1.0}, ArgumentError, "tol"),
    "Krylov dimension": ({"krylov_dimension": 5, "rank_estimate": 5}, ArgumentError, "krylov"),
    "half": ({"torch_dtype": torch.bfloat16}, DtypeError, "bfloat16"),
    "other dtype": ({"torch_dtype": torch.float32}, StructureError, "torch_dtype"),
    "GPU without device": ({"eigen_computation_on_gpu": True}, ValueError, "device"),
}


@pytest.mark.parametrize("misuse", LANCZOS_MISUSES)
def test_lanczos_names_what_does_not_fit(misuse: str) -> None:
    options, error, message = LANCZOS_MISUSES[misuse]
    options = dict(options)
    shape = options.pop("shape", (P, P))
    options = {"torch_dtype": torch.float64, **options}
    matrix = symmetric()
    with pytest.raises(error, match=message):
        functional.lanczos_low_rank_hessian_approx(
            lambda v: matrix @ v.to(matrix.dtype), shape, **options
        )


def test_a_matrix_that_is_not_symmetric_is_refused() -> None:
    matrix = torch.randn(P, P, dtype=torch.float64)
    with pytest.raises(StructureError, match="not symmetric"):
        lanczos(matrix)
    with pytest.raises(StructureError, match="not symmetric"):
        functional.randomized_nystroem_approximation(matrix, P, 5, torch.float64)


def test_products_that_are_not_finite_are_refused() -> None:
    matrix = symmetric()
    matrix[3, 3] = torch.nan
    with pytest.raises(NonFiniteProductError):
        lanczos(matrix)
    with pytest.raises(NonFiniteProductError):
        functional.randomized_nystroem_approximation(matrix, P, 5, torch.float64)


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="cupy is installed")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cpu"])
def test_without_cupy_the_gpu_route_says_what_to_install(device: str) -> None:
    with pytest.raises(ImportError, match=r"hessops\[cupy\]"):
        functional.lanczos_low_rank_hessian_approx(
            lambda v: v, (P, P), device=device, eigen_computation_on_gpu=True
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cupy_finds_the_same_eigenpairs(dtype: torch.dtype) -> None:
    pytest.importorskip("cupy")
    matrix = symmetric(200).to(dtype)
    on_gpu = matrix.cuda()
    expected = lanczos(matrix.double(), rank_estimate=6)
    result = functional.lanczos_low_rank_hessian_approx(
        lambda v: on_gpu @ v,
        (200, 200),
        rank_estimate=6,
        device="cuda",
        eigen_computation_on_gpu=True,
        torch_dtype=dtype,
    )
    tolerance = 1e-6 if dtype == torch.float64 else 1e-4
    assert result.device.type == "cuda"
    assert relative_error(result.eigen_vals.cpu().double(), expected.eigen_vals) < tolerance
    assert relative_error(result.to("cpu").to_dense().double(), expected.to_dense()) < tolerance


# --- Lanczos with reorthogonalisation ----------------------------------------------------

SPECTRA = {
    "distinct": torch.linspace(-2, 3, 12),
    "repeated": torch.tensor([2.0] * 5 + [-1.0] * 4 + [0.5] * 3),
    "identity": torch.ones(12),
    "low rank": torch.tensor([4.0, -3.0] + [0.0] * 10),
    "zero": torch.zeros(12),
    "tiny": 1e-12 * torch.linspace(1, 3, 12),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_ritz_pairs_of_the_whole_space_are_the_eigenpairs(spectrum: str) -> None:
    values = SPECTRA[spectrum].double()
    basis, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))
    matrix = (basis * values) @ basis.T
    matrix = (matrix + matrix.T) / 2
    pairs = ritz_pairs(
        lambda v: matrix @ v,
        12,
        max_iter=100,
        tol=1e-7,
        generator=torch.Generator().manual_seed(0),
        device=torch.device("cpu"),
    )
    scale = values.abs().max()
    identity = torch.eye(12, dtype=torch.float64)
    assert (pairs.vectors.T @ pairs.vectors - identity).abs().max() < 1e-13
    assert (matrix @ pairs.vectors - pairs.vectors * pairs.values).abs().max() <= 1e-13 * scale
    assert (pairs.values - values.sort().values).abs().max() <= 1e-13 * scale


def test_ritz_vectors_stay_orthonormal_where_one_projection_loses_it() -> None:
    # Widely graded: converged directions come back into every new vector.
    values = 10.0 ** -torch.linspace(0, 14, 60, dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64))
    matrix = (basis * values) @ basis.T
    pairs = ritz_pairs(
        lambda v: matrix @ v,
        60,
        max_iter=60,
        tol=0.0,
        generator=torch.Generator().manual_seed(0),
        device=torch.device("cpu"),
    )
    identity = torch.eye(60, dtype=torch.float64)
    assert (pairs.vectors.T @ pairs.vectors - identity).abs().max() < 1e-14 * 60**0.5


# --- Nyström -----------------------------------------------------------------------------


@pytest.mark.parametrize("as_function", [True, False])
@pytest.mark.parametrize("rank", [3, P, P + 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_sketch_of_at_least_the_rank_is_exact(
    dtype: torch.dtype, rank: int, as_function: bool
) -> None:
    factor = torch.randn(P, 3, dtype=torch.float64)
    matrix = (factor @ factor.T).to(dtype)
    result = functional.randomized_nystroem_approximation(
        (lambda columns: matrix @ columns) if as_function else matrix, P, rank, dtype
    )
    assert result.rank == min(rank, P)
    assert not result.clipped
    assert result.is_orthonormal()
    tolerance = 1e-10 if dtype == torch.float64 else 1e-3
    assert relative_error(result.to_dense(), matrix) < tolerance


def test_the_sketch_is_the_formula() -> None:
    matrix, shift = random_spd(P, 1e2), 1e-9
    generator = torch.Generator().manual_seed(3)
    omega = torch.randn(P, 6, generator=generator, dtype=torch.float64)
    image = matrix @ omega
    expected = image @ torch.linalg.inv(omega.T @ image) @ image.T
    result = functional.randomized_nystroem_approximation(
        matrix,
        P,
        6,
        torch.float64,
        shift_func=lambda image: torch.tensor(shift),
        generator=torch.Generator().manual_seed(3),
    )
    assert relative_error(result.to_dense(), expected) < 1e-6
    assert (torch.linalg.eigvalsh(matrix - result.to_dense()) > -1e-7).all()


@pytest.mark.parametrize("rank", [5, 20, P])
def test_an_indefinite_matrix_warns_and_is_clipped_to_its_positive_part(rank: int) -> None:
    matrix = symmetric()
    with pytest.warns(IndefiniteSketchWarning, match=r"negative Ritz value -\d"):
        result = functional.randomized_nystroem_approximation(matrix, P, rank, torch.float64)
    assert result.clipped
    assert result.to("cpu").clipped
    assert result.orthonormalized().clipped
    assert (result.eigen_vals >= 0).all()
    largest = torch.linalg.eigvalsh(matrix).max()
    assert result.eigen_vals.max() <= largest * (1 + 1e-12)
    if rank == P:
        values, vectors = torch.linalg.eigh(matrix)
        positive = (vectors * values.clamp(min=0)) @ vectors.T
        assert relative_error(result.to_dense(), positive) < 1e-10


def test_the_warning_can_be_filtered() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IndefiniteSketchWarning)
        assert functional.randomized_nystroem_approximation(
            symmetric(), P, 5, torch.float64
        ).clipped


def test_the_sketch_of_zero_is_zero() -> None:
    result = functional.randomized_nystroem_approximation(torch.zeros(P, P), P, 5, torch.float32)
    assert not result.to_dense().any()
    assert not result.clipped


NYSTROEM_MISUSES = {
    "rank": ((torch.eye(3), 3, 0, torch.float32), ArgumentError, "rank"),
    "dtype": ((torch.eye(3), 3, 1, torch.bfloat16), ArgumentError, "input_type"),
    "matrix shape": ((torch.eye(3), 4, 1, torch.float32), ShapeError, "mat_mat_prod"),
    "product shape": ((lambda c: c[:1], 4, 1, torch.float32), ShapeError, "mat_mat_prod"),
    "product dtype": ((lambda c: c.double(), 4, 1, torch.float32), StructureError, "float64"),
    "shift": (
        (torch.eye(3), 3, 1, torch.float32, lambda image: torch.tensor(-1.0)),
        ArgumentError,
        "shift_func",
    ),
}


@pytest.mark.parametrize("misuse", NYSTROEM_MISUSES)
def test_nystroem_names_what_does_not_fit(misuse: str) -> None:
    arguments, error, message = NYSTROEM_MISUSES[misuse]
    with pytest.raises(error, match=message):
        functional.randomized_nystroem_approximation(*arguments)


# --- of operators and models -------------------------------------------------------------


def test_approximations_of_operators() -> None:
    spd = random_spd(P, 1e6)
    operator = MatrixOperator(spd)
    spectral = functional.operator_spectral_approximation(operator, 4, tol=0.0)
    assert_eigenpairs(spectral, spd, 1e-12)
    sketch = functional.operator_nystroem_approximation(operator, 12)
    direct = functional.randomized_nystroem_approximation(spd, P, 12, torch.float64)
    assert relative_error(sketch.to_dense(), direct.to_dense()) < 1e-6
    shifted = functional.operator_spectral_approximation(
        DiagonalOperator(torch.arange(30.0)).shift(2.0), 1
    )
    assert shifted.eigen_vals.item() == pytest.approx(31.0, rel=1e-5)


@pytest.mark.parametrize("precompute_grad", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_approximations_of_the_hessian_of_a_model(reduction: str, precompute_grad: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(9, 3).double(), torch.randint(2, (9,))
    data = [(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])]
    loss = nn.CrossEntropyLoss(reduction=reduction)
    matrix = DenseReference(model, nn.CrossEntropyLoss(), x, y).hessian()
    spectral = functional.model_hessian_low_rank(
        model,
        loss,
        data,
        hessian_perturbation=0.1,
        rank_estimate=5,
        tol=0.0,
        precompute_grad=precompute_grad,
        reduction=reduction,
    )
    assert_eigenpairs(spectral, matrix + 0.1 * torch.eye(26).double(), 1e-10)
    with pytest.warns(IndefiniteSketchWarning):
        sketch = functional.model_hessian_nystroem_approximation(
            model, loss, data, 26, reduction=reduction
        )
    values, vectors = torch.linalg.eigh(matrix)
    positive = (vectors * values.clamp(min=0)) @ vectors.T
    assert relative_error(sketch.to_dense(), positive) < 1e-8
    operator = HessianOperator(model, nn.CrossEntropyLoss(), data)
    of_operator = functional.operator_spectral_approximation(operator, 5, tol=0.0)
    assert relative_error(of_operator.eigen_vals, dominant(matrix, 5)) < 1e-10
