"""The algebra of operators and their closed-form inverses against dense matrices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from reference import random_spd, relative_error
from torch import Tensor, nn

from hessops import (
    BlockDiagonalOperator,
    CgOperator,
    DiagonalOperator,
    DirectSolveOperator,
    GeneralizedGaussNewtonOperator,
    HessianOperator,
    IdentityOperator,
    InverseOperator,
    LowRankOperator,
    LowRankProductOperator,
    LowRankProductRepresentation,
    MatrixOperator,
    ParameterSpace,
    SolveStatus,
    TensorOperator,
)
from hessops.errors import (
    ArgumentError,
    ConvergenceWarning,
    MemoryLimitError,
    MissingInverseError,
    SingularOperatorError,
    StructureError,
)

SIZE = 6
EYE = torch.eye(SIZE, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


S = random_spd(SIZE, 50.0)
G = normal(SIZE, SIZE, seed=1)
D = torch.linspace(0.5, 3.0, SIZE, dtype=torch.float64)
V, _ = torch.linalg.qr(normal(SIZE, 2, seed=2))
E = torch.tensor([4.0, 0.3], dtype=torch.float64)
SKEWED = normal(SIZE, 3, seed=3)
SKEWED_E = torch.tensor([2.0, -0.4, 1.0], dtype=torch.float64)


def symmetric() -> MatrixOperator:
    return MatrixOperator(S)


def general() -> MatrixOperator:
    return MatrixOperator(G)


def diagonal() -> DiagonalOperator:
    return DiagonalOperator(D)


def identity() -> IdentityOperator:
    return IdentityOperator(SIZE, torch.float64)


def low_rank() -> LowRankProductOperator:
    return LowRankProductOperator(LowRankProductRepresentation(E, V))


def blocks() -> BlockDiagonalOperator:
    return BlockDiagonalOperator(
        [MatrixOperator(S[:2, :2]), DiagonalOperator(D[2:4]), MatrixOperator(G[4:, 4:])]
    )


L = (V * E) @ V.T
B = torch.block_diag(S[:2, :2], D[2:4].diag(), G[4:, 4:])

EXPRESSIONS: dict[str, tuple[Callable[[], TensorOperator], Tensor]] = {
    "A + B": (lambda: symmetric() + general(), S + G),
    "A + B + C": (lambda: symmetric() + general() + diagonal(), S + G + D.diag()),
    "A - B": (lambda: symmetric() - general(), S - G),
    "-A": (lambda: -general(), -G),
    "c * A": (lambda: 2.5 * general(), 2.5 * G),
    "A * c": (lambda: general() * 2.5, 2.5 * G),
    "numpy scalar * A": (lambda: np.float64(2.5) * general(), 2.5 * G),
    "tensor scalar * A": (lambda: torch.tensor(2.5) * general(), 2.5 * G),
    "A / c": (lambda: general() / 4, G / 4),
    "c * (d * A)": (lambda: 3 * (2 * general()), 6 * G),
    "A @ B": (lambda: symmetric() @ general(), S @ G),
    "A @ B @ C": (lambda: symmetric() @ general() @ diagonal(), S @ G @ D.diag()),
    "A @ A": (lambda: (lambda a: a @ a)(symmetric()), S @ S),
    "A.T": (lambda: general().T, G.T),
    "A.T.T": (lambda: general().T.T, G),
    "(A + c*B).T": (lambda: (symmetric() + 2 * general()).T, (S + 2 * G).T),
    "(A @ B).T": (lambda: (symmetric() @ general()).T, (S @ G).T),
    "A.T @ A": (lambda: general().T @ general(), G.T @ G),
    "A.shift(c)": (lambda: general().shift(0.3), G + 0.3 * EYE),
    "A.shift(c).shift(d)": (lambda: general().shift(0.3).shift(-0.1), G + 0.2 * EYE),
    "A.shift(c).T": (lambda: general().shift(0.3).T, G.T + 0.3 * EYE),
    "A + c * I": (lambda: general() + 0.3 * identity(), G + 0.3 * EYE),
    "c * I + A": (lambda: 0.3 * identity() + general(), G + 0.3 * EYE),
    "A - I / c": (lambda: general() - identity() / 4, G - 0.25 * EYE),
    "A @ (c * I)": (lambda: general() @ (2 * identity()), 2 * G),
    "I + I": (lambda: identity() + identity(), 2 * EYE),
    "I.shift(c)": (lambda: identity().shift(2), 3 * EYE),
    "0.9 A + 0.1 B + c I": (
        lambda: 0.9 * symmetric() + 0.1 * low_rank() + 0.05 * identity(),
        0.9 * S + 0.1 * L + 0.05 * EYE,
    ),
    "diagonal": (diagonal, D.diag()),
    "low rank": (low_rank, L),
    "blocks": (blocks, B),
    "blocks.T": (lambda: blocks().T, B.T),
    "blocks.shift(c)": (lambda: blocks().shift(0.7), B + 0.7 * EYE),
    "skewed low rank": (
        lambda: LowRankProductOperator(LowRankProductRepresentation(SKEWED_E, SKEWED)),
        (SKEWED * SKEWED_E) @ SKEWED.T,
    ),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions_equal_their_dense_counterparts(name: str) -> None:
    build, expected = EXPRESSIONS[name]
    operator = build()
    vectors = normal(4, SIZE, seed=5)
    assert relative_error(operator.to_dense(), expected) < 1e-12
    assert relative_error(operator.apply(vectors), vectors @ expected.T) < 1e-12
    assert relative_error(operator.apply(vectors[0]), expected @ vectors[0]) < 1e-12
    assert relative_error(operator @ vectors.T, expected @ vectors.T) < 1e-12
    assert relative_error(operator @ vectors[0], expected @ vectors[0]) < 1e-12


def test_a_tensor_times_an_operator_multiplies_rows() -> None:
    rows = normal(3, SIZE, seed=6)
    assert relative_error(rows @ general(), rows @ G) < 1e-12
    assert relative_error(rows[0] @ general(), rows[0] @ G) < 1e-12


INVERTIBLE: dict[str, tuple[Callable[[], TensorOperator], Tensor]] = {
    "diagonal": (diagonal, D.diag()),
    "diagonal.shift(c)": (lambda: diagonal().shift(0.2), D.diag() + 0.2 * EYE),
    "diagonal.shift(-c)": (lambda: diagonal().shift(-0.2), D.diag() - 0.2 * EYE),
    "c * diagonal": (lambda: -3 * diagonal(), -3 * D.diag()),
    "matrix": (symmetric, S),
    "general matrix": (general, G),
    "general matrix.T": (lambda: general().T, G.T),
    "matrix.shift(c)": (lambda: symmetric().shift(0.2), S + 0.2 * EYE),
    "matrix.shift(-c)": (lambda: symmetric().shift(-0.2), S - 0.2 * EYE),
    "(c * matrix).shift(d)": (lambda: (2 * general()).shift(0.3), 2 * G + 0.3 * EYE),
    "A @ B": (lambda: symmetric() @ general(), S @ G),
    "blocks": (blocks, B),
    "blocks.shift(c)": (lambda: blocks().shift(0.7), B + 0.7 * EYE),
    "(c * blocks).shift(d)": (lambda: (2 * blocks()).shift(0.7), 2 * B + 0.7 * EYE),
    "low rank.shift(c)": (lambda: low_rank().shift(1e-3), L + 1e-3 * EYE),
    "low rank.shift(-c)": (lambda: low_rank().shift(-1e-2), L - 1e-2 * EYE),
    "low rank + c * I": (lambda: low_rank() + 0.01 * identity(), L + 0.01 * EYE),
    "(c * low rank).shift(d)": (lambda: (3 * low_rank()).shift(0.1), 3 * L + 0.1 * EYE),
    "skewed low rank.shift(c)": (
        lambda: LowRankProductOperator(LowRankProductRepresentation(SKEWED_E, SKEWED)).shift(0.01),
        (SKEWED * SKEWED_E) @ SKEWED.T + 0.01 * EYE,
    ),
    "identity.shift(c)": (lambda: identity().shift(3), 4 * EYE),
    "c * identity": (lambda: 4 * identity(), 4 * EYE),
}


@pytest.mark.parametrize("name", INVERTIBLE)
def test_closed_form_inverses_equal_the_dense_inverse(name: str) -> None:
    build, matrix = INVERTIBLE[name]
    inverse = build().inverse()
    assert relative_error(inverse.to_dense(), torch.linalg.inv(matrix)) < 1e-10


@pytest.mark.parametrize("name", INVERTIBLE)
def test_closed_form_inverses_report_true_residuals(name: str) -> None:
    build, matrix = INVERTIBLE[name]
    inverse = build().inverse()
    if not isinstance(inverse, InverseOperator):
        return
    rhs = normal(3, SIZE, seed=7)
    solution = inverse.solve(rhs)
    residuals = (rhs - solution.value @ matrix.T).norm(dim=1)
    assert solution.status == (SolveStatus.CONVERGED,) * 3
    assert torch.allclose(solution.residual_norms, residuals, atol=1e-12)


@pytest.mark.parametrize("name", INVERTIBLE)
def test_the_inverse_of_the_inverse_is_the_operator(name: str) -> None:
    build, matrix = INVERTIBLE[name]
    assert relative_error(build().inverse().inverse().to_dense(), matrix) < 1e-10


def test_an_inverse_by_a_solver_takes_its_arguments() -> None:
    inverse = symmetric().inverse(partial(CgOperator, rtol=1e-12))
    assert isinstance(inverse, CgOperator)
    assert relative_error(inverse.to_dense(), torch.linalg.inv(S)) < 1e-9


def test_an_operator_without_closed_form_asks_for_a_solver() -> None:
    with pytest.raises(MissingInverseError, match=r"A.inverse\(partial\(CgOperator, rtol=1e-6\)\)"):
        (symmetric() + diagonal()).inverse()


@pytest.mark.parametrize(
    "build",
    [
        low_rank,
        lambda: DiagonalOperator(torch.tensor([1.0, 0.0])),
        lambda: MatrixOperator(torch.ones(3, 3)),
        lambda: identity().shift(-1),
        lambda: 0 * symmetric(),
        lambda: LowRankProductOperator(LowRankProductRepresentation(-E, V)).shift(4.0),
    ],
    ids=["low rank", "diagonal", "matrix", "I - I", "0 * A", "low rank at an eigenvalue"],
)
def test_singular_operators_have_no_inverse(build: Callable[[], TensorOperator]) -> None:
    with pytest.raises(SingularOperatorError, match="singular"):
        build().inverse()


class OneWay(TensorOperator):
    """A cyclic shift that states no adjoint."""

    def __init__(self) -> None:
        super().__init__(SIZE, torch.float64, "cpu")

    def _apply_rows(self, rows: Tensor) -> Tensor:
        return rows.roll(1, dims=1)


@pytest.mark.parametrize(
    "operator",
    [OneWay(), 2 * OneWay(), OneWay() + symmetric(), OneWay() @ symmetric(), OneWay().shift(1)],
    ids=["itself", "scaled", "sum", "composed", "shifted"],
)
def test_without_an_adjoint_there_is_no_transpose(operator: TensorOperator) -> None:
    with pytest.raises(StructureError, match="adjoint"):
        _ = operator.T


STRUCTURE = {
    "symmetric matrix": (symmetric(), True, None),
    "general matrix": (general(), False, None),
    "positive diagonal": (diagonal(), True, True),
    "negative diagonal": (DiagonalOperator(-D), True, False),
    "identity": (identity(), True, True),
    "low rank": (low_rank(), True, True),
    "A + B": (symmetric() + diagonal(), True, None),
    "D + L": (diagonal() + low_rank(), True, True),
    "A + general": (symmetric() + general(), False, None),
    "general + general": (general() + general(), None, None),
    "2 D": (2 * diagonal(), True, True),
    "-D": (-diagonal(), True, None),
    "D.shift(1)": (diagonal().shift(1), True, True),
    "D.shift(-1)": (diagonal().shift(-1), True, None),
    "A @ B": (symmetric() @ diagonal(), None, None),
    "general.T": (general().T, False, None),
    "blocks": (blocks(), False, None),
    "inverse": (diagonal().inverse(), True, True),
    "cg": (CgOperator(diagonal() + low_rank()), True, True),
}


@pytest.mark.parametrize("name", STRUCTURE)
def test_structure_is_propagated_three_valued(name: str) -> None:
    operator, is_symmetric, is_definite = STRUCTURE[name]
    assert operator.symmetric is is_symmetric
    assert operator.positive_semidefinite is is_definite


@pytest.mark.parametrize(
    ("combine", "error", "text"),
    [
        (lambda: symmetric() + IdentityOperator(3, torch.float64), ValueError, "6 and 3"),
        (lambda: symmetric() + IdentityOperator(SIZE, torch.float32), TypeError, "float32"),
        (lambda: symmetric() @ MatrixOperator(torch.eye(3).double()), ValueError, "6 and 3"),
        (lambda: symmetric() @ torch.ones(3, SIZE).double(), ValueError, "3, 6"),
        (lambda: symmetric() / 0, ValueError, "divisor"),
        (lambda: symmetric() * float("nan"), ValueError, "factor"),
        (lambda: symmetric() * symmetric(), TypeError, "A @ B"),
        (lambda: symmetric() + 1, TypeError, None),
        (lambda: symmetric() @ 3, TypeError, None),
        (lambda: symmetric().shift("x"), TypeError, "value"),
        (lambda: symmetric().inverse(lambda a: 3), TypeError, "solver"),
    ],
)
def test_bad_combinations_are_refused(combine, error, text) -> None:
    with pytest.raises(error, match=text):
        combine()


def test_operators_on_different_parameters_do_not_add() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).double()
    data = [(torch.randn(3, 2).double(), torch.randn(3, 2).double())]
    first = HessianOperator(model, nn.MSELoss(), data, restrict_to=["0.weight"])
    second = HessianOperator(model, nn.MSELoss(), data, restrict_to=["1.weight"])
    with pytest.raises(ValueError, match="different parameters"):
        _ = first + second


def test_curvatures_of_one_model_add_and_keep_their_names() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    data = [(torch.randn(3, 2).double(), torch.randn(3, 2).double())]
    hessian = HessianOperator(model, nn.MSELoss(), data)
    ggn = GeneralizedGaussNewtonOperator(model, nn.MSELoss(), data)
    mixed = (0.9 * hessian + 0.1 * ggn).shift(0.5)
    expected = 0.9 * hessian.to_dense() + 0.1 * ggn.to_dense() + 0.5 * torch.eye(12).double()
    assert relative_error(mixed.to_dense(), expected) < 1e-12
    tensors = hessian.space.unflatten(torch.ones(12, dtype=torch.float64))
    result = mixed.apply_to_dict(tensors)
    assert relative_error(hessian.space.flatten(result), expected.sum(dim=1)) < 1e-12


# --- direct solves ---------------------------------------------------------------------------


@pytest.mark.parametrize("matrix", [S, G, S - 0.5 * EYE], ids=["spd", "general", "indefinite"])
@pytest.mark.parametrize("regularization", [None, 0.0, 1e-3])
@pytest.mark.parametrize("in_place", [False, True])
def test_direct_solves_equal_the_dense_inverse(
    matrix: Tensor, regularization: float | None, in_place: bool
) -> None:
    own = matrix.clone()
    inverse = DirectSolveOperator(own, regularization, in_place_regularization=in_place)
    damped = matrix + (regularization or 0.0) * EYE
    rhs = normal(3, SIZE, seed=8)
    expected = torch.linalg.solve(damped, rhs.T).T
    assert relative_error(inverse.apply(rhs), expected) < 1e-10
    assert relative_error(inverse.T.apply(rhs), torch.linalg.solve(damped.T, rhs.T).T) < 1e-10
    assert relative_error(inverse.inverse().to_dense(), damped) < 1e-12
    assert torch.equal(own, damped if in_place else matrix)
    residual = (rhs - inverse.solve(rhs).value @ damped.T).norm(dim=1)
    assert torch.allclose(inverse.solve(rhs).residual_norms, residual, atol=1e-12)


def test_direct_solves_replace_their_own_regularization() -> None:
    for in_place in (False, True):
        inverse = DirectSolveOperator(S.clone(), 0.5, in_place_regularization=in_place)
        changed = inverse.with_regularization(0.1)
        assert relative_error(changed.to_dense(), torch.linalg.inv(S + 0.1 * EYE)) < 1e-10
        assert changed.regularization == 0.1


@pytest.mark.parametrize("in_place", [False, True])
def test_singular_matrices_are_refused_with_the_condition_and_left_alone(in_place: bool) -> None:
    nearly = S.clone()
    nearly[1] = nearly[0] + 1e-18
    nearly[:, 1] = nearly[:, 0]
    own = nearly.clone()
    with pytest.raises(SingularOperatorError, match=r"singular.*(condition number|pivot)"):
        DirectSolveOperator(own, 1e-20, in_place_regularization=in_place)
    assert torch.equal(own, nearly)


def test_the_callers_matrix_is_copied() -> None:
    own = S.clone()
    operator, inverse = MatrixOperator(own), DirectSolveOperator(own)
    own.zero_()
    assert relative_error(operator.to_dense(), S) == 0
    assert relative_error(inverse.to_dense(), torch.linalg.inv(S)) < 1e-10


# --- low rank --------------------------------------------------------------------------------


@pytest.mark.parametrize("regularization", [1e-6, 1e-2, 10.0])
@pytest.mark.parametrize(
    ("values", "basis"),
    [(E, V), (SKEWED_E.abs(), SKEWED), (torch.ones(8).double(), normal(SIZE, 8, seed=9))],
    ids=["orthonormal", "skewed", "more columns than rows"],
)
def test_woodbury_equals_the_dense_inverse(
    values: Tensor, basis: Tensor, regularization: float
) -> None:
    inverse = LowRankOperator(LowRankProductRepresentation(values, basis), regularization)
    damped = (basis * values) @ basis.T + regularization * EYE
    assert relative_error(inverse.to_dense(), torch.linalg.inv(damped)) < 1e-9
    solution = inverse.solve(normal(4, SIZE, seed=10))
    assert bool(solution.converged.all())


@pytest.mark.parametrize("regularization", [None, 0.0, 0.2])
def test_the_inverse_on_the_range_is_the_formula(regularization: float | None) -> None:
    representation = LowRankProductRepresentation(E, V)
    inverse = LowRankOperator(representation, regularization, exact=False)
    expected = (V / (E + (regularization or 0.0))) @ V.T
    assert relative_error(inverse.to_dense(), expected) < 1e-12
    assert bool(inverse.solve(normal(2, SIZE, seed=11)).converged.all())


def test_low_rank_inverses_replace_their_own_regularization() -> None:
    inverse = LowRankOperator(LowRankProductRepresentation(E, V), 0.5)
    changed = inverse.with_regularization(0.1).to_dense()
    assert relative_error(changed, torch.linalg.inv(L + 0.1 * EYE)) < 1e-10


@pytest.mark.parametrize("regularization", [None, 0, 0.0, -1.0])
def test_exact_woodbury_needs_a_positive_regularization(regularization: float | None) -> None:
    with pytest.raises(ValueError, match="regularization must be positive"):
        LowRankOperator(LowRankProductRepresentation(E, V), regularization, exact=True)


def test_the_inverse_on_the_range_refuses_what_it_cannot_mean() -> None:
    with pytest.raises(ArgumentError, match="orthonormal"):
        LowRankOperator(LowRankProductRepresentation(SKEWED_E, SKEWED), exact=False)
    zero = LowRankProductRepresentation(torch.tensor([1.0, 0.0]).double(), V)
    with pytest.raises(SingularOperatorError, match="singular"):
        LowRankOperator(zero, exact=False)
    with pytest.raises(ValueError, match="regularization"):
        LowRankOperator(LowRankProductRepresentation(E, V), -0.1, exact=False)


def test_orthonormalising_keeps_the_matrix() -> None:
    representation = LowRankProductRepresentation(SKEWED_E, SKEWED).orthonormalized()
    assert representation.is_orthonormal()
    assert relative_error(representation.to_dense(), (SKEWED * SKEWED_E) @ SKEWED.T) < 1e-12


@pytest.mark.parametrize(
    ("values", "basis", "error"),
    [
        (torch.ones(2), torch.ones(4, 3), ValueError),
        (torch.ones(2, 2), torch.ones(4, 2), ValueError),
        (torch.ones(2), torch.ones(4), ValueError),
        (torch.ones(2).double(), torch.ones(4, 2), TypeError),
        (torch.ones(2, dtype=torch.int64), torch.ones(4, 2), TypeError),
        (torch.full((2,), torch.nan), torch.ones(4, 2), ValueError),
        ([1.0], torch.ones(4, 1), TypeError),
    ],
)
def test_bad_representations_are_refused(values, basis, error) -> None:
    with pytest.raises(error, match=r"eigen_vals|projections"):
        LowRankProductRepresentation(values, basis)


# --- blocks ----------------------------------------------------------------------------------


def named_blocks() -> tuple[ParameterSpace, dict[str, TensorOperator], Tensor]:
    space = ParameterSpace.from_tensors(
        {name: torch.zeros(2, dtype=torch.float64) for name in ("a", "b", "c")}
    )
    outer = MatrixOperator(S[:4, :4], space=space.subspace(["a", "c"]))
    inner = DiagonalOperator(D[:2], space=space.subspace(["b"]))
    dense = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    positions = torch.tensor([0, 1, 4, 5])
    dense[positions[:, None], positions] = S[:4, :4]
    dense[2:4, 2:4] = D[:2].diag()
    return space, {"outer": outer, "inner": inner}, dense


@pytest.mark.parametrize("order", [("outer", "inner"), ("inner", "outer")])
def test_named_blocks_find_their_places_in_any_order(order: tuple[str, str]) -> None:
    space, operators, dense = named_blocks()
    operator = BlockDiagonalOperator([operators[name] for name in order], space=space)
    assert relative_error(operator.to_dense(), dense) < 1e-14
    inverse = operator.shift(0.1).inverse()
    assert relative_error(inverse.to_dense(), torch.linalg.inv(dense + 0.1 * EYE)) < 1e-10
    tensors = space.unflatten(torch.ones(SIZE, dtype=torch.float64))
    result = space.flatten(operator.apply_to_dict(tensors))
    assert relative_error(result, dense.sum(dim=1)) < 1e-14


def test_blocks_that_do_not_tile_the_space_are_refused() -> None:
    space, operators, _ = named_blocks()
    with pytest.raises(ValueError, match=r"'b'.*no block"):
        BlockDiagonalOperator([operators["outer"]], space=space)
    with pytest.raises(ValueError, match="'b' is in the blocks"):
        BlockDiagonalOperator([*operators.values(), operators["inner"]], space=space)
    with pytest.raises(ValueError, match="no parameter space"):
        BlockDiagonalOperator([identity()], space=space)
    with pytest.raises(ValueError, match="blocks is empty"):
        BlockDiagonalOperator([])
    with pytest.raises(TypeError, match=r"blocks\[1\]"):
        BlockDiagonalOperator([identity(), IdentityOperator(2, torch.float32)])


# --- conversions -----------------------------------------------------------------------------


def test_to_dense_refuses_what_does_not_fit() -> None:
    with pytest.raises(MemoryLimitError, match="288 bytes"):
        symmetric().to_dense(max_bytes=287)
    with pytest.raises(MemoryError):
        IdentityOperator(10**7).to_dense()


def test_vectors_of_another_dtype_or_shape_are_refused() -> None:
    with pytest.raises(TypeError, match=r"torch\.float32, expected torch\.float64"):
        symmetric().apply(torch.ones(SIZE))
    with pytest.raises(ValueError, match=r"\(5,\), expected \(6,\) or \(k, 6\)"):
        symmetric().apply(torch.ones(5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"\(1, 1, 6\)"):
        symmetric().apply(torch.ones(1, 1, SIZE, dtype=torch.float64))
    with pytest.raises(ValueError, match="NaN"):
        symmetric().apply(torch.full((SIZE,), torch.nan, dtype=torch.float64))
    with pytest.raises(ValueError, match="flat vectors only"):
        symmetric().apply_to_dict({"a": torch.ones(SIZE, dtype=torch.float64)})


def test_repr_is_a_tree() -> None:
    operator = CgOperator((0.9 * symmetric() + diagonal()).shift(0.5))
    assert repr(operator).splitlines() == [
        "CgOperator(regularization=0, rtol=1e-07, atol=0) [6 x 6, float64, cpu]",
        "└─ ShiftedOperator(+0.5 I) [6 x 6, float64, cpu]",
        "   └─ SumOperator [6 x 6, float64, cpu]",
        "      ├─ ScaledOperator(0.9) [6 x 6, float64, cpu]",
        "      │  └─ MatrixOperator [6 x 6, float64, cpu]",
        "      └─ DiagonalOperator [6 x 6, float64, cpu]",
    ]


@pytest.mark.parametrize("name", [*EXPRESSIONS, *INVERTIBLE])
def test_every_composite_moves_as_a_whole(name: str) -> None:
    build, _ = {**EXPRESSIONS, **INVERTIBLE}[name]
    for operator in (build(), build().inverse() if name in INVERTIBLE else build()):
        moved = operator.to("meta")
        assert moved.device.type == "meta"
        assert operator.device.type == "cpu"
        assert moved.apply(torch.ones(2, SIZE, dtype=torch.float64)).shape == (2, SIZE)


# --- what a reviewer would try ---------------------------------------------------------------


def test_one_large_entry_does_not_make_a_matrix_symmetric() -> None:
    matrix = torch.tensor([[1e15, 0.0, 0.0], [0.0, 2.0, 1.0], [0.0, 0.0, 2.0]]).double()
    operator = MatrixOperator(matrix)
    assert operator.symmetric is False
    vector = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    assert torch.equal(operator.T.apply(vector), matrix.T @ vector)
    solved = DirectSolveOperator(matrix[1:, 1:]).apply(vector[1:])
    assert torch.allclose(solved, torch.linalg.solve(matrix[1:, 1:], vector[1:]))


@pytest.mark.parametrize("build", [diagonal, symmetric, low_rank, blocks], ids=lambda b: b.__name__)
def test_a_shift_stays_when_a_regularization_is_replaced(
    build: Callable[[], TensorOperator],
) -> None:
    inverse = build().shift(1.0).inverse()
    assert inverse.regularization == 0
    changed = inverse.with_regularization(0.5).with_regularization(0.25)
    expected = torch.linalg.inv(build().to_dense() + 1.25 * EYE)
    assert relative_error(changed.to_dense(), expected) < 1e-10


def test_a_direct_solve_that_misses_its_tolerance_warns() -> None:
    matrix = random_spd(50, 1e6).float()
    inverse = DirectSolveOperator(matrix)
    assert set(inverse.solve(torch.eye(50)).status) == {SolveStatus.STAGNATED}
    with pytest.warns(ConvergenceWarning, match="stagnated"):
        inverse.apply(torch.eye(50))


def test_nearly_orthonormal_columns_are_orthonormalised() -> None:
    basis = torch.zeros(10_000, 1, dtype=torch.float64)
    basis[0] = 1 + 1e-8
    representation = LowRankProductRepresentation(torch.ones(1).double(), basis)
    inverse = LowRankOperator(representation, 1e-10)
    result = inverse.apply(torch.eye(1, 10_000, dtype=torch.float64))
    assert abs(result[0, 0].item() - 1 / ((1 + 1e-8) ** 2 + 1e-10)) < 1e-12


def test_a_zero_eigenvalue_beside_a_large_one_is_damped() -> None:
    representation = LowRankProductRepresentation(torch.tensor([1e3, 0.0]), torch.eye(4)[:, :2])
    inverse = LowRankOperator(representation, 1e-5)
    assert torch.allclose(inverse.apply(torch.eye(4)).diagonal()[1:], torch.full((3,), 1e5))


def test_the_space_of_the_identity_is_kept() -> None:
    space = ParameterSpace.from_tensors({"a": torch.zeros(SIZE, dtype=torch.float64)})
    named = IdentityOperator(SIZE, torch.float64, space=space)
    for operator in (named + symmetric(), symmetric() + named, symmetric() @ named):
        assert operator.space == space


def test_a_hook_that_keeps_no_contract_is_refused_in_composites_too() -> None:
    class Broadcasts(OneWay):
        def _apply_rows(self, rows: Tensor) -> Tensor:
            return rows[:, :1]

    for operator in (Broadcasts(), Broadcasts() + symmetric(), CgOperator(Broadcasts(), 1.0)):
        with pytest.raises(ValueError, match="contract"):
            operator.apply(torch.ones(2, SIZE, dtype=torch.float64))


def test_scipy_multiplies_complex_vectors_by_parts() -> None:
    vector = np.ones(SIZE) + 2j * np.arange(SIZE)
    assert np.allclose(general().to_scipy() @ vector, G.numpy() @ vector)


def test_a_default_device_of_the_caller_does_not_reach_in() -> None:
    operator = general()
    torch.set_default_device("meta")
    try:
        dense = operator.to_dense()
    finally:
        torch.set_default_device(None)
    assert torch.equal(dense, G)
