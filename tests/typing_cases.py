"""What a type checker, and so an editor, knows of the public names; read by mypy, never run."""

from __future__ import annotations

from functools import partial
from typing import assert_type

import torch
from torch import Tensor, nn

from hessops import (
    BatchStream,
    CgOperator,
    ClosedFormInverse,
    DiagonalOperator,
    HessianOperator,
    JacobiPreconditioner,
    KfacInverse,
    KfacOperator,
    LowRankProductRepresentation,
    MinresOperator,
    Objective,
    ParameterSpace,
    Solution,
    SolveStatus,
    TensorOperator,
    hvp,
)
from hessops.errors import ConvergenceWarning, HessopsWarning
from hessops.influence import (
    CgInfluence,
    LazyFactors,
    LazyInfluences,
    SequentialInfluenceCalculator,
    TopInfluences,
)

Data = list[tuple[Tensor, Tensor]]


def products(A: TensorOperator, B: DiagonalOperator, X: Tensor) -> None:
    assert_type(A.apply(X), Tensor)
    assert_type(A @ X, Tensor)
    assert_type(B @ X, Tensor)
    assert_type(A.to_dense(), Tensor)
    assert_type(A.apply_to_dict({"weight": X}), dict[str, Tensor])
    assert_type(A.shape, tuple[int, int])
    assert_type(A.symmetric, bool | None)


def algebra(A: TensorOperator, B: DiagonalOperator) -> None:
    assert_type(A @ B, TensorOperator)
    assert_type(A + B, TensorOperator)
    assert_type(A - B, TensorOperator)
    assert_type(-A, TensorOperator)
    assert_type(2 * A, TensorOperator)
    assert_type(A / 2.0, TensorOperator)
    assert_type(A.T, TensorOperator)
    assert_type(A.shift(0.1), TensorOperator)
    A * B  # type: ignore[operator]  # refused: a product of operators is A @ B


def the_kind_of_an_operator_is_kept(H: HessianOperator, K: KfacOperator) -> None:
    assert_type(H.to("cuda"), HessianOperator)
    assert_type(H.refresh(), HessianOperator)
    assert_type(H.restricted(["weight"]), HessianOperator)
    assert_type(H.stream, BatchStream)
    assert_type(H.objective, Objective | None)
    assert_type(H.space, ParameterSpace)
    assert_type(K.to("cpu").curvature.stream.num_points, int | None)


def inverses(A: TensorOperator, K: KfacOperator, b: Tensor) -> None:
    assert_type(A.inverse(), TensorOperator)
    assert_type(A.inverse(CgOperator), CgOperator)
    assert_type(A.inverse(partial(MinresOperator, rtol=1e-6)), MinresOperator)
    assert_type(A.inverse(CgOperator).solve(b), Solution)
    assert_type(K.inverse(), KfacInverse)
    assert_type(K.inverse(CgOperator), CgOperator)
    assert_type(K.inverse(regularization=0.1).with_regularization([0.1, 0.2]), KfacInverse)
    assert_type(CgOperator(A).with_regularization(0.1), CgOperator)
    assert_type(ClosedFormInverse(A, A).solve(b).converged, Tensor)
    CgOperator(A, preconditioner=JacobiPreconditioner(3))
    CgOperator(A, preconditioner=K.inverse())
    CgOperator(A, preconditioner=b)  # type: ignore[arg-type]  # refused: a matrix needs a wrapper
    A.inverse(b)  # type: ignore[call-overload]  # refused: not a solver


def outcomes(solution: Solution, pairs: LowRankProductRepresentation) -> None:
    assert_type(solution.value, Tensor)
    assert_type(solution.status, tuple[SolveStatus, ...])
    assert_type(solution.status[0].advice, str)
    assert_type(solution.residual_history, tuple[Tensor, ...] | None)
    assert_type(pairs.to("cpu").rank, int)


def influences(model: nn.Module, x: Tensor, data: Data) -> None:
    influence = CgInfluence(model, nn.MSELoss(), 0.1, rtol=1e-3, cache=False, averaging=None)  # type: ignore[arg-type]  # refused: no averaging
    assert_type(influence.fit(data), CgInfluence)
    calculator = SequentialInfluenceCalculator(influence)
    assert_type(calculator.influence_factors(data), LazyFactors)
    assert_type(calculator.influences(data, data, mode="up"), LazyInfluences)
    assert_type(calculator.influences(data, data).top_k(3), TopInfluences)
    CgInfluence(model, nn.MSELoss(), 0.1, no_such=True)  # type: ignore[call-arg]  # refused


def functions(params: dict[str, Tensor], x: Tensor) -> None:
    def loss(params: dict[str, Tensor]) -> Tensor:
        return torch.stack([p.square().sum() for p in params.values()]).sum()

    assert_type(hvp(loss, params, params), dict[str, Tensor])
    assert_type(hvp(lambda t: t.square().sum(), x, x), Tensor)


def categories(category: type[HessopsWarning]) -> type[UserWarning]:
    assert_type(ConvergenceWarning("short"), ConvergenceWarning)
    return category
