"""The example attributes as it says, at a reduced size."""

from __future__ import annotations

import copy
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
    return loaded("influence_digits")


@pytest.fixture(scope="module")
def run(example: ModuleType):
    digits = example.split_digits(NUM_TRAIN, seed=0)
    model = example.train(example.untrained(seed=0), digits, torch.ones(NUM_TRAIN))
    torch.manual_seed(0)  # the sketch
    chosen = example.ten_test_images(model, digits)
    return digits, model, example.attribute(model, digits, chosen)


def flat_gradients(model, x, y) -> torch.Tensor:
    """The gradients of points, by a plain loop."""
    params = list(model.parameters())
    rows = []
    for i in range(len(x)):
        loss = torch.nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        rows.append(torch.nn.utils.parameters_to_vector(torch.autograd.grad(loss, params)))
    return torch.stack(rows)


def test_the_test_images_are_four_read_wrong_and_six_read_right(example: ModuleType, run) -> None:
    digits, model, found = run
    losses, predicted = example.losses_on_test(model, digits)
    is_right = (predicted == digits.y_test)[found.chosen]
    assert is_right.tolist() == [False] * 4 + [True] * 6
    assert len(set(found.chosen.tolist())) == 10
    assert losses[found.chosen[0]] == losses.max()


def test_every_system_is_solved_to_its_tolerance(run) -> None:
    _, _, found = run
    assert found.solution.relative_residual_norms.shape == (10,)
    assert found.solution.relative_residual_norms.max() <= 1e-4


def test_the_influences_are_those_of_a_dense_solve(example: ModuleType, run) -> None:
    digits, model, found = run
    model = copy.deepcopy(model).double()
    x, x_test = digits.x.double(), digits.x_test.double()[found.chosen]
    loss = torch.nn.CrossEntropyLoss()
    curvature = GeneralizedGaussNewtonOperator(model, loss, [(x, digits.y)]).to_dense()
    damped = curvature + example.WEIGHT_DECAY * torch.eye(len(curvature), dtype=torch.float64)
    factors = torch.linalg.solve(
        damped, flat_gradients(model, x_test, digits.y_test[found.chosen]).T
    )
    expected = (flat_gradients(model, x, digits.y) @ factors).T
    for top, largest in ((found.helpful, True), (found.harmful, False)):
        values = expected.topk(example.TOP, largest=largest).values
        errors = (top.values - values).norm(dim=1) / values.norm(dim=1)
        assert errors.max() < 0.01
        of_the_points = expected.gather(1, top.indices)
        assert (top.values - of_the_points).norm() < 0.01 * of_the_points.norm()


def test_helpful_is_positive_harmful_is_negative_and_both_come_sorted(run) -> None:
    _, _, found = run
    assert bool((found.helpful.values > 0).all())
    assert bool((found.harmful.values < 0).all())
    assert bool((found.helpful.values.diff() <= 0).all())
    assert bool((found.harmful.values.diff() >= 0).all())


def test_helpful_images_mostly_share_the_class_and_harmful_ones_less_often(run) -> None:
    digits, _, found = run
    labels = digits.y_test[found.chosen][:, None]
    helpful = (digits.y[found.helpful.indices] == labels).double().mean()
    harmful = (digits.y[found.harmful.indices] == labels).double().mean()
    assert helpful > 0.4  # 0.1 by chance
    assert harmful < helpful


def test_losses_change_as_predicted_when_the_network_is_trained_again(
    example: ModuleType, run
) -> None:
    digits, model, found = run
    rows = [0, 4]
    for top, sign in ((found.helpful, 1), (found.harmful, -1)):
        changes = example.changes_without(model, digits, found.chosen[rows], top.indices[rows])
        assert bool((sign * changes > 0).all())


def test_the_numbers_in_the_picture_have_as_many_decimals_as_they_need(example: ModuleType) -> None:
    assert example.signed(torch.tensor([0.31, -0.042])) == ["+0.31", "\N{MINUS SIGN}0.04"]
    assert example.signed(torch.tensor([0.0031, 0.0004])) == ["+0.0031", "+0.0004"]


def test_the_script_writes_its_picture_and_reports(
    example: ModuleType, run, tmp_path: Path, monkeypatch, capsys
) -> None:
    import matplotlib.image

    _, model, _ = run
    monkeypatch.setattr(example, "train", lambda *_, **__: model)  # trained once is enough
    output = tmp_path / "new" / "folder"
    example.main(num_train=NUM_TRAIN, seed=0, output=output)
    printed = capsys.readouterr().out
    assert "10 of 10 systems solved" in printed
    assert printed.count(" read as ") == 10
    page = (output / "influence_digits.html").read_text("utf-8")
    assert "All 10 right-hand sides met their tolerance" in page

    picture = matplotlib.image.imread(output / "influence_digits.png")[..., :3]
    height, width, _ = picture.shape
    assert width == 1350
    assert height == 1440
    # Each row and each group has its images: gray, with red frames among the neighbours.
    gray = picture.mean(axis=2)
    for band in (*_parts(gray, 10), *_parts(gray.T, 3)):
        assert band.std() > 0.2
    is_red = (picture[..., 0] > 0.7) & (picture[..., 1] < 0.3)
    assert is_red[:, : width // 11].sum() == 0
    assert is_red[:, width // 11 :].sum() > 1000


def _parts(picture, count: int):
    step = len(picture) // count
    return [picture[i * step : (i + 1) * step] for i in range(count)]
