"""Products with each matrix in float64, by plain autograd: what the answers are compared with."""

from __future__ import annotations

import copy

import torch
from _cases import LOSS, Case
from _peers import EMPIRICAL, GGN, HARMONIC, HESSIAN, REGULARIZATION
from torch import Tensor
from torch.func import functional_call, grad, vmap

# Points whose gradients are in memory together.
TOGETHER = 16


def reference(matrix: str, case: Case, vector: Tensor) -> Tensor:
    """The matrix of a case times a vector ``(P,)``, in float64."""
    model = copy.deepcopy(case.model).double()
    parameters = list(model.parameters())
    pieces = vector.double().split([p.numel() for p in parameters])
    entries = [v.reshape(p.shape) for v, p in zip(pieces, parameters, strict=True)]
    if matrix == HARMONIC:
        return _harmonic(model, case, vector.double())
    total = torch.zeros(case.size, dtype=torch.float64)
    for x, y in case.batches:
        output = model(x.double())
        loss = LOSS(output, y) * len(x) / len(case)
        if matrix == HESSIAN:
            slopes = torch.autograd.grad(loss, parameters, create_graph=True)
            product = torch.autograd.grad(slopes, parameters, entries)
        else:
            along = _jacobian_product(output, parameters, entries)
            weights = _in_outputs(matrix, output.detach(), y, along) / len(case)
            product = torch.autograd.grad(output, parameters, weights)
        total += torch.cat([part.reshape(-1) for part in product])
    return total


def _jacobian_product(
    output: Tensor, parameters: list[torch.nn.Parameter], entries: list[Tensor]
) -> Tensor:
    """Jv by two backward passes, which no forward-mode rule can spoil."""
    dual = torch.zeros_like(output, requires_grad=True)
    slopes = torch.autograd.grad(output, parameters, dual, create_graph=True)
    (along,) = torch.autograd.grad(slopes, dual, entries, retain_graph=True)
    return along


def _in_outputs(matrix: str, output: Tensor, y: Tensor, along: Tensor) -> Tensor:
    """The matrix of each point in the space of outputs, times a tangent of them."""
    p = output.softmax(dim=1)
    if matrix == GGN:
        return p * along - p * (p * along).sum(dim=1, keepdim=True)
    assert matrix == EMPIRICAL
    slope = p - torch.nn.functional.one_hot(y, p.shape[1])
    return slope * (slope * along).sum(dim=1, keepdim=True)


def _harmonic(model: torch.nn.Module, case: Case, vector: Tensor) -> Tensor:
    """The mean of (v - g (gᵀv) / (λ + ‖g‖²)) / λ."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], point: Tensor, label: Tensor) -> Tensor:
        return LOSS(functional_call(model, parameters, (point[None],)), label[None])

    gradient = vmap(grad(loss), in_dims=(None, 0, 0))
    total = torch.zeros_like(vector)
    for x, y in zip(case.x.double().split(TOGETHER), case.y.split(TOGETHER), strict=True):
        rows = torch.cat([g.flatten(1) for g in gradient(params, x, y).values()], dim=1)
        scales = (rows @ vector) / (REGULARIZATION + (rows**2).sum(dim=1))
        total += scales @ rows
    return (vector - total / len(case)) / REGULARIZATION


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖."""
    return ((found.double() - expected).norm() / expected.norm()).item()
