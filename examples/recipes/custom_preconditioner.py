r"""
A custom preconditioner
=======================

What you know of a problem makes the best preconditioner. Here that is a prior over the
parameters, and conjugate gradients take fewer steps with it.

A preconditioner is a recipe: fitted to an operator A and a regularization λ it yields an operator
close to :math:`(A + \lambda I)^{-1}`, the closer the better. The precision of a posterior,

.. math:: A + \lambda I = N G + D + \lambda I,

is a Gauss-Newton matrix G, of which a few directions matter, and the precision of the prior,
D + λI, a diagonal that is known.
"""

# %%
# An ill-conditioned problem
# --------------------------
#
# Digits of 8 x 8 pixels. Weights of pixels that hardly vary have a strong prior, the others a weak
# one: with λ = 1, D + λI covers four orders of magnitude.

import textwrap
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hessops import (
    CgOperator,
    DiagonalOperator,
    GeneralizedGaussNewtonOperator,
    JacobiPreconditioner,
    NystroemPreconditioner,
    Preconditioner,
)
from hessops.plotting import convergence

digits = load_digits()
x = torch.tensor(digits.data[:600]) / 16
y = torch.tensor(digits.target[:600])
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
loss = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(60):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()

ggn = GeneralizedGaussNewtonOperator(
    model, loss, list(zip(x.split(300), y.split(300), strict=True))
)
precision = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
precision["0.weight"] += 1 / (x.var(dim=0) + 1e-4)  # for each pixel
prior = ggn.space.flatten(precision).detach()
A = len(x) * ggn + DiagonalOperator(prior, space=ggn.space)
print(A)
print(f"entries of D from {prior.min():.0f} to {prior.max():.0f}")

# %%
# The recipe
# ----------
#
# With :math:`D_\lambda = D + \lambda I` taken out at both sides, the Nyström sketch of
# :math:`D_\lambda^{-1/2} N G D_\lambda^{-1/2}` sees nothing but the data:
#
# .. math:: (A + \lambda I)^{-1} = D_\lambda^{-1/2}
#    \left(I + D_\lambda^{-1/2} N G\, D_\lambda^{-1/2}\right)^{-1} D_\lambda^{-1/2}
#
# (as in Bui-Thanh, Ghattas, Martin & Stadler 2013, where the prior is a differential operator).
# ``fit`` returns any operator; here three are composed.


@dataclass(frozen=True, repr=False)
class PriorPreconditioner(Preconditioner):
    """A Nyström sketch of what is left when a diagonal prior is taken out.

    Attributes:
        prior: D, the diagonal of the prior that is part of the operator, ``(P,)``.
        rank: Of the sketch.
    """

    prior: Tensor
    rank: int = 60

    def fit(self, operator, regularization=None):
        """One product with `rank` + 10 columns."""
        likelihood = operator - DiagonalOperator(self.prior)
        root = DiagonalOperator((self.prior + (regularization or 0.0)).rsqrt())
        inner = NystroemPreconditioner(self.rank).fit(root @ likelihood @ root, 1.0)
        return root @ inner @ root


# %%
# Compared with others
# --------------------
#
# Each solver fits its preconditioner in its first solve.

recipes = {
    "none": None,
    "Jacobi": JacobiPreconditioner(num_samples_estimator=70),
    "Nyström": NystroemPreconditioner(rank=60),
    "own": PriorPreconditioner(prior, rank=60),
}
rhs = torch.randn(3, A.input_size, dtype=torch.float64)
solvers, solutions = {}, {}
for name, recipe in recipes.items():
    solvers[name] = CgOperator(A, regularization=1.0, preconditioner=recipe, rtol=1e-7)
    solutions[name] = solution = solvers[name].solve(rhs, history=True)
    print(
        f"{name:8} {int(solution.iterations.max()):4} steps, "
        f"true relative residual {solution.relative_residual_norms.max():.1e}"
    )

figure, ax = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
convergence(solutions, ax)
ax.set_title(f"{len(rhs)} right-hand sides, {A.input_size} parameters")
plt.show()

# %%
# Jacobi estimates the diagonal from as many products as the sketches take, and knows nothing of the
# directions that the data determine. A Nyström sketch of A spends its rank on the largest entries
# of D. Taken apart, both parts are easy.
#
# A preconditioner changes the number of steps, and not the solution: what is measured in the end is
# the residual of the system itself.

for solution in solutions.values():
    torch.testing.assert_close(solution.value, solutions["own"].value, rtol=1e-5, atol=1e-7)

# %%
# One that is wrong costs steps; one that is not positive definite, which conjugate gradients need,
# is found out and named.


class WrongSign(Preconditioner):
    """Minus the inverse of the prior."""

    def fit(self, operator, regularization=None):
        """No product."""
        return -DiagonalOperator(1 / (prior + 1))


failed = CgOperator(A, regularization=1.0, preconditioner=WrongSign()).solve(rhs[0])
print(textwrap.fill(failed.report(), 84))

# %%
# Another regularization
# ----------------------
#
# ``with_regularization`` asks the recipe to ``refit``, which by default fits anew. What holds for
# all λ need not be computed again: return a ``FittedPreconditioner``, whose product reads
# ``total_shift``, and it is adapted without a product with A.

stronger = solvers["own"].with_regularization(10.0).solve(rhs)
print(stronger)

# %%
# For your own model
# ------------------
#
# Try ``NystroemPreconditioner`` first: without a prior like D it is a good choice, and it needs to
# know nothing but its rank. Any operator close to the inverse may be given as it is,
# ``preconditioner=P``: an inverse of Kronecker factors, say.
#
# See also
# --------
#
# * :doc:`/concepts/preconditioners`, and :doc:`/solving` for the solvers that take them
# * :class:`hessops.Preconditioner`, :class:`hessops.FittedPreconditioner`
# * :doc:`laplace_sampling`: what such a posterior is for
