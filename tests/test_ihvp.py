"""Inverse-Hessian-vector products of plain functions against dense references."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from reference import random_spd, relative_error
from torch import Tensor, nn

import hessops
from hessops import ihvp
from hessops.errors import (
    ConvergenceWarning,
    ForwardModeError,
    IndefiniteOperatorError,
    ModelError,
    NonFiniteProductError,
    SingularOperatorError,
)
from hessops.ihvp import IHVPUsageError

P = 6
MODES = ["rev-rev", "rev-fwd"]
DTYPES = [torch.float64, torch.float32]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def convex(weights: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """Softmax regression with a matrix of weights, and a convex penalty."""
    loss = nn.functional.cross_entropy(x @ weights, labels)
    return loss + 0.05 * weights.square().sum() + 0.01 * weights.pow(4).sum()


def problem(dtype: torch.dtype = torch.float64) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Arguments, integer labels among them, and the Hessian by the weights in float64."""
    torch.manual_seed(0)
    weights, x = torch.randn(3, 2, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    labels = torch.randint(2, (7,))
    dense = torch.autograd.functional.hessian(lambda w: convex(w, x, labels), weights)
    return (weights.to(dtype), x.to(dtype), labels), dense.reshape(P, P)


def right_hand_sides(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    rows = torch.randn(4, P, dtype=dtype)
    return [rows, rows[:1], rows[0], rows[:0]]


def assert_equals(
    function: Callable[[Tensor], Tensor], matrix: Tensor, dtype: torch.dtype, tolerance: float
) -> None:
    for v in right_hand_sides(dtype):
        result = function(v)
        assert result.shape == v.shape
        assert result.dtype == dtype
        assert not result.requires_grad
        if v.numel():
            assert relative_error(result.double(), v.double() @ matrix) < tolerance


# --- products ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("regularization", [0.0, 0.3])
@pytest.mark.parametrize("argnums", [0, -3, (0,)])
def test_products(
    argnums: int | tuple[int], regularization: float, mode: str, dtype: torch.dtype
) -> None:
    x, dense = problem(dtype)
    matrix = dense + regularization * torch.eye(P).double()
    product = ihvp.hvp(convex, argnums, mode, regularization)
    assert_equals(lambda v: product(x, v), matrix, dtype, TOLERANCE[dtype])
    at_x = ihvp.hvp_at_x(convex, x, argnums, mode, regularization)
    assert_equals(at_x, matrix, dtype, TOLERANCE[dtype])


def test_products_by_several_arguments_are_concatenated() -> None:
    a, b = torch.randn(2, 2).double(), torch.randn(3).double()

    def func(a: Tensor, scale: float, b: Tensor) -> Tensor:
        return scale * (a.sin().sum() * b.square()).sum() + a.pow(3).sum()

    flat = torch.cat([b, a.reshape(-1)])
    dense = torch.autograd.functional.hessian(lambda t: func(t[3:].reshape(2, 2), 2.0, t[:3]), flat)
    v = torch.randn(2, 7).double()
    for mode in MODES:
        result = ihvp.hvp(func, argnums=(-1, 0), mode=mode)((a, 2.0, b), v)
        assert relative_error(result, v @ dense) < 1e-12
    solved = ihvp.ihvp_explicit(func, (2, 0), regularization=9.0)((a, 2.0, b), v)
    assert relative_error(solved @ (dense + 9 * torch.eye(7).double()), v) < 1e-10


@pytest.mark.parametrize("mode", MODES)
def test_products_map_over_x(mode: str) -> None:
    x, _ = problem()
    weights = torch.stack([x[0], 2 * x[0], -x[0]])
    v = torch.randn(3, P).double()
    product = ihvp.hvp(convex, mode=mode)
    mapped = torch.func.vmap(product, in_dims=((0, None, None), 0))((weights, *x[1:]), v)
    for i in range(3):
        assert relative_error(mapped[i], product((weights[i], *x[1:]), v[i])) < 1e-12


def test_what_depends_on_x_alone_is_computed_once() -> None:
    calls = []

    def func(x: Tensor) -> Tensor:
        calls.append(1)
        return x.pow(3).sum()

    x = torch.randn(P).double()
    for make in (
        lambda: ihvp.hvp_at_x(func, (x,)),
        lambda: ihvp.ihvp_at_x_explicit(func, x, regularization=9.0),
        lambda: ihvp.ihvp_at_x_cg(func, x, regularization=20.0),
    ):
        function = make()
        before = len(calls)
        for v in right_hand_sides():
            function(v)
        assert len(calls) == before


def test_a_wrong_forward_derivative_is_refused() -> None:
    from test_functional import WrongForward

    x = torch.randn(3, dtype=torch.float64)
    with pytest.raises(ForwardModeError):
        ihvp.hvp(lambda x: WrongForward.apply(x).sum(), mode="rev-fwd")((x,), x)
    with pytest.raises(ForwardModeError):
        ihvp.ihvp_arnoldi(lambda x: WrongForward.apply(x).sum())((x,), x)


def test_a_backward_that_cannot_be_differentiated_is_refused() -> None:
    from test_functional import OnceTanh

    matrix = torch.randn(3, 3).double()

    def func(x: Tensor) -> Tensor:
        return OnceTanh.apply(matrix @ x).pow(2).sum() * x.sum()

    x = torch.randn(3).double()
    for solve in (ihvp.ihvp_explicit(func), ihvp.ihvp_cg(func)):
        with pytest.raises((ModelError, RuntimeError), match=r"symmetric|differentiate twice"):
            solve((x,), x)


# --- explicit and conjugate gradients ----------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("regularization", [0.0, 0.3])
def test_explicit_solves(regularization: float, dtype: torch.dtype) -> None:
    x, dense = problem(dtype)
    inverse = torch.linalg.inv(dense + regularization * torch.eye(P).double())
    solve = ihvp.ihvp_explicit(convex, regularization=regularization)
    assert_equals(lambda v: solve(x, v), inverse, dtype, TOLERANCE[dtype])
    at_x = ihvp.ihvp_at_x_explicit(convex, *x, regularization=regularization)
    assert_equals(at_x, inverse, dtype, TOLERANCE[dtype])


def test_a_singular_hessian_is_refused() -> None:
    with pytest.raises(SingularOperatorError):
        ihvp.ihvp_explicit(lambda x: x[:2].square().sum())((torch.ones(3),), torch.ones(3))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("regularization", [0.0, 0.3])
def test_cg_solves(regularization: float, mode: str) -> None:
    x, dense = problem()
    matrix = dense + regularization * torch.eye(P).double()
    options = {"mode": mode, "regularization": regularization, "max_iter": 100, "tol": 1e-11}
    solve = ihvp.ihvp_cg(convex, **options)
    at_x = ihvp.ihvp_at_x_cg(convex, *x, **options)
    for function in (lambda v: solve(x, v), at_x):
        assert_equals(function, torch.linalg.inv(matrix), torch.float64, 1e-9)
        for v in right_hand_sides():
            assert ((function(v) @ matrix - v).norm(dim=-1) <= 1e-11).all()


def quadratic(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x @ matrix @ x / 2


def test_cg_with_p_steps_is_exact_on_a_quadratic() -> None:
    matrix = random_spd(P, 1e2)
    for v in right_hand_sides()[:3]:
        result = ihvp.ihvp_cg(quadratic(matrix), max_iter=P)((torch.zeros(P).double(),), v)
        assert relative_error(result @ matrix, v) < 1e-9


def test_cg_truncates_as_the_textbook_and_says_so_at_debug(
    caplog: pytest.LogCaptureFixture,
) -> None:
    matrix, b = random_spd(P, 1e2), torch.randn(P).double()
    solution, residual = torch.zeros(P).double(), b.clone()
    direction = residual.clone()
    for _ in range(3):
        step = residual.dot(residual) / direction.dot(matrix @ direction)
        following = residual - step * matrix @ direction
        solution = solution + step * direction
        direction = following + following.dot(following) / residual.dot(residual) * direction
        residual = following
    with caplog.at_level(logging.DEBUG, logger="hessops"):
        result = ihvp.ihvp_cg(quadratic(matrix), max_iter=3)((torch.zeros(P).double(),), b)
    assert relative_error(result, solution) < 1e-12
    assert "max iterations" in caplog.text


@pytest.mark.parametrize("dtype", DTYPES)
def test_cg_does_not_divide_by_zero_once_converged(dtype: torch.dtype) -> None:
    x = torch.zeros(P, dtype=dtype)
    solve = ihvp.ihvp_cg(quadratic(torch.eye(P, dtype=dtype)), max_iter=1000)
    v = torch.randn(3, P, dtype=dtype)
    v[1] = 0
    assert torch.allclose(solve((x,), v), v)
    assert not solve((x,), torch.zeros(P, dtype=dtype)).any()
    converged = ihvp.ihvp_cg(quadratic(random_spd(P, 10.0, dtype=dtype)), max_iter=1000)
    result = converged((x,), v)
    assert result.isfinite().all()
    residual = result @ random_spd(P, 10.0, dtype=dtype) - v
    assert (residual.norm(dim=1) <= 1e-5 * v.norm(dim=1)).all()


def test_cg_refuses_negative_curvature_and_tells_of_stagnation() -> None:
    solve = ihvp.ihvp_cg(lambda x: (x[0] ** 2 - x[1] ** 2) / 2)
    with pytest.raises(IndefiniteOperatorError):
        solve((torch.zeros(2),), torch.tensor([0.1, 1.0]))
    hard = random_spd(30, 1e6).float()
    with pytest.warns(ConvergenceWarning, match="stagnated"):
        ihvp.ihvp_cg(quadratic(hard), max_iter=5000)((torch.zeros(30),), torch.randn(30))


# --- Arnoldi -----------------------------------------------------------------------------


def dominant_inverse(matrix: Tensor, rank: int) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    kept = values.abs().argsort(descending=True)[:rank]
    kept = kept[values[kept].abs() > 1e-10 * values.abs().max()]
    return (vectors[:, kept] / values[kept]) @ vectors[:, kept].T


ARNOLDI_SPECTRA = {
    "positive": torch.linspace(1, 3, P),
    "indefinite": torch.tensor([3.0, -2.5, 2.0, -1.5, 1.0, 0.5]),
    "repeated": torch.tensor([3.0, 3.0, 3.0, -1.0, -1.0, -1.0]),
    "low rank": torch.tensor([3.0, -2.0, 0.0, 0.0, 0.0, 0.0]),
    "identity": torch.ones(P),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("top_k", [3, 100])
@pytest.mark.parametrize("spectrum", ARNOLDI_SPECTRA)
def test_arnoldi_beyond_p_is_the_pseudo_inverse_of_rank_top_k(
    spectrum: str, top_k: int, mode: str, dtype: torch.dtype
) -> None:
    if spectrum == "identity" and top_k < P:
        pytest.skip("which of equal eigenvalues are kept is not defined")
    basis, _ = torch.linalg.qr(torch.randn(P, P).double())
    matrix = (basis * ARNOLDI_SPECTRA[spectrum].double()) @ basis.T
    matrix = ((matrix + matrix.T) / 2).to(dtype)
    x = torch.randn(P, dtype=dtype)
    expected = dominant_inverse(
        matrix.double() if dtype == torch.float64 else _clean(matrix, spectrum, basis), top_k
    )
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    if dtype == torch.float32 and spectrum == "low rank":
        pytest.skip("in float32 the zero eigenvalues are rounding errors, which have an inverse")
    for norm_constant in (1.0, 1e3):
        at_x = ihvp.ihvp_at_x_arnoldi(
            quadratic(matrix),
            x,
            max_iter=200,
            top_k=top_k,
            mode=mode,
            norm_constant=norm_constant,
        )
        assert_equals(at_x, expected, dtype, tolerance)
    if top_k == 100:
        solve = ihvp.ihvp_arnoldi(quadratic(matrix), max_iter=200, mode=mode)
        assert_equals(lambda v: solve((x,), v), expected, dtype, tolerance)


def _clean(matrix: Tensor, spectrum: str, basis: Tensor) -> Tensor:
    return (basis * ARNOLDI_SPECTRA[spectrum].double()) @ basis.T


def test_arnoldi_adds_regularization_and_is_repeatable() -> None:
    matrix = random_spd(30, 1e3)
    x, v = torch.zeros(30).double(), torch.randn(30).double()
    before = torch.get_rng_state()
    solve = ihvp.ihvp_at_x_arnoldi(quadratic(matrix), x, max_iter=60, regularization=0.1)
    shifted = matrix + 0.1 * torch.eye(30).double()
    assert relative_error(solve(v) @ shifted, v) < 1e-10
    seeded = [
        ihvp.ihvp_arnoldi(
            quadratic(matrix), max_iter=8, generator=torch.Generator().manual_seed(seed)
        )((x,), v)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.equal(seeded[0], seeded[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_arnoldi_below_p_finds_the_dominant_eigenspace() -> None:
    basis, _ = torch.linalg.qr(torch.randn(60, 60).double())
    values = 0.5 ** torch.arange(60).double()
    matrix = (basis * values) @ basis.T
    solve = ihvp.ihvp_at_x_arnoldi(
        quadratic((matrix + matrix.T) / 2), torch.zeros(60).double(), max_iter=20, top_k=3
    )
    v = torch.randn(60).double()
    expected = (basis[:, :3] / values[:3]) @ (basis[:, :3].T @ v)
    assert relative_error(solve(v), expected) < 1e-6


# --- LiSSA -------------------------------------------------------------------------------


def data_problem() -> tuple[Callable[..., Tensor], tuple[Tensor, Tensor, Tensor], Tensor]:
    """Least squares with weights, points in dimension 0 of x and y."""
    x, y = torch.randn(9, P).double(), torch.randn(9).double()

    def func(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (x @ w - y).square().mean() / 2 + 0.5 * w.square().sum() / 2

    hessian = x.T @ x / 9 + 0.5 * torch.eye(P).double()
    return func, (torch.randn(P).double(), x, y), hessian


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("depth", [1, 2, 7])
def test_full_batch_lissa_equals_its_recursion(depth: int, mode: str) -> None:
    func, x, hessian = data_problem()
    options = {"batch_size": 9, "recursion_depth": depth, "damping": 0.1, "scaling": 20.0}
    solve = ihvp.ihvp_lissa(func, mode=mode, **options)
    at_x = ihvp.ihvp_at_x_lissa(func, *x, mode=mode, num_repeat=2, **options)
    for v in right_hand_sides()[:3]:
        h = v
        for _ in range(depth):
            h = v + 0.9 * h - h @ hessian / 20.0
        for result in (solve(x, v), at_x(v)):
            assert result.shape == v.shape
            assert relative_error(result, h / 20.0) < 1e-12


@pytest.mark.parametrize("damping", [0.0, 0.02])
def test_full_batch_lissa_tends_to_its_fixed_point(damping: float) -> None:
    func, x, hessian = data_problem()
    solve = ihvp.ihvp_at_x_lissa(
        func, *x, batch_size=9, recursion_depth=600, damping=damping, scaling=10.0
    )
    fixed = hessian + damping * 10.0 * torch.eye(P).double()
    for v in right_hand_sides()[:3]:
        assert relative_error(solve(v) @ fixed, v) < 1e-10


def test_lissa_draws_batches_without_replacement_in_every_chain() -> None:
    seen: list[list[float]] = []

    def func(w: Tensor, x: Tensor) -> Tensor:
        seen.append(x.tolist())
        return (x * w.square()).mean()

    data = torch.arange(10.0)
    solve = ihvp.ihvp_at_x_lissa(
        func,
        torch.ones(1),
        data,
        batch_size=4,
        num_repeat=3,
        recursion_depth=5,
        scaling=100.0,
        generator=torch.Generator().manual_seed(0),
    )
    before = torch.get_rng_state()
    solve(torch.ones(1))
    assert len(seen) == 15
    assert all(len(set(batch)) == 4 for batch in seen)
    assert len({tuple(batch) for batch in seen}) > 10
    assert torch.equal(torch.get_rng_state(), before)


def test_lissa_averages_chains_and_is_repeatable() -> None:
    func, x, _ = data_problem()
    v = torch.randn(P).double()
    options = {"recursion_depth": 30, "scaling": 30.0}

    def run(seed: int, repeat: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return ihvp.ihvp_lissa(func, num_repeat=repeat, generator=generator, **options)(x, v)

    assert torch.equal(run(1, 1), run(1, 1))
    assert not torch.equal(run(1, 1), run(2, 1))
    generator = torch.Generator().manual_seed(5)
    one = ihvp.ihvp_lissa(func, generator=generator, **options)
    chains = torch.stack([one(x, v) for _ in range(3)])
    assert relative_error(run(5, 3), chains.mean(dim=0)) < 1e-12


def test_stochastic_lissa_approaches_the_inverse() -> None:
    func, x, hessian = data_problem()
    v = torch.randn(P).double()
    result = ihvp.ihvp_lissa(func, batch_size=3, num_repeat=8, recursion_depth=600, scaling=60.0)(
        x, v
    )
    assert relative_error(result @ hessian, v) < 0.2


def test_lissa_takes_the_dimension_over_points_and_a_collate_function() -> None:
    func, (w, x, y), _ = data_problem()
    v = torch.randn(P).double()
    options = {"batch_size": 4, "recursion_depth": 10, "scaling": 20.0}
    expected = ihvp.ihvp_lissa(func, **options)((w, x, y), v)

    def transposed(w: Tensor, xt: Tensor, y: Tensor) -> Tensor:
        return func(w, xt.T, y)

    by_columns = ihvp.ihvp_lissa(transposed, **options)((w, x.T, y), v, in_dims=(None, 1, 0))
    negative = ihvp.ihvp_at_x_lissa(transposed, w, x.T, y, in_dims=(None, -1, 0), **options)(v)

    def collate(sampled: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return sampled[0], sampled[1].T, sampled[2]

    collated = ihvp.ihvp_lissa(transposed, collate_fn=collate, **options)((w, x, y), v)
    for result in (by_columns, negative, collated):
        assert relative_error(result, expected) < 1e-12


def test_lissa_that_diverges_is_refused_or_warned_of() -> None:
    func, x, _ = data_problem()
    v = torch.randn(P).double()
    with pytest.raises(NonFiniteProductError, match="scaling"):
        ihvp.ihvp_lissa(func, batch_size=9, scaling=0.5)(x, v)
    with pytest.warns(ConvergenceWarning, match="scaling"):
        ihvp.ihvp_lissa(func, batch_size=9, scaling=0.5, recursion_depth=20)(x, v)


# --- misuse ------------------------------------------------------------------------------


def cube(x: Tensor, y: Tensor) -> Tensor:
    return (x**3).sum() + y.sum()


ONES = (torch.ones(2), torch.ones(2))
AT_BUILD: dict[str, tuple[Callable[[], object], str]] = {
    "hvp mode": (lambda: ihvp.hvp(cube, mode="fwd-rev"), "mode"),
    "hvp_at_x mode": (lambda: ihvp.hvp_at_x(cube, ONES, mode="fwd"), "mode"),
    "cg mode": (lambda: ihvp.ihvp_cg(cube, mode="x"), "mode"),
    "at x cg mode": (lambda: ihvp.ihvp_at_x_cg(cube, *ONES, mode="x"), "mode"),
    "arnoldi mode": (lambda: ihvp.ihvp_arnoldi(cube, mode="x"), "mode"),
    "at x arnoldi mode": (lambda: ihvp.ihvp_at_x_arnoldi(cube, *ONES, mode="x"), "mode"),
    "lissa mode": (lambda: ihvp.ihvp_lissa(cube, mode="x"), "mode"),
    "at x lissa mode": (lambda: ihvp.ihvp_at_x_lissa(cube, *ONES, mode="x"), "mode"),
    "argnums type": (lambda: ihvp.hvp(cube, argnums="0"), "argnums"),
    "no argnums": (lambda: ihvp.hvp(cube, argnums=()), "argnums"),
    "argnums at x": (lambda: ihvp.hvp_at_x(cube, ONES, argnums=2), "argument 2"),
    "argnums at x explicit": (lambda: ihvp.ihvp_at_x_explicit(cube, *ONES, argnums=-3), "-3"),
    "argnums at x cg": (lambda: ihvp.ihvp_at_x_cg(cube, *ONES, argnums=5), "argument 5"),
    "argnums at x arnoldi": (lambda: ihvp.ihvp_at_x_arnoldi(cube, *ONES, argnums=5), "5"),
    "argnums at x lissa": (lambda: ihvp.ihvp_at_x_lissa(cube, *ONES, argnums=5), "5"),
    "argnums twice": (lambda: ihvp.hvp_at_x(cube, ONES, argnums=(0, -2)), "twice"),
    "func": (lambda: ihvp.hvp(3), "func"),
    "regularization": (lambda: ihvp.hvp(cube, regularization="1"), "regularization"),
    "max_iter": (lambda: ihvp.ihvp_cg(cube, max_iter=0), "max_iter"),
    "tol": (lambda: ihvp.ihvp_cg(cube, tol=-1.0), "tol"),
    "top_k": (lambda: ihvp.ihvp_at_x_arnoldi(cube, *ONES, top_k=0), "top_k"),
    "norm": (lambda: ihvp.ihvp_at_x_arnoldi(cube, *ONES, norm_constant=0.0), "norm_constant"),
    "batch_size": (lambda: ihvp.ihvp_lissa(cube, batch_size=0), "batch_size"),
    "num_repeat": (lambda: ihvp.ihvp_lissa(cube, num_repeat=0), "num_repeat"),
    "depth": (lambda: ihvp.ihvp_lissa(cube, recursion_depth=0), "recursion_depth"),
    "scaling": (lambda: ihvp.ihvp_lissa(cube, scaling=0.0), "scaling"),
    "damping": (lambda: ihvp.ihvp_lissa(cube, damping=-0.1), "damping"),
    "collate": (lambda: ihvp.ihvp_lissa(cube, collate_fn=3), "collate_fn"),
    "in_dims length": (lambda: ihvp.ihvp_at_x_lissa(cube, *ONES, in_dims=(None,)), "in_dims"),
    "in_dims of params": (lambda: ihvp.ihvp_at_x_lissa(cube, *ONES, in_dims=(0, 0)), "in_dims"),
    "in_dims range": (lambda: ihvp.ihvp_at_x_lissa(cube, *ONES, in_dims=(None, 1)), "in_dims"),
    "no points": (lambda: ihvp.ihvp_at_x_lissa(cube, *ONES, in_dims=(None, None)), "points"),
    "batch sizes": (
        lambda: ihvp.ihvp_at_x_lissa(cube, torch.ones(2), torch.ones(3), torch.ones(4)),
        "disagree",
    ),
    "batch too large": (lambda: ihvp.ihvp_at_x_lissa(cube, *ONES, batch_size=3), "batch_size"),
    "x no tuple": (lambda: ihvp.hvp_at_x(cube, torch.ones(2)), "tuple"),
    "integers": (lambda: ihvp.hvp_at_x(cube, (torch.ones(2).long(), ONES[1])), "floating"),
    "mixed dtype": (
        lambda: ihvp.hvp_at_x(cube, (ONES[0], ONES[1].double()), argnums=(0, 1)),
        "dtype",
    ),
    "several elements": (lambda: ihvp.hvp_at_x(lambda x, y: x**2, ONES), "single element"),
}
V = torch.ones(2)
AT_CALL: dict[str, tuple[Callable[[], Callable[[], object]], str]] = {
    "argnums": (lambda: (f := ihvp.hvp(cube, argnums=2)) and (lambda: f(ONES, V)), "argument 2"),
    "argnums cg": (lambda: (f := ihvp.ihvp_cg(cube, 7)) and (lambda: f(ONES, V)), "argument 7"),
    "in_dims": (
        lambda: (f := ihvp.ihvp_lissa(cube)) and (lambda: f(ONES, V, in_dims=(None,))),
        "in_dims",
    ),
    "batch sizes": (
        lambda: (
            (f := ihvp.ihvp_lissa(lambda a, b, c: a.sum()))
            and (lambda: f((V, torch.ones(3), torch.ones(4)), V))
        ),
        "disagree",
    ),
    "v shape": (lambda: (f := ihvp.hvp(cube)) and (lambda: f(ONES, torch.ones(3))), "v has shape"),
    "v shape explicit": (
        lambda: (f := ihvp.ihvp_at_x_explicit(cube, *ONES)) and (lambda: f(torch.ones(3))),
        "v has shape",
    ),
    "v shape cg": (
        lambda: (f := ihvp.ihvp_at_x_cg(cube, *ONES)) and (lambda: f(torch.ones(1, 1, 2))),
        "v has shape",
    ),
    "v shape arnoldi": (
        lambda: (f := ihvp.ihvp_at_x_arnoldi(cube, *ONES)) and (lambda: f(torch.ones(3))),
        "v has shape",
    ),
    "v dtype": (lambda: (f := ihvp.hvp(cube)) and (lambda: f(ONES, V.double())), "v is"),
    "v no tensor": (lambda: (f := ihvp.hvp(cube)) and (lambda: f(ONES, [1.0, 1.0])), "v must be"),
}


@pytest.mark.parametrize("misuse", AT_BUILD)
def test_misuse_is_refused_when_the_function_is_built(misuse: str) -> None:
    build, message = AT_BUILD[misuse]
    with pytest.raises(IHVPUsageError, match=message):
        build()


@pytest.mark.parametrize("misuse", AT_CALL)
def test_misuse_that_only_a_call_shows_is_refused_there(misuse: str) -> None:
    build, message = AT_CALL[misuse]
    call = build()
    with pytest.raises(IHVPUsageError, match=message):
        call()


def test_the_names_are_reached_as_documented() -> None:
    assert hessops.ihvp is ihvp
    assert hessops.hvp is hessops.functional.hvp
    assert issubclass(IHVPUsageError, ValueError)
