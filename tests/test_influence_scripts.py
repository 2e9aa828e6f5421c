"""Calls as people who come from pyDVL have them in their scripts, each against its own map.

The training: softmax regression on 1400 scaled digits, float64, zero start, 100 full-batch steps of
Adam with learning rate 0.05. Its Hessian has 650 rows and is singular.
"""

from __future__ import annotations

import warnings
from functools import cache

import pytest
import torch
from reference import relative_error
from sklearn.datasets import load_digits
from softmax_regression import SoftmaxRegression
from torch import Tensor, nn

from hessops import NystroemPreConditioner, SolveStatus
from hessops.errors import ConvergenceWarning, ZeroShiftWarning
from hessops.influence import (
    ArnoldiInfluence,
    CgInfluence,
    DirectInfluence,
    InfluenceFunctionModel,
    LissaInfluence,
    NystroemSketchInfluence,
)

loss = nn.CrossEntropyLoss()


class Digits:
    def __init__(self) -> None:
        digits = load_digits()
        x, y = torch.tensor(digits.data / 16), torch.tensor(digits.target)
        self.train = SoftmaxRegression(x[:1400], y[:1400], 10)
        self.test = SoftmaxRegression(x[1400:1416], y[1400:1416], 10)
        self.model = self.train.layer(torch.zeros(650, dtype=torch.float64))
        optimizer = torch.optim.Adam(self.model.parameters(), lr=0.05)
        for _ in range(100):
            optimizer.zero_grad()
            loss(self.model(self.train.x), self.train.y).backward()
            optimizer.step()
        self.theta = nn.utils.parameters_to_vector(self.model.parameters()).detach()
        self.hessian = self.train.hessian(self.theta)
        points = torch.utils.data.TensorDataset(self.train.x, self.train.y)
        self.loader = torch.utils.data.DataLoader(points, batch_size=400)  # the last has 200

    def require(
        self, influence: InfluenceFunctionModel, inverse_map: Tensor, tolerance: float
    ) -> None:
        """Factors, and influences in both modes, are those of a matrix."""
        factors = self.test.gradients(self.theta) @ inverse_map.T
        x, y = self.train.x[:40], self.train.y[:40]
        some = SoftmaxRegression(x, y, 10)
        test = (self.test.x, self.test.y)
        up = factors @ some.gradients(self.theta).T
        by_input = torch.einsum("mp,nip->mni", factors, some.mixed(self.theta))
        assert relative_error(influence.influence_factors(*test), factors) < tolerance
        assert relative_error(influence.influences(*test, x, y), up) < tolerance
        perturbation = influence.influences(*test, x, y, mode="perturbation")
        assert relative_error(perturbation, by_input) < tolerance


@cache
def digits() -> Digits:
    return Digits()


def pseudo_inverse(values: Tensor, vectors: Tensor, cutoff: float) -> Tensor:
    kept = values.abs() > cutoff * values.abs().max()
    return (vectors[:, kept] / values[kept]) @ vectors[:, kept].T


def test_the_closed_form_of_the_tests_is_that_of_autograd() -> None:
    some = SoftmaxRegression(torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1]), 3)
    theta = torch.randn(12, dtype=torch.float64)

    def mean_loss(vector: Tensor) -> Tensor:
        return some.losses(vector).mean()

    expected = torch.autograd.functional.hessian(mean_loss, theta)
    assert relative_error(some.hessian(theta), expected) < 1e-12
    gradient = torch.autograd.functional.jacobian(mean_loss, theta)
    assert relative_error(some.gradients(theta).mean(dim=0), gradient) < 1e-12


def test_the_hessian_is_singular() -> None:
    values = torch.linalg.eigvalsh(digits().hessian)
    assert (values < 1e-12 * values[-1]).sum() > 50


def test_direct() -> None:
    data = digits()
    influence = DirectInfluence(data.model, loss, hessian_regularization=0.1).fit(data.loader)
    identity = torch.eye(650, dtype=torch.float64)
    data.require(influence, torch.linalg.inv(data.hessian + 0.1 * identity), 1e-10)


def test_arnoldi_is_the_pseudo_inverse_of_rank_ten() -> None:
    data = digits()
    influence = ArnoldiInfluence(
        data.model, loss, hessian_regularization=0.0, rank_estimate=10, tol=1e-6
    ).fit(data.loader)
    values, vectors = torch.linalg.eigh(data.hessian)
    cutoff = 10 * 650 * torch.finfo(torch.float64).eps
    data.require(influence, pseudo_inverse(values[-10:], vectors[:, -10:], cutoff), 1e-4)
    exact = ArnoldiInfluence(
        data.model, loss, hessian_regularization=0.0, rank_estimate=10, tol=0.0
    ).fit(data.loader)
    data.require(exact, pseudo_inverse(values[-10:], vectors[:, -10:], cutoff), 1e-9)


def test_a_nystroem_sketch_is_the_pseudo_inverse_of_rank_ten() -> None:
    data = digits()
    torch.manual_seed(5)
    influence = NystroemSketchInfluence(data.model, loss, rank=10, hessian_regularization=0.0).fit(
        data.loader
    )
    # The sketch matrix is drawn from the seed, so that the dense formula can be given the same.
    drawn = torch.randn(650, 10, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    basis, _ = torch.linalg.qr(drawn)
    image = data.hessian @ basis
    sketch = image @ torch.linalg.pinv(basis.T @ image, hermitian=True) @ image.T
    values, vectors = torch.linalg.eigh(sketch)
    cutoff = 10 * 650 * torch.finfo(torch.float64).eps
    data.require(influence, pseudo_inverse(values[-10:], vectors[:, -10:], cutoff), 1e-7)


def test_lissa_is_the_recursion_run_with_dense_matrices() -> None:
    data = digits()
    influence = LissaInfluence(
        data.model,
        loss,
        hessian_regularization=0.0,
        maxiter=1000,
        dampen=0.0,
        scale=10.0,
        h0=None,
        rtol=1e-4,
    ).fit(data.loader)
    matrices = [SoftmaxRegression(x, y, 10).hessian(data.theta) for x, y in data.loader]
    gradients = data.test.gradients(data.theta)
    h = gradients.clone()
    for step in range(1000):
        h = gradients + h - h @ matrices[step % len(matrices)] / 10.0
    with pytest.warns(ConvergenceWarning, match="max iterations"):
        factors = influence.influence_factors(data.test.x, data.test.y)
    assert relative_error(factors, h / 10.0) < 1e-9


def test_cg_on_the_singular_hessian_says_how_it_ended() -> None:
    data = digits()
    influence = CgInfluence(
        data.model,
        loss,
        hessian_regularization=0.0,
        rtol=1e-7,
        atol=1e-7,
        maxiter=None,
        use_block_cg=True,
        pre_conditioner=NystroemPreConditioner(rank=10),
    )
    with pytest.warns(ZeroShiftWarning, match="smallest safe one, mu ="):
        influence.fit(data.loader)
    gradients = data.test.gradients(data.theta)
    solution = influence.inverses["full"].solve(gradients)
    residuals = (gradients - solution.value @ data.hessian).norm(dim=1)
    bound = (1e-7 * gradients.norm(dim=1)).clamp(min=1e-7)
    for status, residual, allowed in zip(solution.status, residuals, bound, strict=True):
        assert status is not SolveStatus.CONVERGED or residual <= 1.001 * allowed
    assert (solution.converged.sum() > 0).item()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        factors = influence.influence_factors(data.test.x, data.test.y)
    # The map itself, where the pseudo-inverse's is determined: on the range of the Hessian.
    values, vectors = torch.linalg.eigh(data.hessian)
    large = vectors[:, values > 1e-4 * values[-1]]
    expected = gradients @ pseudo_inverse(values, vectors, 1e-10)
    assert relative_error(factors @ large, expected @ large) < 1e-3


def test_an_absolute_tolerance_of_zero_leaves_only_the_relative_one() -> None:
    data = digits()
    influence = CgInfluence(data.model, loss, hessian_regularization=0.0, use_block_cg=True)
    influence.fit(data.loader)
    in_range = data.train.gradients(data.theta)[:8] @ data.hessian
    solution = influence.inverses["full"].solve(in_range)
    residuals = (in_range - solution.value @ data.hessian).norm(dim=1) / in_range.norm(dim=1)
    assert all((residuals <= 1.001e-7) | ~solution.converged)
    assert solution.converged.all()
