"""Influences by KFAC and EKFAC against explicit Kronecker matrices and gradients by plain loops."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from reference import flat_gradient, relative_error, trainable
from sklearn.datasets import load_digits
from softmax_regression import SoftmaxRegression
from torch import Tensor, nn

from hessops import Damping, EkfacOperator, KfacOperator
from hessops.errors import (
    ArgumentError,
    ArgumentTypeError,
    NotFittedError,
    ParameterNameError,
    StoreError,
)
from hessops.influence import EkfacInfluence, SequentialInfluenceCalculator

N, TESTS = 13, 4


class Mixed(nn.Module):
    """An embedding, a convolution, a norm, a loose parameter and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4, padding_idx=1)
        self.conv = nn.Conv1d(4, 4, 2, groups=2)
        self.norm = nn.LayerNorm(4)
        self.gain = nn.Parameter(torch.tensor([1.3]))
        self.head = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.conv(self.embed(x).mT)).mean(dim=2)
        return self.head(self.norm(hidden) * self.gain)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))


class Problem:
    """A model in float64 with training and test points."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        num = N + TESTS
        if kind == "mixed":
            self.model, x = Mixed().double(), torch.randint(6, (num, 5))
        else:
            self.model, x = perceptron().double(), torch.randn(num, 3, dtype=torch.float64)
        y = torch.randint(3, (num,))
        self.x, self.y, self.x_test, self.y_test = x[:N], y[:N], x[N:], y[N:]
        self.loss = nn.CrossEntropyLoss()

    def batches(self, sizes: Sequence[int] = (5, 5, 3)) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.x.split(list(sizes)), self.y.split(list(sizes)), strict=True))

    def gradients(self, x: Tensor, y: Tensor) -> Tensor:
        params = trainable(self.model)
        rows = [
            flat_gradient(self.loss(self.model(x[i : i + 1]), y[i : i + 1]), params)
            for i in range(len(x))
        ]
        return torch.stack(rows)


@pytest.fixture(params=["mixed", "perceptron"])
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param)


@pytest.fixture(params=[False, True], ids=["kfac", "ekfac"])
def update_diagonal(request: pytest.FixtureRequest) -> bool:
    return request.param


# --- softmax regression, in closed form ----------------------------------------------------------


def digits(dtype: torch.dtype) -> tuple[SoftmaxRegression, Tensor, nn.Linear]:
    """Digits with a layer that was trained on them."""
    data = load_digits()
    x = torch.tensor(data.data) / 16
    regression = SoftmaxRegression(x, torch.tensor(data.target), 10)
    torch.manual_seed(0)
    theta = (0.3 * torch.randn(regression.size, dtype=torch.float64)).to(dtype)
    model = nn.Linear(64, 10).to(dtype)
    with torch.no_grad():
        model.weight.copy_(theta[:640].reshape(10, 64))
        model.bias.copy_(theta[640:])
    return regression, theta.double(), model


def dense_pseudo_inverse(
    regression: SoftmaxRegression, theta: Tensor, dtype: torch.dtype, update_diagonal: bool
) -> Tensor:
    """Of the Kronecker matrix, where eigenvalues below 10·65·ε of the largest count as zero."""
    n = len(regression.x)
    extended = torch.cat([regression.x, torch.ones(n, 1, dtype=torch.float64)], dim=1)
    p = regression.probabilities(theta)
    hessians = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    inputs, of_inputs = torch.linalg.eigh(extended.T @ extended / n)
    outputs, of_outputs = torch.linalg.eigh(hessians.mean(dim=0))
    eigenvalues = torch.outer(outputs, inputs)
    if update_diagonal:
        diagonals = (of_outputs.T @ hessians @ of_outputs).diagonal(dim1=1, dim2=2)
        eigenvalues = diagonals.T @ (extended @ of_inputs).square() / n
    kept = eigenvalues > 10 * 65 * torch.finfo(dtype).eps * eigenvalues.max()
    assert 0.5 * kept.numel() < kept.sum() < kept.numel()
    inverted = torch.where(kept, 1 / eigenvalues.where(kept, 1.0), 0.0)
    basis = torch.kron(of_outputs, of_inputs)  # of the rows of [weight, bias]
    by_rows = (basis * inverted.flatten()) @ basis.T
    positions = torch.arange(650).reshape(10, 65)
    order = torch.cat([positions[:, :64].flatten(), positions[:, 64]])
    return by_rows[order][:, order]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3)], ids=["f64", "f32"]
)
def test_without_a_regularization_it_is_the_pseudo_inverse(
    dtype: torch.dtype, tolerance: float, update_diagonal: bool
) -> None:
    regression, theta, model = digits(dtype)
    x, y = regression.x.to(dtype), regression.y
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=100)
    if update_diagonal:
        influence = EkfacInfluence(model, update_diagonal=True, hessian_regularization=0.0)
    else:
        influence = EkfacInfluence(model, hessian_regularization=0.0)
    scores = influence.fit(loader).influences(x[:20], y[:20], x, y)
    gradients = regression.gradients(theta)
    inverse = dense_pseudo_inverse(regression, theta, dtype, update_diagonal)
    assert scores.isfinite().all()
    assert relative_error(scores.double(), gradients[:20] @ inverse @ gradients.T) < tolerance


# --- against the dense matrix of the operator ----------------------------------------------------


def dense(problem: Problem, update_diagonal: bool, regularization: float) -> Tensor:
    kind = EkfacOperator if update_diagonal else KfacOperator
    matrix = kind(problem.model, problem.loss, problem.batches()).to_dense()
    return torch.linalg.inv(matrix + regularization * torch.eye(len(matrix), dtype=torch.float64))


def fitted(problem: Problem, update_diagonal: bool = True, **settings: object) -> EkfacInfluence:
    settings = {"hessian_regularization": 1e-3, **settings}
    influence = EkfacInfluence(problem.model, update_diagonal, loss=problem.loss, **settings)
    return influence.fit(problem.batches())


def test_influences_are_products_with_the_damped_inverse(
    problem: Problem, update_diagonal: bool
) -> None:
    influence = fitted(problem, update_diagonal)
    inverse = dense(problem, update_diagonal, 1e-3)
    test = problem.gradients(problem.x_test, problem.y_test)
    train = problem.gradients(problem.x, problem.y)
    given = (problem.x_test, problem.y_test, problem.x, problem.y)
    assert relative_error(influence.influences(*given), test @ inverse @ train.T) < 1e-9


def test_factors_are_products_with_the_damped_inverse(
    problem: Problem, update_diagonal: bool
) -> None:
    influence = fitted(problem, update_diagonal)
    factors = influence.influence_factors(problem.x_test, problem.y_test)
    test = problem.gradients(problem.x_test, problem.y_test)
    assert relative_error(factors, test @ dense(problem, update_diagonal, 1e-3)) < 1e-9
    scores = influence.influences_from_factors(factors, problem.x, problem.y)
    direct = influence.influences(problem.x_test, problem.y_test, problem.x, problem.y)
    assert relative_error(scores, direct) < 1e-10


def test_test_points_alone_are_scored_against_each_other(problem: Problem) -> None:
    influence = fitted(problem)
    points = (problem.x_test, problem.y_test)
    assert relative_error(influence.influences(*points), influence.influences(*points, *points)) < (
        1e-12
    )
    diagonal = influence.influences(*points).diagonal()
    assert relative_error(influence.self_influence(*points), diagonal) < 1e-10


@pytest.mark.parametrize("sizes", [(13,), (1,) * 13, (7, 1, 5)])
def test_scores_do_not_depend_on_batches(
    problem: Problem, update_diagonal: bool, sizes: Sequence[int]
) -> None:
    given = (problem.x_test, problem.y_test, problem.x, problem.y)
    whole = fitted(problem, update_diagonal).influences(*given)
    other = EkfacInfluence(problem.model, update_diagonal, 1e-3).fit(problem.batches(sizes))
    assert relative_error(other.influences(*given), whole) < 1e-9


def test_scores_of_an_input_change_as_perturbation_says(update_diagonal: bool) -> None:
    problem = Problem("perceptron")
    influence = fitted(problem, update_diagonal)
    given = (problem.x_test, problem.y_test)
    slopes = influence.influences(*given, problem.x, problem.y, mode="perturbation")
    step = 1e-6 * torch.randn_like(problem.x)
    change = influence.influences(*given, problem.x + step, problem.y) - influence.influences(
        *given, problem.x - step, problem.y
    )
    assert relative_error((slopes * step).sum(dim=2), change / 2) < 1e-6


# --- by layer ------------------------------------------------------------------------------------


def test_the_blocks_are_the_layers() -> None:
    assert set(fitted(Problem("mixed")).block_names) == {
        "",
        "embed",
        "conv",
        "norm",
        "head.0",
        "head.2",
    }


def test_layers_add_up(problem: Problem, update_diagonal: bool) -> None:
    influence = fitted(problem, update_diagonal)
    given = (problem.x_test, problem.y_test, problem.x, problem.y)
    by_layer = influence.influences_by_layer(*given)
    assert tuple(by_layer) == influence.block_names
    total = torch.stack([*by_layer.values()]).sum(dim=0)
    assert relative_error(total, influence.influences(*given)) < 1e-12


def test_factors_by_layer_give_the_scores_by_layer(problem: Problem) -> None:
    influence = fitted(problem)
    factors = influence.influence_factors_by_layer(problem.x_test, problem.y_test)
    scores = influence.influences_from_factors_by_layer(factors, problem.x, problem.y)
    given = (problem.x_test, problem.y_test, problem.x, problem.y)
    for name, expected in influence.influences_by_layer(*given).items():
        assert factors[name].shape == (TESTS, influence.fitted.blocks[name].space.size)
        assert torch.allclose(scores[name], expected, rtol=1e-9, atol=1e-12)


def test_regularizations_are_explored_without_another_fit(problem: Problem) -> None:
    influence = fitted(problem)
    points = (problem.x_test, problem.y_test)
    values = [0.1, Damping(relative=0.1)]
    explored = influence.explore_hessian_regularization(*points, values)
    assert list(explored) == values
    for value in values:
        expected = fitted(problem, hessian_regularization=value)
        for name, scores in expected.influences_by_layer(*points).items():
            assert torch.allclose(explored[value][name], scores, rtol=1e-9, atol=1e-12)


def test_a_relative_damping_is_of_the_mean_eigenvalue_of_each_layer(problem: Problem) -> None:
    influence = fitted(problem, hessian_regularization=Damping(relative=0.1))
    operator = EkfacOperator(problem.model, problem.loss, problem.batches())
    for name, value in influence.fitted_regularization.items():
        matrix = operator.blocks[name].to_dense()
        assert value == pytest.approx(0.1 * matrix.diagonal().mean().item(), rel=1e-9)


def test_a_regularization_for_each_layer(problem: Problem) -> None:
    values = {name: 0.01 * (i + 1) for i, name in enumerate(fitted(problem).block_names)}
    influence = fitted(problem, hessian_regularization=values)
    assert influence.fitted_regularization == values
    with pytest.raises(ParameterNameError, match="names the blocks"):
        fitted(problem, hessian_regularization={"nothing": 1.0})


# --- fits ----------------------------------------------------------------------------------------


def test_cross_entropy_is_understood_without_a_loss(problem: Problem) -> None:
    given = (problem.x_test, problem.y_test, problem.x, problem.y)
    alone = EkfacInfluence(problem.model, True, 1e-3).fit(problem.batches())
    assert torch.equal(alone.influences(*given), fitted(problem).influences(*given))


def test_a_saved_fit_gives_the_same_scores_without_the_data(
    problem: Problem, update_diagonal: bool, tmp_path: Path
) -> None:
    given = (problem.x_test, problem.y_test, problem.x, problem.y)
    settings = {"hessian_regularization": Damping(relative=0.1)}
    influence = fitted(problem, update_diagonal, **settings)
    influence.save(tmp_path / "fit")
    loaded = EkfacInfluence(problem.model, update_diagonal, loss=problem.loss, **settings)
    loaded.load(tmp_path / "fit")
    assert torch.equal(loaded.influences(*given), influence.influences(*given))
    again = loaded.with_regularization(Damping(relative=0.3))
    expected = influence.with_regularization(Damping(relative=0.3))
    assert again.fitted_regularization == pytest.approx(expected.fitted_regularization)


def test_a_fit_of_kfac_is_none_of_ekfac(problem: Problem, tmp_path: Path) -> None:
    fitted(problem, update_diagonal=False).save(tmp_path / "fit")
    with pytest.raises(StoreError, match="other settings"):
        EkfacInfluence(problem.model, True, 1e-3, loss=problem.loss).load(tmp_path / "fit")


def test_a_fit_of_other_parameters_is_refused(problem: Problem, tmp_path: Path) -> None:
    influence = fitted(problem)
    influence.save(tmp_path / "fit")
    with torch.no_grad():
        next(problem.model.parameters()).add_(1.0)
    other = EkfacInfluence(problem.model, True, 1e-3, loss=problem.loss)
    with pytest.raises(StoreError, match="other parameters"):
        other.load(tmp_path / "fit")


def test_a_step_of_the_model_changes_nothing_that_was_fitted(problem: Problem) -> None:
    given = (problem.x_test, problem.y_test, problem.x, problem.y)
    influence = fitted(problem)
    before = influence.influences(*given)
    with torch.no_grad():
        for parameter in problem.model.parameters():
            parameter.add_(1.0)
    assert torch.equal(influence.influences(*given), before)
    assert not torch.equal(influence.fit(problem.batches()).influences(*given), before)


def test_random_labels_follow_the_seed(problem: Problem) -> None:
    given = (problem.x_test, problem.y_test, problem.x, problem.y)

    def scores(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        settings = {"fisher_type": "monte-carlo", "generator": generator}
        return fitted(problem, **settings).influences(*given)

    assert torch.equal(scores(0), scores(0))
    assert not torch.equal(scores(0), scores(1))


def test_a_calculator_computes_the_same_in_pieces(problem: Problem, tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    influence = fitted(problem)
    calculator = SequentialInfluenceCalculator(influence)
    test = [(problem.x_test[:3], problem.y_test[:3]), (problem.x_test[3:], problem.y_test[3:])]
    lazy = calculator.influences(test, problem.batches())
    given = (problem.x_test, problem.y_test, problem.x, problem.y)
    stored = torch.as_tensor(lazy.to_zarr(tmp_path / "scores")[:])
    assert relative_error(stored, influence.influences(*given)) < 1e-9


def test_saturated_points_have_finite_scores() -> None:
    problem = Problem("perceptron")
    with torch.no_grad():
        for parameter in problem.model.parameters():
            parameter.mul_(100.0)
    influence = EkfacInfluence(problem.model, True, 0.0).fit(problem.batches())
    scores = influence.influences(problem.x_test, problem.y_test, problem.x, problem.y)
    assert scores.isfinite().all()


# --- refusals ------------------------------------------------------------------------------------


def test_unknown_settings_are_refused() -> None:
    problem = Problem("perceptron")
    with pytest.raises(ArgumentTypeError, match="block_structure is not a choice"):
        EkfacInfluence(problem.model, block_structure="full")
    with pytest.raises(ArgumentTypeError, match="second_order_mode is not a choice"):
        EkfacInfluence(problem.model, second_order_mode="hessian")
    with pytest.raises(ArgumentTypeError, match="is it the loss"):
        EkfacInfluence(problem.model, nn.MSELoss())
    with pytest.raises(ArgumentError, match="fisher_type must be one of"):
        EkfacInfluence(problem.model, fisher_type="exact")
    with pytest.raises(ArgumentTypeError, match="another name of"):
        EkfacInfluence(problem.model, regularization=0.1, hessian_regularization=0.1)
    with pytest.raises(NotFittedError):
        EkfacInfluence(problem.model).influences(problem.x, problem.y)


def test_nothing_is_said_of_a_fit_that_went_well(problem: Problem) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(problem)


def test_what_is_what_is_printed() -> None:
    text = repr(fitted(Problem("mixed")))
    for line in (
        "block 'embed': Kronecker('embed', Embedding, 4 x 6) of 24",
        "block 'conv': Kronecker('conv', Conv1d, 2 x 2 x 5) of 20",
        "block 'norm': Exact('norm', LayerNorm) of 8",
        "block '': Exact('', Mixed) of 1",
    ):
        assert line in text


def test_a_layer_may_be_none_for_some_points_only() -> None:
    class SometimesTwice(nn.Module):
        """Uses the weight of a layer once more for large inputs."""

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            again = nn.functional.linear(x, self.layer.weight)
            return self.head(torch.tanh(self.layer(x)) + torch.where(x[:, :1] > 5, again, 0.0))

    problem = Problem("perceptron")
    problem.model = SometimesTwice().double()
    influence = fitted(problem)
    train = problem.x.clone()
    train[0, 0] = 6.0
    scores = influence.influences(problem.x_test, problem.y_test, train, problem.y)
    test = problem.gradients(problem.x_test, problem.y_test)
    expected = test @ dense(problem, True, 1e-3) @ problem.gradients(train, problem.y).T
    assert relative_error(scores, expected) < 1e-9
