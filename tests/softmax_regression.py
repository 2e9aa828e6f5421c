"""Softmax regression in closed form: gradients, Hessian and training by Newton's method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class SoftmaxRegression:
    """Points ``(n, d)`` with labels, for a ``Linear(d, classes)`` with the cross-entropy.

    The flat parameters are in the order of the layer: weight ``(classes, d)``, then bias.
    """

    x: Tensor
    y: Tensor
    classes: int

    @property
    def size(self) -> int:
        return self.classes * (self.x.shape[1] + 1)

    def _split(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        d = self.x.shape[1]
        return theta[: self.classes * d].reshape(self.classes, d), theta[self.classes * d :]

    def probabilities(self, theta: Tensor) -> Tensor:
        weight, bias = self._split(theta)
        return (self.x @ weight.T + bias).softmax(dim=1)

    def losses(self, theta: Tensor) -> Tensor:
        return -self.probabilities(theta)[torch.arange(len(self.x)), self.y].log()

    def _flat(self, by_class: Tensor) -> Tensor:
        """(..., classes, d + 1) in the order of the layer."""
        lead = by_class.shape[:-2]
        weight = by_class[..., :-1].reshape(*lead, -1)
        return torch.cat([weight, by_class[..., -1]], dim=-1)

    def _extended(self) -> Tensor:
        return torch.cat([self.x, torch.ones(len(self.x), 1, dtype=self.x.dtype)], dim=1)

    def gradients(self, theta: Tensor) -> Tensor:
        errors = self.probabilities(theta) - nn.functional.one_hot(self.y, self.classes)
        return self._flat(errors.unsqueeze(2) * self._extended().unsqueeze(1))

    def mixed(self, theta: Tensor) -> Tensor:
        """∇ₓ∇θ, (n, d, P)."""
        weight, _ = self._split(theta)
        p = self.probabilities(theta)
        errors = p - nn.functional.one_hot(self.y, self.classes)
        cov = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        by_x = cov @ weight  # (n, classes, d): derivative of the errors by x
        extended = self._extended()
        full = torch.einsum("ncj,nk->njck", by_x, extended)
        n, d = self.x.shape
        index = torch.arange(d)
        full[:, index, :, index] += errors.unsqueeze(0).expand(d, n, self.classes)
        return self._flat(full)

    def hessian(self, theta: Tensor, weights: Tensor | None = None) -> Tensor:
        """Σ wᵢ ∇²ℓᵢ; wᵢ is 1/n."""
        p, extended = self.probabilities(theta), self._extended()
        weights = torch.full_like(p[:, 0], 1 / len(p)) if weights is None else weights
        cov = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        blocks = torch.einsum("n,nab,ni,nj->aibj", weights, cov, extended, extended)
        size = self._flat(blocks[0, 0].new_zeros(self.classes, extended.shape[1])).numel()
        order = self._flat(
            torch.arange(size).reshape(self.classes, extended.shape[1])
        )  # position of each flat entry in the (class, input) order
        matrix = blocks.reshape(size, size)
        return matrix[order[:, None], order]

    def trained(
        self, decay: float, weights: Tensor | None = None, start: Tensor | None = None
    ) -> Tensor:
        """The minimiser of Σ wᵢ ℓᵢ + decay/2 |θ|², by Newton's method."""
        weights = torch.full_like(self.x[:, 0], 1 / len(self.x)) if weights is None else weights
        theta = torch.zeros(self.size, dtype=self.x.dtype) if start is None else start
        identity = torch.eye(self.size, dtype=self.x.dtype)
        for _ in range(100):
            gradient = weights @ self.gradients(theta) + decay * theta
            if gradient.norm() < 1e-12:
                return theta
            step = torch.linalg.solve(self.hessian(theta, weights) + decay * identity, gradient)
            scale = 1.0
            while (
                self._value(theta - scale * step, decay, weights)
                > self._value(theta, decay, weights) + 1e-15
                and scale > 1e-4
            ):
                scale /= 2
            theta = theta - scale * step
        raise AssertionError("Newton's method did not converge")

    def _value(self, theta: Tensor, decay: float, weights: Tensor) -> Tensor:
        return weights @ self.losses(theta) + decay / 2 * theta.square().sum()

    def layer(self, theta: Tensor) -> nn.Linear:
        weight, bias = self._split(theta)
        layer = nn.Linear(self.x.shape[1], self.classes, dtype=self.x.dtype)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        return layer
