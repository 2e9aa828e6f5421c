"""The method of conjugate gradients for many right-hand sides at once."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hessops.errors import DtypeError, NotYetSupportedError, StructureError
from hessops.functional.precision import scaled_rows
from hessops.operators.base import TensorOperator
from hessops.operators.inverse import InverseOperator, default_rtol
from hessops.operators.solution import Solution, SolveStatus
from hessops.validation import checked_count, checked_number

# The residual of the recurrence drifts from the true one. A candidate is verified when it is a
# little below the tolerance, so that the verification seldom fails by a hair.
CANDIDATE_FACTOR = 0.9
# A curvature below -100 eps ‖A‖‖p‖² is negative beyond the rounding of the product.
CURVATURE_NOISE = 100
# The true residual is measured at least this often, so that a drift is seen, and a good iterate is
# kept, long before the recurrence meets a tolerance that the precision does not allow.
CHECK_FACTOR = 0.01
# A true residual above twice that of the recurrence ends the trust in the recurrence.
DRIFT_FACTOR = 2
# A restart must have brought the true residual below this fraction of the best one before.
PROGRESS_FACTOR = 0.9


class CgOperator(InverseOperator):
    r"""The inverse :math:`b \mapsto (A + \lambda I)^{-1} b` by conjugate gradients.

    For symmetric positive definite :math:`A + \lambda I` (Hestenes & Stiefel 1952; Trefethen & Bau
    1997, Lecture 38). All right-hand sides advance together: one application of A per step serves
    all of them. Each is otherwise on its own; the others do not change its iterates. It stops at

    .. math:: \lVert b - (A + \lambda I) x\rVert
              \le \max(\mathrm{rtol}\,\lVert b\rVert, \mathrm{atol})

    on the *true* residual: it is measured after each hundredfold reduction of the residual of the
    recurrence and where that meets the tolerance, by one application for the row in question; when
    the recurrence has drifted, the method restarts from the true residual.
    Negative curvature, a NaN, and a residual that no longer falls are recognised and reported; see
    `SolveStatus`.

    Args:
        operator: A, any operator of float32 or float64; not known to be non-symmetric or
            indefinite.
        regularization: λ >= 0, on top of any shift of A; ``None`` is 0.
        rtol: Relative tolerance; ``None`` is 1e-7 in float64 and 1e-4 in float32.
        atol: Absolute tolerance. With a positive one, zero solves every small right-hand side.
        maxiter: Most steps for each right-hand side; ``None`` is 10·n.
        progress: Shows a progress bar with the worst relative residual.
        preconditioner: Not yet supported.
        use_block_cg: Not yet supported.
        warn_on_max_iteration: ``True`` warns and logs when a solve stops short of its tolerance,
            ``False`` logs at DEBUG.

    Raises:
        ArgumentTypeError: `operator` is not a `TensorOperator`.
        StructureError: `operator` is known to be non-symmetric, or known not to be positive
            semi-definite with no `regularization`.
        DtypeError: `operator` is of half precision.
        ArgumentError: A negative `regularization` or tolerance, or `maxiter` below 1.
        NotYetSupportedError: `preconditioner` or `use_block_cg` is given.

    Example:
        >>> import torch
        >>> from hessops import CgOperator, MatrixOperator
        >>> A = MatrixOperator(torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64))
        >>> solution = CgOperator(A).solve(torch.tensor([3.0, 3.0], dtype=torch.float64))
        >>> solution.value, solution.status[0] == "converged"
        (tensor([1., 1.], dtype=torch.float64), True)
    """

    def __init__(
        self,
        operator: TensorOperator,
        regularization: float | None = None,
        rtol: float | None = None,
        atol: float = 0.0,
        maxiter: int | None = None,
        progress: bool = False,
        preconditioner: object | None = None,
        use_block_cg: bool = False,
        warn_on_max_iteration: bool = True,
    ) -> None:
        super().__init__(operator, regularization, warn_on_max_iteration=warn_on_max_iteration)
        _refuse_unsuitable(operator, self.regularization)
        if preconditioner is not None:
            raise NotYetSupportedError(
                "preconditioner is not supported yet; pass None for plain conjugate gradients"
            )
        if use_block_cg:
            raise NotYetSupportedError(
                "use_block_cg is not supported yet; pass False: all right-hand sides already share "
                "their passes over the data"
            )
        self.rtol = (
            default_rtol(operator.dtype)
            if rtol is None
            else checked_number(rtol, "rtol", minimum=0)
        )
        self.atol = checked_number(atol, "atol", minimum=0)
        self.maxiter = (
            10 * operator.input_size if maxiter is None else checked_count(maxiter, "maxiter")
        )
        self.progress = progress

    def _solve_rows(self, rhs: Tensor) -> Solution:
        scales = _powers_of_two(rhs)
        scaled = rhs / scales
        tolerances = (self.rtol * scaled.norm(dim=1)).maximum(self.atol / scales.squeeze(1))
        run = _Run(scaled, tolerances, self.maxiter)
        system = self.system
        with tqdm(
            total=self.maxiter, desc="conjugate gradients", leave=False, disable=not self.progress
        ) as bar:
            while not run.is_finished():
                run.advance(system._product(run.vectors()))
                if self.progress:
                    bar.set_postfix(worst_residual=f"{run.worst_residual():.1e}")
                    bar.update(int(run.iterations.max()) - bar.n)
        return run.solution(scales)

    def _label(self) -> str:
        shift = f"regularization={self.regularization:g}"
        return f"CgOperator({shift}, rtol={self.rtol:g}, atol={self.atol:g})"


def _refuse_unsuitable(operator: TensorOperator, regularization: float) -> None:
    if operator.dtype not in (torch.float32, torch.float64):
        raise DtypeError(
            f"operator is {operator.dtype}; conjugate gradients need float32 or float64"
        )
    if operator.symmetric is False:
        raise StructureError(
            f"operator ({type(operator).__name__}) is not symmetric; conjugate gradients need a "
            "symmetric positive definite one: solve with A.T @ A, or use DirectSolveOperator"
        )
    if operator.positive_semidefinite is False and regularization == 0:
        raise StructureError(
            f"operator ({type(operator).__name__}) is not positive semi-definite; conjugate "
            "gradients need a symmetric positive definite one: pass a regularization above its "
            "most negative eigenvalue"
        )


def _powers_of_two(rhs: Tensor) -> Tensor:
    """The power of two below the largest entry of each row, ``(k, 1)``; 1 for a zero row.

    Dividing by it is exact and keeps the squares in norms from underflowing: in float32 the square
    of a gradient of size 1e-25 is zero.
    """
    largest = rhs.abs().amax(dim=1, keepdim=True)
    _, exponent = torch.frexp(torch.where(largest > 0, largest, 1.0))
    powers = torch.ldexp(torch.ones_like(largest), exponent - 1)
    return powers.clamp(min=torch.finfo(rhs.dtype).tiny)


def _norms(rows: Tensor) -> Tensor:
    """Norms of rows whose squares may overflow or underflow, ``(k,)``."""
    scaled, largest = scaled_rows(rows)
    norms: Tensor = scaled.norm(dim=1) * largest.squeeze(1)
    return norms


class _Phase(IntEnum):
    """What the next application of the operator does for a right-hand side."""

    STEP = 0  # multiplies its search direction
    VERIFY = 1  # multiplies its iterate, for the true residual
    DONE = 2


# Statuses as numbers, so that a tensor can hold one per row.
_STATUS = dict(enumerate(SolveStatus))
_CODE = {status: code for code, status in _STATUS.items()}
_UNDECIDED = -1


class _Run:
    """One solve: the state of every right-hand side, and how an application advances it.

    Every operation acts on each row alone, so that the iterates of one right-hand side do not
    depend, to the last bit, on the others. Rows that are done stay in the stack as zeros: removing
    them would change the shape of the products and with it their rounding.
    """

    def __init__(self, rhs: Tensor, tolerances: Tensor, maxiter: int) -> None:
        self.rhs, self.tolerances, self.maxiter = rhs, tolerances, maxiter
        self.rhs_norms = rhs.norm(dim=1)
        self.iterate = torch.zeros_like(rhs)
        self.residual = rhs.clone()
        self.direction = rhs.clone()
        self.squared = self.residual.square().sum(dim=1)
        self.iterations = torch.zeros(len(rhs), dtype=torch.int64, device=rhs.device)
        self.num_applications = 0
        # Largest ‖Ap‖/‖p‖ met: a lower bound of ‖A‖ for the curvature test.
        self.operator_norms = torch.zeros_like(self.rhs_norms)
        self.smallest_curvatures = torch.full_like(self.rhs_norms, torch.inf)
        # The iterate of the smallest true residual that was measured.
        self.best = torch.zeros_like(rhs)
        self.best_norms = torch.full_like(self.rhs_norms, torch.inf)
        # The residual of the recurrence at which the true one is measured next.
        self.next_check = self._following_check(self.rhs_norms)
        solved = self.rhs_norms <= tolerances
        self.status = torch.where(solved, _CODE[SolveStatus.CONVERGED], _UNDECIDED)
        self.phase = torch.where(solved, int(_Phase.DONE), int(_Phase.STEP))

    def _following_check(self, norms: Tensor) -> Tensor:
        """Once in a hundredfold reduction, then at the tolerance, then at each halving."""
        target = CANDIDATE_FACTOR * self.tolerances
        return torch.where(
            CHECK_FACTOR * norms > target, CHECK_FACTOR * norms, target.minimum(norms / 2)
        )

    def is_finished(self) -> bool:
        return bool((self.phase == _Phase.DONE).all())

    def vectors(self) -> Tensor:
        """What to multiply next."""
        verifying = (self.phase == _Phase.VERIFY).unsqueeze(1)
        done = (self.phase == _Phase.DONE).unsqueeze(1)
        chosen = torch.where(verifying, self.iterate, self.direction)
        return torch.where(done, 0.0, chosen)

    def advance(self, products: Tensor) -> None:
        self.num_applications += 1
        stepping, verifying = self.phase == _Phase.STEP, self.phase == _Phase.VERIFY
        self._step(products, stepping)
        self._verify(products, verifying)

    # --- one step of the recurrence ------------------------------------------------------

    def _step(self, products: Tensor, stepping: Tensor) -> None:
        curvature = (self.direction * products).sum(dim=1)
        length = self.direction.square().sum(dim=1)
        finite = products.isfinite().all(dim=1)
        growth = _norms(products) / length.sqrt()
        known = stepping & finite
        self.operator_norms = torch.where(
            known, self.operator_norms.maximum(growth), self.operator_norms
        )
        self.smallest_curvatures = torch.where(
            known, self.smallest_curvatures.minimum(curvature / length), self.smallest_curvatures
        )
        noise = torch.finfo(products.dtype).eps * self.operator_norms * length
        indefinite = known & (curvature < -CURVATURE_NOISE * noise)
        step = self.squared / curvature
        flat = known & ~indefinite & ((curvature <= noise) | ~step.isfinite())
        moving = known & ~indefinite & ~flat
        self._move(products, step, moving)
        self._end(stepping & ~finite, SolveStatus.NON_FINITE)
        self._end(indefinite, SolveStatus.INDEFINITE)
        self._end(flat, SolveStatus.BREAKDOWN)
        due = (self.squared.sqrt() <= self.next_check) | (self.iterations >= self.maxiter)
        self.phase = torch.where(moving & due, int(_Phase.VERIFY), self.phase)

    def _move(self, products: Tensor, step: Tensor, moving: Tensor) -> None:
        rows = moving.unsqueeze(1)
        along = torch.where(moving, step, 0.0).unsqueeze(1)
        self.iterate = torch.where(rows, self.iterate + along * self.direction, self.iterate)
        self.residual = torch.where(rows, self.residual - along * products, self.residual)
        squared = self.residual.square().sum(dim=1)
        # A residual of exactly zero has no next direction; its iterate is verified and done.
        ratio = torch.where(moving & (self.squared > 0), squared / self.squared, 0.0).unsqueeze(1)
        self.direction = torch.where(rows, self.residual + ratio * self.direction, self.direction)
        self.squared = torch.where(moving, squared, self.squared)
        self.iterations = self.iterations + moving

    def _end(self, rows: Tensor, status: SolveStatus) -> None:
        """Verifies these rows one last time; the status stands unless the tolerance is met."""
        self.status = torch.where(rows, _CODE[status], self.status)
        self.phase = torch.where(rows, int(_Phase.VERIFY), self.phase)

    # --- the true residual ---------------------------------------------------------------

    def _verify(self, products: Tensor, verifying: Tensor) -> None:
        residual = self.rhs - products
        norms = residual.norm(dim=1)
        finite = norms.isfinite()
        before = self.best_norms
        better = verifying & finite & (norms < before)
        self.best = torch.where(better.unsqueeze(1), self.iterate, self.best)
        self.best_norms = torch.where(better, norms, before)
        # Negative curvature is a property of the operator: a lucky residual does not undo it.
        undoable = self.status != _CODE[SolveStatus.INDEFINITE]
        met = verifying & undoable & finite & (norms <= self.tolerances)
        self.status = torch.where(met, _CODE[SolveStatus.CONVERGED], self.status)
        going_on = verifying & (self.status == _UNDECIDED)
        # The recurrence has drifted from the truth: restart from the truth, as long as that helps.
        drifted = going_on & ~(norms <= DRIFT_FACTOR * self.squared.sqrt())
        self._decide(going_on & ~finite, SolveStatus.NON_FINITE)
        self._decide(drifted & (norms > PROGRESS_FACTOR * before), SolveStatus.STAGNATED)
        self._decide(going_on & (self.iterations >= self.maxiter), SolveStatus.MAX_ITERATIONS)
        going_on = going_on & (self.status == _UNDECIDED)
        self._restart(residual, norms, going_on & drifted)
        self.next_check = torch.where(
            going_on, self._following_check(self.squared.sqrt()), self.next_check
        )
        self.phase = torch.where(verifying, int(_Phase.DONE), self.phase)
        self.phase = torch.where(going_on, int(_Phase.STEP), self.phase)

    def _decide(self, rows: Tensor, status: SolveStatus) -> None:
        """Sets the status of those rows that have none yet."""
        undecided = rows & (self.status == _UNDECIDED)
        self.status = torch.where(undecided, _CODE[status], self.status)

    def _restart(self, residual: Tensor, norms: Tensor, rows: Tensor) -> None:
        self.residual = torch.where(rows.unsqueeze(1), residual, self.residual)
        self.direction = torch.where(rows.unsqueeze(1), residual, self.direction)
        self.squared = torch.where(rows, norms.square(), self.squared)

    # --- what came out -------------------------------------------------------------------

    def worst_residual(self) -> float:
        """Largest relative residual of the recurrence among the rows that are not done."""
        active = self.phase != _Phase.DONE
        relative = self.squared.sqrt() / torch.where(self.rhs_norms > 0, self.rhs_norms, 1.0)
        return torch.where(active, relative, 0.0).max().item()

    def solution(self, scales: Tensor) -> Solution:
        """The outcome in the scale of the caller's right-hand sides."""
        # A truncated solve may be wanted although residuals of conjugate gradients can rise above
        # that of zero before they fall; what failed otherwise is not better than zero.
        truncated = self.status == _CODE[SolveStatus.MAX_ITERATIONS]
        useless = ~(self.best_norms <= self.rhs_norms) & ~(truncated & self.best_norms.isfinite())
        best = torch.where(useless.unsqueeze(1), 0.0, self.best)
        norms = torch.where(useless, self.rhs_norms, self.best_norms)
        value = best * scales
        # Powers of two scale exactly, unless the result overflows or becomes subnormal.
        overflown = ~value.isfinite().all(dim=1)
        inexact = (value / scales != best).any(dim=1) & ~overflown
        status = torch.where(overflown, _CODE[SolveStatus.NON_FINITE], self.status)
        status = torch.where(
            inexact & (status == _CODE[SolveStatus.CONVERGED]),
            _CODE[SolveStatus.STAGNATED],
            status,
        )
        by_row = scales.squeeze(1)
        return Solution(
            value=torch.where(overflown.unsqueeze(1), 0.0, value),
            status=tuple(_STATUS[code] for code in status.tolist()),
            iterations=self.iterations,
            residual_norms=torch.where(overflown | inexact, self.rhs_norms, norms) * by_row,
            rhs_norms=self.rhs_norms * by_row,
            tolerances=self.tolerances * by_row,
            num_applications=self.num_applications,
            smallest_curvatures=self.smallest_curvatures,
        )
