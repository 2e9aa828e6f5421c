"""Dense references by plain autograd loops over points, independent of the library."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

PointLoss = Callable[[Tensor, Tensor], Tensor]


def trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def flat_gradient(value: Tensor, params: Sequence[Tensor], *, graph: bool = False) -> Tensor:
    if not value.requires_grad:
        return torch.cat([torch.zeros_like(p).reshape(-1) for p in params])
    gradients = torch.autograd.grad(
        value, params, retain_graph=True, create_graph=graph, allow_unused=True
    )
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).reshape(-1)
            for p, g in zip(params, gradients, strict=True)
        ]
    )


def hessian_of(value: Tensor, params: Sequence[Tensor]) -> Tensor:
    gradient = flat_gradient(value, params, graph=True)
    return torch.stack([flat_gradient(entry, params) for entry in gradient])


class DenseReference:
    """The matrices of a model on points ``(x, y)``, one point at a time.

    Args:
        model: Its trainable parameters (or `params`) are what is differentiated by.
        loss: From the output of one point, with leading dimension 1, and its target to a scalar.
        x: Inputs ``(n, ...)``.
        y: Targets ``(n, ...)``.
        params: The parameters in flat order, where they are not all trainable ones.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: PointLoss,
        x: Tensor,
        y: Tensor,
        params: Sequence[Tensor] | None = None,
    ) -> None:
        self.model, self.loss, self.x, self.y = model, loss, x, y
        self.params = trainable(model) if params is None else list(params)

    def _points(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.x[i : i + 1], self.y[i : i + 1]) for i in range(len(self.x))]

    def _per_point(self, matrix: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            matrices = [matrix(self.model(x), y) for x, y in self._points()]
        return torch.stack(matrices).mean(dim=0).detach()

    def hessian(self) -> Tensor:
        return self._per_point(lambda out, y: hessian_of(self.loss(out, y), self.params))

    def gauss_newton(self) -> Tensor:
        def outer(out: Tensor, y: Tensor) -> Tensor:
            gradient = flat_gradient(self.loss(out, y), self.params)
            return torch.outer(gradient, gradient)

        return self._per_point(outer)

    def generalized_gauss_newton(self) -> Tensor:
        def matrix(out: Tensor, y: Tensor) -> Tensor:
            jacobian = torch.stack([flat_gradient(o, self.params) for o in out.reshape(-1)])
            leaf = out.detach().requires_grad_()
            return jacobian.T @ hessian_of(self.loss(leaf, y), [leaf]) @ jacobian

        return self._per_point(matrix)

    def inverse_harmonic_mean(self, regularization: float) -> Tensor:
        def inverse(out: Tensor, y: Tensor) -> Tensor:
            gradient = flat_gradient(self.loss(out, y), self.params)
            identity = torch.eye(len(gradient), dtype=gradient.dtype)
            return torch.linalg.inv(torch.outer(gradient, gradient) + regularization * identity)

        return self._per_point(inverse)


def relative_error(result: Tensor, expected: Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


def random_spd(size: int, condition: float, seed: int = 0, dtype: torch.dtype = torch.float64):
    """A symmetric positive definite matrix with the spectrum from 1 down to 1/condition."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    exponents = torch.linspace(0, 1, size, dtype=torch.float64)
    matrix = (basis * condition ** (-exponents)) @ basis.T
    return ((matrix + matrix.T) / 2).to(dtype)
