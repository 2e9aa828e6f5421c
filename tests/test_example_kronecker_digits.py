"""The example compares as it says, at a reduced size."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from example_scripts import loaded

from hessops import GeneralizedGaussNewtonOperator

pytestmark = pytest.mark.program

NUM_TRAIN = 300


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return loaded("kronecker_digits")


@pytest.fixture(scope="module")
def network(example: ModuleType):
    digits = example.split_digits(NUM_TRAIN, seed=0)
    return example.trained(digits, seed=0), digits


@pytest.fixture(scope="module")
def eigen(example: ModuleType, network):
    return example.spectra(*network)


@pytest.fixture(scope="module")
def solved(example: ModuleType, network):
    torch.manual_seed(0)  # the sketch
    return example.solves(*network, num_points=3)


@pytest.fixture(scope="module")
def found(example: ModuleType, network):
    torch.manual_seed(0)
    return example.scores(*network, num_points=20)


def test_eigenvalues_of_ekfac_are_the_curvatures_along_the_eigenvectors(eigen) -> None:
    assert (eigen.ekfac - eigen.along).norm() < 1e-10 * eigen.along.norm()
    assert (eigen.kfac - eigen.along).norm() > 1e-3 * eigen.along.norm()


def test_ekfac_has_the_trace_of_the_exact_matrix(eigen) -> None:
    assert abs(eigen.ekfac.sum() - eigen.exact.sum()) < 1e-10 * eigen.exact.sum()


def test_ekfac_is_the_closer_one_for_every_layer(eigen) -> None:
    assert list(eigen.errors["KFAC"]) == ["0", "2"]
    for layer, error in eigen.errors["EKFAC"].items():
        assert error < eigen.errors["KFAC"][layer] < 1


def test_every_system_is_solved_to_its_tolerance(solved, found) -> None:
    for solution in solved.values():
        assert solution.relative_residual_norms.max() <= 1e-6
    assert found.solution.relative_residual_norms.max() <= 1e-7


def test_preconditioners_save_passes(solved) -> None:
    passes = {name: solution.num_applications for name, solution in solved.items()}
    assert passes["EKFAC + 10 λI"] < passes["EKFAC + λI"] < passes["none"]
    assert passes["Nyström, rank 50"] < passes["none"]


def test_the_exact_influences_are_those_of_a_dense_solve(
    example: ModuleType, network, found
) -> None:
    model, digits = network
    matrix = GeneralizedGaussNewtonOperator(model, example.LOSS, digits.batches).to_dense()
    damped = matrix + example.WEIGHT_DECAY * torch.eye(len(matrix), dtype=torch.float64)
    params = list(model.parameters())

    def gradients(x, y) -> torch.Tensor:
        losses = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
        rows = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
        return torch.stack([torch.nn.utils.parameters_to_vector(row) for row in rows])

    of_test = gradients(digits.x_test[:20], digits.y_test[:20])
    expected = of_test @ torch.linalg.solve(damped, gradients(digits.x, digits.y).T)
    assert (found.exact - expected).norm() < 1e-5 * expected.norm()


def test_ekfac_is_closer_to_the_exact_influences_than_the_product_of_gradients(found) -> None:
    correlations, shared = found.correlations(), found.shared()
    assert correlations["EKFAC"] > 0.6
    for way in ("EKFAC, empirical", "EKFAC"):
        assert correlations[way] > correlations["product of gradients"] + 0.1
        assert shared[way] > shared["product of gradients"]


def test_the_script_writes_its_pictures_and_reports(
    example: ModuleType, network, eigen, solved, found, tmp_path: Path, monkeypatch, capsys
) -> None:
    import matplotlib.image

    parts = {"trained": network[0], "spectra": eigen, "solves": solved, "scores": found}
    for name, part in parts.items():  # computed once is enough
        monkeypatch.setattr(example, name, lambda *_, part=part, **__: part)
    output = tmp_path / "new" / "folder"
    example.main(num_train=NUM_TRAIN, seed=0, output=output)
    printed = capsys.readouterr().out
    assert printed.count("3 of 3 systems solved") == 4
    assert printed.count("of the top five shared") == 3
    shapes = {
        "eigenvalues": (460, 1100),
        "convergence": (480, 800),
        "influences": (440, 1200),
    }
    for name, shape in shapes.items():
        picture = matplotlib.image.imread(output / f"{name}.png")[..., :3]
        assert picture.shape[:2] == shape
        # Every panel has something that is neither black nor white.
        spread = picture.max(axis=2) - picture.min(axis=2)
        panels = {"eigenvalues": 2, "convergence": 1, "influences": 3}[name]
        for panel in range(panels):
            width = shape[1] // panels
            assert (spread[:, panel * width : (panel + 1) * width] > 0.3).sum() > 100
