"""Every public object as a case: how it is made, and what can be seen of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hessops
from hessops import (
    BatchOperation,
    BatchOperator,
    BatchStream,
    CgOperator,
    CompositeOperator,
    Damping,
    GaussNewtonOperator,
    GeneralizedGaussNewtonOperator,
    HessianBatchOperation,
    HessianOperator,
    IterativeRefinementOperator,
    JacobiPreconditioner,
    KfacOperator,
    LissaOperator,
    MatrixOperator,
    MinresOperator,
    NystroemPreconditioner,
    ParameterSpace,
    SampleSpaceInverse,
    TensorDictOperator,
    TensorOperator,
    estimators,
)
from hessops.batch.precision import LowerPrecisionBatchOperation
from hessops.errors import NotFittedError
from hessops.influence import (
    BilinearForm,
    CgInfluence,
    DirectInfluence,
    EkfacInfluence,
    FittedModel,
    GradientProvider,
    Influence,
    InfluenceFunctionModel,
    SequentialInfluenceCalculator,
)

NUM_POINTS = 80
NUM_PARAMETERS = 23
LAMBDA = 0.1


# --- models and data -----------------------------------------------------------------------------


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def points(count: int = NUM_POINTS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(NUM_POINTS, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(2, (NUM_POINTS,), generator=generator)
    return x[:count], y[:count]


def loader() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*points()), batch_size=50, shuffle=True)


def in_order() -> list[tuple[Tensor, Tensor]]:
    x, y = points()
    return [(x[:50], y[:50]), (x[50:], y[50:])]


def vectors(size: int) -> Tensor:
    return torch.randn(2, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def made(kind: Callable[..., Any], *args: object, **settings: object) -> Any:
    """An operator over the data."""
    return kind(net(), nn.CrossEntropyLoss(), loader(), *args, **settings)


def of_model(kind: Callable[..., Any], *args: object, **settings: object) -> Any:
    """A batch operation, an objective or an influence model."""
    return kind(net(), nn.CrossEntropyLoss(), *args, **settings)


def spd(size: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return root @ root.T + torch.eye(size, dtype=torch.float64)


def matrix() -> MatrixOperator:
    return MatrixOperator(spd(), positive_semidefinite=True)


def pairs() -> hessops.LowRankProductRepresentation:
    values, basis = torch.linalg.eigh(spd())
    return hessops.LowRankProductRepresentation(values[-3:], basis[:, -3:].contiguous())


def squared(operator: TensorOperator) -> TensorOperator:
    return operator @ operator


class Doubling(TensorDictOperator):
    """An operator of a user, without a `_move`."""

    def _apply_rows(self, rows: Tensor) -> Tensor:
        return 2 * rows


class Twice(CompositeOperator):
    def __init__(self, operator: TensorOperator) -> None:
        super().__init__(operator.input_size, operator.dtype, operator.device)
        self.operator = operator

    def _apply_rows(self, rows: Tensor) -> Tensor:
        return self.operator._product(self.operator._product(rows))

    def _mapped(self, function: Callable[[TensorOperator], TensorOperator]) -> TensorOperator:
        return Twice(function(self.operator))


class SquareRootAveraging(hessops.Averaging):
    def weight(self, num_points: int) -> float:
        return num_points**0.5


# --- what is seen --------------------------------------------------------------------------------


def product(operator: TensorOperator) -> object:
    return operator.apply(vectors(operator.input_size))


def solution(inverse: hessops.InverseOperator) -> object:
    return inverse.solve(vectors(inverse.input_size))


def batch_product(operation: BatchOperation) -> object:
    return operation.apply(points(), vectors(operation.space.size))


def losses(objective: hessops.Objective) -> object:
    batch = hessops.Batch.from_raw(points())
    objective.check(batch)
    return objective.sample_losses(objective.params, batch).detach()


def passes(stream: BatchStream) -> object:
    return [[(batch.x, batch.y) for batch in stream] for _ in range(2)]


def averaged(averaging: hessops.Averaging) -> object:
    return averaging.reduce([(torch.ones(2), 1), (torch.zeros(2), 3)])


def structure(space: ParameterSpace) -> object:
    return space.unflatten(vectors(space.size)), space.indices(space.names[1:2]), repr(space)


def fitted_to(recipe: hessops.Preconditioner) -> object:
    return recipe.fit(made(GeneralizedGaussNewtonOperator), LAMBDA).apply(vectors(NUM_PARAMETERS))


def gradients(provider: GradientProvider) -> object:
    return provider.flat_grads(*points())


def settings(model: InfluenceFunctionModel) -> object:
    with pytest.raises(NotFittedError):
        model.influences(*points())
    return model.configuration()


def scores(model: InfluenceFunctionModel) -> object:
    x, y = points()
    return model.influences(x[:3], y[:3], x[:7], y[:7]), model.self_influence(x[:3], y[:3])


def factors(fitted: FittedModel) -> object:
    return fitted.factors(fitted.provider.batch(*points()))


def all_scores(calculator: SequentialInfluenceCalculator) -> object:
    return calculator.influences(in_order()[1:], in_order()).compute()


def computed(lazy: Any) -> object:
    return lazy.compute()


def forms(form: BilinearForm) -> object:
    return form.inner_prod(vectors(form.operator.input_size))


def arrays(converter: hessops.influence.TorchNumpyConverter) -> object:
    return converter.to_numpy(converter.from_numpy(np.ones(2))).tolist()


def itself(value: object) -> object:
    return value


# --- cases ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """An object, and what can be seen of it.

    Attributes:
        make: Makes it, equal in every call.
        see: What it computes; the second time as the first.
        keeps: Bytes of what it finds in its first use and keeps for good.
        moves: Whether `to` takes it to another device; ``None`` where it has no `to`.
    """

    make: Callable[[], Any]
    see: Callable[[Any], object] = product
    keeps: int = 0
    moves: bool | None = True


def operator(kind: Callable[..., Any], *args: object, **settings: object) -> Case:
    return Case(partial(made, kind, *args, **settings))


def changed(change: Callable[[Any], Any], kind: Callable[..., Any] = HessianOperator) -> Case:
    return Case(lambda: change(made(kind)))


def solver(make: Callable[[Any], Any], keeps: int = 0) -> Case:
    """A solver of the damped matrix of a model."""
    return Case(lambda: make(made(GeneralizedGaussNewtonOperator)), solution, keeps)


def constant(make: Callable[[], Any], see: Callable[[Any], object] = itself) -> Case:
    return Case(make, see, moves=None)


OPERATORS: Mapping[str, Case] = {
    "Hessian": operator(HessianOperator),
    "Hessian of data that are not kept": Case(
        lambda: of_model(HessianOperator, in_order(), cache=False)
    ),
    "Gauss-Newton": operator(GaussNewtonOperator),
    "generalized Gauss-Newton": operator(GeneralizedGaussNewtonOperator),
    "inverse harmonic mean": operator(hessops.InverseHarmonicMeanOperator, LAMBDA),
    "averaging of a user": Case(
        lambda: of_model(HessianOperator, in_order(), averaging=SquareRootAveraging())
    ),
    "batch operator": Case(
        lambda: BatchOperator(of_model(HessianBatchOperation), in_order(), hessops.ChunkAveraging())
    ),
    "restricted": changed(lambda H: H.restricted(["2.weight"])),
    "linearized": changed(lambda H: H.linearize()),
    "in lower precision": changed(lambda H: H.in_precision(torch.float32)),
    "sum": changed(lambda H: (2 * H + made(GaussNewtonOperator)).shift(0.5)),
    "square, linearized": changed(lambda H: squared(H.linearize())),
    "composite of a user": changed(Twice),
    "dictionaries of a user": Case(
        lambda: Doubling(ParameterSpace.from_model(net()), symmetric=True), moves=False
    ),
    "transposed": Case(lambda: MatrixOperator(spd().tril()).T),
    "identity": Case(lambda: hessops.IdentityOperator(9, dtype=torch.float64)),
    "diagonal": Case(lambda: hessops.DiagonalOperator(spd().diagonal())),
    "matrix": Case(matrix),
    "blocks": changed(lambda H: hessops.BlockDiagonalOperator([matrix(), H])),
    "low rank": Case(lambda: hessops.LowRankProductOperator(pairs())),
    "KFAC": operator(KfacOperator),
    "EKFAC": operator(hessops.EkfacOperator, "monte-carlo"),
    "eigen blocks": changed(lambda K: K.damped(LAMBDA), KfacOperator),
    "eigen": changed(lambda K: K.blocks["0"], KfacOperator),
}

SOLVERS: Mapping[str, Case] = {
    "CG": solver(lambda G: CgOperator(G, LAMBDA, rtol=0.1)),
    "block CG": solver(lambda G: CgOperator(G, LAMBDA, rtol=0.1, use_block_cg=True)),
    "CG, Nyström": solver(
        lambda G: CgOperator(G, LAMBDA, rtol=0.1, preconditioner=NystroemPreconditioner(3)),
        keeps=2500,
    ),
    "CG, Jacobi": solver(
        lambda G: CgOperator(G, LAMBDA, rtol=0.1, preconditioner=JacobiPreconditioner(3)),
        keeps=1500,
    ),
    "CG, blocks": solver(
        lambda G: CgOperator(
            G, LAMBDA, rtol=0.1, preconditioner=hessops.BlockDiagonalPreconditioner()
        ),
        keeps=9000,
    ),
    "CG, preconditioned by KFAC": solver(
        lambda G: CgOperator(
            G, LAMBDA, rtol=0.1, preconditioner=made(KfacOperator).inverse(regularization=LAMBDA)
        )
    ),
    "MINRES": solver(lambda G: MinresOperator(G, LAMBDA, rtol=0.1)),
    "LiSSA": solver(lambda G: LissaOperator(G.batch_operation, G.stream, LAMBDA, 4, num_chains=2)),
    "LiSSA, scaled": solver(
        lambda G: LissaOperator(G.batch_operation, in_order(), LAMBDA, 4, scale="auto")
    ),
    "LiSSA, one batch": solver(
        lambda G: LissaOperator(G.batch_operation, [points()], LAMBDA, 5, scale=2.0)
    ),
    "LiSSA of an operator": solver(lambda G: LissaOperator.from_operator(G, LAMBDA, 4)),
    "refinement": solver(
        lambda G: IterativeRefinementOperator(
            G, partial(MinresOperator, rtol=0.1), regularization=LAMBDA, rtol=0.01
        )
    ),
    "direct, of an operator": solver(lambda G: hessops.DirectSolveOperator(G, LAMBDA)),
    "direct": Case(lambda: hessops.DirectSolveOperator(spd(), LAMBDA), solution),
    "sample space": Case(
        lambda: SampleSpaceInverse(of_model(GaussNewtonOperator, [points(9)]), LAMBDA), solution
    ),
    "Woodbury": Case(lambda: hessops.LowRankOperator(pairs(), LAMBDA), solution),
    "KFAC, inverse": Case(lambda: made(KfacOperator).inverse(regularization=LAMBDA), solution),
    "closed form": Case(lambda: hessops.DiagonalOperator(spd().diagonal()).inverse(), solution),
}

PRECONDITIONERS: Mapping[str, Case] = {
    name: case
    for recipe in (
        JacobiPreconditioner(3),
        NystroemPreconditioner(3),
        hessops.BlockDiagonalPreconditioner(),
    )
    for name, case in {
        f"{type(recipe).__name__}": constant(partial(copy.copy, recipe), fitted_to),
        f"{type(recipe).__name__}, fitted": changed(
            lambda G, recipe=recipe: recipe.fit(G, LAMBDA), GeneralizedGaussNewtonOperator
        ),
    }.items()
}


def ekfac(*args: object, **settings: object) -> InfluenceFunctionModel:
    return EkfacInfluence(net(), regularization=LAMBDA, **settings)


INFLUENCE_MODELS: Mapping[str, Callable[[], InfluenceFunctionModel]] = {
    "DirectInfluence": partial(of_model, DirectInfluence, LAMBDA, "layer_wise"),
    "CgInfluence": partial(
        of_model,
        CgInfluence,
        Damping(relative=0.1),
        "layer_wise",
        "generalized_gauss_newton",
        rtol=1e-2,
        preconditioner=NystroemPreconditioner(3),
    ),
    "LissaInfluence": partial(
        of_model,
        hessops.influence.LissaInfluence,
        LAMBDA,
        second_order_mode="gauss_newton",
        maxiter=3,
        warn_on_max_iteration=False,
    ),
    "ArnoldiInfluence": partial(of_model, hessops.influence.ArnoldiInfluence, LAMBDA, rank=3),
    "NystroemSketchInfluence": partial(
        of_model,
        hessops.influence.NystroemSketchInfluence,
        LAMBDA,
        second_order_mode="gauss_newton",
        rank=4,
    ),
    "InverseHarmonicMeanInfluence": partial(
        of_model, hessops.influence.InverseHarmonicMeanInfluence, LAMBDA
    ),
    "Influence": partial(
        of_model,
        Influence,
        LAMBDA,
        inverse=partial(MinresOperator, rtol=1e-2),
        curvature=GeneralizedGaussNewtonOperator,
    ),
    "EkfacInfluence": partial(ekfac, update_diagonal=True),
}


def fitted(make: Callable[[], InfluenceFunctionModel]) -> InfluenceFunctionModel:
    return make().fit(in_order())


def cg_influence() -> InfluenceFunctionModel:
    return of_model(CgInfluence, LAMBDA, "layer_wise", "gauss_newton", rtol=0.1).fit(in_order())


def calculator() -> SequentialInfluenceCalculator:
    return SequentialInfluenceCalculator(fitted(INFLUENCE_MODELS["DirectInfluence"]), cache=True)


INFLUENCES: Mapping[str, Case] = {
    **{f"{n}, not fitted": Case(make, settings) for n, make in INFLUENCE_MODELS.items()},
    **{f"{n}, fitted": Case(partial(fitted, m), scores) for n, m in INFLUENCE_MODELS.items()},
    "what was fitted": Case(lambda: cg_influence().fitted, factors),
    "fitted block": Case(
        lambda: cg_influence().fitted.blocks["0"], lambda block: block.inverse.apply(vectors(15))
    ),
    "training data": constant(lambda: cg_influence().fitted.data),
    "gradient provider": Case(lambda: GradientProvider(of_model(hessops.Objective)), gradients),
    "bilinear form": constant(lambda: BilinearForm(matrix()), forms),
    "bilinear form of low rank": constant(
        lambda: BilinearForm.of(hessops.LowRankProductOperator(pairs())), forms
    ),
    "calculator": constant(calculator, all_scores),
    "lazy factors": constant(lambda: calculator().influence_factors(in_order()), computed),
    "lazy influences": constant(
        lambda: calculator().influences(in_order()[1:], in_order()), computed
    ),
    "influences of given factors": constant(
        lambda: calculator().influences_from_factors(vectors(NUM_PARAMETERS), in_order()),
        computed,
    ),
    "influences of an array": constant(
        lambda: calculator().influences_from_factors(vectors(NUM_PARAMETERS).numpy(), in_order()),
        computed,
    ),
    "chunk": constant(lambda: next(iter(calculator().influences(in_order()[1:], in_order())))),
    "top": constant(
        lambda: calculator().influences(in_order()[1:], in_order()).top_k(2),
        lambda top: (top.values, top.indices),
    ),
    "memory": constant(lambda: calculator().estimate_memory(in_order()[1:], in_order())),
    "converter": constant(hessops.influence.TorchNumpyConverter, arrays),
}

PARTS: Mapping[str, Case] = {
    "Hessian of a batch": Case(partial(of_model, HessianBatchOperation), batch_product),
    "Gauss-Newton of a batch": Case(
        partial(of_model, hessops.GaussNewtonBatchOperation), batch_product
    ),
    "generalized Gauss-Newton of a batch": Case(
        partial(of_model, hessops.GeneralizedGaussNewtonBatchOperation), batch_product
    ),
    "inverse harmonic mean of a batch": Case(
        partial(of_model, hessops.InverseHarmonicMeanBatchOperation, LAMBDA), batch_product
    ),
    "lower precision of a batch": Case(
        lambda: LowerPrecisionBatchOperation(of_model(HessianBatchOperation), torch.float32),
        batch_product,
    ),
    "objective": Case(partial(of_model, hessops.Objective), losses),
    "space": Case(lambda: ParameterSpace.from_model(net()), structure),
    "stream": Case(lambda: BatchStream(in_order()), passes),
    "stream that shuffles": Case(lambda: BatchStream(loader()), passes),
    "batch": Case(lambda: hessops.Batch.from_raw(points()), lambda batch: (batch.x, batch.y)),
    "point averaging": constant(hessops.PointAveraging, averaged),
    "chunk averaging": constant(hessops.ChunkAveraging, averaged),
    "low-rank pairs": Case(pairs, lambda found: (found.eigen_vals, found.projections)),
    "estimate": constant(lambda: estimators.trace(matrix())),
    "eigenpairs": constant(lambda: estimators.eigenpairs(matrix(), k=2)),
    "spectral density": constant(lambda: estimators.spectral_density(matrix(), num_probes=2)),
    "solution": constant(lambda: solution(CgOperator(matrix()))),
    "status": constant(lambda: hessops.SolveStatus.CONVERGED),
    "damping": constant(lambda: Damping(relative=0.1)),
    "block mode": constant(lambda: hessops.influence.BlockMode.FULL),
    "influence mode": constant(lambda: hessops.influence.InfluenceMode.UP),
    "second-order mode": constant(lambda: hessops.influence.SecondOrderMode.HESSIAN),
}

CASES: Mapping[str, Case] = {
    **OPERATORS,
    **SOLVERS,
    **PRECONDITIONERS,
    **INFLUENCES,
    **PARTS,
}


def leaves(value: object) -> Iterator[object]:
    """What a result is made of: tensors, numbers and words."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from leaves(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from leaves(item)
    elif hasattr(value, "__dataclass_fields__"):
        yield from leaves(vars(value))
    else:
        yield value


def same_bits(first: object, second: object) -> bool:
    """Whether two results are equal to the last bit."""
    one, other = list(leaves(first)), list(leaves(second))
    return len(one) == len(other) and all(
        torch.equal(a, b) and a.dtype == b.dtype
        if isinstance(a, Tensor) and isinstance(b, Tensor)
        else a == b
        for a, b in zip(one, other, strict=True)
    )
