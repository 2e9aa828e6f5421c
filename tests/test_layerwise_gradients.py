"""Gradients of points by layers that apply a matrix, against one backward pass per point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from reference import flat_gradient, trainable
from torch import Tensor, nn
from torch.nn import functional

from hessops import Objective
from hessops.influence import GradientProvider

N, CLASSES, VOCABULARY = 11, 3, 7


class Sum(nn.Module):
    """Some layers around a function of them."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], **layers: object) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (N, 5))


def sequences() -> Tensor:
    return torch.randn(N, 5, 4)


def vectors() -> Tensor:
    return torch.randn(N, 4)


def images() -> Tensor:
    return torch.randn(N, 4, 6, 6)


def tied() -> nn.Module:
    model = Sum(
        lambda m, x: m.decode(torch.tanh(m.embed(x)).mean(1)),
        embed=nn.Embedding(VOCABULARY, 4),
        decode=nn.Linear(4, VOCABULARY),
    )
    model.decode.weight = model.embed.weight
    return model


def half_frozen(part: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    getattr(model[0], part).requires_grad_(False)
    return model


def in_place_input() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        hidden = m.a(x)
        again = m.b(hidden)
        hidden += 1  # what b was called with is something else now
        return m.c(hidden + again)

    # b has no bias and a linear input, so that autograd itself has no need of that input
    return Sum(forward, a=nn.Linear(4, 5), b=nn.Tanh(), c=nn.Linear(5, CLASSES))


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    layers: int  # how many have factors


CASES: dict[str, Case] = {
    "perceptron": Case(
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES, bias=False)),
        vectors,
        2,
    ),
    "in place": Case(
        lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, CLASSES)),
        vectors,
        2,
    ),
    "in place on an input": Case(in_place_input, vectors, 2),
    "tokens": Case(
        lambda: Sum(
            lambda m, x: m.last(torch.tanh(m.embed(x)).mean(1)),
            embed=nn.Embedding(VOCABULARY, 4, padding_idx=2),
            last=nn.Linear(4, CLASSES),
        ),
        tokens,
        2,
    ),
    "positions": Case(
        lambda: Sum(
            lambda m, x: m.last(torch.tanh(m.first(x)).mean(1)),
            first=nn.Linear(4, 6),
            last=nn.Linear(6, CLASSES),
        ),
        sequences,
        2,
    ),
    "points along the second dimension": Case(
        lambda: Sum(
            lambda m, x: m.last(torch.tanh(m.first(x.transpose(0, 1))).mean(0)),
            first=nn.Linear(4, 6),
            last=nn.Linear(6, CLASSES),
        ),
        sequences,
        2,
    ),
    "points and positions in one dimension": Case(
        lambda: Sum(
            lambda m, x: m.last(torch.tanh(m.first(x.reshape(-1, 4))).reshape(len(x), -1)),
            first=nn.Linear(4, 2),
            last=nn.Linear(10, CLASSES),
        ),
        sequences,
        2,
    ),
    "reused": Case(
        lambda: Sum(
            lambda m, x: m.last(torch.tanh(m.step(torch.tanh(m.step(x))))),
            step=nn.Linear(4, 4),
            last=nn.Linear(4, CLASSES),
        ),
        vectors,
        2,
    ),
    "convolutions": Case(
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
            nn.ReLU(),
            nn.Conv2d(6, 4, 2, dilation=2, padding="same", padding_mode="circular", bias=False),
            nn.Flatten(),
            nn.Linear(36, CLASSES),
        ),
        images,
        3,
    ),
    "one-dimensional convolution": Case(
        lambda: nn.Sequential(nn.Conv1d(5, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, CLASSES)),
        sequences,
        2,
    ),
    "norms and loose parameters": Case(
        lambda: Sum(
            lambda m, x: m.last(m.norm(torch.tanh(m.first(x))) * m.gain),
            first=nn.Linear(4, 6),
            norm=nn.LayerNorm(6),
            gain=nn.Parameter(torch.full((6,), 1.3)),
            last=nn.Linear(6, CLASSES),
        ),
        vectors,
        2,
    ),
    "attention": Case(
        lambda: Sum(
            lambda m, x: m.last(m.encoder(x).mean(1)),
            encoder=nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True),
            last=nn.Linear(4, CLASSES),
        ),
        sequences,
        3,
    ),
    "tied": Case(tied, tokens, 0),
    "used as a function": Case(
        lambda: Sum(
            lambda m, x: m.last(functional.linear(torch.tanh(m.first(x)), 2 * m.first.weight.T)),
            first=nn.Linear(4, 6),
            last=nn.Linear(4, CLASSES),
        ),
        vectors,
        1,
    ),
    "weight norm": Case(
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)),
            nn.Tanh(),
            nn.Linear(5, CLASSES),
        ),
        vectors,
        1,
    ),
    "frozen weight": Case(lambda: half_frozen("weight"), vectors, 1),
    "frozen bias": Case(lambda: half_frozen("bias"), vectors, 2),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@dataclass
class Setting:
    provider: GradientProvider
    x: Tensor
    y: Tensor
    gradients: Tensor


def setting(case: Case, size: int = N) -> Setting:
    torch.manual_seed(0)
    model, x = case.make().double().eval(), case.x()[:size]
    x = x if x.dtype == torch.int64 else x.double()
    y = torch.randint(CLASSES, (size,))
    loss = nn.CrossEntropyLoss()
    rows = [
        flat_gradient(loss(model(x[i : i + 1]), y[i : i + 1]), trainable(model))
        for i in range(size)
    ]
    return Setting(GradientProvider(Objective(model, loss)), x, y, torch.stack(rows))


@pytest.mark.parametrize("size", [N, 1])
def test_rows_are_the_gradients_of_the_points(case: Case, size: int) -> None:
    given = setting(case, size)
    rows = given.provider.flat_grads(given.x, given.y)
    assert torch.allclose(rows, given.gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [N, 1])
def test_products_are_inner_products_with_the_gradients(case: Case, size: int) -> None:
    given = setting(case, size)
    factors = torch.randn(4, given.gradients.shape[1], dtype=torch.float64)
    products = given.provider.jacobian_prod(given.x, given.y, factors)
    assert torch.allclose(products, factors @ given.gradients.T, rtol=1e-10, atol=1e-12)


def test_products_by_parameter_are_those_with_its_gradient_alone(case: Case) -> None:
    given = setting(case)
    provider, space = given.provider, given.provider.space
    factors = torch.randn(4, space.size, dtype=torch.float64)
    blocks = [space.subspace([name]) for name in space.names]
    products = provider.block_products(provider.batch(given.x, given.y), factors, blocks)
    for block in blocks:
        where = space.slices[block.names[0]]
        expected = factors[:, where] @ given.gradients[:, where].T
        assert torch.allclose(products[block.names], expected, rtol=1e-10, atol=1e-12)


def test_as_many_layers_have_factors_as_apply_a_matrix(case: Case) -> None:
    given = setting(case)
    found = given.provider.by_layer(given.provider.batch(given.x, given.y))
    assert len(found.layers) == case.layers


def test_no_factors_give_no_products() -> None:
    given = setting(CASES["convolutions"])
    none = torch.zeros(0, given.gradients.shape[1], dtype=torch.float64)
    assert given.provider.jacobian_prod(given.x, given.y, none).shape == (0, N)


def test_no_hook_is_left_when_a_run_fails() -> None:
    class Failing(nn.Module):
        fails = False

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            result = self.layer(x)
            if Failing.fails:
                raise OSError("no more")
            return result

    x, y = torch.randn(4, 4), torch.randint(CLASSES, (4,))
    provider = GradientProvider(Objective(Failing(), nn.CrossEntropyLoss()))
    batch = provider.batch(x, y)
    Failing.fails = True
    with pytest.raises(OSError, match="no more"):
        provider.rows(batch)
    assert not provider.objective.model.layer._forward_hooks
