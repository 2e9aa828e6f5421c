r"""
A loss of your own
==================

Any function ``loss(output, target)`` of torch operations will do. You say what it returns, the mean
over points, their sum or one value for each point, and the claim is checked on the data.

What is not a function of output and target is not part of the loss: a weight decay is a shift of
the operator.
"""

# %%
# The loss, in three forms
# ------------------------
#
# The logarithm of the hyperbolic cosine grows like a square near zero and like a line far away, so
# that outliers count less. Two outputs are fitted to the wines of scikit-learn.

import math
import textwrap

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_wine
from torch import nn
from torch.nn import functional

from hessops import DiagonalOperator, GeneralizedGaussNewtonOperator, HessianOperator
from hessops.errors import HessopsError


def log_cosh(residual):
    """Log cosh r = r + log(1 + exp(-2r)) - log 2, which does not overflow."""
    return residual + functional.softplus(-2 * residual) - math.log(2)


def per_point(output, target):
    return log_cosh(output - target).sum(dim=1)


def mean(output, target):
    return per_point(output, target).mean()


def total(output, target):
    return per_point(output, target).sum()


torch.manual_seed(0)
data = torch.tensor(load_wine().data)
data = (data - data.mean(dim=0)) / data.std(dim=0)
x, y = data[:, 2:], data[:, :2]
batches = list(zip(x.split(50), y.split(50), strict=True))
model = nn.Sequential(nn.Linear(11, 6), nn.Tanh(), nn.Linear(6, 2)).double().eval()

# %%
# All three give the same matrix, that of the mean over points. Best is one value for each point:
# the losses of points are then known, and need not be found by calling the loss row by row.

v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
products = [
    HessianOperator(model, loss, batches, reduction=reduction).apply(v)
    for loss, reduction in ((per_point, "none"), (mean, "mean"), (total, "sum"))
]
assert torch.allclose(products[0], products[1])
assert torch.allclose(products[0], products[2])

# %%
# The reference is PyTorch's Hessian of the mean over all points:

sizes = [p.numel() for p in model.parameters()]
theta = nn.utils.parameters_to_vector(model.parameters()).detach()


def objective(vector, decay=0.0):
    """The mean loss at a vector of parameters, with weight decay."""
    parts = zip(model.named_parameters(), vector.split(sizes), strict=True)
    params = {name: part.reshape(p.shape) for (name, p), part in parts}
    output = torch.func.functional_call(model, params, x)
    return mean(output, y) + decay / 2 * vector.square().sum()


reference = torch.func.jacrev(torch.func.grad(objective))(theta)
hessian = HessianOperator(model, per_point, batches, reduction="none")
error = (hessian.to_dense() - reference).norm() / reference.norm()
print(f"relative error {error:.1e}")
assert error < 1e-12

# %%
# Weight decay
# ------------
#
# A penalty in the loss would be a function of the parameters, and not of output and target. Its
# curvature would get lost, so it is refused:


def with_penalty(output, target):
    penalty = sum(p.square().sum() for p in model.parameters())
    return mean(output, target) + 0.01 / 2 * penalty


try:
    HessianOperator(model, with_penalty, batches).apply(v)
except HessopsError as error:
    print(textwrap.fill(f"{type(error).__name__}: {error}", 84))

# %%
# The Hessian of λ/2 ‖θ‖² is λI, which is a shift. Where only the weights decay and not the biases,
# it is a diagonal:

whole = hessian.shift(0.01)
reference = torch.func.jacrev(torch.func.grad(objective))(theta, 0.01)
assert torch.allclose(whole.to_dense(), reference)

decays = [0.01 * torch.ones_like(p) if p.ndim > 1 else 0 * p for p in model.parameters()]
without_biases = hessian + DiagonalOperator(nn.utils.parameters_to_vector(decays).detach())
print(without_biases)

# %%
# What else the check refuses
# ---------------------------
#
# The loss of a batch must be made of the losses of its points, in its value and in its gradient by
# the output. Here are some that are not, with the first words of the error of each.


def claimed_mean(output, target):
    return total(output, target)


def of_the_whole_batch(output, target):
    return mean(output - output.mean(dim=0), target - target.mean(dim=0))


def without_gradient(output, target):
    return torch.tensor(mean(output, target).item(), dtype=output.dtype)


def noisy(output, target):
    return mean(output + 0.1 * torch.randn_like(output), target)


def root_at_zero(output, target):
    return (output - output).square().sum(dim=1).sqrt().mean() + mean(output, target)


for wrong in (claimed_mean, of_the_whole_batch, without_gradient, noisy, root_at_zero):
    try:
        HessianOperator(model, wrong, batches).apply(v)
    except HessopsError as error:
        print(f"{wrong.__name__}:")
        print(textwrap.fill(textwrap.shorten(str(error), 160), 84))

# %%
# For a loss of the whole batch, such as a correlation, a ranking or a contrastive loss, there is no
# mean over points. Where pairs or groups are fixed, let each of them be one point: a tensor with
# the group in its second dimension.
#
# Is the Gauss-Newton matrix positive semi-definite?
# --------------------------------------------------
#
# The generalized Gauss-Newton matrix weighs each point by the second derivative of its loss by the
# output. It is positive semi-definite if that is, that is for a loss which is convex in the output.
# This one is: the second derivative of log cosh r is 1 - tanh² r, which also shows what the loss is
# for.

ggn = GeneralizedGaussNewtonOperator(model, per_point, batches, reduction="none")
eigenvalues = torch.linalg.eigvalsh(ggn.to_dense())
print(f"eigenvalues from {eigenvalues[0]:.1e} to {eigenvalues[-1]:.1f}")

with torch.no_grad():
    residuals = (model(x) - y).flatten()
grid = torch.linspace(-4, 4, 200)
figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
axes.hist(residuals, bins=40, density=True, color="#cccccc", label="residuals (density)")
axes.plot(grid, 1 - grid.tanh() ** 2, color="#0b4f8a", label="weight for log cosh")
axes.plot(grid, torch.ones(200), "--", color="#c8500a", label="weight for half the square")
axes.set(xlabel="residual: output - target (sd)", ylabel="second derivative of the loss")
axes.set_ylim(0, 1.5)
axes.legend(frameon=False, loc="upper right")
plt.show()

# %%
# For your own loss
# -----------------
#
# - Write it for outputs ``(n, ...)`` and targets ``(n, ...)``, and return ``(n,)``.
# - Several outputs are a tuple or a mapping; the loss gets what the model returns, and a target
#   that is a tuple or mapping likewise. :doc:`/recipes/class_weights` passes weights in this way.
# - A loss that is not convex in the output, such as a Gaussian likelihood of which the network
#   predicts mean *and* variance, has an indefinite Gauss-Newton matrix. Conjugate gradients say so;
#   :class:`hessops.GaussNewtonOperator`, of the outer products of gradients, is positive
#   semi-definite for any loss.
# - The second derivatives must be there: where the loss is piecewise linear, like the absolute
#   value, the Gauss-Newton matrix is zero.
#
# See also
# --------
#
# - :doc:`/concepts/objective`: model and loss, and the check.
# - :doc:`/recipes/composing_operators`: more sums and shifts.
# - :doc:`/guarantees`: all that is refused.
