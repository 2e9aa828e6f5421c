"""The models and data of the benchmarks, in three kinds and three sizes.

Every case is deterministic. The small ones have the digits of scikit-learn, the others numbers that
are made; labels of made data are random, so that no loss vanishes. No layer depends on other points
of a batch and none is random, as every library here demands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]

LOSS = nn.CrossEntropyLoss()
CLASSES = 10
TRAINING_POINTS = 1400  # of the 1797 digits


@dataclass(frozen=True)
class Case:
    """A model and its data, all in memory.

    Attributes:
        name: Kind and size.
        model: In eval mode.
        x: Inputs of n points.
        y: Their labels.
        batch_size: Of the batches in which `hessops` has the data.
        x_test: Inputs of other points.
        y_test: Their labels.
    """

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    batch_size: int
    x_test: Tensor
    y_test: Tensor

    def __len__(self) -> int:
        return len(self.x)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of the model."""
        return list(self.model.parameters())

    @property
    def size(self) -> int:
        """P."""
        return sum(p.numel() for p in self.parameters)

    @cached_property
    def batches(self) -> list[Batch]:
        """Slices, made once."""
        pairs = zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True)
        return list(pairs)

    @property
    def full_batch(self) -> list[Batch]:
        """All points at once."""
        return [(self.x, self.y)]

    def gradient(self) -> tuple[Tensor, ...]:
        """The unit of time: one gradient of the mean loss of all data, by plain autograd."""
        return torch.autograd.grad(LOSS(self.model(self.x), self.y), self.parameters)

    def vectors(self, count: int) -> Tensor:
        """``(count, P)`` Gaussian numbers, the same ones every time."""
        return torch.randn(count, self.size, generator=torch.Generator().manual_seed(count))

    def fewer(self, points: int) -> Case:
        """The first points only."""
        return replace(self, x=self.x[:points], y=self.y[:points])

    def describe(self) -> dict[str, object]:
        """What the tables say of it."""
        return {
            "parameters": self.size,
            "points": len(self),
            "batch_size": self.batch_size,
            "input": list(self.x.shape[1:]),
        }


# --- networks --------------------------------------------------------------------------------


def perceptron(*widths: int) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def small_convolutional() -> nn.Sequential:
    """Two convolutions of images of 8 x 8, and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        *perceptron(512, 40, CLASSES),
    )


def convolutional(channels: int, width: int) -> nn.Sequential:
    """Three convolutions of images of 3 x 32 x 32 that halve them, and two linear layers."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((3, channels, 2 * channels, 4 * channels)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.Tanh()]
    return nn.Sequential(*layers, nn.Flatten(), *perceptron(64 * channels, width, CLASSES))


class Encoder(nn.Module):
    """Blocks of a transformer with layer norm and without dropout, on embedded positions.

    Args:
        features: Numbers at a position.
        positions: Of a point.
        width: Of the blocks, with 4 heads and 4 times the width between.
        blocks: Number of blocks.
    """

    def __init__(self, features: int, positions: int, width: int, blocks: int) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(
            width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.embedding = nn.Linear(features, width)
        self.positions = nn.Parameter(0.1 * torch.randn(positions, width))
        self.blocks = nn.TransformerEncoder(block, blocks, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, positions, features)`` to ``(n, 10)``."""
        return self.head(self.blocks(self.embedding(x) + self.positions).mean(dim=1))


# --- cases -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What a case is made from.

    Attributes:
        model: Makes the network.
        shape: Of a point.
        points: n.
        batch_size: Of batches.
        digits: Whether the data are the digits.
    """

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    points: int
    batch_size: int
    digits: bool = False


# The largest have few points, in one batch, so that a product takes a fraction of a second.
RECIPES: dict[str, Recipe] = {
    "MLP, 26k": Recipe(
        lambda: perceptron(64, 128, 128, CLASSES), (64,), TRAINING_POINTS, 350, digits=True
    ),
    "MLP, 670k": Recipe(lambda: perceptron(784, 512, 512, CLASSES), (784,), 2048, 512),
    "MLP, 5M": Recipe(lambda: perceptron(784, 2048, 1664, CLASSES), (784,), 128, 128),
    "convolutional, 26k": Recipe(small_convolutional, (1, 8, 8), 700, 175, digits=True),
    "convolutional, 670k": Recipe(lambda: convolutional(32, 276), (3, 32, 32), 128, 32),
    "convolutional, 5M": Recipe(lambda: convolutional(64, 1136), (3, 32, 32), 32, 32),
    "transformer, 26k": Recipe(lambda: Encoder(8, 8, 32, 2), (8, 8), 350, 175, digits=True),
    "transformer, 670k": Recipe(lambda: Encoder(32, 16, 136, 3), (16, 32), 32, 16),
    "transformer, 5M": Recipe(lambda: Encoder(32, 16, 320, 4), (16, 32), 16, 16),
}
DIGITS, WIDE = "MLP, 26k", "MLP, 670k"


def case(name: str) -> Case:
    """The case of a name in `RECIPES`."""
    recipe = RECIPES[name]
    torch.manual_seed(0)
    model = recipe.model().eval()
    if recipe.digits:
        digits = load_digits()
        x = torch.tensor(digits.data, dtype=torch.float32).reshape(-1, *recipe.shape) / 16
        y = torch.tensor(digits.target)
    else:
        x = torch.randn(2 * recipe.points, *recipe.shape)
        y = torch.randint(CLASSES, (2 * recipe.points,))
    n = recipe.points
    return Case(name, model, x[:n], y[:n], recipe.batch_size, x[n:], y[n:])


def cases(names: list[str]) -> Iterator[Case]:
    """One after the other, so that only one is in memory."""
    for name in names:
        yield case(name)


def train(case: Case, steps: int) -> None:
    """Full-batch Adam, in place."""
    optimizer = torch.optim.Adam(case.parameters, lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        LOSS(case.model(case.x), case.y).backward()
        optimizer.step()
    case.model.zero_grad()


def gradients(case: Case, x: Tensor, y: Tensor) -> Tensor:
    """Those of single points, one after the other, ``(len(x), P)``."""
    rows = [
        torch.cat(
            [g.reshape(-1) for g in torch.autograd.grad(LOSS(case.model(a), b), case.parameters)]
        )
        for a, b in zip(x.split(1), y.split(1), strict=True)
    ]
    return torch.stack(rows)
