"""Passes over the data and time until a Hessian system is solved, beside other libraries.

The system is (H + λI) x = b with H the Hessian of a trained digits network and b the gradients of
64 test points. Everyone is asked for a true relative residual of 1e-4, and it is measured for
everyone by the same operator. A pass is one iteration over the loader, whatever it serves;
`hessops` is run without its cache, so that the loader sees them all. Of the others, pyDVL and
curvlinops are known; one that is not installed is left out.

    python benchmarks/passes_to_solve.py [--rhs 64] [--width 128] [--damping 0.01] [--rtol 1e-4]
        [--vectors 16] [--dampings 0.1 0.01 0.001]

A library may stop at a smaller residual than it was asked for; ``--rtol`` asks `hessops` for as
much.

A second table compares preconditioners for conjugate gradients, on some of the right-hand sides,
for the Hessian and for the generalized Gauss-Newton matrix (GGN), each plus λI; dampings at which
the Hessian is not positive definite are left out. Passes and seconds include the set-up, whose
share comes first; iterations are the most of any right-hand side. Passes differ in their price. One
for the solve is a product with the matrix for each right-hand side. That for the set-up of Nyström
is one for each of 110 columns, that for Jacobi one for each of 10. KFAC takes one pass and EKFAC
two: about as many backward passes as classes each with the type-2 Fisher matrix, one each with the
empirical one. All preconditioners could be had for another λ without a pass; here each λ pays.
"""

from __future__ import annotations

import argparse
import importlib
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from scipy.sparse.linalg import eigsh
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hessops import (
    CgOperator,
    EkfacOperator,
    GeneralizedGaussNewtonOperator,
    HessianOperator,
    JacobiPreconditioner,
    KfacOperator,
    MinresOperator,
    NystroemPreconditioner,
    TensorOperator,
)

RTOL = 1e-4
LOSS = nn.CrossEntropyLoss()
SKETCH = NystroemPreconditioner(rank=100)


class CountingLoader:
    """A loader that counts the passes over it."""

    def __init__(self, x: Tensor, y: Tensor, batch_size: int) -> None:
        self.loader = DataLoader(TensorDataset(x, y), batch_size=batch_size)
        self.passes = 0

    def __iter__(self) -> Iterator[list[Tensor]]:
        self.passes += 1
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)


def trained(width: int, steps: int) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        LOSS(model(x[:1400]), y[:1400]).backward()
        optimizer.step()
    return model.eval(), x[:1400], y[:1400], x[1400:], y[1400:]


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    params = list(model.parameters())
    rows = [
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(LOSS(model(a), b), params)])
        for a, b in zip(x.split(1), y.split(1), strict=True)
    ]
    return torch.stack(rows)


def pydvl(
    model: nn.Module, data: CountingLoader, rhs: Tensor, damping: float, *, block: bool
) -> Tensor:
    """Solves with pyDVL's CgOperator, whose Hessian averages the means of equal batches."""
    operators = importlib.import_module("pydvl.influence.torch.operator")
    hessian = operators.HessianOperator(model, LOSS, data)
    solver = operators.CgOperator(
        hessian, regularization=damping, rtol=RTOL, atol=0.0, use_block_cg=block
    )
    return solver.apply(rhs)


def curvlinops(model: nn.Module, data: CountingLoader, rhs: Tensor, damping: float) -> Tensor:
    """Solves with curvlinops' CGInverseLinearOperator."""
    library = importlib.import_module("curvlinops")
    operators = importlib.import_module("curvlinops.examples")
    params = list(model.parameters())
    hessian = library.HessianLinearOperator(
        model, LOSS, params, data, check_deterministic=False, num_data=1400
    )
    identity = operators.IdentityLinearOperator(
        [p.shape for p in params], torch.device("cpu"), torch.float32
    )
    inverse = library.CGInverseLinearOperator(
        hessian + damping * identity, tolerance=RTOL, max_iter=5000, max_tridiag_iter=0
    )
    return (inverse @ rhs.T).T


def measured(
    name: str,
    solve: Callable[[nn.Module, CountingLoader, Tensor], Tensor],
    model: nn.Module,
    data: CountingLoader,
    rhs: Tensor,
    system: HessianOperator,
) -> None:
    data.passes = 0
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = solve(model, data, rhs)
    except ImportError as error:
        print(f"{name:28}  not installed ({error.name})")
        return
    except Exception as error:
        print(f"{name:28}  failed: {type(error).__name__}: {str(error)[:90]}")
        return
    seconds = time.perf_counter() - start
    residuals = (rhs - system.apply(value.detach())).norm(dim=1) / rhs.norm(dim=1)
    print(
        f"{name:28}  {data.passes:6} passes  {seconds:7.1f} s  "
        f"true residuals: median {residuals.median():.1e}, worst {residuals.max():.1e}"
    )


# --- preconditioners -------------------------------------------------------------------------

# From the operator, its model and data, and a damping to what is close to the damped inverse.
SetUp = Callable[[TensorOperator, nn.Module, CountingLoader, float], TensorOperator | None]


def kronecker(
    system: TensorOperator,
    model: nn.Module,
    data: CountingLoader,
    damping: float,
    *,
    kind: type[KfacOperator],
    fisher_type: str = "type-2",
) -> TensorOperator:
    operator = kind(model, LOSS, data, fisher_type, cache=False)
    return operator.inverse(regularization=damping)


SET_UPS: dict[str, SetUp] = {
    "none": lambda system, model, data, damping: None,
    "Jacobi": lambda system, model, data, damping: JacobiPreconditioner().fit(system, damping),
    "Nyström, rank 100": lambda system, model, data, damping: SKETCH.fit(system, damping),
    "KFAC": partial(kronecker, kind=KfacOperator),
    "EKFAC": partial(kronecker, kind=EkfacOperator),
    "KFAC, empirical": partial(kronecker, kind=KfacOperator, fisher_type="empirical"),
    "EKFAC, empirical": partial(kronecker, kind=EkfacOperator, fisher_type="empirical"),
}


def preconditioned(
    model: nn.Module, data: CountingLoader, rhs: Tensor, dampings: list[float], rtol: float
) -> None:
    """Prints the second table."""
    matrices = {
        "Hessian": HessianOperator(model, LOSS, data, cache=False),
        "GGN": GeneralizedGaussNewtonOperator(model, LOSS, data, cache=False),
    }
    linear = matrices["Hessian"].to_scipy()
    smallest = float(eigsh(linear, k=1, which="SA", tol=1e-2, return_eigenvectors=False)[0])
    print(
        f"\npreconditioners for {len(rhs)} right-hand sides, rtol {rtol:g}; smallest eigenvalue of "
        f"the Hessian {smallest:.1e}\n{'':20}{'set-up':>14}{'conjugate gradients':>30}"
        f"{'block':>28}{'worst true':>14}\n{'':20}{'passes':>8}{'s':>6}"
        + f"{'iterations':>14}{'passes':>8}{'s':>8}" * 2
        + f"{'residual':>12}"
    )
    for title, system in matrices.items():
        for damping in dampings:
            if title == "Hessian" and smallest + damping <= 0:
                continue
            print(f"{title}, λ = {damping:g}")
            for name, set_up in SET_UPS.items():
                preconditioned_row(name, set_up, system, model, data, rhs, damping, rtol)


def preconditioned_row(
    name: str,
    set_up: SetUp,
    system: TensorOperator,
    model: nn.Module,
    data: CountingLoader,
    rhs: Tensor,
    damping: float,
    rtol: float,
) -> None:
    torch.manual_seed(0)
    data.passes, start = 0, time.perf_counter()
    near = set_up(system, model, data, damping)
    passes, seconds = data.passes, time.perf_counter() - start
    cells, worst, complete = f"{passes:8}{seconds:6.1f}", 0.0, True
    for use_block_cg in (False, True):
        data.passes, start = passes, time.perf_counter()
        inverse = CgOperator(
            system, damping, rtol=rtol, preconditioner=near, use_block_cg=use_block_cg
        )
        solution = inverse.solve(rhs)
        elapsed = seconds + time.perf_counter() - start
        cells += f"{int(solution.iterations.max()):14}{data.passes:8}{elapsed:8.1f}"
        worst = max(worst, float(solution.relative_residual_norms.max()))
        complete &= bool(solution.converged.all())
    print(f"  {name:18}{cells}{worst:12.1e}{'' if complete else '  not converged'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rhs", type=int, default=64)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rtol", type=float, default=RTOL, help="of hessops; others take 1e-4")
    parser.add_argument("--vectors", type=int, default=16, help="of them in the second table, 16")
    parser.add_argument("--dampings", type=float, nargs="*", default=[0.1, 0.01, 0.001])
    parser.add_argument("--slow", action="store_true", help="also solves one by one with pyDVL")
    arguments = parser.parse_args()
    model, x, y, x_test, y_test = trained(arguments.width, arguments.steps)
    data = CountingLoader(x, y, 350)
    rhs = gradients(model, x_test[: arguments.rhs], y_test[: arguments.rhs])
    system = HessianOperator(model, LOSS, [(x, y)]).shift(arguments.damping)
    print(f"{rhs.shape[1]} parameters, {len(rhs)} right-hand sides, damping {arguments.damping}")

    def ours(inverse: Callable[..., CgOperator]) -> Callable[..., Tensor]:
        def solve(model: nn.Module, data: CountingLoader, rhs: Tensor) -> Tensor:
            # Without the cache, so that the loader sees every pass.
            hessian = HessianOperator(model, LOSS, data, cache=False)
            return inverse(hessian, arguments.damping, rtol=arguments.rtol).apply(rhs)

        return solve

    ways = {
        "hessops, plain": ours(CgOperator),
        "hessops, MINRES": ours(MinresOperator),
        "hessops, block": ours(partial(CgOperator, use_block_cg=True)),
        "hessops, block and Nyström": ours(
            partial(CgOperator, use_block_cg=True, preconditioner=SKETCH)
        ),
        "pyDVL, block": partial(pydvl, damping=arguments.damping, block=True),
        "curvlinops": partial(curvlinops, damping=arguments.damping),
    }
    if arguments.slow:
        ways["pyDVL, one by one"] = partial(pydvl, damping=arguments.damping, block=False)
    for name, solve in ways.items():
        measured(name, solve, model, data, rhs, system)
    few = rhs[: arguments.vectors]
    preconditioned(model, data, few, arguments.dampings, arguments.rtol)


if __name__ == "__main__":
    main()
