"""The method of minimal residuals for many right-hand sides at once."""

from __future__ import annotations

import torch
from torch import Tensor

from hessops.functional.precision import safe_norms, scaled_rows
from hessops.operators.outcomes import Problem, Run
from hessops.operators.solution import SolveStatus
from hessops.solvers.krylov import KrylovOperator
from hessops.solvers.rows import Phase, RowRun

# Where ‖Ar‖ falls below this multiple of eps‖A‖‖r‖, a least-squares solution is reached; where the
# smallest pivot of the projected matrix does, it is singular.
SINGULAR_FACTOR = 100
# Rounding seldom lets ‖Ar‖ fall so far. Below √eps‖A‖‖r‖ the iterate may be a least-squares
# solution; it is one if the residual does not fall by this factor in so many steps.
PLATEAU_FACTOR, PLATEAU_STEPS = 0.99, 50
# Unless the residual is below this multiple of eps‖A‖‖x‖, where the dtype ends.
PRECISION_FACTOR = 10


class MinresOperator(KrylovOperator):
    r"""The inverse :math:`b \mapsto (A + \lambda I)^{-1} b` by minimal residuals.

    For symmetric :math:`A + \lambda I` that may be indefinite, as the Hessian of a network is
    (Paige & Saunders 1975). All right-hand sides advance together, each on its own, with one
    application of A per step, and stop on the *true* residual like those of `CgOperator`. The
    residual never rises from step to step (without a preconditioner in the Euclidean norm, with one
    in its own).

    A singular system is solved where the right-hand side is in its range. Where it is not, the
    outcome is a *breakdown*, and the value is close to a least-squares solution.

    `apply` and `solve` take a vector ``(n,)`` or the rows of a stack ``(k, n)`` of A's dtype and
    answer in the same shape. `apply` raises a `SolverError` where the value would be meaningless
    and warns (`ConvergenceWarning`) where it is short of the tolerance; `solve` reports both.

    Args:
        operator: A, any operator of float32 or float64; not known to be non-symmetric.
        regularization: λ >= 0, on top of any shift of A; ``None`` is 0.
        rtol: Relative tolerance; ``None`` is 1e-7 in float64 and 1e-4 in float32.
        atol: Absolute tolerance. With a positive one, zero solves every small right-hand side.
        maxiter: Most steps for each right-hand side; ``None`` is 10·n.
        progress: Shows a progress bar with the iterations and the worst relative residual.
        preconditioner: A `Preconditioner`, which is fitted in the first solve and kept, or any
            symmetric positive definite operator close to the inverse of A + λI, or of its absolute
            value, which is used as it is. It must be the same map in every application.
        warn_on_max_iteration: ``True`` warns and logs when a solve stops short of its tolerance,
            ``False`` logs at DEBUG.

    Raises:
        ArgumentTypeError: `operator` or `preconditioner` is something else.
        StructureError: `operator` is known to be non-symmetric, or `preconditioner` to be that or
            not positive semi-definite.
        ShapeError, DeviceError: `preconditioner` is of another size or elsewhere.
        DtypeError: `operator` is of half precision, or `preconditioner` of another dtype.
        ArgumentError: A negative `regularization` or tolerance, or `maxiter` below 1.

    Example:
        >>> import torch
        >>> from hessops import DiagonalOperator, MinresOperator
        >>> A = DiagonalOperator(torch.tensor([2.0, 1.0, -4.0]))
        >>> solution = MinresOperator(A).solve(torch.ones(3))
        >>> solution.value.round(decimals=4), solution.status[0].value
        (tensor([ 0.5000,  1.0000, -0.2500]), 'converged')
    """

    def _begin(self, problem: Problem) -> Run:
        return _MinresRun(problem)

    def _method(self) -> str:
        return "minimal residuals"


class _MinresRun(RowRun):
    r"""Lanczos' recurrence for M^(1/2) A M^(1/2), its factorisation QR by rotations, and updates.

    Besides the iterate its residual is updated, from products with A that are there anyway, so that
    its Euclidean norm is known whatever the preconditioner M is.
    """

    def __init__(self, problem: Problem) -> None:
        rhs, zero = problem.rhs, torch.zeros_like(problem.rhs[:, 0])
        # The last two Lanczos vectors before M, and their norms in the inner product of M.
        self.lanczos, self.lanczos_before = torch.zeros_like(rhs), torch.zeros_like(rhs)
        self.beta = self.beta_before = zero
        # The last two directions of the iterate, and A times them.
        self.update, self.update_before = torch.zeros_like(rhs), torch.zeros_like(rhs)
        self.image, self.image_before = torch.zeros_like(rhs), torch.zeros_like(rhs)
        self.keeps = True
        # Of the factorisation: what the last rotations left, and the norm of the residual.
        self.delta_bar = self.epsilon = self.phi_bar = zero
        self.cosine, self.sine = -torch.ones_like(zero), zero
        self.norm_in_space = zero
        # The residual at the beginning of a plateau, its steps, and whether ‖Ar‖ has been small.
        self.plateau, self.plateau_steps = zero + torch.inf, zero
        self.has_dipped = torch.zeros_like(zero, dtype=torch.bool)
        self.size_at_dip = zero
        super().__init__(problem)

    def _step(self, products: Tensor, *, stepping: Tensor, restarted: Tensor) -> None:
        rows = stepping | restarted
        if self.is_idle(rows):
            return
        # Where rows are verified beside, theirs stay; otherwise the oldest stacks are written over.
        self.keeps = self.urgent is Phase.VERIFY
        self.note_curvature(products, stepping)
        alpha, following = self._lanczos_step(products)
        if self.keeps:
            torch.where(restarted.unsqueeze(1), self.residual, following, out=following)
        following.masked_fill_(~rows.unsqueeze(1), 0.0)
        applied = self.problem.precondition(following)
        beta, positive = self._norm_in(following, applied)
        unsuitable = rows & ~positive
        rows = rows & positive
        self._rotate(products, alpha, beta, stepping & rows)
        self._shift_lanczos(following, applied, beta, rows, restarted)
        self.end(unsuitable, SolveStatus.PRECONDITIONER)

    def _lanczos_step(self, products: Tensor) -> tuple[Tensor, Tensor]:
        """α, and the next Lanczos vector before M and before it is normalised."""
        before = self.lanczos_before.clone() if self.keeps else self.lanczos_before
        following = before.mul_(-_ratio(self.beta, self.beta_before)).add_(products)
        alpha = torch.mul(self.direction, following, out=self.scratch).sum(dim=1)
        return alpha, following.addcmul_(_ratio(alpha, self.beta), self.lanczos, value=-1)

    def _norm_in(self, rows: Tensor, applied: Tensor) -> tuple[Tensor, Tensor]:
        """The norms √(rᵀMr) of some rows, given Mr, and whether they are real up to rounding.

        Scaled, so that no square leaves the range of the dtype.
        """
        if self.problem.precondition.product is None:
            norms = safe_norms(rows, out=self.scratch)
            return norms, norms >= 0
        right, right_size = scaled_rows(applied)
        left, left_size = scaled_rows(rows, out=self.scratch)
        noise = torch.finfo(rows.dtype).eps * left.norm(dim=1) * right.norm(dim=1)
        squared = right.mul_(left).sum(dim=1)
        sizes = left_size.sqrt() * right_size.sqrt()
        return squared.clamp(min=0).sqrt() * sizes.squeeze(1), squared >= -noise

    def _rotate(self, products: Tensor, alpha: Tensor, beta: Tensor, rows: Tensor) -> None:
        """The next rotation, and with it the next iterate of some rows."""
        eps = torch.finfo(products.dtype).eps
        # The first β is the norm of the residual and no entry of the projected matrix.
        above = torch.where(self.beta_before > 0, self.beta, 0.0)
        column = torch.stack([alpha.abs(), above, beta]).amax(dim=0)
        norm = torch.where(rows, self.norm_in_space.maximum(column), self.norm_in_space)
        delta = self.cosine * self.delta_bar + self.sine * alpha
        gamma_bar = self.sine * self.delta_bar - self.cosine * alpha
        delta_bar = -self.cosine * beta
        gamma = torch.hypot(gamma_bar, beta)
        # ‖Ar‖ / ‖r‖ before the step, as the rotation tells it (Choi 2006).
        slope = torch.hypot(gamma_bar, delta_bar)
        stuck = rows & (gamma.minimum(slope) <= SINGULAR_FACTOR * eps * norm)
        ended = self._on_plateau(slope <= eps**0.5 * norm, rows & ~stuck)
        moving = rows & ~stuck & ~ended
        gamma = torch.where(moving, gamma, 1.0)
        self._update_directions(products, delta, gamma, moving)
        phi = torch.where(moving, gamma_bar / gamma * self.phi_bar, 0.0).unsqueeze(1)
        self.iterate.addcmul_(self.update, phi)
        self.residual.addcmul_(self.image, phi, value=-1)
        self.estimates = torch.where(moving, self.residual.norm(dim=1), self.estimates)
        self.epsilon = torch.where(moving, self.sine * beta, self.epsilon)
        self.delta_bar = torch.where(moving, delta_bar, self.delta_bar)
        self.phi_bar = torch.where(moving, beta / gamma * self.phi_bar, self.phi_bar)
        self.cosine = torch.where(moving, gamma_bar / gamma, self.cosine)
        self.sine = torch.where(moving, beta / gamma, self.sine)
        self.norm_in_space = norm
        # The next Lanczos vector is rounding: the space is exhausted.
        self.must_restart = self.must_restart | (moving & (beta <= eps * norm))
        self.moved(moving)
        # As small as the rounding of the products with an iterate of this size.
        noise = PRECISION_FACTOR * eps * self.operator_norms * self.size_at_dip
        self.end(ended & (self.estimates <= noise), SolveStatus.STAGNATED)
        self.end(stuck | (ended & (self.estimates > noise)), SolveStatus.BREAKDOWN)

    def _on_plateau(self, dips: Tensor, rows: Tensor) -> Tensor:
        """Rows whose residual no longer falls, after ‖Ar‖ has been small.

        The iterate at the first dip is measured: later ones may grow along the null space.
        """
        falls = self.estimates < PLATEAU_FACTOR * self.plateau
        self.plateau = torch.where(rows & falls, self.estimates, self.plateau)
        self.plateau_steps = torch.where(rows & ~falls, self.plateau_steps + 1, 0)
        first = rows & dips & ~self.has_dipped
        self.has_dipped = (self.has_dipped & ~(rows & falls)) | (rows & dips)
        self.next_check = torch.where(first, torch.inf, self.next_check)
        self.size_at_dip = torch.where(first, self.iterate.norm(dim=1), self.size_at_dip)
        ended: Tensor = rows & self.has_dipped & (self.plateau_steps >= PLATEAU_STEPS)
        return ended

    def _update_directions(
        self, products: Tensor, delta: Tensor, gamma: Tensor, rows: Tensor
    ) -> None:
        """(v − ε d₋₂ − δ d₋₁) / γ, and A times it."""
        # Zero for rows that have failed, whose numbers may be NaN.
        older, old, new = (
            torch.where(rows, part / gamma, 0.0).unsqueeze(1)
            for part in (-self.epsilon, -delta, torch.ones_like(gamma))
        )

        def combined(vector: Tensor, last: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
            """The next one and the last one, in place of the last one and the one before."""
            kept = before.clone() if self.keeps else before
            following = kept.mul_(older).addcmul_(last, old).addcmul_(vector, new)
            if not self.keeps:
                return following, last
            by_row = rows.unsqueeze(1)
            torch.where(by_row, last, before, out=before)
            return torch.where(by_row, following, last), before

        self.update, self.update_before = combined(self.direction, self.update, self.update_before)
        self.image, self.image_before = combined(products, self.image, self.image_before)

    def _shift_lanczos(
        self, following: Tensor, applied: Tensor, beta: Tensor, rows: Tensor, restarted: Tensor
    ) -> None:
        """Takes the next Lanczos vector; for a restart it is the first one."""
        by_row, fresh = rows.unsqueeze(1), restarted.unsqueeze(1)
        length = torch.where(beta > 0, beta, 1.0).unsqueeze(1)
        if self.keeps:
            unit = torch.div(applied, length, out=self.scratch)
            torch.where(by_row, unit, self.direction, out=self.direction)
            torch.where(by_row, self.lanczos, self.lanczos_before, out=self.lanczos_before)
            torch.where(by_row, following, self.lanczos, out=self.lanczos)
            for stack in (
                self.lanczos_before,
                self.update,
                self.update_before,
                self.image,
                self.image_before,
            ):
                stack.masked_fill_(fresh, 0.0)
        else:
            torch.div(applied, length, out=self.direction)
            self.lanczos, self.lanczos_before = following, self.lanczos
        self.beta_before = torch.where(rows, self.beta, self.beta_before)
        self.beta = torch.where(rows, beta, self.beta)
        for name in ("beta_before", "delta_bar", "epsilon", "sine"):
            setattr(self, name, torch.where(restarted, 0.0, getattr(self, name)))
        self.cosine = torch.where(restarted, -1.0, self.cosine)
        self.phi_bar = torch.where(restarted, beta, self.phi_bar)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotients as a column, zero where there is nothing to divide by."""
    safe = torch.where(denominator > 0, denominator, 1.0)
    return torch.where(denominator > 0, numerator / safe, 0.0).unsqueeze(1)
