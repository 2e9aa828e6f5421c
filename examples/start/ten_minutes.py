r"""
Start here
==========

Ten minutes, from the installation to a picture of the training points behind a prediction: a small
model, products with its curvature, a linear system whose solution says how good it is, the
eigenvalues at the ends of the spectrum, and a first influence function. The cells run one after the
other; the button in the corner of each copies it.
"""

# %%
# Install
# -------
#
# The library needs Python 3.11 or later and PyTorch 2.7 or later. It is not on a package index yet.
# In a clone of the repository:
#
# .. code-block:: sh
#
#     pip install .            # torch, scipy, numpy and tqdm
#     pip install ".[plot]"    # with matplotlib, which this page needs
#
# The recipes and examples also need ``pip install scikit-learn matplotlib``. Where there is no
# display, write ``plt.savefig("picture.png")`` for ``plt.show()``.

# %%
# A model and its data
# --------------------
#
# Any :class:`torch.nn.Module` will do, with any iterable of batches ``(x, y)`` that can be iterated
# again: a ``DataLoader``, or a list. Here is a classifier for two interleaved half-moons. It is
# trained by L-BFGS to a minimum of the mean loss with weight decay λ/2 ‖θ‖². The first lines import
# what the whole page needs.

import math
import textwrap

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hessops import (
    CgOperator,
    GeneralizedGaussNewtonOperator,
    HessianOperator,
    plotting,
)
from hessops.errors import HessopsError
from hessops.estimators import eigenpairs, spectral_density
from hessops.influence import CgInfluence

torch.manual_seed(0)
angle = math.pi * torch.rand(300, dtype=torch.float64)
upper = torch.stack([angle.cos(), angle.sin()], dim=1)
lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], dim=1)
y = torch.randint(2, (300,))
x = torch.where(y[:, None] == 0, upper, lower)
x = x + 0.25 * torch.randn(300, 2, dtype=torch.float64)
x_train, y_train, x_test, y_test = x[:250], y[:250], x[250:], y[250:]

model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)).double()
loss = nn.CrossEntropyLoss()
weight_decay = 1e-3
settings = {"max_iter": 500, "line_search_fn": "strong_wolfe"}
optimizer = torch.optim.LBFGS(model.parameters(), **settings)


def objective():
    optimizer.zero_grad()
    decay = sum(p.square().sum() for p in model.parameters())
    value = loss(model(x_train), y_train) + weight_decay / 2 * decay
    value.backward()
    return value


optimizer.step(objective)
model.eval()
accuracy = (model(x_test).argmax(dim=1) == y_test).double().mean()
print(f"accuracy on test points: {accuracy:.2f}")

loader = DataLoader(TensorDataset(x_train, y_train), batch_size=64, shuffle=True)

# %%
# A first operator
# ----------------
#
# An operator is a matrix that is never written down. This one is the Hessian of the mean loss over
# all points of the loader, by all parameters of the model. It has a size, a dtype and a device, and
# it multiplies vectors: each application is one pass over the data.

hessian = HessianOperator(model, loss, loader)
print(hessian)

v = torch.ones(hessian.input_size, dtype=hessian.dtype)
print(hessian.apply(v).shape)

# %%
# The order of the entries is that of ``model.named_parameters()``. Several vectors are the rows of
# a tensor ``(k, P)`` and share one pass; ``A @ X`` takes columns, as in PyTorch and SciPy. Vectors
# can also be dictionaries by parameter name:

rows = torch.randn(5, hessian.input_size, dtype=hessian.dtype)
products = hessian.apply(rows)
assert products.shape == rows.shape
assert torch.allclose(hessian @ rows.T, products.T)

direction = {name: torch.ones_like(p) for name, p in model.named_parameters()}
for name, product in hessian.apply_to_dict(direction).items():
    print(f"{name:10}{tuple(product.shape)}")

# %%
# The operator has a copy of the parameters: training may go on, and ``hessian.refresh()`` takes a
# new copy.
#
# Algebra
# -------
#
# Operators can be added, scaled, shifted, composed and inverted. The result is an operator again,
# and nothing is computed before it is applied. The generalized Gauss-Newton matrix (GGN) is the
# Hessian without the curvature of the network itself, and positive semi-definite for this loss.

ggn = GeneralizedGaussNewtonOperator(model, loss, loader)
mixed = 0.9 * hessian + 0.1 * ggn.shift(0.5)
print(mixed)

# %%
# A model as small as this one has matrices that fit into memory, so that the claim can be checked:

identity = torch.eye(hessian.input_size, dtype=hessian.dtype)
dense = 0.9 * hessian.to_dense() + 0.1 * (ggn.to_dense() + 0.5 * identity)
assert torch.allclose(mixed.apply(v), dense @ v)

# %%
# A linear system
# ---------------
#
# Most uses of curvature come down to :math:`(G + \lambda I)^{-1} b`. Conjugate gradients solve it
# with products alone. All right-hand sides advance together, and the solution says of each how it
# ended. Its residuals are true ones: computed from the value that is returned.

inverse = CgOperator(ggn, regularization=weight_decay)
solution = inverse.solve(rows)
print(solution)

residual = rows - ggn.shift(weight_decay).apply(solution.value)
assert torch.allclose(residual.norm(dim=1), solution.residual_norms)
assert bool(solution.converged.all())

# %%
# The inverse is itself an operator: ``inverse.apply(rows)`` is ``solution.value``. :doc:`/choose`
# says which matrix, which inverse and which damping are for what.
#
# What is refused
# ---------------
#
# Curvature that is quietly wrong looks like curvature. So the library checks what it is told, on
# the data, and raises an error that says what to do. Here the classes have weights. PyTorch divides
# their mean by the sum of the weights in the batch, so it is no mean over points, and a matrix made
# from it would depend on the batch size:

weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0], dtype=torch.float64))
try:
    HessianOperator(model, weighted, loader).apply(v)
except HessopsError as error:
    print(textwrap.fill(f"{type(error).__name__}: {error}", 84))

# %%
# :doc:`/recipes/class_weights` does as the message says. Active dropout, batch normalisation in
# training mode, data that change from pass to pass and vectors of another dtype are refused in the
# same way; :doc:`/guarantees` has the list.
#
# The ends of the spectrum
# ------------------------
#
# Eigenvalues need no matrix either. These are the largest and the smallest ones of the Hessian,
# each with the norm of its residual, and the density of all of them.

pairs = eigenpairs(hessian, k=6, which="both")
print(pairs)

# %%
density = spectral_density(hessian, num_probes=10, num_steps=40)

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
plotting.spectral_density(density, left)
plotting.eigenvalues(pairs, right)
left.set_title("Density of all eigenvalues")
right.set_title("Three at either end")
plt.show()

# %%
# Most directions are nearly flat and a few are steep, as in larger networks. Some eigenvalues are
# negative. So conjugate gradients may not be used with this Hessian (they would say so), but with
# the GGN, or with enough regularization.
#
# Which training points are behind a prediction?
# ----------------------------------------------
#
# The influence of a training point z on a test point z' is :math:`\langle \nabla\ell(z'), (G +
# \lambda I)^{-1} \nabla\ell(z)\rangle`. Divided by the number of training points, it estimates by
# how much the loss on z' would grow if the model were trained without z: positive for a point that
# helps, negative for one that harms. An influence model makes the gradients, and solves.

influence = CgInfluence(
    model,
    loss,
    regularization=weight_decay,
    second_order_mode="generalized_gauss_newton",
).fit(loader)
scores = influence.influences(x_test, y_test, x_train, y_train)
print(tuple(scores.shape))  # a row for each test point, a column for each training point

# %%
# Two test points: the one with the largest loss, and the one that is read right with the least
# confidence. The larger a dot, the larger the influence, of either sign; the five most helpful and
# the five most harmful points have a ring. The line is where the model is undecided.

with torch.no_grad():
    outputs = model(x_test)
    losses = nn.functional.cross_entropy(outputs, y_test, reduction="none")
is_right = outputs.argmax(dim=1) == y_test
wrong, unsure = int(losses.argmax()), int((losses * is_right).argmax())

horizontal = torch.linspace(-1.9, 2.9, 160, dtype=torch.float64)
vertical = torch.linspace(-1.3, 1.9, 120, dtype=torch.float64)
grid = torch.cartesian_prod(horizontal, vertical)
with torch.no_grad():
    probability = model(grid).softmax(dim=1)[:, 1].reshape(160, 120).T

CLASSES = ("#3b94d1", "#c97f00")
RINGS = {"most helpful": (1, "#0b7a3b"), "most harmful": (-1, "#c62828")}


def draw(axes, point, title):
    """The training points by their influence on a test point."""
    row = scores[point]
    sizes = 8 + 150 * row.abs() / row.abs().max()
    for label, color in enumerate(CLASSES):
        of = y_train == label
        style = {"color": color, "alpha": 0.8, "label": f"class {label}"}
        axes.scatter(*x_train[of].T, s=sizes[of], **style)
    for name, (sign, color) in RINGS.items():
        top = (sign * row).topk(5).indices
        style = {"color": "none", "edgecolors": color, "lw": 2, "label": name}
        axes.scatter(*x_train[top].T, s=sizes[top] + 60, **style)
    color = CLASSES[int(y_test[point])]
    style = {"s": 260, "marker": "*", "edgecolors": "black", "zorder": 3}
    axes.scatter(*x_test[point], color=color, label="test point", **style)
    axes.contour(horizontal, vertical, probability, levels=[0.5], colors="#222222")
    axes.set(title=title, xlabel="first input", ylabel="second input", aspect="equal")


figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharey=True)
draw(axes[0], wrong, f"Read wrong, loss {losses[wrong]:.2f}")
draw(axes[1], unsure, f"Read right, loss {losses[unsure]:.2f}")
entries = axes[0].get_legend_handles_labels()
legend = figure.legend(*entries, loc="outside lower center", ncols=5, frameon=False)
for handle in legend.legend_handles:
    handle.set_sizes([60])
plt.show()

# %%
# Few points decide: those near the line, and those on the wrong side of it. The model is certain of
# most others, so that their gradients are small.

sizes = scores[[wrong, unsure]].abs()
share = sizes.topk(10, dim=1).values.sum(dim=1) / sizes.sum(dim=1)
print("share of ten points in all influence:", [f"{value:.2f}" for value in share])

# %%
# :doc:`/gallery/influence_digits` does the same with images, and trains again without the points.
#
# With your own model
# -------------------
#
# - Call ``model.eval()`` before you make an operator, and pass the loss as a function of
#   ``(output, target)``. :doc:`/recipes/mapping_inputs` is for batches that are dictionaries and
#   models that take several inputs, as those of Hugging Face do.
# - float32 is fine. Tolerances follow the dtype: the relative tolerance of a solve is 1e-7 in
#   float64 and 1e-4 in float32.
# - ``restrict_to`` differentiates by some of the parameters only, such as those of the last layer.
# - A solve costs a pass over the data per step. Preconditioners make the steps fewer
#   (:doc:`/solving`), and :doc:`/kronecker` has inverses that need no steps.
#
# Where to go next
# ----------------
#
# - :doc:`/choose`: which operator, which inverse and which damping, by purpose and size.
# - :doc:`/recipes/index`: short programs for one task each, such as :doc:`/recipes/regression`,
#   :doc:`/recipes/classification` and :doc:`/recipes/custom_loss`.
# - :doc:`/concepts/index`: the parts, and how to replace them.
# - :doc:`/influence`, :doc:`/estimates`: more on the last two sections.
# - :doc:`/migration/pydvl`, :doc:`/migration/dattri`, :doc:`/migration/curvlinops`: what your
#   program becomes if it uses one of these.
