r"""
Classification
==============

Cross-entropy has two matrices that are called its curvature: the Hessian and the generalized
Gauss-Newton matrix (GGN). This recipe has both side
by side, and says which to take for what.

With :math:`J_i` the Jacobian of the logits :math:`f_i`, and :math:`p_i` their softmax,

.. math::
   H = G + \frac1N \sum_i \sum_c (p_{ic} - y_{ic})\, \nabla^2 f_{ic}, \qquad
   G = \frac1N \sum_i J_i^\top (\operatorname{diag} p_i - p_i p_i^\top) J_i .

The GGN G is positive semi-definite, and it is the Fisher matrix of the model. The other term has
eigenvalues of both signs; it vanishes where every class probability is right. This recipe looks at
both, and says which one to invert.
"""

# %%
# A network that reads digits
# ---------------------------

import textwrap

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from hessops import (
    CgOperator,
    GeneralizedGaussNewtonOperator,
    HessianOperator,
    MinresOperator,
    NystroemPreconditioner,
)
from hessops.errors import IndefiniteOperatorError
from hessops.estimators import eigenpairs, norm, spectral_density

torch.manual_seed(0)
bunch = load_digits()
x = torch.tensor(bunch.data / 16)
y = torch.tensor(bunch.target)
order = torch.randperm(len(x))
train, test = order[:800], order[800:]

model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
loss = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)


def train_for(steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(x[train]), y[train]).backward()
        optimizer.step()


train_for(20)
batches = list(zip(x[train].split(400), y[train].split(400), strict=True))
hessian = HessianOperator(model, loss, batches)
ggn = GeneralizedGaussNewtonOperator(model, loss, batches)

# %%
# Early and late in training
# --------------------------
#
# An operator keeps the parameters that the model had. After more steps, ``refresh()`` takes those
# of now. The difference of two operators is one, too: it is the other term of the formula.


def compare(name):
    """Prints and returns what the spectra of both matrices are like."""
    ends = eigenpairs(hessian, k=4, which="both")
    largest = eigenpairs(ggn, k=1)
    second = norm(hessian - ggn, 2)
    print(f"{name}: loss {loss(model(x[train]), y[train]).item():.3f}")
    print(f"  Hessian: from {ends.values[-1]:.3f} to {ends.values[0]:.3f}")
    print(f"  GGN: to {largest.values[0]:.3f}; norm of the difference {second.value:.3f}")
    settings = {"num_probes": 4, "num_steps": 40}
    return [spectral_density(matrix, **settings) for matrix in (hessian, ggn)]


early = compare("after 20 steps")
train_for(180)
model.eval()
hessian.refresh()
ggn.refresh()
late = compare("after 200 steps")

# %%
COLORS = {"Hessian": "#0b4f8a", "GGN": "#c8500a"}
figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
for axis, densities, steps in zip(axes, (early, late), (20, 200), strict=True):
    low, high = densities[0].extremes
    grid = torch.linspace(low - 0.1, high + 0.1, 300)
    for density, name in zip(densities, ("Hessian", "GGN"), strict=True):
        values, _ = density.on(grid, 0.02)
        axis.semilogy(grid, values, color=COLORS[name], label=name)
    axis.set(title=f"After {steps} steps", xlabel="eigenvalue", ylim=(1e-3, 50))
axes[0].set_ylabel("density of the eigenvalues")
axes[0].legend(frameon=False)
plt.show()

# %%
# Early, the Hessian reaches far below zero. Late, the network is right about nearly all training
# points, and the two nearly agree. A few negative eigenvalues remain.
#
# Which one to invert
# -------------------
#
# The right-hand sides are the gradients of the losses on four test points. With a small
# regularization, the Hessian is not positive definite. Conjugate gradients are not for such a
# matrix, and they notice:


def gradient(point):
    value = loss(model(x[point][None]), y[point][None])
    return nn.utils.parameters_to_vector(torch.autograd.grad(value, model.parameters()))


rhs = torch.stack([gradient(point) for point in test[:4]])
regularization = 1e-3
try:
    CgOperator(hessian, regularization).apply(rhs)
except IndefiniteOperatorError as error:
    print(textwrap.fill(f"IndefiniteOperatorError: {error}", 84))

# %%
# Three ways on: the GGN, for which a preconditioner saves steps; MINRES, which solves indefinite
# systems; or a regularization that is larger than the most negative eigenvalue is deep. The last
# columns are :math:`b^\top (A + \lambda I)^{-1} b` for each right-hand side b: N times what a test
# point would take off its own loss, to first order, were it trained on.

solutions = {
    "GGN, CG": CgOperator(ggn, regularization).solve(rhs),
    "GGN, CG, sketched": CgOperator(
        ggn, regularization, preconditioner=NystroemPreconditioner(rank=60)
    ).solve(rhs),
    "Hessian, MINRES": MinresOperator(hessian, regularization, rtol=1e-3).solve(rhs),
    "GGN, CG, λ = 0.01": CgOperator(ggn, 1e-2).solve(rhs),
    "Hessian, CG, λ = 0.01": CgOperator(hessian, 1e-2).solve(rhs),
}
for name, solution in solutions.items():
    assert bool(solution.converged.all())
    forms = (solution.value * rhs).sum(dim=1)
    print(f"{name:22} {int(solution.iterations.max()):4} steps  ", end="")
    print("".join(f"{value:10.4f}" for value in forms))

# %%
# The same points stand out in all of them; the regularization changes the numbers more than the
# matrix does. As a rule:
#
# - Invert the **GGN** for influences, for the Laplace approximation and for natural gradients. It
#   is positive semi-definite wherever training has stopped, and it is what KFAC and EKFAC
#   approximate (:doc:`/kronecker`).
# - Invert the **Hessian** where the loss with its weight decay is at a minimum and the question is
#   about that loss exactly. The weight decay is then the regularization, and conjugate gradients
#   apply. MINRES solves the indefinite system right, but in a direction of negative curvature its
#   solution has the opposite sign.
# - Look at the **Hessian** for sharpness: :doc:`/recipes/sharpness_in_training`.
#
# For your own model
# ------------------
#
# Put your network, loader and loss in the place of those at the top. A network with dropout or
# batch normalisation must be in evaluation mode (``model.eval()``) when the operator is made and
# refreshed. Two classes with a single logit work the same way with ``nn.BCEWithLogitsLoss()``. For
# a larger network take λ from the weight decay, or relative to the mean eigenvalue
# (:class:`hessops.Damping`), and an EKFAC inverse as the preconditioner (:doc:`/solving`).
#
# See also
# --------
#
# - :doc:`/choose`: which matrix, which inverse, which damping.
# - :doc:`/recipes/class_weights`: classes that are not equally important.
# - :doc:`/gallery/curvature_digits`: spectra, traces and preconditioners in one program.
# - :class:`hessops.HessianOperator`, :class:`hessops.GeneralizedGaussNewtonOperator`.
