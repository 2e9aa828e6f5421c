"""Products that are recorded once and replayed: the same as those of autograd."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from reference import relative_error
from torch import Tensor, nn

from hessops import GeneralizedGaussNewtonOperator, HessianOperator, ParameterSpace
from hessops.batch import ModelBatchOperation
from hessops.functional.recording import NotRecordable, recorded
from hessops.functional.replay import Replay, fused
from hessops.functional.replayed import ReplayedProducts


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.reshape(len(x), 2, 2))[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(2, 1, 4, 0.0, "gelu", batch_first=True)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x.reshape(len(x), 2, 2)).mean(dim=1))


class Reused(nn.Module):
    """A layer twice, indexed and concatenated; one output does not depend on its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(6, 3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.layer(torch.sigmoid(self.layer(x))))
        return self.head(torch.cat([hidden[:, [0, 2, 2]], hidden[:, 1:]], dim=1))


MODELS = {
    "perceptron": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
    "normalized": lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.SiLU(), Reused6()),
    "convolutional": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)),
        nn.Conv1d(1, 4, 3, padding=1),
        nn.GELU(),
        nn.Conv1d(4, 2, 3, groups=2),
        nn.Flatten(),
        nn.ELU(),
        nn.Linear(4, 3),
    ),
    "recurrent": Recurrent,
    "attention": Attention,
    "reused": Reused,
}
OPERATORS = {"hessian": HessianOperator, "ggn": GeneralizedGaussNewtonOperator}


class Reused6(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 3)


def problem(name: str, kind: str = "hessian", size: int = 7):
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    batch = torch.randn(size, 4).double(), torch.randint(3, (size,))
    return OPERATORS[kind](model, nn.CrossEntropyLoss(), [batch])


def vectors(size: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, size, generator=generator, dtype=torch.float64)


def linear_map(operator) -> tuple[ParameterSpace, object]:
    """The products of the only batch, and where they live."""
    operation = operator.batch_operation
    assert isinstance(operation, ModelBatchOperation)
    with operation._differentiating():
        return operation.space, operation._reverse_linear(next(iter(operator.stream)))


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("name", MODELS)
def test_a_record_gives_the_products_of_autograd(name: str, kind: str) -> None:
    space, linear = linear_map(problem(name, kind))
    products = ReplayedProducts(linear, space)
    for row in vectors(space.size, 3):
        stack = space.unflatten(row[None])
        assert relative_error(space.flatten(products(stack)), space.flatten(linear(stack))) < 1e-13
    assert products.is_recorded


def test_the_record_is_what_linearized_operators_use(monkeypatch) -> None:
    operator = problem("perceptron")
    expected = operator.apply(vectors(operator.input_size, 3))
    linearized = operator.linearize()
    linearized.apply(vectors(operator.input_size, 1))
    # Nothing is differentiated any more.
    monkeypatch.setattr(torch.autograd, "grad", None)
    for row, product in zip(vectors(operator.input_size, 3), expected, strict=True):
        assert relative_error(linearized.apply(row), product) < 1e-13


class NumpySquare(torch.autograd.Function):
    """The gradient of x², whose own derivative goes through numpy."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return NumpyProduct.apply(gradient, 2 * x)


class NumpyProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.from_numpy(np.multiply(a.detach().numpy(), b.detach().numpy()))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return NumpyProduct.apply(gradient, b), NumpyProduct.apply(gradient, a)


class Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return NumpySquare.apply(self.layer(x))


def test_what_numpy_computes_is_missed_by_the_comparison_and_not_recorded() -> None:
    torch.manual_seed(0)
    batch = torch.randn(5, 4).double(), torch.randint(3, (5,))
    operator = HessianOperator(Squared().double(), nn.CrossEntropyLoss(), [batch])
    matrix = operator.to_dense()
    linearized = operator.linearize()
    for row in vectors(operator.input_size, 3):
        assert relative_error(linearized.apply(row), matrix @ row) < 1e-12
    space, linear = linear_map(operator)
    products = ReplayedProducts(linear, space)
    products(space.unflatten(vectors(space.size, 1)))
    assert not products.is_recorded


def test_a_record_that_is_too_large_is_not_kept() -> None:
    space, linear = linear_map(problem("perceptron"))
    for max_bytes, is_kept in ((100, False), (1e5, True)):
        products = ReplayedProducts(linear, space, max_bytes)
        products(space.unflatten(vectors(space.size, 1)))
        assert products.is_recorded is is_kept


@pytest.mark.parametrize("name", ["perceptron", "convolutional", "attention"])
def test_what_may_be_taken_for_a_record_is_enough(name: str) -> None:
    operator = problem(name, size=64)
    operation, batch = operator.batch_operation, next(iter(operator.stream))
    space, linear = linear_map(operator)
    recording, _ = recorded(linear, space.unflatten(vectors(space.size, 1)))
    graph_bytes = operation._graph_size(batch).num_bytes
    assert Replay(recording).num_bytes <= operation._record_bytes(graph_bytes)
    assert operation.graph_bytes(batch) == graph_bytes + operation._record_bytes(graph_bytes)


def test_products_are_the_callers_own() -> None:
    operator = problem("perceptron").linearize()
    u, v = vectors(operator.input_size, 2)
    first = operator.apply(u)
    kept = first.clone()
    operator.apply(v)
    assert torch.equal(first, kept)


def test_threads_that_share_an_operator_get_their_own_products() -> None:
    operator = problem("perceptron").linearize()
    rows = vectors(operator.input_size, 8)
    expected = [operator.apply(row) for row in rows]
    found: dict[int, list[Tensor]] = {}

    def work(index: int) -> None:
        found[index] = [operator.apply(rows[index]) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, products in found.items():
        assert all(torch.equal(product, expected[index]) for product in products)


def written_in_place(stack: dict[str, Tensor]) -> dict[str, Tensor]:
    total = torch.zeros(3, 4)
    total[1:] += stack["x"]
    total[0, [1, 1, 3]] = 2 * stack["x"][0, :3]
    return {"y": total.div_(2) + stack["x"].sum()}


def views_and_pieces(stack: dict[str, Tensor]) -> dict[str, Tensor]:
    first, second = stack["x"].T.split(2)
    wide = torch.cat([first, second.flip(0)], dim=1)
    return {"y": wide @ wide.new_ones(4, 2) + first.expand(2, 2), "z": wide.t()[1], "w": stack["x"]}


def sums_of_products(stack: dict[str, Tensor]) -> dict[str, Tensor]:
    a = torch.arange(8.0).reshape(4, 2)
    x = stack["x"]
    product = x @ a
    twice = product + product.t() @ product.new_ones(2, 2)
    scaled = torch.add(x @ a, x @ (2 * a), alpha=3)
    return {"y": (a.t() @ x.t()).t() + twice, "z": scaled + 2 * product, "w": 0.5 * x + x}


MAPS = {
    "in place": written_in_place,
    "views": views_and_pieces,
    "sums of products": sums_of_products,
}


@pytest.mark.parametrize("name", MAPS)
def test_a_replay_repeats_a_map_for_other_inputs(name: str) -> None:
    first, second = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0))
    recording, result = recorded(MAPS[name], {"x": first})
    replay = Replay(recording)
    for x in (second, first, second):
        found, expected = replay({"x": x}), MAPS[name]({"x": x})
        for key, tensor in expected.items():
            assert relative_error(found[key], tensor) < 1e-6
    for key, tensor in MAPS[name]({"x": first}).items():
        assert torch.equal(result[key], tensor)


def test_a_product_is_fused_with_the_sum_that_alone_reads_it() -> None:
    recording, _ = recorded(sums_of_products, {"x": torch.ones(2, 4)})
    names = [one.function.name() for one in fused(recording)]
    assert names.count("aten::addmm") == 2
    # The sum with a factor stays, and so does the product that three read.
    assert names.count("aten::mm") == 3


REFUSED = {
    "an input that is written to": lambda s: {"y": s["x"].add_(1)},
    "a constant that is written to": lambda s: {"y": CONSTANT.add_(s["x"])},
    "random numbers": lambda s: {"y": s["x"] + torch.rand_like(s["x"])},
    "a number that is looked at": lambda s: {"y": s["x"] * s["x"].sum().item()},
    "a form that depends on numbers": lambda s: {"y": s["x"][s["x"] > 0]},
}
CONSTANT = torch.zeros(2, 2)


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_record_cannot_repeat_is_not_recorded(name: str) -> None:
    with pytest.raises(NotRecordable):
        recorded(REFUSED[name], {"x": torch.ones(2, 2)})
