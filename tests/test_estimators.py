from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hessops import (
    BlockDiagonalOperator,
    DiagonalOperator,
    EkfacOperator,
    HessianOperator,
    IdentityOperator,
    JacobiPreconditioner,
    KfacOperator,
    LowRankOperator,
    LowRankProductOperator,
    LowRankProductRepresentation,
    MatrixOperator,
    ParameterSpace,
    TensorOperator,
)
from hessops.errors import (
    ArgumentError,
    ArgumentTypeError,
    DeviceError,
    MemoryLimitError,
    NonFiniteProductError,
    StructureError,
)
from hessops.estimators import Estimate, diagonal, norm, trace
from hessops.functional.krylov import ritz_pairs
from hessops.operators import probing
from hessops.operators.diagonal import DiagonalBlock
from hessops.operators.eigen import DenseEigenOperator
from hessops.progress import Bar
from hessops.randomness import rademacher, standard_normal

SEEDS = 200
PRODUCTS = 24


class Opaque(TensorOperator):
    """A matrix of which nothing is known but its products, which are counted."""

    def __init__(self, matrix: Tensor, *, symmetric: bool = True) -> None:
        super().__init__(len(matrix), matrix.dtype, matrix.device, symmetric=symmetric)
        self.matrix = matrix
        self.num_products = self.num_passes = 0

    def _counted(self, products: Tensor) -> Tensor:
        self.num_products += len(products)
        self.num_passes += 1
        return products

    def _apply_rows(self, rows: Tensor) -> Tensor:
        return self._counted(rows @ self.matrix.T)


class WithAdjoint(Opaque):
    """The same, with products by its transpose."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix, symmetric=False)

    def _apply_rows_adjoint(self, rows: Tensor) -> Tensor:
        return self._counted(rows @ self.matrix)


def orthogonal(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn)[0]


def symmetric_matrix(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    basis = orthogonal(len(eigenvalues), seed)
    return (basis * eigenvalues) @ basis.T


def number(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def powers(size: int, exponent: float) -> Tensor:
    return torch.arange(1, size + 1, dtype=torch.float64) ** exponent


@cache
def digits_hessian() -> HessianOperator:
    """Of a small network on 300 images of 4 x 4 pixels, after some steps of training."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:300]).reshape(-1, 1, 8, 8) / 16
    x, y = nn.functional.avg_pool2d(x, 2).flatten(1), torch.tensor(labels[:300])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 10)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return HessianOperator(model, nn.CrossEntropyLoss(), [(x[:200], y[:200]), (x[200:], y[200:])])


@cache
def digits_matrix() -> Tensor:
    matrix = digits_hessian().linearize().to_dense()
    return (matrix + matrix.T) / 2


def symmetric() -> Opaque:
    """With eigenvalues of either sign, as a Hessian has them."""
    return Opaque(symmetric_matrix(powers(60, -1.5) * (1 - 1.5 * (torch.arange(60) % 3 == 1))))


def not_symmetric() -> WithAdjoint:
    rotated = (orthogonal(60, 1) * powers(60, -1.5)) @ orthogonal(60, 2)
    return WithAdjoint(rotated + symmetric_matrix(powers(60, -1.5)))


OPERATORS: dict[str, Callable[[], Opaque]] = {
    "symmetric": symmetric,
    "not symmetric": not_symmetric,
    "digits": lambda: Opaque(digits_matrix()),
}
Estimator = Callable[..., Estimate]
METHODS: dict[str, tuple[Estimator, str]] = {
    "trace, hutchinson": (trace, "hutchinson"),
    "trace, hutch++": (trace, "hutch++"),
    "trace, xtrace": (trace, "xtrace"),
    "diagonal, hutchinson": (diagonal, "hutchinson"),
    "diagonal, xdiag": (diagonal, "xdiag"),
    "norm, fro": (norm, "fro"),
}
EXACT: dict[Estimator, Callable[[Tensor], Tensor]] = {
    trace: torch.trace,
    diagonal: torch.diagonal,
    norm: torch.linalg.matrix_norm,
}
each_method = pytest.mark.parametrize("name", METHODS)


@dataclass
class Draws:
    """Estimates over many seeds."""

    values: Tensor
    errors: Tensor
    exact: Tensor

    @property
    def spread(self) -> Tensor:
        return self.values.std(dim=0)


@cache
def draws(name: str, kind: str) -> Draws:
    estimator, method = METHODS[name]
    operator = OPERATORS[kind]()
    found = [
        estimator(operator, method, num_products=PRODUCTS, generator=seeded(seed))
        for seed in range(SEEDS)
    ]
    return Draws(
        torch.stack([number(estimate.value) for estimate in found]),
        torch.stack([number(estimate.standard_error) for estimate in found]),
        EXACT[estimator](operator.matrix),
    )


# --- right on average, and how far off ---------------------------------------------------


@pytest.mark.parametrize("kind", OPERATORS)
@each_method
def test_estimates_are_unbiased(name: str, kind: str) -> None:
    found = draws(name, kind)
    values, exact = found.values, found.exact
    if name == "norm, fro":  # whose square is
        values, exact = values.square(), exact.square()
    z = (values.mean(dim=0) - exact) / (values.std(dim=0) / SEEDS**0.5)
    if z.ndim == 0:
        assert abs(z) < 3
    else:
        # Of many entries some are beyond three standard errors.
        assert z.square().mean() < 1.5
        assert (z.abs() < 3).double().mean() > 0.95


@pytest.mark.parametrize("kind", OPERATORS)
@each_method
def test_the_standard_error_is_right_within_a_fifth(name: str, kind: str) -> None:
    found = draws(name, kind)
    reported = found.errors.square().mean(dim=0).sqrt()
    assert 0.8 < reported.norm() / found.spread.norm() < 1.2
    if reported.ndim:
        ratios = reported / found.spread
        assert ((ratios > 0.8) & (ratios < 1.2)).double().mean() > 0.95


@pytest.mark.parametrize("kind", ["symmetric", "digits"])
@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("trace, hutch++", "trace, hutchinson"),
        ("trace, xtrace", "trace, hutchinson"),
        ("diagonal, xdiag", "diagonal, hutchinson"),
    ],
)
def test_a_sketch_beats_hutchinson_at_equal_products(name: str, plain: str, kind: str) -> None:
    def error(which: str) -> Tensor:
        found = draws(which, kind)
        return (found.values - found.exact).square().mean().sqrt()

    assert error(name) < error(plain) / 2


@each_method
def test_a_model_and_its_dense_matrix_have_the_same_estimates(name: str) -> None:
    estimator, method = METHODS[name]
    of_model = estimator(digits_hessian(), method, num_products=PRODUCTS, generator=seeded(3))
    found = draws(name, "digits")
    torch.testing.assert_close(number(of_model.value), found.values[3])
    torch.testing.assert_close(number(of_model.standard_error), found.errors[3])


# --- by definition -----------------------------------------------------------------------


def projection(columns: Tensor) -> Tensor:
    """On the range of some columns."""
    basis, _ = torch.linalg.qr(columns)
    return basis @ basis.T


def pair_covariance(sample: Callable[[int, list[int]], Tensor], count: int) -> Tensor:
    """The mean of what j adds to sample i times what i adds to sample j, one pair at a time."""

    def without(*left_out: int) -> list[int]:
        return [index for index in range(count) if index not in left_out]

    def added(i: int, j: int) -> Tensor:
        return sample(i, without(i)) - sample(i, without(i, j))

    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    return torch.stack([added(i, j) * added(j, i) for i, j in pairs]).mean(dim=0)


def test_hutch_plus_plus_samples_what_the_sketch_leaves() -> None:
    operator, rank, count = not_symmetric(), 4, 5
    matrix, source, size = operator.matrix, seeded(7), operator.input_size
    kind = {"dtype": torch.float64, "device": torch.device("cpu")}
    onto = projection(matrix @ standard_normal((rank, size), source, **kind).T)
    left = rademacher((count, size), source, **kind) @ (torch.eye(size) - onto)
    samples = ((left @ matrix) * left).sum(dim=1)
    found = trace(operator, "hutch++", num_products=2 * rank + count, generator=seeded(7))
    expected = (onto @ matrix).trace() + samples.mean()
    assert found.value == pytest.approx(expected.item(), rel=1e-10)
    assert found.standard_error == pytest.approx(samples.std().item() / count**0.5, rel=1e-10)


def test_xtrace_leaves_one_vector_out_of_each_sketch() -> None:
    operator, count = not_symmetric(), 5
    matrix, size = operator.matrix, operator.input_size
    probes = standard_normal(
        (count, size), seeded(7), dtype=torch.float64, device=torch.device("cpu")
    )

    def sample(i: int, others: list[int]) -> Tensor:
        onto = projection(matrix @ probes[others].T)
        rest = probes[i] - onto @ probes[i]
        scale = (size - len(others)) / (rest @ rest)
        return (onto @ matrix).trace() + scale * (rest @ matrix @ rest)

    samples = torch.stack([sample(i, [j for j in range(count) if j != i]) for i in range(count)])
    variance = samples.var() / count + pair_covariance(sample, count).clamp(min=0)
    found = trace(operator, "xtrace", num_products=2 * count, generator=seeded(7))
    assert found.value == pytest.approx(samples.mean().item(), rel=1e-10)
    assert found.standard_error == pytest.approx(variance.sqrt().item(), rel=1e-6)


def test_xdiag_leaves_one_vector_out_of_each_sketch() -> None:
    operator, count = not_symmetric(), 5
    matrix, size = operator.matrix, operator.input_size
    source = seeded(7)
    signs = rademacher((count, size), source, dtype=torch.float64, device=torch.device("cpu"))
    probes = signs * (0.75 + torch.rand(count, size, generator=source, dtype=torch.float64) / 2)

    def sample(i: int, others: list[int]) -> Tensor:
        onto, image = projection(matrix @ probes[others].T), matrix @ probes[i]
        return (onto @ matrix).diagonal() + (image - onto @ image) / probes[i]

    samples = torch.stack([sample(i, [j for j in range(count) if j != i]) for i in range(count)])
    variance = samples.var(dim=0) / count
    ratio = pair_covariance(sample, count).sum() / variance.sum()
    found = diagonal(operator, "xdiag", num_products=2 * count, generator=seeded(7))
    torch.testing.assert_close(found.value, samples.mean(dim=0))
    expected = (variance * (1 + ratio.clamp(min=0))).sqrt()
    torch.testing.assert_close(found.standard_error, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("estimator", "method"), [(trace, "hutch++"), (trace, "xtrace"), (diagonal, "xdiag")]
)
def test_a_matrix_of_lower_rank_than_its_sketch_is_found_exactly(
    estimator: Estimator, method: str
) -> None:
    few = torch.zeros(60, dtype=torch.float64)
    few[:5] = 1.0
    # In the second one no vector says anything of most coordinates.
    for matrix in (symmetric_matrix(few), few.diag(), torch.zeros(60, 60, dtype=torch.float64)):
        for seed in range(30):
            found = estimator(Opaque(matrix), method, num_products=18, generator=seeded(seed))
            error = number(found.value) - EXACT[estimator](matrix)
            assert error.abs().max() < 1e-12
            assert number(found.standard_error).max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_a_basis_rounded_to_a_narrow_dtype_is_orthonormal_again(
    method: str, dtype: torch.dtype
) -> None:
    few = torch.zeros(60, dtype=dtype)
    few[:5] = 1.0  # products with it are not rounded
    found = trace(Opaque(few.diag()), method, num_products=18)  # type: ignore[arg-type]  # a literal
    assert found.value == pytest.approx(5.0, abs=1e-12)


# --- what is exact -----------------------------------------------------------------------


def kfac(kind: type[KfacOperator]) -> KfacOperator:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    x, y = torch.randn(9, 2, 3, 3).double(), torch.arange(9) % 3
    return kind(model.double(), nn.CrossEntropyLoss(), [(x, y)])


def low_rank() -> LowRankProductRepresentation:
    values = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)
    return LowRankProductRepresentation(values, orthogonal(6, 0)[:, :3].contiguous())


def diagonal_operator() -> DiagonalOperator:
    return DiagonalOperator(torch.tensor([1.0, -4.0, 2.0, 0.0, 0.5, 3.0], dtype=torch.float64))


def matrix_operator() -> MatrixOperator:
    return MatrixOperator(torch.randn(6, 6, generator=seeded(0), dtype=torch.float64))


def eigen_operator() -> DenseEigenOperator:
    return DenseEigenOperator(powers(6, 1) - 2, orthogonal(6, 3))


def named_blocks() -> BlockDiagonalOperator:
    """Blocks whose parameters do not follow one another."""
    space = ParameterSpace.from_tensors(
        {"a": torch.zeros(2).double(), "b": torch.zeros(3).double(), "c": torch.zeros(1).double()}
    )
    apart = MatrixOperator(matrix_operator().matrix[:3, :3], space=space.subspace(["a", "c"]))
    return BlockDiagonalOperator(
        [apart, DiagonalOperator(powers(3, 1), space=space.subspace(["b"]))], space=space
    )


KNOWN: dict[str, Callable[[], TensorOperator]] = {
    "identity": lambda: IdentityOperator(6, torch.float64),
    "diagonal": diagonal_operator,
    "matrix": matrix_operator,
    "eigen": eigen_operator,
    "low rank": lambda: LowRankProductOperator(low_rank()),
    "inverse of low rank": lambda: LowRankOperator(low_rank(), 2.0),
    "inverse on a range": lambda: LowRankOperator(low_rank(), 2.0, exact=False),
    "closed inverse": lambda: eigen_operator().shift(5.0).inverse(),
    "kfac": lambda: kfac(KfacOperator),
    "ekfac": lambda: kfac(EkfacOperator),
    "inverse of kfac": lambda: kfac(KfacOperator).inverse(regularization=0.1),
    "blocks": lambda: BlockDiagonalOperator([diagonal_operator(), eigen_operator()]),
    "named blocks": named_blocks,
    "block": lambda: DiagonalBlock(matrix_operator(), torch.tensor([4, 1])),
    "multiple": lambda: -2.0 * matrix_operator(),
    "shift": lambda: eigen_operator().shift(-1.5),
    "shifted matrix": lambda: matrix_operator().shift(2.0),
    "sum": lambda: matrix_operator() + diagonal_operator() - 3.0 * eigen_operator(),
    "transpose": lambda: matrix_operator().T,
}
# Norms of sums, and singular values of plain matrices, do not follow from those of the parts.
UNKNOWN_NORMS = {"block", "shifted matrix", "sum"}
WITHOUT_EIGENVALUES = UNKNOWN_NORMS | {"matrix", "multiple", "named blocks", "transpose"}


@pytest.mark.parametrize("kind", KNOWN)
def test_what_an_operator_knows_takes_no_product(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = KNOWN[kind]()
    dense = operator.to_dense()
    monkeypatch.setattr(type(operator), "_apply_rows", None)
    cases: list[tuple[Estimate, Tensor]] = [
        (trace(operator), dense.trace()),
        (diagonal(operator), dense.diagonal()),
    ]
    if kind not in UNKNOWN_NORMS:
        cases.append((norm(operator), dense.norm()))
    if kind not in WITHOUT_EIGENVALUES:
        cases.append((norm(operator, 2), torch.linalg.matrix_norm(dense, 2)))
    for found, expected in cases:
        torch.testing.assert_close(number(found.value), expected)
        assert number(found.standard_error).abs().max() == 0
        assert (found.method, found.num_products) == ("exact", 0)


@pytest.mark.parametrize("estimator", [trace, diagonal])
def test_only_what_is_not_known_of_a_sum_is_estimated(estimator: Estimator) -> None:
    unknown, known = symmetric(), DiagonalOperator(powers(60, 0.5))
    operator = (2.0 * (unknown + known)).shift(0.25)
    found = estimator(operator, num_products=10, generator=seeded(1))
    alone = estimator(2.0 * unknown, num_products=10, generator=seeded(1))
    added = number(found.value) - number(alone.value)
    expected = EXACT[estimator]((2 * powers(60, 0.5) + 0.25).diag())
    torch.testing.assert_close(added, expected)
    assert torch.equal(*map(number, (found.standard_error, alone.standard_error)))
    assert (found.method, found.num_products) == (alone.method, 10)


@each_method
def test_with_as_many_products_as_rows_unit_vectors_are_exact(name: str) -> None:
    estimator, method = METHODS[name]
    operator = not_symmetric()
    found = estimator(operator, method, num_products=61)
    expected = EXACT[estimator](operator.matrix)
    torch.testing.assert_close(number(found.value), expected, rtol=1e-13, atol=1e-14)
    assert not number(found.standard_error).any()
    assert (found.method, found.num_products) == ("exact", 60)
    assert operator.num_products == 60


# --- the spectral norm -------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPERATORS)
def test_the_spectral_norm_is_found_and_the_iteration_ends(kind: str) -> None:
    operator = OPERATORS[kind]()
    found = norm(operator, 2, num_products=150)
    exact = torch.linalg.matrix_norm(operator.matrix, 2).item()
    assert found.value == pytest.approx(exact, rel=1e-14)
    assert found.standard_error < 1e-14 * exact
    assert found.num_products == operator.num_products < 150


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("num_products", [2, 4, 8, 12])
def test_the_bound_holds_a_singular_value(kind: str, num_products: int) -> None:
    operator = OPERATORS[kind]()
    found = norm(operator, 2, num_products=num_products, generator=seeded(num_products))
    values = torch.linalg.svdvals(operator.matrix)
    assert (values - found.value).abs().min() <= found.standard_error
    assert found.value <= values[0] * (1 + 1e-14)
    assert found.num_products == num_products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OPERATORS)
def test_the_bound_counts_the_precision_of_the_dtype(kind: str, dtype: torch.dtype) -> None:
    operator = OPERATORS[kind]()
    narrow = type(operator)(operator.matrix.to(dtype))
    found = norm(narrow, 2)
    exact = torch.linalg.matrix_norm(narrow.matrix.double(), 2)
    assert abs(found.value - exact) <= found.standard_error < 5 * torch.finfo(dtype).eps * exact


def test_ritz_pairs_that_are_enough_have_their_true_residuals() -> None:
    matrix = symmetric().matrix
    for most in (1, 3):
        pairs = ritz_pairs(
            matrix.mv,
            60,
            max_iter=30,
            tol=0.0,
            generator=seeded(0),
            device=torch.device("cpu"),
            is_enough=lambda values, _, most=most: len(values) >= most,
        )
        assert len(pairs.values) == most
        residuals = (matrix @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
        torch.testing.assert_close(pairs.residual_norms, residuals)


def test_the_norms_of_nothing_are_zero() -> None:
    zero = torch.zeros(9, 9, dtype=torch.float64)
    for operator in (Opaque(zero), WithAdjoint(zero)):
        for order in ("fro", 2):
            found = norm(operator, order, num_products=4)  # type: ignore[arg-type]  # a literal
            assert (found.value, found.standard_error) == (0.0, 0.0)


# --- products ----------------------------------------------------------------------------


@pytest.mark.parametrize("num_products", [4, 7, 12])
@pytest.mark.parametrize("name", [*METHODS, "norm, 2"])
def test_products_are_counted_honestly(name: str, num_products: int) -> None:
    estimator, method = METHODS.get(name, (norm, 2))
    operator = not_symmetric()
    found = estimator(operator, method, num_products=num_products)
    assert found.num_products == operator.num_products
    assert num_products - 2 < found.num_products <= num_products


@pytest.mark.parametrize(
    ("name", "num_passes"),
    [(name, 1 if "hutchinson" in name or "fro" in name else 2) for name in METHODS],
)
def test_all_vectors_share_a_pass_over_the_data(name: str, num_passes: int) -> None:
    estimator, method = METHODS[name]
    operator = symmetric()
    estimator(operator, method, num_products=PRODUCTS)
    assert operator.num_passes == num_passes


@each_method
def test_what_does_not_fit_memory_at_once_goes_in_chunks(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimator, method = METHODS[name]
    results = []
    for num_bytes in (2**28, 60 * 8 * 7):
        monkeypatch.setattr(probing, "DENSE_CHUNK_BYTES", num_bytes)
        for num_products in (PRODUCTS, 60):
            found = estimator(symmetric(), method, num_products=num_products, generator=seeded(0))
            results.append((number(found.value), number(found.standard_error)))
    for whole, in_chunks in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(whole, in_chunks)


def test_graphs_are_retained_where_there_are_several_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Linearizable(Opaque):
        def _linearized(self, call: object) -> Opaque:
            return Opaque(self.matrix)

    def passes_of_its_own(estimator: Estimator, method: str) -> int:
        operator = Linearizable(symmetric().matrix)
        estimator(operator, method, num_products=PRODUCTS)
        return operator.num_passes

    assert [passes_of_its_own(*of) for of in METHODS.values()] == [1, 0, 0, 1, 0, 1]
    monkeypatch.setattr(probing, "DENSE_CHUNK_BYTES", 60 * 8 * 7)
    assert not any(passes_of_its_own(*of) for of in METHODS.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["symmetric", "not symmetric"])
@each_method
def test_narrow_dtypes_are_summed_in_float64(name: str, kind: str, dtype: torch.dtype) -> None:
    estimator, method = METHODS[name]
    operator = OPERATORS[kind]()
    narrow = type(operator)(operator.matrix.to(dtype))
    errors, reported = [], []
    for seed in range(20):
        found = estimator(narrow, method, num_products=PRODUCTS, generator=seeded(seed))
        value, error = number(found.value), number(found.standard_error)
        errors.append(value - EXACT[estimator](narrow.matrix.double()))
        reported.append(error)
    if estimator is diagonal:
        assert value.dtype == error.dtype == torch.float64
    ratio = torch.stack(errors).norm() / torch.stack(reported).norm()
    assert 0.6 < ratio < 1.5


def test_the_jacobi_preconditioner_probes_the_same_diagonal() -> None:
    operator = symmetric()
    found = diagonal(operator, "hutchinson", num_products=9, generator=seeded(2))
    fitted = JacobiPreconditioner(9, generator=seeded(2)).fit(operator)
    ones = torch.ones(60, dtype=torch.float64)
    expected = torch.hypot(*map(number, (found.value, found.standard_error)))
    torch.testing.assert_close(1 / fitted.apply(ones), expected)


# --- randomness --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*METHODS, "norm, 2"])
def test_the_seed_decides_and_the_global_generator_stays(name: str) -> None:
    estimator, method = METHODS.get(name, (norm, 2))

    def value(generator: torch.Generator | None = None) -> Tensor:
        found = estimator(symmetric(), method, num_products=4, generator=generator)
        return number(found.value)

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = value(), value()
    assert torch.equal(first, second)
    assert torch.equal(first, value(seeded(5)))
    assert torch.equal(state, torch.get_rng_state())
    generator = seeded(5)
    assert not torch.equal(value(generator), value(generator))


# --- what is shown and refused -----------------------------------------------------------


@pytest.mark.parametrize("name", [*METHODS, "norm, 2"])
def test_a_bar_counts_products_when_asked(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    estimator, method = METHODS.get(name, (norm, 2))
    counts, totals = [], []
    advance, expect = Bar.advance, Bar.expect
    monkeypatch.setattr(Bar, "advance", lambda bar, n: (counts.append(n), advance(bar, n)))
    monkeypatch.setattr(Bar, "expect", lambda bar, n: (totals.append(n), expect(bar, n)))
    for num_products in (8, 70):
        estimator(symmetric(), method, num_products=num_products)
        assert capsys.readouterr().err == ""
        counts.clear()
        totals.clear()
        found = estimator(symmetric(), method, num_products=num_products, progress=True)
        assert name.split(",")[0] in capsys.readouterr().err
        assert sum(counts) == found.num_products
        all_units = num_products > 60 and name != "norm, 2"
        assert totals[:1] == [60] if all_units else totals in ([], [num_products])


@pytest.mark.parametrize("estimator", [trace, diagonal, norm])
@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"num_products": True}, ArgumentTypeError, "num_products must be an integer"),
        ({"num_products": 6.0}, ArgumentTypeError, "num_products must be an integer"),
        ({"num_products": 0}, ArgumentError, "num_products must be >= 1"),
        ({"num_products": 1}, ArgumentError, "num_products must be >= [24] for"),
        ({"generator": 0}, ArgumentTypeError, "generator must be"),
    ],
)
def test_arguments_are_checked(
    estimator: Estimator, keywords: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        estimator(symmetric(), **keywords)


@pytest.mark.parametrize("method", ["Hutchinson", "", None, 2, True])
def test_methods_are_known_by_name(method: object) -> None:
    for estimator in (trace, diagonal):
        with pytest.raises(ArgumentError, match="method must be one of"):
            estimator(symmetric(), method)  # type: ignore[arg-type]  # what is refused


@pytest.mark.parametrize("order", ["nuc", "2", 1, 2.0, True, None, math.inf])
def test_norms_are_known_by_order(order: object) -> None:
    with pytest.raises(ArgumentError, match="ord must be one of"):
        norm(symmetric(), order)  # type: ignore[arg-type]  # what is refused


@pytest.mark.parametrize("estimator", [trace, diagonal, norm])
def test_only_operators_with_values_are_estimated(estimator: Estimator) -> None:
    with pytest.raises(ArgumentTypeError, match="wrap a matrix as"):
        estimator(torch.eye(3))
    with pytest.raises(DeviceError, match="meta device"):
        estimator(IdentityOperator(3, device="meta"))


def test_methods_that_need_the_transpose_refuse_an_operator_without() -> None:
    operator = Opaque(not_symmetric().matrix, symmetric=False)
    with pytest.raises(
        StructureError, match=r"'xdiag' needs .* transpose.*'hutchinson' needs none"
    ):
        diagonal(operator, num_products=10)
    with pytest.raises(StructureError, match="ord=2 needs products with the transpose"):
        norm(operator, 2)
    assert operator.num_products == 0
    assert trace(operator, num_products=10).num_products == 10


@pytest.mark.parametrize("name", [*METHODS, "norm, 2"])
def test_products_that_are_not_finite_are_refused(name: str) -> None:
    estimator, method = METHODS.get(name, (norm, 2))
    broken = symmetric()
    broken.matrix[3, 4] = math.nan
    for num_products in (10, 60):
        with pytest.raises(NonFiniteProductError):
            estimator(broken, method, num_products=num_products)


def test_sums_that_are_not_finite_are_refused() -> None:
    huge = torch.full((9,), 1.5e308, dtype=torch.float64)
    with pytest.raises(NonFiniteProductError, match="overflows float64"):
        trace(DiagonalOperator(huge))
    with pytest.raises(NonFiniteProductError, match="overflows float64"):
        norm(Opaque(huge.diag()), num_products=4)


@pytest.mark.parametrize(
    ("estimator", "method"), [(trace, "hutch++"), (trace, "xtrace"), (diagonal, "xdiag"), (norm, 2)]
)
def test_sketches_that_would_not_fit_are_refused_before_any_product(
    estimator: Estimator, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hessops.estimators.arguments.available_bytes", lambda device: 10_000)
    operator = symmetric()
    with pytest.raises(MemoryLimitError, match="use fewer num_products"):
        estimator(operator, method, num_products=40)
    assert operator.num_products == 0
