"""Explicit matrices of the model of `setting`, by autograd and loops: what decides who is right."""

from __future__ import annotations

from collections.abc import Callable

import torch
from setting import model, x, y
from torch import Tensor
from torch.func import functional_call, grad, jacrev

_named = {name: parameter.detach() for name, parameter in model.named_parameters()}
theta = torch.cat([parameter.reshape(-1) for parameter in _named.values()])
identity = torch.eye(len(theta), dtype=theta.dtype)


def outputs(flat: Tensor, inputs: Tensor = x) -> Tensor:
    """What the model puts out with its parameters taken from one vector."""
    parts = flat.split([parameter.numel() for parameter in _named.values()])
    params = {
        name: part.reshape(parameter.shape)
        for (name, parameter), part in zip(_named.items(), parts, strict=True)
    }
    return functional_call(model, params, (inputs,))


def loss_hessian(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The Hessian of the loss of all training points."""
    return jacrev(grad(lambda flat: loss(outputs(flat), y)))(theta)


def point_gradients(
    loss: Callable[[Tensor, Tensor], Tensor], inputs: Tensor = x, targets: Tensor = y
) -> Tensor:
    """The gradient of the loss of each point alone, as rows."""
    pairs = zip(inputs.split(1), targets.split(1), strict=True)
    return torch.stack([grad(lambda f, a=a, b=b: loss(outputs(f, a), b))(theta) for a, b in pairs])


def gauss_newton(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The mean of JᵀHJ over the training points, for a loss of one point."""
    total = torch.zeros_like(identity)
    for a, b in zip(x.split(1), y.split(1), strict=True):
        jacobian = jacrev(outputs)(theta, a)[0]
        of_output = jacrev(grad(lambda out, b=b: loss(out[None], b)))(outputs(theta, a)[0])
        total += jacobian.T @ of_output @ jacobian
    return total / len(x)
