r"""
What does the curvature look like?
==================================

A network of a few thousand parameters is trained on the digits of scikit-learn. Its Hessian has as
many eigenvalues as there are parameters: nearly all of them close to zero, some few large, some
negative. None of that needs the matrix; products with it are enough.

Run it with ``python examples/programs/curvature_digits.py``; it writes the pictures.
"""

# %%
# The network
# -----------

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

from hessops import (
    CgOperator,
    GeneralizedGaussNewtonOperator,
    HessianOperator,
    JacobiPreconditioner,
    NystroemPreconditioner,
    Solution,
)
from hessops import plotting as draw
from hessops.estimators import (
    Eigenpairs,
    Estimate,
    SpectralDensity,
    eigenpairs,
    logdet,
    spectral_density,
    trace,
)

OUTPUT = Path("out/curvature_digits")
LOSS = nn.CrossEntropyLoss()


def trained(seed: int = 0, steps: int = 150) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A perceptron 64-24-10 in double precision, and its data."""
    torch.manual_seed(seed)
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16)[:1000], torch.tensor(digits.target)[:1000]
    model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()
    return model.eval(), x, y


# %%
# The spectrum
# ------------
#
# Stochastic Lanczos quadrature (Ghorbani et al. 2019) has the density of all eigenvalues from some
# random probes; ARPACK has the ends one by one, each with the norm of its residual.


def spectrum(hessian: HessianOperator) -> tuple[SpectralDensity, Eigenpairs]:
    """The density of the eigenvalues, and ten at both ends."""
    density = spectral_density(hessian, num_probes=10, num_steps=60)
    return density, eigenpairs(hessian, k=20, which="both")


def draw_spectrum(density: SpectralDensity, pairs: Eigenpairs) -> Figure:
    """Both side by side."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    draw.spectral_density(density, left)
    draw.eigenvalues(pairs, right)
    left.set_title("Density of all eigenvalues")
    right.set_title("Ten at either end")
    return figure


# %%
# Numbers
# -------
#
# The trace of the Hessian measures how sharp the minimum is, the log-determinant of the damped
# Gauss-Newton matrix is a term of the Laplace approximation of the evidence. Each comes with the
# standard error of what was drawn.


def numbers(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, Estimate]:
    """Estimates by some dozen products."""
    hessian = HessianOperator(model, LOSS, [(x, y)])
    damped = GeneralizedGaussNewtonOperator(model, LOSS, [(x, y)]).shift(1e-2)
    return {
        "trace, Hutchinson": trace(hessian, "hutchinson", num_products=60),
        "trace, Hutch++": trace(hessian, "hutch++", num_products=60),
        "trace, XTrace": trace(hessian, "xtrace", num_products=60),
        "log-determinant": logdet(damped, method="slq", num_probes=10, num_steps=40),
    }


# %%
# What a preconditioner is worth
# ------------------------------
#
# The same damped system, solved without a preconditioner and with two.


def solves(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, Solution]:
    """Solutions for the gradients of the outputs of some points."""
    matrix = GeneralizedGaussNewtonOperator(model, LOSS, [(x, y)])
    rhs = torch.randn(8, matrix.input_size, dtype=x.dtype, generator=torch.manual_seed(1))
    recipes = {
        "none": None,
        "Jacobi": JacobiPreconditioner(),
        "Nyström, rank 60": NystroemPreconditioner(rank=60),
    }
    return {
        name: CgOperator(matrix, 1e-3, rtol=1e-6, preconditioner=recipe).solve(rhs, history=True)
        for name, recipe in recipes.items()
    }


def draw_numbers(found: dict[str, Estimate], solved: dict[str, Solution]) -> Figure:
    """The traces with their standard errors, and the residuals of the solves."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    draw.estimates({name: one for name, one in found.items() if "trace" in name}, left)
    draw.convergence(solved, right)
    left.set_title("The trace by 60 products")
    right.set_title("A damped system")
    return figure


# %%
# All of it
# ---------


def main(output: Path = OUTPUT) -> None:
    """Computes, prints and draws."""
    model, x, y = trained()
    density, pairs = spectrum(HessianOperator(model, LOSS, [(x, y)]))
    print(density)
    print(pairs)
    found = numbers(model, x, y)
    for name, estimate in found.items():
        print(f"{name:20}{estimate}")
    solved = solves(model, x, y)
    for name, solution in solved.items():
        print(f"{name:20}{int(solution.iterations.max())} steps")
    output.mkdir(parents=True, exist_ok=True)
    draw_spectrum(density, pairs).savefig(output / "spectrum.png", dpi=120)
    draw_numbers(found, solved).savefig(output / "numbers.png", dpi=120)
    print(f"wrote {output}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # matrices this small only wait for more
    parser = argparse.ArgumentParser(description="What does the curvature look like?")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    main(**vars(parser.parse_args()))
