"""Small models, dense matrices of every influence model, and gradients by plain loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from reference import DenseReference, flat_gradient
from torch import Tensor, nn

from hessops import MinresOperator
from hessops.influence import (
    ArnoldiInfluence,
    CgInfluence,
    DirectInfluence,
    Influence,
    InfluenceFunctionModel,
    InverseHarmonicMeanInfluence,
    LissaInfluence,
    NystroemSketchInfluence,
)

LAMBDA = 1e-3
BatchSizes = tuple[int, ...]


class RootAndNested(nn.Module):
    """Parameters of the root, of a layer and of a nested module."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([1.3]))
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.last(self.inner(x))


BLOCKS: Mapping[str, object] = {
    "full": "full",
    "layers": "layer_wise",
    "parameters": "parameter_wise",
    "custom": {"b": ["last.bias", "inner.0.weight"], "a": ["gain", "last.weight", "inner.0.bias"]},
}


@dataclass(frozen=True)
class Problem:
    """A model in float64, a loss, training and test points."""

    num_train: int = 7
    num_test: int = 3
    seed: int = 0
    model: nn.Module = field(init=False)
    loss: nn.Module = field(init=False)
    x: Tensor = field(init=False)
    y: Tensor = field(init=False)
    x_test: Tensor = field(init=False)
    y_test: Tensor = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        num = self.num_train + self.num_test
        x = torch.randn(num, 3, dtype=torch.float64)
        y = torch.randint(2, (num,))
        values = {
            "model": RootAndNested().double(),
            "loss": nn.CrossEntropyLoss(),
            "x": x[: self.num_train],
            "y": y[: self.num_train],
            "x_test": x[self.num_train :],
            "y_test": y[self.num_train :],
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def batches(self, sizes: Sequence[int] = (3, 3, 1)) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.x.split(list(sizes)), self.y.split(list(sizes)), strict=True))

    @property
    def reference(self) -> DenseReference:
        return DenseReference(self.model, self.loss, self.x, self.y)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.model.named_parameters()]

    def gradients(self, x: Tensor, y: Tensor) -> Tensor:
        params = list(self.model.parameters())
        rows = [
            flat_gradient(self.loss(self.model(x[i : i + 1]), y[i : i + 1]), params)
            for i in range(len(x))
        ]
        return torch.stack(rows).detach()

    def mixed(self, x: Tensor, y: Tensor) -> Tensor:
        """∇ₓ∇θ ℓᵢ, (n, *x.shape[1:], P), by one backward pass for each entry of the gradient."""
        params = list(self.model.parameters())
        rows = []
        for i in range(len(x)):
            point = x[i : i + 1].clone().requires_grad_()
            value = self.loss(self.model(point), y[i : i + 1])
            gradient = flat_gradient(value, params, graph=True)
            rows.append(
                torch.stack(
                    [torch.autograd.grad(g, point, retain_graph=True)[0][0] for g in gradient], -1
                )
            )
        return torch.stack(rows)

    def positions(self, blocks: object) -> dict[str, Tensor]:
        """Where the parameters of each block are, spelled out."""
        sizes = {name: p.numel() for name, p in self.model.named_parameters()}
        starts, start = {}, 0
        for name, size in sizes.items():
            starts[name] = torch.arange(start, start + size)
            start += size
        groups = {
            "full": {"full": self.names},
            "layer_wise": {
                "": ["gain"],
                "inner.0": ["inner.0.weight", "inner.0.bias"],
                "last": ["last.weight", "last.bias"],
            },
            "parameter_wise": {name: [name] for name in self.names},
        }
        members = groups[blocks] if isinstance(blocks, str) else blocks
        return {
            block: torch.cat([starts[name] for name in self.names if name in names])
            for block, names in members.items()
        }


def dense_inverse(
    matrix_of_block: Callable[[Tensor], Tensor], positions: Mapping[str, Tensor]
) -> Tensor:
    """The block-diagonal matrix of some maps of principal submatrices."""
    size = sum(len(where) for where in positions.values())
    dense = torch.zeros(size, size, dtype=torch.float64)
    for where in positions.values():
        dense[where[:, None], where] = matrix_of_block(where)
    return dense


def damped_inverse(matrix: Tensor, shift: float) -> Tensor:
    return torch.linalg.inv(matrix + shift * torch.eye(len(matrix), dtype=matrix.dtype))


def dominant_inverse(matrix: Tensor, shift: float, rank: int) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    order = values.abs().argsort(descending=True)[:rank]
    return (vectors[:, order] / (values[order] + shift)) @ vectors[:, order].T


def recursion(matrix: Tensor, shift: float, steps: int, scale: float) -> Tensor:
    """The matrix that so many steps of LiSSA apply, from h = b."""
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    h = identity.clone()
    for _ in range(steps):
        h = identity + h - (matrix @ h + shift * h) / scale
    return h / scale


@dataclass(frozen=True)
class Case:
    """An influence model, and the dense matrix that it should apply to a block."""

    make: Callable[..., InfluenceFunctionModel]
    curvature: str
    dense: Callable[[Tensor], Tensor]
    tolerance: float = 1e-9

    def build(self, problem: Problem, blocks: object) -> InfluenceFunctionModel:
        return self.make(problem.model, problem.loss, block_structure=blocks)

    def matrix(self, problem: Problem, blocks: object) -> Tensor:
        positions = problem.positions(blocks)
        if self.curvature == "inverse_harmonic_mean":
            gradients = problem.gradients(problem.x, problem.y)

            def mean_of_inverses(where: Tensor) -> Tensor:
                parts = [damped_inverse(torch.outer(g, g), LAMBDA) for g in gradients[:, where]]
                return torch.stack(parts).mean(dim=0)

            return dense_inverse(mean_of_inverses, positions)
        curvature = getattr(problem.reference, self.curvature)()
        return dense_inverse(lambda where: self.dense(curvature[where[:, None], where]), positions)


def _of_ggn(make: Callable[..., InfluenceFunctionModel], **settings: object):
    return partial(
        make, regularization=LAMBDA, second_order_mode="generalized_gauss_newton", **settings
    )


CASES: Mapping[str, Case] = {
    "direct hessian": Case(
        partial(DirectInfluence, regularization=LAMBDA),
        "hessian",
        partial(damped_inverse, shift=LAMBDA),
    ),
    "direct gauss-newton": Case(
        partial(DirectInfluence, regularization=LAMBDA, second_order_mode="GAUSS_NEWTON"),
        "gauss_newton",
        partial(damped_inverse, shift=LAMBDA),
    ),
    "cg": Case(
        _of_ggn(CgInfluence, rtol=1e-12),
        "generalized_gauss_newton",
        partial(damped_inverse, shift=LAMBDA),
    ),
    "block cg": Case(
        _of_ggn(CgInfluence, rtol=1e-11, use_block_cg=True),
        "generalized_gauss_newton",
        partial(damped_inverse, shift=LAMBDA),
        1e-8,
    ),
    "lissa": Case(
        _of_ggn(LissaInfluence, scale=20.0, maxiter=40, warn_on_max_iteration=False),
        "generalized_gauss_newton",
        partial(recursion, shift=LAMBDA, steps=40, scale=20.0),
    ),
    "arnoldi": Case(
        _of_ggn(ArnoldiInfluence, rank=3, tol=0.0),
        "generalized_gauss_newton",
        partial(dominant_inverse, shift=LAMBDA, rank=3),
        1e-7,
    ),
    "arnoldi with woodbury": Case(
        _of_ggn(ArnoldiInfluence, rank=27, use_woodbury=True),
        "generalized_gauss_newton",
        partial(damped_inverse, shift=LAMBDA),
        1e-8,
    ),
    "nystroem": Case(
        _of_ggn(NystroemSketchInfluence, rank=27),
        "generalized_gauss_newton",
        partial(damped_inverse, shift=LAMBDA),
        1e-7,
    ),
    "inverse harmonic mean": Case(
        partial(InverseHarmonicMeanInfluence, regularization=LAMBDA),
        "inverse_harmonic_mean",
        torch.linalg.inv,
    ),
    "minres": Case(
        partial(Influence, regularization=LAMBDA, inverse=partial(MinresOperator, rtol=1e-12)),
        "hessian",
        partial(damped_inverse, shift=LAMBDA),
        1e-7,
    ),
}
