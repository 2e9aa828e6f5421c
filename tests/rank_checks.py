"""What holds in every process of a group: checks that each rank runs, and the program for one rank.

``python rank_checks.py RANK SIZE STORE RESULTS`` runs all checks in one process group and writes
what became of each, as ``{name: traceback or null}``.
"""

from __future__ import annotations

import copy
import json
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from hessops import (
    Averaging,
    CgOperator,
    ChunkAveraging,
    DistributedAveraging,
    EkfacOperator,
    GaussNewtonOperator,
    GeneralizedGaussNewtonOperator,
    HessianBatchOperation,
    HessianOperator,
    InverseHarmonicMeanOperator,
    JacobiPreconditioner,
    KfacOperator,
    LissaOperator,
    MinresOperator,
    NystroemPreconditioner,
    PointAveraging,
    TensorOperator,
    operator_nystroem_approximation,
    operator_spectral_approximation,
)
from hessops.distributed import gather, shard, together
from hessops.errors import (
    ArgumentError,
    DataError,
    DistributedError,
    MemoryLimitError,
    NonFiniteError,
    OneShotDataError,
    RemoteError,
    ShapeError,
)
from hessops.influence import (
    ArnoldiInfluence,
    CgInfluence,
    DirectInfluence,
    EkfacInfluence,
    InfluenceFunctionModel,
    InverseHarmonicMeanInfluence,
    LissaInfluence,
    NystroemSketchInfluence,
    SequentialInfluenceCalculator,
)

Pair = tuple[Tensor, Tensor]
# Points by rank, for each number of ranks: ragged, some shards empty.
SHARDS = {1: [23], 2: [20, 3], 3: [12, 0, 11], 4: [9, 1, 0, 13]}
NUM_POINTS, BATCH = 23, 4
REGULARIZATION = 1e-2
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    """Registers a check, which every rank runs."""
    CHECKS[function.__name__] = function
    return function


# --- models and data --------------------------------------------------------------------------


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def points(count: int = NUM_POINTS, dtype: torch.dtype = torch.float64) -> Pair:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (count,), generator=generator)


def batches(x: Tensor, y: Tensor) -> list[Pair]:
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True)) if len(x) else []


def bounds(rank: int | None = None) -> slice:
    sizes = SHARDS[dist.get_world_size()]
    rank = dist.get_rank() if rank is None else rank
    start = sum(sizes[:rank])
    return slice(start, start + sizes[rank])


def own(pair: Pair, rank: int | None = None) -> list[Pair]:
    x, y = pair
    return batches(x[bounds(rank)], y[bounds(rank)])


def of_all_ranks(pair: Pair) -> list[Pair]:
    return [batch for rank in range(dist.get_world_size()) for batch in own(pair, rank)]


def vectors(count: int, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, size, generator=generator, dtype=torch.float64).to(dtype)


LOSS = nn.CrossEntropyLoss()
KINDS: dict[str, Callable[..., TensorOperator]] = {
    "Hessian": HessianOperator,
    "Gauss-Newton": GaussNewtonOperator,
    "generalized Gauss-Newton": GeneralizedGaussNewtonOperator,
    "inverse harmonic mean": partial(InverseHarmonicMeanOperator, regularization=REGULARIZATION),
}


def pair_of(kind: str, **settings: object) -> tuple[TensorOperator, TensorOperator]:
    """An operator over the ranks, and the same one with all data in this process."""
    model, everything = network(), points()
    build = KINDS[kind]
    over_ranks = build(model, LOSS, own(everything), averaging=DistributedAveraging(), **settings)
    return over_ranks, build(model, LOSS, batches(*everything), **settings)


# --- assertions -------------------------------------------------------------------------------


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    error = (actual - expected).norm() / expected.norm().clamp(min=1e-300)
    assert error <= tolerance, f"relative error {error:.1e}"


def assert_same_everywhere(*tensors: Tensor) -> None:
    """To the last bit."""
    for tensor in tensors:
        found: list[object] = [None] * dist.get_world_size()
        dist.all_gather_object(found, tensor.detach().contiguous().numpy().tobytes())
        assert all(value == found[0] for value in found), "ranks hold different bits"


@contextmanager
def raises(kind: type[Exception], match: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    except kind as error:
        told = f"{error} {' '.join(getattr(error, '__notes__', []))}"
    else:
        raise AssertionError(f"{kind.__name__} was not raised")
    assert re.search(match, told), told
    assert time.monotonic() - started < 10


@contextmanager
def counted() -> Iterator[list[Tensor]]:
    """The tensors that are summed over ranks meanwhile."""
    summed: list[Tensor] = []
    original = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: object, **kwargs: object) -> object:
        summed.append(tensor)
        return original(tensor, *args, **kwargs)

    with mock.patch.object(dist, "all_reduce", all_reduce):
        yield summed


# --- products ---------------------------------------------------------------------------------


@check
def products_are_those_of_one_process() -> None:
    for kind in KINDS:
        over_ranks, alone = pair_of(kind)
        for rows in (vectors(1, alone.input_size)[0], vectors(3, alone.input_size)):
            product = over_ranks.apply(rows)
            assert product.shape == rows.shape
            assert_close(product, alone.apply(rows))
            assert_same_everywhere(product)


@check
def products_in_chunks_and_dictionaries_are_too() -> None:
    over_ranks, alone = pair_of("Hessian", chunk_size=1)
    rows = vectors(3, alone.input_size)
    assert_close(over_ranks.apply(rows), alone.apply(rows))
    stacked = alone.space.unflatten(rows)
    result = over_ranks.apply_to_dict(dict(reversed(stacked.items())))
    for name, expected in alone.apply_to_dict(stacked).items():
        assert_close(result[name], expected)


@check
def narrow_dtypes_are_summed_wide() -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        model, (x, y) = network(dtype), points(dtype=dtype)
        over_ranks = HessianOperator(model, LOSS, own((x, y)), averaging=DistributedAveraging())
        alone = HessianOperator(model, LOSS, batches(x, y))
        rows = vectors(2, alone.input_size, dtype)
        product = over_ranks.apply(rows)
        assert product.dtype is dtype
        assert_close(product.double(), alone.apply(rows).double(), tolerance)


@check
def batches_may_weigh_the_same() -> None:
    model, everything = network(), points()
    averaging = DistributedAveraging(ChunkAveraging())
    over_ranks = HessianOperator(model, LOSS, own(everything), averaging=averaging)
    alone = HessianOperator(model, LOSS, of_all_ranks(everything), averaging=ChunkAveraging())
    rows = vectors(2, alone.input_size)
    assert_close(over_ranks.apply(rows), alone.apply(rows))
    assert "ChunkAveraging" in repr(over_ranks)


@check
def an_application_is_one_all_reduce_after_all_batches() -> None:
    over_ranks, _ = pair_of("Hessian", chunk_size=1)
    size, count = over_ranks.input_size, 3
    over_ranks.apply(vectors(1, size)[0])
    done: list[str] = []
    original = HessianBatchOperation.add_rows

    def add_rows(self: HessianBatchOperation, *args: object) -> None:
        original(self, *args)
        done.append("batch")

    with counted() as summed, mock.patch.object(HessianBatchOperation, "add_rows", add_rows):
        for_one = over_ranks.apply(vectors(1, size)[0])
        batches_of_one = len(done)
        over_ranks.apply(vectors(count, size))
    assert for_one.shape == (size,)
    assert batches_of_one == len(own(points())) == len(done) / 2
    # Weight in two parts, error flag, and five hashes of three pieces, for each rank.
    heads = dist.get_world_size() * (3 + 3 * 5)
    assert [t.numel() for t in summed] == [size + heads, count * size + heads]


@check
def combinations_sum_once_for_each_part() -> None:
    model, everything = network(), points()
    averaging = DistributedAveraging()
    hessian = HessianOperator(model, LOSS, own(everything), averaging=averaging)
    gauss_newton = GaussNewtonOperator(model, LOSS, own(everything), averaging=averaging)
    combined = 0.9 * hessian + 0.1 * gauss_newton.shift(0.5)
    expected = 0.9 * HessianOperator(model, LOSS, batches(*everything)).to_dense()
    expected += 0.1 * GaussNewtonOperator(model, LOSS, batches(*everything)).to_dense()
    expected += 0.05 * torch.eye(len(expected), dtype=expected.dtype)
    combined.apply(vectors(1, len(expected)))
    with counted() as summed:
        dense = combined.to_dense()
    # Whether all have the memory, and the two products.
    assert [t.dtype for t in summed] == [torch.int64, torch.float64, torch.float64]
    assert_close(dense, expected)


@check
def a_refreshed_operator_is_that_of_the_new_weights() -> None:
    model, everything = network(), points()
    over_ranks = HessianOperator(model, LOSS, own(everything), averaging=DistributedAveraging())
    rows = vectors(1, over_ranks.input_size)
    over_ranks.apply(rows)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    alone = HessianOperator(model, LOSS, batches(*everything))
    assert_close(over_ranks.refresh().apply(rows), alone.apply(rows))


# --- solvers ----------------------------------------------------------------------------------


@check
def solves_take_the_same_steps() -> None:
    over_ranks, alone = pair_of("generalized Gauss-Newton")
    rhs = vectors(4, alone.input_size)
    dense = alone.to_dense() + REGULARIZATION * torch.eye(alone.input_size, dtype=torch.float64)
    exact = torch.linalg.solve(dense, rhs.T).T
    recipes: dict[str, Callable[[TensorOperator], TensorOperator]] = {
        "CG": partial(CgOperator, regularization=REGULARIZATION),
        "Jacobi": partial(
            CgOperator, regularization=REGULARIZATION, preconditioner=JacobiPreconditioner()
        ),
        "Nyström": partial(
            CgOperator, regularization=REGULARIZATION, preconditioner=NystroemPreconditioner(8)
        ),
        "block": partial(CgOperator, regularization=REGULARIZATION, use_block_cg=True),
        "MINRES": partial(MinresOperator, regularization=REGULARIZATION),
    }
    for name, recipe in recipes.items():
        solution, reference = recipe(over_ranks).solve(rhs), recipe(alone).solve(rhs)
        assert solution.converged.all(), name
        # Sums in another order are rounded otherwise, and may end some steps sooner or later.
        steps = solution.iterations, reference.iterations
        assert (steps[0] - steps[1]).abs().max() <= 2, (name, *steps)
        assert_close(solution.value, reference.value, 1e-6)
        assert_close(solution.value, exact, 1e-4)
        residual = (rhs - solution.value @ dense).norm(dim=1) / rhs.norm(dim=1)
        assert residual.max() <= 1.01e-7, name
        assert_same_everywhere(solution.value)


@check
def lissa_is_the_recursion_with_all_data() -> None:
    over_ranks, alone = pair_of("generalized Gauss-Newton")
    rhs = vectors(2, alone.input_size)
    settings = {"regularization": 0.1, "maxiter": 40, "scale": 3.0, "rtol": 0.0}
    quiet = {"warn_on_max_iteration": False}
    reference = LissaOperator.from_operator(alone, **settings, **quiet).solve(rhs).value
    first = LissaOperator.from_operator(over_ranks, **settings, **quiet).solve(rhs).value
    second = LissaOperator(
        over_ranks.batch_operation,
        own(points()),
        **settings,
        **quiet,
        averaging=DistributedAveraging(),
    )
    with counted() as summed:
        value = second.solve(rhs).value
    assert_close(first, reference)
    assert_close(value, reference)
    assert_same_everywhere(first, value)
    of_products = [t for t in summed if t.is_floating_point()]
    assert len(of_products) == 41  # the last one for the true residual
    with raises(ArgumentError, "num_chains"):
        LissaOperator(
            over_ranks.batch_operation, own(points()), num_chains=2,
            averaging=DistributedAveraging(),
        )  # fmt: skip


@check
def low_rank_approximations_are_those_of_one_process() -> None:
    over_ranks, alone = pair_of("generalized Gauss-Newton")
    for approximate in (operator_spectral_approximation, operator_nystroem_approximation):
        found, expected = approximate(over_ranks, 6), approximate(alone, 6)
        rebuilt = found.projections * found.eigen_vals @ found.projections.T
        reference = expected.projections * expected.eigen_vals @ expected.projections.T
        assert_close(rebuilt, reference, 1e-8)
        assert_same_everywhere(found.projections, found.eigen_vals)


# --- Kronecker factors ------------------------------------------------------------------------


def factored(kind: type[KfacOperator], averaging: Averaging | None, **settings: object) -> KfacOperator:  # fmt: skip # noqa: E501
    data = batches(*points()) if averaging is None else own(points())
    averages = {} if averaging is None else {"averaging": averaging}
    return kind(network(), LOSS, data, **averages, **settings)


@check
def kronecker_factors_are_those_of_one_process() -> None:
    for kind in (KfacOperator, EkfacOperator):
        for fisher_type in ("type-2", "empirical"):
            over_ranks = factored(kind, DistributedAveraging(), fisher_type=fisher_type)
            alone = factored(kind, None, fisher_type=fisher_type)
            assert_close(over_ranks.to_dense(), alone.to_dense())
            rows = vectors(2, alone.input_size)
            inverse = over_ranks.inverse(regularization=REGULARIZATION)
            expected = alone.inverse(regularization=REGULARIZATION).apply(rows)
            assert_close(inverse.apply(rows), expected, 1e-10)
            assert_same_everywhere(over_ranks.to_dense(), over_ranks.eigenvalues)


@check
def the_mean_over_batches_has_factors_too() -> None:
    averaging = DistributedAveraging(ChunkAveraging())
    over_ranks = factored(EkfacOperator, averaging)
    alone = EkfacOperator(network(), LOSS, of_all_ranks(points()), averaging=ChunkAveraging())
    assert_close(over_ranks.to_dense(), alone.to_dense())


@check
def factors_are_one_all_reduce_and_decompositions_are_spread() -> None:
    decomposed: list[int] = []
    original = torch.linalg.eigh

    def eigh(matrix: Tensor, *args: object, **kwargs: object) -> object:
        decomposed.append(matrix.shape[-1])
        return original(matrix, *args, **kwargs)

    with counted() as summed, mock.patch.object(torch.linalg, "eigh", eigh):
        factored(EkfacOperator, DistributedAveraging())
    # Whether all have made the operator, and the same; factors and what was demoted; whether all
    # decompositions went well; corrected eigenvalues.
    whole, real = torch.int64, torch.float64
    assert [t.dtype for t in summed] == [whole, whole, real, whole, whole, real]
    everywhere: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, decomposed)
    assert sorted(size for sizes in everywhere for size in sizes) == [3, 5, 6, 7]
    costs = [sum(size**3 for size in sizes) for sizes in everywhere]
    assert max(costs) <= sum(costs) / len(costs) + 7**3


@check
def sampled_labels_are_drawn_independently() -> None:
    settings = {"fisher_type": "monte-carlo", "num_samples": 600}
    over_ranks = factored(KfacOperator, DistributedAveraging(), **settings)
    exact = factored(KfacOperator, None).to_dense()
    assert_close(over_ranks.to_dense(), exact, 0.1)
    source = torch.Generator().manual_seed(5)
    own_source = DistributedAveraging().processes.generator(source)
    seeds = gather(torch.tensor([own_source.initial_seed()]))
    assert len(seeds.unique()) == dist.get_world_size()
    assert_same_everywhere(source.get_state())
    # With every point in all ranks, equal draws would be no better than those of one rank.
    one_sample = [
        KfacOperator(
            network(), LOSS, batches(*points()), "monte-carlo", averaging=averaging
        ).to_dense()
        for averaging in (DistributedAveraging(), PointAveraging())
    ]
    assert not torch.allclose(*one_sample)
    assert_same_everywhere(one_sample[0])


class SometimesTied(nn.Module):
    """A layer whose weight is used once more for the points with a positive first input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        again = functional.linear(x, self.first.weight) * (x[:, :1] > 0)
        return self.last(torch.tanh(self.first(x) + again))


@check
def a_layer_that_is_none_for_one_rank_is_none_for_all() -> None:
    torch.manual_seed(1)
    model, (x, y) = SometimesTied().double(), points()
    x[:, 0] = -x[:, 0].abs()
    x[-1, 0] = 1.0  # a point of the last rank
    over_ranks = KfacOperator(model, LOSS, own((x, y)), averaging=DistributedAveraging())
    alone = KfacOperator(model, LOSS, batches(x, y))
    assert [str(b) for b in over_ranks.blocks.values()] == [str(b) for b in alone.blocks.values()]
    assert "Exact('first'" in str(over_ranks)
    assert_close(over_ranks.to_dense(), alone.to_dense())


class TiedByPoint(nn.Module):
    """Layers of which one or the other is used once more, by the sign of the first input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, width)
        self.narrow, self.last = nn.Linear(width, width), nn.Linear(width, 3)
        self.norm = nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        low, high = (x[:, :1] < -1).double(), (x[:, :1] > 1).double()
        hidden = self.first(x) + high * functional.linear(x, self.first.weight)
        hidden = self.second(torch.tanh(hidden))
        narrow = self.narrow(hidden) + low * functional.linear(hidden, self.narrow.weight)
        return self.norm(self.last(torch.tanh(narrow)))


@check
def ranks_may_find_different_layers_to_be_none() -> None:
    for width in (4, 5):
        torch.manual_seed(1)
        model, (x, y) = TiedByPoint(width).double(), points()
        x[:, 0] = 0.0
        x[0, 0], x[-1, 0] = 2.0, -2.0  # a point of the first rank, and one of the last
        for kind in (KfacOperator, EkfacOperator):
            over_ranks = kind(model, LOSS, own((x, y)), averaging=DistributedAveraging())
            alone = kind(model, LOSS, batches(x, y))
            assert "Exact('first'" in str(over_ranks)
            assert "Exact('narrow'" in str(over_ranks)
            assert_close(over_ranks.to_dense(), alone.to_dense(), 1e-11)
            assert_same_everywhere(over_ranks.to_dense())


class WithoutShortBatches(Averaging):
    def weight(self, num_points: int) -> float:
        return num_points if num_points == BATCH else 0.0


@check
def a_layer_is_demoted_by_a_batch_without_weight() -> None:
    torch.manual_seed(1)
    model, (x, y) = SometimesTied().double(), points()
    x[:, 0] = -x[:, 0].abs()
    mine = own((x, y))
    if dist.get_rank() == dist.get_world_size() - 1:
        mine = [*mine, (torch.ones(1, 4).double(), y[:1])]
    averaging = DistributedAveraging(WithoutShortBatches())
    over_ranks = KfacOperator(model, LOSS, mine, averaging=averaging)
    assert "Exact('first'" in str(over_ranks)
    assert_same_everywhere(over_ranks.to_dense())


# --- influence --------------------------------------------------------------------------------

Build = Callable[..., InfluenceFunctionModel]
INFLUENCES: dict[str, Build] = {
    "direct": partial(DirectInfluence, loss=LOSS, regularization=0.1),
    "CG": partial(CgInfluence, loss=LOSS, regularization=0.5, rtol=1e-10),
    "CG by layer": partial(
        CgInfluence, loss=LOSS, regularization=0.5, rtol=1e-10, block_structure="layer_wise"
    ),
    "LiSSA": partial(LissaInfluence, loss=LOSS, regularization=0.5, scale="auto", rtol=1e-10),
    "Arnoldi": partial(ArnoldiInfluence, loss=LOSS, regularization=0.1, rank=5),
    "Nyström": partial(
        NystroemSketchInfluence,
        loss=LOSS,
        regularization=0.1,
        rank=5,
        second_order_mode="gauss_newton",
    ),
    "inverse harmonic mean": partial(InverseHarmonicMeanInfluence, loss=LOSS, regularization=0.1),
    "EKFAC": partial(EkfacInfluence, update_diagonal=True, regularization=0.1),
}
# LiSSA steps over batches in one process, and over all data in several: the limit is the same.
TOLERANCES = {"CG": 1e-8, "CG by layer": 1e-8, "Arnoldi": 1e-8, "Nyström": 1e-8}


@check
def influences_are_those_of_one_process() -> None:
    (x, y), mine = points(), bounds()
    test = slice(0, 5)
    for name, build in INFLUENCES.items():
        over_ranks = build(network(), averaging=DistributedAveraging()).fit(own((x, y)))
        if name == "LiSSA":
            alone = DirectInfluence(network(), LOSS, 0.5).fit(batches(x, y))
        else:
            alone = build(network()).fit(batches(x, y))
        factors = over_ranks.influence_factors(x[test], y[test])
        with together():
            scores = over_ranks.influences_from_factors(factors, x[mine], y[mine])
            parts = over_ranks.influences_from_factors_by_block(factors, x[mine], y[mine])
            assert_close(sum(parts.values()) + 1, scores + 1)
        scores = gather(scores, dim=1)
        tolerance = TOLERANCES.get(name, 1e-8 if name == "LiSSA" else 1e-11)
        assert_close(factors, alone.influence_factors(x[test], y[test]), tolerance)
        assert_close(scores, alone.influences(x[test], y[test], x, y), tolerance)
        assert_same_everywhere(factors, scores)
        assert over_ranks.fitted.data.num_points == NUM_POINTS
        assert f"fitted on {NUM_POINTS} points" in repr(over_ranks)


@check
def what_ranks_have_fitted_is_read_by_one_process() -> None:
    everything = points()
    x, y = everything
    over_ranks = EkfacInfluence(network(), averaging=DistributedAveraging(), regularization=0.1)
    over_ranks.fit(own(everything))
    path = Path(sys.argv[4]).with_name(f"fit{dist.get_world_size()}")
    if dist.get_rank() == 0:
        over_ranks.save(path)
    dist.barrier()
    alone = EkfacInfluence(network(), regularization=0.1).load(path, batches(x, y))
    assert torch.equal(alone.influence_factors(x, y), over_ranks.influence_factors(x, y))
    again = EkfacInfluence(network(), averaging=DistributedAveraging(), regularization=0.1)
    again.load(path, own(everything))
    with raises(ValueError, "other training data"):
        again.load(path, own((x + 1, y)))


@check
def stores_take_factors_that_are_there() -> None:
    (x, y), mine = points(), bounds()
    over_ranks = CgInfluence(network(), LOSS, 0.5, rtol=1e-10, averaging=DistributedAveraging())
    calculator = SequentialInfluenceCalculator(over_ranks.fit(own((x, y))))
    lazy = calculator.influence_factors(batches(x[:5], y[:5]))
    path = Path(sys.argv[4]).with_name(f"store{dist.get_world_size()}-{dist.get_rank()}")
    with raises(DistributedError, "compute"):
        lazy.to_zarr(path)
    factors = lazy.compute()
    everything = SequentialInfluenceCalculator(CgInfluence(network(), LOSS, 0.5, rtol=1e-10).fit(batches(x, y)))  # fmt: skip # noqa: E501
    expected = everything.influences(batches(x[:5], y[:5]), batches(x, y)).compute()
    if own((x, y)):
        with raises(DistributedError, "compute"):
            calculator.influences(batches(x[:5], y[:5]), own((x, y))).to_zarr(path)
        written = calculator.influences_from_factors(factors, own((x, y))).to_zarr(path)
        assert_close(torch.from_numpy(written[:]), expected[:, mine], 1e-8)


@check
def relative_dampings_are_of_all_data() -> None:
    model, everything = network(), points()
    over_ranks = InverseHarmonicMeanOperator(
        model, LOSS, own(everything), 0.1, averaging=DistributedAveraging()
    )
    alone = InverseHarmonicMeanOperator(model, LOSS, batches(*everything), 0.1)
    found, expected = over_ranks.mean_squared_gradient(), alone.mean_squared_gradient()
    assert abs(found - expected) <= 1e-12 * expected


# --- data -------------------------------------------------------------------------------------


@check
def a_dataset_is_split_without_repeating_a_point() -> None:
    size = dist.get_world_size()
    for count in (0, 1, size, 23):
        dataset = TensorDataset(torch.arange(count))
        mine = shard(dataset)
        assert len(mine) in (count // size, -(-count // size))
        indices = torch.tensor([int(mine[i][0]) for i in range(len(mine))], dtype=torch.int64)
        assert gather(indices).tolist() == list(range(count))
    model, (x, y) = network(), points()
    loader = DataLoader(shard(TensorDataset(x, y)), batch_size=BATCH)
    over_ranks = HessianOperator(model, LOSS, loader, averaging=DistributedAveraging())
    rows = vectors(1, over_ranks.input_size)
    assert_close(over_ranks.apply(rows), HessianOperator(model, LOSS, batches(x, y)).apply(rows))


@check
def results_are_joined_along_any_dimension() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    own_part = torch.full((2, rank, 3), float(rank))
    expected = torch.cat([torch.full((2, r, 3), float(r)) for r in range(size)], dim=1)
    assert torch.equal(gather(own_part, dim=1), expected)
    assert torch.equal(gather(own_part, dim=-2), expected)
    with raises(ShapeError, "other ranks"):
        gather(torch.zeros(2, rank))
    with raises(ShapeError, "dim is 3"):
        gather(own_part, dim=3)
    with raises(ShapeError if rank == size - 1 else RemoteError, "dim is 1"):
        gather(torch.zeros(0) if rank == size - 1 else torch.zeros(2, 1), dim=1)
    for dtype in (torch.int16, torch.bool, torch.bfloat16, torch.complex128):
        joined = gather(torch.ones(rank, 2).to(dtype))
        assert (len(joined), joined.dtype) == (size * (size - 1) // 2, dtype)
        assert bool((joined == 1).all())


@check
def a_sampler_that_repeats_points_is_refused() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    model, (x, y) = network(), points(24)

    def loader(count: int, **settings: object) -> DataLoader[Pair]:
        dataset = TensorDataset(x[:count], y[:count])
        sampler = DistributedSampler(dataset, **settings)
        return DataLoader(dataset, batch_size=BATCH, sampler=sampler)

    averaging = DistributedAveraging()
    build = partial(HessianOperator, model, LOSS, averaging=averaging)
    over_ranks = build(loader(24, shuffle=True, seed=5))
    rows = vectors(1, over_ranks.input_size)
    assert_close(over_ranks.apply(rows), HessianOperator(model, LOSS, batches(x, y)).apply(rows))
    with raises(DataError, "repeats .* of 25|repeats .* of 23"):
        build(loader(23, shuffle=False))
    dropping = build(loader(23, shuffle=False, drop_last=True))
    assert dropping.apply(rows).isfinite().all()
    with raises(DataError, f"rank {(rank + 1) % size} of {size}, but this is rank {rank}"):
        build(loader(24, num_replicas=size, rank=(rank + 1) % size))
    different = loader(24, shuffle=True)
    different.sampler.set_epoch(rank)
    with raises(DistributedError, "samplers differ.*set_epoch"):
        build(different).apply(rows)


@check
def data_that_are_empty_everywhere_are_refused() -> None:
    model = network()
    empty = HessianOperator(model, LOSS, [], averaging=DistributedAveraging())
    with raises(DataError, "empty in all"):
        empty.apply(vectors(1, empty.input_size))
    with raises(DataError, "empty in all"):
        KfacOperator(model, LOSS, [], averaging=DistributedAveraging())
    with raises(DataError, "empty in all"):
        DirectInfluence(model, LOSS, averaging=DistributedAveraging()).fit([])


@check
def the_hash_of_the_data_does_not_depend_on_the_shards() -> None:
    (x, y) = points()
    over_ranks = DirectInfluence(network(), LOSS, 0.1, averaging=DistributedAveraging())
    alone = DirectInfluence(network(), LOSS, 0.1)
    fitted = over_ranks.fit(own((x, y))).fitted.data
    expected = alone.fit(batches(x, y)).fitted.data
    assert (fitted.num_points, fitted.fingerprint) == (expected.num_points, expected.fingerprint)
    assert over_ranks.configuration() == alone.configuration()


# --- what goes wrong --------------------------------------------------------------------------


class Breaking(Dataset[Pair]):
    """Raises for one point, while it is told to."""

    def __init__(self, x: Tensor, y: Tensor, broken: int | None) -> None:
        self.x, self.y, self.broken = x, y, broken

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Pair:
        if index == self.broken:
            raise OSError(f"cannot read point {index}")
        return self.x[index], self.y[index]


@check
def an_error_in_the_data_of_one_rank_is_one_in_all() -> None:
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    model, (x, y) = network(), points()
    for position in (0, 2):  # in the first batch, and in a later one
        data = Breaking(x[bounds()], y[bounds()], position if rank == last else None)
        loader = DataLoader(data, batch_size=1)
        over_ranks = HessianOperator(model, LOSS, loader, averaging=DistributedAveraging())
        rows = vectors(2, over_ranks.input_size)
        expected = (OSError, "cannot read") if rank == last else (RemoteError, "OSError: cannot")
        for _ in range(2):
            with raises(*expected):
                over_ranks.apply(rows)
        with raises(*expected):
            over_ranks.check_data()
        with raises(*expected):
            KfacOperator(model, LOSS, loader, averaging=DistributedAveraging())
        with raises(*expected):
            CgInfluence(model, LOSS, 0.1, averaging=DistributedAveraging()).fit(loader)
        data.broken = None
        alone = HessianOperator(model, LOSS, batches(x, y))
        assert_close(over_ranks.apply(rows), alone.apply(rows))


@check
def an_error_in_the_middle_of_a_solve_is_one_in_all() -> None:
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    model, (x, y) = network(), points()
    data = Breaking(x[bounds()], y[bounds()], None)
    loader = DataLoader(data, batch_size=2)
    over_ranks = GaussNewtonOperator(
        model, LOSS, loader, averaging=DistributedAveraging(), cache=False
    )
    original, products = GaussNewtonOperator._apply_rows, []

    def apply_rows(self: GaussNewtonOperator, rows: Tensor) -> Tensor:
        products.append(len(rows))
        data.broken = 1 if rank == last and len(products) == 3 else None
        return original(self, rows)

    expected = (OSError, "cannot read") if rank == last else (RemoteError, f"rank {last} of")
    with mock.patch.object(GaussNewtonOperator, "_apply_rows", apply_rows), raises(*expected):
        CgOperator(over_ranks, REGULARIZATION).solve(vectors(2, over_ranks.input_size))
    assert len(products) == 3


@check
def points_that_are_not_finite_are_refused_by_all() -> None:
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    model, (x, y) = network(), points()
    x[-1, 2] = float("nan")
    over_ranks = HessianOperator(model, LOSS, own((x, y)), averaging=DistributedAveraging())
    kind = ValueError if rank == last else RemoteError
    with raises(kind, "NaN"):
        over_ranks.apply(vectors(1, over_ranks.input_size))


@check
def ranks_that_differ_are_told_so() -> None:
    rank = dist.get_rank()
    over_ranks, alone = pair_of("Hessian")
    rows = vectors(2, alone.input_size)
    with raises(DistributedError, "right-hand sides differ"):
        over_ranks.apply(rows + (1e-15 if rank else 0.0))
    assert_close(over_ranks.apply(rows), alone.apply(rows))
    torch.manual_seed(rank)
    with raises(DistributedError, r"right-hand sides differ.*ranks \[1.*torch.manual_seed"):
        NystroemPreconditioner(4).fit(over_ranks)
    model = network()
    if rank:
        with torch.no_grad():
            next(model.parameters())[0, 0] += 1e-15
    other = HessianOperator(model, LOSS, own(points()), averaging=DistributedAveraging())
    with raises(DistributedError, "parameters, buffers or loss differ"):
        other.apply(rows)
    with raises(DistributedError, "parameters, buffers or loss differ"):
        KfacOperator(model, LOSS, own(points()), averaging=DistributedAveraging())
    kind = GaussNewtonOperator if rank else HessianOperator
    mixed = kind(network(), LOSS, own(points()), averaging=DistributedAveraging())
    with raises(DistributedError, "operators differ"):
        mixed.apply(rows)
    losses = [
        nn.CrossEntropyLoss(weight=torch.ones(3).double() + rank, reduction="none"),
        nn.CrossEntropyLoss(label_smoothing=0.1 * rank),
    ]
    for loss in losses:
        weighted = HessianOperator(
            network(),
            loss,
            own(points()),
            reduction=loss.reduction,
            averaging=DistributedAveraging(),
        )
        with raises(DistributedError, "loss differ"):
            weighted.apply(rows)
    for kind in (KfacOperator, EkfacOperator if rank else KfacOperator):
        with raises(DistributedError, "settings differ"):
            fisher_type = "empirical" if rank and kind is KfacOperator else "type-2"
            factored(kind, DistributedAveraging(), fisher_type=fisher_type, max_dense=10 + rank)
    for build in (DirectInfluence, CgInfluence):
        with raises(DistributedError, "settings of the influence model differ"):
            build(network(), LOSS, 0.1 + rank, averaging=DistributedAveraging()).fit(own(points()))
    torch.set_num_threads(1 + rank)
    try:
        with raises(DistributedError, "threads"):
            over_ranks.apply(rows)
    finally:
        torch.set_num_threads(1)


@check
def memory_that_one_rank_lacks_is_lacking_in_all() -> None:
    over_ranks, _ = pair_of("Hessian")
    last = dist.get_world_size() - 1
    free = mock.patch("hessops.operators.base.available_bytes", return_value=10)
    expected = (MemoryLimitError, "dense") if dist.get_rank() == last else (RemoteError, "dense")
    with free if dist.get_rank() == last else nullcontext(), raises(*expected):
        over_ranks.shift(1.0).to_dense()


@check
def work_between_products_fails_together() -> None:
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    kind = ZeroDivisionError if rank == last else RemoteError
    with raises(kind, f"raised in rank {last}|rank {last} of .* raised"), together():
        _ = 1 / (last - rank)
    with together():
        pass


class Nameless(Exception):
    def __str__(self) -> str:
        raise ValueError


@check
def errors_of_any_text_are_told() -> None:
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    for error in (OSError("cannot read 'caf\udce9.jpg'"), Nameless(), ValueError("x" * 5000)):
        raised: Exception | None = None
        try:
            with together():
                if rank == last:
                    raise error
        except Exception as found:
            raised = found
        if rank == last:
            assert raised is error
        else:
            assert isinstance(raised, RemoteError)
            assert type(error).__name__ in str(raised)


@check
def what_one_rank_refuses_beforehand_is_refused_by_all() -> None:
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    is_last, everything, averaging = rank == last, points(), DistributedAveraging()
    (x, y), rows = everything, vectors(2, 51)

    def expected(kind: type[Exception]) -> type[Exception]:
        return kind if is_last else RemoteError

    broken = network()
    if is_last:
        with torch.no_grad():
            next(broken.parameters())[0, 0] = float("nan")
    with raises(expected(NonFiniteError), "NaN"):
        HessianOperator(broken, LOSS, own(everything), averaging=averaging)
    with raises(expected(NonFiniteError), "NaN"):
        KfacOperator(broken, LOSS, own(everything), averaging=averaging)
    with raises(expected(NonFiniteError), "NaN"):
        InverseHarmonicMeanOperator(broken, LOSS, own(everything), 0.1, averaging=averaging)
    with raises(expected(OneShotDataError), "one-shot"):
        data = iter(own(everything)) if is_last else own(everything)
        CgInfluence(network(), LOSS, 0.1, averaging=averaging).fit(data)

    model = network()
    over_ranks = GaussNewtonOperator(model, LOSS, own(everything), averaging=averaging)
    rhs = rows.clone()
    rhs[0, 0] = float("nan") if is_last else 0.0
    with raises(expected(NonFiniteError), "NaN"):
        CgOperator(over_ranks, 0.1).solve(rhs)
    if is_last:
        with torch.no_grad():
            next(model.parameters())[0, 0] = float("inf")
    with raises(expected(NonFiniteError), "NaN|infin"):
        over_ranks.refresh()

    fitted = CgInfluence(network(), LOSS, 0.1, averaging=averaging).fit(own(everything))
    test = x[:2].clone()
    test[0, 0] = float("nan") if is_last else 0.0
    for method in (fitted.influence_factors, fitted.influence_factors_by_block, fitted.influences):
        with raises(expected(NonFiniteError), "NaN"):
            method(test, y[:2])
    path = Path(sys.argv[4]).with_name(f"missing{dist.get_world_size()}-{rank}")
    direct = DirectInfluence(network(), LOSS, 0.1, averaging=averaging).fit(own(everything))
    if not is_last:
        direct.save(path)
    again = DirectInfluence(network(), LOSS, 0.1, averaging=averaging)
    with raises(expected(FileNotFoundError), "No such file"):
        again.load(path, own(everything))
    calculator = SequentialInfluenceCalculator(fitted)
    with raises(DistributedError, "compute"):
        calculator.influences(batches(x[:2], y[:2]), batches(x, y)).compute()


@check
def a_group_may_be_a_part_of_the_world() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    members = list(range(1, size))
    group = dist.new_group(members)
    if rank == 0:
        with raises(DistributedError, "not in the group"):
            DistributedAveraging(group=group)
        return
    model, (x, y) = network(), points()
    averaging = DistributedAveraging(group=group)
    assert (averaging.processes.rank, averaging.processes.size) == (rank - 1, size - 1)
    inside = shard(TensorDataset(x, y), group)
    over_group = HessianOperator(
        model, LOSS, DataLoader(inside, batch_size=BATCH), averaging=averaging
    )
    rows = vectors(1, over_group.input_size)
    assert_close(over_group.apply(rows), HessianOperator(model, LOSS, batches(x, y)).apply(rows))
    wrapped = KfacOperator(
        model, LOSS, DataLoader(inside, batch_size=BATCH), averaging=copy.copy(averaging)
    )
    assert_close(wrapped.to_dense(), KfacOperator(model, LOSS, batches(x, y)).to_dense())


# --- the program ------------------------------------------------------------------------------


def run_all(names: Sequence[str], path: Path) -> None:
    results: dict[str, str | None] = {}
    for name in names:
        torch.manual_seed(0)
        try:
            CHECKS[name]()
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
        path.write_text(json.dumps(results))
        # A rank that went astray would be met in the middle of the next check.
        dist.barrier()


def join_group(rank: int, size: int, store: str, timeout: timedelta) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{store}"
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=size, timeout=timeout
    )


def main() -> None:
    rank, size, store, results = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    warnings.simplefilter("error")
    join_group(rank, size, store, timedelta(seconds=20))
    run_all(sys.argv[5:] or list(CHECKS), Path(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
