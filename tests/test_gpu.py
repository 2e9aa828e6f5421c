"""What a GPU runs differently: kernels, moves between devices, solves. Needs a CUDA device."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from influence_cases import CASES, Problem
from kronecker_cases import CASES as KRONECKER_CASES
from kronecker_cases import problem as kronecker_problem
from reference import random_spd, relative_error
from solver_cases import true_residuals
from test_layers import LAYERS, OPERATORS, case
from torch import nn

from hessops import (
    CgOperator,
    DirectSolveOperator,
    DistributedAveraging,
    EkfacOperator,
    GeneralizedGaussNewtonOperator,
    JacobiPreconditioner,
    KfacOperator,
    LissaOperator,
    MatrixOperator,
    MinresOperator,
    NystroemPreconditioner,
)
from hessops.distributed import gather, together
from hessops.influence import SequentialInfluenceCalculator
from hessops.testing import check_operator

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("operator_name", OPERATORS)
@pytest.mark.parametrize("name", LAYERS)
def test_products_equal_those_on_the_cpu(name: str, operator_name: str) -> None:
    model, x, y = case(name, torch.float64)
    on_cpu = OPERATORS[operator_name](model, nn.CrossEntropyLoss(), [(x, y)])
    vectors = torch.randn(3, on_cpu.input_size, dtype=torch.float64)
    expected = on_cpu.apply(vectors)
    moved = on_cpu.to("cuda").apply(vectors)
    built = OPERATORS[operator_name](model.cuda(), nn.CrossEntropyLoss(), [(x, y)]).apply(vectors)
    for result in (moved, built):
        assert result.device.type == "cuda"
        assert relative_error(result.cpu(), expected) < 1e-9


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_averages_over_ranks_equal_those_of_one_process(backend: str) -> None:
    model, x, y = case("layer norm", torch.float64)
    model, data, loss = model.cuda(), [(x, y)], nn.CrossEntropyLoss()
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        averaging = DistributedAveraging()
        over_ranks = GeneralizedGaussNewtonOperator(model, loss, data, averaging=averaging)
        rows = torch.randn(3, over_ranks.input_size, dtype=torch.float64)
        expected = GeneralizedGaussNewtonOperator(model, loss, data).apply(rows)
        assert torch.equal(over_ranks.apply(rows), expected)
        factored = KfacOperator(model, loss, data, averaging=averaging)
        alone = KfacOperator(model, loss, data).to_dense()
        assert relative_error(factored.to_dense(), alone) < 1e-12
        assert torch.equal(gather(expected, dim=1), expected)
        with pytest.raises(ZeroDivisionError), together():
            raise ZeroDivisionError
    finally:
        dist.destroy_process_group()


def test_operators_conform_and_move_back() -> None:
    model, x, y = case("layer norm", torch.float64)
    operator = GeneralizedGaussNewtonOperator(model.cuda(), nn.CrossEntropyLoss(), [(x, y)])
    dense = operator.to("cpu").to_dense()
    check_operator(operator, dense, accuracy=1e-9)


def test_solves_equal_those_on_the_cpu_and_leave_the_random_state() -> None:
    model, x, y = case("layer norm", torch.float64)
    operator = GeneralizedGaussNewtonOperator(model, nn.CrossEntropyLoss(), [(x, y)])
    rhs = torch.randn(3, operator.input_size, dtype=torch.float64)
    state = torch.cuda.get_rng_state()
    on_gpu = operator.to("cuda")
    solution = CgOperator(on_gpu, 1e-2, rtol=1e-10).solve(rhs)
    assert bool(solution.converged.all())
    expected = CgOperator(operator, 1e-2, rtol=1e-10).solve(rhs).value
    assert relative_error(solution.value.cpu(), expected) < 1e-6
    direct = DirectSolveOperator(on_gpu.to_dense(), 1e-2).apply(rhs)
    assert relative_error(direct.cpu(), expected) < 1e-6
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("recipe", [None, JacobiPreconditioner(4), NystroemPreconditioner(5)])
@pytest.mark.parametrize(
    "solver", [CgOperator, partial(CgOperator, use_block_cg=True), MinresOperator]
)
def test_solvers_meet_their_tolerance(solver, recipe, dtype: torch.dtype) -> None:
    matrix = random_spd(40, 1e3, dtype=dtype)
    rhs = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    rhs[3] = rhs[1]
    rhs[4] = 0
    inverse = solver(MatrixOperator(matrix.cuda()), preconditioner=recipe)
    solution = inverse.solve(rhs)
    assert solution.value.device.type == "cuda"
    assert bool(solution.converged.all())
    assert float(true_residuals(matrix, rhs, solution.value.cpu()).max()) <= 1.1 * inverse.rtol


def test_lissa_meets_its_tolerance() -> None:
    matrix = random_spd(20, 10.0)
    rhs = torch.ones(20, dtype=torch.float64)
    operator = MatrixOperator(50 * matrix.cuda())
    solution = LissaOperator.from_operator(operator, scale="auto").solve(rhs)
    assert bool(solution.converged.all())
    assert float(true_residuals(50 * matrix, rhs, solution.value.cpu()).max()) <= 1.01e-4


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["up", "perturbation"])
def test_influences_equal_those_on_the_cpu(case: str, mode: str, tmp_path: Path) -> None:
    problem = Problem()
    test, train = (problem.x_test, problem.y_test), (problem.x, problem.y)
    on_cpu = CASES[case].build(problem, "layer_wise").fit(problem.batches())
    expected = on_cpu.influences(*test, *train, mode=mode)
    moved = on_cpu.to("cuda").influences(*test, *train, mode=mode)
    problem.model.cuda()
    built = CASES[case].build(problem, "layer_wise").fit(problem.batches())
    for result in (moved, built.influences(*test, *train, mode=mode)):
        assert result.device.type == "cuda"
        assert relative_error(result.cpu(), expected) < 1e-6
    lazy = SequentialInfluenceCalculator(built).influences([test], problem.batches((3, 3, 1)), mode)
    assert relative_error(lazy.compute(), expected) < 1e-6
    assert lazy.to_zarr(tmp_path / "stored").shape == expected.shape


@pytest.mark.parametrize("fisher_type", ["type-2", "monte-carlo", "empirical"])
@pytest.mark.parametrize("kind", [KfacOperator, EkfacOperator])
@pytest.mark.parametrize("name", KRONECKER_CASES)
def test_kronecker_factors_equal_those_on_the_cpu(
    name: str, kind: type[KfacOperator], fisher_type: str
) -> None:
    given = kronecker_problem(name)

    def made(model: nn.Module) -> KfacOperator:
        generator = torch.Generator().manual_seed(0)
        batches = [(given.x, given.y)]
        return kind(model, given.loss, batches, fisher_type, generator=generator)

    on_cpu = made(given.model)
    vectors = torch.randn(3, on_cpu.input_size, dtype=torch.float64)
    expected = on_cpu.inverse(regularization=1e-2).apply(vectors)
    moved = on_cpu.to("cuda").inverse(regularization=1e-2).apply(vectors)
    built = made(copy.deepcopy(given.model).cuda()).inverse(regularization=1e-2).apply(vectors)
    for result in (moved, built):
        assert result.device.type == "cuda"
        assert relative_error(result.cpu(), expected) < 1e-8
