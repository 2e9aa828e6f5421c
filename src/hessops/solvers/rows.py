"""Runs that advance many right-hand sides at once, each on its own."""

from __future__ import annotations

from abc import abstractmethod
from enum import IntEnum

import torch
from torch import Tensor

from hessops.functional.precision import finite_rows, powers_of_two
from hessops.operators.outcomes import (
    CHECK_INTERVAL,
    DRIFT_FACTOR,
    Problem,
    Run,
    following_check,
)
from hessops.operators.solution import SolveStatus


class Phase(IntEnum):
    """What the next application of the operator does for a right-hand side.

    The largest one says whether any right-hand side is to be verified, and whether all are done.
    """

    DONE = 0
    STEP = 1  # multiplies its search direction
    VERIFY = 2  # multiplies its iterate, for the true residual


class RowRun(Run):
    """One solve by a method with a short recurrence, and its verification by true residuals.

    Every operation acts on each row alone, so that the iterates of one right-hand side do not
    depend, to the last bit, on the others. Rows that are done stay in the stack as zeros: removing
    them would change the shape of the products and with it their rounding.

    A subclass defines ``_step`` and keeps `direction`, `iterate`, `residual` and `estimates`, the
    norm of the residual of its recurrence. They are updated in place, for a new stack costs more
    than the arithmetic. Rows that do not move have coefficients of zero; where a product may be
    infinite, which zero does not undo, what it led to is cleared. The product itself is never
    written to, and neither is the direction before the product is used for the last time: they may
    be one tensor.

    The host waits for the device once in a step, for the most urgent phase of all rows, and once
    more in those steps that verify a row.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.iterate = torch.zeros_like(problem.rhs)
        self.residual = problem.rhs.clone()
        self.direction = torch.zeros_like(problem.rhs)
        self.scratch = torch.empty_like(problem.rhs)
        # Largest ‖Ap‖/‖p‖ met: a lower bound of ‖A‖ for the curvature test.
        self.operator_norms = torch.zeros_like(self.estimates)
        active = self.outcomes.undecided
        # Rows whose recurrence cannot go on, so that it must start anew from the true residual.
        self.must_restart = torch.zeros_like(active)
        # Rows that go back to the best iterate before they restart.
        self.returning = torch.zeros_like(active)
        self.phase = torch.where(active, int(Phase.STEP), int(Phase.DONE))
        none = warm = torch.zeros_like(active)
        if problem.start is not None:
            self.iterate = problem.start.clone()
            warm = active & (problem.start != 0).any(dim=1)
            self.must_restart = warm
            self.phase = torch.where(warm, int(Phase.VERIFY), self.phase)
        # Rows whose residual at the start is not known before it is measured.
        self.awaited = warm
        self.outcomes.keep(self.estimates, ~warm)
        cold = active & ~warm
        # A start means verification, which restarts what there is.
        self.urgent = Phase.VERIFY
        if bool(cold.any()):
            none_yet = torch.zeros_like(problem.rhs[:, :1]).expand_as(problem.rhs)
            self._step(none_yet, stepping=none, restarted=cold)
        self._settle(none.any())

    @abstractmethod
    def _step(self, products: Tensor, *, stepping: Tensor, restarted: Tensor) -> None:
        """The hook: advances some rows, and begins the recurrence of others at their residual.

        One application of the preconditioner must serve both.
        """

    def is_finished(self) -> bool:
        """Whether every row is done."""
        return self.urgent is Phase.DONE

    def vectors(self) -> Tensor:
        """Search directions, iterates to verify, and zeros for what is done.

        Where nothing is to be verified, the directions themselves: they change in the next step.
        """
        if self.urgent is not Phase.VERIFY:
            return self.direction
        verifying = (self.phase == Phase.VERIFY).unsqueeze(1)
        return torch.where(verifying, self.iterate, self.direction)

    def advance(self, products: Tensor) -> None:
        """Steps and verifies, each row as its phase says."""
        self.num_applications += 1
        stepping, verifying = self.phase == Phase.STEP, self.phase == Phase.VERIFY
        if self.urgent is Phase.VERIFY:
            restarted = self._verify(products, verifying)
        else:
            restarted = verifying
        finite = finite_rows(products)
        self.end(stepping & ~finite, SolveStatus.NON_FINITE)
        self._step(products, stepping=stepping & finite, restarted=restarted)
        self._settle(~finite.all())

    def _settle(self, infinite: Tensor) -> None:
        """Asks the device what is next, and clears the rows that have no next step.

        `infinite` is whether any product was.
        """
        before = self.urgent
        has_infinite, urgent = divmod(int(self.phase.amax() + len(Phase) * infinite), len(Phase))
        self.urgent = Phase(urgent)
        # A product may be infinite even of the zeros of what is done.
        if has_infinite or Phase.VERIFY in (before, self.urgent):
            decided = ~self.outcomes.undecided.unsqueeze(1)
            self.direction.masked_fill_(decided, 0.0)
            self.residual.masked_fill_(decided, 0.0)

    def is_idle(self, rows: Tensor) -> bool:
        """Whether none of these rows moves or begins; asks the device only where that may be."""
        return self.urgent is Phase.VERIFY and not bool(rows.any())

    def end(self, rows: Tensor, status: SolveStatus) -> None:
        """Verifies these rows one last time; the status stands unless the tolerance is met."""
        self.outcomes.decide(rows, status)
        self.phase = torch.where(rows, int(Phase.VERIFY), self.phase)

    def note_curvature(self, products: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Notes norm and curvature of the operator along the directions p.

        Scaled by powers of two, so that no square leaves the range of the dtype and nothing is
        rounded for it.

        Returns:
            pᵀAp/‖p‖² and pᵀAp, ``(k,)`` each.
        """
        size, scratch = powers_of_two(self.direction), self.scratch
        length = torch.div(self.direction, size, out=scratch).norm(dim=1) * size.squeeze(1)
        # A direction of zero, from a singular preconditioner, has no curvature.
        length = torch.where(length > 0, length, 1.0)
        height = powers_of_two(products)
        image = torch.div(products, height, out=scratch)
        height = height.squeeze(1)
        growth = image.norm(dim=1) * (height / length)
        inner = torch.mul(image, self.direction, out=scratch).sum(dim=1)
        curvature = inner / length * (height / length)
        self.operator_norms = torch.where(
            rows, self.operator_norms.maximum(growth), self.operator_norms
        )
        smallest = self.outcomes.smallest_curvatures
        self.outcomes.smallest_curvatures = torch.where(rows, smallest.minimum(curvature), smallest)
        return curvature, inner * height

    def moved(self, rows: Tensor) -> None:
        """Counts a step of some rows and sends to verification what is due."""
        self.outcomes.iterations = self.outcomes.iterations + rows
        self.outcomes.keep(self.estimates, rows)
        due = (self.estimates <= self.next_check) | (self.iterations >= self.problem.maxiter)
        due = due | self.must_restart | (self.iterations % CHECK_INTERVAL == 0)
        self.phase = torch.where(rows & due, int(Phase.VERIFY), self.phase)

    def _verify(self, products: Tensor, verifying: Tensor) -> Tensor:
        """Measures true residuals; returns the rows whose recurrence begins anew from them."""
        outcomes = self.outcomes
        residual = torch.sub(self.problem.rhs, products, out=self.scratch)
        norms = residual.norm(dim=1)
        # A start that is worse than zero is no use.
        dropped = self.awaited & ~(norms <= outcomes.rhs_norms)
        self.iterate.masked_fill_(dropped.unsqueeze(1), 0.0)
        torch.where(dropped.unsqueeze(1), self.problem.rhs, residual, out=residual)
        norms = torch.where(dropped, outcomes.rhs_norms, norms)
        finite = norms.isfinite()
        before = outcomes.measured(self.iterate, norms, verifying)
        going_on = verifying & outcomes.undecided
        # The recurrence has drifted from the truth: restart from the truth, as long as that helps.
        drifted = ~(norms <= DRIFT_FACTOR * self.estimates) | self.must_restart
        outcomes.decide(going_on & ~finite, SolveStatus.NON_FINITE)
        spent = self.iterations >= self.problem.maxiter
        judged = going_on & drifted & ~self.returning
        outcomes.judge_restart(judged, norms, before, SolveStatus.STAGNATED)
        outcomes.decide(going_on & spent, SolveStatus.MAX_ITERATIONS)
        going_on = going_on & outcomes.undecided
        # Where an earlier iterate was better, it is measured again, to restart from there.
        self.returning = judged & going_on & (norms > before)
        torch.where(self.returning.unsqueeze(1), outcomes.best, self.iterate, out=self.iterate)
        restarted: Tensor = going_on & drifted & ~self.returning
        torch.where(restarted.unsqueeze(1), residual, self.residual, out=self.residual)
        self.estimates = torch.where(restarted, norms, self.estimates)
        outcomes.keep(norms, self.awaited)
        self.awaited = torch.zeros_like(self.awaited)
        self.must_restart = (self.must_restart & ~verifying) | self.returning
        checks = following_check(self.estimates, self.problem.tolerances)
        self.next_check = torch.where(going_on, checks, self.next_check)
        self.phase = torch.where(verifying, int(Phase.DONE), self.phase)
        self.phase = torch.where(going_on, int(Phase.STEP), self.phase)
        self.phase = torch.where(self.returning, int(Phase.VERIFY), self.phase)
        return restarted
