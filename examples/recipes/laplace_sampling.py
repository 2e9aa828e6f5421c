r"""
Sample the posterior of a network (Laplace)
===========================================

A trained network gives one answer. The Laplace approximation (MacKay 1992) puts a Gaussian around
the trained parameters, with the curvature of the loss as its precision; its samples show where the
data leave the answer open.

With :math:`N` points, :math:`\ell_i` the negative log-likelihood of point i and a prior
:math:`\theta \sim \mathcal N(0, \tau^{-1} I)`, the negative log-posterior is, up to a constant,

.. math:: \sum_i \ell_i(\theta) + \frac\tau2 \lVert\theta\rVert^2
          = N (\frac1N \sum_i \ell_i(\theta) + \frac{\tau}{2N} \lVert\theta\rVert^2) .

So training the *mean* loss with weight decay :math:`\tau / N` finds its minimum :math:`\theta^*`,
and with :math:`G` the generalized Gauss-Newton matrix of the mean loss the posterior is

.. math:: \theta \sim \mathcal N(\theta^*,\; \Lambda^{-1}), \qquad
          \Lambda = N G + \tau I = N (G + \frac\tau N I) .
"""

# %%
# A trained network
# -----------------
#
# The loss must be a negative log-likelihood, as the cross-entropy of logits is. It is minimised to
# the end: the Gaussian is one around a minimum.
from math import log

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import make_moons
from torch import nn

from hessops import CgOperator, EkfacOperator, GeneralizedGaussNewtonOperator
from hessops.estimators import logdet

torch.set_num_threads(1)  # matrices this small only wait for more
x, y = (torch.tensor(part) for part in make_moons(200, noise=0.3, random_state=0))
x_new, y_new = (torch.tensor(part) for part in make_moons(1000, noise=0.3, random_state=1))
N, loss = len(x), nn.CrossEntropyLoss()


def trained(tau: float) -> nn.Module:
    """The most probable parameters for a prior precision."""
    torch.manual_seed(0)
    layers = [nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 2)]
    model = nn.Sequential(*layers).double()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=300, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        decay = sum(p.square().sum() for p in model.parameters())
        value = loss(model(x), y) + tau / (2 * N) * decay
        value.backward()
        return value

    optimizer.step(closure)
    return model.eval()


def laplace(tau: float):
    """Network, mean and precision of the posterior."""
    model = trained(tau)
    ggn = GeneralizedGaussNewtonOperator(model, loss, [(x, y)])
    mean = nn.utils.parameters_to_vector(model.parameters()).detach()
    return model, mean, (N * ggn).shift(tau)


# %%
# The prior precision, by the evidence
# ------------------------------------
#
# How probable are the data under a prior? With :math:`P` parameters, in the same approximation,
#
# .. math:: \log\, p(D) \approx -\sum_i \ell_i(\theta^*) - \frac\tau2 \lVert\theta^*\rVert^2
#           + \frac P2 \log\,\tau - \frac12 \log\det\Lambda .
#
# (The powers of :math:`2\pi` of the prior and of the Gaussian cancel.) The largest value names
# :math:`\tau` without a point held out. New points agree here. Each value is that of the one
# minimum that was found, so expect some noise.
posteriors, evidence = {}, {}
print("  tau   log evidence   log-likelihood of a new point")
for value in (0.01, 0.1, 1.0, 10.0):
    posteriors[value] = model, mean, precision = laplace(value)
    fit = -N * loss(model(x), y).item() - value / 2 * mean.square().sum().item()
    evidence[value] = fit + len(mean) / 2 * log(value) - logdet(precision).value / 2
    print(f"{value:5.2f} {evidence[value]:14.1f} {-loss(model(x_new), y_new):14.3f}")

tau = max(evidence, key=evidence.get)
model, mean, precision = posteriors[tau]
print(precision)

# %%
# Three ways to draw
# ------------------
#
# **Tiny networks**: with the Cholesky factor :math:`\Lambda = L L^\top`, vectors
# :math:`L^{-\top} \varepsilon` have the covariance :math:`\Lambda^{-1}`.
S, P = 1000, len(mean)
normal = torch.randn(S, P, dtype=torch.float64)
cholesky = torch.linalg.cholesky(precision.to_dense())
by_cholesky = torch.linalg.solve_triangular(cholesky.T, normal.T, upper=True).T

# %%
# **Any size, exactly**: solve :math:`\Lambda \delta = \xi` for random :math:`\xi` of covariance
# :math:`\Lambda` (Papandreou & Yuille 2010); that of :math:`\delta` is
# :math:`\Lambda^{-1} \Lambda \Lambda^{-1}`. As :math:`N G = \sum_i J_i^\top H_i J_i`, with
# :math:`H_i = \mathrm{diag}(p_i) - p_i p_i^\top` for cross-entropy, such a :math:`\xi` is
# :math:`\sum_i J_i^\top s_i + \sqrt\tau\, \varepsilon` with :math:`s_i` of covariance :math:`H_i`:
# one backward pass for each sample. The sum over points is one over batches, each with a graph of
# its own. All samples are solved for together.
#
# ``xi`` is S×P numbers, a batch makes as many beside it, and the solver holds some 12 times as
# many. Here there are 1000 samples, so that their covariance can be looked at; to predict, take 20
# to 50 of a large model.
xi = tau**0.5 * torch.randn(S, P, dtype=torch.float64)
for x_batch in x.split(100):
    logits = model(x_batch)
    p = logits.detach().softmax(dim=1)
    noise = p.sqrt() * torch.randn(S, *p.shape, dtype=torch.float64)
    s = noise - p * noise.sum(dim=2, keepdim=True)
    parts = torch.autograd.grad(logits, list(model.parameters()), s, is_grads_batched=True)
    xi += torch.cat([part.flatten(1) for part in parts], dim=1)
solution = CgOperator(precision, use_block_cg=True).solve(xi)
by_solving = solution.value
print(solution)  # one step: so many samples span the whole space; few of them take more

# %%
# **Large networks, approximately**: EKFAC knows its eigenvectors, so that its root is a closed
# form that needs no data any more.
ekfac = EkfacOperator(model, loss, [(x, y)])
root = ekfac.damped(tau / N).power(-0.5) / N**0.5  # symmetric; its square is N⁻¹(K + τ/N)⁻¹
by_ekfac = root.apply(normal)

# %%
# Are they samples of it?
# -----------------------
#
# The posterior of :math:`L^\top \delta` has the covariance :math:`I`, and that of S samples
# eigenvalues between about :math:`(1 \pm \sqrt{P/S})^2`. The first two pass. EKFAC agrees in the
# mean and not in every direction: it is another matrix.
low, high = (1 - (P / S) ** 0.5) ** 2, (1 + (P / S) ** 0.5) ** 2
print(f"eigenvalues of the covariance, between {low:.2f} and {high:.2f} for exact samples:")
samples = {"Cholesky": by_cholesky, "by solving": by_solving, "EKFAC": by_ekfac}
for name, found in samples.items():
    values = torch.linalg.eigvalsh((found @ cholesky).T.cov())
    print(f"  {name:10} {values.min():.3f} to {values.max():.2f}, mean {values.mean():.3f}")
    assert name == "EKFAC" or (0.9 * low < values.min() and values.max() < 1.1 * high)

# %%
# The predictive distribution
# ---------------------------
#
# With :math:`G` for its curvature, the Gaussian is the posterior of the network made linear in its
# parameters, so :math:`f(x; \theta^*) + J(x)\, \delta` is what predicts (Immer, Korzepa & Bauer
# 2021). Samples put into the network itself are worse here than no samples.
# The samples agree near the data; away from them the boundary may run in many ways, and the
# probabilities along it are near one half.
params = {name: parameter.detach() for name, parameter in model.named_parameters()}


def predictive(inputs, deltas, linear=True):
    """The mean of the probabilities over samples."""

    def logits(values):
        return torch.func.functional_call(model, values, (inputs,))

    def probabilities(delta):
        step = precision.space.unflatten(delta)
        if linear:
            value, slope = torch.func.jvp(logits, (params,), (step,))
            return (value + slope).softmax(dim=1)
        return logits({name: params[name] + step[name] for name in params}).softmax(dim=1)

    return torch.func.vmap(probabilities, chunk_size=50)(deltas).mean(dim=0)


def report(name, probabilities):
    right = probabilities[torch.arange(len(y_new)), y_new]
    print(f"{name:30} log-likelihood of a new point {right.log().mean():.3f}")


report("one network", model(x_new).softmax(dim=1))
report("linear network, exact samples", predictive(x_new, by_solving[:200]))
report("linear network, EKFAC", predictive(x_new, by_ekfac[:200]))
report("network itself, exact samples", predictive(x_new, by_solving[:200], linear=False))

axis = torch.linspace(-4, 4, 40, dtype=torch.float64)
grid = torch.cartesian_prod(axis, axis)
shown = {
    "One network": model(grid).softmax(dim=1).detach(),
    "Laplace, exact samples": predictive(grid, by_solving[:200]),
    "Laplace, EKFAC": predictive(grid, by_ekfac[:200]),
}
figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained", sharey=True)
for ax, (title, probabilities) in zip(axes, shown.items(), strict=True):
    image = probabilities[:, 1].reshape(40, 40).T
    drawn = ax.contourf(axis, axis, image, levels=torch.linspace(0, 1, 21), cmap="RdBu_r")
    for label, mark, color in ((0, "o", "#3b94d1"), (1, "^", "#eda36b")):
        ax.scatter(*x[y == label].T, s=12, marker=mark, color=color, ec="black", lw=0.5)
    ax.set(title=title, xlabel="$x_1$")
axes[0].set_ylabel("$x_2$")
figure.colorbar(drawn, ax=axes, label="probability of class 1", ticks=[0, 0.25, 0.5, 0.75, 1])
plt.show()

# %%
# For your own model
# ------------------
#
# - Another loss: it must be a negative log-likelihood. For squared errors with noise of variance
#   :math:`\sigma^2`, :math:`\ell_i = \lVert f(x_i) - y_i \rVert^2 / 2\sigma^2` plus a constant,
#   :math:`H_i = I / \sigma^2`, and :math:`s_i` is normal noise divided by :math:`\sigma`.
# - A network that was trained with weight decay :math:`c` on the mean loss: its prior precision is
#   :math:`\tau = N c`.
# - Many parameters: leave the Cholesky factor out. The solve takes a pass over the data per step;
#   a :class:`hessops.NystroemPreconditioner` makes steps fewer. :func:`hessops.estimators.logdet`
#   takes quadratures by itself where the matrix is large.
# - Part of the network: ``restrict_to=`` of the operators, and the same parameters in ``mean`` and
#   ``params``.
#
# See also :doc:`/kronecker`, :doc:`/estimates`, :doc:`/solving` and, for the formulas,
# :doc:`/mathematics`.
