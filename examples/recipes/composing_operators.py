r"""
Composing operators
===================

Operators are combined as matrices are: multiples, sums, shifts, products, transposes, blocks and
inverses are operators again, and none of them is ever written out.

This recipe builds

.. math:: A = 0.9\, H + 0.1\, G + \lambda I

of the Hessian H and the generalized Gauss-Newton matrix G of one network, solves with it, and
compares every step with the dense matrices, which fit in memory here.
"""

# %%
# Two operators of one model
# --------------------------
#
# An operator holds its own copy of the parameters: train first, then make it.

import textwrap
from functools import partial

import matplotlib.pyplot as plt
import torch
from scipy.sparse.linalg import eigsh
from sklearn.datasets import load_wine
from torch import nn

from hessops import (
    BlockDiagonalOperator,
    CgOperator,
    DiagonalOperator,
    GeneralizedGaussNewtonOperator,
    HessianOperator,
)
from hessops.errors import MissingInverseError
from hessops.plotting import eigenvalues

points, classes = load_wine(return_X_y=True)
x, y = torch.tensor(points), torch.tensor(classes)
x = (x - x.mean(dim=0)) / x.std(dim=0)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(13, 6), nn.Tanh(), nn.Linear(6, 3)).double()
loss = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
for _ in range(10):  # far from a minimum: the Hessian has negative eigenvalues
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()

batches = list(zip(x.split(64), y.split(64), strict=True))
H = HessianOperator(model, loss, batches)
G = GeneralizedGaussNewtonOperator(model, loss, batches)

# %%
# Their combination
# -----------------
#
# ``shift(c)`` adds a multiple of the identity. What is printed is the tree that a product runs
# through.

A = (0.9 * H + 0.1 * G).shift(0.1)
print(A)

dense_H, dense_G = H.to_dense(), G.to_dense()
identity = torch.eye(H.input_size, dtype=torch.float64)
dense = 0.9 * dense_H + 0.1 * dense_G + 0.1 * identity
torch.testing.assert_close(A.to_dense(), dense)

v = torch.randn(H.input_size, dtype=torch.float64)
V = torch.randn(H.input_size, 3, dtype=torch.float64)
torch.testing.assert_close(A @ v, dense @ v)  # one vector
torch.testing.assert_close(A @ V, dense @ V)  # columns, in one pass over the data
torch.testing.assert_close(A.apply(V.T), V.T @ dense.T)  # rows

named = A.apply_to_dict(A.space.unflatten(v))  # by parameter name
print({name: tuple(t.shape) for name, t in named.items()})

# %%
# What is known of their structure
# --------------------------------
#
# Symmetric and positive semi-definite are each ``True``, ``False`` or ``None``, which is unknown,
# and go through the algebra. Only what is certain is claimed: a Hessian may be indefinite, the loss
# of G is not known to be convex, and a product of two symmetric matrices is symmetric only where
# they commute.

D = DiagonalOperator(torch.linspace(0.5, 1, H.input_size, dtype=torch.float64))
kinds = {"H": H, "G": G, "A": A, "D": D, "D + I": D.shift(1.0), "H - D": H - D}
kinds |= {"H @ D": H @ D, "H @ H": H @ H}
print("        symmetric  positive semi-definite")
for name, operator in kinds.items():
    print(f"{name:6}  {operator.symmetric!s:9}  {operator.positive_semidefinite}")

# %%
# ``A.T`` is A itself where that is symmetric; of a product it is the product of the transposes in
# the other order.

assert H.T is H
print((H @ D).T)
torch.testing.assert_close((H @ D).T.to_dense(), (dense_H @ D.to_dense()).T)

# %%
# Blocks
# ------
#
# ``restricted`` is the diagonal block of some parameters. It shares the copy of the model and the
# data, and a product with it differentiates by those parameters only. Blocks joined along the
# diagonal are an operator on all parameters again.

first, last = (H.restricted(names) for names in (["0.weight", "0.bias"], ["2.weight", "2.bias"]))
by_layer = BlockDiagonalOperator([first, last], space=H.space)
print(by_layer)

where = H.space.indices(["2.weight", "2.bias"])  # positions in the flat vector
torch.testing.assert_close(last.to_dense(), dense_H[where][:, where])
assert by_layer.to_dense()[where[0], 0] == 0

# %%
# The inverse
# -----------
#
# Diagonals, matrices and Kronecker factors have an inverse in closed form. Operators that pass over
# data need a solver: a class, with its settings bound to it by ``partial``.

torch.testing.assert_close(D.inverse().apply(v), v / D.diagonal)
try:
    A.inverse()
except MissingInverseError as error:
    print(textwrap.fill(str(error), 84))

inverse = A.inverse(partial(CgOperator, rtol=1e-10))
solution = inverse.solve(v)
print(solution)
torch.testing.assert_close(solution.value, torch.linalg.solve(dense, v), rtol=1e-7, atol=1e-7)

# %%
# The inverse is an operator as well, so that it takes part in other combinations. Here it is
# between two others: one pass over the data for H, a solve, and a pass again.

sandwich = H @ inverse @ H
expected = dense_H @ torch.linalg.inv(dense) @ dense_H
torch.testing.assert_close(sandwich.apply(v), expected @ v, rtol=1e-7, atol=1e-7)

# %%
# With too small a shift A is indefinite. Conjugate gradients say so instead of returning numbers.

print((0.9 * H + 0.1 * G).shift(0.02).inverse(CgOperator).solve(v))

# %%
# Many products at fixed parameters
# ---------------------------------
#
# ``linearize`` retains the graphs of the batches, so that every product after the first one skips
# the forward pass. It reaches the parts of a sum. Solvers and eigen-solvers do this by themselves;
# do it for loops of your own.

fixed = A.linearize()
torch.testing.assert_close(fixed @ v, A @ v)
print(fixed)

# %%
# To SciPy
# --------
#
# ``to_scipy`` is a ``LinearOperator`` of the same dtype, for ``eigsh`` and all else that needs no
# more than products.

largest = eigsh(fixed.to_scipy(), k=3, return_eigenvectors=False)
exact = torch.linalg.eigvalsh(dense)
torch.testing.assert_close(torch.tensor(largest).sort().values, exact[-3:])
print(largest)

# %%
# Why one would combine them: G has no negative eigenvalues for this loss, so that the smallest
# eigenvalue of A is at least λ plus 0.9 times that of H, here above zero.

figure, axes = plt.subplots(1, 3, figsize=(9, 3), sharey=True, layout="constrained")
titles = ("H", "G", "A")
for ax, title, matrix in zip(axes, titles, (dense_H, dense_G, dense), strict=True):
    values = torch.linalg.eigvalsh(matrix)
    eigenvalues(values[values.abs() > 1e-10], ax)  # without the zeros of rounding
    ax.set_title(f"{title}: {int((values < -1e-10).sum())} negative eigenvalues")
plt.show()

# %%
# For your own model
# ------------------
#
# Leave out ``to_dense`` and the comparisons: everything else is products. The tree that is printed
# is their bill: every leaf that names a model is a pass over its data.
#
# See also
# --------
#
# * :doc:`/concepts/operators`: the algebra in full, and hooks for operators of your own
# * :doc:`/solving`: solvers, preconditioners, tolerances
# * :doc:`custom_operator`: a matrix of your own, with all that is shown here
