"""What all solves share: the scaled problem, and the outcome of every right-hand side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hessops.errors import ArgumentError
from hessops.functional.precision import finite_rows, largest_entries, powers_of_two
from hessops.operators.solution import Solution, SolveStatus

# The residual of a recurrence drifts from the true one. A candidate is verified when it is a
# little below the tolerance, so that the verification seldom fails by a hair.
CANDIDATE_FACTOR = 0.9
# A curvature below -100 eps ‖A‖‖p‖² is negative beyond the rounding of the product.
CURVATURE_NOISE = 100
# The true residual is measured at least this often, so that a drift is seen, and a good iterate is
# kept, long before the recurrence meets a tolerance that the precision does not allow.
CHECK_FACTOR = 0.01
# A reduction by eps^0.6 (7e-5 in float32, 4e-10 in float64) is well within the precision, so that
# nothing is measured on the way to it.
SAFE_EXPONENT = 0.6
# And after so many steps, so that a recurrence that falls no further is compared with the truth.
CHECK_INTERVAL = 100
# A true residual above twice that of the recurrence ends the trust in the recurrence.
DRIFT_FACTOR = 2
# A restart should bring the true residual below this fraction of the best one before. It may fail
# to once: after a drift by a hair there is little to gain.
PROGRESS_FACTOR = 0.9
USELESS_RESTARTS = 2

RowsMap = Callable[[Tensor], Tensor]

# Statuses as numbers, so that a tensor can hold one per row.
STATUS = dict(enumerate(SolveStatus))
CODE = {status: code for code, status in STATUS.items()}
UNDECIDED = -1


class CountedMap:
    """A linear map of rows that counts its applications; without a map it is the identity.

    Args:
        product: The map of rows ``(k, n)``.
        varies: Whether it is linear only up to a tolerance, as an iterative inverse is.
    """

    def __init__(self, product: RowsMap | None, *, varies: bool = False) -> None:
        self.product = product
        self.varies = varies
        self.count = 0

    def __call__(self, rows: Tensor) -> Tensor:
        """The map of rows ``(k, n)``, which may be the rows themselves.

        Raises:
            ArgumentError: It writes to its argument, which belongs to the solver.
        """
        if self.product is None:
            return rows
        self.count += 1
        version = rows._version
        mapped = self.product(rows)
        if rows._version != version:
            raise ArgumentError("the preconditioner writes to its argument; return a new tensor")
        return mapped


@dataclass(frozen=True, eq=False)
class Problem:
    """Right-hand sides scaled by powers of two, with what a method needs to solve for them.

    Attributes:
        rhs: b divided by `scales`, ``(k, n)``, so that no square in a norm underflows.
        scales: Powers of two, ``(k, 1)``.
        tolerances: Bounds of the true residuals in the scale of `rhs`, ``(k,)``.
        maxiter: Most steps for each right-hand side.
        start: First guesses in the scale of `rhs`; ``None`` is zero.
        precondition: The preconditioner, counted.
        keeps_history: Whether residual norms of all steps are wanted.
    """

    rhs: Tensor
    scales: Tensor
    tolerances: Tensor
    maxiter: int
    start: Tensor | None
    precondition: CountedMap
    keeps_history: bool

    @classmethod
    def scaled(
        cls,
        rhs: Tensor,
        start: Tensor | None,
        *,
        rtol: float,
        atol: float = 0.0,
        maxiter: int = 1,
        precondition: CountedMap | None = None,
        keeps_history: bool = False,
    ) -> Problem:
        """The problem of a stack of right-hand sides in the caller's scale."""
        scales = powers_of_two(rhs)
        scaled = rhs / scales
        if start is not None:
            start = start / scales
            # A guess beyond the range of the dtype in this scale is no use.
            start = torch.where(finite_rows(start).unsqueeze(1), start, 0.0)
        return cls(
            rhs=scaled,
            scales=scales,
            tolerances=(rtol * scaled.norm(dim=1)).maximum(atol / scales.squeeze(1)),
            maxiter=maxiter,
            start=start,
            precondition=precondition or CountedMap(None),
            keeps_history=keeps_history,
        )


class Outcomes:
    """Status, best verified iterate and history of every right-hand side of a problem."""

    def __init__(self, problem: Problem) -> None:
        rhs = problem.rhs
        self.problem = problem
        self.rhs_norms = rhs.norm(dim=1)
        # The iterate of the smallest true residual that was measured.
        self.best = torch.zeros_like(rhs)
        self.best_norms = torch.full_like(self.rhs_norms, torch.inf)
        self.iterations = torch.zeros(len(rhs), dtype=torch.int64, device=rhs.device)
        self.smallest_curvatures = torch.full_like(self.rhs_norms, torch.inf)
        # Zero solves every right-hand side that is small enough.
        solved = self.rhs_norms <= problem.tolerances
        self.status = torch.where(solved, CODE[SolveStatus.CONVERGED], UNDECIDED)
        # Restarts in succession that were no use.
        self._useless = torch.zeros_like(self.iterations)
        self._history: list[tuple[Tensor, Tensor]] = []

    @property
    def undecided(self) -> Tensor:
        """Which right-hand sides have no status yet, ``(k,)``."""
        return self.status == UNDECIDED

    def decide(self, rows: Tensor, status: SolveStatus) -> None:
        """Sets the status of those rows that have none yet."""
        self.status = torch.where(rows & self.undecided, CODE[status], self.status)

    def measured(self, iterate: Tensor, norms: Tensor, rows: Tensor) -> Tensor:
        """Takes true residual norms of some rows; returns their best norms before.

        Args:
            iterate: The iterates ``(k, n)``; the better ones are copied.
            norms: Norms of their true residuals, ``(k,)``.
            rows: Which of them were measured, ``(k,)``.
        """
        before = self.best_norms
        better = rows & norms.isfinite() & (norms < before)
        torch.where(better.unsqueeze(1), iterate, self.best, out=self.best)
        self.best_norms = torch.where(better, norms, before)
        # Negative curvature is a property of the operator: a lucky residual does not undo it.
        undoable = self.status != CODE[SolveStatus.INDEFINITE]
        met = rows & undoable & norms.isfinite() & (norms <= self.problem.tolerances)
        self.status = torch.where(met, CODE[SolveStatus.CONVERGED], self.status)
        return before

    def judge_restart(
        self, rows: Tensor, norms: Tensor, before: Tensor, status: SolveStatus
    ) -> None:
        """Gives up rows that are to restart, where restarts have not helped."""
        useless = rows & ~(norms <= PROGRESS_FACTOR * before)
        counted = torch.where(useless, self._useless + 1, 0)
        self._useless = torch.where(rows, counted, self._useless)
        spent = self.iterations >= self.problem.maxiter
        self.decide(rows & (self._useless >= USELESS_RESTARTS), status)
        self.decide(rows & spent & (self._useless > 0), status)

    def keep(self, residual_norms: Tensor, rows: Tensor) -> None:
        """Keeps the residual norms of some rows in the history, if there is one."""
        if self.problem.keeps_history:
            norms = torch.where(residual_norms.isfinite(), residual_norms, torch.inf)
            self._history.append((norms, rows.clone()))

    def solution(self, num_applications: int, product: RowsMap, detail: str = "") -> Solution:
        """The outcome in the scale of the caller's right-hand sides.

        Args:
            num_applications: Applications of the operator so far.
            product: The system, to measure again what scaling back has rounded.
            detail: See `Solution`.
        """
        scales = self.problem.scales
        # A truncated solve may be wanted although residuals of conjugate gradients can rise above
        # that of zero before they fall; what failed otherwise is not better than zero.
        truncated = self.status == CODE[SolveStatus.MAX_ITERATIONS]
        useless = ~(self.best_norms <= self.rhs_norms) & ~(truncated & self.best_norms.isfinite())
        best = self.best.masked_fill_(useless.unsqueeze(1), 0.0)
        norms = torch.where(useless, self.rhs_norms, self.best_norms)
        value = best * scales
        # Powers of two scale exactly, unless the result overflows or becomes subnormal.
        overflown = ~finite_rows(value)
        value.masked_fill_(overflown.unsqueeze(1), 0.0)
        inexact = largest_entries((value / scales).sub_(best)).squeeze(1) != 0
        if bool(inexact.any()):
            measured = (self.problem.rhs - product(value / scales)).norm(dim=1)
            norms = torch.where(inexact, measured, norms)
            num_applications += 1
        failed = inexact & (norms > self.problem.tolerances)
        status = torch.where(
            failed & (self.status == CODE[SolveStatus.CONVERGED]),
            CODE[SolveStatus.STAGNATED],
            self.status,
        )
        status = torch.where(overflown, CODE[SolveStatus.NON_FINITE], status)
        # In float64, where the norms of float32 vectors neither overflow nor underflow.
        by_row = scales.squeeze(1).double()
        return Solution(
            value=value,
            status=tuple(STATUS[code] for code in status.tolist()),
            iterations=self.iterations,
            residual_norms=norms.double() * by_row,
            rhs_norms=self.rhs_norms.double() * by_row,
            tolerances=self.problem.tolerances.double() * by_row,
            num_applications=num_applications,
            smallest_curvatures=self.smallest_curvatures,
            num_preconditioner_applications=self.problem.precondition.count,
            residual_history=self._histories(),
            detail=detail,
        )

    def _histories(self) -> tuple[Tensor, ...] | None:
        if not self.problem.keeps_history:
            return None
        by_row = self.problem.scales.squeeze(1).double()
        kept = [
            [norms[row] * by_row[row] for norms, rows in self._history if bool(rows[row])]
            for row in range(len(self.rhs_norms))
        ]
        return tuple(torch.stack(norms) for norms in kept)


class Run(ABC):
    """One solve: products of `vectors` come in until it is finished.

    Attributes:
        problem: What is solved.
        outcomes: What has come out, by right-hand side.
        estimates: Residual norms of the recurrence, ``(k,)``.
        next_check: Where `estimates` are below this, the true residuals are measured, ``(k,)``.
        num_applications: Applications of the operator so far.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.outcomes = Outcomes(problem)
        self.estimates = self.outcomes.rhs_norms.clone()
        self.next_check = following_check(self.estimates, problem.tolerances)
        self.num_applications = 0

    @abstractmethod
    def is_finished(self) -> bool:
        """Whether every right-hand side has its outcome, verified."""

    @abstractmethod
    def vectors(self) -> Tensor:
        """The rows to multiply next."""

    @abstractmethod
    def advance(self, products: Tensor) -> None:
        """Goes on with the products of `vectors`."""

    @property
    def iterations(self) -> Tensor:
        """Steps taken for each right-hand side, ``(k,)``."""
        return self.outcomes.iterations

    def worst_residual(self) -> float:
        """Largest relative residual of the recurrence among what is not decided, for the eye."""
        norms = self.outcomes.rhs_norms
        relative = self.estimates / torch.where(norms > 0, norms, 1.0)
        return float(torch.where(self.outcomes.undecided, relative, 0.0).max().item())

    def solution(self, product: RowsMap) -> Solution:
        """The outcome in the scale of the caller's right-hand sides; `product` is the system."""
        return self.outcomes.solution(self.num_applications, product)


def following_check(norms: Tensor, tolerances: Tensor) -> Tensor:
    """The residual norms of the recurrence at which the true ones are measured next.

    At the tolerance, where that is well within the precision, or else once in a hundredfold
    reduction on the way to it; then at each halving.
    """
    target = CANDIDATE_FACTOR * tolerances
    is_near = target >= torch.finfo(norms.dtype).eps ** SAFE_EXPONENT * norms
    return torch.where(
        is_near | (CHECK_FACTOR * norms <= target), target.minimum(norms / 2), CHECK_FACTOR * norms
    )
