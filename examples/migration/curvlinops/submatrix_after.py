"""Rows and columns of a Hessian, and products with a Jacobian."""

import torch
from setting import loader, loss, model, x
from torch.func import functional_call, jvp, vjp

from hessops import CompositeOperator, HessianOperator, ParameterSpace

v = torch.randn(334, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
u = torch.randn(2500, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
rows, columns = [3, 40, 333], [0, 41, 200, 333]

hessian = HessianOperator(model, loss, loader)


def embedded(entries, places):
    """A vector of all parameters that is zero elsewhere."""
    return entries.new_zeros(334).index_put((torch.tensor(places),), entries)


class DiagonalBlock(CompositeOperator):
    """The diagonal block of an operator at some places: an operator like all others."""

    def __init__(self, operator, places):
        super().__init__(len(places), operator.dtype, operator.device, symmetric=operator.symmetric)
        self.operator, self.places = operator, places

    def _apply_rows(self, stack):
        wide = stack.new_zeros(len(stack), self.operator.input_size)
        wide[:, self.places] = stack
        return self.operator.apply(wide)[:, self.places]

    def _mapped(self, function):
        return DiagonalBlock(function(self.operator), self.places)

    def _children(self):
        return (self.operator,)


space = ParameterSpace.from_model(model)
theta = space.flatten({name: p.detach() for name, p in model.named_parameters()})


def outputs(flat, inputs):
    return functional_call(model, space.unflatten(flat), (inputs,))


forward = [jvp(lambda flat, a=a: outputs(flat, a), (theta,), (v,))[1] for a, _ in loader]
backward = torch.zeros_like(theta)
for (a, _), part in zip(loader, u.reshape(250, 10).split(64), strict=True):
    backward += vjp(lambda flat, a=a: outputs(flat, a), theta)[1](part)[0]

results = {
    "rows and columns": hessian.apply(embedded(v[:4], columns))[rows],
    "transposed": hessian.apply(embedded(v[:3], rows))[columns],
    "a diagonal block": DiagonalBlock(hessian, columns).apply(v[:4]),
    "Jacobian": torch.cat(forward).flatten(),
    "transposed Jacobian": backward,
}
