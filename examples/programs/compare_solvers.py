r"""
Compare ways to solve
=====================

Six ways to solve with the curvature of a network, side by side: by passes over the data, and by
true residuals.

Influence functions need :math:`(H + \lambda I)^{-1} g` for the gradients g of many points. Every
way to get it here is an operator with the same ``solve``, so that one can be put in the place of
another and the outcomes compared.
"""

# %%
# A network and some right-hand sides
# -----------------------------------

from functools import partial

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from hessops import (
    CgOperator,
    GeneralizedGaussNewtonOperator,
    JacobiPreconditioner,
    MinresOperator,
    NystroemPreconditioner,
)
from hessops.plotting import convergence

digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float64) / 16
y = torch.tensor(digits.target)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).double()
loss = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(60):
    optimizer.zero_grad()
    loss(model(x[:600]), y[:600]).backward()
    optimizer.step()


def gradient(point):
    value = loss(model(x[point : point + 1]), y[point : point + 1])
    return nn.utils.parameters_to_vector(torch.autograd.grad(value, list(model.parameters())))


batches = [(x[i : i + 300], y[i : i + 300]) for i in (0, 300)]
curvature = GeneralizedGaussNewtonOperator(model, loss, batches)
rhs = torch.stack([gradient(point) for point in range(600, 616)])
print(curvature)

# %%
# Six ways
# --------
#
# A solver is a class; ``partial`` binds its settings. A Nyström preconditioner sketches the largest
# eigenvalues by one application of the operator, which is worth it where the spectrum falls
# quickly. Block conjugate gradients share one Krylov space among the right-hand sides.

damping = 1e-4
sketch = NystroemPreconditioner(rank=150)
ways = {
    "MINRES": MinresOperator,
    "CG": CgOperator,
    "CG, Jacobi": partial(CgOperator, preconditioner=JacobiPreconditioner()),
    "CG, Nyström": partial(CgOperator, preconditioner=sketch),
    "block CG": partial(CgOperator, use_block_cg=True),
    "block CG, Nyström": partial(CgOperator, preconditioner=sketch, use_block_cg=True),
}
solutions = {}
for name, way in ways.items():
    inverse = curvature.inverse(partial(way, regularization=damping, rtol=1e-6))
    solutions[name] = inverse.solve(rhs, history=True)
    passes = solutions[name].num_applications + ("Jacobi" in name or "Nyström" in name)
    worst = float(solutions[name].relative_residual_norms.max())
    print(f"{name:18}  {passes:4} passes over the data, worst true residual {worst:.1e}")

# %%
# Their convergence
# -----------------
#
# A line for each right-hand side, and a dot at the true residual of what was returned: it lies on
# its line where the recurrence told the truth.

fig, ax = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
convergence(solutions, ax)
ax.set_title(f"{len(rhs)} right-hand sides, {curvature.input_size} parameters")
plt.show()

# %%
# The report of a solve says how it ended and what it took:

print(solutions["block CG, Nyström"].report())
