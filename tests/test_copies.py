"""Copies, pickles and moves of every public object: the same bits, nothing shared, no caches."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from copy_cases import (
    CASES,
    LAMBDA,
    OPERATORS,
    in_order,
    made,
    net,
    points,
    product,
    same_bits,
    vectors,
)
from reference import relative_error
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import hessops
import hessops.influence
from hessops import (
    BatchStream,
    CgOperator,
    DistributedAveraging,
    GeneralizedGaussNewtonOperator,
    HessianOperator,
    NystroemPreconditioner,
    Objective,
    SampleSpaceInverse,
    estimators,
)
from hessops.errors import CopyError, DeviceError, HessopsError
from hessops.influence import (
    CgInfluence,
    DaskInfluenceCalculator,
    DirectInfluence,
    Influence,
    InfluenceFunctionModel,
)
from hessops.snapshot import ModelSnapshot

# What is noted about the data in the first use; the data themselves are more.
NOTED_BYTES = 1800

Copying = Callable[[Any], Any]


def pickled(value: object) -> Any:
    return pickle.loads(pickle.dumps(value))


COPIES: dict[str, Copying] = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": pickled}


# --- all of them ---------------------------------------------------------------------------------

# Classes that others are made from; abstract in all but name.
BASES = {
    hessops.CompositeOperator,
    hessops.CurvatureOperator,
    hessops.FittedPreconditioner,
    hessops.TensorDictOperator,
    hessops.TensorOperator,
}
# Their cases are below: they need a process group, and a cluster.
OF_SEVERAL_PROCESSES = {DistributedAveraging, DaskInfluenceCalculator}


@cache
def other(name: str) -> tuple[type, object]:
    """The type of an object that is not used otherwise, and what is seen of it."""
    thing = CASES[name].make()
    return type(thing), copy.deepcopy(CASES[name].see(thing))


def seen(name: str) -> object:
    return other(name)[1]


def test_every_public_class_has_a_case() -> None:
    named = {getattr(m, n) for m in (hessops, estimators, hessops.influence) for n in m.__all__}
    classes = {value for value in named if isinstance(value, type)} - OF_SEVERAL_PROCESSES
    objects = {other(name)[0] for name in CASES}
    bases = {cls for cls in classes if inspect.isabstract(cls)} | BASES
    assert {cls.__name__ for cls in classes - objects - bases} == set()
    assert all(any(issubclass(kind, base) for kind in objects) for base in bases)


@pytest.mark.parametrize("name", CASES)
def test_copies_and_pickles_compute_the_same_bits_before_and_after_use(name: str) -> None:
    case = CASES[name]
    original = case.make()
    sizes = [len(pickle.dumps(original))]
    fresh = pickled(copy.deepcopy(original))
    assert same_bits(case.see(original), seen(name))
    sizes.append(len(pickle.dumps(original)))
    used = pickled(original), copy.deepcopy(copy.copy(original))
    assert same_bits(case.see(original), seen(name))
    sizes.append(len(pickle.dumps(original)))
    for twin in (fresh, *used):
        assert type(twin) is type(original)
        assert same_bits(case.see(twin), seen(name))
    # No data and no graphs are carried along, and nothing is added by more use.
    assert sizes[1] < sizes[0] + NOTED_BYTES + case.keeps
    assert sizes[2] <= sizes[1] + 8


class Found(pickle.Pickler):
    """Everything of some types that a pickle of an object would hold."""

    def __init__(self, value: object, *types: type) -> None:
        super().__init__(io.BytesIO())
        self.types, self.found = types, {}
        self.dump(value)

    def persistent_id(self, value: object) -> object:
        if isinstance(value, self.types):
            self.found[id(value)] = value
        return 0 if isinstance(value, Tensor) else None


def tensors_of(value: object) -> list[Tensor]:
    return [t for t in Found(value, Tensor).found.values() if t.numel()]


def storages(tensors: list[Tensor]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}


MOVING = [name for name, case in CASES.items() if case.moves is not None]


@pytest.mark.parametrize("name", MOVING)
def test_a_deep_copy_shares_nothing_that_can_be_written_to(name: str) -> None:
    case = CASES[name]
    original = case.make()
    case.see(original)
    twin = copy.deepcopy(original)
    ours, theirs = tensors_of(original), tensors_of(twin)
    assert not storages(ours) & storages(theirs)
    with torch.no_grad():
        for tensor in ours:
            tensor.zero_()
    if isinstance(original, (hessops.TensorOperator, hessops.BatchOperation, Objective)):
        with suppress(HessopsError):  # a matrix of zeros has no inverse
            original.refresh()
    assert same_bits(case.see(twin), seen(name))


@pytest.mark.parametrize("name", MOVING)
def test_to_takes_along_all_but_what_is_the_users_and_leaves_the_original(name: str) -> None:
    case = CASES[name]
    original = case.make()
    for _ in ("fresh", "used"):
        if case.moves:
            moved = tensors_of(original.to("meta"))
            left = [t for t in moved if t.is_floating_point() and not t.is_meta]
            assert storages(left) <= storages(tensors_of(list(of_the_user(original))))
        else:
            with pytest.raises(DeviceError, match="cannot be moved"):
                original.to("meta")
        assert same_bits(case.see(original.to("cpu")), seen(name))


def of_the_user(thing: object) -> Iterator[object]:
    """Models, losses and data, which stay where they are."""
    found = Found(thing, ModelSnapshot, BatchStream, InfluenceFunctionModel).found.values()
    for part in found:
        if isinstance(part, ModelSnapshot):
            yield from (part.users_model, part.users_loss)
        else:
            yield part.data if isinstance(part, BatchStream) else (part.model, part.loss)


# --- parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_what_is_shared_within_an_object_stays_shared(copied: Copying) -> None:
    H = made(HessianOperator, cache=True)
    blocks = [H.restricted([name]) for name in H.space.names] * 3
    whole = hessops.BlockDiagonalOperator(blocks)
    twin = copied(whole)
    assert len({id(block.stream) for block in twin.blocks}) == 1
    assert len({id(block) for block in twin.blocks}) == len(H.space.names)
    assert len(pickle.dumps(whole)) < len(pickle.dumps(H)) + 16_000
    first, second = copied((H + made(GeneralizedGaussNewtonOperator)).linearize()).terms
    assert first._graphs.memory is second._graphs.memory
    square = copied(H @ H)
    assert square.left is square.right


def test_a_structure_of_the_user_is_copied_as_one() -> None:
    model, data = net(), in_order()
    H = HessianOperator(model, nn.CrossEntropyLoss(), data)
    influence = CgInfluence(model, nn.CrossEntropyLoss(), LAMBDA).fit(data)
    twin = copy.deepcopy({"model": model, "H": H, "again": [H], "influence": influence})
    assert twin["again"][0] is twin["H"] is not H
    assert twin["influence"].model is twin["model"] is not model
    with torch.no_grad():
        twin["model"][0].weight.mul_(2)
        model[0].weight.mul_(3)
    moved, stayed = HessianOperator(twin["model"], nn.CrossEntropyLoss(), data), product(H)
    assert same_bits(product(twin["H"].refresh()), product(moved))
    assert same_bits(product(H), stayed)


@pytest.mark.parametrize("max_bytes", [None, 0])
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_refreshing_a_copy_or_the_original_leaves_the_other(
    copied: Copying, max_bytes: int | None
) -> None:
    model = net()
    L = HessianOperator(model, nn.CrossEntropyLoss(), in_order()).linearize(max_bytes)
    before = product(L)
    twin, other = copied(L), copied(L)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert same_bits(product(twin), before)
    # A shallow copy has the same model to refresh from, others have their own.
    assert same_bits(product(twin.refresh()), before) is not (copied is copy.copy)
    assert same_bits(product(L), before)
    assert not same_bits(product(L.refresh()), before)
    assert same_bits(product(other), before)


def test_what_is_found_again_is_left_behind() -> None:
    fitted = CASES["what was fitted"].make()
    names = set(vars(fitted))
    CASES["what was fitted"].see(fitted)
    assert set(vars(fitted)) > names
    for copied in COPIES.values():
        assert set(vars(copied(fitted))) == names


def test_what_is_kept_of_a_shuffled_loader_comes_in_the_same_order_in_a_copy() -> None:
    H = made(HessianOperator)
    product(H)
    torch.manual_seed(99)
    for copied in COPIES.values():
        torch.rand(3)
        order = [batch.x for batch in copied(H).stream]
        assert same_bits(order, [batch.x for batch in H.stream])


def test_a_fitted_preconditioner_and_a_gram_matrix_are_as_they_were() -> None:
    G = made(GeneralizedGaussNewtonOperator)
    inverse = CgOperator(G, LAMBDA, preconditioner=NystroemPreconditioner(3))
    inverse.solve(vectors(23))
    torch.manual_seed(1234)  # another sketch, were there a new one
    twin = pickled(inverse)
    assert same_bits(twin.fitted_preconditioner().apply(vectors(23)), product(inverse._fitted))
    sampled = SampleSpaceInverse(gauss_newton(), LAMBDA)
    sampled.solve(vectors(23))
    assert pickled(sampled)._factor is None


def gauss_newton() -> hessops.GaussNewtonOperator:
    return hessops.GaussNewtonOperator(net(), nn.CrossEntropyLoss(), [points(9)])


# --- what has no copy ----------------------------------------------------------------------------


def local_loss() -> Callable[[Tensor, Tensor], Tensor]:
    return lambda output, target: nn.functional.cross_entropy(output, target)


class WithFile(Dataset[tuple[Tensor, Tensor]]):
    """Points that are read from a file which is open."""

    def __init__(self, file: BufferedReader) -> None:
        self.file = file

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = points()
        return x[index], y[index]


class WithFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = net()
        self.inner[1].shape_of = lambda x: x.shape

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def of_loss(loss: Callable[[Tensor, Tensor], Tensor]) -> HessianOperator:
    return HessianOperator(net(), loss, in_order())


def unpacked() -> HessianOperator:
    return HessianOperator(net(), nn.CrossEntropyLoss(), in_order(), unpack=lambda raw: raw)


def generated() -> HessianOperator:
    class Loader:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            yield from in_order()

    return HessianOperator(net(), nn.CrossEntropyLoss(), Loader())


def local_recipe() -> Influence:
    return Influence(net(), nn.CrossEntropyLoss(), LAMBDA, inverse=lambda A: CgOperator(A))


UNPICKLED: dict[str, tuple[Callable[[], Any], str]] = {
    "loss": (lambda: of_loss(local_loss()), r"the loss of a PointLoss \(function\)"),
    "loss of a solver": (lambda: CgOperator(of_loss(local_loss())), "the loss of a PointLoss"),
    "loss of an influence model": (
        lambda: DirectInfluence(net(), local_loss()),
        r"the arguments\['loss'\] of a DirectInfluence \(function\)",
    ),
    "function of a module": (
        lambda: HessianOperator(WithFunction(), nn.CrossEntropyLoss(), in_order()),
        r"the model\.inner\.1\.shape_of of a ModelSnapshot \(function\)",
    ),
    "unpack": (unpacked, r"the unpack of a BatchStream \(function\)"),
    "loader": (generated, r"the dataloader of a BatchStream \(Loader\)"),
    "recipe": (local_recipe, r"the arguments\['inverse'\] of a Influence"),
}
UNCOPIED: dict[str, tuple[Callable[[BufferedReader], Any], str]] = {
    "file": (
        lambda file: BatchStream(DataLoader(WithFile(file))),
        r"the dataloader\.dataset\.file of a BatchStream \(BufferedReader\)",
    ),
    "lock": (
        lambda _: BatchStream([(torch.ones(2, 1), {"a": threading.Lock()})]),
        r"the dataloader\[0\]\[1\]\['a'\] of a BatchStream \(lock\)",
    ),
}


@pytest.mark.parametrize("part", UNPICKLED)
def test_what_cannot_be_pickled_is_named_and_can_be_copied(part: str) -> None:
    make, text = UNPICKLED[part]
    thing = make()
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        with pytest.raises(CopyError, match=text + ".* cannot be pickled.*Define (it|its)"):
            pickle.dumps(thing, protocol)
    with pytest.raises(pickle.PicklingError):
        torch.save(thing, io.BytesIO())
    assert type(copy.copy(thing)) is type(copy.deepcopy(thing)) is type(thing)
    # Which takes functions by value.
    assert type(pickle.loads(cloudpickle.dumps(thing))) is type(thing)


@pytest.mark.parametrize("part", UNCOPIED)
def test_what_can_be_neither_copied_nor_pickled_is_named(part: str) -> None:
    make, text = UNCOPIED[part]
    with Path(__file__).open("rb") as file:
        thing = make(file)
        with pytest.raises(CopyError, match=text + ".* cannot be pickled"):
            pickle.dumps(thing)
        with pytest.raises(CopyError, match=text + ".* cannot be copied"):
            copy.deepcopy([thing])
        assert copy.copy(thing).data is thing.data


def test_a_copy_within_the_process_has_the_same_process_group_and_a_pickle_none() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        averaging = DistributedAveraging()
        H = HessianOperator(net(), nn.CrossEntropyLoss(), in_order(), averaging=averaging)
        expected = product(H)
        for copied in (copy.copy, copy.deepcopy):
            assert same_bits(product(copied(H)), expected)
        with pytest.raises(CopyError, match=r"the group of a GroupOfProcesses .*cannot be pickled"):
            pickle.dumps(H)
    finally:
        dist.destroy_process_group()


def test_a_calculator_on_a_cluster_has_no_copy() -> None:
    calculator = DaskInfluenceCalculator.__new__(DaskInfluenceCalculator)
    for copied in (copy.deepcopy, pickled):
        with pytest.raises(CopyError, match=r"client of a DaskInfluenceCalculator .*this process"):
            copied([calculator])


def test_slots_and_states_of_a_subclass_are_honoured() -> None:
    for copied in COPIES.values():
        averaging = copied(Weighted(3.0))
        assert (averaging.power, averaging.restored) == (3.0, True)


class Weighted(hessops.Averaging):
    __slots__ = ("power", "restored")

    def __init__(self, power: float) -> None:
        self.power, self.restored = power, False

    def weight(self, num_points: int) -> float:
        return num_points**self.power

    def __getstate__(self) -> object:
        return {"of a user": self.power}

    def __setstate__(self, state: dict[str, float]) -> None:
        self.power, self.restored = state["of a user"], True


# --- other processes -----------------------------------------------------------------------------


class Products(Dataset[Tensor]):
    """Products with an operator, computed by whoever reads them."""

    def __init__(self, operator: hessops.TensorOperator) -> None:
        self.operator = operator

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Tensor:
        return product(self.operator)


def test_a_worker_of_a_loader_that_was_spawned_computes_the_same_product() -> None:
    operator = made(HessianOperator)
    workers = {"num_workers": 1, "multiprocessing_context": "spawn"}
    (found,) = DataLoader(Products(operator), batch_size=None, **workers)
    assert same_bits(found, product(operator))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in OPERATORS if OPERATORS[name].moves])
def test_operators_on_a_gpu_have_copies_there(name: str) -> None:
    original = CASES[name].make().to("cuda")
    expected = product(original)
    for copied in COPIES.values():
        found = product(copied(original))
        assert found.is_cuda
        assert relative_error(found, expected) < 1e-9
