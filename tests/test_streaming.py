"""Batch and BatchStream: the same points in every pass, counted, on one device, or refused."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from hessops import Batch, BatchStream
from hessops.errors import (
    ArgumentError,
    ArgumentTypeError,
    DataChangedError,
    DataError,
    HessopsError,
    OneShotDataError,
)
from hessops.nested import map_tensors, tensor_leaves

N = 10


def points() -> TensorDataset:
    """x holds the number of the point in every entry, y twice that number."""
    number = torch.arange(N, dtype=torch.float32)
    return TensorDataset(number.unsqueeze(1).expand(N, 3).clone(), 2 * number)


def pairs(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    x, y = points().tensors
    return list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))


def numbers(stream: Iterable[Batch]) -> list[float]:
    """The numbers of the points of one pass, in the order they came."""
    return [value for batch in stream for value in leaf(batch.x)[:, 0].tolist()]


def leaf(nested: object) -> Tensor:
    return next(tensor_leaves(nested))


def sizes(stream: Iterable[Batch]) -> list[int]:
    return [batch.size for batch in stream]


def make_passes(stream: BatchStream, count: int) -> None:
    for _ in range(count):
        list(stream)


class Reversed(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(N - 1, -1, -1))

    def __len__(self) -> int:
        return N


class Streamed(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(points())


class Exhausted(IterableDataset):
    """Gives its points once, as a file that was read to its end."""

    def __init__(self) -> None:
        self.iterator = iter(points())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.iterator


class Remade:
    """Any object that makes its batches anew for every pass; the pass number is an argument."""

    def __init__(self, make: Callable[[int], list[object]]) -> None:
        self.make, self.passes = make, 0

    def __iter__(self) -> Iterator[object]:
        self.passes += 1
        return iter(self.make(self.passes))


# --- what is replayed ----------------------------------------------------------------------------


def _as_is(batch: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    x, y = zip(*batch, strict=True)
    return {"x": torch.stack(x), "y": torch.stack(y)}


def _xy(raw: object) -> tuple[object, object]:
    return raw["x"], raw["y"]  # type: ignore[index]


IN_ORDER = [float(i) for i in range(N)]
LOADERS: dict[str, tuple[Callable[[], Iterable[object]], list[int], list[float]]] = {
    "list": (lambda: pairs(4, 4, 2), [4, 4, 2], IN_ORDER),
    "tuple of lists": (lambda: tuple([x, y] for x, y in pairs(5, 5)), [5, 5], IN_ORDER),
    "batches": (lambda: [Batch.from_raw(pair) for pair in pairs(7, 3)], [7, 3], IN_ORDER),
    "loader": (lambda: DataLoader(points(), batch_size=4), [4, 4, 2], IN_ORDER),
    "drop_last": (lambda: DataLoader(points(), batch_size=4, drop_last=True), [4, 4], IN_ORDER[:8]),
    "sampler": (
        lambda: DataLoader(points(), batch_size=5, sampler=Reversed()),
        [5, 5],
        IN_ORDER[::-1],
    ),
    "batch sampler": (
        lambda: DataLoader(
            points(), batch_sampler=BatchSampler(SequentialSampler(range(N)), 3, False)
        ),
        [3, 3, 3, 1],
        IN_ORDER,
    ),
    "iterable dataset": (lambda: DataLoader(Streamed(), batch_size=6), [6, 4], IN_ORDER),
    "object that iterates": (lambda: Remade(lambda _: pairs(6, 4)), [6, 4], IN_ORDER),
    "empty batch among others": (lambda: pairs(4, 0, 6), [4, 6], IN_ORDER),
}


@pytest.mark.parametrize("cache", ["auto", False])
@pytest.mark.parametrize("name", LOADERS)
def test_every_pass_gives_the_loaders_batches_in_the_loaders_order(
    name: str, cache: str | bool
) -> None:
    build, expected_sizes, expected_numbers = LOADERS[name]
    stream = BatchStream(build(), cache=cache)
    for _ in range(3):
        batches = list(stream)
        assert sizes(batches) == expected_sizes
        assert numbers(batches) == expected_numbers


@pytest.mark.parametrize("name", LOADERS)
def test_points_are_counted_in_the_first_whole_pass(name: str) -> None:
    build, _, expected = LOADERS[name]
    stream = BatchStream(build())
    assert stream.num_points is None
    list(stream)
    assert stream.num_points == len(expected)


def test_workers_load_the_same_points() -> None:
    loader = DataLoader(points(), batch_size=4, shuffle=True, num_workers=2)
    stream = BatchStream(loader, cache=False)
    assert sorted(numbers(stream)) == IN_ORDER
    assert sorted(numbers(stream)) == IN_ORDER


def test_collate_fn_is_honoured() -> None:
    loader = DataLoader(points(), batch_size=4, collate_fn=_as_is)
    assert numbers(BatchStream(loader, unpack=_xy)) == IN_ORDER


def test_unpack_reads_batches_of_any_form() -> None:
    batches = [{"x": x, "y": y, "note": "kept out"} for x, y in pairs(4, 6)]
    stream = BatchStream(batches, unpack=_xy)
    assert (sizes(stream), numbers(stream)) == ([4, 6], IN_ORDER)


NESTINGS: dict[str, Callable[[Tensor], object]] = {
    "tuple": lambda x: (x, x + 1),
    "list": lambda x: [x, x + 1],
    "mapping": lambda x: {"a": x, "b": {"c": x + 1}},
    "with something shared": lambda x: {"a": x, "mode": "train", "scale": torch.tensor(2.0)},
}


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("nesting", NESTINGS)
def test_inputs_and_targets_may_be_nested(nesting: str, cache: bool) -> None:
    nest = NESTINGS[nesting]
    stream = BatchStream([(nest(x), nest(y)) for x, y in pairs(4, 6)], cache=cache)
    list(stream)
    for batch, (x, y) in zip(stream, pairs(4, 6), strict=True):
        assert_equal_nesting(batch.x, nest(x))
        assert_equal_nesting(batch.y, nest(y))


def assert_equal_nesting(actual: object, expected: object) -> None:
    assert type(actual) is type(expected)
    assert map_tensors(Tensor.tolist, actual) == map_tensors(Tensor.tolist, expected)


def test_targets_may_be_none() -> None:
    assert [batch.y for batch in BatchStream([(torch.zeros(3, 2), None)])] == [None]


def test_inputs_may_have_no_entries_per_point() -> None:
    assert sizes(BatchStream([((torch.zeros(3, 2), torch.zeros(3, 0)), torch.zeros(3))])) == [3]


def test_batches_are_moved_to_the_device() -> None:
    stream = BatchStream([({"a": torch.zeros(3, 2)}, (torch.zeros(3),))], device="meta")
    assert {t.device.type for batch in stream for t in tensor_leaves((batch.x, batch.y))} == {
        "meta"
    }


def test_a_stream_moves_with_its_kept_batches() -> None:
    stream = BatchStream(pairs(10), cache=True)
    list(stream)
    moved = stream.to("meta")
    assert moved.is_cached
    assert {leaf(batch.x).device.type for batch in moved} == {"meta"}


def test_batches_carry_no_graph() -> None:
    x = torch.ones(3, 2, requires_grad=True)
    assert [leaf(batch.x).requires_grad for batch in BatchStream([(x, None)])] == [False]


def test_batches_made_in_inference_mode_can_be_differentiated() -> None:
    with torch.inference_mode():
        data = [(torch.ones(3, 2), None)]
    batch = next(iter(BatchStream(data)))
    weight = torch.ones(2, requires_grad=True)
    (leaf(batch.x) @ weight).sum().backward()
    assert weight.grad is not None


# --- what is refused -----------------------------------------------------------------------------


def _generator() -> Iterator[tuple[Tensor, Tensor]]:
    yield from pairs(4, 6)


class ListDataset(Dataset):
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return points()[index]

    def __len__(self) -> int:
        return N


NOT_DATA: dict[str, tuple[Callable[[], object], type[HessopsError], str]] = {
    "generator": (_generator, OneShotDataError, "one-shot"),
    "iterator": (lambda: iter(pairs(4, 6)), OneShotDataError, "one-shot"),
    "map": (lambda: map(tuple, pairs(4, 6)), OneShotDataError, "one-shot"),
    "iterator of a loader": (
        lambda: iter(DataLoader(points(), batch_size=4)),
        OneShotDataError,
        "one-shot",
    ),
    "dataset": (points, ArgumentTypeError, "DataLoader"),
    "dataset of one's own": (ListDataset, ArgumentTypeError, "DataLoader"),
    "tensor": (lambda: torch.zeros(4, 3), ArgumentTypeError, "batches"),
    "mapping": (lambda: {"x": torch.zeros(4, 3)}, ArgumentTypeError, "batches"),
    "string": (lambda: "digits", ArgumentTypeError, "batches"),
    "number": (lambda: 3, ArgumentTypeError, "batches"),
    "empty list": (list, DataError, "empty"),
    "empty loader": (lambda: DataLoader(points(), batch_sampler=[]), DataError, "empty"),
    "everything dropped": (
        lambda: DataLoader(points(), batch_size=64, drop_last=True),
        DataError,
        "empty",
    ),
}


@pytest.mark.parametrize("case", NOT_DATA)
def test_what_cannot_be_replayed_is_refused_at_once(case: str) -> None:
    build, error, text = NOT_DATA[case]
    with pytest.raises(error, match="dataloader") as caught:
        BatchStream(build())  # type: ignore[arg-type]
    caught.match(text)


EMPTY: dict[str, Callable[[], Iterable[object]]] = {
    "no length and no batches": lambda: Remade(lambda _: []),
    "empty batches only": lambda: [(torch.zeros(0, 3), torch.zeros(0))],
    "iterable dataset": lambda: DataLoader(Streamed(), batch_size=64, drop_last=True),
}


@pytest.mark.parametrize("case", EMPTY)
def test_a_pass_without_points_is_refused(case: str) -> None:
    stream = BatchStream(EMPTY[case]())
    with pytest.raises(DataError, match="empty"):
        list(stream)


@pytest.mark.parametrize("cache", ["auto", True, False])
def test_a_stream_that_is_exhausted_after_a_pass_is_refused(cache: str | bool) -> None:
    stream = BatchStream(DataLoader(Exhausted(), batch_size=4), cache=cache)
    list(stream)
    with pytest.raises(OneShotDataError, match="once"):
        list(stream)


X, Y = torch.zeros(4, 3), torch.zeros(4)
BAD_BATCHES: dict[str, tuple[object, str]] = {
    "x and y disagree": ((X, Y[:3]), "x has 4, y has 3"),
    "inputs disagree": (((X, X[:2]), Y), r"x\[0\] has 4, x\[1\] has 2"),
    "targets disagree": ((X, {"a": Y, "b": Y[:1]}), r"y\['a'\] has 4, y\['b'\] has 1"),
    "scalar y": ((X, Y[0]), "y has no leading dimension"),
    "scalar x": ((X[0, 0], Y), "x has no leading dimension"),
    "one tensor": (X, "unpack"),
    "three parts": ((X, Y, Y), "unpack"),
    "mapping": ({"x": X, "y": Y}, "unpack"),
    "no tensor": (([[0.0]], [0.0]), "x holds no tensor"),
    "arrays": ((np.zeros((4, 3)), np.zeros(4)), "x holds no tensor"),
    "sparse": ((torch.eye(4).to_sparse(), Y), "x is sparse"),
    "batch with another size": (Batch(X, Y, size=3), "size is 3"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_a_batch_that_is_none_is_an_error_naming_the_part(case: str) -> None:
    raw, text = BAD_BATCHES[case]
    with pytest.raises(DataError, match=text):
        list(BatchStream([(X, Y), raw]))


def test_the_error_names_the_position_of_the_batch() -> None:
    with pytest.raises(DataError, match="batch 2"):
        list(BatchStream([(X, Y), (X, Y), (X, Y[:1])]))


def test_unpack_that_gives_no_pair_is_refused() -> None:
    with pytest.raises(DataError, match="unpack returns"):
        list(BatchStream([(X, Y)], unpack=lambda raw: raw[0]))  # type: ignore[index]


# --- the cache -----------------------------------------------------------------------------------

BYTES = N * (3 + 1) * 4
COPIES: dict[str, Callable[[BatchStream], BatchStream]] = {
    "pickled": lambda stream: pickle.loads(pickle.dumps(stream)),
    "deep": copy.deepcopy,
    "shallow": copy.copy,
}
CACHE_MODES: dict[str, tuple[str | bool | int, bool]] = {
    "auto": ("auto", True),
    "always": (True, True),
    "never": (False, False),
    "enough bytes": (BYTES, True),
    "too few bytes": (BYTES - 1, False),
    "no bytes": (0, False),
}


@pytest.mark.parametrize("mode", CACHE_MODES)
def test_batches_are_kept_when_all_of_them_fit(mode: str) -> None:
    cache, kept = CACHE_MODES[mode]
    stream = BatchStream(pairs(4, 4, 2), cache=cache)
    list(stream)
    assert stream.is_cached is kept


@pytest.mark.parametrize("cache", ["Auto", "yes", -1, 0.5, None], ids=repr)
def test_unknown_cache_modes_are_refused(cache: object) -> None:
    with pytest.raises(ArgumentError, match="cache"):
        BatchStream(pairs(10), cache=cache)  # type: ignore[arg-type]


def test_part_of_a_stream_is_never_kept() -> None:
    loader = DataLoader(points(), batch_size=4, shuffle=True)
    stream = BatchStream(loader, cache=BYTES - 1)
    for _ in range(3):
        assert sorted(numbers(stream)) == IN_ORDER


def test_kept_batches_are_loaded_twice_and_no_more() -> None:
    data = Remade(lambda _: pairs(4, 6))
    stream = BatchStream(data)
    make_passes(stream, 5)
    assert data.passes == 2


def test_kept_batches_keep_the_order_of_the_first_pass() -> None:
    stream = BatchStream(DataLoader(points(), batch_size=4, shuffle=True))
    first = numbers(stream)
    assert [numbers(stream), numbers(stream)] == [first, first]


def test_batches_that_are_not_kept_follow_the_loaders_new_order() -> None:
    stream = BatchStream(DataLoader(points(), batch_size=4, shuffle=True), cache=False)
    assert numbers(stream) != numbers(stream)


def test_kept_batches_do_not_share_the_users_memory() -> None:
    data = pairs(4, 6)
    stream = BatchStream(data, cache=True)
    make_passes(stream, 2)
    for x, _ in data:
        x.fill_(-1)
    assert numbers(stream) == IN_ORDER


def test_kept_batches_do_not_share_a_buffer_that_the_loader_fills_anew() -> None:
    buffer = torch.empty(5, 3)

    class Reader:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for x, y in pairs(5, 5):
                yield buffer.copy_(x), y

    stream = BatchStream(Reader(), cache=True)
    make_passes(stream, 2)
    assert numbers(stream) == IN_ORDER


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_carries_no_batches_and_keeps_its_own(copied: str) -> None:
    stream = BatchStream(DataLoader(points(), batch_size=4), cache=True)
    make_passes(stream, 2)
    copy_of = COPIES[copied](stream)
    assert (copy_of.is_cached, stream.is_cached) == (False, True)
    assert (copy_of.num_points, copy_of.fingerprint) == (N, stream.fingerprint)
    assert numbers(copy_of) == IN_ORDER
    assert copy_of.is_cached


def test_a_pickled_stream_is_as_large_as_its_data() -> None:
    stream = BatchStream([(torch.ones(100, 100), None)], cache=True)
    before = len(pickle.dumps(stream))
    make_passes(stream, 2)
    assert len(pickle.dumps(stream)) < before + 2000


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_of_which_the_data_have_changed_is_refused(copied: str, passes: int) -> None:
    stream = BatchStream(pairs(4, 6), cache=True)
    make_passes(stream, passes)
    copy_of = COPIES[copied](stream)
    copy_of.data[0][0][0, 0] += 1  # type: ignore[index]  # a list of pairs
    with pytest.raises(DataChangedError):
        list(copy_of)


# --- data that change ----------------------------------------------------------------------------


class Augmented(Dataset):
    def __init__(self, noise: Callable[[], float]) -> None:
        self.noise = noise

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = points()[index]
        return x + self.noise(), y

    def __len__(self) -> int:
        return N


NOISES: dict[str, Callable[[], float]] = {
    "torch": lambda: torch.rand(()).item(),
    "numpy": np.random.rand,
    "python": random.random,
}


@pytest.mark.parametrize("cache", ["auto", True, False])
@pytest.mark.parametrize("noise", NOISES)
def test_random_augmentation_is_refused_in_the_second_pass(noise: str, cache: str | bool) -> None:
    stream = BatchStream(DataLoader(Augmented(NOISES[noise]), batch_size=4), cache=cache)
    list(stream)
    with pytest.raises(DataChangedError, match="augmentation"):
        list(stream)


def test_augmentation_in_workers_is_refused() -> None:
    loader = DataLoader(Augmented(NOISES["torch"]), batch_size=5, num_workers=2)
    stream = BatchStream(loader)
    list(stream)
    with pytest.raises(DataChangedError):
        list(stream)


def test_augmentation_is_refused_after_a_move() -> None:
    stream = BatchStream(DataLoader(Augmented(NOISES["torch"]), batch_size=4), cache=False)
    list(stream)
    moved = stream.to("cpu")
    with pytest.raises(DataChangedError):
        make_passes(moved, 2)


CHANGING: dict[str, Callable[[], Iterable[object]]] = {
    "more points": lambda: Remade(lambda i: pairs(4, 4, 2)[:i]),
    "points seen twice": lambda: Remade(lambda i: pairs(4, 6) + pairs(4, 6)[: i - 1]),
    "sampler with replacement": lambda: DataLoader(
        points(), batch_size=4, sampler=RandomSampler(range(N), replacement=True)
    ),
    "weighted sampler": lambda: DataLoader(
        points(), batch_size=4, sampler=WeightedRandomSampler([1.0] * N, N)
    ),
    "shuffle and drop_last": lambda: DataLoader(
        points(), batch_size=4, shuffle=True, drop_last=True
    ),
    "scalar of the batch": lambda: Remade(
        lambda i: [({"x": x, "noise": torch.tensor(float(i))}, y) for x, y in pairs(4, 6)]
    ),
}


@pytest.mark.parametrize("case", CHANGING)
def test_other_points_in_another_pass_are_refused(case: str) -> None:
    stream = BatchStream(CHANGING[case](), cache=False)
    with pytest.raises(DataChangedError, match="dataloader"):
        make_passes(stream, 3)


def test_writing_to_a_list_of_batches_between_passes_is_refused() -> None:
    data = pairs(4, 6)
    stream = BatchStream(data)
    list(stream)
    data[0][0][0, 0] += 1
    with pytest.raises(DataChangedError):
        list(stream)


@pytest.mark.parametrize("cache", [True, False])
def test_a_shuffled_order_is_accepted(cache: bool) -> None:
    stream = BatchStream(DataLoader(points(), batch_size=3, shuffle=True), cache=cache)
    for _ in range(3):
        assert sorted(numbers(stream)) == IN_ORDER


def two_passes(first: list[object], second: list[object]) -> None:
    """A stream whose second pass gives other batches."""
    stream = BatchStream(Remade(lambda i: first if i == 1 else second), cache=False)
    list(stream)
    list(stream)


DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def some_values(dtype: torch.dtype) -> Tensor:
    """(5, 4) zeros and ones, as any dtype can hold them."""
    return (torch.arange(20).reshape(5, 4) % 3 == 0).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_order_and_grouping_of_points_do_not_matter(dtype: torch.dtype) -> None:
    x, y = some_values(dtype), torch.arange(5)
    order = torch.randperm(5)
    whole = [(x, y)]
    shuffled = list(zip(x[order].split(2), y[order].split(2), strict=True))
    two_passes(whole, shuffled)


@pytest.mark.parametrize("position", [(0, 0), (2, 3), (4, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_change_of_any_element_is_seen(dtype: torch.dtype, position: tuple[int, int]) -> None:
    x = some_values(dtype)
    changed = x.clone()
    changed[position] = not bool(x[position])
    with pytest.raises(DataChangedError):
        two_passes([(x, None)], [(changed, None)])


def test_a_change_of_the_last_bit_is_seen() -> None:
    x = torch.ones(3, 2, dtype=torch.float64)
    changed = x.clone()
    changed[1, 1] = np.nextafter(1.0, 2.0)
    with pytest.raises(DataChangedError):
        two_passes([(x, None)], [(changed, None)])


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.is_floating_point], ids=str)
@pytest.mark.parametrize("flipped", [[0], [0, 1], [1, 3], [0, 1, 2, 3]], ids=str)
def test_flipped_signs_are_seen(dtype: torch.dtype, flipped: list[int]) -> None:
    x = torch.randn(3, 4).to(dtype)
    changed = x.clone()
    changed[:, flipped] *= -1
    with pytest.raises(DataChangedError):
        two_passes([(x, None)], [(changed, None)])


def test_conjugated_values_are_seen() -> None:
    x = torch.randn(3, 4, dtype=torch.complex64)
    with pytest.raises(DataChangedError):
        two_passes([(x, None)], [(x.conj(), None)])


def test_swapped_targets_are_seen() -> None:
    x, y = torch.randn(4, 3), torch.arange(4)
    with pytest.raises(DataChangedError):
        two_passes([(x, y)], [(x, y[[1, 0, 2, 3]])])


def test_swapped_inputs_are_seen() -> None:
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    with pytest.raises(DataChangedError):
        two_passes([((a, b), None)], [((b, a), None)])


def test_features_exchanged_between_points_are_seen() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    changed = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    with pytest.raises(DataChangedError):
        two_passes([(x, None)], [(changed, None)])


def test_a_point_that_replaces_another_is_seen() -> None:
    x = torch.randn(3, 2)
    with pytest.raises(DataChangedError):
        two_passes([(x, None)], [(x[[0, 0, 2]], None)])


# --- random state --------------------------------------------------------------------------------


@pytest.mark.parametrize("generator", [None, 7], ids=["global", "own"])
@pytest.mark.parametrize("cache", [True, False])
def test_a_pass_leaves_the_global_random_state(cache: bool, generator: int | None) -> None:
    own = None if generator is None else torch.Generator().manual_seed(generator)
    loader = DataLoader(points(), batch_size=3, shuffle=True, generator=own)
    stream = BatchStream(loader, cache=cache)
    before = torch.get_rng_state()
    for _ in range(3):
        for _ in stream:
            assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_abandoned_pass_leaves_the_global_random_state() -> None:
    before = torch.get_rng_state()
    next(iter(BatchStream(DataLoader(points(), batch_size=3, shuffle=True))))
    assert torch.equal(torch.get_rng_state(), before)


class ShuffledByHand:
    """Draws its order from the global generators of numpy and Python, as many samplers do."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = pairs(*[1] * N)
        np.random.shuffle(order)  # noqa: NPY002
        random.shuffle(order)
        return iter(order)


def test_a_pass_leaves_the_random_states_of_numpy_and_python() -> None:
    before = (np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002
    make_passes(BatchStream(ShuffledByHand(), cache=False), 2)
    after = (np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002
    assert after == before


def test_streams_made_alike_draw_alike() -> None:
    streams = [BatchStream(ShuffledByHand(), cache=False) for _ in range(2)]
    first, second = ([numbers(stream), numbers(stream)] for stream in streams)
    assert first == second
    assert first[0] != first[1]


def shuffled_order(seed: int, draws_before: int = 0) -> list[float]:
    torch.manual_seed(seed)
    torch.rand(draws_before)
    return numbers(BatchStream(DataLoader(points(), batch_size=3, shuffle=True)))


def test_manual_seed_decides_the_shuffled_order() -> None:
    assert shuffled_order(1) == shuffled_order(1, draws_before=5)
    assert shuffled_order(1) != shuffled_order(2)


def test_a_loaders_own_generator_decides_where_it_has_one() -> None:
    def order(seed: int) -> list[float]:
        torch.manual_seed(seed)
        own = torch.Generator().manual_seed(5)
        loader = DataLoader(points(), batch_size=3, shuffle=True, generator=own)
        return numbers(BatchStream(loader))

    assert order(1) == order(2)


# --- progress ------------------------------------------------------------------------------------


@pytest.mark.parametrize("progress", [True, False])
def test_a_progress_bar_is_shown_on_request_only(
    progress: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    list(BatchStream(pairs(4, 6), progress=progress))
    out, err = capsys.readouterr()
    assert out == ""
    assert ("batches" in err) is progress


# --- passes that do not end ----------------------------------------------------------------------


@pytest.mark.parametrize("progress", [True, False])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("earlier_passes", [0, 1, 2])
def test_an_abandoned_pass_leaves_the_stream_usable(
    earlier_passes: int, cache: bool, progress: bool
) -> None:
    stream = BatchStream(
        DataLoader(points(), batch_size=3, shuffle=True), cache=cache, progress=progress
    )
    make_passes(stream, earlier_passes)
    for _ in stream:
        break
    for _ in range(2):
        assert sorted(numbers(stream)) == IN_ORDER
    assert stream.num_points == N


class Failing(Dataset):
    """Fails on one point as often as it is told to."""

    def __init__(self, index: int) -> None:
        self.index, self.failures = index, 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == self.index and self.failures:
            self.failures -= 1
            raise OSError("unreadable")
        return points()[index]

    def __len__(self) -> int:
        return N


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("earlier_passes", [0, 1])
@pytest.mark.parametrize("index", [0, 4, 9])
def test_an_error_of_the_data_comes_through_and_the_stream_works_afterwards(
    index: int, earlier_passes: int, cache: bool
) -> None:
    data = Failing(index)
    stream = BatchStream(DataLoader(data, batch_size=3), cache=cache)
    data.failures = 0
    make_passes(stream, earlier_passes)
    data.failures = 1
    before = torch.get_rng_state()
    with pytest.raises(OSError, match="unreadable"):
        list(stream)
    assert torch.equal(torch.get_rng_state(), before)
    for _ in range(2):
        assert numbers(stream) == IN_ORDER


def test_two_passes_may_run_at_once() -> None:
    stream = BatchStream(pairs(4, 4, 2))
    assert [(a.size, b.size) for a, b in zip(stream, stream, strict=True)] == [
        (4, 4),
        (4, 4),
        (2, 2),
    ]
    assert numbers(stream) == IN_ORDER


# --- batches -------------------------------------------------------------------------------------


def test_rows_of_a_batch_are_those_points_and_share_what_has_no_dimension() -> None:
    scale = torch.tensor(2.0)
    batch = Batch.from_raw(({"a": torch.arange(5.0), "scale": scale}, torch.arange(5)))
    part = batch.rows(torch.tensor([3, 1]), 2)
    assert_equal_nesting(part.x, {"a": torch.tensor([3.0, 1.0]), "scale": scale})
    assert_equal_nesting(part.y, torch.tensor([3, 1]))
    assert part.size == 2


def test_a_batch_knows_its_bytes() -> None:
    batch = Batch.from_raw((torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64)))
    assert batch.num_bytes == 5 * 3 * 4 + 5 * 8


def test_repr_tells_points_and_cache() -> None:
    stream = BatchStream(pairs(4, 6))
    assert "not yet counted" in repr(stream)
    list(stream)
    assert "points: 10, kept" in repr(stream)
