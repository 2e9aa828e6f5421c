r"""
Regression
==========

Error bars for the predictions of a regression network, from the curvature of its loss.

With Gaussian noise of variance σ², the Laplace approximation gives the parameters the covariance

.. math:: \Sigma = \frac{2 \sigma^2}{N} \left(G + \lambda I\right)^{-1},

and a prediction f(x), linear in the parameters near the ones found, the variance
:math:`\nabla f^\top \Sigma\, \nabla f`, and σ² more for a new measurement (MacKay 1992). G is the
generalized Gauss-Newton matrix of the mean squared error, and λ that of the weight decay λ/2 ‖θ‖².
"""

# %%
# Data and model
# --------------
#
# The progression of diabetes in 442 patients. All numbers are standardised: units are standard
# deviations.

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_diabetes
from torch import nn

from hessops import CgOperator, GeneralizedGaussNewtonOperator
from hessops.estimators import trace

torch.manual_seed(0)
bunch = load_diabetes()
x, y = torch.tensor(bunch.data), torch.tensor(bunch.target)[:, None]
x, y = (x - x.mean(dim=0)) / x.std(dim=0), (y - y.mean()) / y.std()
order = torch.randperm(len(x))
train, test = order[:342], order[342:]

model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1)).double()
loss = nn.MSELoss()
weight_decay = 0.02
settings = {"max_iter": 1000, "line_search_fn": "strong_wolfe"}
optimizer = torch.optim.LBFGS(model.parameters(), **settings)


def objective():
    optimizer.zero_grad()
    decay = sum(p.square().sum() for p in model.parameters())
    value = loss(model(x[train]), y[train]) + weight_decay / 2 * decay
    value.backward()
    return value


optimizer.step(objective)
model.eval()
with torch.no_grad():
    explained = 1 - loss(model(x[test]), y[test]) / y[test].var()
print(f"share of the variance explained on test points: {explained:.2f}")

# %%
# The matrix, and its factors
# ---------------------------
#
# ``MSELoss`` is the mean of the squares over points *and outputs*, without a half: for d outputs
# its second derivative by each is 2/d. So :math:`G = \frac{2}{Nd} J^\top J`, with J the Jacobian of
# all outputs. (A loss ``0.5 * (output - target).square().sum(dim=1)`` with ``reduction="none"`` has
# :math:`J^\top J / N`.) Here is J, for a check:

params = {name: p.detach() for name, p in model.named_parameters()}


def output_of_one(params, point):
    return torch.func.functional_call(model, params, (point[None],)).squeeze()


def output_gradients(points):
    """The gradient of the output at each point by all parameters, ``(n, P)``."""
    grads = torch.func.vmap(torch.func.grad(output_of_one), (None, 0))(params, points)
    return torch.cat([grad.flatten(1) for grad in grads.values()], dim=1)


batches = list(zip(x[train].split(64), y[train].split(64), strict=True))
ggn = GeneralizedGaussNewtonOperator(model, loss, batches)
jacobian = output_gradients(x[train])
assert torch.allclose(ggn.to_dense(), 2 / len(train) * jacobian.T @ jacobian)

# %%
# The noise
# ---------
#
# The data determine :math:`\gamma = \operatorname{tr} G (G + \lambda I)^{-1} = P - \lambda
# \operatorname{tr} (G + \lambda I)^{-1}` of the P parameters; the others are left to the weight
# decay. So σ² is the sum of the squared residuals over N − γ. The inverse is an operator, and its
# trace is estimated by products.

inverse = CgOperator(ggn, regularization=weight_decay)
num_params = inverse.input_size
inverse_trace = trace(inverse, num_products=60)
effective = num_params - weight_decay * inverse_trace.value
with torch.no_grad():
    residuals = y[train] - model(x[train])
noise = float(residuals.square().sum() / (len(train) - effective))
print(f"tr (G + λI)⁻¹ = {inverse_trace}")
standard_error = weight_decay * inverse_trace.standard_error
print(f"γ = {effective:.1f} ± {standard_error:.1f} of {num_params} parameters")
print(f"σ = {noise**0.5:.2f}")

# %%
# Error bars
# ----------
#
# One linear system for each point, all of them solved together.


def predictions(points):
    """Predictions, and the standard deviations of the function and of a new measurement."""
    gradients = output_gradients(points)
    solution = inverse.solve(gradients)
    assert bool(solution.converged.all())
    variance = 2 * noise / len(train) * (gradients * solution.value).sum(dim=1)
    with torch.no_grad():
        return model(points).squeeze(1), variance.sqrt(), (variance + noise).sqrt()


mean, of_function, of_measurement = predictions(x[test])
inside = (y[test, 0] - mean).abs() < 1.96 * of_measurement
print(f"{int(inside.sum())} of {len(test)} test points are inside of their 95 % interval")

# %%
# To the right, one input varies and the others stay at their means. The function is known where the
# patients are, and less and less beyond.

bmi = bunch.feature_names.index("bmi")
path = torch.zeros(80, 10, dtype=torch.float64)
path[:, bmi] = torch.linspace(-5, 7, 80, dtype=torch.float64)
along, along_function, along_measurement = predictions(path)

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
style = {"fmt": "o", "ms": 4, "color": "#0b4f8a", "alpha": 0.5}
left.errorbar(y[test, 0], mean, 1.96 * of_measurement, **style)
left.axline((0, 0), slope=1, color="#222222", lw=1)
left.set(xlabel="measured progression (sd)", ylabel="predicted progression (sd), 95 %")
for deviation, shade, name in (
    (along_measurement, 0.15, "95 %, a measurement"),
    (along_function, 0.4, "95 %, the function"),
):
    low, high = along - 1.96 * deviation, along + 1.96 * deviation
    style = {"color": "#0b4f8a", "alpha": shade, "lw": 0, "label": name}
    right.fill_between(path[:, bmi], low, high, **style)
right.plot(path[:, bmi], along, color="#0b4f8a")
right.plot(x[train, bmi], y[train, 0], ".", color="#c97f00", ms=4, label="training points")
right.set(xlabel="body mass index (sd)", ylabel="progression (sd)")
right.legend(frameon=False, loc="upper left")
plt.show()

# %%
# For your own model
# ------------------
#
# - Several outputs: a gradient, and so a right-hand side, for each output of each point.
# - With fewer points (times outputs) than parameters, ``ggn.shift(weight_decay).inverse()`` is
#   exact and needs no steps; for large networks :class:`hessops.EkfacOperator` has an approximate
#   inverse.
# - Noise that differs from point to point is a loss of its own: :doc:`/recipes/custom_loss`.
#
# See also
# --------
#
# - :doc:`/recipes/laplace_sampling`: samples of the parameters instead of variances.
# - :doc:`/influence`: which points are behind a prediction; it takes ``MSELoss`` as it is.
# - :class:`hessops.CgOperator`, :func:`hessops.estimators.trace`.
