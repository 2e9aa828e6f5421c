r"""
A custom operator
=================

A matrix that `hessops` does not have takes one method, and gets everything that others have:
checks of shapes and dtypes, the algebra, solvers, estimators, moves between devices.

There are two ways, and a kit of tests for both:

* a **batch operation**, for a matrix that is a mean over points. You write the product for one
  batch; the data, the cache and the average are taken care of.
* an **operator**, for any other linear map. You write the product.
"""

# %%
# A model and data
# ----------------
#
# Small and in float64, so that the kit can compare with a dense matrix to ten digits. The batches
# are of different sizes on purpose: what is divided by the wrong number shows.

import textwrap

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_wine
from torch import nn

from hessops import (
    BatchOperator,
    CgOperator,
    ModelBatchOperation,
    ParameterSpace,
    TensorDictOperator,
)
from hessops.errors import ConformanceError
from hessops.functional import JacobianProducts
from hessops.plotting import eigenvalues
from hessops.testing import check_operator

points, classes = load_wine(return_X_y=True)
x, y = torch.tensor(points), torch.tensor(classes)
x = (x - x.mean(dim=0)) / x.std(dim=0)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(13, 4), nn.Tanh(), nn.Linear(4, 3)).double()
loss = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
for _ in range(30):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()
batches = list(zip(x.split(100), y.split(100), strict=True))  # 100 and 78 points

# %%
# A mean over points: the Fisher matrix with a temperature
# --------------------------------------------------------
#
# .. math:: F_T = \frac1n \sum_i J_i^\top \left(\mathrm{diag}(p_i) - p_i p_i^\top\right) J_i
#
# with :math:`J_i` the Jacobian of the logits :math:`z_i` of point i, and :math:`p_i` the softmax of
# :math:`z_i / T`. A ``ModelBatchOperation`` holds a copy of model and loss and defines
# ``_linearize(batch, *, forward_mode)``: run the model once, and return the map from k vectors,
# ``{name: (k, *shape)}``, to products of the same form, with the mean over the points of *this*
# batch. ``push`` is a product with J, ``pull`` one with its transpose. ``forward_mode`` is true
# only with ``mode="rev-fwd"``, and may be ignored.
#
# The copy of the model moves to other devices by itself. Tensors of your own do not: extend
# ``_move_parts``, as for the temperature, of which there may be one for each class.


class TemperedFisher(ModelBatchOperation):
    """The Fisher matrix of a classifier whose logits are divided by a temperature."""

    always_positive_semidefinite = True

    def __init__(self, model, loss, temperature):
        super().__init__(model, loss)
        self.temperature = torch.as_tensor(temperature)

    def _linearize(self, batch, *, forward_mode):
        leaves = {n: p.detach().requires_grad_() for n, p in self.objective.params.items()}
        with torch.enable_grad():
            logits = self.objective.output(leaves, batch.x)
        J = JacobianProducts([logits], leaves)
        p = (logits.detach() / self.temperature).softmax(dim=1)

        def product(stack):
            (u,) = J.push(stack)  # (k, n, classes)
            weighted = p * (u - (p * u).sum(dim=2, keepdim=True))
            return J.pull([weighted / batch.size])

        return product

    def _move_parts(self, device):
        super()._move_parts(device)
        self.temperature = self.temperature.to(device)


# %%
# With data it is an operator. The dense reference must not share code with it: here it is made with
# ``torch.func``.

space = ParameterSpace.from_model(model)
params = {name: p.detach() for name, p in model.named_parameters()}


def dense_fisher(temperature):
    def logits_of(flat):
        return torch.func.functional_call(model, space.unflatten(flat), (x,))

    flat = space.flatten(params)
    jacobian = torch.func.jacrev(logits_of)(flat)  # (n, classes, P)
    p = (logits_of(flat).detach() / temperature).softmax(dim=1)
    middle = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    return torch.einsum("ncp,ncd,ndq->pq", jacobian, middle, jacobian) / len(x)


fisher = BatchOperator(TemperedFisher(model, loss, temperature=2.0), batches)
print(fisher)
print(check_operator(fisher, dense_fisher(2.0)))

# %%
# Everything else is there: solvers, blocks of some parameters, eigenvalues. The higher the
# temperature, the closer the classes are to equally probable, and the flatter the spectrum.

rhs = torch.randn(fisher.input_size, dtype=torch.float64)
print(CgOperator(fisher, regularization=1e-3).solve(rhs))
print(fisher.restricted(["2.weight"]))  # a block of it

figure, axes = plt.subplots(1, 3, figsize=(9, 3), sharey=True, layout="constrained")
for ax, temperature in zip(axes, (0.5, 1.0, 4.0), strict=True):
    operation = TemperedFisher(model, loss, temperature)
    values = torch.linalg.eigvalsh(BatchOperator(operation, batches).to_dense())
    eigenvalues(values[values > 1e-12], ax)  # without the zeros of rounding
    ax.set_title(f"temperature {temperature:g}")
plt.show()

# %%
# Any other map: the covariance of weighted gradients
# ---------------------------------------------------
#
# .. math:: C = \frac{1}{\sum_i w_i} \sum_i w_i\, g_i g_i^\top - \bar g \bar g^\top
#
# with :math:`\bar g` the weighted mean of the gradients, is no mean over points, because of the
# second term. A ``TensorDictOperator`` states its parameters and what is known of its structure,
# and defines ``_apply_rows`` for a stack ``(k, P)``. ``_move`` is optional: it makes ``to`` work.
# This one holds a row for each point; for more than fit, ``_apply_rows`` would pass over data.


class GradientCovariance(TensorDictOperator):
    """The covariance of the rows of a matrix, with a weight >= 0 for each."""

    def __init__(self, gradients, weights, space):
        super().__init__(space, symmetric=True, positive_semidefinite=True)
        self.shares = weights / weights.sum()
        self.centred = gradients - self.shares @ gradients

    def _apply_rows(self, rows):
        return (rows @ self.centred.T * self.shares) @ self.centred

    def _move(self, device):
        moved = self._copy_on(device)
        moved.shares, moved.centred = self.shares.to(device), self.centred.to(device)
        return moved


def loss_of(parameters, point, target):
    return loss(torch.func.functional_call(model, parameters, (point[None],)), target[None])


by_name = torch.func.vmap(torch.func.grad(loss_of), (None, 0, 0))(params, x, y)
gradients = torch.cat([by_name[name].flatten(1) for name in space.names], dim=1)  # (n, P)
weights = 0.5 + torch.rand(len(x), dtype=torch.float64)
dense = torch.cov(gradients.T, aweights=weights, correction=0)

covariance = GradientCovariance(gradients, weights, space)
print(covariance)
print(check_operator(covariance, dense))
total = covariance + fisher.shift(0.01)  # it combines with all others
torch.testing.assert_close(total @ rhs, dense @ rhs + (fisher @ rhs) + 0.01 * rhs)

# %%
# What the kit says of mistakes
# -----------------------------
#
# Four operators that return numbers, all of them wrong. Two are found without a dense reference.
# The other two are right in form, and only another computation of the same matrix can tell.


class AnotherSum(GradientCovariance):
    """Divided by n, and not by the sum of the weights."""

    def _apply_rows(self, rows):
        return super()._apply_rows(rows) * weights.mean()


class LostPoint(GradientCovariance):
    """A loop over points that ends one too early."""

    def __init__(self, gradients, weights, space):
        super().__init__(gradients[:-1], weights[:-1], space)


class FirstRowOnly(GradientCovariance):
    """All vectors of a stack get the product of the first."""

    def _apply_rows(self, rows):
        return super()._apply_rows(rows[:1]).expand_as(rows)


class OneSided(GradientCovariance):
    """Claims symmetry, and scales one side."""

    def _apply_rows(self, rows):
        return super()._apply_rows(rows) * torch.linspace(1, 2, rows.shape[1])


for kind in (FirstRowOnly, OneSided, AnotherSum, LostPoint):
    wrong = kind(gradients, weights, space)
    try:
        check_operator(wrong)
        check_operator(wrong, dense)
    except ConformanceError as error:
        print(textwrap.fill(str(error), 84))
    else:
        raise AssertionError(f"{kind.__name__} was not caught")

# %%
# The first words are the class and the check. Some mistakes do not get as far: a product refuses a
# hook that returns another shape or dtype, or that writes to its argument.
#
# For your own operator
# ---------------------
#
# * Put the call of ``check_operator`` into a test, for a model small enough for a dense matrix, in
#   float64, with batches of different sizes.
# * Claim ``symmetric`` and ``positive_semidefinite`` only where they hold for all data; ``None`` is
#   unknown, and solvers then watch for themselves.
# * A map that is not symmetric has a transpose if it defines ``_apply_rows_adjoint``; one with an
#   inverse in closed form defines ``_closed_form_inverse(shift)``, which returns the operator
#   (A + shift·I)⁻¹ or ``None``. The kit checks such exact hooks, those that are there.
#
# See also
# --------
#
# * :doc:`/concepts/operators` and :doc:`/concepts/batch`: the hooks
# * :func:`hessops.testing.check_operator`: what is checked
# * :doc:`composing_operators`, :doc:`custom_preconditioner`
