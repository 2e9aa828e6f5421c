"""Solution: what a solve returns, with the outcome of every right-hand side."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from hessops.printed import Node, Printed, counted, size_of


class SolveStatus(StrEnum):
    """How the solve for one right-hand side ended; compares equal to its string.

    Example:
        >>> from hessops import SolveStatus
        >>> SolveStatus.MAX_ITERATIONS == "max iterations"
        True
        >>> SolveStatus.CONVERGED.advice
        'The true residual is within the tolerance.'
    """

    CONVERGED = "converged"
    MAX_ITERATIONS = "max iterations"
    STAGNATED = "stagnated"
    INDEFINITE = "indefinite"
    BREAKDOWN = "breakdown"
    NON_FINITE = "non-finite"
    DIVERGED = "diverged"
    PRECONDITIONER = "unsuitable preconditioner"

    @property
    def advice(self) -> str:
        """What happened and what to change."""
        return _ADVICE[self]


_ADVICE = {
    SolveStatus.CONVERGED: "The true residual is within the tolerance.",
    SolveStatus.MAX_ITERATIONS: (
        "The iterations ran out before the tolerance was met: raise maxiter or regularization, or "
        "loosen rtol. An operator that is not symmetric ends so, too."
    ),
    SolveStatus.STAGNATED: (
        "The true residual stopped falling at the precision of the dtype: use float64, a larger "
        "regularization, or a looser rtol."
    ),
    SolveStatus.INDEFINITE: (
        "The operator has negative curvature, where conjugate gradients do not apply: use a "
        "Gauss-Newton operator, a regularization larger than the magnitude of the most negative "
        "eigenvalue, or MinresOperator."
    ),
    SolveStatus.BREAKDOWN: (
        "A direction of zero curvature was met before the tolerance: the operator is singular and "
        "the right-hand side is outside its range; use a larger regularization."
    ),
    SolveStatus.NON_FINITE: (
        "A product with the operator was NaN or infinite: check the scale of the data, and use a "
        "wider dtype."
    ),
    SolveStatus.DIVERGED: (
        "The recursion grew without bound: raise scale, or pass scale='auto'; where the operator "
        "has negative curvature, raise regularization or dampen."
    ),
    SolveStatus.PRECONDITIONER: (
        "The preconditioner is not positive definite, or its product was NaN or infinite: use a "
        "symmetric positive definite one."
    ),
}


@dataclass(frozen=True, eq=False, repr=False)
class Solution(Printed):
    """The solution of A X = B, by right-hand side.

    Attributes:
        value: X, of the shape of the right-hand side: ``(n,)`` or ``(k, n)``. Where a solve did not
            converge it is the iterate with the smallest true residual measured; zero, whose
            residual is the right-hand side, where that is smaller still and the iterations did not
            just run out. Always finite.
        status: One `SolveStatus` per right-hand side (one for a 1-D right-hand side).
        iterations: Steps taken, ``(k,)`` int64; zero for direct methods.
        residual_norms: True residual norms ‖b − Ax‖ of `value`, ``(k,)`` float64.
        rhs_norms: ‖b‖, ``(k,)`` float64.
        tolerances: The bound that `residual_norms` had to meet, ``(k,)`` float64.
        num_applications: Applications of the operator, each to all right-hand sides at once. Where
            a step is one batch, as in LiSSA, a product with a batch counts as one, too.
        smallest_curvatures: Smallest pᵀAp/‖p‖² met, ``(k,)``; infinite where there was none.
        num_preconditioner_applications: Applications of the preconditioner, each to all at once.
        residual_history: With ``solve(..., history=True)``, for every right-hand side the residual
            norms by which the method went on, from that of the start to that after the last step,
            ``(iterations + 1,)`` each. They are those of a recurrence; `residual_norms` are true.
            ``None`` for methods that take no steps; of several chains of LiSSA, the first.
        detail: What the solver found out beyond the status, such as the scale it chose.

    Example:
        >>> import torch
        >>> from hessops import CgOperator, DiagonalOperator
        >>> A = DiagonalOperator(torch.tensor([1.0, 2.0]))
        >>> solution = CgOperator(A).solve(torch.eye(2))
        >>> solution.value.shape, solution.status[0].value, solution.converged
        (torch.Size([2, 2]), 'converged', tensor([True, True]))
    """

    value: Tensor
    status: tuple[SolveStatus, ...]
    iterations: Tensor
    residual_norms: Tensor
    rhs_norms: Tensor
    tolerances: Tensor
    num_applications: int
    smallest_curvatures: Tensor
    num_preconditioner_applications: int = 0
    residual_history: tuple[Tensor, ...] | None = None
    detail: str = ""

    @property
    def advice(self) -> tuple[str, ...]:
        """For each right-hand side a sentence: what happened and what to change."""
        return tuple(status.advice for status in self.status)

    @property
    def converged(self) -> Tensor:
        """Whether each right-hand side met its tolerance, ``(k,)`` bool."""
        flags = [status is SolveStatus.CONVERGED for status in self.status]
        return torch.tensor(flags, dtype=torch.bool, device=self.value.device)

    @property
    def relative_residual_norms(self) -> Tensor:
        """‖b − Ax‖ / ‖b‖, ``(k,)``; zero for a zero right-hand side."""
        zero = self.rhs_norms == 0
        return torch.where(zero, 0.0, self.residual_norms / torch.where(zero, 1.0, self.rhs_norms))

    def _node(self) -> Node:
        rows = counted(len(self.status), "right-hand side")
        outcomes = [self._outcome(status) for status in SolveStatus if status in self.status]
        spent = f"{counted(self.num_applications, 'application')} of the operator"
        if self.num_preconditioner_applications:
            spent += f", {self.num_preconditioner_applications} of the preconditioner"
        return Node(
            f"Solution({rows})",
            size_of(self.value),
            [*outcomes, Node(spent)],
            details=[self.detail] if self.detail else [],
        )

    def _outcome(self, status: SolveStatus) -> Node:
        """A line for the right-hand sides that ended in one way, with advice if it was no good."""
        rows = [i for i, s in enumerate(self.status) if s is status]
        worst = self.relative_residual_norms[rows].max().item()
        iterations = counted(int(self.iterations[rows].max()), "iteration")
        at_most = "at most " if len(rows) > 1 else ""
        residual = f"relative residual {at_most}{worst:.1e}"
        advice = [] if status is SolveStatus.CONVERGED else [Node(status.advice)]
        return Node(f"{len(rows)} {status}: {at_most}{iterations}, {residual}", parts=advice)

    def report(self) -> str:
        """Some lines to read: the outcomes with their advice, residuals, and what it took."""
        relative = self.relative_residual_norms
        lines = []
        for status in SolveStatus:
            rows = [i for i, s in enumerate(self.status) if s is status]
            if rows:
                worst = relative[rows].max().item()
                lines.append(
                    f"{len(rows)} of {len(self.status)} {status}, relative residual at most "
                    f"{worst:.1e}. {status.advice}"
                )
        most = int(self.iterations.max()) if self.status else 0
        lines.append(
            f"At most {most} iterations; {self.num_applications} applications of the operator, "
            f"{self.num_preconditioner_applications} of the preconditioner."
        )
        return "\n".join([*lines, self.detail] if self.detail else lines)
