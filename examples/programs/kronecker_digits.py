r"""
Kronecker factors of a network of digits
========================================

The generalized Gauss-Newton matrix G of a network is approximated layer by layer by a Kronecker
product of two small matrices, one of inputs and one of gradients: KFAC (Martens & Grosse 2015).

EKFAC keeps its eigenvectors q and takes the exact curvatures :math:`q^\top G q` along them for
eigenvalues (George et al. 2018). Both see the data once or twice, and invert in closed form.

Three pictures say how good that is for a network small enough to know everything about it: the
eigenvalues, the convergence of conjugate gradients with the inverse as a preconditioner, and the
influences of training images.

Run it with ``python examples/programs/kronecker_digits.py``; it writes the pictures.
"""

# %%
# The network
# -----------
#
# The digits come with scikit-learn: 1797 images of 8 x 8 pixels, with values from 0 to 16. They are
# not scaled: the input factor has to find that some pixels vary much and others hardly. The network
# is trained to a minimum of the loss with weight decay λ/2 ‖θ‖², whose Hessian is λI.

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hessops import (
    CgOperator,
    EkfacOperator,
    GeneralizedGaussNewtonOperator,
    KfacOperator,
    NystroemPreconditioner,
    Solution,
)
from hessops.influence import CgInfluence, EkfacInfluence, InfluenceFunctionModel
from hessops.plotting import convergence

CLASSES = 10
WEIGHT_DECAY = 1e-2
LOSS = nn.CrossEntropyLoss()


@dataclass(frozen=True)
class Digits:
    """Training and test points."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """The training points, for an operator."""
        return list(zip(self.x.split(400), self.y.split(400), strict=True))


def split_digits(num_train: int, seed: int) -> Digits:
    """Splits the digits at random."""
    bunch = load_digits()
    x, y = torch.tensor(bunch.data), torch.tensor(bunch.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:num_train], order[num_train:]
    return Digits(x[train], y[train], x[test], y[test])


def trained(digits: Digits, seed: int, max_iter: int = 300) -> nn.Module:
    """A network with one hidden layer."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, CLASSES)).double()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=max_iter, history_size=50, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        decay = sum(p.square().sum() for p in model.parameters())
        objective = LOSS(model(digits.x), digits.y) + WEIGHT_DECAY / 2 * decay
        objective.backward()
        return objective

    optimizer.step(closure)
    return model.eval()


# %%
# Eigenvalues
# -----------
#
# G has 1510 rows here and can be formed, so that the curvature along every eigenvector q is known.
# For the eigenvectors themselves: an operator that has them, with the eigenvalues 1, 2, 3, ...,
# gives them back in order when it is decomposed.


@dataclass(frozen=True)
class Spectra:
    """Eigenvalues, and what they approximate.

    Attributes:
        exact: The eigenvalues of G, ascending.
        along: The curvatures qᵀGq along the Kronecker eigenvectors.
        kfac: The eigenvalues of KFAC for the same eigenvectors.
        ekfac: Those of EKFAC.
        errors: Method -> layer -> ‖K - G‖ / ‖G‖ of the diagonal block, in Frobenius norm.
    """

    exact: Tensor
    along: Tensor
    kfac: Tensor
    ekfac: Tensor
    errors: dict[str, dict[str, float]]


def spectra(model: nn.Module, digits: Digits) -> Spectra:
    """Compares both with the exact matrix."""
    matrix = GeneralizedGaussNewtonOperator(model, LOSS, digits.batches).to_dense()
    operators = {
        "KFAC": KfacOperator(model, LOSS, digits.batches),
        "EKFAC": EkfacOperator(model, LOSS, digits.batches),
    }
    ekfac = operators["EKFAC"]
    basis = ekfac.from_eigenbasis(torch.eye(len(matrix), dtype=matrix.dtype)).T

    errors: dict[str, dict[str, float]] = {}
    for method, operator in operators.items():
        errors[method] = {}
        for layer, block in operator.blocks.items():
            rows = operator.space.indices(list(block.input_dict_structure))
            exact = matrix[rows[:, None], rows]
            errors[method][layer] = ((block.to_dense() - exact).norm() / exact.norm()).item()
    return Spectra(
        torch.linalg.eigvalsh(matrix),
        (basis * (matrix @ basis)).sum(dim=0),
        operators["KFAC"].eigenvalues,
        ekfac.eigenvalues,
        errors,
    )


COLORS = {"exact": "#333333", "KFAC": "#e08214", "EKFAC": "#2f6fa8"}


def draw_spectra(found: Spectra) -> Figure:
    """All eigenvalues by size, and each against the curvature along its eigenvector."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    smallest = float(found.along.max()) * 1e-8
    spectrum = {"exact": found.exact, "KFAC": found.kfac, "EKFAC": found.ekfac}
    for name, values in spectrum.items():
        shown = values.sort(descending=True).values.clamp(min=smallest / 10)
        places = torch.arange(1, len(shown) + 1)
        left.plot(places, shown, color=COLORS[name], label=name, linewidth=1.8)
    left.axhline(WEIGHT_DECAY, color="0.5", linestyle=":", linewidth=1.2)
    left.text(1, WEIGHT_DECAY * 1.3, "weight decay λ", color="0.35", fontsize=9)
    left.set(
        xscale="log",
        yscale="log",
        xlabel="eigenvalue, by size",
        ylabel="value",
        ylim=(smallest, None),
        title="The spectrum of G and of its approximations",
    )
    left.legend(frameon=False)

    shown = found.along > smallest
    ends = [smallest, float(found.along.max()) * 3]
    right.plot(ends, ends, color="0.6", linewidth=1)
    for name, values in (("KFAC", found.kfac), ("EKFAC", found.ekfac)):
        right.scatter(
            found.along[shown],
            values[shown].clamp(min=smallest),
            s=9,
            alpha=0.6,
            linewidths=0,
            color=COLORS[name],
            label=name,
        )
    right.set(
        xscale="log",
        yscale="log",
        xlim=ends,
        ylim=ends,
        xlabel="exact curvature qᵀGq along an eigenvector",
        ylabel="its eigenvalue",
        title="Each eigenvalue beside what it stands for",
    )
    right.legend(frameon=False, markerscale=2.5)
    return figure


# %%
# Preconditioning
# ---------------
#
# Influences with the exact matrix need :math:`(G + \lambda I)^{-1} g`, by conjugate gradients. The
# inverse of EKFAC costs no pass over the data and saves some. That is not certain beforehand: it
# knows nothing of how layers interact, and weights that G does not see, but its blocks do, make
# the system harder. A damping of the preconditioner larger than that of the system helps against
# that, and a Nyström sketch, which sees the whole matrix, saves more here.


def solves(model: nn.Module, digits: Digits, num_points: int = 5) -> dict[str, Solution]:
    """Systems for the gradients of test points, by conjugate gradients."""
    matrix = GeneralizedGaussNewtonOperator(model, LOSS, digits.batches)
    ekfac = EkfacOperator(model, LOSS, digits.batches)
    gradients = [
        torch.autograd.grad(LOSS(model(x[None]), y[None]), list(model.parameters()))
        for x, y in zip(digits.x_test[:num_points], digits.y_test, strict=False)
    ]
    rhs = torch.stack([nn.utils.parameters_to_vector(g) for g in gradients])
    preconditioners = {
        "none": None,
        "EKFAC + λI": ekfac.inverse(regularization=WEIGHT_DECAY),
        "EKFAC + 10 λI": ekfac.inverse(regularization=10 * WEIGHT_DECAY),
        "Nyström, rank 50": NystroemPreconditioner(rank=50),
    }
    return {
        name: CgOperator(matrix, WEIGHT_DECAY, rtol=1e-6, preconditioner=preconditioner).solve(
            rhs, history=True
        )
        for name, preconditioner in preconditioners.items()
    }


def draw_solves(found: dict[str, Solution]) -> Figure:
    """A line for each test point and preconditioner."""
    figure, axis = plt.subplots(figsize=(8, 4.8), layout="constrained")
    convergence(found, axis)
    axis.set(
        xlabel="step, each with a pass over the data",
        title="Conjugate gradients with (G + λI), by preconditioner",
    )
    return figure


# %%
# Influences
# ----------
#
# The influence of a training point z on a test point z' is
# :math:`\nabla\ell(z')^\top (G + \lambda I)^{-1} \nabla\ell(z)`. With the inverse of EKFAC instead
# it needs no solver. Three ways are compared with conjugate gradients on the exact matrix: the
# product of the gradients alone, as if the inverse were the identity; EKFAC of the gradients of the
# training losses (``fisher_type="empirical"``); and EKFAC of G, the default. Their scales differ: a
# ranking needs only the pattern.

WAYS = ("product of gradients", "EKFAC, empirical", "EKFAC")


@dataclass(frozen=True)
class Scores:
    """Influences of the training points on some test points, ``(m, n)``.

    Attributes:
        exact: By conjugate gradients.
        approximate: Way -> influences.
        solution: How the systems were solved.
    """

    exact: Tensor
    approximate: dict[str, Tensor]
    solution: Solution

    def correlations(self) -> dict[str, float]:
        """Of the influences with the exact ones, over all pairs."""
        return {
            way: torch.corrcoef(torch.stack([found.flatten(), self.exact.flatten()]))[0, 1].item()
            for way, found in self.approximate.items()
        }

    def shared(self, top: int = 5) -> dict[str, float]:
        """Which part of the most helpful points of each test point is right."""
        exact = self.exact.topk(top).indices
        return {
            way: (found.topk(top).indices[:, :, None] == exact[:, None])
            .any(dim=2)
            .double()
            .mean()
            .item()
            for way, found in self.approximate.items()
        }


def scores(model: nn.Module, digits: Digits, num_points: int = 100) -> Scores:
    """The influences of all training points on the first test points, in several ways."""
    points = (digits.x_test[:num_points], digits.y_test[:num_points], digits.x, digits.y)

    def fitted(influence: InfluenceFunctionModel) -> InfluenceFunctionModel:
        return influence.fit(digits.batches)

    exact = fitted(
        CgInfluence(
            model,
            LOSS,
            WEIGHT_DECAY,
            second_order_mode="generalized_gauss_newton",
            preconditioner=NystroemPreconditioner(rank=100),
            use_block_cg=True,
        )
    )
    solution = exact.inverses["full"].solve(exact.gradient_provider.flat_grads(*points[:2]))
    gradients = [exact.gradient_provider.flat_grads(*p) for p in (points[:2], points[2:])]
    found = [gradients[0] @ gradients[1].T]
    for fisher_type in ("empirical", "type-2"):
        influence = EkfacInfluence(
            model, update_diagonal=True, regularization=WEIGHT_DECAY, fisher_type=fisher_type
        )
        found.append(fitted(influence).influences(*points))
    return Scores(
        exact.influences_from_factors(solution.value, *points[2:]),
        dict(zip(WAYS, found, strict=True)),
        solution,
    )


def draw_scores(found: Scores) -> Figure:
    """A panel for each way, with a dot for each pair of a test and a training point."""
    figure, axes = plt.subplots(1, len(WAYS), figsize=(12, 4.4), layout="constrained")
    correlations = found.correlations()
    for axis, (way, values) in zip(axes, found.approximate.items(), strict=True):
        axis.scatter(
            found.exact.flatten(), values.flatten(), s=5, alpha=0.35, linewidths=0, rasterized=True
        )
        for line in (axis.axhline, axis.axvline):
            line(0, color="0.8", linewidth=0.8, zorder=0)
        axis.set(title=f"{way}: correlation {correlations[way]:.2f}", xlabel="exact influence")
    axes[0].set_ylabel("approximate influence")
    return figure


# %%
# All together
# ------------

OUTPUT = Path("out/kronecker_digits")


def report(
    model: nn.Module, digits: Digits, eigen: Spectra, solved: dict[str, Solution], found: Scores
) -> None:
    """Prints what the pictures show."""
    with torch.no_grad():
        accuracy = (model(digits.x_test).argmax(dim=1) == digits.y_test).double().mean()
    print(
        f"{len(digits.x)} training points, {len(eigen.exact)} parameters, "
        f"test accuracy {accuracy:.3f}"
    )
    print("\nrelative error of the diagonal block of a layer")
    for method, errors in eigen.errors.items():
        print(f"{method:>22}  " + "  ".join(f"{n}: {e:.3f}" for n, e in errors.items()))
    print("\nconjugate gradients, by preconditioner")
    for name, solution in solved.items():
        print(
            f"{name:>22}  {int(solution.converged.sum())} of {len(solution.status)} systems solved "
            f"in {solution.num_applications} passes over the data"
        )
    print(f"\ninfluences beside those of conjugate gradients ({found.solution})")
    shared = found.shared()
    for way, correlation in found.correlations().items():
        print(f"{way:>22}  correlation {correlation:.3f}, {shared[way]:.0%} of the top five shared")


def main(num_train: int = 1200, seed: int = 0, output: Path = OUTPUT) -> None:
    """Trains, compares, reports and draws."""
    digits = split_digits(num_train, seed)
    model = trained(digits, seed)
    torch.manual_seed(seed)  # the sketches
    eigen, solved, found = spectra(model, digits), solves(model, digits), scores(model, digits)
    report(model, digits, eigen, solved, found)

    output.mkdir(parents=True, exist_ok=True)
    figures = {
        "eigenvalues": draw_spectra(eigen),
        "convergence": draw_solves(solved),
        "influences": draw_scores(found),
    }
    print()
    for name, figure in figures.items():
        picture = output / f"{name}.png"
        figure.savefig(picture, dpi=100)
        print(f"wrote {picture.resolve() if output.is_absolute() else picture}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # matrices this small only wait for more
    parser = argparse.ArgumentParser(description="Kronecker factors of a network of digits.")
    parser.add_argument("--num-train", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    main(**vars(parser.parse_args()))
