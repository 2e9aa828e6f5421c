"""Explicit matrices by autograd and loops: what decides who is right."""

from __future__ import annotations

from collections.abc import Callable

import torch
from setting import model as the_model
from setting import x, y
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev

Loss = Callable[[Tensor, Tensor], Tensor]

_named = {name: parameter.detach() for name, parameter in the_model.named_parameters()}
theta = torch.cat([parameter.reshape(-1) for parameter in _named.values()])
identity = torch.eye(len(theta), dtype=theta.dtype)


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


def outputs(flat: Tensor, inputs: Tensor = x) -> Tensor:
    """What the model of `setting` puts out with its parameters taken from one vector."""
    parts = flat.split([parameter.numel() for parameter in _named.values()])
    params = {
        name: part.reshape(parameter.shape)
        for (name, parameter), part in zip(_named.items(), parts, strict=True)
    }
    return functional_call(the_model, params, (inputs,))


def gauss_newton(loss: Loss) -> Tensor:
    """The mean of JᵀHJ over the training points of `setting`, for a loss of one point."""
    total = torch.zeros_like(identity)
    for a, b in zip(x.split(1), y.split(1), strict=True):
        jacobian = jacrev(outputs)(theta, a)[0]
        of_output = jacrev(grad(lambda out, b=b: loss(out[None], b)))(outputs(theta, a)[0])
        total += jacobian.T @ of_output @ jacobian
    return total / len(x)
