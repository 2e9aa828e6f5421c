r"""
Pruning scores
==============

Which weights can go? The curvature of the objective says what it costs to remove each of them.

Near a minimum of an objective :math:`L` with curvature :math:`H`, a step :math:`\delta` costs
:math:`\frac12 \delta^\top H \delta`. Removing weight :math:`q` is a step with
:math:`\delta_q = -\theta_q`:

- **Optimal brain damage** (LeCun, Denker & Solla 1990) leaves the others as they are. The cost is
  :math:`\frac12 H_{qq}\, \theta_q^2`.
- **Optimal brain surgeon** (Hassibi & Stork 1993) lets the others make up for it. The best step is
  :math:`\delta = -\theta_q H^{-1} e_q / [H^{-1}]_{qq}`, and the cost
  :math:`\theta_q^2 / (2\, [H^{-1}]_{qq})`.

Here :math:`L` is the mean loss plus weight decay :math:`\frac\lambda2 \lVert\theta\rVert^2`, and
:math:`H = G + \lambda I` with the generalized Gauss-Newton matrix :math:`G`, which is positive
definite whatever the network; or with the Hessian of the mean loss in place of :math:`G`, to see
what that costs.
"""

# %%
# A network at a minimum
# ----------------------
#
# The scores have no term for the gradient, so train to the end.
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from hessops import (
    CgOperator,
    DiagonalOperator,
    GeneralizedGaussNewtonOperator,
    HessianOperator,
)
from hessops.estimators import diagonal

torch.set_num_threads(1)  # matrices this small only wait for more
torch.manual_seed(0)
digits = load_digits()
order = torch.randperm(len(digits.target))
x, y = torch.tensor(digits.data / 16)[order], torch.tensor(digits.target)[order]
x, y, x_new, y_new = x[:600], y[:600], x[600:], y[600:]

decay, loss = 1e-3, nn.CrossEntropyLoss()
model = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)).double()
optimizer = torch.optim.LBFGS(
    model.parameters(), max_iter=500, tolerance_change=1e-12, line_search_fn="strong_wolfe"
)


def closure():
    optimizer.zero_grad()
    value = loss(model(x), y) + decay / 2 * sum(p.square().sum() for p in model.parameters())
    value.backward()
    return value


optimizer.step(closure)
model.eval()
theta = nn.utils.parameters_to_vector(model.parameters()).detach()
H = GeneralizedGaussNewtonOperator(model, loss, [(x, y)]).shift(decay)
P = len(theta)


@torch.no_grad()
def evaluate(values):
    """The objective, and the accuracy on new digits, at other parameters."""
    params = H.space.unflatten(values)
    objective = loss(torch.func.functional_call(model, params, (x,)), y)
    found = torch.func.functional_call(model, params, (x_new,)).argmax(dim=1)
    accuracy = (found == y_new).double().mean()
    return (objective + decay / 2 * values.square().sum()).item(), accuracy.item()


# %%
# Scores
# ------
#
# A network this small has its matrix and inverse. For larger ones
# :func:`hessops.estimators.diagonal` estimates the diagonal of any operator, of an inverse too,
# whose products are solves. What counts is how the weights are ranked.
matrix = H.to_dense()
inverse = torch.linalg.inv(matrix)
damage = matrix.diagonal() * theta.square() / 2
surgeon = theta.square() / (2 * inverse.diagonal())


def compare(name, found, exact, scores, true_scores):
    """The error of a diagonal, and what becomes of the half with the lowest scores."""
    error = ((found - exact).abs() / exact).median()
    lower, true_lower = (set(s.argsort()[: P // 2].tolist()) for s in (scores, true_scores))
    share = len(lower & true_lower) / (P // 2)
    print(f"{name:24} median error {error:6.1%}, same lower half {share:.1%}")


for products in (10, 30, 100, 300):
    found = diagonal(H, num_products=products).value
    scores = found * theta.square() / 2
    compare(f"diag H, {products} products", found, matrix.diagonal(), scores, damage)
found = diagonal(CgOperator(H, rtol=1e-3), "hutchinson", num_products=30).value
scores = theta.square() / (2 * found)
compare("diag H⁻¹, 30 solves", found, inverse.diagonal(), scores, surgeon)

# %%
# Are the costs right?
# --------------------
#
# Take out every tenth of the weights that matter, one at a time, with the best step for the
# others, and look at the true change of the objective. With the Hessian the median cost is right;
# the costliest steps are too long for a quadratic. With :math:`G` costs are too small by a third
# or so, as it leaves the curvature of the network itself out. The order is nearly the same.
before, _ = evaluate(theta)
hessian = HessianOperator(model, loss, [(x, y)]).shift(decay)
matrices = {"GGN": inverse, "Hessian": torch.linalg.inv(hessian.to_dense())}
costs = {}
for name, inv in matrices.items():
    predicted = theta.square() / (2 * inv.diagonal())
    chosen = surgeon.argsort()[300::10].tolist()
    true = [evaluate(theta - theta[q] * inv[q] / inv[q, q])[0] - before for q in chosen]
    costs[name] = predicted[chosen], torch.tensor(true)
    ratios = costs[name][1] / costs[name][0]
    print(
        f"{name:8} true cost / score: median {ratios.median():.2f}, "
        f"from {ratios.min():.2f} to {ratios.max():.2f}"
    )
assert abs(ratios.median() - 1) < 0.02

# %%
# Many weights at once
# --------------------
#
# Scores of single weights do not know of each other. When many go, what helps is one step of all
# that are left, the surgeon's for a set :math:`Q` of weights: with :math:`K` the others,
# :math:`H_{KK}\, \delta_K = H_{KQ}\, \theta_Q`. Masks make an operator of it, and conjugate
# gradients solve it without any matrix.


def pruned(scores, fraction, update):
    """The parameters without the weights of lowest score."""
    kept = torch.ones_like(theta)
    kept[scores.argsort()[: int(fraction * P)]] = 0
    if not update:
        return kept * theta
    mask = DiagonalOperator(kept)
    system = mask @ H @ mask + DiagonalOperator(1 - kept)
    rhs = kept * H.apply((1 - kept) * theta)
    return kept * theta + CgOperator(system, rtol=1e-4).apply(rhs)


fractions = torch.linspace(0.3, 0.95, 14).tolist()
curves = {}
rankings = {"magnitude": theta.abs(), "brain damage": damage, "brain surgeon": surgeon}
for update in (False, True):
    for name, scores in rankings.items():
        accuracies = [evaluate(pruned(scores, f, update))[1] for f in fractions]
        curves[name, update] = accuracies
        shown = f"{name} {'with' if update else 'without'} update"
        print(f"{shown:30} accuracy {accuracies[8]:.3f} at {fractions[8]:.0%}")

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for (name, (predicted, true)), mark in zip(costs.items(), "o^", strict=True):
    left.loglog(predicted, true, mark, ms=4, alpha=0.7, label=name)
ends = [float(costs["GGN"][0].min()), float(costs["GGN"][0].max())]
left.loglog(ends, ends, color="black", lw=0.8, label="equal")
left.set(xlabel="score (predicted rise of the objective)", ylabel="true rise of the objective")
left.set_title("One weight removed, the others updated")
left.legend()
for (name, update), accuracies in curves.items():
    color = f"C{list(rankings).index(name)}"
    label = f"{name}{', others updated' if update else ''}"
    right.plot(fractions, accuracies, "-" if update else "--", color=color, label=label)
right.set(xlabel="fraction of the weights removed", ylabel="accuracy on new digits")
right.set_title("Many weights removed at once")
right.legend(fontsize="small")
plt.show()

# %%
# On this network the three rankings are worth about the same, and the update is worth much more.
# The diagonal of the inverse is close to :math:`1/\lambda` for most weights here, so that the
# surgeon's ranking is nearly that of the magnitudes. To prune further, train again, and score
# again.
#
# For your own model
# ------------------
#
# - Train to a minimum with the same decay as in :math:`H`. Away from one the gradient counts too.
# - Scores of a large network: ``diagonal(H)`` with some hundred products for brain damage. An
#   :class:`hessops.EkfacOperator` has an approximate inverse for the surgeon's:
#   ``diagonal(ekfac.inverse(regularization=decay))`` takes no product. Here its median error is 18
#   %.
# - Biases are removed here like weights. Give them infinite scores to keep them.
#
# See also :doc:`/estimates`, :doc:`/solving`, :doc:`/concepts/operators` and, for the formulas,
# :doc:`/mathematics`.
