r"""
Which training images decide?
=============================

A network reads a handwritten digit right or wrong. Which of its training images are behind that?

The influence of a training point z on the loss on a test point z' is

.. math:: \mathcal I(z', z) = \langle \nabla\ell(z'), (G + \lambda I)^{-1} \nabla\ell(z)\rangle

with G the generalized Gauss-Newton matrix of the training loss. Leaving z out of N training points
changes the loss on z' by about :math:`\mathcal I / N`: the most positive influences are those of
the most helpful images, the most negative those of the most harmful ones (Koh & Liang 2017).

Run it with ``python examples/programs/influence_digits.py``; it writes a picture, and a page with
all that is known of the run.
"""

# %%
# The network
# -----------
#
# The digits come with scikit-learn: 1797 images of 8 x 8 pixels. The network is trained to a
# minimum of the loss with weight decay λ/2 ‖θ‖², whose Hessian is λI. Hence λ is the regularization
# of the influences too. A point of weight 0 is left out of the loss; that is used at the end.

from __future__ import annotations

import argparse
import copy
import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hessops import NystroemPreconditioner, Solution
from hessops.influence import CgInfluence, SequentialInfluenceCalculator, TopInfluences
from hessops.reporting import report

CLASSES = 10
WEIGHT_DECAY = 1e-3
TOP = 5


@dataclass(frozen=True)
class Digits:
    """Training and test points."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def split_digits(num_train: int, seed: int) -> Digits:
    """Splits the digits at random."""
    bunch = load_digits()
    x = torch.tensor(bunch.data / 16, dtype=torch.float32)
    y = torch.tensor(bunch.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:num_train], order[num_train:]
    return Digits(x[train], y[train], x[test], y[test])


def untrained(seed: int) -> nn.Module:
    """A network with one hidden layer."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, CLASSES))


def train(model: nn.Module, digits: Digits, weights: Tensor, max_iter: int = 500) -> nn.Module:
    """Goes on training a network; each training point has a weight in the mean loss."""
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=max_iter, history_size=50, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        decay = sum(p.square().sum() for p in model.parameters())
        losses = nn.functional.cross_entropy(model(digits.x), digits.y, reduction="none")
        objective = (weights * losses).mean() + WEIGHT_DECAY / 2 * decay
        objective.backward()
        return objective

    optimizer.step(closure)
    return model.eval()


# %%
# Ten test images
# ---------------
#
# Four of those that the network reads wrong, with the largest loss; the three that it reads right
# with the least confidence; and three ordinary ones.


def losses_on_test(model: nn.Module, digits: Digits) -> tuple[Tensor, Tensor]:
    """The loss on each test point, and the class that the network gives it."""
    with torch.no_grad():
        outputs = model(digits.x_test)
        losses = nn.functional.cross_entropy(outputs, digits.y_test, reduction="none")
    return losses, outputs.argmax(dim=1)


def ten_test_images(model: nn.Module, digits: Digits) -> Tensor:
    """Test points from the least to the most certain."""
    losses, predicted = losses_on_test(model, digits)
    order = losses.argsort(descending=True)
    is_right = (predicted == digits.y_test)[order]
    wrong, right = order[~is_right], order[is_right]
    ordinary = right[[len(right) // 4, len(right) // 2, 3 * len(right) // 4]]
    return torch.cat([wrong[:4], right[:3], ordinary])


# %%
# Their influences
# ----------------
#
# One linear system for each test image, solved by conjugate gradients. They share one Krylov space,
# and a Nyström sketch of G, made once by `fit`, takes the largest eigenvalues out of the iteration.
# The solver reports the true residual of each system and the number of passes over the data.
#
# The factors :math:`(G + \lambda I)^{-1} \nabla\ell(z')` then serve for all training points. A
# calculator goes through those batch by batch and keeps only the extreme influences.


@dataclass(frozen=True)
class Attribution:
    """The training points behind some test points.

    Attributes:
        chosen: Which test points, ``(m,)``.
        helpful: Training points of most positive influence, ``(m, TOP)``, the most helpful first.
        harmful: Training points of most negative influence, ``(m, TOP)``, the most harmful first.
        solution: How the systems were solved.
        influence: The fitted influence model.
        scores: All influences, ``(m, N)``.
    """

    chosen: Tensor
    helpful: TopInfluences
    harmful: TopInfluences
    solution: Solution
    influence: CgInfluence
    scores: Tensor


def attribute(model: nn.Module, digits: Digits, chosen: Tensor, *, rank: int = 100) -> Attribution:
    """The training points of extreme influence on the chosen test points."""
    loader = DataLoader(TensorDataset(digits.x, digits.y), batch_size=300)
    influence = CgInfluence(
        model,
        nn.CrossEntropyLoss(),
        regularization=WEIGHT_DECAY,
        second_order_mode="generalized_gauss_newton",
        preconditioner=NystroemPreconditioner(rank=rank),
        use_block_cg=True,
    ).fit(loader)

    gradients = influence.gradient_provider.flat_grads(digits.x_test[chosen], digits.y_test[chosen])
    solution = influence.inverses["full"].solve(gradients, history=True)
    calculator = SequentialInfluenceCalculator(influence)
    influences = calculator.influences_from_factors(solution.value, loader)
    return Attribution(
        chosen,
        influences.top_k(TOP),
        influences.top_k(TOP, largest=False),
        solution,
        influence,
        influences.compute(),
    )


# %%
# The picture
# -----------
#
# The number beside a class is the influence over N: an estimate of how the loss on the test image
# would change if that training image were left out. A red frame marks another class than that of
# the test image.

SAME, OTHER = "#8a8a8a", "#c62828"


def draw_digit(axis: Axes, image: Tensor, label: int, note: str, color: str = SAME) -> None:
    """An image, with its class and a note above it and a frame of the color of its kind."""
    axis.imshow(image.reshape(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[])
    text_color = "black" if color == SAME else color
    axis.set_title(label, loc="left", color=text_color, fontsize=14, fontweight="bold", pad=4)
    axis.set_title(note, loc="right", color=text_color, fontsize=11, pad=4)
    for spine in axis.spines.values():
        spine.set(edgecolor=color, linewidth=1.0 if color == SAME else 3.0)


def signed(values: Tensor) -> list[str]:
    """Numbers with as many decimals as give the largest two digits."""
    decimals = max(2, 1 - math.floor(math.log10(float(values.abs().max()))))
    return [f"{value:+.{decimals}f}".replace("-", "\N{MINUS SIGN}") for value in values.tolist()]


def contact_sheet(model: nn.Module, digits: Digits, found: Attribution) -> Figure:
    """A row for each test image: the image, its most helpful and its most harmful ones."""
    losses, predicted = losses_on_test(model, digits)
    labels = digits.y_test[found.chosen]
    rows = len(labels)
    figure = plt.figure(figsize=(13.5, 0.9 + 1.35 * rows), layout="constrained")
    first, *others = figure.subfigures(1, 3, width_ratios=[1.25, TOP, TOP], wspace=0.03)

    first.suptitle("Test image", fontsize=15, fontweight="bold")
    axes = first.subplots(rows, 1)
    for axis, point, label in zip(axes, found.chosen, labels.tolist(), strict=True):
        note = "" if predicted[point] == label else f"read as {predicted[point]}"
        draw_digit(axis, digits.x_test[point], label, note)
        axis.set_ylabel(f"loss {losses[point]:.3f}", fontsize=11)

    groups = {"Most helpful": found.helpful, "Most harmful": found.harmful}
    for part, (heading, top) in zip(others, groups.items(), strict=True):
        part.suptitle(f"{heading}: change of the loss without it", fontsize=15, fontweight="bold")
        changes = top.values / len(digits.x)
        for row, axes in enumerate(part.subplots(rows, TOP)):
            for axis, point, note in zip(axes, top.indices[row], signed(changes[row]), strict=True):
                label = int(digits.y[point])
                color = SAME if label == labels[row] else OTHER
                draw_digit(axis, digits.x[point], label, note, color)
    handles = [
        Line2D([], [], color=SAME, linewidth=1.5, label="the class of the test image"),
        Line2D([], [], color=OTHER, linewidth=4, label="another class"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=13)
    return figure


# %%
# Do the losses change?
# ---------------------
#
# For each test image the network is trained again without the five most helpful images, and again
# without the five most harmful ones. All signs are as predicted. Influence is a first-order
# estimate at the parameters found: for these points, the extreme ones, the changes are several
# times as large.


def changes_without(
    model: nn.Module, digits: Digits, chosen: Tensor, left_out: Tensor, max_iter: int = 50
) -> Tensor:
    """The change of each test point's loss without its row of training points, ``(m,)``."""
    before, _ = losses_on_test(model, digits)
    changes = []
    for test_point, points in zip(chosen, left_out, strict=True):
        weights = torch.ones(len(digits.x)).index_fill(0, points, 0.0)
        retrained = train(copy.deepcopy(model), digits, weights, max_iter)
        after, _ = losses_on_test(retrained, digits)
        changes.append(after[test_point] - before[test_point])
    return torch.stack(changes)


# %%
# A page to keep
# --------------
#
# `report` writes one HTML file with the settings, the outcome of every solve, the scores and the
# images, which a browser shows without a network.


def write_page(path: Path, model: nn.Module, digits: Digits, found: Attribution, seed: int) -> None:
    """Writes the run as a page."""

    def described(x: Tensor, y: Tensor) -> str:
        with torch.no_grad():
            read = int(model(x).argmax())
        return f"{int(y)}" if read == y else f"{int(y)} read as {read}"

    report(
        path,
        found.scores,
        model=found.influence,
        solutions=found.solution,
        train=(digits.x, digits.y),
        test=(digits.x_test[found.chosen], digits.y_test[found.chosen]),
        describe=described,
        images=lambda x: x.reshape(8, 8),
        settings={"Data": "the digits of scikit-learn", "Seed of split and network": seed},
        title="Which training images decide?",
        top=TOP,
    )


# %%
# All together
# ------------

OUTPUT = Path("out/influence_digits")


def summarise(model: nn.Module, digits: Digits, found: Attribution) -> None:
    """Prints how the systems were solved, and what leaving out images does."""
    _, predicted = losses_on_test(model, digits)
    solution = found.solution
    accuracy = (predicted == digits.y_test).float().mean()
    residual = solution.relative_residual_norms.max()
    print(f"{len(digits.x)} training points, test accuracy {accuracy:.3f}")
    print(
        f"{int(solution.converged.sum())} of {len(found.chosen)} systems solved, worst true "
        f"relative residual {residual:.1e}, {solution.num_applications} passes over the data"
    )
    print("\nchange of the loss without five   helpful images      harmful images")
    print("                                predicted  retrained  predicted  retrained")
    columns = []
    for top in (found.helpful, found.harmful):
        columns.append(top.values.sum(dim=1) / len(digits.x))
        columns.append(changes_without(model, digits, found.chosen, top.indices))
    for point, *changes in zip(found.chosen, *columns, strict=True):
        name = f"{digits.y_test[point]} read as {predicted[point]}"
        print(f"{name:>28}  " + "  ".join(f"{change:+9.4f}" for change in changes))


def main(num_train: int = 1200, seed: int = 0, output: Path = OUTPUT) -> None:
    """Trains, attributes, reports and draws."""
    digits = split_digits(num_train, seed)
    model = train(untrained(seed), digits, torch.ones(num_train))
    found = attribute(model, digits, ten_test_images(model, digits))
    summarise(model, digits, found)

    figure = contact_sheet(model, digits, found)
    output.mkdir(parents=True, exist_ok=True)
    picture = output / "influence_digits.png"
    figure.savefig(picture, dpi=100)
    page = picture.with_suffix(".html")
    write_page(page, model, digits, found, seed)
    for written in (picture, page):
        print(f"\nwrote {written.resolve() if output.is_absolute() else written}", end="")
    print()


if __name__ == "__main__":
    torch.set_num_threads(1)  # matrices this small only wait for more
    parser = argparse.ArgumentParser(description="Which training images decide?")
    parser.add_argument("--num-train", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    main(**vars(parser.parse_args()))
