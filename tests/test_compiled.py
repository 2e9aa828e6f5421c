from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from reference import DenseReference, relative_error
from torch import Tensor, nn

from hessops import (
    CurvatureOperator,
    GaussNewtonOperator,
    GeneralizedGaussNewtonOperator,
    HessianOperator,
)
from hessops.errors import ArgumentError, CompileWarning

DOUBLE = torch.float64
REFERENCES: dict[type[CurvatureOperator], Callable[[DenseReference], Tensor]] = {
    HessianOperator: DenseReference.hessian,
    GaussNewtonOperator: DenseReference.gauss_newton,
    GeneralizedGaussNewtonOperator: DenseReference.generalized_gauss_newton,
}


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def points(count: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, 3, generator=generator, dtype=DOUBLE)
    return x, torch.randint(2, (count,), generator=generator)


def in_batches(x: Tensor, y: Tensor, size: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Batches of three points and a last one of one."""
    return list(zip(x.split(size), y.split(size), strict=True))


def vectors(operator: CurvatureOperator, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, operator.input_size, generator=generator, dtype=DOUBLE)


def forms(operator: CurvatureOperator) -> int:
    compiled = operator.batch_operation._compiled
    assert compiled is not None
    return compiled.forms


Graph = Callable[..., Sequence[Tensor]]


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph as it is traced, which takes no time to compile."""
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)


# --- the numbers -----------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler, found no g++")
def test_compiled_products_are_those_of_the_matrix() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double()
    x, y = points()
    # Columns one by one, so that there are two forms only: a batch, and the shorter last one.
    operator = HessianOperator(
        model, nn.CrossEntropyLoss(), in_batches(x, y, 4), chunk_size=1, compile=True
    )
    rows = vectors(operator)
    state = torch.get_rng_state()
    expected = rows @ DenseReference(model, nn.functional.cross_entropy, x, y).hessian()
    assert relative_error(operator.apply(rows), expected) < 1e-10
    assert relative_error(operator.apply(rows[0]), expected[0]) < 1e-10
    assert forms(operator) == 2
    assert torch.equal(torch.get_rng_state(), state)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 2, 2), nn.BatchNorm1d(2)
        self.tied = nn.Linear(2, 2)
        self.also = self.tied
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.constant = torch.tensor([1.0, 2.0], dtype=DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        features = self.norm(self.conv(x.unsqueeze(1))).tanh().mean(2)
        return self.also(self.tied(features).sigmoid() * self.frozen) * self.constant


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(1, 2, batch_first=True), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(x.unsqueeze(2))[0][:, -1])


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize("make", [perceptron, Convolution, Recurrent])
def test_the_graph_is_the_product_for_any_number_of_vectors(
    kind: type[CurvatureOperator], make: Callable[[], nn.Module]
) -> None:
    model = make().double().eval()
    x, y = points()
    batches = in_batches(x, y) if make is perceptron else [(x, y)]
    operator = kind(model, nn.CrossEntropyLoss(), batches, compile=True)
    expected = REFERENCES[kind](DenseReference(model, nn.functional.cross_entropy, x, y))
    rows = vectors(operator)
    for stack in (rows, rows[:1], rows[0]):
        assert relative_error(operator.apply(stack), stack @ expected) < 1e-10
    assert forms(operator) == (4 if make is perceptron else 2)


@pytest.mark.usefixtures("traced_only")
def test_inputs_may_be_nested_and_scalar() -> None:
    class Scaling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2).double()

        def forward(self, x: dict[str, object]) -> Tensor:
            features, factor = x["features"], x["factor"]
            assert isinstance(features, Tensor)
            assert isinstance(factor, float)
            return self.linear(features) * factor

    x, y = points()
    model = Scaling()
    data = [({"features": x, "factor": f}, y) for f in (1.0, 2.0)]
    operator = HessianOperator(model, nn.CrossEntropyLoss(), data, compile=True)
    plain = HessianOperator(model, nn.CrossEntropyLoss(), data)
    rows = vectors(operator)
    assert relative_error(operator.apply(rows), plain.apply(rows)) < 1e-10
    assert forms(operator) == 2


@pytest.mark.usefixtures("traced_only")
def test_a_refreshed_restricted_or_moved_operator_keeps_nothing_of_the_other_model() -> None:
    model = Convolution().double().eval()
    x, y = points()
    operator = HessianOperator(model, nn.CrossEntropyLoss(), [(x, y)], chunk_size=1, compile=True)
    rows = vectors(operator)
    before = operator.apply(rows)
    with torch.no_grad():
        model.frozen.mul_(3)
        assert model.norm.running_mean is not None
        model.norm.running_mean.add_(0.5)
        model.conv.weight.mul_(2)
    assert torch.equal(operator.apply(rows), before)
    expected = rows @ DenseReference(model, nn.functional.cross_entropy, x, y).hessian()
    assert relative_error(operator.refresh().apply(rows), expected) < 1e-10
    block = operator.restricted(["conv.weight"])
    assert operator.space is not None
    index = operator.space.indices(["conv.weight"])
    assert relative_error(block.to_dense(), operator.to_dense()[index][:, index]) < 1e-10


@pytest.mark.usefixtures("traced_only")
def test_copies_and_pickles_work_without_what_is_compiled() -> None:
    x, y = points()
    operator = HessianOperator(perceptron(), nn.CrossEntropyLoss(), [(x, y)], compile=True)
    rows = vectors(operator)
    product = operator.apply(rows)
    for other in (copy.deepcopy(operator), pickle.loads(pickle.dumps(operator))):
        assert forms(other) == 0
        assert relative_error(other.apply(rows), product) < 1e-10
        assert forms(other) == 1
    assert operator.to("meta").apply(rows).is_meta


# --- where it does not work ------------------------------------------------------------------


def refusing(graph: Graph, **_: object) -> Graph:
    raise RuntimeError("no compiler found")


def refusing_when_called(graph: Graph, **_: object) -> Graph:
    def call(*tensors: Tensor) -> Sequence[Tensor]:
        raise RuntimeError("the compiler broke down")

    return call


def wrong(graph: Graph, **_: object) -> Graph:
    return lambda *tensors: [1.001 * product for product in graph(*tensors)]


def not_a_number(graph: Graph, **_: object) -> Graph:
    return lambda *tensors: [product * torch.nan for product in graph(*tensors)]


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        (refusing, "no compiler found"),
        (refusing_when_called, "the compiler broke down"),
        (wrong, "differs by"),
        (not_a_number, "differs by"),
    ],
)
def test_a_compiler_that_fails_warns_and_gives_the_right_numbers(
    monkeypatch: pytest.MonkeyPatch, compiler: Callable[..., Graph], message: str
) -> None:
    monkeypatch.setattr(torch, "compile", compiler)
    x, y = points()
    model = perceptron()
    operator = HessianOperator(model, nn.CrossEntropyLoss(), [(x, y)], compile=True)
    rows = vectors(operator)
    plain = HessianOperator(model, nn.CrossEntropyLoss(), [(x, y)])
    with pytest.warns(CompileWarning, match=message):
        # Zero vectors would hide a wrong product.
        assert not operator.apply(0 * rows).any()
    assert torch.equal(operator.apply(rows), plain.apply(rows))
    assert forms(operator) == 0


def test_a_failure_in_a_later_call_warns_and_gives_the_right_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: Iterator[int] = iter(range(100))

    def fragile(graph: Graph, **_: object) -> Graph:
        def call(*tensors: Tensor) -> Sequence[Tensor]:
            if next(calls) == 2:
                raise RuntimeError("too late")
            return graph(*tensors)

        return call

    monkeypatch.setattr(torch, "compile", fragile)
    x, y = points()
    operator = HessianOperator(perceptron(), nn.CrossEntropyLoss(), [(x, y)], compile=True)
    rows = vectors(operator)
    product = operator.apply(rows)
    with pytest.warns(CompileWarning, match="too late"):
        assert relative_error(operator.apply(rows), product) < 1e-10
    assert relative_error(operator.apply(rows), product) < 1e-10


class Branching(nn.Module):
    """Looks at the values of its inputs, as `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.linear = how, nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "branch":
            return torch.cat([self._row(row) for row in x.split(1)])
        if self.how == "numpy":
            return self.linear(x * torch.from_numpy(x.detach().numpy() ** 2))
        return self.linear(x * torch.tensor([[row[0].item()] for row in x], dtype=DOUBLE))

    def _row(self, row: Tensor) -> Tensor:
        return self.linear(row if row.sum() > 0 else 2 * row)


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("how", ["branch", "numpy", "item"])
def test_a_model_that_looks_at_values_is_not_compiled_for_those_of_one_batch(how: str) -> None:
    model = Branching(how)
    x, y = points(6)
    # Batches of one form, with other values.
    operator = HessianOperator(
        model, nn.CrossEntropyLoss(), in_batches(x, y), chunk_size=3, compile=True
    )
    with pytest.warns(CompileWarning, match="cannot be compiled"):
        product = operator.apply(vectors(operator))
    expected = DenseReference(model, nn.functional.cross_entropy, x, y).hessian()
    assert relative_error(product, vectors(operator) @ expected) < 1e-10


@pytest.mark.usefixtures("traced_only")
def test_a_batch_with_an_unknown_object_is_not_compiled() -> None:
    class Factor:
        def __init__(self, value: float) -> None:
            self.value = value

    class Scaling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2).double()

        def forward(self, x: tuple[Tensor, Factor]) -> Tensor:
            return self.linear(x[0]) * x[1].value

    x, y = points()
    data = [((x, Factor(value)), y) for value in (1.0, 2.0)]
    model = Scaling()
    operator = HessianOperator(model, nn.CrossEntropyLoss(), data, compile=True)
    plain = HessianOperator(model, nn.CrossEntropyLoss(), data)
    rows = vectors(operator)
    with pytest.warns(CompileWarning, match="Factor, of which the compiler knows nothing"):
        product = operator.apply(rows)
    assert torch.equal(product, plain.apply(rows))


def test_forward_mode_is_refused() -> None:
    with pytest.raises(ArgumentError, match="compile=True"):
        HessianOperator(
            perceptron(), nn.CrossEntropyLoss(), [points()], mode="rev-fwd", compile=True
        )
