"""Explicit matrices by `torch.autograd` alone: what the scripts are held against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def gradient_rows(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of the loss of each point, ``(n, P)``."""
    params = tuple(model.parameters())
    losses = [loss(model(x[i : i + 1]), y[i : i + 1]) for i in range(len(x))]
    return torch.stack([_flat(torch.autograd.grad(value, params)) for value in losses])


def hessian_matrix(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    """The Hessian of the loss of all points, ``(P, P)``: the gradient of each of the entries."""
    params = tuple(model.parameters())
    gradient = _flat(torch.autograd.grad(loss(model(x), y), params, create_graph=True))
    unit_vectors = torch.eye(len(gradient), dtype=gradient.dtype)
    rows = torch.autograd.grad(gradient, params, unit_vectors, is_grads_batched=True)
    return torch.cat([part.flatten(1) for part in rows], dim=1)


def mixed_derivatives(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    """The gradient by the parameters of the gradient by the input, ``(n, inputs, P)``."""
    params = tuple(model.parameters())
    points = []
    for i in range(len(x)):
        point = x[i : i + 1].clone().requires_grad_()
        value = loss(model(point), y[i : i + 1])
        (by_input,) = torch.autograd.grad(value, point, create_graph=True)
        entries = by_input.flatten()
        rows = [_flat(torch.autograd.grad(e, params, retain_graph=True)) for e in entries]
        points.append(torch.stack(rows))
    return torch.stack(points)


def rows_of(model: nn.Module, layer: str) -> slice:
    """Where a parameter, or the parameters of a layer, are in the flat vector of all."""
    start, stop, position = None, 0, 0
    for name, parameter in model.named_parameters():
        if f"{name}.".startswith(f"{layer}."):
            start = position if start is None else start
            stop = position + parameter.numel()
        position += parameter.numel()
    return slice(start, stop)
