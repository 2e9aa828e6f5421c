"""LiSSA: the recursion, its scale, its noise and its divergence, by true residuals."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from reference import DenseReference, random_spd
from sklearn.datasets import load_digits
from solver_cases import Counting, normal, true_residuals
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hessops import (
    GeneralizedGaussNewtonBatchOperation,
    GeneralizedGaussNewtonOperator,
    HessianBatchOperation,
    LissaOperator,
    MatrixOperator,
    SolveStatus,
)
from hessops.errors import ConvergenceWarning, DivergenceError, StructureError

LOSS = nn.MSELoss()
CLASSES = nn.CrossEntropyLoss()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


X, Y = normal(30, 3, seed=11), normal(30, 2, seed=12)
MODEL = network()
SIZE = sum(p.numel() for p in MODEL.parameters())
# Batches of 8, 8, 8 and 6.
RAGGED = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 30, 8)]
OPERATION = GeneralizedGaussNewtonBatchOperation(MODEL, LOSS)


def dense(x: Tensor = X, y: Tensor = Y) -> Tensor:
    return DenseReference(MODEL, LOSS, x, y).generalized_gauss_newton()


def recursion(
    matrices: Iterator[Tensor],
    rhs: Tensor,
    steps: int,
    *,
    shift: float,
    dampen: float,
    scale: float,
) -> Tensor:
    current = rhs.clone()
    eye = torch.eye(rhs.shape[1], dtype=rhs.dtype)
    for _, matrix in zip(range(steps), matrices, strict=False):
        current = rhs + (1 - dampen) * current - current @ (matrix + shift * eye) / scale
    return current / scale


def cycle(batches: list[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    matrices = [dense(x, y) for x, y in batches]
    while True:
        yield from matrices


@pytest.mark.parametrize("steps", [1, 3, 11])
@pytest.mark.parametrize("batches", [RAGGED, [(X, Y)]], ids=["ragged", "all"])
@pytest.mark.parametrize("dampen", [0.0, 0.05])
def test_the_steps_are_those_of_the_recursion_over_the_batches_in_order(
    batches, steps: int, dampen: float
) -> None:
    rhs = normal(3, SIZE)
    lissa = LissaOperator(OPERATION, batches, 0.1, maxiter=steps, dampen=dampen, scale=20.0)
    expected = recursion(cycle(batches), rhs, steps, shift=0.1, dampen=dampen, scale=20.0)
    assert torch.allclose(lissa.solve(rhs).value, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dampen", [0.0, 0.1])
def test_with_all_data_in_a_batch_it_converges_to_its_fixed_point(dampen: float) -> None:
    rhs = normal(4, SIZE)
    rhs[2] = 0
    rhs[3] *= 1e-9
    lissa = LissaOperator(OPERATION, [(X, Y)], 0.2, dampen=dampen, scale=5.0, rtol=1e-10)
    solution = lissa.solve(rhs)
    assert bool(solution.converged.all())
    system = dense() + (0.2 + dampen * 5.0) * torch.eye(SIZE).double()
    assert torch.allclose(lissa.system.to_dense(), system, rtol=1e-10)
    assert float(true_residuals(system, rhs, solution.value).max()) <= 1.01e-10
    assert solution.value[2].count_nonzero() == 0
    assert solution.iterations[2] == 0


def test_every_right_hand_side_stops_on_its_own() -> None:
    matrix = torch.diag(torch.tensor([1.0, 0.5, 0.01])).double()
    lissa = LissaOperator.from_operator(MatrixOperator(matrix), scale=1.0, maxiter=5000)
    solution = lissa.solve(torch.eye(3).double())
    assert bool(solution.converged.all())
    first, second, third = solution.iterations.tolist()
    assert first < second < third


def test_the_tolerance_is_relative_to_each_right_hand_side() -> None:
    matrix, rhs = random_spd(10, 10.0), normal(3, 10)
    rhs[1] *= 1e8
    rhs[2] *= 1e-8
    solution = LissaOperator.from_operator(MatrixOperator(matrix), scale=1.0).solve(rhs)
    assert bool(solution.converged.all())
    assert float(true_residuals(matrix, rhs, solution.value).max()) <= 1.01e-4
    alone = LissaOperator.from_operator(MatrixOperator(matrix), scale=1.0).solve(rhs[2])
    assert torch.allclose(alone.value, solution.value[2], rtol=1e-9)


def test_a_whole_operator_takes_one_application_a_step() -> None:
    operator = Counting(random_spd(10, 10.0))
    solution = LissaOperator.from_operator(operator, scale=1.0).solve(normal(5, 10))
    assert operator.count == solution.num_applications
    assert operator.count <= int(solution.iterations.max()) + 6


# --- the scale ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    data = load_digits()
    x = torch.tensor(data.data[:500], dtype=torch.float32)
    y = torch.tensor(data.target[:500])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        CLASSES(model(x), y).backward()
        optimizer.step()
    return model, x, y


def test_auto_converges_on_the_digits_network_where_ten_diverges(digits) -> None:
    model, x, y = digits
    operation = GeneralizedGaussNewtonBatchOperation(model, CLASSES)
    loss = CLASSES(model(x[:1]), y[:1])
    rhs = nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(model.parameters())))
    ten = LissaOperator(operation, [(x, y)], 1.0, scale=10.0)
    with pytest.raises(DivergenceError, match=r"scale=10 is too small.*scale='auto' chooses it"):
        ten.apply(rhs)
    failed = ten.solve(rhs)
    assert failed.status == (SolveStatus.DIVERGED,)
    assert int(failed.iterations) < 50
    assert failed.value.count_nonzero() == 0
    assert "scale=10 is too small" in failed.report()

    auto = LissaOperator(operation, [(x, y)], 1.0, scale="auto")
    solution = auto.solve(rhs)
    assert bool(solution.converged)
    assert "scale=" in solution.report()
    assert "largest absolute eigenvalue" in solution.report()
    ggn = GeneralizedGaussNewtonOperator(model, CLASSES, [(x, y)]).shift(1.0)
    residual = (rhs - ggn.apply(solution.value)).norm() / rhs.norm()
    assert residual <= 1.05e-4


def test_the_scale_named_when_it_diverges_is_stable(digits) -> None:
    model, x, y = digits
    operation = GeneralizedGaussNewtonBatchOperation(model, CLASSES)
    batches = [(x[:250], y[:250]), (x[250:], y[250:])]
    rhs = normal(sum(p.numel() for p in model.parameters()), dtype=torch.float32)
    failed = LissaOperator(operation, batches, 1.0, scale=10.0).solve(rhs)
    assert failed.status == (SolveStatus.DIVERGED,)
    named = float(failed.detail.split("scale=")[2].split(" ")[0])
    assert LissaOperator(operation, batches, 1.0, scale=named).solve(rhs).status != failed.status


@pytest.mark.parametrize("dampen", [0.0, 0.5])
def test_auto_is_the_smallest_safe_scale_of_the_worst_batch(dampen: float) -> None:
    largest = max(torch.linalg.eigvalsh(dense(x, y))[-1].item() for x, y in RAGGED)
    lissa = LissaOperator(OPERATION, RAGGED, 0.3, dampen=dampen, scale="auto")
    least = (largest + 0.3) / (2 - dampen)
    assert 2 * least < lissa.resolved_scale < 2.5 * least
    whole = torch.linalg.eigvalsh(dense())[-1].item()
    one = LissaOperator(OPERATION, [(X, Y)], 0.3, dampen=dampen, scale="auto")
    least = (whole + 0.3) / (2 - dampen)
    assert least < one.resolved_scale < 1.2 * least
    changed = one.with_regularization(5.0)
    assert changed.resolved_scale > one.resolved_scale


def test_auto_is_within_a_tenth_for_a_hard_spectrum() -> None:
    for condition in (1e1, 1e4, 1e8):
        operator = MatrixOperator(300 * random_spd(60, condition))
        lissa = LissaOperator.from_operator(operator, scale="auto")
        assert 150 < lissa.resolved_scale < 200


def test_negative_curvature_is_told_from_a_small_scale() -> None:
    matrix = torch.diag(torch.tensor([1.0, 0.7, -0.2])).double()
    operator = MatrixOperator(matrix)
    with pytest.raises(DivergenceError, match=r"negative curvature.*Add more than 0\.2 to"):
        LissaOperator.from_operator(operator, scale=1.0).apply(torch.ones(3).double())
    solved = LissaOperator.from_operator(operator, 0.4, scale="auto").solve(torch.ones(3).double())
    assert bool(solved.converged)


def test_a_stable_but_slow_recursion_is_not_called_divergent() -> None:
    lissa = LissaOperator.from_operator(MatrixOperator(random_spd(20, 1e6)), scale=0.51)
    solution = lissa.solve(normal(2, 20))
    assert set(solution.status) == {SolveStatus.MAX_ITERATIONS}
    with pytest.warns(ConvergenceWarning, match="raise maxiter"):
        lissa.apply(normal(20))


def test_noise_of_batches_is_said_with_the_true_residual() -> None:
    rhs = normal(2, SIZE)
    lissa = LissaOperator(OPERATION, RAGGED, 0.05, maxiter=400, scale="auto")
    solution = lissa.solve(rhs)
    assert set(solution.status) == {SolveStatus.MAX_ITERATIONS}
    assert "more points in a batch" in solution.detail
    system = dense() + 0.05 * torch.eye(SIZE).double()
    assert torch.allclose(
        solution.relative_residual_norms, true_residuals(system, rhs, solution.value), rtol=1e-6
    )


# --- chains and loaders ------------------------------------------------------------------


def shuffling(generator: torch.Generator | None = None) -> DataLoader:
    return DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True, generator=generator)


def test_equal_calls_are_bitwise_equal_and_leave_the_random_state() -> None:
    rhs = normal(2, SIZE)
    for data in (RAGGED, shuffling()):
        for scale in (10.0, "auto"):
            lissa = LissaOperator(OPERATION, data, 0.1, maxiter=30, scale=scale, num_chains=2)
            state = torch.get_rng_state()
            first, second = lissa.solve(rhs), lissa.solve(rhs)
            again = LissaOperator(OPERATION, data, 0.1, maxiter=30, scale=scale, num_chains=2)
            assert torch.equal(first.value, second.value)
            assert torch.equal(first.value, again.solve(rhs).value)
            assert torch.equal(torch.get_rng_state(), state)


def test_a_second_solve_stops_where_the_first_did_although_it_knows_the_data() -> None:
    known, lissa = (LissaOperator(OPERATION, [(X, Y)], 0.5, scale=5.0) for _ in range(2))
    rhs = normal(2, SIZE)
    start = known.solve(rhs).value
    first, second = (lissa.solve(rhs, x0=start) for _ in range(2))
    assert torch.equal(first.iterations, second.iterations)
    assert torch.equal(first.value, second.value)


def test_the_generator_decides_the_order_of_a_loader_that_shuffles() -> None:
    rhs = normal(SIZE)

    def value(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        lissa = LissaOperator(OPERATION, shuffling(), 0.1, maxiter=9, generator=generator)
        return lissa.solve(rhs).value

    assert torch.equal(value(1), value(1))
    assert not torch.equal(value(1), value(2))


def test_chains_average_out_the_noise() -> None:
    rhs = normal(2, SIZE)
    residuals = []
    for count in (1, 10):
        lissa = LissaOperator(
            OPERATION, shuffling(), 0.2, maxiter=80, scale="auto", num_chains=count
        )
        residuals.append(float(lissa.solve(rhs).relative_residual_norms.mean()))
    assert residuals[1] < 0.6 * residuals[0]


def test_chains_over_a_fixed_order_begin_at_different_batches() -> None:
    rhs = normal(2, SIZE)
    lissa = LissaOperator(OPERATION, RAGGED, 0.1, maxiter=7, scale=20.0, num_chains=2)
    both = [
        recursion(cycle(batches), rhs, 7, shift=0.1, dampen=0.0, scale=20.0)
        for batches in (RAGGED, RAGGED[2:] + RAGGED[:2])
    ]
    assert torch.allclose(lissa.solve(rhs).value, sum(both) / 2, rtol=1e-10, atol=1e-12)


def test_the_loader_is_replayed_as_given() -> None:
    calls = []

    def collate(points):
        calls.append(len(points))
        x, y = zip(*points, strict=True)
        return torch.stack(x), torch.stack(y)

    order = [[3, 1, 2], [0, 4, 5, 6]]
    loader = DataLoader(TensorDataset(X, Y), batch_sampler=order, collate_fn=collate)
    rhs = normal(2, SIZE)
    solution = LissaOperator(OPERATION, loader, 0.1, maxiter=5, scale=20.0, cache=False).solve(rhs)
    batches = [(X[rows], Y[rows]) for rows in order]
    expected = recursion(cycle(batches), rhs, 5, shift=0.1, dampen=0.0, scale=20.0)
    assert torch.allclose(solution.value, expected, rtol=1e-10, atol=1e-12)
    assert set(calls) == {3, 4}


def test_the_start_is_h0_in_the_scale_of_the_recursion() -> None:
    rhs, h0 = normal(2, SIZE), normal(SIZE, seed=5)
    lissa = LissaOperator(OPERATION, [(X, Y)], 0.1, maxiter=1, scale=20.0, h0=h0)
    system = dense() + 0.1 * torch.eye(SIZE).double()
    expected = (rhs + h0 - h0 @ system / 20) / 20
    assert torch.allclose(lissa.solve(rhs).value, expected, rtol=1e-10, atol=1e-12)
    x0 = normal(2, SIZE, seed=6)
    started = (rhs + 20 * x0 - x0 @ system) / 20
    assert torch.allclose(lissa.solve(rhs, x0=x0).value, started, rtol=1e-10, atol=1e-12)
    three = LissaOperator(OPERATION, [(X, Y)], 0.1, h0=normal(3, SIZE))
    with pytest.raises(ValueError, match="h0 has 3 rows"):
        three.solve(rhs)


def test_a_hessian_of_batches_is_checked_and_refreshed() -> None:
    model = network()
    lissa = LissaOperator(
        HessianBatchOperation(model, LOSS), [(X, Y)], 2.0, scale="auto", rtol=1e-8
    )
    rhs = normal(2, SIZE)
    before = lissa.solve(rhs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert torch.equal(lissa.solve(rhs).value, before.value)
    after = lissa.refresh().solve(rhs)
    system = DenseReference(model, LOSS, X, Y).hessian() + 2.0 * torch.eye(SIZE).double()
    assert bool(after.converged.all())
    assert float(true_residuals(system, rhs, after.value).max()) <= 1.01e-8


@pytest.mark.parametrize(
    ("keywords", "error", "text"),
    [
        ({"maxiter": 0}, ValueError, "maxiter"),
        ({"dampen": -0.1}, ValueError, "dampen"),
        ({"dampen": 2.0}, ValueError, "dampen"),
        ({"scale": 0.0}, ValueError, "scale"),
        ({"scale": "best"}, ValueError, "scale"),
        ({"scale": None}, TypeError, "scale"),
        ({"rtol": -1.0}, ValueError, "rtol"),
        ({"num_chains": 0}, ValueError, "num_chains"),
        ({"generator": 3}, TypeError, "generator"),
        ({"h0": torch.ones(3).double()}, ValueError, "h0"),
        ({"h0": torch.full((SIZE,), torch.nan).double()}, ValueError, "h0"),
        ({"regularization": -1.0}, ValueError, "regularization"),
    ],
)
def test_bad_arguments_are_named(keywords, error, text: str) -> None:
    with pytest.raises(error, match=text):
        LissaOperator(OPERATION, RAGGED, **keywords)


def test_auto_needs_a_symmetric_operator() -> None:
    operator = MatrixOperator(torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(StructureError, match="not symmetric"):
        LissaOperator.from_operator(operator, scale="auto")
    solution = LissaOperator.from_operator(operator, scale=1.5).solve(torch.ones(2))
    assert bool(solution.converged)


def test_the_defaults_are_those_of_the_reference() -> None:
    lissa = LissaOperator(OPERATION, RAGGED)
    assert (lissa.maxiter, lissa.dampen, lissa.scale, lissa.rtol) == (1000, 0.0, 10.0, 1e-4)
    assert (lissa.regularization, lissa.num_chains, lissa.h0) == (0.0, 1, None)
    assert "scale=10" in repr(lissa)


def test_a_recursion_that_is_not_symmetric_may_grow_before_it_converges() -> None:
    matrix = torch.tensor([[1.0, 100.0], [0.0, 1.0]], dtype=torch.float64)
    operator = MatrixOperator(matrix)
    rhs = torch.ones(2, dtype=torch.float64)
    solution = LissaOperator.from_operator(operator, scale=2.0).solve(rhs)
    assert bool(solution.converged)
    assert float(true_residuals(matrix, rhs, solution.value).max()) <= 1.01e-4
    failed = LissaOperator.from_operator(operator, scale=0.3).solve(rhs)
    assert failed.status == (SolveStatus.DIVERGED,)
    assert "scale=0.3 must exceed" in failed.detail


def test_products_that_are_not_finite_are_said() -> None:
    class Overflowing(Counting):
        def _apply_rows(self, rows: Tensor) -> Tensor:
            return super()._apply_rows(rows) / (0 if self.count > 3 else 1)

    lissa = LissaOperator.from_operator(Overflowing(random_spd(4, 10.0)), scale=1.0)
    solution = lissa.solve(normal(2, 4))
    assert set(solution.status) == {SolveStatus.NON_FINITE}
    assert solution.value.count_nonzero() == 0
    assert bool(solution.residual_norms.isfinite().all())


def test_the_advice_for_strong_negative_curvature_is_possible() -> None:
    operator = MatrixOperator(torch.diag(torch.tensor([1.0, -100.0])).double())
    detail = LissaOperator.from_operator(operator, scale=1.0).solve(normal(2)).detail
    assert "Add more than 100 to regularization" in detail
    assert "dampen" not in detail
    assert bool(
        LissaOperator.from_operator(operator, 100.5, scale="auto").solve(normal(2)).converged
    )


def test_a_start_beyond_the_range_is_replaced() -> None:
    operator = MatrixOperator(torch.eye(3))
    rhs = 1e-12 * torch.ones(3)
    lissa = LissaOperator.from_operator(operator, scale=1.5)
    assert bool(lissa.solve(rhs, x0=torch.full((3,), 1e30)).converged)
