r"""
Sharpness and spectrum during training
======================================

The sharpness is the largest eigenvalue of the Hessian of the training loss. In the
training of a network it rises until it meets a bound that the step size sets.

Gradient descent with step size :math:`\eta` diverges along an eigenvector of a quadratic whose
eigenvalue exceeds :math:`2/\eta`. On networks the sharpness rises until it is there, and then stays
around that value while the loss goes on falling, though not in every step: the edge of stability
(Cohen et al. 2021).
"""

# %%
# An operator that follows the training
# -------------------------------------
#
# An operator keeps its own copy of the parameters: steps of an optimizer do not change it, and
# :meth:`refresh() <hessops.TensorOperator.refresh>` takes a new copy. So one operator follows a
# whole run, and others, made on the way, stay at their step for later.
#
# :func:`hessops.estimators.eigenpairs` returns the true residual norm of each pair. Within it
# there is an eigenvalue, so that the sharpness comes with a bound of its error.
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from hessops import HessianOperator
from hessops.estimators import eigenpairs, spectral_density

torch.set_num_threads(1)  # matrices this small only wait for more
digits = load_digits()
x = torch.tensor(digits.data / 16)[:200]
x = x - x.mean(dim=0)
y = nn.functional.one_hot(torch.tensor(digits.target)[:200], 10).double()
loss = nn.MSELoss()


def descend(eta, steps, every=25, keep=()):
    """Gradient descent with all data in every step, and what the Hessian was on the way."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 10)]
    model = nn.Sequential(*layers).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=eta)
    hessian = HessianOperator(model, loss, [(x, y)])
    losses, sharpness, kept, largest_error = [], [], {}, 0.0
    for step in range(steps + 1):
        if step % every == 0:
            top = eigenpairs(hessian.refresh(), k=1, tol=1e-3)
            sharpness.append(top.values.item())
            largest_error = max(largest_error, top.residual_norms.item())
        if step in keep:
            kept[step] = HessianOperator(model, loss, [(x, y)])
        optimizer.zero_grad()
        value = loss(model(x), y)
        losses.append(value.item())
        value.backward()
        optimizer.step()
    rises = sum(after > before for before, after in pairwise(losses))
    print(f"step size {eta}, 2/η = {2 / eta:.3f}: the loss rose in {rises} of {steps} steps")
    print(f"  sharpness {sharpness[0]:.3f} to {sharpness[-1]:.3f}, errors <= {largest_error:.0e}")
    return losses, sharpness, kept


runs = {eta: descend(eta, 750, keep=(0, 300, 750)) for eta in (2.0, 3.0)}

# %%
# The whole spectrum, at three steps
# ----------------------------------
#
# The kept operators still have the parameters of their steps. Stochastic Lanczos quadrature needs
# some hundred products for the density of all eigenvalues; nearly all of them are close to zero.
#
# In the middle picture the sharpness overshoots. The unstable direction is small at first, and
# takes some steps to grow until the loss shows it.
densities = {
    step: spectral_density(hessian, num_probes=5, num_steps=40)
    for step, hessian in runs[2.0][2].items()
}
for step, density in densities.items():
    lowest, highest = density.extremes
    print(f"step {step:3}: eigenvalues from {lowest:.3f} to {highest:.3f}")

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
for (eta, (losses, sharpness, _)), color in zip(runs.items(), ("C0", "C1"), strict=True):
    left.semilogy(losses, color=color, lw=1, label=f"η = {eta:g}")
    middle.plot(range(0, 751, 25), sharpness, ".-", color=color, label=f"η = {eta:g}")
    middle.axhline(2 / eta, color=color, ls="--", lw=1, label=f"2/η = {2 / eta:.2f}")
left.set(xlabel="step", ylabel="training loss", title="Loss")
middle.set(xlabel="step", ylabel="largest eigenvalue of the Hessian", title="Sharpness")
grid = torch.linspace(-0.3, 1.3, 400)
for (step, density), color in zip(densities.items(), ("0.7", "C2", "C0"), strict=True):
    right.semilogy(grid, density.on(grid, width=0.02)[0], color=color, label=f"step {step}")
right.axvline(2 / 2.0, color="C0", ls="--", lw=1, label="2/η")
right.set(xlabel="eigenvalue", ylabel="density", title="Spectrum, η = 2", ylim=(1e-3, 1e2))
for ax in (left, middle, right):
    ax.legend(fontsize="small")
plt.show()

sharpness = torch.tensor(runs[3.0][1])
assert sharpness[0] < 2 / 3.0
assert (sharpness[-10:] * 3.0 / 2 - 1).abs().max() < 0.15  # at the edge

# %%
# For your own model
# ------------------
#
# - The Hessian is that of the loss over the data of the operator. Fewer points are cheaper, and
#   have a sharpness of their own.
# - The model must be deterministic: the operator takes it in evaluation mode, without active
#   dropout and with fixed statistics of batch normalisation. ``model.eval()`` before,
#   ``model.train()`` after.
# - A pair takes some thirty products here, in the time of about fifty steps with the same data.
#   Choose ``every`` accordingly, and ``tol`` no smaller than needed.
# - With momentum :math:`\beta` the edge is at :math:`(2 + 2\beta)/\eta`.
#
# See also :doc:`/estimates`, :doc:`/performance` and, for the formulas, :doc:`/mathematics`.
