"""Draws the four results that the start page shows: one for each thing that people come for.

``python docs/_static/draw_results.py`` writes ``result-*.png`` beside this file, in half a minute.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hessops import GeneralizedGaussNewtonOperator, HessianOperator
from hessops import plotting as draw
from hessops.estimators import diagonal, spectral_density
from hessops.influence import DirectInfluence

FOLDER = Path(__file__).parent
BLUE, ORANGE, GREY = "#0b4f8a", "#c8500a", "#6b6b6b"
LOSS = nn.CrossEntropyLoss()
Points = tuple[Tensor, Tensor]


def figure() -> Figure:
    """An empty figure of the size of a card."""
    return plt.figure(figsize=(3.6, 2.1), layout="constrained")


def digits() -> tuple[Points, Points]:
    """Training and test points, in double precision."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(bunch.data / 16)[order], torch.tensor(bunch.target)[order]
    return (x[:1000], y[:1000]), (x[1000:], y[1000:])


def classifier(train: Points, weight_decay: float) -> nn.Module:
    """A perceptron 64-24-10 at a minimum of the loss with weight decay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).double()
    minimise(model, lambda: LOSS(model(train[0]), train[1]), weight_decay)
    return model.eval()


def minimise(model: nn.Module, loss, weight_decay: float) -> None:
    """L-BFGS on a loss with weight decay."""
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=500, history_size=50, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        decay = sum(p.square().sum() for p in model.parameters())
        value = loss() + weight_decay / 2 * decay
        value.backward()
        return value

    optimizer.step(closure)


def influences(model: nn.Module, train: Points, test: Points, weight_decay: float) -> Figure:
    """The training images behind the test image of largest loss."""
    with torch.no_grad():
        losses = nn.functional.cross_entropy(model(test[0]), test[1], reduction="none")
    chosen = losses.argmax()
    point = test[0][chosen : chosen + 1], test[1][chosen : chosen + 1]
    influence = DirectInfluence(
        model, LOSS, weight_decay, second_order_mode="generalized_gauss_newton"
    ).fit([train])
    scores = influence.influences(*point, *train)[0]
    sheet = figure()
    draw.top_examples(
        train[0].reshape(-1, 8, 8),
        scores,
        sheet.add_subplot(),
        test_image=point[0].reshape(8, 8),
        labels=train[1],
        test_label=int(point[1]),
        k=4,
    )
    return sheet


def laplace() -> Figure:
    """Functions drawn from a Laplace posterior, linearised in the parameters."""
    torch.manual_seed(0)
    x = torch.cat([torch.linspace(-2.2, -0.7, 25), torch.linspace(0.9, 2.2, 20)]).double()[:, None]
    noise, precision = 0.12, 0.5
    y = torch.sin(2 * x) + noise * torch.randn_like(x)
    model = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 1)).double()
    mse = nn.MSELoss()
    minimise(model, lambda: mse(model(x), y), 2 * noise**2 * precision / len(x))

    # The negative log-likelihood is N / (2 noise²) times the mean squared error.
    ggn = GeneralizedGaussNewtonOperator(model, mse, [(x, y)])
    posterior = (len(x) / (2 * noise**2)) * ggn
    factor = torch.linalg.cholesky(posterior.shift(precision).to_dense())
    draws = torch.linalg.solve_triangular(
        factor.T, torch.randn(ggn.input_size, 30, dtype=torch.float64), upper=True
    ).T

    grid = torch.linspace(-3.2, 3.2, 200, dtype=torch.float64)[:, None]
    params = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(params: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, params, (grid,))[:, 0]

    sheet = figure()
    axes = sheet.add_subplot()
    for sample in draws:
        mean, change = torch.func.jvp(outputs, (params,), (ggn.space.unflatten(sample),))
        axes.plot(grid[:, 0], mean + change, color=BLUE, alpha=0.22, linewidth=0.9)
    axes.plot(grid[:, 0], mean, color=BLUE, linewidth=1.6)
    axes.plot(x[:, 0], y[:, 0], "o", color=ORANGE, markersize=2.6)
    axes.set(xlabel="x", ylabel="f(x)", xlim=(-3.2, 3.2), ylim=(-2.6, 2.6))
    return sheet


def pruning(model: nn.Module, train: Points, test: Points) -> Figure:
    """Test accuracy as weights are removed in the order of three scores."""
    ggn = GeneralizedGaussNewtonOperator(model, LOSS, [train])
    weights = nn.utils.parameters_to_vector(model.parameters()).detach()
    curvature = diagonal(ggn, num_products=ggn.input_size).value
    rules = {
        "½ A$_{ii}$ θ$_i$²": (curvature * weights.square() / 2, BLUE, "-"),
        "|θ$_i$|": (weights.abs(), ORANGE, "--"),
        "random": (torch.rand(len(weights), generator=torch.manual_seed(0)), GREY, ":"),
    }
    shares = torch.linspace(0, 0.98, 50)
    sheet = figure()
    axes = sheet.add_subplot()
    for name, (scores, color, dashes) in rules.items():
        order, found = scores.argsort(), []
        for share in shares:
            left = weights.clone()
            left[order[: int(share * len(order))]] = 0
            output = torch.func.functional_call(model, ggn.space.unflatten(left), (test[0],))
            found.append(100 * float((output.argmax(dim=1) == test[1]).double().mean()))
        axes.plot(100 * shares, found, dashes, color=color, label=name, linewidth=1.5)
    axes.set(xlabel="weights removed [%]", ylabel="test accuracy [%]", xlim=(0, 100))
    axes.legend(frameon=False, loc="lower left")
    return sheet


def spectrum(model: nn.Module, train: Points) -> Figure:
    """The density of the eigenvalues of the Hessian, beside the exact ones."""
    hessian = HessianOperator(model, LOSS, [train])
    exact = torch.linalg.eigvalsh(hessian.to_dense())
    density = spectral_density(hessian, num_probes=8, num_steps=60)
    sheet = figure()
    draw.spectral_density(density, sheet.add_subplot(), exact=exact)
    return sheet


def main() -> None:
    """All four."""
    mpl.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    train, test = digits()
    weight_decay = 1e-3
    model = classifier(train, weight_decay)
    sheets = {
        "influences": influences(model, train, test, weight_decay),
        "laplace": laplace(),
        "pruning": pruning(model, train, test),
        "spectrum": spectrum(model, train),
    }
    for name, sheet in sheets.items():
        sheet.savefig(FOLDER / f"result-{name}.png", dpi=200)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
