"""Loaders that index whole batches: the bits, order and random draws of the loader itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)
from torch.utils.data._utils.collate import default_collate_fn_map

from hessops import BatchStream
from hessops.nested import map_tensors, tensor_leaves
from hessops.slicing import draws_from_torch_only, sliced

N = 23
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N)
POINTS = TensorDataset(X, Y)


def images(*shape: int) -> Tensor:
    return torch.arange(float(N)).reshape(N, *[1] * len(shape)) + torch.zeros(N, *shape)


def own() -> torch.Generator:
    return torch.Generator().manual_seed(3)


class Twice(TensorDataset):
    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(2 * tensor for tensor in super().__getitem__(index))


class InGroups(TensorDataset):
    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, ...]]:
        return [tuple(3 * tensor for tensor in self[index]) for index in indices]


class InGroupsSubset(Subset[tuple[Tensor, ...]]):
    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, ...]]:
        return [self.dataset[i] for i in reversed(indices)]


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index], Y[index]

    def __len__(self) -> int:
        return N


class FromNumpy(Sampler[int]):
    """Draws from a generator that is not torch's."""

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.permutation(N).tolist())  # noqa: NPY002

    def __len__(self) -> int:
        return N


class Backwards(DataLoader[tuple[Tensor, ...]]):
    def __iter__(self) -> Iterator[object]:  # type: ignore[override]  # of any kind
        return iter(list(super().__iter__())[::-1])


class WithGroups:
    """An attribute of one object, which a loader looks up as well."""

    def __new__(cls) -> TensorDataset:  # type: ignore[misc]  # a dataset that was patched
        dataset = TensorDataset(X, Y)
        dataset.__getitems__ = lambda indices: [(X[0], Y[0])] * len(indices)
        return dataset


SLICED: dict[str, Callable[[], DataLoader[object]]] = {
    "in order": lambda: DataLoader(POINTS, batch_size=4),
    "one by one": lambda: DataLoader(POINTS),
    "one batch": lambda: DataLoader(POINTS, batch_size=100),
    "drop_last": lambda: DataLoader(POINTS, batch_size=4, drop_last=True),
    "shuffled": lambda: DataLoader(POINTS, batch_size=4, shuffle=True),
    "shuffled, last dropped": lambda: DataLoader(POINTS, 4, shuffle=True, drop_last=True),
    "own generator": lambda: DataLoader(POINTS, batch_size=4, shuffle=True, generator=own()),
    "own generator, in order": lambda: DataLoader(POINTS, batch_size=4, generator=own()),
    "with replacement": lambda: DataLoader(POINTS, 4, sampler=RandomSampler(POINTS, True, 70)),
    "more than there are": lambda: DataLoader(
        POINTS, 4, sampler=RandomSampler(POINTS, num_samples=70, generator=own())
    ),
    "weighted": lambda: DataLoader(POINTS, 4, sampler=WeightedRandomSampler([1.0, 2.0] * 11, 30)),
    "random subset": lambda: DataLoader(POINTS, 4, sampler=SubsetRandomSampler(range(3, 12))),
    "a list as sampler": lambda: DataLoader(POINTS, 4, sampler=[5, 6, 7, 8, 2, 2, -1]),
    "numpy's order": lambda: DataLoader(POINTS, 4, sampler=FromNumpy()),
    "batch sampler": lambda: DataLoader(
        POINTS, batch_sampler=BatchSampler(SequentialSampler(POINTS), 5, True)
    ),
    "lists of lists": lambda: DataLoader(POINTS, batch_sampler=[[1, 2, 3], [7], [9, 8], (4, 5)]),
    "tensors of indices": lambda: DataLoader(
        POINTS, batch_sampler=[torch.tensor([1, 2]), torch.tensor([5])]
    ),
    "arrays of indices": lambda: DataLoader(
        POINTS, batch_sampler=[np.array([1, 2]), np.array([5])]
    ),
    "numbers of numpy": lambda: DataLoader(POINTS, 2, sampler=list(np.arange(5))),
    "truth values": lambda: DataLoader(POINTS, batch_sampler=[[True, True], [0, 1]]),
    "subset": lambda: DataLoader(Subset(POINTS, [3, 4, 5, 9, 1, -1]), 4, shuffle=True),
    "subset by range": lambda: DataLoader(Subset(POINTS, range(2, 20, 3)), batch_size=4),
    "subset by array": lambda: DataLoader(Subset(POINTS, np.arange(9)[::-1]), batch_size=4),
    "subset by tensor": lambda: DataLoader(Subset(POINTS, torch.arange(9)), batch_size=4),
    "subset by numbers of tensors": lambda: DataLoader(Subset(POINTS, list(torch.arange(9))), 4),
    "subset of a subset": lambda: DataLoader(
        Subset(Subset(POINTS, range(20, 4, -1)), [0, 1, 2, 3, 7, 5]), batch_size=4
    ),
    "numpy's memory": lambda: DataLoader(
        TensorDataset(torch.from_numpy(np.arange(3.0 * N).reshape(N, 3))), 4, shuffle=True
    ),
    "stacked datasets": lambda: DataLoader(StackDataset(POINTS, Subset(X, range(N))), 4),
    "stacked tensors": lambda: DataLoader(StackDataset(X, Y), 4, shuffle=True),
    "stacked by name": lambda: DataLoader(StackDataset(x=X, y=POINTS), 4, shuffle=True),
    "bare tensor": lambda: DataLoader(X, batch_size=4),
    "images": lambda: DataLoader(TensorDataset(images(2, 4, 5)), 4, shuffle=True),
    "images of one pixel": lambda: DataLoader(TensorDataset(images(5, 1, 1)), 4),
    "images of one channel": lambda: DataLoader(TensorDataset(images(1, 4, 4)), 4),
    "channels last": lambda: DataLoader(
        TensorDataset(images(4, 5, 3).permute(0, 3, 1, 2)), 4, shuffle=True
    ),
    "every other point": lambda: DataLoader(TensorDataset(torch.randn(2 * N, 3)[::2]), 4),
    "one value for all": lambda: DataLoader(TensorDataset(torch.ones(1, 3).expand(N, 3)), 4),
    "points without entries": lambda: DataLoader(TensorDataset(torch.ones(N, 0), Y), 4),
    "complex": lambda: DataLoader(TensorDataset(torch.randn(N, 2, dtype=torch.complex64)), 4),
    "bfloat16": lambda: DataLoader(TensorDataset(X.to(torch.bfloat16), Y > 3), 4, shuffle=True),
}
LEFT_ALONE: dict[str, Callable[[], Iterable[object]]] = {
    "no batches": lambda: DataLoader(POINTS, batch_size=None),
    "batches by the sampler": lambda: DataLoader(
        POINTS, batch_size=None, sampler=BatchSampler(SequentialSampler(POINTS), 4, False)
    ),
    "subclass": lambda: DataLoader(Twice(X, Y), batch_size=4),
    "subclass of groups": lambda: DataLoader(InGroups(X, Y), batch_size=4),
    "subclass of a subset": lambda: DataLoader(InGroupsSubset(POINTS, range(9)), batch_size=4),
    "subset of a subclass": lambda: DataLoader(Subset(InGroups(X, Y), range(9)), batch_size=4),
    "stacked subclass": lambda: DataLoader(StackDataset(Twice(X, Y), X), batch_size=4),
    "patched dataset": lambda: DataLoader(WithGroups(), batch_size=4),
    "other dataset": lambda: DataLoader(Pairs(), batch_size=4),
    "list of points": lambda: DataLoader(list(zip(X, Y, strict=True)), batch_size=4),
    "subclass of the loader": lambda: Backwards(POINTS, batch_size=4),
    "collate_fn": lambda: DataLoader(POINTS, 4, collate_fn=lambda p: default_collate(p[::-1])),
    "conjugate": lambda: DataLoader(TensorDataset((torch.ones(N, 2) * 1j).conj()), batch_size=4),
    "gradients": lambda: DataLoader(TensorDataset(X.clone().requires_grad_()), batch_size=4),
    "list of batches": lambda: [(X, Y)],
}


def batches_and_state(
    build: Callable[[], Iterable[object]], read: Callable[[Iterable[object]], Iterable[object]]
) -> tuple[list[object], list[object]]:
    """The batches of two passes, the second one abandoned, and the states they leave behind."""
    torch.manual_seed(11)
    np.random.seed(11)  # noqa: NPY002
    loader = build()
    batches = list(read(loader))
    batches.append(next(iter(read(loader))))
    states: list[object] = [torch.get_rng_state().tolist(), float(np.random.rand())]  # noqa: NPY002
    generators = [getattr(loader, "generator", None)]
    generators.append(getattr(getattr(loader, "sampler", None), "generator", None))
    return batches, states + [g.get_state().tolist() for g in generators if g is not None]


def layout(batch: object) -> object:
    return [(t.dtype, t.shape, t.stride(), t.is_contiguous()) for t in tensor_leaves(batch)]


@pytest.mark.parametrize("name", [*SLICED, *LEFT_ALONE])
def test_batches_and_random_draws_are_those_of_the_loader(name: str) -> None:
    build = (SLICED | LEFT_ALONE)[name]
    expected, states_after = batches_and_state(build, lambda loader: loader)
    actual, states = batches_and_state(build, sliced)
    assert states == states_after
    as_lists = [map_tensors(Tensor.tolist, batch) for batch in actual]
    assert as_lists == [map_tensors(Tensor.tolist, batch) for batch in expected]
    assert [type(batch) for batch in actual] == [type(batch) for batch in expected]
    assert list(map(layout, actual)) == list(map(layout, expected))


@pytest.mark.parametrize("name", SLICED)
def test_known_loaders_are_sliced(name: str) -> None:
    assert sliced(loader := SLICED[name]()) is not loader


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_others_are_iterated_as_they_are(name: str) -> None:
    assert sliced(data := LEFT_ALONE[name]()) is data


def test_points_are_not_collated_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(TensorDataset, "__getitem__")
    loader = sliced(DataLoader(Subset(POINTS, range(2, 20)), batch_size=4, shuffle=True))
    assert sum(len(x) for x, _ in loader) == 18  # type: ignore[misc]  # pairs


@pytest.mark.parametrize("loader_of", [lambda: POINTS, lambda: Subset(POINTS, range(5))])
def test_an_index_beyond_the_data_is_the_loaders_error(
    loader_of: Callable[[], Dataset[object]],
) -> None:
    loader = DataLoader(loader_of(), batch_sampler=[[0, N]])
    with pytest.raises(IndexError) as expected:
        list(loader)
    with pytest.raises(IndexError) as actual:
        list(sliced(loader))
    assert str(actual.value) == str(expected.value)


@pytest.mark.parametrize("shuffle", [False, True])
def test_writing_to_a_batch_does_not_write_to_the_data(shuffle: bool) -> None:
    dataset = TensorDataset(X.clone())
    for (x,) in sliced(DataLoader(dataset, batch_size=4, shuffle=shuffle)):  # type: ignore[misc]
        x.zero_()
    assert torch.equal(dataset.tensors[0], X)


def test_the_users_loader_is_left_as_it_is() -> None:
    loader = DataLoader(POINTS, batch_size=4)
    before = dict(vars(loader))
    list(sliced(loader))
    assert vars(loader) == before


def test_a_collation_that_the_user_has_registered_is_honoured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loader = DataLoader(POINTS, batch_size=4)
    monkeypatch.setitem(default_collate_fn_map, tuple, lambda batch, collate_fn_map: len(batch))
    assert sliced(loader) is loader


def test_a_tensor_of_inference_mode_gives_ordinary_batches() -> None:
    with torch.inference_mode():
        loader = DataLoader(TensorDataset(X.clone()), batch_size=4)
    expected = [x.is_inference() for (x,) in loader]
    assert [x.is_inference() for (x,) in sliced(loader)] == expected  # type: ignore[misc]


def test_only_samplers_that_are_known_are_said_to_draw_from_torch_alone() -> None:
    known = {name for name, build in SLICED.items() if draws_from_torch_only(sliced(build()))}
    assert {"in order", "shuffled", "weighted", "random subset", "batch sampler"} <= known
    assert not known & {"numpy's order", "a list as sampler", "lists of lists"}
    unknown = set(LEFT_ALONE) - {"list of batches"}
    assert not any(draws_from_torch_only(sliced(LEFT_ALONE[name]())) for name in unknown)


@pytest.mark.parametrize("name", ["shuffled", "own generator", "weighted", "numpy's order"])
def test_a_stream_gives_the_order_it_gave_with_the_loader_itself(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_pass() -> list[object]:
        torch.manual_seed(5)
        np.random.seed(5)  # noqa: NPY002
        return [batch.y.tolist() for batch in BatchStream(SLICED[name](), cache=False)]

    actual = first_pass()
    monkeypatch.setattr("hessops.streaming.sliced", lambda data: data)
    assert actual == first_pass()
