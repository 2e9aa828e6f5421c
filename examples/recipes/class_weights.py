r"""
Class weights
=============

What to pass for a loss with class weights, whose mean in PyTorch depends on the batches.

A loss with class weights is a mean over points of weighted losses,

.. math:: L(\theta) = \frac1N \sum_i w_{y_i}\, \ell_i(\theta),

and its curvature is that of this mean. PyTorch's own mean with class weights is another number:
it divides by the weights of the batch. So it is refused, and this recipe says what to pass instead.
"""

# %%
# A model that was trained with class weights
# -------------------------------------------
#
# Tumours that are malignant (class 0) or benign; a malignant one counts four times.

import textwrap

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from hessops import GeneralizedGaussNewtonOperator, HessianOperator
from hessops.errors import LossError

torch.manual_seed(0)
points, classes = load_breast_cancer(return_X_y=True)
x, y = torch.tensor(points), torch.tensor(classes)
x = (x - x.mean(dim=0)) / x.std(dim=0)
class_weights = torch.tensor([4.0, 1.0], dtype=torch.float64)

model = nn.Sequential(nn.Linear(30, 4), nn.Tanh(), nn.Linear(4, 2)).double()
torch_mean = nn.CrossEntropyLoss(weight=class_weights)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(50):
    optimizer.zero_grad()
    torch_mean(model(x), y).backward()
    optimizer.step()
model.eval()

loader = DataLoader(TensorDataset(x, y), batch_size=32)
v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)

# %%
# What is refused, and why
# ------------------------

try:
    HessianOperator(model, torch_mean, loader).apply(v)
except LossError as error:
    print(textwrap.fill(f"LossError: {error}", 84))

# %%
# On a batch B, ``CrossEntropyLoss(weight=w)`` is
# :math:`\sum_{i \in B} w_{y_i} \ell_i \,/ \sum_{i \in B} w_{y_i}`. The point i then counts by the
# company it is in. The mean of that over the batches depends on their size and on the shuffle:

losses = functional.cross_entropy(model(x), y, class_weights, reduction="none").detach()
weights = class_weights[y]
sizes = [4, 8, 16, 32, 64, 128, 256]
figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
for size in sizes:
    for _ in range(12):
        batches = torch.randperm(len(x)).split(size)
        means = [len(b) * losses[b].sum() / weights[b].sum() for b in batches]
        axes.plot(size, sum(means) / len(x), "o", color="#c8500a", alpha=0.5)
axes.axhline(losses.sum() / weights.sum(), color="#0b4f8a", label="all points in one batch")
axes.set(xscale="log", xlabel="batch size (points)")
axes.set_ylabel("mean over batches of torch's mean")
axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
axes.minorticks_off()
axes.legend()
plt.show()

# %%
# What to pass
# ------------
#
# Losses by point, each with its weight: ``reduction="none"``, for the loss and for the operator.

weighted = nn.CrossEntropyLoss(weight=class_weights, reduction="none")
hessian = HessianOperator(model, weighted, loader, reduction="none")

# %%
# It is the matrix of the mean over points, whatever the batches are. The reference here is the
# Hessian of the loss of all points at once, by PyTorch alone:


def mean_over_points(output, target):
    losses = functional.cross_entropy(output, target, reduction="none")
    return (class_weights[target] * losses).mean()


def dense_hessian(loss):
    """The Hessian of a loss of all points by the parameters as one vector."""
    sizes = [p.numel() for p in model.parameters()]

    def of_vector(vector):
        parts = zip(model.named_parameters(), vector.split(sizes), strict=True)
        params = {name: part.reshape(p.shape) for (name, p), part in parts}
        return loss(torch.func.functional_call(model, params, x), y)

    theta = nn.utils.parameters_to_vector(model.parameters()).detach()
    return torch.func.jacrev(torch.func.grad(of_vector))(theta)


def difference(matrix, reference):
    return float((matrix - reference).norm() / reference.norm())


reference = dense_hessian(mean_over_points)
in_one_batch = HessianOperator(model, weighted, [(x, y)], reduction="none")
for name, operator in (("batches of 32 points", hessian), ("one batch", in_one_batch)):
    error = difference(operator.to_dense(), reference)
    print(f"{name}: relative error {error:.1e}")
    assert error < 1e-12

# %%
# PyTorch's normalisation
# -----------------------
#
# Was the model trained with torch's weighted mean of *all* points, as here? That is the mean over
# points divided by the mean weight :math:`\bar w`, and so is its curvature. Operators can be
# divided by a number. A weight decay of λ/2 ‖θ‖² beside it is added after the division:

mean_weight = float(weights.mean())
normalised = hessian / mean_weight
print(f"mean weight {mean_weight:.3f}")
error = difference(normalised.to_dense(), dense_hessian(torch_mean))
print(f"torch's mean of all points: relative error {error:.1e}")
assert error < 1e-12

damped = normalised.shift(1e-3)

# %%
# If it was trained on mini-batches of torch's weighted mean, no single loss was minimised; the two
# matrices above differ by a factor only, and either is a fair choice.
#
# Weights of points, and ignored targets
# --------------------------------------
#
# A weight for each point is a part of the target. A batch of another form than ``(x, y)`` becomes
# one by ``unpack``, and the loss takes the target apart:


def loss_with_weights(output, target):
    label, weight = target
    return weight * functional.cross_entropy(output, label, reduction="none")


by_point = GeneralizedGaussNewtonOperator(
    model,
    loss_with_weights,
    DataLoader(TensorDataset(x, y, weights), batch_size=32),
    reduction="none",
    unpack=lambda batch: (batch[0], (batch[1], batch[2])),
)
by_class = GeneralizedGaussNewtonOperator(model, weighted, loader, reduction="none")
assert torch.allclose(by_point.apply(v), by_class.apply(v))

# %%
# ``ignore_index`` is the same matter: an ignored point has weight 0, and torch divides by the
# number of the others. Leave such points out of the data, or give them weight 0 and divide by the
# mean weight.
#
# For your own model
# ------------------
#
# All operators, KFAC and EKFAC, and influence models take ``reduction="none"``. An influence model
# has no division: instead, multiply its ``regularization`` by the mean weight, which is the same up
# to a factor.
#
# See also
# --------
#
# - :doc:`/recipes/custom_loss`: losses of your own, and what the check refuses.
# - :doc:`/concepts/objective`: what is checked.
# - :class:`hessops.HessianOperator`, :class:`hessops.CurvatureOperator`: the arguments.
