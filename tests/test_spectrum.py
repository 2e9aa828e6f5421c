"""Eigenpairs, spectral densities and log-determinants against dense decompositions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from reference import hessian_of, trainable
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hessops import (
    BlockDiagonalOperator,
    CgOperator,
    DiagonalOperator,
    DirectSolveOperator,
    GeneralizedGaussNewtonOperator,
    HessianOperator,
    IdentityOperator,
    KfacOperator,
    LowRankOperator,
    LowRankProductOperator,
    LowRankProductRepresentation,
    MatrixOperator,
    TensorOperator,
)
from hessops.errors import (
    ArgumentError,
    ArgumentTypeError,
    ConvergenceWarning,
    DtypeError,
    MemoryLimitError,
    NonFiniteError,
    NonFiniteProductError,
    ShapeError,
    SingularOperatorError,
    StructureError,
)
from hessops.estimators import SpectralDensity, eigenpairs, logdet, spectral_density
from hessops.estimators.lanczos import lanczos

N = 60
F64 = torch.float64


def rotated(values: Tensor, seed: int = 0) -> Tensor:
    """A full symmetric matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(len(values), len(values), generator=generator, dtype=F64)
    basis, _ = torch.linalg.qr(drawn)
    matrix = (basis * values) @ basis.T
    return (matrix + matrix.T) / 2


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wanted(values: Tensor, which: str, k: int) -> Tensor:
    """What eigenpairs are asked for, of all eigenvalues."""
    values = values.sort(descending=True).values
    return (
        {
            "largest": values[:k],
            "smallest": values[-k:],
            "both": torch.cat([values[: k - k // 2], values[len(values) - k // 2 :]]),
            "magnitude": values[values.abs().argsort(descending=True)[:k]],
        }[which]
        .sort(descending=True)
        .values
    )


def smoothed(values: Tensor, grid: Tensor, width: float) -> Tensor:
    """The density of eigenvalues, each one a Gaussian."""
    kernel = torch.exp(-(((grid.unsqueeze(1) - values) / width) ** 2) / 2)
    return kernel.mean(dim=1) / (math.sqrt(2 * math.pi) * width)


class Recorded(TensorOperator):
    """A matrix that knows what it was multiplied with; its symmetry is unknown."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(len(matrix), matrix.dtype, "cpu")
        self.matrix = matrix
        self.batches: list[int] = []

    def _apply_rows(self, rows: Tensor) -> Tensor:
        self.batches.append(len(rows))
        return rows @ self.matrix.T


class Digits:
    """A small network, trained a little, so that its Hessian has eigenvalues of both signs."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        data = load_digits()
        self.x = torch.tensor(data.data[:200] / 16)
        self.y = torch.tensor(data.target[:200])
        layers = nn.Linear(64, 3), nn.Tanh(), nn.Linear(3, 10)
        self.model = nn.Sequential(*layers).double()
        self.loss = nn.CrossEntropyLoss()
        optimizer = torch.optim.Adam(self.model.parameters(), lr=0.05)
        for _ in range(30):
            optimizer.zero_grad()
            self.loss(self.model(self.x), self.y).backward()
            optimizer.step()
        batches = [(self.x[:120], self.y[:120]), (self.x[120:], self.y[120:])]
        self.hessian = HessianOperator(self.model, self.loss, batches)
        self.ggn = GeneralizedGaussNewtonOperator(self.model, self.loss, batches)
        value = self.loss(self.model(self.x), self.y)
        self.eigenvalues = torch.linalg.eigvalsh(hessian_of(value, trainable(self.model)))


@cache
def digits() -> Digits:
    return Digits()


# --- eigenpairs --------------------------------------------------------------------------

SPECTRA = {
    "both signs": torch.linspace(-1, 2, N, dtype=F64),
    "decaying": 1.3 ** -torch.arange(N, dtype=F64) * (-1.0) ** torch.arange(N),
    "negative": -torch.linspace(1e-3, 1, N, dtype=F64),
    "low rank": torch.cat([torch.tensor([3.0, 2.0, 1.0], dtype=F64), torch.zeros(N - 3)]),
    "tiny": 1e-25 * torch.linspace(-1, 2, N, dtype=F64),
    "huge": 1e25 * torch.linspace(-1, 2, N, dtype=F64),
    "identity": torch.ones(N, dtype=F64),
    "zero": torch.zeros(N, dtype=F64),
}
ENDS = ["largest", "smallest", "both", "magnitude"]
EIGENPAIR_CASES = [
    (name, which)
    for name in SPECTRA
    for which in (ENDS if name in ("both signs", "decaying", "negative", "low rank") else ["both"])
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("method", ["arpack", "lobpcg"])
@pytest.mark.parametrize(("name", "which"), EIGENPAIR_CASES)
def test_eigenpairs_are_those_of_the_matrix(
    name: str, which: str, method: str, dtype: torch.dtype
) -> None:
    values = SPECTRA[name]
    matrix = rotated(values).to(dtype)
    pairs = eigenpairs(MatrixOperator(matrix, symmetric=True), 5, which, method)
    norm = values.abs().max().item() or 1.0
    accuracy = 1e-10 if dtype == torch.float64 else 1e-5
    expected = wanted(values, which, 5)
    assert pairs.values.dtype == pairs.vectors.dtype == dtype
    assert (pairs.values.double() - expected).abs().max() <= accuracy * norm
    vectors = pairs.vectors.double()
    assert (vectors @ vectors.T - torch.eye(5)).abs().max() <= 1e2 * accuracy**0.5
    residuals = vectors @ matrix.double() - pairs.values.double().unsqueeze(1) * vectors
    assert residuals.norm(dim=1).max() <= (2e-7 if dtype == torch.float64 else 2e-4) * norm
    rounding = 10 * torch.finfo(dtype).eps * norm
    assert (residuals.norm(dim=1) - pairs.residual_norms).abs().max() <= rounding


@pytest.mark.parametrize("method", ["arpack", "lobpcg"])
@pytest.mark.parametrize("k", [1, 2, N - 1, N, N + 5])
@pytest.mark.parametrize("which", ["both", "smallest"])
def test_any_number_of_pairs(k: int, which: str, method: str) -> None:
    values = SPECTRA["both signs"]
    pairs = eigenpairs(MatrixOperator(rotated(values)), k, which, method)
    assert torch.allclose(pairs.values, wanted(values, which, min(k, N)), atol=1e-10)
    assert pairs.vectors.shape == (min(k, N), N)


def test_a_small_matrix_is_decomposed_and_no_copy_of_an_eigenvalue_is_missed() -> None:
    values = torch.cat([torch.full((30,), 2.0, dtype=F64), torch.linspace(0, 1, 30, dtype=F64)])
    operator = MatrixOperator(rotated(values), symmetric=True)
    pairs = eigenpairs(operator, 10)
    torch.testing.assert_close(pairs.values, torch.full((10,), 2.0, dtype=F64))
    assert pairs.num_products == N + 10  # the matrix, and the residuals
    of_size = eigenpairs(-operator, 10, "magnitude")
    torch.testing.assert_close(of_size.values, torch.full((10,), -2.0, dtype=F64))
    assert eigenpairs(operator, 10, krylov_dimension=N).num_products != N + 10


def test_eigenvalues_of_zero_are_as_well_had_as_others() -> None:
    values = torch.cat([torch.linspace(0.01, 1, 100, dtype=F64), torch.zeros(100)])
    for which in ("smallest", "both"):
        pairs = eigenpairs(MatrixOperator(rotated(values)), 4, which)
        assert len(pairs.values) == 4
        assert abs(pairs.values[-1].item()) < 1e-13


def test_lobpcg_finds_copies() -> None:
    values = torch.cat([torch.full((4,), 2.0, dtype=F64), torch.linspace(-1, 1, N - 4)])
    pairs = eigenpairs(MatrixOperator(rotated(values)), 5, method="lobpcg")
    assert torch.allclose(pairs.values, wanted(values, "largest", 5), atol=1e-10)


@pytest.mark.parametrize("method", ["arpack", "lobpcg"])
def test_a_tolerance_of_zero_is_what_the_precision_allows(method: str) -> None:
    pairs = eigenpairs(MatrixOperator(rotated(SPECTRA["decaying"])), 4, "both", method, tol=0.0)
    assert len(pairs.values) == 4
    assert pairs.residual_norms.max() < 1e-13


@pytest.mark.parametrize("method", ["arpack", "lobpcg"])
@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_eigenpairs_of_a_network(which: str, method: str) -> None:
    pairs = eigenpairs(digits().hessian, 4, which, method)
    expected = wanted(digits().eigenvalues, which, 4)
    assert torch.allclose(pairs.values, expected, rtol=0, atol=1e-9)
    images = digits().hessian.apply(pairs.vectors)
    residuals = (images - pairs.values.unsqueeze(1) * pairs.vectors).norm(dim=1)
    assert torch.allclose(residuals, pairs.residual_norms, atol=1e-12)


@pytest.mark.parametrize("method", ["arpack", "lobpcg"])
def test_only_converged_pairs_come_back_with_a_warning_that_counts_them(method: str) -> None:
    matrix = torch.diag(1 - 1e-4 * torch.arange(400, dtype=F64))
    with pytest.warns(ConvergenceWarning, match=r"\d of 5 eigenpairs converged"):
        pairs = eigenpairs(MatrixOperator(matrix), 5, method=method, max_iter=2)
    assert len(pairs.values) == len(pairs.vectors) == len(pairs.residual_norms) < 5
    assert "Eigenpairs(" in repr(pairs)


def test_products_are_counted_and_blocks_take_one_pass() -> None:
    operator = Recorded(rotated(SPECTRA["both signs"]))
    for method in ("arpack", "lobpcg"):
        operator.batches.clear()
        pairs = eigenpairs(operator, 3, method=method)
        assert pairs.num_products == sum(operator.batches)
    assert set(operator.batches) >= {1, 3}


# --- Lanczos -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_quadratures_integrate_polynomials_of_degree_2s_minus_1(dtype: torch.dtype) -> None:
    matrix = rotated(torch.linspace(-1, 1, N, dtype=F64)).to(dtype)
    starts = torch.randn(3, N, generator=seeded(0)).to(dtype)
    units = starts.double() / starts.double().norm(dim=1, keepdim=True)
    for start, found in zip(units, lanczos(lambda r: r @ matrix, starts, 5), strict=True):
        nodes, weights = found.quadrature()
        power = start
        for degree in range(10):
            accuracy = 1e-13 if dtype == torch.float64 else 1e-6
            assert abs(float(weights @ nodes**degree - start @ power)) < accuracy
            power = matrix.double() @ power
        assert abs(float(weights @ nodes**10 - start @ power)) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_reorthogonalised_ritz_values_do_not_repeat(dtype: torch.dtype) -> None:
    values = torch.cat([torch.linspace(0, 1, 150, dtype=F64), torch.tensor([50.0, 100.0])])
    operator = MatrixOperator(rotated(values).to(dtype), symmetric=True)
    density = spectral_density(operator, num_probes=3, num_steps=100)
    for outlier in (50.0, 100.0):
        assert ((density.nodes - outlier).abs() < 1e-2).sum(dim=1).tolist() == [1, 1, 1]
    assert (density.nodes.diff(dim=1) > 1e-6).all()


def test_every_probe_ends_by_itself_where_its_krylov_space_is_exhausted() -> None:
    values = torch.tensor([1.0, 1.0, 2.0, 4.0, 4.0, 4.0], dtype=F64)
    starts = torch.zeros(4, 6, dtype=F64)
    starts[0, 0] = starts[1, 0] = starts[1, 2] = 1
    starts[2:] = 1
    starts[3, 1] = -1
    found = lanczos(lambda rows: rows * values, starts, 10)
    assert [t.num_steps for t in found] == [1, 2, 3, 3]
    assert all(t.is_exhausted for t in found)
    nodes, weights = found[2].quadrature()
    assert torch.allclose(nodes, torch.tensor([1.0, 2.0, 4.0], dtype=F64))
    assert torch.allclose(weights, torch.tensor([2.0, 1.0, 3.0], dtype=F64) / 6)
    (short,) = lanczos(lambda rows: rows * values, torch.ones(1, 6, dtype=F64), 2)
    assert not short.is_exhausted


# --- spectral density --------------------------------------------------------------------


def test_all_probes_take_one_pass_in_each_step() -> None:
    operator = Recorded(rotated(SPECTRA["both signs"]))
    density = spectral_density(operator, num_probes=7, num_steps=9)
    assert operator.batches == [2] + [7] * 9  # the first tests the symmetry
    assert density.num_products == 65
    assert density.nodes.shape == density.weights.shape == (7, 9)
    assert torch.allclose(density.weights.sum(dim=1), torch.ones(7, dtype=F64))


def test_means_are_unbiased_and_their_standard_error_is_right() -> None:
    values = torch.linspace(0.1, 3, 8, dtype=F64)
    operator = MatrixOperator(rotated(values))
    densities = [spectral_density(operator, 6, 8, generator=seeded(s)) for s in range(200)]
    for function in (torch.exp, torch.log, torch.sqrt):
        estimates = [density.mean_of(function) for density in densities]
        assert_unbiased(
            torch.tensor([e.value for e in estimates]),
            torch.tensor([e.standard_error for e in estimates]),
            function(values).mean(),
        )


def assert_unbiased(results: Tensor, errors: Tensor, exact: Tensor) -> None:
    """Within three standard errors of many runs, whose own errors are right within 20 %."""
    deviation = results.std(dim=0)
    assert ((results.mean(dim=0) - exact).abs() <= 3 * deviation / len(results) ** 0.5).all()
    ratio = errors.square().mean().sqrt() / deviation.square().mean().sqrt()
    assert 0.8 < ratio < 1.2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_density_is_the_smoothed_histogram(dtype: torch.dtype) -> None:
    values = torch.cat([torch.linspace(-1, 1, 80, dtype=F64) ** 3, torch.tensor([2.0, 3.0])])
    operator = MatrixOperator(rotated(values).to(dtype), symmetric=True)
    grid = torch.linspace(-2, 4, 301, dtype=F64)
    runs = [spectral_density(operator, 8, 30, generator=seeded(s)) for s in range(30)]
    for width in (None, 0.3):
        found = [run.on(grid, width) for run in runs]
        exact = smoothed(values, grid, width or runs[0].default_width)
        near = exact > 1e-3
        density = torch.stack([value for value, _ in found])
        error = torch.stack([error for _, error in found])
        distance = (density.mean(dim=0) - exact).abs()
        assert (distance[near] <= 4 * density.std(dim=0)[near] / 30**0.5 + 1e-4).all()
        assert 0.8 < (error.square().mean() / density.var(dim=0).mean()).sqrt() < 1.2
        assert torch.trapezoid((density[0] - exact).abs(), grid) < 0.2
        assert torch.trapezoid(distance, grid) < 0.03
        assert torch.allclose(torch.trapezoid(density, grid), torch.ones(30, dtype=F64), atol=1e-3)


def test_the_density_of_a_network_is_that_of_its_eigenvalues() -> None:
    # Groups of the probes of one run are runs of their own.
    together = spectral_density(digits().hessian, 200, 25)
    groups = [
        replace(together, nodes=together.nodes[i::100], weights=together.weights[i::100])
        for i in range(100)
    ]
    values = digits().eigenvalues
    width = 0.05 * float(values.max() - values.min())
    grid = torch.linspace(float(values.min()) - 0.1, float(values.max()) + 0.1, 400, dtype=F64)
    exact = smoothed(values, grid, width)
    found = [group.on(grid, width) for group in groups]
    density = torch.stack([value for value, _ in found])
    errors = torch.stack([error for _, error in found])
    near = exact > 1e-3 * exact.max()
    distance = (density.mean(dim=0) - exact).abs()
    assert (distance <= 4 * density.std(dim=0) / 100**0.5 + 1e-4 * exact.max())[near].all()
    assert 0.8 < (errors.square().mean() / density.var(dim=0).mean()).sqrt() < 1.2
    assert torch.trapezoid((density[0] - exact).abs(), grid) < 0.1
    assert torch.trapezoid(distance, grid) < 0.03
    means = [group.mean_of(torch.exp) for group in groups]
    assert_unbiased(
        torch.tensor([m.value for m in means]),
        torch.tensor([m.standard_error for m in means]),
        values.exp().mean(),
    )
    assert together.extremes == pytest.approx((values.min().item(), values.max().item()), abs=1e-8)


def test_the_cumulative_density_counts_eigenvalues() -> None:
    values = torch.tensor([0.0] * 20 + [1.0] * 10 + [5.0] * 10, dtype=F64)
    density = spectral_density(MatrixOperator(rotated(values)), 60, 5)
    grid = torch.tensor([-0.5, 0.5, 2.0, 6.0])
    fraction, error = density.cumulative(grid)
    expected = torch.tensor([0, 0.5, 0.75, 1], dtype=F64)
    assert ((fraction - expected).abs() <= 3 * error + 1e-12).all()
    assert (error[1:3] > 1e-3).all()
    assert (error < 0.05).all()


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_the_density_of_a_multiple_of_the_identity_is_a_point(value: float) -> None:
    density = spectral_density(value * IdentityOperator(9, F64), 3, 20)
    assert density.extremes == pytest.approx((value, value))
    assert density.num_products == 3
    width = 0.01 * (value or 1.0)
    assert density.default_width == pytest.approx(width)
    height, error = density.on(torch.tensor([value]))
    assert height.item() == pytest.approx(1 / (math.sqrt(2 * math.pi) * width))
    assert error.item() == pytest.approx(0.0, abs=1e-9)
    assert density.mean_of(torch.square).value == pytest.approx(value**2)


def test_groups_that_fit_into_memory_give_the_same() -> None:
    operator = Recorded(rotated(SPECTRA["both signs"]))
    whole = spectral_density(operator, 5, 10)
    operator.batches.clear()
    parts = spectral_density(operator, 5, 10, max_bytes=2 * N * (14 * 8 + 24))
    assert operator.batches == [2] + [2] * 20 + [1] * 10
    assert torch.allclose(parts.nodes, whole.nodes, atol=1e-12)
    assert torch.allclose(parts.weights, whole.weights, atol=1e-12)
    with pytest.raises(MemoryLimitError, match=r"num_steps"):
        spectral_density(operator, 5, 10, max_bytes=N * 10 * 8)


def test_densities_refuse_what_they_cannot_answer() -> None:
    density = spectral_density(MatrixOperator(rotated(SPECTRA["both signs"])), 3, 10)
    grid = torch.linspace(0, 1, 3)
    with pytest.raises(NonFiniteError, match="Ritz value"):
        density.mean_of(torch.log)
    with pytest.raises(ShapeError, match="entry by entry"):
        density.mean_of(torch.sum)
    with pytest.raises(ArgumentTypeError, match="return a tensor"):
        density.mean_of(lambda nodes: 1.0)  # type: ignore[arg-type,return-value]
    for width in (0.0, -1.0, math.nan):
        with pytest.raises(ArgumentError, match="width"):
            density.on(grid, width)
    with pytest.raises(ShapeError, match="grid"):
        density.cumulative(grid.reshape(1, 3))
    one = SpectralDensity(density.nodes[:1], density.weights[:1], N, 10)
    with pytest.raises(ArgumentError, match="at least two"):
        one.on(grid)


# --- log-determinants --------------------------------------------------------------------


def kfac() -> KfacOperator:
    given = digits()
    return KfacOperator(given.model, given.loss, [(given.x, given.y)])


def low_rank(*values: float) -> LowRankProductOperator:
    basis = torch.linalg.qr(torch.randn(8, len(values), generator=seeded(1), dtype=F64))[0]
    return LowRankProductOperator(
        LowRankProductRepresentation(torch.tensor(values, dtype=F64), basis)
    )


def spd(seed: int = 0) -> MatrixOperator:
    return MatrixOperator(rotated(torch.linspace(0.5, 4, 8, dtype=F64), seed))


DIAGONAL = DiagonalOperator(torch.tensor([0.5, 2.0, 7.0], dtype=F64))
STRUCTURED: dict[str, Callable[[], TensorOperator]] = {
    "identity": lambda: IdentityOperator(4, F64),
    "multiple of the identity": lambda: (3 * IdentityOperator(4, F64)).shift(-1.0),
    "diagonal": lambda: DIAGONAL,
    "negative multiple": lambda: (-2 * DIAGONAL).shift(20.0),
    "shift of a shift": lambda: (2 * DIAGONAL.shift(1.0)).shift(-1.0),
    "matrix": spd,
    "shifted matrix": lambda: (0.5 * spd()).shift(-0.2),
    "low rank with a shift": lambda: low_rank(3.0, 1.0, -0.05).shift(0.1),
    "multiple of low rank": lambda: (-1 * low_rank(-3.0, 0.5)).shift(0.6),
    "full rank": lambda: low_rank(*range(1, 9)),
    "Kronecker factors": lambda: kfac().shift(0.1),
    "negative Kronecker factors": lambda: (-1 * kfac()).shift(100.0),
    "blocks": lambda: BlockDiagonalOperator([spd(), DIAGONAL]).shift(0.5),
    "product": lambda: 2 * (spd() @ spd(1)),
    "inverse of a diagonal": DIAGONAL.inverse,
    "shifted inverse": lambda: (2 * spd().shift(1.0).inverse()).shift(0.3),
    "inverse of low rank": lambda: LowRankOperator(
        low_rank(3.0, 1.0).low_rank_representation, regularization=0.1
    ),
    "inverse of Kronecker factors": lambda: kfac().inverse(regularization=0.1),
    "inverse by a solver": lambda: CgOperator(spd(), 0.5),
    "inverse of a product": lambda: (spd() @ spd(1)).inverse(),
    "direct inverse": lambda: DirectSolveOperator(spd().matrix, 0.5),
}


@pytest.mark.parametrize("name", STRUCTURED)
def test_log_determinants_of_structured_operators_take_no_product(name: str) -> None:
    operator = STRUCTURED[name]()
    estimate = logdet(operator)
    sign, expected = torch.linalg.slogdet(operator.to_dense())
    assert sign > 0
    assert estimate.value == pytest.approx(expected.item(), rel=1e-9, abs=1e-9)
    assert (estimate.standard_error, estimate.num_products) == (0.0, 0)
    assert estimate.method == "exact"


INDEFINITE = {
    "identity": (lambda: -IdentityOperator(3, F64), "-1.0"),
    "diagonal": (lambda: DIAGONAL.shift(-1.0), "-5.0"),
    "matrix": (lambda: spd().shift(-1.0), "-5.0"),
    "low rank": (lambda: low_rank(1.0).shift(-0.5), "-5.0"),
    "blocks": (lambda: BlockDiagonalOperator([spd(), DIAGONAL]).shift(-0.6), "-1.0"),
    "inverse": (lambda: DIAGONAL.shift(-1.0).inverse(), "-5.0"),
    "Kronecker factors": (lambda: kfac().shift(-100.0), "-1.0"),
    "network": (lambda: digits().hessian, ""),
    "no formula": (lambda: spd().shift(-1.0) + low_rank(0.1), "-4.8"),
}


@pytest.mark.parametrize("name", INDEFINITE)
def test_indefinite_operators_have_no_log_determinant(name: str) -> None:
    make, smallest = INDEFINITE[name]
    with pytest.raises(StructureError, match=f"smallest.*{smallest}"):
        logdet(make())
    with pytest.raises(StructureError, match=r"smallest|negative"):
        logdet(make(), method="slq")


SINGULAR = {
    "zero": lambda: 0 * IdentityOperator(3, F64),
    "diagonal": lambda: DIAGONAL.shift(-0.5),
    "matrix": lambda: MatrixOperator(rotated(torch.arange(8, dtype=F64))),
    "matrix up to rounding": lambda: MatrixOperator(torch.tensor([[1, 1], [1, 1 + 2.4e-7]])),
    "low rank": lambda: low_rank(1.0, 2.0),
    "low rank in float32": lambda: MatrixOperator(low_rank(1.0, 2.0).to_dense().float()),
}


@pytest.mark.parametrize("method", ["auto", "slq"])
@pytest.mark.parametrize("name", SINGULAR)
def test_singular_operators_have_no_log_determinant(name: str, method: str) -> None:
    with pytest.raises((SingularOperatorError, StructureError), match=r"zero|negative|smallest"):
        logdet(SINGULAR[name](), method=method)


def test_a_network_that_is_singular_is_refused_and_a_quadrature_of_it_warned_of() -> None:
    # The pixels in the corners are always black.
    with pytest.raises(SingularOperatorError, match="zero to working precision"):
        logdet(digits().ggn)
    with pytest.warns(ConvergenceWarning, match="too large"):
        logdet(digits().ggn, method="slq", num_probes=2, num_steps=40)


def test_the_square_of_an_indefinite_operator_is_definite() -> None:
    A = MatrixOperator(rotated(torch.tensor([-2.0, 1.0, 3.0, -1.0, 0.5], dtype=F64)))
    for operator in (A @ A, (A @ A).shift(0.5)):
        expected = torch.linalg.slogdet(operator.to_dense())[1].item()
        assert logdet(operator).value == pytest.approx(expected, abs=1e-10)


def test_a_small_matrix_is_decomposed_and_a_large_one_is_not() -> None:
    operator = Recorded(rotated(torch.linspace(1, 3, N, dtype=F64)))
    small = logdet(operator, num_probes=6, num_steps=10)
    expected = torch.linspace(1, 3, N, dtype=F64).log().sum().item()
    assert (small.method, small.num_products) == ("exact", N + 2)
    assert small.value == pytest.approx(expected, rel=1e-12)
    large = logdet(operator, num_probes=5, num_steps=10)
    assert (large.method, large.num_products) == ("slq", 52)
    assert abs(large.value - expected) < 4 * large.standard_error
    assert logdet(operator, method="exact", num_probes=5, num_steps=10).value == small.value


def test_log_determinants_are_unbiased_and_their_standard_error_is_right() -> None:
    values = torch.logspace(-1, 1, 8, dtype=F64)
    operator = MatrixOperator(rotated(values))
    estimates = [
        logdet(operator, method="slq", num_probes=6, generator=seeded(s)) for s in range(200)
    ]
    assert_unbiased(
        torch.tensor([e.value for e in estimates]),
        torch.tensor([e.standard_error for e in estimates]),
        values.log().sum(),
    )


@pytest.mark.parametrize("shift", [1.0, 1e-2])
def test_the_log_determinant_of_a_shifted_network(shift: float) -> None:
    operator = digits().ggn.shift(shift)
    expected = torch.linalg.slogdet(operator.to_dense())[1].item()
    estimate = logdet(operator, method="slq", num_probes=20, num_steps=60)
    assert abs(estimate.value - expected) < 3 * estimate.standard_error
    assert 0 < estimate.standard_error < 0.02 * abs(expected) + 1
    assert logdet(operator, method="exact").value == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("steps", [8, 15, 30, 60, 150])
@pytest.mark.parametrize("exponent", [-5, -4, -1])
def test_quadratures_that_are_off_by_more_than_the_standard_error_are_said_to_be(
    exponent: int, steps: int, dtype: torch.dtype
) -> None:
    # Signs on a diagonal have no variance: all that is left is the error of the quadrature.
    values = torch.linspace(10.0**exponent, 1, 500, dtype=F64)
    operator = DiagonalOperator(values.to(dtype))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        estimate = logdet(operator, method="slq", num_probes=2, num_steps=steps)
    exact = values.log().sum().item()
    excess = estimate.value - exact
    assert excess > -1e-4 * abs(exact)
    if not seen:
        assert excess <= 1e-4 * abs(exact)
    else:
        assert seen[0].category is ConvergenceWarning
        assert "num_steps" in str(seen[0].message)
    assert bool(seen) == (excess > 1e-5 * abs(exact)) or excess < 3e-5 * abs(exact)


# --- all of them -------------------------------------------------------------------------

ESTIMATORS: dict[str, Callable[..., object]] = {
    "eigenpairs": lambda A, **options: eigenpairs(A, 2, **options),
    "lobpcg": lambda A, **options: eigenpairs(A, 2, "both", "lobpcg", **options),
    "spectral_density": lambda A, **options: spectral_density(A, 3, 8, **options),
    "logdet": lambda A, **options: logdet(A, method="slq", num_probes=3, **options),
}


def tensors_of(result: object) -> list[Tensor]:
    return [torch.as_tensor(value) for value in vars(result).values() if not isinstance(value, str)]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_equal_calls_give_equal_results_and_leave_the_global_state(name: str) -> None:
    operator = MatrixOperator(rotated(torch.linspace(1, 3, N, dtype=F64)))
    before = torch.get_rng_state()
    runs = [ESTIMATORS[name](operator) for _ in range(2)]
    runs += [ESTIMATORS[name](operator, generator=seeded(s)) for s in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    first, second, third, fourth, fifth = (tensors_of(run) for run in runs)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, third, fourth))
    assert not all(map(torch.equal, third, fifth))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_autocast_and_inference_mode_change_nothing(name: str) -> None:
    operator = MatrixOperator(rotated(torch.linspace(1, 3, N, dtype=F64)).float(), symmetric=True)
    expected = tensors_of(ESTIMATORS[name](operator))
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        found = tensors_of(ESTIMATORS[name](operator))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_default_device_changes_nothing(name: str) -> None:
    operator = MatrixOperator(rotated(torch.linspace(1, 3, N, dtype=F64)))
    expected = tensors_of(ESTIMATORS[name](operator))
    with torch.device("meta"):
        found = ESTIMATORS[name](operator)
    assert all(map(torch.equal, tensors_of(found), expected))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_operators_that_are_not_symmetric_are_refused(name: str) -> None:
    matrix = torch.randn(N, N, dtype=F64)
    for operator in (MatrixOperator(matrix, symmetric=False), Recorded(matrix)):
        with pytest.raises(StructureError, match="is not symmetric"):
            ESTIMATORS[name](operator)
    assert MatrixOperator(matrix).symmetric is False


@pytest.mark.parametrize("name", ESTIMATORS)
def test_products_that_are_not_finite_are_refused(name: str) -> None:
    class Overflowing(Recorded):
        def _apply_rows(self, rows: Tensor) -> Tensor:
            done = sum(self.batches)
            return super()._apply_rows(rows) * (math.inf if done > 20 else 1.0)

    with pytest.raises(NonFiniteProductError):
        ESTIMATORS[name](Overflowing(rotated(torch.linspace(1, 3, N, dtype=F64))))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_progress_is_shown_when_asked_for(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    operator = MatrixOperator(rotated(torch.linspace(1, 3, N, dtype=F64)))
    ESTIMATORS[name](operator)
    assert capsys.readouterr().err == ""
    ESTIMATORS[name](operator, progress=True)
    assert "product" in capsys.readouterr().err


@pytest.mark.parametrize("name", ESTIMATORS)
def test_what_is_no_operator_of_single_or_double_precision_is_refused(name: str) -> None:
    with pytest.raises(ArgumentTypeError, match="MatrixOperator"):
        ESTIMATORS[name](torch.eye(4))
    with pytest.raises(DtypeError, match="float32 or float64"):
        ESTIMATORS[name](IdentityOperator(30, torch.bfloat16))
    with pytest.raises(ArgumentTypeError, match="generator"):
        ESTIMATORS[name](IdentityOperator(30), generator=3)


MISUSES: dict[str, tuple[Callable[[TensorOperator], object], type[Exception], str]] = {
    "k": (lambda A: eigenpairs(A, 0), ArgumentError, "k must be"),
    "which": (lambda A: eigenpairs(A, 2, "LA"), ArgumentError, "largest"),
    "method": (lambda A: eigenpairs(A, 2, method="qr"), ArgumentError, "arpack"),
    "tol": (lambda A: eigenpairs(A, 2, tol=-1.0), ArgumentError, "tol must"),
    "max_iter": (lambda A: eigenpairs(A, 2, max_iter=0), ArgumentError, "max_iter"),
    "Krylov": (lambda A: eigenpairs(A, 2, krylov_dimension=2), ArgumentError, "krylov_dimension"),
    "GPU": (lambda A: eigenpairs(A, 2, eigen_computation_on_gpu=True), ArgumentError, "CUDA"),
    "GPU with LOBPCG": (
        lambda A: eigenpairs(A, 2, method="lobpcg", eigen_computation_on_gpu=True),
        ArgumentError,
        "arpack",
    ),
    "num_probes": (lambda A: spectral_density(A, 1), ArgumentError, "num_probes"),
    "num_steps": (lambda A: spectral_density(A, 2, 0), ArgumentError, "num_steps"),
    "float probes": (lambda A: spectral_density(A, 2.0), ArgumentTypeError, "num_probes"),
    "logdet probes": (lambda A: logdet(A, num_probes=1), ArgumentError, "num_probes"),
    "logdet steps": (lambda A: logdet(A, num_steps=0), ArgumentError, "num_steps"),
    "logdet method": (lambda A: logdet(A, method="lu"), ArgumentError, "slq"),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_arguments_that_do_not_fit_are_named(misuse: str) -> None:
    call, error, message = MISUSES[misuse]
    with pytest.raises(error, match=message):
        call(IdentityOperator(30))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_gpu_gives_what_the_cpu_gives(name: str) -> None:
    operator = MatrixOperator(rotated(torch.linspace(1, 3, N, dtype=F64)))
    # The number of products may depend on rounding.
    expected = tensors_of(ESTIMATORS[name](operator))[:-1]
    found = tensors_of(ESTIMATORS[name](operator.to("cuda")))[:-1]
    for result, exact in zip(found, expected, strict=True):
        # Eigenvectors up to their signs.
        assert torch.allclose(result.cpu().double().abs(), exact.double().abs(), atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("which", ENDS)
def test_cupy_finds_the_same_eigenpairs(which: str) -> None:
    pytest.importorskip("cupy")
    values = SPECTRA["both signs"]
    operator = MatrixOperator(rotated(values)).to("cuda")
    pairs = eigenpairs(operator, 5, which, eigen_computation_on_gpu=True)
    assert pairs.vectors.device.type == "cuda"
    assert torch.allclose(pairs.values.cpu(), wanted(values, which, 5), atol=1e-9)
