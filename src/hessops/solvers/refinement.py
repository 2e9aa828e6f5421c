"""Iterative refinement: cheap products in low precision, the true residual in the full one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Self

import torch
from torch import Tensor

from hessops.errors import ArgumentTypeError
from hessops.operators.base import TensorOperator
from hessops.operators.inverse import InverseOperator, checked_rtol
from hessops.operators.outcomes import CODE, CURVATURE_NOISE, Problem, RowsMap, Run
from hessops.operators.solution import Solution, SolveStatus
from hessops.solvers.conjugate_gradient import CgOperator
from hessops.solvers.krylov import KrylovOperator
from hessops.validation import (
    checked_count,
    checked_number,
    checked_regularization,
    require_single_or_double,
)

Solver = Callable[[TensorOperator], TensorOperator]
# A correction is worth having as soon as it is better than rounding: the next one goes on from a
# residual in full precision. Tighter ones take more products in low precision for the same digits.
INNER_RTOL = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
# A correction that does not halve the residual is one that rounding has spoilt.
HALVING = 0.5
# What ended an inner solve and says more than that its correction was no use. A curvature of zero
# is none of it: in low precision it may be rounding alone, as steps that run out may.
TELLING = (SolveStatus.NON_FINITE, SolveStatus.DIVERGED, SolveStatus.PRECONDITIONER)
NORM_STEPS = 5
_STAGNATED = CODE[SolveStatus.STAGNATED]


class IterativeRefinementOperator(InverseOperator):
    r"""The inverse :math:`b \mapsto (A + \lambda I)^{-1} b`, mostly by products in low precision.

    .. math:: r = b - (A + \lambda I)\, x, \qquad (\tilde A + \lambda I)\, d \approx r, \qquad
              x \leftarrow x + d

    with :math:`\tilde A` the operator ``A.in_precision(product_dtype)`` and the residual r in the
    precision of A (Wilkinson 1963, Chapter 3; Carson & Higham 2018). A correction d gains as many
    digits as its own solve has, which a loose tolerance gives cheaply, until about
    :math:`\epsilon\kappa < 1/2` fails for the :math:`\epsilon` of `product_dtype` (6e-8 in float32,
    4e-3 in bfloat16) and the condition number :math:`\kappa` of A + λI, up to a factor that the
    model decides: then a correction no longer halves the residual, and the outcome is *stagnated*.

    All right-hand sides advance together. Each stops at

    .. math:: \lVert b - (A + \lambda I) x\rVert
              \le \max(\mathrm{rtol}\,\lVert b\rVert, \mathrm{atol})

    on the *true* residual, measured with A itself. `Solution.num_applications` and `iterations`
    count products with A and corrections; `Solution.detail` says how many products were computed in
    low precision.

    It pays where products in low precision are much faster, as on GPUs with little float64, because
    it takes more of them: each correction begins a Krylov space anew. For evenly spread eigenvalues
    these were 1.2 to 1.5 times the products of `CgOperator` in full precision, where few of them
    decide up to five times.

    `apply` and `solve` take a vector ``(n,)`` or the rows of a stack ``(k, n)`` of A's dtype and
    answer in the same shape. `apply` raises a `SolverError` where the value would be meaningless
    and warns (`ConvergenceWarning`) where it is short of the tolerance; `solve` reports both.

    Args:
        operator: A, in float64 or float32; made of curvature operators, at least in part.
        solver: Makes the inner inverse from Ã + λI, as in ``partial(MinresOperator, rtol=1e-2)``;
            ``None`` takes `CgOperator` with a relative tolerance of 1e-4 for float32 and 0.1 for
            bfloat16.
        product_dtype: Lower than that of A: ``torch.float32`` or ``torch.bfloat16``.
        regularization: λ >= 0, on top of any shift of A; ``None`` is 0.
        rtol: Relative tolerance; ``None`` is 1e-7 in float64 and 1e-4 in float32.
        atol: Absolute tolerance. With a positive one, zero solves every small right-hand side.
        maxiter: Most corrections.
        warn_on_max_iteration: ``True`` warns and logs when a solve stops short of its tolerance,
            ``False`` logs at DEBUG.

    Raises:
        ArgumentTypeError: `operator` is no operator, or `solver` makes no `InverseOperator`.
        ArgumentError: `product_dtype` is not lower; a number out of range.
        DtypeError: `operator` is of half precision.
        StructureError: No part of `operator` has products in lower precision, or the inner solver
            is known not to solve the system.

    Example:
        >>> import torch
        >>> from hessops import HessianOperator
        >>> from hessops.solvers.refinement import IterativeRefinementOperator
        >>> model = torch.nn.Linear(2, 1, bias=False).double()
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
        >>> H = HessianOperator(model, torch.nn.MSELoss(), [(x, torch.zeros_like(x[:, :1]))])
        >>> inverse = IterativeRefinementOperator(H, regularization=0.1, rtol=1e-12)
        >>> solution = inverse.solve(torch.tensor([1.0, 1.0], dtype=torch.float64))
        >>> solution.converged, solution.relative_residual_norms < 1e-12
        (tensor([True]), tensor([True]))
    """

    def __init__(
        self,
        operator: TensorOperator,
        solver: Solver | None = None,
        product_dtype: torch.dtype = torch.float32,
        regularization: float | None = None,
        rtol: float | None = None,
        atol: float = 0.0,
        maxiter: int = 50,
        warn_on_max_iteration: bool = True,
    ) -> None:
        super().__init__(operator, regularization, warn_on_max_iteration=warn_on_max_iteration)
        require_single_or_double(operator.dtype, "operator", "iterative refinement")
        self.rtol = checked_rtol(rtol, operator.dtype)
        self.atol = checked_number(atol, "atol", minimum=0)
        self.maxiter = checked_count(maxiter, "maxiter")
        self.product_dtype = product_dtype
        self.solver = solver
        self._rounded = operator.in_precision(product_dtype)
        self.inner = self._inner_inverse()

    def _inner_inverse(self) -> InverseOperator:
        """(Ã + λI)⁻¹, by the inner solver."""
        system = self._rounded.shift(self.regularization)
        solver = self.solver or partial(CgOperator, rtol=INNER_RTOL[self.product_dtype])
        inner = system.inverse(solver)
        if not isinstance(inner, InverseOperator):
            raise ArgumentTypeError(
                f"solver must make an InverseOperator, got {type(inner).__name__}"
            )
        return inner

    def _solve_rows(
        self, rhs: Tensor, start: Tensor | None = None, *, history: bool = False
    ) -> Solution:
        problem = Problem.scaled(
            rhs,
            start,
            rtol=self.rtol,
            atol=self.atol,
            maxiter=self.maxiter,
            keeps_history=history,
        )
        run = _RefinementRun(problem, self._linearized_inner(), self.product_dtype)
        product = self.system._product
        while not run.is_finished():
            run.advance(product(run.vectors()))
        return run.solution(product)

    def _linearized_inner(self) -> InverseOperator:
        """The inner inverse with graphs that serve all corrections of one solve."""
        if isinstance(self.inner, KrylovOperator):
            # Fitted once for all solves, and not for this copy alone.
            self.inner.fitted_preconditioner()
        inner = copy.copy(self.inner)
        inner.operator = self.inner.operator.linearize()
        return inner

    def with_regularization(self, regularization: float | None) -> Self:
        """The same solver with its own λ replaced; a shift of the operator stays.

        The inner solver is made anew.
        """
        changed = self._copy_on(self.device)
        changed._regularization = checked_regularization(regularization)
        changed.inner = changed._inner_inverse()
        return changed

    def refresh(self) -> Self:
        """Lets both operators take a new copy of the model, and makes the inner solver anew."""
        super().refresh()
        self.inner.refresh()
        return self

    def _move(self, device: torch.device) -> Self:
        moved = super()._move(device)
        moved._rounded = self._rounded.to(device)
        moved.inner = moved._inner_inverse()
        return moved

    def _label(self) -> str:
        return (
            f"{type(self).__name__}(regularization={self.regularization:g}, rtol={self.rtol:g}, "
            f"atol={self.atol:g}, {type(self.inner).__name__} with products in "
            f"{self.product_dtype})"
        )


class _RefinementRun(Run):
    """The corrections of all right-hand sides; those that are done stay in the stack as zeros."""

    def __init__(
        self, problem: Problem, inner: InverseOperator, product_dtype: torch.dtype
    ) -> None:
        super().__init__(problem)
        self.inner = inner
        self.product_dtype = product_dtype
        self.inner_applications = 0
        self.remarks: list[str] = []
        outcomes = self.outcomes
        self.iterate = torch.zeros_like(problem.rhs)
        # How the latest inner solve of each right-hand side ended.
        self.inner_status = [SolveStatus.CONVERGED] * len(problem.rhs)
        # Rows whose start has yet to be measured.
        self.awaited = torch.zeros_like(outcomes.undecided)
        if problem.start is not None:
            self.awaited = outcomes.undecided & (problem.start != 0).any(dim=1)
            self.iterate = torch.where(self.awaited.unsqueeze(1), problem.start, 0.0)
        outcomes.measured(self.iterate, outcomes.rhs_norms, ~self.awaited)
        outcomes.keep(outcomes.rhs_norms, ~self.awaited)
        if not bool(self.awaited.any()):
            self._correct(problem.rhs)

    def is_finished(self) -> bool:
        """Whether every right-hand side has its outcome."""
        return not bool(self.outcomes.undecided.any())

    def vectors(self) -> Tensor:
        """The iterates whose residuals are not known yet."""
        return torch.where(self.outcomes.undecided.unsqueeze(1), self.iterate, 0.0)

    def advance(self, products: Tensor) -> None:
        """Measures the true residuals, and corrects those that are worth it."""
        self.num_applications += 1
        rows = self.outcomes.undecided
        residual = self.problem.rhs - products
        norms = residual.norm(dim=1)
        if bool(self.awaited.any()):
            residual, norms = self._begun(residual, norms)
        else:
            self._judge(norms, rows)
        self.estimates = torch.where(rows, norms, self.estimates)
        if not self.is_finished():
            self._correct(residual)

    def _begun(self, residual: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
        """Takes the residuals of the starts; one that is worse than zero is no use."""
        outcomes = self.outcomes
        dropped = ~(norms <= outcomes.rhs_norms)
        self.iterate = torch.where(dropped.unsqueeze(1), 0.0, self.iterate)
        residual = torch.where(dropped.unsqueeze(1), self.problem.rhs, residual)
        norms = torch.where(dropped, outcomes.rhs_norms, norms)
        outcomes.measured(self.iterate, norms, outcomes.undecided)
        outcomes.keep(norms, self.awaited)
        self.awaited = torch.zeros_like(self.awaited)
        return residual, norms

    def _judge(self, norms: Tensor, rows: Tensor) -> None:
        """Decides about corrected rows by what the correction brought."""
        outcomes = self.outcomes
        before = outcomes.measured(self.iterate, norms, rows)
        outcomes.keep(norms, rows)
        outcomes.decide(rows & ~norms.isfinite(), SolveStatus.NON_FINITE)
        useless = rows & ~(norms <= HALVING * before)
        for status in TELLING:
            outcomes.decide(useless & self._ended_as(status), status)
        if bool((useless & self._ended_as(SolveStatus.MAX_ITERATIONS)).any()):
            self.remarks.append("The inner solver ran out of its own iterations.")
        outcomes.decide(useless, SolveStatus.STAGNATED)
        spent = outcomes.iterations >= self.problem.maxiter
        outcomes.decide(rows & spent, SolveStatus.MAX_ITERATIONS)

    def _correct(self, residual: Tensor) -> None:
        """One inner solve for all rows that are not decided."""
        outcomes = self.outcomes
        rows = outcomes.undecided
        if not bool(rows.any()):
            return
        solution = self.inner.solve(torch.where(rows.unsqueeze(1), residual, 0.0))
        self.inner_applications += solution.num_applications
        self.problem.precondition.count += solution.num_preconditioner_applications
        self.inner_status = list(solution.status)
        curvatures = solution.smallest_curvatures.to(outcomes.smallest_curvatures)
        smaller = outcomes.smallest_curvatures.minimum(curvatures)
        outcomes.smallest_curvatures = torch.where(rows, smaller, outcomes.smallest_curvatures)
        self._report_negative_curvature(residual, curvatures, rows)
        # A row that is decided keeps its iterate: its correction is zero.
        self.iterate = self.iterate + torch.where(rows.unsqueeze(1), solution.value, 0.0)
        outcomes.iterations = outcomes.iterations + (rows & outcomes.undecided)

    def _report_negative_curvature(
        self, residual: Tensor, curvatures: Tensor, rows: Tensor
    ) -> None:
        """Ends rows whose curvature is negative beyond the rounding of the low precision.

        The inner solver judges by the precision of the vectors. A curvature that is negative for
        the rounded operator only may be positive for A, so that a residual must tell.
        """
        found = rows & self._ended_as(SolveStatus.INDEFINITE)
        if not bool(found.any()):
            return
        noise = CURVATURE_NOISE * torch.finfo(self.product_dtype).eps * self._norms(residual)
        self.outcomes.decide(found & (curvatures < -noise), SolveStatus.INDEFINITE)
        if bool((found & self.outcomes.undecided).any()):
            self.remarks = [
                f"In {self.product_dtype} the operator has curvatures that rounding cannot tell "
                "from zero."
            ]

    def _norms(self, vectors: Tensor) -> Tensor:
        """A lower bound of the norm of the inner system, by some steps of the power method."""
        product: RowsMap = self.inner.operator._product
        norms = torch.zeros_like(self.estimates)
        for _ in range(NORM_STEPS):
            lengths = vectors.norm(dim=1)
            unit = vectors / torch.where(lengths > 0, lengths, 1.0).unsqueeze(1)
            vectors = product(unit)
            self.inner_applications += 1
            norms = norms.maximum(torch.nan_to_num(vectors.norm(dim=1)))
            vectors = torch.nan_to_num(vectors, posinf=0.0, neginf=0.0)
        return norms

    def _ended_as(self, status: SolveStatus) -> Tensor:
        flags = [ended is status for ended in self.inner_status]
        return torch.tensor(flags, dtype=torch.bool, device=self.iterate.device)

    def solution(self, product: RowsMap) -> Solution:
        """As of `Run`, with what was spent in low precision."""
        detail = (
            f"{self.num_applications} products in {self.problem.rhs.dtype} and "
            f"{self.inner_applications} in {self.product_dtype}, by "
            f"{type(self.inner).__name__}."
        )
        if bool((self.outcomes.status == _STAGNATED).any()):
            self.remarks.append(
                f"A correction did not halve the true residual: for products in "
                f"{self.product_dtype} the system may be too ill-conditioned; use a larger "
                "regularization or a wider product_dtype, or solve without refinement."
            )
        return self.outcomes.solution(
            self.num_applications, product, " ".join([detail, *self.remarks])
        )
