"""Damped inverses in sample space against dense ones built by loops over points."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from reference import DenseReference, relative_error
from solver_cases import normal, true_residuals
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from hessops import (
    BatchOperator,
    CgOperator,
    ChunkAveraging,
    CurvatureOperator,
    GaussNewtonOperator,
    GeneralizedGaussNewtonOperator,
    HessianOperator,
    PointAveraging,
)
from hessops.errors import (
    ArgumentTypeError,
    ConvergenceWarning,
    DeviceError,
    MissingInverseError,
    SingularOperatorError,
)
from hessops.functional import sample_space
from hessops.functional.sample_space import SampleSpace
from hessops.operators import sample_space as inverses
from hessops.operators.sample_space import SampleSpaceInverse
from hessops.processes import OneProcess
from hessops.testing import check_operator

N = 11
Data = list[tuple[Tensor, Tensor]]
KINDS: dict[str, tuple[type[CurvatureOperator], Callable[[DenseReference], Tensor]]] = {
    "gradients": (GaussNewtonOperator, DenseReference.gauss_newton),
    "outputs": (GeneralizedGaussNewtonOperator, DenseReference.generalized_gauss_newton),
}


class WithOwnParameters(nn.Module):
    """A normalisation and a scale beside layers that apply a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 9), nn.LayerNorm(9), nn.Linear(9, 3)
        self.scale = nn.Parameter(torch.tensor([1.0, 0.5, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(x)))) * self.scale


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight
        self.wide = nn.Linear(4, 9)
        self.narrow = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.head(torch.tanh(self.narrow(torch.tanh(self.wide(x)))))


class Tokens(nn.Module):
    """Words, one of them padding, and a layer at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 6, padding_idx=0)
        self.first, self.second = nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(self.embed(x))).mean(dim=1))


def mlp(activation: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 9), activation or nn.Tanh(), nn.Linear(9, 3))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 4, groups=2), nn.Flatten(), nn.Linear(4, 3)
    )


def half_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    return model


def vectors() -> Tensor:
    return torch.randn(N, 4)


def classes() -> Tensor:
    return torch.randint(3, (N,))


def binary(output: Tensor, target: Tensor) -> Tensor:
    """Convex, and neither a sum over outputs nor a softmax."""
    return functional.softplus(output.sum(dim=1) - target).mean() + output.square().mean()


# name -> model, loss, inputs, targets
CASES: dict[
    str, tuple[Callable[[], nn.Module], Callable[..., Tensor], Callable[[], Tensor], object]
] = {
    "tanh": (mlp, nn.CrossEntropyLoss(), vectors, classes),
    "relu, squares": (
        lambda: mlp(nn.ReLU()),
        nn.MSELoss(),
        vectors,
        lambda: torch.randn(N, 3),
    ),
    "no structure": (mlp, binary, vectors, lambda: torch.randn(N)),
    "own parameters": (WithOwnParameters, nn.CrossEntropyLoss(), vectors, classes),
    "convolutions": (
        convolutional,
        nn.CrossEntropyLoss(),
        lambda: torch.randn(N, 2, 6, 6),
        classes,
    ),
    "tokens": (Tokens, nn.CrossEntropyLoss(), lambda: torch.randint(5, (N, 3)), classes),
    "tied": (Tied, nn.CrossEntropyLoss(), vectors, classes),
    "frozen": (half_frozen, nn.CrossEntropyLoss(), vectors, classes),
}


def ragged(x: Tensor, y: Tensor) -> Data:
    """Batches of 5, 1 and 5 points."""
    return [(x[:5], y[:5]), (x[5:6], y[5:6]), (x[6:], y[6:])]


def case(
    name: str = "tanh", dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, Callable[..., Tensor], Tensor, Tensor]:
    model, loss, x, y = CASES[name]
    torch.manual_seed(1)
    made, inputs, targets = model().to(dtype), x(), y()
    return (
        made,
        loss,
        inputs.to(dtype) if inputs.is_floating_point() else inputs,
        targets.to(dtype) if targets.is_floating_point() else targets,
    )


@cache
def operator_and_matrix(
    name: str = "tanh", kind: str = "outputs"
) -> tuple[CurvatureOperator, Tensor]:
    """Shared by tests, none of which may refresh the operator."""
    model, loss, x, y = case(name)
    operator_type, matrix = KINDS[kind]
    operator = operator_type(model, loss, ragged(x, y))
    return operator, matrix(DenseReference(model, loss, x, y))


def solved(matrix: Tensor, shift: float, rhs: Tensor) -> Tensor:
    return torch.linalg.solve(matrix + shift * torch.eye(len(matrix), dtype=rhs.dtype), rhs.T).T


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records each computation of a Gram matrix."""
    made: list[str] = []
    gram = SampleSpace.gram
    monkeypatch.setattr(SampleSpace, "gram", lambda self: (made.append("gram"), gram(self))[1])
    return made


# --- the columns and their Gram matrix ---------------------------------------------------


def columns_of(operator: CurvatureOperator) -> tuple[SampleSpace, Tensor]:
    """The sample space, and Uᵀ made by products with unit vectors."""
    space = SampleSpaceInverse(operator, 1.0)._gram.space()
    with torch.no_grad():
        return space, space.expand(torch.eye(space.size, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_columns_and_gram_matrix_are_those_of_the_dense_matrix(name: str, kind: str) -> None:
    operator, matrix = operator_and_matrix(name, kind)
    space, rows = columns_of(operator)
    assert relative_error(rows.T @ rows, matrix) < 1e-13
    assert relative_error(space.gram(), rows @ rows.T) < 1e-13
    v = normal(2, operator.input_size)
    assert relative_error(space.project(v), v @ rows.T) < 1e-13


@pytest.mark.parametrize("name", ["tanh", "convolutions", "own parameters", "tokens"])
def test_blocks_and_tiles_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator, _ = operator_and_matrix(name)
    space, _ = columns_of(operator)
    expected = space.gram()
    monkeypatch.setattr(sample_space, "BLOCK_BYTES", 4 * space._bytes_of_point(space._parts[0]))
    monkeypatch.setattr(sample_space, "TILE_BYTES", 2000)
    monkeypatch.setattr(sample_space, "UNIT_POINTS", 2)
    monkeypatch.setattr(sample_space, "UNIT_ROWS", 3)
    plan = space._plan()
    assert len(plan) > len(space._parts)
    assert space._end_of_panel(plan, 0) < len(plan)
    assert relative_error(space.gram(), expected) < 1e-13


def test_a_layer_goes_by_rows_or_by_inputs_and_outputs_as_costs_less() -> None:
    operator, _ = operator_and_matrix("convolutions", "gradients")
    space, _ = columns_of(operator)
    assert set(space._row_layers) == {"0"}  # 16 positions and 76 parameters
    assert set(space._ghosts) == {"2", "4"}
    words, _ = columns_of(operator_and_matrix("tokens", "outputs")[0])
    assert "embed" in words._ghosts
    own, _ = columns_of(operator_and_matrix("own parameters", "outputs")[0])
    assert own._others == ["scale", "norm.weight", "norm.bias"]
    tied, _ = columns_of(operator_and_matrix("tied", "outputs")[0])
    assert "first.weight" in tied._others


# --- solutions ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_solution_equals_the_dense_one(name: str, kind: str) -> None:
    operator, matrix = operator_and_matrix(name, kind)
    rhs = normal(5, operator.input_size)
    solution = operator.shift(1e-2).inverse().solve(rhs)
    assert solution.converged.all()
    assert relative_error(solution.value, solved(matrix, 1e-2, rhs)) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_small_shifts_are_met_and_their_true_residual_is_said(kind: str) -> None:
    operator, matrix = operator_and_matrix("tanh", kind)
    shift = 1e-6 * torch.linalg.matrix_norm(matrix, 2).item()
    rhs = normal(3, operator.input_size)
    solution = operator.shift(shift).inverse().solve(rhs)
    damped = matrix + shift * torch.eye(len(matrix), dtype=torch.float64)
    residuals = true_residuals(damped, rhs, solution.value)
    assert residuals.max() < 1e-9
    # They are measured with another product, which differs by its own rounding.
    rounding = 1e-15 * 1e6
    assert (solution.relative_residual_norms - residuals).abs().max() < rounding
    assert relative_error(solution.value, solved(matrix, shift, rhs)) < 1e-9


def test_refinement_lowers_the_residual() -> None:
    model, loss, x, y = case("tanh", torch.float32)
    operator = GeneralizedGaussNewtonOperator(model, loss, ragged(x, y))
    rhs = operator.apply(normal(1, operator.input_size, dtype=torch.float32))
    inverse = SampleSpaceInverse(operator, 1e-3)
    system = operator.to_dense() + 1e-3 * torch.eye(operator.input_size)
    once = true_residuals(system, rhs, inverse._inverse_rows(rhs))
    assert true_residuals(system, rhs, inverse.solve(rhs).value) < once / 5


def test_float32_solutions_carry_their_true_residual() -> None:
    model, loss, x, y = case("tanh", torch.float32)
    operator = GeneralizedGaussNewtonOperator(model, loss, ragged(x, y))
    double = case("tanh")
    matrix = DenseReference(*double).generalized_gauss_newton()
    rhs = normal(3, operator.input_size, dtype=torch.float32)
    solution = operator.shift(1e-2).inverse().solve(rhs)
    assert solution.converged.all()
    damped = matrix + 1e-2 * torch.eye(len(matrix), dtype=torch.float64)
    residuals = true_residuals(damped, rhs, solution.value)
    assert residuals.max() < 1e-5
    assert (solution.relative_residual_norms - residuals).abs().max() < 1e-5


def test_a_shift_below_what_the_dtype_allows_is_said_to_stagnate() -> None:
    model, loss, x, y = case("tanh", torch.float32)
    operator = GeneralizedGaussNewtonOperator(model, loss, ragged(x, y))
    inverse = SampleSpaceInverse(operator, 1e-8)
    rhs = normal(1, operator.input_size, dtype=torch.float32)
    solution = inverse.solve(rhs)
    assert solution.status[0] == "stagnated"
    assert solution.relative_residual_norms.max() > 1e-4
    with pytest.warns(ConvergenceWarning, match="columns"):
        inverse.apply(rhs)


def test_zero_is_solved_by_zero_and_one_vector_comes_back_as_one() -> None:
    operator, matrix = operator_and_matrix()
    inverse = operator.shift(0.1).inverse()
    rhs = normal(operator.input_size)
    solution = inverse.solve(torch.stack([torch.zeros_like(rhs), rhs]))
    assert not solution.value[0].any()
    assert solution.converged.all()
    assert inverse.apply(rhs).shape == rhs.shape
    assert relative_error(inverse.apply(rhs), solved(matrix, 0.1, rhs[None])[0]) < 1e-12
    assert inverse.solve(rhs[None][:0]).value.shape == (0, operator.input_size)


def test_conjugate_gradients_agree() -> None:
    operator, _ = operator_and_matrix("convolutions")
    rhs = normal(2, operator.input_size)
    by_steps = operator.shift(1e-2).inverse(partial(CgOperator, rtol=1e-10)).apply(rhs)
    assert relative_error(operator.shift(1e-2).inverse().apply(rhs), by_steps) < 1e-8


def test_batches_weigh_as_the_averaging_says() -> None:
    model, loss, x, y = case()
    operator = GaussNewtonOperator(model, loss, ragged(x, y), averaging=ChunkAveraging())
    _, matrix = operator_and_matrix("tanh", "gradients")
    expected = operator.to_dense()
    assert relative_error(expected, matrix) > 1e-2
    rhs = normal(2, operator.input_size)
    value = operator.shift(1e-2).inverse().apply(rhs)
    assert relative_error(value, solved(expected, 1e-2, rhs)) < 1e-12


def test_a_diagonal_block_has_an_inverse_of_its_own() -> None:
    operator, _ = operator_and_matrix(kind="gradients")
    block = operator.restricted(["0.weight", "0.bias"])
    rhs = normal(2, block.input_size)
    expected = solved(block.to_dense(), 0.1, rhs)
    assert relative_error(block.shift(0.1).inverse().apply(rhs), expected) < 1e-12


def test_a_loss_that_is_zero_leaves_the_shift() -> None:
    x = torch.randn(3, 4)
    operator = GaussNewtonOperator(mlp(), lambda out, y: 0 * out.sum() / len(out), [(x, x)])
    rhs = normal(2, operator.input_size, dtype=torch.float32)
    assert torch.allclose(operator.shift(0.5).inverse().apply(rhs), 2 * rhs)


def test_a_loss_without_curvature_has_no_columns() -> None:
    x, y = torch.randn(3, 4), torch.randn(3, 3)
    operator = GeneralizedGaussNewtonOperator(
        mlp(), lambda out, target: (out * target).sum(dim=1).mean(), [(x, y)]
    )
    inverse = operator.shift(0.5).inverse()
    rhs = normal(2, operator.input_size, dtype=torch.float32)
    assert "(0 columns" in repr(inverse)
    assert torch.equal(inverse.apply(rhs), 2 * rhs)


def test_multiples_have_inverses_too() -> None:
    operator, matrix = operator_and_matrix(kind="gradients")
    rhs = normal(2, operator.input_size)
    value = (2 * operator).shift(0.1).inverse().apply(rhs)
    assert relative_error(value, solved(2 * matrix, 0.1, rhs)) < 1e-12


# --- what is kept, and what is not -------------------------------------------------------


def test_another_regularization_keeps_the_gram_matrix(passes: list[str]) -> None:
    operator, matrix = operator_and_matrix()
    rhs = normal(2, operator.input_size)
    inverse = operator.shift(0.1).inverse()
    inverse.apply(rhs)
    other = inverse.with_regularization(0.4)
    assert relative_error(other.apply(rhs), solved(matrix, 0.5, rhs)) < 1e-12
    assert relative_error(inverse.apply(rhs), solved(matrix, 0.1, rhs)) < 1e-12
    assert passes == ["gram"]
    with pytest.raises(MissingInverseError, match="a shift λ > 0"):
        SampleSpaceInverse(operator, 0.4).with_regularization(None)


@pytest.mark.parametrize("by", ["inverse", "operator"])
def test_refresh_makes_it_anew_when_it_is_needed(by: str, passes: list[str]) -> None:
    model, loss, x, y = case()
    operator = GeneralizedGaussNewtonOperator(model, loss, ragged(x, y))
    inverse = operator.shift(0.1).inverse()
    rhs = normal(1, operator.input_size)
    before = inverse.apply(rhs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert torch.equal(inverse.apply(rhs), before)  # the operator has its own copy
    (inverse if by == "inverse" else operator).refresh()
    assert passes == ["gram"]
    assert "not yet counted" in repr(inverse)
    matrix = DenseReference(model, loss, x, y).generalized_gauss_newton()
    assert relative_error(inverse.apply(rhs), solved(matrix, 0.1, rhs)) < 1e-12
    assert passes == ["gram", "gram"]


def test_the_printed_tree_names_the_route() -> None:
    operator, _ = operator_and_matrix()
    inverse = operator.shift(0.1).inverse()
    first = repr(inverse).splitlines()[0]
    assert first.startswith("SampleSpaceInverse(22 columns, Gram matrix in float64, ")
    assert "By a Gram matrix of 22 columns." in inverse.solve(normal(operator.input_size)).report()


def test_the_inverse_of_the_inverse_is_the_operator() -> None:
    operator, _ = operator_and_matrix()
    shifted = operator.shift(0.1)
    rhs = normal(operator.input_size)
    assert torch.equal(shifted.inverse().inverse().apply(rhs), shifted.apply(rhs))


def test_it_keeps_the_promises_of_operators() -> None:
    operator, _ = operator_and_matrix()
    check_operator(operator.shift(0.1).inverse())


def test_on_the_meta_device_there_are_shapes_only() -> None:
    operator, _ = operator_and_matrix()
    inverse = operator.shift(0.1).inverse()
    there = inverse.to("meta")
    rhs = torch.zeros(2, operator.input_size, dtype=torch.float64, device="meta")
    assert there.apply(rhs).shape == rhs.shape
    with pytest.raises(DeviceError, match="meta"):
        there.solve(rhs)
    with pytest.raises(MissingInverseError, match="meta"):
        operator.to("meta").shift(0.1).inverse()


# --- where it is not taken ---------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, -0.1])
def test_without_a_positive_shift_there_is_none(shift: float) -> None:
    operator, _ = operator_and_matrix()
    with pytest.raises(MissingInverseError, match=r"shift.*CgOperator, rtol=1e-6"):
        operator.shift(shift).inverse()


def test_as_many_columns_as_parameters_are_too_many() -> None:
    x = torch.randn(6, 1)
    operator = GaussNewtonOperator(nn.Linear(1, 2), nn.MSELoss(), [(x, torch.randn(6, 2))])
    with pytest.raises(MissingInverseError, match="fewer than the 4 parameters"):
        operator.shift(0.1).inverse()


def test_a_gram_matrix_must_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    operator, _ = operator_and_matrix()
    monkeypatch.setattr(inverses, "GRAM_BYTES", 24 * 21**2)
    with pytest.raises(MissingInverseError, match="more than 21 columns"):
        operator.shift(0.1).inverse()


def test_what_is_dearer_than_conjugate_gradients_is_left_to_the_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operator, matrix = operator_and_matrix()
    monkeypatch.setattr(inverses, "CG_ITERATIONS", 0)
    with pytest.raises(MissingInverseError, match="iterations of conjugate gradients"):
        operator.shift(0.1).inverse()
    rhs = normal(1, operator.input_size)
    value = SampleSpaceInverse(operator, 0.1).apply(rhs)
    assert relative_error(value, solved(matrix, 0.1, rhs)) < 1e-12


def test_a_loss_that_is_not_convex_is_refused() -> None:
    model, _, x, _ = case()
    operator = GeneralizedGaussNewtonOperator(
        model, lambda out, y: out.sin().sum(dim=1).mean(), [(x, x)]
    )
    with pytest.raises(MissingInverseError, match=r"not convex.*MinresOperator"):
        operator.shift(0.1).inverse()


@pytest.mark.parametrize("cache", [True, False])
def test_a_shuffled_order_must_be_kept(cache: bool) -> None:
    model, loss, x, y = case()
    loader = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True)
    operator = GeneralizedGaussNewtonOperator(model, loss, loader, cache=cache).shift(0.1)
    if not cache:
        with pytest.raises(MissingInverseError, match="cache=True"):
            operator.inverse()
        return
    rhs = normal(2, operator.input_size)
    matrix = DenseReference(model, loss, x, y).generalized_gauss_newton()
    assert relative_error(operator.inverse().apply(rhs), solved(matrix, 0.1, rhs)) < 1e-12


def test_a_fixed_order_need_not_be_kept() -> None:
    model, loss, x, y = case()
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    operator = GeneralizedGaussNewtonOperator(model, loss, loader, cache=False)
    rhs = normal(2, operator.input_size)
    matrix = DenseReference(model, loss, x, y).generalized_gauss_newton()
    value = operator.shift(0.1).inverse().apply(rhs)
    assert relative_error(value, solved(matrix, 0.1, rhs)) < 1e-12


def test_data_of_several_processes_are_refused() -> None:
    class Spread(PointAveraging):
        processes = OneProcess()

    model, loss, x, y = case()
    operator = GaussNewtonOperator(model, loss, ragged(x, y), averaging=Spread())
    with pytest.raises(MissingInverseError, match="several processes"):
        operator.shift(0.1).inverse()


def test_other_operators_are_refused() -> None:
    model, loss, x, y = case()
    hessian = HessianOperator(model, loss, ragged(x, y))
    with pytest.raises(ArgumentTypeError, match="CgOperator"):
        SampleSpaceInverse(hessian, 0.1)
    operator, _ = operator_and_matrix()
    joined = BatchOperator(operator.batch_operation, ragged(x, y))
    rhs = normal(1, operator.input_size)
    expected = operator.shift(0.1).inverse().apply(rhs)
    assert relative_error(SampleSpaceInverse(joined, 0.1).apply(rhs), expected) < 1e-12


def test_a_shift_below_the_rounding_of_the_gram_matrix_is_refused() -> None:
    model, loss, x, y = case()
    twice = [(torch.cat([x, x]), torch.cat([y, y]))]
    operator = GaussNewtonOperator(model, loss, twice)
    with pytest.raises(SingularOperatorError, match="larger shift"):
        SampleSpaceInverse(operator, 1e-30).apply(normal(operator.input_size))
