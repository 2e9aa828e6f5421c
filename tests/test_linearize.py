"""Linearized operators: the same products at fixed parameters, with graphs that are retained."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator

import pytest
import torch
from reference import DenseReference, relative_error
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hessops import (
    Batch,
    CgOperator,
    ChunkAveraging,
    GaussNewtonOperator,
    GeneralizedGaussNewtonOperator,
    HessianBatchOperation,
    HessianOperator,
    IdentityOperator,
    MinresOperator,
    NystroemPreconditioner,
)
from hessops.errors import ArgumentError, ArgumentTypeError
from hessops.functional import operator_spectral_approximation
from hessops.functional.memory import GraphSizes, RetainedBytes
from hessops.functional.products import differentiable, gradient_with_graph
from hessops.objective import Objective
from hessops.operators import linearized
from hessops.operators.linearized import GraphMemory

OPERATORS = {
    "hessian": HessianOperator,
    "gauss_newton": GaussNewtonOperator,
    "generalized_gauss_newton": GeneralizedGaussNewtonOperator,
}


class Tied(nn.Module):
    """One weight under two names, and a frozen layer between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.frozen, self.second = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.frozen(torch.tanh(self.first(x))))
        return self.head(torch.tanh(self.second(hidden)))


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
    "tied": Tied,
    "normalized": lambda: nn.Sequential(
        nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)
    ),
}


def problem(name: str = "mlp", size: int = 11) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = MODELS[name]().to(torch.float64)
    return model, nn.CrossEntropyLoss(), torch.randn(size, 4).double(), torch.randint(3, (size,))


def loader(x: Tensor, y: Tensor, batch_size: int, **options) -> DataLoader:
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, **options)


def vectors(operator, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, operator.input_size, generator=generator, dtype=operator.dtype)


class Counting(nn.Module):
    """A model that counts its calls; they are not part of its state."""

    calls = 0

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        Counting.calls += 1
        return self.model(x)


@pytest.fixture
def calls() -> type[Counting]:
    Counting.calls = 0
    return Counting


@pytest.mark.parametrize("batch_size", [11, 4, 1])
@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("operator_name", OPERATORS)
def test_products_equal_the_dense_matrix_in_every_application(
    operator_name: str, model_name: str, batch_size: int
) -> None:
    model, loss, x, y = problem(model_name)
    matrix = getattr(DenseReference(model, loss, x, y), operator_name)()
    operator = OPERATORS[operator_name](model, loss, loader(x, y, batch_size)).linearize()
    for shape in ((), (1,), (3,), (50,)):
        generator = torch.Generator().manual_seed(2)
        v = torch.randn(*shape, len(matrix), generator=generator, dtype=torch.float64)
        first, second = operator.apply(v), operator.apply(v)
        assert relative_error(first, v @ matrix) < 1e-10
        assert torch.equal(first, second)


@pytest.mark.parametrize("operator_name", OPERATORS)
def test_the_model_runs_no_more_once_the_graphs_are_there(operator_name: str, calls) -> None:
    model, loss, x, y = problem()
    operator = OPERATORS[operator_name](Counting(model), loss, loader(x, y, 4)).linearize()
    operator.apply(vectors(operator))
    before = calls.calls
    operator.apply(vectors(operator))
    operator.apply(vectors(operator, 1))
    assert calls.calls == before


@pytest.mark.parametrize("method", ["cg", "block", "minres", "nystroem", "lanczos"])
def test_solvers_and_sketches_run_the_model_once_per_batch(method: str, calls) -> None:
    model, loss, x, y = problem()
    matrix = GeneralizedGaussNewtonOperator(Counting(model), loss, loader(x, y, 4))
    matrix.check_data()
    matrix.linearize().apply(vectors(matrix, 1))  # the sizes of the graphs are known from here on
    before, applications = calls.calls, 0
    if method == "lanczos":
        operator_spectral_approximation(matrix, rank=4)
    else:
        solver = {
            "cg": lambda: CgOperator(matrix, 1e-3),
            "block": lambda: CgOperator(matrix, 1e-3, use_block_cg=True),
            "minres": lambda: MinresOperator(matrix, 1e-3),
            "nystroem": lambda: CgOperator(
                matrix, 1e-3, preconditioner=NystroemPreconditioner(rank=3)
            ),
        }[method]()
        solution = solver.solve(vectors(matrix))
        applications = solution.num_applications
        assert bool(solution.converged.all())
        assert applications > 3
    assert calls.calls - before == 1  # three small batches are one graph


def test_graphs_of_a_solve_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    memories = []

    class Kept(GraphMemory):
        def __init__(self, limit: int | None = None) -> None:
            super().__init__(limit)
            memories.append(self)

    monkeypatch.setattr("hessops.operators.base.GraphMemory", Kept)
    model, loss, x, y = problem()
    operator = GeneralizedGaussNewtonOperator(model, loss, loader(x, y, 4))
    gc.disable()  # at once, and not when cycles are looked for
    try:
        CgOperator(operator, 1e-3).solve(vectors(operator))
        CgOperator((2 * operator).shift(1e-3)).solve(vectors(operator))
    finally:
        gc.enable()
    assert len(memories) == 2
    assert [memory.used for memory in memories] == [0, 0]


def test_a_budget_is_honoured_and_the_rest_is_traversed_anew(
    calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linearized, "JOINED_BYTES", 0)
    model, loss, x, y = problem()
    matrix = DenseReference(model, loss, x, y).hessian()
    operator = HessianOperator(Counting(model), loss, loader(x, y, 4))
    operator.check_data()
    (first, *_) = operator.stream
    budget = 2 * operator.batch_operation.graph_bytes(first) + 10
    some = operator.linearize(max_bytes=budget)
    v = vectors(operator)
    assert relative_error(some.apply(v), v @ matrix) < 1e-10
    assert "2 of 3 graphs retained" in repr(some)
    assert some._graphs.memory.used <= budget
    before = calls.calls
    assert relative_error(some.apply(v), v @ matrix) < 1e-10
    assert calls.calls - before == 1
    none = operator.linearize(max_bytes=0)
    assert relative_error(none.apply(v), v @ matrix) < 1e-10
    assert "0 of 3 graphs retained" in repr(none)


def test_parts_share_one_budget_and_a_part_that_occurs_twice_is_retained_once(calls) -> None:
    model, loss, x, y = problem()
    reference = DenseReference(model, loss, x, y)
    dense_h, dense_g = reference.hessian(), reference.gauss_newton()
    counted = Counting(model)
    H = HessianOperator(counted, loss, loader(x, y, 11))
    G = GaussNewtonOperator(counted, loss, loader(x, y, 11))
    composite = (H @ H + 2 * G).shift(0.5)
    expected = dense_h @ dense_h + 2 * dense_g + 0.5 * torch.eye(len(dense_h)).double()
    v = vectors(H)
    whole = composite.linearize()
    assert relative_error(whole.apply(v), v @ expected) < 1e-10
    assert repr(whole).count("1 of 1 graphs retained") == 3
    before = calls.calls
    assert relative_error(whole.apply(v), v @ expected) < 1e-10
    assert calls.calls == before
    (first,) = H.stream
    bound = H.batch_operation.graph_bytes(first)
    partly = composite.linearize(max_bytes=bound)
    assert relative_error(partly.apply(v), v @ expected) < 1e-10
    assert repr(partly).count("0 of 1 graphs retained") == 1
    for again in (copy.deepcopy(partly), partly.refresh()):
        again.apply(v)
        assert repr(again).count("0 of 1 graphs retained") == 1


@pytest.mark.parametrize("max_bytes", [None, 0])
def test_parameters_stay_those_of_the_linearization(max_bytes: int | None) -> None:
    model, loss, x, y = problem()
    H = HessianOperator(model, loss, loader(x, y, 4))
    L = H.linearize(max_bytes)
    before = DenseReference(model, loss, x, y).hessian()
    v = vectors(H)
    for _ in range(2):
        with torch.no_grad():
            model[0].weight.mul_(1.5)
        H.refresh()
        assert relative_error(L.apply(v), v @ before) < 1e-10
    after = DenseReference(model, loss, x, y).hessian()
    assert relative_error(H.apply(v), v @ after) < 1e-10
    assert relative_error(L.refresh().apply(v), v @ after) < 1e-10
    assert relative_error(L.apply(v), v @ after) < 1e-10


def test_data_that_are_written_to_later_change_nothing() -> None:
    model, loss, x, y = problem()
    expected = DenseReference(model, loss, x, y).hessian()
    x, y = x.clone(), y.clone()
    L = HessianOperator(model, loss, [(x, y)]).linearize()
    v = vectors(L)
    L.apply(v)
    x.zero_()
    assert relative_error(L.apply(v), v @ expected) < 1e-10


def test_batches_that_are_weighed_as_such_are_not_joined() -> None:
    model, loss, x, y = problem()
    pieces = [(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])]
    matrices = [DenseReference(model, loss, *piece).hessian() for piece in pieces]
    L = HessianOperator(model, loss, pieces, averaging=ChunkAveraging()).linearize()
    v = vectors(L)
    assert relative_error(L.apply(v), v @ torch.stack(matrices).mean(dim=0)) < 1e-10
    assert "3 of 3 graphs retained" in repr(L)


class Scaled(nn.Module):
    """A model of a mapping, which may hold what is no tensor over points."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, inputs) -> Tensor:
        scale = inputs["scale"]
        return torch.tanh(self.linear(inputs["x"])) * (scale["value"] if scale else 1.0)


@pytest.mark.parametrize(
    ("scales", "graphs"),
    [((None, None), 1), (({"value": 2.0}, {"value": 3.0}), 2)],
    ids=["alike", "of the batch"],
)
def test_batches_are_joined_only_where_they_are_tensors_over_points(scales, graphs: int) -> None:
    _, loss, x, y = problem()
    model = Scaled().double()
    batches = [
        ({"x": x[:5], "scale": scales[0]}, y[:5]),
        ({"x": x[5:], "scale": scales[1]}, y[5:]),
    ]
    H = HessianOperator(model, loss, batches)
    L = H.linearize()
    v = vectors(H)
    assert relative_error(L.apply(v), H.apply(v)) < 1e-12
    assert f"{graphs} of {graphs} graphs retained" in repr(L)


def test_restrictions_and_copies_start_without_the_graphs_of_another_matrix() -> None:
    model, loss, x, y = problem()
    matrix = DenseReference(model, loss, x, y).hessian()
    L = HessianOperator(model, loss, loader(x, y, 4)).linearize()
    v = vectors(L)
    L.apply(v)
    block = L.restricted(["2.bias"])
    assert relative_error(block.to_dense(), matrix[-3:, -3:]) < 1e-10
    for twin in (copy.deepcopy(L), pickle.loads(pickle.dumps(L))):
        assert torch.equal(twin.apply(v), L.apply(v))
        assert torch.equal(twin.apply(v), L.apply(v))


def test_data_that_are_not_kept_are_passed_over_once_for_each_product() -> None:
    model, loss, x, y = problem()

    class Loader:
        passes = 0

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            Loader.passes += 1
            return iter([(x[:6], y[:6]), (x[6:], y[6:])])

    L = HessianOperator(model, loss, Loader(), cache=False).linearize()
    v = vectors(L)
    for number in range(1, 4):
        L.apply(v)
        assert Loader.passes == number
    kept = HessianOperator(model, loss, Loader()).linearize()
    for _ in range(3):
        kept.apply(v)
    assert Loader.passes == 3 + 2  # loaded, and once more to compare


def test_what_has_no_graph_is_returned_as_it_is() -> None:
    identity = IdentityOperator(3)
    assert identity.linearize() is identity
    model, loss, x, y = problem()
    L = HessianOperator(model, loss, [(x, y)]).linearize()
    assert L.linearize() is L
    forward = HessianOperator(model, loss, [(x, y)], mode="rev-fwd")
    v = vectors(forward)
    assert relative_error(forward.linearize().apply(v), forward.apply(v)) < 1e-12


@pytest.mark.parametrize(("value", "error"), [(-1, ArgumentError), (1.5, ArgumentTypeError)])
def test_a_budget_is_a_number_of_bytes(value, error: type[Exception]) -> None:
    with pytest.raises(error, match="max_bytes"):
        IdentityOperator(3).linearize(max_bytes=value)


@pytest.mark.parametrize("model_name", [*MODELS, "attention"])
def test_the_size_of_a_graph_is_told_from_a_few_points(model_name: str) -> None:
    torch.manual_seed(0)
    if model_name == "attention":
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        model: nn.Module = nn.Sequential(layer, nn.Flatten(), nn.Linear(40, 3)).double()
        x = torch.randn(17, 5, 8).double()
    else:
        model, x = MODELS[model_name]().double(), torch.randn(17, 4).double()
    objective = Objective(model, nn.CrossEntropyLoss())

    def build(batch: Batch) -> object:
        leaves = differentiable(objective.params)
        with torch.enable_grad():
            value = objective.batch_loss(leaves, batch)
            return gradient_with_graph([value], None, list(leaves.values()))

    sizes = GraphSizes()
    with objective.kernels():
        for count in (17, 1, 2, 3, 5):
            batch = Batch.from_raw((x[:count], torch.zeros(count, dtype=torch.int64)))
            retained = RetainedBytes()
            with retained.counting():
                kept = build(batch)
            measured, estimated = retained.total, sizes.of(batch, build).num_bytes
            del kept
            assert abs(estimated - measured) <= 0.02 * measured + 64


def test_one_column_or_many_of_a_batch_operation_add_up_alike() -> None:
    model, loss, x, y = problem()
    operation = HessianBatchOperation(model, loss)
    batch = Batch.from_raw((x, y))
    rows = torch.randn(5, operation.space.size).double()
    total = torch.ones_like(rows)
    operation.linearized(batch)(rows, total, 2.0)
    assert relative_error(total, 1 + 2 * operation.apply((x, y), rows)) < 1e-12
