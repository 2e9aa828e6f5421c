"""Predicted against true changes, by training again without a point."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_breast_cancer, load_wine
from softmax_regression import SoftmaxRegression
from torch import Tensor, nn

from hessops.influence import CgInfluence, DirectInfluence, NystroemSketchInfluence

DECAY = 1e-2


class Ridge:
    """Least squares with weight decay, whose minimiser is known for any weights of the points."""

    def __init__(self, num_points: int = 400, decay: float = 0.01) -> None:
        generator = torch.Generator().manual_seed(3)
        self.decay = decay
        self.x = torch.randn(num_points, 5, generator=generator, dtype=torch.float64)
        noise = torch.randn(num_points, generator=generator, dtype=torch.float64)
        self.y = self.x @ torch.arange(1.0, 6.0, dtype=torch.float64) + noise
        self.x_test = torch.randn(3, 5, generator=generator, dtype=torch.float64)
        self.y_test = torch.zeros(3, dtype=torch.float64)

    def trained(self, weights: Tensor) -> Tensor:
        """argmin 1/N Σ wᵢ (xᵢ·θ − yᵢ)² + decay/2 |θ|²."""
        n, identity = len(self.x), torch.eye(5, dtype=torch.float64)
        matrix = 2 / n * (self.x.T * weights) @ self.x + self.decay * identity
        return torch.linalg.solve(matrix, 2 / n * self.x.T @ (weights * self.y))

    def test_losses(self, theta: Tensor) -> Tensor:
        return (self.x_test @ theta - self.y_test).square()

    def influences(self, mode: str = "up") -> Tensor:
        model = nn.Linear(5, 1, bias=False).double()
        with torch.no_grad():
            model.weight.copy_(self.trained(torch.ones(len(self.x), dtype=torch.float64)))
        targets, test_targets = self.y.unsqueeze(1), self.y_test.unsqueeze(1)
        influence = DirectInfluence(model, nn.MSELoss(), self.decay).fit([(self.x, targets)])
        return influence.influences(self.x_test, test_targets, self.x, targets, mode=mode)


def test_the_sign_and_one_over_n_are_exact_to_first_order() -> None:
    ridge = Ridge()
    n, predicted = len(ridge.x), ridge.influences()
    everything = torch.ones(n, dtype=torch.float64)
    before = ridge.test_losses(ridge.trained(everything))
    for share in (1e-3, 1e-5):
        for i in (0, 17, 399):
            weights = everything.clone()
            weights[i] = 1 - share  # a little of point i is left out
            change = (ridge.test_losses(ridge.trained(weights)) - before) / share
            error = (change - predicted[:, i] / n).abs() / (predicted[:, i] / n).abs()
            assert error.max() < share, (share, i)


def test_leaving_a_point_out_changes_a_loss_by_about_its_influence_over_n() -> None:
    ridge = Ridge()
    n, predicted = len(ridge.x), ridge.influences()
    everything = torch.ones(n, dtype=torch.float64)
    before = ridge.test_losses(ridge.trained(everything))
    true = []
    for i in range(n):
        weights = everything.clone()
        weights[i] = 0.0
        true.append(ridge.test_losses(ridge.trained(weights)) - before)
    true_changes = torch.stack(true, dim=1)
    large = true_changes.abs() > true_changes.abs().median()
    ratios = (predicted / n / true_changes)[large]
    low, middle, high = ratios.min().item(), ratios.median().item(), ratios.max().item()
    print(f"predicted / true change: median {middle:.4f}, from {low:.4f} to {high:.4f}")
    assert low > 0.9
    assert high < 1.1
    assert abs(middle - 1) < 0.02


def test_moving_an_input_changes_a_loss_by_minus_its_influence_over_n() -> None:
    ridge = Ridge()
    n, predicted = len(ridge.x), ridge.influences("perturbation")
    everything = torch.ones(n, dtype=torch.float64)
    before = ridge.test_losses(ridge.trained(everything))
    step, i, j = 1e-6, 17, 2
    ridge.x[i, j] += step
    change = (ridge.test_losses(ridge.trained(everything)) - before) / step
    assert ((change + predicted[:, i, j] / n).abs() <= 1e-4 * change.abs()).all()


class Retrained:
    """Softmax regression on standardised data, trained again without each training point."""

    def __init__(self, bunch, num_train: int) -> None:
        x = torch.tensor(bunch.data)
        x = (x - x.mean(dim=0)) / x.std(dim=0)
        y, classes = torch.tensor(bunch.target), int(bunch.target.max()) + 1
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        train, test = order[:num_train], order[num_train : num_train + 20]
        self.train = SoftmaxRegression(x[train], y[train], classes)
        self.test = SoftmaxRegression(x[test], y[test], classes)
        self.theta = self.train.trained(DECAY)
        before = self.test.losses(self.theta)
        changes = []
        for i in range(num_train):
            weights = torch.full((num_train,), 1 / num_train, dtype=torch.float64)
            weights[i] = 0.0
            theta = self.train.trained(DECAY, weights, start=self.theta)
            changes.append(self.test.losses(theta) - before)
        self.changes = torch.stack(changes, dim=1)


@cache
def retrained(name: str) -> Retrained:
    bunch = {"breast_cancer": load_breast_cancer, "wine": load_wine}[name]()
    return Retrained(bunch, num_train=120)


METHODS = {
    "direct": lambda model, size: DirectInfluence(model, nn.CrossEntropyLoss(), DECAY),
    "cg": lambda model, size: CgInfluence(model, nn.CrossEntropyLoss(), DECAY),
    "nystroem": lambda model, size: NystroemSketchInfluence(
        model, nn.CrossEntropyLoss(), DECAY, rank=size
    ),
}


@pytest.mark.parametrize("data", ["breast_cancer", "wine"])
@pytest.mark.parametrize("method", METHODS)
def test_influences_rank_points_as_training_without_them_does(data: str, method: str) -> None:
    case = retrained(data)
    model = case.train.layer(case.theta)
    influence = METHODS[method](model, case.train.size).fit([(case.train.x, case.train.y)])
    predicted = influence.influences(case.test.x, case.test.y, case.train.x, case.train.y)
    correlations = [spearmanr(p, c).statistic for p, c in zip(predicted, case.changes, strict=True)]
    worst, mean = min(correlations), sum(correlations) / len(correlations)
    overall = spearmanr(predicted.flatten(), case.changes.flatten()).statistic
    print(f"{data}, {method}: Spearman mean {mean:.4f}, worst {worst:.4f}, overall {overall:.4f}")
    assert mean >= 0.98
    assert overall >= 0.98
    # The sign and 1/N: what is predicted is the change itself, not only its rank.
    large = predicted.abs() > predicted.abs().median()
    ratio = (len(case.train.x) * case.changes / predicted)[large].median()
    assert 0.8 < ratio < 1.25
