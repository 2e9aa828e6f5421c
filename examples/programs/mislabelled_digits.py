r"""
Find the mislabelled digits
===========================

One in ten training labels of a set of handwritten digits is wrong. Which ones? The network that was
trained on them can tell, if it is asked how much each point had to bend the network to its label.

Let :math:`g_i = \nabla\ell_i(\theta)` be the gradient of the loss on training point i and A the
curvature of the mean training loss. Leaving point i out of n moves the trained parameters by about

.. math:: \theta_{-i} - \theta \approx \tfrac1n (A + \lambda I)^{-1} g_i

so that the loss on point i itself rises by about :math:`g_i^\top (A + \lambda I)^{-1} g_i / n`,
its *self-influence*: large for a label that only that point supports. The mean loss on test points
changes by :math:`g_\mathrm{test}^\top (A + \lambda I)^{-1} g_i / n`: negative for a point that does
harm (Koh & Liang 2017).

Run it with ``nox -s demo``; it writes a picture and a small page.
"""

# %%
# The data and the network
# ------------------------
#
# The digits come with scikit-learn: 1797 images of 8 x 8 pixels. A tenth of the training labels is
# replaced by another class, with a seed, so that the truth is known here. In practice it is not,
# and nothing below is tuned on it.

from __future__ import annotations

import argparse
import base64
import html
import io
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, vmap
from tqdm.auto import tqdm

from hessops import Batch, CgOperator, GeneralizedGaussNewtonOperator, Objective, Solution
from hessops.functional import mean_gradient, per_sample_gradients

CLASSES = 10
WEIGHT_DECAY = 2e-3
FLIPPED_FRACTION = 0.1


@dataclass(frozen=True)
class Digits:
    """Training points with labels as given and as they are, and test points."""

    x: Tensor
    given: Tensor
    true: Tensor
    x_test: Tensor
    y_test: Tensor
    seed: int

    @property
    def flipped(self) -> Tensor:
        """Which training labels are wrong, ``(n,)`` bool."""
        return self.given != self.true


def flipped_digits(num_train: int, seed: int) -> Digits:
    """Splits the digits and flips a tenth of the training labels."""
    bunch = load_digits()
    x = torch.tensor(bunch.data / 16, dtype=torch.float32)
    y = torch.tensor(bunch.target)
    generator = torch.Generator().manual_seed(seed)
    train, test = torch.randperm(len(x), generator=generator).split([num_train, len(x) - num_train])
    wrong = torch.randperm(num_train, generator=generator)[: int(FLIPPED_FRACTION * num_train)]
    given = y[train].clone()
    given[wrong] += torch.randint(1, CLASSES, (len(wrong),), generator=generator)
    return Digits(x[train], given % CLASSES, y[train], x[test], y[test], seed)


def train(x: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """A network with one hidden layer, trained to a minimum of the loss with weight decay."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, CLASSES))
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=500, history_size=50, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        decay = sum(p.square().sum() for p in model.parameters())
        objective = nn.functional.cross_entropy(model(x), labels) + WEIGHT_DECAY / 2 * decay
        objective.backward()
        return objective

    optimizer.step(closure)
    return model.eval()


def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """The fraction of points whose largest output is their label."""
    with torch.no_grad():
        return (model(x).argmax(dim=1) == labels).double().mean().item()


# %%
# Solving with the curvature
# --------------------------
#
# The curvature is the generalized Gauss-Newton matrix. Conjugate gradients need a matrix without
# negative eigenvalues: the Hessian of a network has some, the generalized Gauss-Newton matrix has
# none for the cross-entropy, and it is close to the Hessian where the network fits. The damping λ
# is not a free choice: the network was trained with weight decay λ/2 ‖θ‖², whose Hessian is λI, so
# that A + λI is the curvature of what was minimised.
#
# There is one right-hand side per training point. They are solved in stacks: one pass over the data
# serves all of a stack. Every right-hand side reports how it ended, with its true residual.


@dataclass(frozen=True)
class Influence:
    """Scores of the training points, and what the solves reported."""

    on_itself: Tensor
    on_test_loss: Tensor
    loss: Tensor
    proposed: Tensor
    solutions: list[Solution]

    def suspicion(self) -> dict[str, Tensor]:
        """Name of a ranking -> score of each training point, the most suspicious highest."""
        return {
            "self-influence": self.on_itself,
            "harm to the test loss": -self.on_test_loss,
            "training loss": self.loss,
        }


def influence(
    model: nn.Module, digits: Digits, *, rtol: float = 1e-3, chunk: int = 100
) -> Influence:
    """Influence of every training point on its own loss and on the mean test loss."""
    loss = nn.CrossEntropyLoss()
    curvature = GeneralizedGaussNewtonOperator(model, loss, [(digits.x, digits.given)])
    inverse = CgOperator(curvature, regularization=WEIGHT_DECAY, rtol=rtol)

    objective = Objective(model, loss)
    space, params = objective.space, objective.params
    points = Batch.from_raw((digits.x, digits.given))
    gradients = space.flatten(per_sample_gradients(objective, params, points))
    test_points = Batch.from_raw((digits.x_test, digits.y_test))
    test_gradient = space.flatten(mean_gradient(objective, params, test_points))

    solutions = []
    with tqdm(total=len(gradients), desc="solving for training points", unit="point") as bar:
        for rows in gradients.split(chunk):
            solutions.append(inverse.solve(rows))
            bar.update(len(rows))
    steps = torch.cat([solution.value for solution in solutions]) / len(gradients)
    return Influence(
        on_itself=(steps * gradients).sum(dim=1),
        on_test_loss=steps @ test_gradient,
        loss=objective.sample_losses(params, points),
        proposed=labels_without_the_point(
            model, space.flatten(params) + steps, digits.x, objective
        ),
        solutions=solutions,
    )


def labels_without_the_point(
    model: nn.Module, moved: Tensor, x: Tensor, objective: Objective
) -> Tensor:
    """For each image, the label given by the network that has not seen it.

    The network has bent itself to some of the wrong labels; the step to the parameters without the
    point takes that back, to first order.
    """

    def outputs(tensors: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, tensors, (image.unsqueeze(0),))[0]

    with torch.no_grad():
        return vmap(outputs)(objective.space.unflatten(moved), x).argmax(dim=1)


# %%
# Who is right?
# -------------
#
# Each ranking names as many suspects as there are wrong labels; its precision is the fraction of
# them that are wrong indeed. The plain training loss is the baseline that costs nothing; the harm
# to the test loss has seen the test labels. For the wrong labels, the network without the point
# names the true one more often than the network as trained, which has learned some by heart.


def precision(score: Tensor, flipped: Tensor) -> float:
    """The fraction of wrong labels among the k highest scores, k the number of wrong labels."""
    suspects = score.argsort(descending=True)[: int(flipped.sum())]
    return flipped[suspects].double().mean().item()


def summary(digits: Digits, model: nn.Module, found: Influence, seconds: float) -> dict[str, str]:
    """What there is to report, by name."""
    residual = max(s.relative_residual_norms.max().item() for s in found.solutions)
    converged = sum(int(s.converged.sum()) for s in found.solutions)
    passes = sum(s.num_applications for s in found.solutions)
    suspects = found.on_itself.argsort(descending=True)[: int(digits.flipped.sum())]
    with torch.no_grad():
        predicted = model(digits.x).argmax(dim=1)
    right = {
        name: (labels == digits.true)[digits.flipped].double().mean()
        for name, labels in (("without the point", found.proposed), ("as trained", predicted))
    }
    cleaned = torch.ones_like(digits.flipped).index_fill(0, suspects, False)
    retrained = train(digits.x[cleaned], digits.given[cleaned], digits.seed)
    precisions = {
        f"precision, {name}": f"{precision(score, digits.flipped):.2f}"
        for name, score in found.suspicion().items()
    }
    return {
        "training points": f"{len(digits.x)}, {int(digits.flipped.sum())} with a wrong label",
        **precisions,
        "precision, guessing": f"{digits.flipped.double().mean():.2f}",
        **{f"true label found, network {name}": f"{value:.2f}" for name, value in right.items()},
        "test accuracy": f"{accuracy(model, digits.x_test, digits.y_test):.3f}",
        "test accuracy without the suspects": (
            f"{accuracy(retrained, digits.x_test, digits.y_test):.3f}"
        ),
        "right-hand sides solved": (
            f"{converged} of {len(digits.x)}, worst true relative residual {residual:.1e}, "
            f"{passes} passes over the data"
        ),
        "damping (the weight decay)": f"{WEIGHT_DECAY:g}",
        "time": f"{seconds:.0f} s",
    }


# %%
# The picture and the page


def contact_sheet(digits: Digits, found: Influence, columns: int = 10) -> Figure:
    """As many suspects as there are wrong labels, with the label given and the one proposed."""
    count = int(digits.flipped.sum())
    suspects = found.on_itself.argsort(descending=True)[:count].tolist()
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(11, 1.2 + 1.35 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_axis_off()
    colors = {True: "#b3261e", False: "#2f5d8a"}
    for axis, point in zip(axes.flat, suspects, strict=False):
        is_wrong = bool(digits.flipped[point])
        axis.imshow(digits.x[point].reshape(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
        title = f"{digits.given[point]} \N{RIGHTWARDS ARROW} {found.proposed[point]}"
        axis.set_title(title, color=colors[is_wrong], fontsize=12, fontweight="bold", pad=4)
        axis.set_axis_on()
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set(edgecolor=colors[is_wrong], linewidth=1.8)
    heading = f"The {count} most suspicious training labels, worst first: given"
    figure.suptitle(f"{heading} \N{RIGHTWARDS ARROW} proposed", fontsize=14)
    names = {True: "the given label is wrong", False: "the given label is right"}
    handles = [
        Line2D([], [], color=colors[is_wrong], linewidth=6, label=names[is_wrong])
        for is_wrong in (True, False)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=11)
    return figure


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Mislabelled digits</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1.5rem;
        color: #1c1b1f; background: #fdfcfb; }}
h1 {{ font-size: 1.6rem; line-height: 1.2; }}
table {{ border-collapse: collapse; width: 100%; margin: 1rem 0; }}
th, td {{ text-align: left; padding: .35rem .5rem; border-bottom: 1px solid #ddd;
          vertical-align: top; font-weight: normal; }}
td {{ font-variant-numeric: tabular-nums; }}
img {{ width: 100%; height: auto; }}
</style>
<h1>Which training labels are wrong?</h1>
<p>A small network was trained on handwritten digits, a tenth of them with a wrong label. The
influence of each point on its own loss, from a solve with the curvature of the training loss, ranks
the suspects. Precision is the fraction of wrong labels among as many suspects as there are wrong
labels; the harm to the test loss is ranked with the labels of the test points. The labels proposed
are those of the network without the point, to first order.</p>
<table>{rows}</table>
<img alt="The most suspicious digits with given and proposed labels"
     src="data:image/png;base64,{png}">
</html>
"""


def write(output: Path, figure: Figure, facts: dict[str, str]) -> tuple[Path, Path]:
    """Writes the picture, and a page of one file with it; returns their paths."""
    output.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    picture, page = output / "suspects.png", output / "index.html"
    picture.write_bytes(buffer.getvalue())
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in facts.items()
    )
    png = base64.b64encode(buffer.getvalue()).decode()
    page.write_text(PAGE.format(rows=rows, png=png), encoding="utf-8")
    return picture, page


# %%
# All together
# ------------


OUTPUT = Path("out/mislabelled_digits")


def main(num_train: int = 800, seed: int = 0, output: Path = OUTPUT) -> None:
    """Trains, solves, ranks and reports."""
    started = time.perf_counter()
    digits = flipped_digits(num_train, seed)
    model = train(digits.x, digits.given, seed)
    found = influence(model, digits)
    facts = summary(digits, model, found, time.perf_counter() - started)
    for name, value in facts.items():
        print(f"{name:>43}  {value}")
    for path in write(output, contact_sheet(digits, found), facts):
        print(f"wrote {path.resolve() if output.is_absolute() else path}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # matrices this small only wait for more
    parser = argparse.ArgumentParser(description="Find mislabelled digits.")
    parser.add_argument("--num-train", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    main(**vars(parser.parse_args()))
