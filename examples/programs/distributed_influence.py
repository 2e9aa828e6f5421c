r"""
Influences with the data on several processes
=============================================

Training runs on several processes, each with a shard of the data. Influences can stay there: the
sum over points that a product with the curvature is made of becomes a sum over processes, and
nothing else changes.

Each process solves for the factors :math:`(G + \lambda I)^{-1} \nabla\ell(z')` of the test points,
together with all others and to the same bits, and then scores the training points of its own shard.

Run it on two processes with
``torchrun --nproc-per-node 2 examples/programs/distributed_influence.py``, or on one with
``python examples/programs/distributed_influence.py``; either finds the same influences, to the
tolerance of the solver, and writes a picture.
"""

# %%
# A process group
# ---------------
#
# ``torchrun`` tells each process its rank. Without it, this process is a group of one. Here ranks
# talk by gloo; on GPUs it would be NCCL.

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hessops import DistributedAveraging, NystroemPreconditioner, Solution
from hessops.distributed import gather, shard, together
from hessops.influence import CgInfluence

WEIGHT_DECAY = 1e-3
NUM_TRAIN = 1200
TOP = 5


@contextmanager
def process_group() -> Iterator[None]:
    """The group that torchrun made, or a group of this process alone."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


# %%
# The same network in every process
# ---------------------------------
#
# It is trained by the first process and sent to the others. An operator refuses to add up products
# of networks that differ, in parameters or in buffers.


@dataclass(frozen=True)
class Digits:
    """Training and test points."""

    train: TensorDataset
    x_test: Tensor
    y_test: Tensor


def split_digits() -> Digits:
    """Splits the digits of scikit-learn at random, in the same way everywhere."""
    bunch = load_digits()
    x = torch.tensor(bunch.data / 16, dtype=torch.float32)
    y = torch.tensor(bunch.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:NUM_TRAIN], order[NUM_TRAIN:]
    return Digits(TensorDataset(x[train], y[train]), x[test], y[test])


def trained(digits: Digits) -> nn.Module:
    """A network at a minimum of the loss with weight decay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    if dist.get_rank() == 0:
        x, y = digits.train.tensors
        optimizer = torch.optim.LBFGS(
            model.parameters(), max_iter=500, history_size=50, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            decay = sum(p.square().sum() for p in model.parameters())
            objective = nn.functional.cross_entropy(model(x), y) + WEIGHT_DECAY / 2 * decay
            objective.backward()
            return objective

        optimizer.step(closure)
    for parameter in model.parameters():
        dist.broadcast(parameter.data, src=0)
    return model


def misread(model: nn.Module, digits: Digits, count: int = 5) -> Tensor:
    """The test points that the network reads wrong with the largest loss."""
    with torch.no_grad():
        outputs = model(digits.x_test)
        losses = nn.functional.cross_entropy(outputs, digits.y_test, reduction="none")
    is_wrong = outputs.argmax(dim=1) != digits.y_test
    return torch.where(is_wrong, losses, 0.0).argsort(descending=True)[:count]


# %%
# Influences
# ----------
#
# `shard` splits the points without repeating any, as the `DistributedSampler` of torch would. With
# ``averaging=DistributedAveraging()`` the model is fitted and the systems are solved with all of
# them. What follows is work of each process alone; `together` makes an error in one of them an
# error in all, and `gather` joins what they found.


@dataclass(frozen=True)
class Attribution:
    """What was found, alike in all processes.

    Attributes:
        solution: How the systems were solved.
        scores: Influences, ``(m, n)``.
        owners: Which process scored each training point, ``(n,)``.
    """

    solution: Solution
    scores: Tensor
    owners: Tensor


def attribute(model: nn.Module, digits: Digits, chosen: Tensor) -> Attribution:
    """The influences of all training points on some test points."""
    own = shard(digits.train)
    loader = DataLoader(own, batch_size=300)
    torch.manual_seed(0)  # of the sketch, alike everywhere
    influence = CgInfluence(
        model,
        nn.CrossEntropyLoss(),
        regularization=WEIGHT_DECAY,
        second_order_mode="generalized_gauss_newton",
        preconditioner=NystroemPreconditioner(rank=100),
        use_block_cg=True,
        averaging=DistributedAveraging(),
    ).fit(loader)
    gradients = influence.gradient_provider.flat_grads(digits.x_test[chosen], digits.y_test[chosen])
    solution = influence.inverses["full"].solve(gradients)

    with together():
        parts = [influence.influences_from_factors(solution.value, x, y) for x, y in loader]
        scores = torch.cat([torch.zeros(len(chosen), 0), *parts], dim=1)
    owners = torch.full((len(own),), dist.get_rank())
    return Attribution(solution, gather(scores, dim=1), gather(owners))


# %%
# The picture
# -----------
#
# Each row is a test image that the network reads wrong, and the training images that speak for its
# class the most. The color of a frame is the process in whose shard an image lies.

COLORS = plt.colormaps["tab10"].colors


def contact_sheet(model: nn.Module, digits: Digits, chosen: Tensor, found: Attribution) -> Figure:
    """A row for each test image: the image, and its most helpful ones."""
    x, y = digits.train.tensors
    predicted = model(digits.x_test[chosen]).argmax(dim=1)
    top = found.scores.topk(TOP, dim=1).indices
    rows = len(chosen)
    figure = plt.figure(figsize=(8.5, 0.9 + 1.35 * rows), layout="constrained")
    first, second = figure.subfigures(1, 2, width_ratios=[1.2, TOP], wspace=0.03)
    first.suptitle("Test image", fontsize=14, fontweight="bold")
    second.suptitle("Most helpful training images", fontsize=14, fontweight="bold")
    for axis, point, read in zip(first.subplots(rows, 1), chosen, predicted, strict=True):
        axis.imshow(digits.x_test[point].reshape(8, 8), cmap="gray_r")
        axis.set_title(f"{digits.y_test[point]} read as {read}", fontsize=11)
        axis.set(xticks=[], yticks=[])
    for axes, points in zip(second.subplots(rows, TOP), top, strict=True):
        for axis, point in zip(axes, points.tolist(), strict=True):
            axis.imshow(x[point].reshape(8, 8), cmap="gray_r")
            axis.set_title(int(y[point]), loc="left", fontsize=11, fontweight="bold")
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(edgecolor=COLORS[int(found.owners[point]) % len(COLORS)], linewidth=3)
    ranks = found.owners.unique().tolist()
    handles = [Patch(color=COLORS[r % len(COLORS)], label=f"shard of rank {r}") for r in ranks]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=12)
    return figure


# %%
# All together
# ------------
#
# Every process has the whole result; the first one writes it.

OUTPUT = Path("out/distributed_influence")


def report(found: Attribution) -> None:
    """Prints who held what, and how the systems were solved."""
    counts = found.owners.bincount(minlength=dist.get_world_size()).tolist()
    for rank, count in enumerate(counts):
        print(f"rank {rank} of {len(counts)}: {count} training points")
    solution = found.solution
    print(
        f"{int(solution.converged.sum())} of {len(found.scores)} systems solved, worst true "
        f"relative residual {solution.relative_residual_norms.max():.1e}, "
        f"{solution.num_applications} all-reduces"
    )


def main(output: Path = OUTPUT) -> None:
    """Trains, attributes, reports and draws."""
    with process_group():
        digits = split_digits()
        model = trained(digits)
        chosen = misread(model, digits)
        found = attribute(model, digits, chosen)
        if dist.get_rank() > 0:
            return
        report(found)
        figure = contact_sheet(model, digits, chosen, found)
        output.mkdir(parents=True, exist_ok=True)
        torch.save({"scores": found.scores, "owners": found.owners}, output / "influences.pt")
        picture = output / "distributed_influence.png"
        figure.savefig(picture, dpi=100)
        print(f"\nwrote {picture.resolve() if output.is_absolute() else picture}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # matrices this small only wait for more
    parser = argparse.ArgumentParser(description="Influences with data on several processes")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    main(**vars(parser.parse_args()))
