r"""
Influences on a cluster
=======================

The influences of all training points on all test points are a matrix that may be larger than memory
and take longer than one machine should. Here two worker processes on this computer compute it in
chunks, and each writes its own chunks to disk.

With the address of a cluster in place of `LocalCluster` the same program runs there.

The influence of a training point z on the loss on a test point z' is

.. math:: \mathcal I(z', z) = \langle \nabla\ell(z'), (A + \lambda I)^{-1} \nabla\ell(z)\rangle

and A + λI is inverted in the Kronecker eigenbasis of EKFAC. A positive influence is one of a
helpful point (Koh & Liang 2017, with the opposite sign).

Run it with ``python examples/programs/dask_influence.py``; it writes a store and a picture. A
second run finds the store whole and computes nothing again.
"""

# %%
# A model
# -------
#
# The digits of scikit-learn, 1797 images of 8 x 8 pixels, and a network with one hidden layer. Its
# weight decay λ/2 ‖θ‖² is the regularization of the influences.

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import dask.array as da
import matplotlib.pyplot as plt
import torch
from distributed import Client, LocalCluster
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hessops.influence import (
    DaskInfluenceCalculator,
    EkfacInfluence,
    TorchNumpyConverter,
    torch_dataset_to_dask_array,
)

CLASSES = 10
WEIGHT_DECAY = 1e-3
TOP = 5


@dataclass(frozen=True)
class Digits:
    """Training and test points."""

    train: TensorDataset
    test: TensorDataset


def split_digits(num_train: int, seed: int) -> Digits:
    """Splits the digits at random."""
    bunch = load_digits()
    x = torch.tensor(bunch.data / 16, dtype=torch.float32)
    y = torch.tensor(bunch.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:num_train], order[num_train:]
    return Digits(TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test]))


def trained(digits: Digits, seed: int, max_iter: int = 100) -> nn.Module:
    """A network after some steps of LBFGS."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, CLASSES))
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=max_iter, line_search_fn="strong_wolfe"
    )
    x, y = digits.train.tensors

    def closure() -> Tensor:
        optimizer.zero_grad()
        decay = sum(p.square().sum() for p in model.parameters())
        objective = nn.functional.cross_entropy(model(x), y) + WEIGHT_DECAY / 2 * decay
        objective.backward()
        return objective

    optimizer.step(closure)
    return model.eval()


def fitted(model: nn.Module, digits: Digits) -> EkfacInfluence:
    """EKFAC on the training points; what it keeps is small and holds none of them."""
    influence = EkfacInfluence(model, update_diagonal=True, regularization=WEIGHT_DECAY)
    return influence.fit(DataLoader(digits.train, batch_size=300))


# %%
# Influences, chunk by chunk
# --------------------------
#
# Data sets become dask arrays that are read when a worker needs a chunk. The influences are a dask
# array as well: nothing is computed before `to_zarr`, which asks the workers for the chunks that
# are not on disk yet. A worker that dies costs what it held; a run that is killed goes on where it
# stopped.
#
# Every worker has one thread, since models of PyTorch are not made for several.


def write_influences(
    client: Client, influence: EkfacInfluence, digits: Digits, store: Path
) -> da.Array:
    """The influences of all training points on all test points, on disk."""
    x, y = torch_dataset_to_dask_array(digits.train, chunk_size=300)
    x_test, y_test = torch_dataset_to_dask_array(digits.test, chunk_size=150)
    calculator = DaskInfluenceCalculator(influence, TorchNumpyConverter(), client)
    influences = calculator.influences(x_test, y_test, x, y)
    print(f"influences of {influences.shape} in chunks of {influences.chunksize}")
    calculator.to_zarr(influences, store)
    return da.from_zarr(str(store))


@dataclass(frozen=True)
class Extremes:
    """The training points behind some test points.

    Attributes:
        chosen: Which test points, ``(m,)``.
        helpful: Training points of largest influence on each, ``(m, TOP)``.
        harmful: Those of smallest.
        values: Their influences, helpful before harmful, ``(m, 2, TOP)``.
    """

    chosen: Tensor
    helpful: Tensor
    harmful: Tensor
    values: Tensor


def extremes(influences: da.Array, model: nn.Module, digits: Digits, count: int = 5) -> Extremes:
    """The most helpful and the most harmful points for the test points of largest loss."""
    x, y = digits.test.tensors
    with torch.no_grad():
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    chosen = losses.argsort(descending=True)[:count]
    rows = torch.from_numpy(influences[chosen.sort().values.numpy()].compute())
    rows = rows[chosen.argsort().argsort()]
    largest, smallest = rows.topk(TOP), rows.topk(TOP, largest=False)
    values = torch.stack([largest.values, smallest.values], dim=1)
    return Extremes(chosen, largest.indices, smallest.indices, values)


# %%
# The picture
# -----------
#
# A row for each test image, with the class that it has and the one that is read; then the training
# images that help most, and those that harm most. Red are those of another class than the test
# image.

SAME, OTHER = "#8a8a8a", "#c62828"


def draw(axis: Axes, image: Tensor, title: str, color: str = SAME) -> None:
    """An image in a frame."""
    axis.imshow(image.reshape(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=11, color="black" if color == SAME else color)
    for spine in axis.spines.values():
        spine.set(edgecolor=color, linewidth=1.0 if color == SAME else 3.0)


def contact_sheet(model: nn.Module, digits: Digits, found: Extremes) -> Figure:
    """The test images beside the training images behind them."""
    x, y = digits.train.tensors
    x_test, y_test = digits.test.tensors
    rows = len(found.chosen)
    figure = plt.figure(figsize=(12, 0.7 + 1.35 * rows), layout="constrained")
    first, *others = figure.subfigures(1, 3, width_ratios=[1.3, TOP, TOP], wspace=0.03)
    first.suptitle("Test image", fontsize=14, fontweight="bold")
    for axis, point in zip(first.subplots(rows, 1), found.chosen, strict=True):
        read = int(model(x_test[point]).argmax())
        draw(axis, x_test[point], f"{int(y_test[point])} read as {read}")
    for part, heading, indices in zip(
        others, ("Most helpful", "Most harmful"), (found.helpful, found.harmful), strict=True
    ):
        part.suptitle(heading, fontsize=14, fontweight="bold")
        for point, axes, row in zip(found.chosen, part.subplots(rows, TOP), indices, strict=True):
            for axis, neighbour in zip(axes, row, strict=True):
                color = SAME if y[neighbour] == y_test[point] else OTHER
                draw(axis, x[neighbour], str(int(y[neighbour])), color)
    return figure


# %%
# All together
# ------------

OUTPUT = Path("out/dask_influence")


def report(digits: Digits, found: Extremes) -> None:
    """Prints the classes and the influences of the extreme training points."""
    labels, labels_of_test = digits.train.tensors[1], digits.test.tensors[1]
    for row, point in enumerate(found.chosen):
        print(f"\ntest point {int(point)}, a {int(labels_of_test[point])}")
        names = ("helpful", "harmful")
        for name, indices, values in zip(
            names, (found.helpful[row], found.harmful[row]), found.values[row], strict=True
        ):
            shown = [f"{int(labels[i])} ({v:+.1f})" for i, v in zip(indices, values, strict=True)]
            print(f"   {name}: {', '.join(shown)}")


def main(num_train: int = 1200, seed: int = 0, output: Path = OUTPUT) -> None:
    """Trains, computes on two workers, reports and draws."""
    digits = split_digits(num_train, seed)
    model = trained(digits, seed)
    influence = fitted(model, digits)
    local = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0", "silence_logs": 40}
    with LocalCluster(**local) as cluster, Client(cluster) as client:
        influences = write_influences(client, influence, digits, output / "influences.zarr")
        found = extremes(influences, model, digits)
    report(digits, found)

    figure = contact_sheet(model, digits, found)
    picture = output / "dask_influence.png"
    figure.savefig(picture, dpi=100)
    print(f"\nwrote {picture.resolve() if output.is_absolute() else picture}")


# Workers are new processes that import this file: what is not guarded, each of them would do.
if __name__ == "__main__":
    torch.set_num_threads(1)  # matrices this small only wait for more
    parser = argparse.ArgumentParser(description="Influences on a cluster")
    parser.add_argument("--num-train", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    main(**vars(parser.parse_args()))
