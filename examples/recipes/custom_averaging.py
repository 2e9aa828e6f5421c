r"""
A custom averaging
==================

An operator is an average over batches, weighted by their numbers of points. Other weights are one
method; this recipe shows what is kept and what is lost with them.

In formulas it is :math:`A = \sum_b w_b A_b / \sum_b w_b`, with :math:`A_b` the mean over the points
of batch b. The weight of n points is n unless you say otherwise: then every point counts the same,
and it does not matter how the data are split into batches. Other weights give that up. Weights of
points belong in the loss, as the last section shows.
"""

# %%
# Data in sessions
# ----------------
#
# A batch is a session of measurements here, some of them long and some short.

import textwrap

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hessops import Averaging, ChunkAveraging, HessianOperator, ParameterSpace, PointAveraging
from hessops.errors import ArgumentError, DataChangedError
from hessops.testing import check_operator

features, targets = load_diabetes(return_X_y=True, scaled=False)
x, y = torch.tensor(features), torch.tensor(targets)[:, None]
x, y = (x - x.mean(dim=0)) / x.std(dim=0), (y - y.mean()) / y.std()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(10, 4), nn.Tanh(), nn.Linear(4, 1)).double()
loss = nn.MSELoss()
sizes = [190, 120, 80, 30, 15, 7]
sessions = list(zip(x.split(sizes), y.split(sizes), strict=True))

# %%
# A weight for a batch
# --------------------
#
# The weight is a function of the number of points and of nothing else: a session counts as many
# points as it has, but no more than fifty, so that a long one does not drown the others.


class CappedAveraging(Averaging):
    """Every batch counts as many points as it has, up to a limit."""

    def __init__(self, limit):
        self.limit = limit

    def weight(self, num_points):
        """min(n, limit)."""
        return min(num_points, self.limit)


averagings = {
    "points": PointAveraging(),  # the default
    "batches": ChunkAveraging(),  # all batches alike
    "capped": CappedAveraging(50),
}
shares = {}
for name, averaging in averagings.items():
    weights = torch.tensor([averaging.weight(n) for n in sizes], dtype=torch.float64)
    shares[name] = weights / weights.sum()

figure, ax = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
for place, (name, share) in enumerate(shares.items()):
    positions = [session + 0.27 * (place - 1) for session in range(len(sizes))]
    ax.bar(positions, (100 * share).tolist(), width=0.25, label=name)
ax.set_xticks(range(len(sizes)), sizes)
ax.set(xlabel="points in the session", ylabel="share of the average (%)")
ax.legend(frameon=False)
plt.show()

# %%
# Against dense matrices
# ----------------------
#
# The Hessian of each session is computed on its own, by ``torch.func``.

space = ParameterSpace.from_model(model)
flat = nn.utils.parameters_to_vector(model.parameters()).detach()


def loss_at(vector, points, values):
    return loss(torch.func.functional_call(model, space.unflatten(vector), (points,)), values)


dense_hessian = torch.func.jacrev(torch.func.jacrev(loss_at))
of_sessions = torch.stack([dense_hessian(flat, *session) for session in sessions])
for name, averaging in averagings.items():
    H = HessianOperator(model, loss, sessions, averaging=averaging)
    report = check_operator(H, torch.einsum("b,bpq->pq", shares[name], of_sessions))
    print(f"{name:8} {len(report.passed)} checks passed, {H}")

# %%
# What is lost
# ------------
#
# With the default, other batches of the same points are the same matrix. With any other weight they
# are another matrix.

pieces = list(zip(x.split(64), y.split(64), strict=True))
for name, averaging in averagings.items():
    whole = HessianOperator(model, loss, sessions, averaging=averaging).to_dense()
    split = HessianOperator(model, loss, pieces, averaging=averaging).to_dense()
    print(f"{name:8} changes by {(split - whole).norm() / whole.norm():.1e}")

# %%
# So a loader that makes other batches in every pass is refused, at the second pass. With
# ``PointAveraging`` it is welcome.

shuffled = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
vector = torch.ones(len(flat), dtype=torch.float64)
default = HessianOperator(model, loss, shuffled)
torch.testing.assert_close(default @ vector, default @ vector)
capped = HessianOperator(model, loss, shuffled, averaging=CappedAveraging(50))
capped @ vector
try:
    capped @ vector
except DataChangedError as error:
    print(textwrap.fill(str(error), 84))

# %%
# What is kept
# ------------
#
# * The weights are divided by their sum, so that the scale of the matrix, and with it that of a
#   regularization, stays.
# * They are not negative: an average of positive semi-definite matrices is one. Other weights are
#   refused.
# * One batch of all points has the same matrix under any averaging.
# * Shards over several processes are averaged with the same weights, as
#   ``DistributedAveraging(CappedAveraging(50))``.


class Negative(Averaging):
    """A weight below zero for small batches."""

    def weight(self, num_points):
        """n - 10."""
        return num_points - 10


try:
    HessianOperator(model, loss, sessions, averaging=Negative()) @ vector
except ArgumentError as error:
    print(textwrap.fill(str(error), 84))

# %%
# Weights of points belong in the loss
# ------------------------------------
#
# An averaging is not told *which* batch it weighs. Weights by time, by class or by trust are
# weights of points: hand them to the loss beside the targets, and leave the averaging as it is.
# Then the split into batches does not matter. Here the newest point counts most, and one that is
# 100 points older half as much. The weights have mean 1, which makes the mean over points a
# weighted one.

age = torch.arange(len(x) - 1, -1, -1, dtype=torch.float64)
w = 0.5 ** (age / 100)
w = (w / w.mean())[:, None]


def weighted_loss(output, target):
    value, weight = target
    return (weight * (output - value) ** 2).squeeze(1)  # one number for each point


def in_batches(size):
    targets = zip(y.split(size), w.split(size), strict=True)
    return list(zip(x.split(size), targets, strict=True))


recent = HessianOperator(model, weighted_loss, in_batches(64), reduction="none").to_dense()
of_points = torch.func.vmap(dense_hessian, (None, 0, 0))(flat, x, y)
dense = (w[:, :, None] * of_points).sum(dim=0) / w.sum()
torch.testing.assert_close(recent, dense)
again = HessianOperator(model, weighted_loss, in_batches(7), reduction="none").to_dense()
torch.testing.assert_close(again, recent)
print(f"another split changes it by {(again - recent).norm() / recent.norm():.1e}")

# %%
# See also
# --------
#
# * :doc:`/concepts/batch`: batch operations and averages
# * :doc:`class_weights`: weights of classes
# * :doc:`several_machines`: the average over processes
# * :class:`hessops.Averaging`, :class:`hessops.PointAveraging`, :class:`hessops.ChunkAveraging`
