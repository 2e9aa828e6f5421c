"""The demo does what it says, at a reduced size."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from example_scripts import loaded

from hessops import GeneralizedGaussNewtonOperator, Objective
from hessops.functional import mean_gradient, per_sample_gradients
from hessops.streaming import Batch

pytestmark = pytest.mark.program

NUM_TRAIN = 150


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    return loaded("mislabelled_digits")


@pytest.fixture(scope="module")
def run(demo: ModuleType):
    torch.manual_seed(0)
    digits = demo.flipped_digits(NUM_TRAIN, seed=0)
    model = demo.train(digits.x, digits.given, seed=0)
    return digits, model, demo.influence(model, digits, chunk=64)


def test_a_tenth_of_the_labels_is_wrong_and_the_test_points_are_others(run) -> None:
    digits, _, _ = run
    assert int(digits.flipped.sum()) == NUM_TRAIN // 10
    assert len(digits.x) + len(digits.x_test) == 1797


def test_every_right_hand_side_converged(run) -> None:
    _, _, found = run
    assert sum(int(solution.converged.sum()) for solution in found.solutions) == NUM_TRAIN


def test_the_scores_are_those_of_a_dense_solve(demo: ModuleType, run) -> None:
    digits, model, found = run
    loss = torch.nn.CrossEntropyLoss()
    model = model.double()
    x, x_test = digits.x.double(), digits.x_test.double()
    curvature = GeneralizedGaussNewtonOperator(model, loss, [(x, digits.given)]).to_dense()
    objective = Objective(model, loss)
    points = Batch.from_raw((x, digits.given))
    gradients = objective.space.flatten(per_sample_gradients(objective, objective.params, points))
    test_points = Batch.from_raw((x_test, digits.y_test))
    test_gradient = mean_gradient(objective, objective.params, test_points)
    damped = curvature + demo.WEIGHT_DECAY * torch.eye(len(curvature), dtype=torch.float64)
    steps = torch.linalg.solve(damped, gradients.T).T / NUM_TRAIN
    model.float()
    on_itself = (steps * gradients).sum(dim=1)
    on_test = steps @ objective.space.flatten(test_gradient)
    for score, expected in ((found.on_itself, on_itself), (found.on_test_loss, on_test)):
        assert (score - expected).norm() < 0.01 * expected.norm()


def test_influence_finds_the_wrong_labels(demo: ModuleType, run) -> None:
    digits, _, found = run
    assert demo.precision(found.on_itself, digits.flipped) > 0.5
    assert demo.precision(-found.on_test_loss, digits.flipped) > 0.3


def test_picture_and_page_are_written_whole(demo: ModuleType, run, tmp_path: Path) -> None:
    import matplotlib.image

    digits, model, found = run
    facts = demo.summary(digits, model, found, seconds=1.0)
    figure = demo.contact_sheet(digits, found)
    picture, page = demo.write(tmp_path / "new" / "folder", figure, facts)
    height, width, _ = matplotlib.image.imread(picture).shape
    assert width == 1210
    assert height > 300
    text = page.read_text("utf-8")
    for name in ("self-influence", "harm to the test loss", "training loss", "guessing"):
        assert f"precision, {name}" in text
    assert f"{NUM_TRAIN} of {NUM_TRAIN}" in text
    assert "http" not in text
