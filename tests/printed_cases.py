"""One object of every public kind that a user prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial, reduce
from operator import add
from pathlib import Path
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hessops as h
from hessops import influence as inf
from hessops.distributed import DistributedAveraging
from hessops.errors import HessopsWarning
from hessops.estimators import Estimate
from hessops.influence.storage import ChunkStore
from hessops.operators.eigen import DenseEigenOperator
from hessops.testing import check_operator

SIZE = 6


class OwnPreconditioner(h.Preconditioner):
    def fit(
        self, operator: h.TensorOperator, regularization: float | None = None
    ) -> h.TensorOperator:
        return h.IdentityOperator(operator.input_size, operator.dtype)


class Points:
    """A model and its data, with what is made of them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = (nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))
        self.model = nn.Sequential(*layers).double().eval()
        self.loss = nn.CrossEntropyLoss()
        self.x = torch.randn(20, 4, dtype=torch.float64)
        self.y = torch.randint(3, (20,))
        self.data = [(self.x[:12], self.y[:12]), (self.x[12:], self.y[12:])]
        self.G = h.GeneralizedGaussNewtonOperator(self.model, self.loss, self.data)
        self.G.check_data()

    @property
    def of_model(self) -> tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor]]]:
        return self.model, self.loss, self.data


def matrix(scale: float = 1.0) -> h.MatrixOperator:
    return h.MatrixOperator(scale * torch.eye(SIZE, dtype=torch.float64))


def sum_of(count: int) -> h.TensorOperator:
    return reduce(add, [(i + 2.0) * matrix(i) for i in range(count)])


def nested(depth: int) -> h.TensorOperator:
    operator: h.TensorOperator = matrix()
    for _ in range(depth):
        operator = (operator @ matrix(2.0)).shift(0.5) + matrix(3.0)
    return operator


def power_of_two(levels: int) -> h.TensorOperator:
    """A^(2^levels), whose tree has as many leaves."""
    operator = matrix() + matrix(2.0)
    for _ in range(levels):
        operator = operator @ operator
    return operator


def algebra() -> dict[str, object]:
    diagonal = h.DiagonalOperator(torch.ones(SIZE, dtype=torch.float64))
    skew = h.MatrixOperator(torch.arange(36, dtype=torch.float64).reshape(SIZE, SIZE))
    return {
        "matrix": matrix(),
        "diagonal": diagonal,
        "identity": h.IdentityOperator(SIZE),
        "many blocks": h.BlockDiagonalOperator([matrix()] * 40),
        "long sum": sum_of(30),
        "nested": nested(25),
        "power": power_of_two(40),
        "transposed": skew.T,
        "closed form": (2 * matrix()).shift(1.0).inverse(),
        "direct": h.DirectSolveOperator(torch.eye(SIZE)),
        "eigen": DenseEigenOperator(*torch.linalg.eigh(torch.eye(SIZE))),
        "conformance": check_operator(diagonal),
        "estimate": Estimate(1.0, 0.1, 32, "hutchinson"),
        "estimates": Estimate(torch.zeros(10**6), torch.zeros(10**6), 3, "xdiag"),
    }


def curvature(p: Points) -> dict[str, object]:
    kfac, ekfac = h.KfacOperator(*p.of_model), h.EkfacOperator(*p.of_model)
    averaging = h.ChunkAveraging()
    smooth = partial(cross_entropy, label_smoothing=0.1)
    return {
        "hessian": h.HessianOperator(*p.of_model),
        "linearized": h.HessianOperator(*p.of_model).linearize(),
        "lambda": h.HessianOperator(p.model, lambda o, t: cross_entropy(o, t), p.data),
        "partial": h.Objective(p.model, smooth),
        "gauss-newton": h.GaussNewtonOperator(*p.of_model, averaging=averaging),
        "generalized": p.G,
        "low precision": p.G.in_precision(torch.bfloat16),
        "restricted": p.G.restricted(["0.weight"]),
        "harmonic mean": h.InverseHarmonicMeanOperator(*p.of_model, regularization=0.1),
        "kfac": kfac,
        "ekfac": ekfac,
        "kfac block": kfac.blocks["0"],
        "kfac inverse": kfac.inverse(regularization=[0.1, 0.2, 0.3]),
        "sample space": p.G.shift(0.1).inverse(),
        "batch operator": h.BatchOperator(h.HessianBatchOperation(p.model, p.loss), p.data),
    }


def solvers(p: Points) -> dict[str, object]:
    generator = torch.Generator()
    blocks = {"first": ["0.weight", "0.bias"], "rest": ["2.weight", "2.bias", "3.weight", "3.bias"]}
    recipes = {
        "own": OwnPreconditioner(),
        "jacobi": h.JacobiPreconditioner(generator=generator),
        "nystroem": h.NystroemPreconditioner(rank=5, generator=generator),
        "blocks": h.BlockDiagonalPreconditioner(blocks, h.JacobiPreconditioner()),
        "ekfac": h.EkfacOperator(*p.of_model).inverse(regularization=0.1),
    }
    rhs = torch.randn(5, p.G.input_size, dtype=torch.float64)
    spread = h.DiagonalOperator(torch.logspace(-9, 4, p.G.input_size, dtype=torch.float64))
    gradients = h.GaussNewtonBatchOperation(p.model, p.loss)
    lissa = h.LissaOperator(gradients, p.data, regularization=0.5, maxiter=4)
    refined = h.IterativeRefinementOperator(p.G, regularization=0.1)
    pairs = h.LowRankProductRepresentation(
        torch.ones(2, dtype=torch.float64), torch.eye(p.G.input_size, 2, dtype=torch.float64)
    )
    fitted = {
        f"fitted {name}": recipe.fit(p.G, 0.1)
        for name, recipe in recipes.items()
        if isinstance(recipe, h.Preconditioner)
    }
    return {
        **recipes,
        **fitted,
        **{f"cg, {k}": h.CgOperator(p.G, 0.1, preconditioner=r) for k, r in recipes.items()},
        "block cg": h.CgOperator(p.G, 0.1, use_block_cg=True),
        "minres": h.MinresOperator(p.G, 0.1),
        "lissa": lissa,
        "refinement": refined,
        "pairs": h.LowRankProductRepresentation(torch.ones(2), torch.zeros(10**6, 2)),
        "low rank": h.LowRankProductOperator(pairs),
        "low-rank inverse": h.LowRankOperator(pairs, 0.1),
        "solution": h.CgOperator(p.G, 0.1).solve(rhs[0]),
        "solutions": h.CgOperator(p.G, 0.1, preconditioner=recipes["jacobi"]).solve(rhs),
        "mixed": h.CgOperator(spread, maxiter=3).solve(
            torch.cat([rhs, torch.eye(p.G.input_size, dtype=torch.float64)[:2]])
        ),
        "diverged": lissa.solve(rhs),
        "refined": refined.solve(rhs),
        "nothing to solve": h.CgOperator(p.G, 0.1).solve(rhs[:0]),
    }


def parts(p: Points) -> dict[str, object]:
    return {
        "hessian operation": h.HessianBatchOperation(p.model, p.loss),
        "gradients": h.GaussNewtonBatchOperation(p.model, p.loss),
        "outputs": h.GeneralizedGaussNewtonBatchOperation(p.model, p.loss),
        "harmonic": h.InverseHarmonicMeanBatchOperation(p.model, p.loss, 0.1),
        "objective": h.Objective(p.model, p.loss),
        "space": h.ParameterSpace.from_model(p.model),
        "stream": h.BatchStream(p.data),
        "used stream": p.G.stream,
        "batch": h.Batch.from_raw((torch.zeros(1000, 1000), torch.zeros(1000))),
        "mapping": h.Batch.from_raw(({"a": torch.zeros(9, 3), "b": torch.ones(9)}, None)),
        "damping": h.Damping(0.1),
        "points": h.PointAveraging(),
        "chunks": h.ChunkAveraging(),
        "status": h.SolveStatus.CONVERGED,
    }


def models(p: Points) -> Mapping[str, inf.InfluenceFunctionModel]:
    recipe = h.NystroemPreconditioner(rank=3, generator=torch.Generator())
    ggn = inf.SecondOrderMode.GENERALIZED_GAUSS_NEWTON
    dampings = {"0": 0.1, "2": h.Damping(0.1), "3": 1.0}
    return {
        "direct": inf.DirectInfluence(
            p.model,
            lambda o, t: cross_entropy(o, t),
            dampings,
            "layer_wise",
            ggn,
            unpack=lambda pair: pair,
        ),
        "cg": inf.CgInfluence(p.model, p.loss, 0.1, "full", ggn, preconditioner=recipe),
        "lissa": inf.LissaInfluence(p.model, p.loss, 1.0, h0=torch.zeros(53).double()),
        "arnoldi": inf.ArnoldiInfluence(p.model, p.loss, 0.1, "full", ggn, rank=3),
        "nystroem": inf.NystroemSketchInfluence(p.model, p.loss, 0.1, "full", ggn, rank=5),
        "ekfac": inf.EkfacInfluence(p.model, regularization=h.Damping(0.1), loss=p.loss),
        "harmonic": inf.InverseHarmonicMeanInfluence(p.model, p.loss, 0.1),
        "any": inf.Influence(p.model, p.loss, 0.1, "full", ggn, partial(h.CgOperator, rtol=1e-3)),
    }


def influences(p: Points, path: Path) -> dict[str, object]:
    before = {f"{name}, not fitted": model for name, model in models(p).items()}
    after = {f"{name}, fitted": model.fit(p.data) for name, model in models(p).items()}
    model = after["cg, fitted"]
    calculator = inf.SequentialInfluenceCalculator(model)
    lazy = calculator.influences(p.data, p.data)
    store = ChunkStore.open(path, shape=(4, 4), chunks=(2, 4), dtype=torch.float32, manifest={})
    low_rank = h.LowRankProductOperator(
        h.LowRankProductRepresentation(torch.ones(2), torch.eye(SIZE, 2))
    )
    return {
        **before,
        **after,
        "fit": model.fitted,
        "block": model.fitted.blocks["full"],
        "training data": model.fitted.data,
        "provider": model.gradient_provider,
        "calculator": calculator,
        "factors": calculator.influence_factors(p.data),
        "given factors": calculator.influences_from_factors(torch.zeros(2, 53).double(), p.data),
        "lazy": lazy,
        "chunk": next(iter(lazy)),
        "top": lazy.top_k(7),
        "memory": calculator.estimate_memory(p.data, p.data),
        "converter": inf.TorchNumpyConverter(),
        "form": inf.BilinearForm(p.G),
        "low-rank form": inf.BilinearForm.of(low_rank),
        "store": store,
    }


def every_object(path: Path) -> dict[str, object]:
    points = Points()
    with catch_warnings():
        simplefilter("ignore", HessopsWarning)
        found: Iterator[tuple[str, object]] = (
            (f"{group.__name__}: {name}", value)
            for group, made in (
                (algebra, algebra()),
                (curvature, curvature(points)),
                (solvers, solvers(points)),
                (parts, parts(points)),
                (influences, influences(points, path)),
            )
            for name, value in made.items()
        )
        return dict(found)


# Printed with the process group that it needs, in the tests of several processes.
ELSEWHERE = (DistributedAveraging, inf.DaskInfluenceCalculator)
