"""Ctrl-C anywhere leaves everything as it was, and the next call gives what a fresh object gives.

An action is one line of a table: how an object is made, and what is called. It is run once to count
how often it passes each place where an interrupt may come (the forward of the model, a backward
pass, the loss, the reading of a point, a product), then interrupted there at some of these times.
"""

from __future__ import annotations

import random
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from copy_cases import LAMBDA, same_bits, spd, vectors
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, Dataset

import hessops
from hessops import (
    BatchStream,
    BlockDiagonalPreconditioner,
    CgOperator,
    ChunkAveraging,
    DirectSolveOperator,
    EkfacOperator,
    GaussNewtonOperator,
    GeneralizedGaussNewtonOperator,
    HessianOperator,
    InverseHarmonicMeanOperator,
    IterativeRefinementOperator,
    JacobiPreconditioner,
    KfacOperator,
    LissaOperator,
    MinresOperator,
    NystroemPreconditioner,
    SampleSpaceInverse,
    TensorOperator,
    create_hvp_function,
    estimators,
    operator_nystroem_approximation,
    operator_spectral_approximation,
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
from hessops.isolation import is_transformed

NUM_POINTS = 12
SIZE = 10  # parameters of the model
# Each action is interrupted on so many objects, in turn.
NUM_OBJECTS = 2


# --- where an interrupt may come -----------------------------------------------------------------

PLACES = ("forward", "backward", "loss", "data", "product")


class Alarm:
    """Counts passes by each place, and raises at one of them."""

    def __init__(self) -> None:
        self.set(None)

    def set(self, place: str | None, number: int = 0) -> None:
        """Rings at the pass of that number, from 1; ``None`` only counts."""
        self.place, self.number = place, number
        self.seen = dict.fromkeys(PLACES, 0)

    def passed(self, place: str) -> None:
        self.seen[place] += 1
        if place == self.place and self.seen[place] == self.number:
            raise KeyboardInterrupt(place)


# One for all, which is no part of the models that pass by it: an operator works on a copy of its
# model, and a store holds a description of all that a model reads.
ALARM = Alarm()
PASSED = weakref.WeakMethod(ALARM.passed)


class Model(nn.Module):
    """A small model that passes by the alarm forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
        self.register_buffer("offset", torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        PASSED()("forward")
        inside = self.inner[:2](x)
        if inside.requires_grad and not is_transformed(inside):
            inside.register_hook(lambda gradient: PASSED()("backward"))
        return self.inner[2](inside) + self.offset


class Loss(nn.MSELoss):
    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        PASSED()("loss")
        return super().forward(output, target)


class Points(Dataset[tuple[Tensor, Tensor]]):
    """Points whose reading passes by the alarm, and draws from every global generator."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(NUM_POINTS, 2, generator=generator, dtype=torch.float64)
        self.y = self.x.sum(dim=1, keepdim=True).sin()

    def __len__(self) -> int:
        return NUM_POINTS

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        torch.rand(()), np.random.rand(), random.random()  # noqa: NPY002  # the global one
        PASSED()("data")
        return self.x[index], self.y[index]


class Product(TensorOperator):
    """An operator whose products pass by the alarm."""

    def __init__(self) -> None:
        super().__init__(9, torch.float64, "cpu", symmetric=True, positive_semidefinite=True)
        self.matrix = spd()

    def _apply_rows(self, rows: Tensor) -> Tensor:
        PASSED()("product")
        return rows @ self.matrix


class World:
    """Everything of the user's that an action can touch, equal in every instance."""

    def __init__(self, path: Path) -> None:
        torch.manual_seed(3)
        ALARM.set(None)
        self.path, self.model, self.loss = path, Model(), Loss()
        self.model.inner[1].train()
        self.model.inner[0].bias.requires_grad_(requires_grad=False)
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.points, self.matrix = Points(), Product()

    @property
    def shuffled(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(self.points, batch_size=8, shuffle=True)

    @property
    def ordered(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(self.points, batch_size=8)

    def over(self, kind: Callable[..., Any], *args: object, **settings: object) -> Any:
        return kind(self.model, self.loss, self.shuffled, *args, **settings)

    def ggn(self) -> Any:
        return self.over(GeneralizedGaussNewtonOperator)

    def influence(self, kind: Callable[..., Any], **settings: object) -> InfluenceFunctionModel:
        if kind is EkfacInfluence:
            return kind(self.model, regularization=LAMBDA, loss=self.loss, **settings)
        return kind(self.model, self.loss, LAMBDA, **settings)

    def calculator(self) -> SequentialInfluenceCalculator:
        model = DirectInfluence(self.model, self.loss, LAMBDA).fit(self.ordered)
        return SequentialInfluenceCalculator(model)


# --- actions -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Action:
    """A call that may be interrupted.

    Attributes:
        make: Makes an object from a world, with the alarm off.
        call: Calls it; a second call gives the same bits.
    """

    make: Callable[[World], Any]
    call: Callable[[Any], object]


def product(operator: TensorOperator) -> object:
    return operator.apply(vectors(operator.input_size))


def solution(inverse: hessops.InverseOperator) -> object:
    return inverse.solve(vectors(inverse.input_size))


def on_operator(function: Callable[[Any], object]) -> tuple[Action, Action]:
    """A function of an operator: of one of a model, and of any other.

    What estimates, approximates or decomposes is one line of the table by this.
    """
    return Action(World.ggn, function), Action(lambda world: world.matrix, function)


def solver(make: Callable[[Any], Any]) -> tuple[Action, Action]:
    """Solves with the matrix of a model and of any other operator."""
    return (
        Action(lambda world: make(world.ggn()), solution),
        Action(lambda world: make(world.matrix), solution),
    )


def of_model(
    make: Callable[[World], Any], call: Callable[[Any], object] = product
) -> tuple[Action]:
    return (Action(make, call),)


def constructed(kind: Callable[..., Any]) -> tuple[Action]:
    """Making it is the work."""
    return (Action(lambda world: partial(world.over, kind), lambda make: product(make())),)


def refreshed(kind: Callable[..., Any]) -> tuple[Action]:
    return (Action(lambda world: world.over(kind), lambda operator: product(operator.refresh())),)


def influence(kind: Callable[..., Any], **settings: object) -> tuple[Action]:
    def fit_and_score(given: tuple[InfluenceFunctionModel, World]) -> object:
        model, world = given
        x, y = world.points.x[:3], world.points.y[:3]
        return model.fit(world.shuffled).influences(x, y)

    return (Action(lambda world: (world.influence(kind, **settings), world), fit_and_score),)


def calculated(call: Callable[[Any, World], object]) -> tuple[Action]:
    def run(given: tuple[SequentialInfluenceCalculator, World]) -> object:
        calculator, world = given
        return call(calculator.influences(world.ordered, world.ordered), world)

    return (Action(lambda world: (world.calculator(), world), run),)


def stored(lazy: Any, world: World) -> object:
    lazy.to_zarr(world.path, row_chunk=5, column_chunk=4)
    return files(world.path)


def files(path: Path) -> Mapping[str, bytes]:
    found = (f for f in sorted(path.rglob("*")) if f.is_file())
    return {str(f.relative_to(path)): f.read_bytes() for f in found}


TABLE: Mapping[str, tuple[Action, ...]] = {
    "Hessian": of_model(lambda w: w.over(HessianOperator)),
    "Hessian, dense": of_model(
        lambda w: HessianOperator(w.model, w.loss, w.ordered, cache=False), lambda H: H.to_dense()
    ),
    "Hessian, refreshed": refreshed(HessianOperator),
    "Hessian, linearized": of_model(lambda w: w.over(HessianOperator).linearize()),
    "Hessian, in float32": of_model(lambda w: w.over(HessianOperator).in_precision(torch.float32)),
    "Gauss-Newton": of_model(lambda w: w.over(GaussNewtonOperator)),
    "inverse harmonic mean": of_model(lambda w: w.over(InverseHarmonicMeanOperator, LAMBDA)),
    "KFAC": constructed(KfacOperator),
    "EKFAC": constructed(partial(EkfacOperator, fisher_type="monte-carlo")),
    "KFAC, refreshed": refreshed(KfacOperator),
    "CG": solver(lambda A: CgOperator(A, LAMBDA, rtol=1e-2)),
    "block CG": solver(lambda A: CgOperator(A, LAMBDA, rtol=1e-2, use_block_cg=True)),
    "CG, Nyström": solver(
        lambda A: CgOperator(A, LAMBDA, rtol=1e-2, preconditioner=NystroemPreconditioner(3))
    ),
    "CG, Jacobi": solver(
        lambda A: CgOperator(A, LAMBDA, rtol=1e-2, preconditioner=JacobiPreconditioner(3))
    ),
    "CG, blocks": of_model(
        lambda w: CgOperator(w.ggn(), LAMBDA, preconditioner=BlockDiagonalPreconditioner()),
        solution,
    ),
    "MINRES": solver(lambda A: MinresOperator(A, LAMBDA, rtol=1e-2)),
    "LiSSA": of_model(
        lambda w: LissaOperator(w.ggn().batch_operation, w.shuffled, LAMBDA, 4, num_chains=2),
        solution,
    ),
    "LiSSA, scaled": of_model(
        lambda w: LissaOperator(w.ggn().batch_operation, w.ordered, LAMBDA, 4, scale="auto"),
        solution,
    ),
    "LiSSA, an operator": solver(lambda A: LissaOperator.from_operator(A, LAMBDA, 4, scale="auto")),
    "refinement": of_model(
        lambda w: IterativeRefinementOperator(
            w.ggn(), partial(MinresOperator, rtol=0.1), regularization=LAMBDA, rtol=1e-2
        ),
        solution,
    ),
    "direct": on_operator(lambda A: solution(DirectSolveOperator(A, LAMBDA))),
    "direct, refreshed": of_model(
        lambda w: DirectSolveOperator(w.ggn(), LAMBDA), lambda inverse: solution(inverse.refresh())
    ),
    "sample space": of_model(
        lambda w: SampleSpaceInverse(
            GaussNewtonOperator(w.model, w.loss, [w.points[:9]], cache=True), LAMBDA
        ),
        solution,
    ),
    "Lanczos": on_operator(partial(operator_spectral_approximation, rank=2)),
    "Nyström": on_operator(partial(operator_nystroem_approximation, rank=3)),
    "trace": on_operator(partial(estimators.trace, num_products=4)),
    "diagonal": on_operator(estimators.diagonal),
    "norm": on_operator(estimators.norm),
    "eigenpairs": on_operator(partial(estimators.eigenpairs, k=2)),
    "spectral density": on_operator(estimators.spectral_density),
    "logdet": on_operator(lambda A: estimators.logdet(A.shift(1.0))),
    "Hessian function": of_model(
        lambda w: create_hvp_function(w.model, w.loss, w.ordered), lambda hvp: hvp(vectors(SIZE)[0])
    ),
    "DirectInfluence": influence(DirectInfluence, block_structure="layer_wise"),
    "CgInfluence": influence(
        CgInfluence, second_order_mode="gauss_newton", preconditioner=NystroemPreconditioner(3)
    ),
    "LissaInfluence": influence(LissaInfluence, maxiter=3, warn_on_max_iteration=False),
    "ArnoldiInfluence": influence(ArnoldiInfluence, rank=2),
    "NystroemSketchInfluence": influence(
        NystroemSketchInfluence, second_order_mode="gauss_newton", rank=3
    ),
    "InverseHarmonicMeanInfluence": influence(InverseHarmonicMeanInfluence),
    "EkfacInfluence": influence(EkfacInfluence, update_diagonal=True),
    "calculator": calculated(lambda lazy, world: lazy.compute()),
    "calculator, store": calculated(stored),
}
CASES = {
    f"{name}, {'of a matrix' if number else 'of a model'}" if len(actions) > 1 else name: action
    for name, actions in TABLE.items()
    for number, action in enumerate(actions)
}


# --- what must be as it was ----------------------------------------------------------------------


# Older versions of torch do not tell.
_saved_tensors_hooks = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None
)


def state_of_torch() -> dict[str, object]:
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    return {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tobytes(),  # noqa: NPY002
        "python": hash(random.getstate()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "anomaly": torch.is_anomaly_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "cudnn": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        "attention": (
            torch.backends.mha.get_fastpath_enabled(),
            cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.math_sdp_enabled(),
        ),
        "parametrizations": (parametrize._cache_enabled, len(parametrize._cache)),
        "transforms": torch._C._functorch.peek_interpreter_stack() is None,
        "modes": torch._C._len_torch_function_stack(),
        "saved tensors": _saved_tensors_hooks(False) is None,
        "warnings": [*map(str, warnings.filters)],
    }


def state_of(world: World) -> dict[str, object]:
    modules = list(world.model.modules())
    return {
        "values": {name: t.clone() for name, t in world.model.state_dict().items()},
        "gradients": [p.grad for p in world.model.parameters()],
        "trainable": [p.requires_grad for p in world.model.parameters()],
        "training": [module.training for module in modules],
        "hooks": [
            len(hooks)
            for module in modules
            for name, hooks in vars(module).items()
            if name.endswith("hooks")
        ],
        "attributes": [list(vars(module)) for module in modules],
        "data": (world.points.x.clone(), world.points.y.clone()),
        **state_of_torch(),
    }


# --- interrupted ---------------------------------------------------------------------------------


def moments(passes: Mapping[str, int], source: random.Random) -> list[tuple[str, int]]:
    """Of each place the first pass, the last, and one between; in any order."""
    found = [
        (place, number)
        for place, count in passes.items()
        for number in {1, source.randint(1, count), count}
    ]
    return source.sample(found, len(found))


@pytest.mark.parametrize("name", CASES)
def test_an_interrupt_leaves_all_as_it_was_and_the_next_call_is_that_of_a_fresh_object(
    name: str, tmp_path: Path
) -> None:
    action, source = CASES[name], random.Random(name)
    thing = action.make(World(tmp_path / "whole"))
    ALARM.set(None)
    expected = action.call(thing)
    passes = {place: count for place, count in ALARM.seen.items() if count}
    assert passes
    chosen = moments(passes, source)
    for start in range(min(NUM_OBJECTS, len(chosen))):
        world = World(tmp_path / str(start))
        thing = action.make(world)
        before, caught = state_of(world), []
        for place, number in chosen[start::NUM_OBJECTS]:
            ALARM.set(place, number)
            try:
                # One that was interrupted before may have less to do, and is not interrupted.
                assert same_bits(action.call(thing), expected), (place, number)
            except KeyboardInterrupt as error:
                caught.append(error)  # with all its frames, as at a prompt
            ALARM.set(None)
            assert differing(before, state_of(world)) == [], (place, number)
            assert not list(world.path.rglob("*.partial")), (place, number)
        assert caught
        assert same_bits(action.call(thing), expected)
        assert differing(before, state_of(world)) == []


def differing(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    return [key for key in before if not same_bits(before[key], after[key])]


def test_an_interrupt_gives_the_memory_for_graphs_back(tmp_path: Path) -> None:
    world = World(tmp_path)
    H = HessianOperator(world.model, world.loss, world.ordered, averaging=ChunkAveraging())
    expected = product(H.linearize())
    limit = sum(H.batch_operation.graph_bytes(batch) for batch in H.stream)
    for place, number in (("forward", 1), ("forward", 2), ("backward", 3), ("backward", 4)):
        L = H.linearize(max_bytes=limit)
        ALARM.set(place, number)
        with pytest.raises(KeyboardInterrupt) as caught:
            product(L)
        ALARM.set(None)
        assert same_bits(product(L), expected)
        assert "2 of 2 graphs retained" in repr(L)
        assert L._graphs.memory.used == limit
        del caught
    short = H.linearize(max_bytes=limit - 1)
    product(short)
    assert "1 of 2 graphs retained" in repr(short)


def test_factors_and_curvature_stay_those_of_one_model_where_a_refresh_is_interrupted(
    tmp_path: Path,
) -> None:
    world = World(tmp_path)
    K = EkfacOperator(world.model, world.loss, world.ordered, "monte-carlo")
    before = product(K), product(K.curvature)
    drawn = K._generator.get_state()
    with torch.no_grad():
        world.model.inner[0].weight.mul_(2)
    for number in (1, 9):
        ALARM.set("backward", number)
        with pytest.raises(KeyboardInterrupt):
            K.refresh()
        ALARM.set(None)
        assert same_bits((product(K), product(K.curvature)), before)
        assert torch.equal(K._generator.get_state(), drawn)
    K.refresh()
    assert not same_bits(product(K), before[0])
    assert not same_bits(product(K.curvature), before[1])


def test_a_pass_that_is_given_up_leaves_the_order_of_the_next(tmp_path: Path) -> None:
    world = World(tmp_path)
    stream, fresh = (BatchStream(world.shuffled, cache=False) for _ in range(2))
    given_up = iter(stream)
    next(given_up)
    orders = [[batch.x for batch in s] for s in (stream, fresh) for _ in range(2)]
    assert same_bits(orders[:2], orders[2:])
    assert not same_bits(orders[0], orders[1])
    del given_up
