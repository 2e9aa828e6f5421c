"""The example tells and draws what it says, of a network that is trained for less long."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from example_scripts import loaded

from hessops import HessianOperator

pytestmark = pytest.mark.program


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return loaded("curvature_digits")


@pytest.fixture(scope="module")
def network(example: ModuleType):
    return example.trained(steps=20)


@pytest.fixture(scope="module")
def found(example: ModuleType, network):
    return example.numbers(*network)


def test_the_estimates_are_those_of_the_matrix(example: ModuleType, network, found) -> None:
    model, x, y = network
    matrix = HessianOperator(model, example.LOSS, [(x, y)]).to_dense()
    for name, estimate in found.items():
        if "trace" in name:
            assert abs(estimate.value - matrix.trace().item()) < 4 * estimate.standard_error
    density, pairs = example.spectrum(HessianOperator(model, example.LOSS, [(x, y)]))
    exact = torch.linalg.eigvalsh(matrix).flip(0)
    assert torch.allclose(pairs.values, torch.cat([exact[:10], exact[-10:]]), atol=1e-6)
    assert density.extremes == pytest.approx((exact[-1].item(), exact[0].item()), abs=1e-6)
    example.draw_spectrum(density, pairs)


def test_the_sketch_saves_steps(example: ModuleType, network, found, tmp_path: Path) -> None:
    solved = example.solves(*network)
    steps = {name: int(solution.iterations.max()) for name, solution in solved.items()}
    assert all(bool(solution.converged.all()) for solution in solved.values())
    assert steps["Nyström, rank 60"] < steps["none"]
    example.draw_numbers(found, solved).savefig(tmp_path / "numbers.png")
