"""The method of conjugate gradients for many right-hand sides at once."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hessops.errors import DtypeError, NotYetSupportedError, StructureError
from hessops.operators.base import TensorOperator
from hessops.operators.inverse import InverseOperator, default_rtol
from hessops.operators.solution import Solution, SolveStatus
from hessops.validation import checked_count, checked_number

# The residual of the recurrence drifts from the true one. A candidate is verified when it is a
# little below the tolerance, so that the verification seldom fails by a hair.
CANDIDATE_FACTOR = 0.9
# A curvature below -100 eps ‖A‖‖p‖² is negative beyond the rounding of the product.
CURVATURE_NOISE = 100
# After a restart on the true residual, the next verified one must have fallen to this fraction.
PROGRESS_FACTOR = 0.5


class CgOperator(InverseOperator):
    r"""The inverse :math:`b \mapsto (A + \lambda I)^{-1} b` by conjugate gradients.

    For symmetric positive definite :math:`A + \lambda I` (Hestenes & Stiefel 1952; Trefethen & Bau
    1997, Lecture 38). All right-hand sides advance together: one application of A per step serves
    all of them. Each is otherwise on its own; the others do not change its iterates. It stops at

    .. math:: \lVert b - (A + \lambda I) x\rVert
              \le \max(\mathrm{rtol}\,\lVert b\rVert, \mathrm{atol})

    on the *true* residual: when the residual of the recurrence meets the tolerance, the next
    application verifies the iterate, and if it fails the method restarts from the true residual.
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
                run.advance(system._apply_rows(run.vectors()))
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
    """A power of two near the largest entry of each row, ``(k, 1)``; 1 for a zero row.

    Dividing by it is exact and keeps the squares in norms from underflowing: in float32 the square
    of a gradient of size 1e-25 is zero.
    """
    largest = rhs.abs().amax(dim=1, keepdim=True)
    _, exponent = torch.frexp(torch.where(largest > 0, largest, 1.0))
    return torch.ldexp(torch.ones_like(largest), exponent)


class _Phase(IntEnum):
    """What the next application of the operator does for a right-hand side."""

    STEP = 0  # multiplies its search direction
    VERIFY = 1  # multiplies its iterate, for the true residual
    DONE = 2


_PENDING = (
    SolveStatus.CONVERGED,  # none: the tolerance seems met
    SolveStatus.MAX_ITERATIONS,
    SolveStatus.INDEFINITE,
    SolveStatus.BREAKDOWN,
    SolveStatus.NON_FINITE,
    SolveStatus.STAGNATED,
)
_CODE = {status: code for code, status in enumerate(_PENDING)}


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
        # The zero vector has a known true residual, so that there is always something to return;
        # the first verified iterate replaces it even where its residual is larger, as residuals of
        # conjugate gradients may be before the end.
        self.best = torch.zeros_like(rhs)
        self.best_norms = self.rhs_norms.clone()
        self.is_verified = torch.zeros(len(rhs), dtype=torch.bool, device=rhs.device)
        self.verified_norms = torch.full_like(self.rhs_norms, torch.inf)
        self.status = torch.zeros_like(self.iterations)
        solved = self.rhs_norms <= tolerances
        self.phase = torch.where(solved, int(_Phase.DONE), int(_Phase.STEP))

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
        growth = products.norm(dim=1) / length.sqrt()
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
        candidate = moving & (self.squared.sqrt() <= CANDIDATE_FACTOR * self.tolerances)
        exhausted = moving & ~candidate & (self.iterations >= self.maxiter)
        self._end(exhausted, SolveStatus.MAX_ITERATIONS)
        self.phase = torch.where(candidate, int(_Phase.VERIFY), self.phase)

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
        better = verifying & finite & ((norms < self.best_norms) | ~self.is_verified)
        self.is_verified = self.is_verified | better
        self.best = torch.where(better.unsqueeze(1), self.iterate, self.best)
        self.best_norms = torch.where(better, norms, self.best_norms)
        # Negative curvature is a property of the operator: a lucky residual does not undo it.
        undoable = self.status != _CODE[SolveStatus.INDEFINITE]
        met = verifying & undoable & finite & (norms <= self.tolerances)
        self.status = torch.where(met, _CODE[SolveStatus.CONVERGED], self.status)
        pending = verifying & ~met & (self.status != _CODE[SolveStatus.CONVERGED])
        failed = verifying & ~met & ~pending
        broken = failed & ~finite
        self.status = torch.where(broken, _CODE[SolveStatus.NON_FINITE], self.status)
        stuck = failed & finite & (norms > PROGRESS_FACTOR * self.verified_norms)
        self.status = torch.where(stuck, _CODE[SolveStatus.STAGNATED], self.status)
        restarting = failed & finite & ~stuck
        self.verified_norms = torch.where(restarting, norms, self.verified_norms)
        rows = restarting.unsqueeze(1)
        self.residual = torch.where(rows, residual, self.residual)
        self.direction = torch.where(rows, residual, self.direction)
        self.squared = torch.where(restarting, norms.square(), self.squared)
        self.phase = torch.where(verifying, int(_Phase.DONE), self.phase)
        self.phase = torch.where(restarting, int(_Phase.STEP), self.phase)

    # --- what came out -------------------------------------------------------------------

    def worst_residual(self) -> float:
        """Largest relative residual of the recurrence among the rows that are not done."""
        active = self.phase != _Phase.DONE
        relative = self.squared.sqrt() / torch.where(self.rhs_norms > 0, self.rhs_norms, 1.0)
        return torch.where(active, relative, 0.0).max().item()

    def solution(self, scales: Tensor) -> Solution:
        by_row = scales.squeeze(1)
        return Solution(
            value=self.best * scales,
            status=tuple(_PENDING[code] for code in self.status.tolist()),
            iterations=self.iterations,
            residual_norms=self.best_norms * by_row,
            rhs_norms=self.rhs_norms * by_row,
            tolerances=self.tolerances * by_row,
            num_applications=self.num_applications,
            smallest_curvatures=self.smallest_curvatures,
        )
