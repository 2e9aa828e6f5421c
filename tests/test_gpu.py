"""What a GPU runs differently: kernels, moves between devices, solves. Needs a CUDA device."""

from __future__ import annotations

import pytest
import torch
from reference import relative_error
from test_layers import LAYERS, OPERATORS, case
from torch import nn

from hessops import CgOperator, DirectSolveOperator, GeneralizedGaussNewtonOperator
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
