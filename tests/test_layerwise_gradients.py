"""Gradients of points by layers that apply a matrix, against one backward pass per point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from reference import flat_gradient, trainable
from torch import Tensor, nn
from torch.nn import functional

from hessops import InverseHarmonicMeanOperator, Objective
from hessops.functional import layers, layerwise
from hessops.influence import GradientProvider, gradients

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


@pytest.mark.parametrize("vectors", [1, 6])
@pytest.mark.parametrize("in_pieces", [False, True])
def test_factors_of_a_layer_stand_for_its_gradients(
    case: Case, in_pieces: bool, vectors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = setting(case)
    if in_pieces:
        monkeypatch.setattr(layers, "IMAGE_BYTES", 200)
        monkeypatch.setattr(layers, "GRADIENT_BYTES", 700)
    found = given.provider.by_layer(given.provider.batch(given.x, given.y))
    for name, layer in found.layers.items():
        rows, space = found.rows(name), layer.form.space
        vector = torch.randn(vectors, space.size, dtype=torch.float64)
        weights = torch.randn(vectors, N, dtype=torch.float64)
        of_entries = layer.form.matrices(vector)
        expected = (layer.form.matrices(rows).square() * of_entries[0]).sum(dim=(1, 2, 3))
        sums = space.flatten(found.weighted_sum(name, weights))
        assert torch.allclose(found.products(name, space.unflatten(vector)), vector @ rows.T)
        assert torch.allclose(found.inner_products(name, of_entries), vector @ rows.T)
        assert torch.allclose(sums, weights @ rows)
        assert torch.allclose(found.norms()[name], rows.norm(dim=1))
        assert torch.allclose(found.weighted_squares(name, of_entries[0]), expected)


@pytest.mark.parametrize("moves", [0, 10**9])
def test_products_are_the_same_by_either_way_for_other_parameters(
    moves: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "JACOBIAN_MOVES", moves)
    given = setting(CASES["attention"])
    provider, space = given.provider, given.provider.space
    factors = torch.randn(3, space.size, dtype=torch.float64)
    blocks = [space.subspace(space.names[::2]), space.subspace(space.names[1::2])]
    products = provider.block_products(provider.batch(given.x, given.y), factors, blocks)
    for block in blocks:
        where = space.indices(block.names)
        expected = factors[:, where] @ given.gradients[:, where].T
        assert torch.allclose(products[block.names], expected, rtol=1e-10, atol=1e-12)


def test_points_are_verified_once_and_again_when_they_are_written_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given, probe, count = setting(CASES["perceptron"]), layerwise.Probe.of, []

    def counted(*args: object, **keywords: object) -> layerwise.Probe:
        count.append(1)
        return probe(*args, **keywords)

    monkeypatch.setattr(layerwise.Probe, "of", counted)
    factors = torch.randn(2, given.gradients.shape[1], dtype=torch.float64)
    first = given.provider.jacobian_prod(given.x, given.y, factors)
    assert torch.equal(given.provider.jacobian_prod(given.x, given.y, factors), first)
    assert len(count) == 1
    given.x.mul_(2)
    given.provider.jacobian_prod(given.x, given.y, factors)
    assert len(count) == 2


def sometimes_reused() -> nn.Module:
    """Uses the weight of `first` a second time, for batches with a large entry only."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        hidden = torch.tanh(m.first(x))
        if x.abs().amax() > 50:
            hidden = hidden + torch.tanh(functional.linear(x, m.first.weight) / 50)
        return m.last(hidden)

    return Sum(forward, first=nn.Linear(4, 6), last=nn.Linear(6, CLASSES)).double()


def test_a_layer_for_some_points_only_is_found_out_at_the_others() -> None:
    torch.manual_seed(0)
    model, y = sometimes_reused(), torch.randint(CLASSES, (N,))
    x = torch.randn(N, 4, dtype=torch.float64)
    loss, factors = nn.CrossEntropyLoss(), torch.randn(3, 51, dtype=torch.float64)
    provider, far = GradientProvider(Objective(model, loss)), x.clone()
    far += 100
    for some in (x, far, x):
        rows = torch.stack(
            [
                flat_gradient(loss(model(some[i : i + 1]), y[i : i + 1]), trainable(model))
                for i in range(N)
            ]
        )
        assert torch.allclose(provider.jacobian_prod(some, y, factors), factors @ rows.T)


def harmonic_mean(gradients: Tensor, regularization: float) -> Tensor:
    size = gradients.shape[1]
    identity = regularization * torch.eye(size, dtype=torch.float64)
    return torch.stack([torch.linalg.inv(torch.outer(g, g) + identity) for g in gradients]).mean(0)


@pytest.mark.parametrize("name", ["tokens", "convolutions", "norms and loose parameters", "tied"])
def test_inverse_harmonic_mean_from_factors_is_that_of_the_gradients(name: str) -> None:
    given = setting(CASES[name])
    objective = given.provider.objective
    data = [(given.x[:6], given.y[:6]), (given.x[6:], given.y[6:])]
    operator = InverseHarmonicMeanOperator(
        objective.model, nn.CrossEntropyLoss(), data, 0.1, chunk_size=4
    )
    expected = harmonic_mean(given.gradients, 0.1)
    vectors = torch.randn(3, operator.input_size, dtype=torch.float64)
    for _ in range(2):  # at verified points too
        products = operator.apply(vectors)
        assert torch.allclose(products, vectors @ expected, rtol=1e-10, atol=1e-10)
    mean = given.gradients.square().sum(dim=1).mean().item()
    assert operator.mean_squared_gradient() == pytest.approx(mean, rel=1e-10)


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
