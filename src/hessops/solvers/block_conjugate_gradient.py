"""Conjugate gradients in blocks: right-hand sides that share one Krylov space."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from hessops.functional.precision import safe_norms
from hessops.operators.outcomes import (
    CANDIDATE_FACTOR,
    CHECK_INTERVAL,
    CURVATURE_NOISE,
    DRIFT_FACTOR,
    Problem,
    Run,
    following_check,
)
from hessops.operators.solution import SolveStatus

# What is cut off when the rank of a block is reduced stays below this share of the tolerances.
TRUNCATION_FACTOR = 0.1
# Pivots of a scaled Gram matrix below this multiple of eps may be rounding.
PIVOT_NOISE = 10


class _Phase(Enum):
    """What the next application of the operator multiplies."""

    STEP = "directions, and iterates to verify beside them"
    VERIFY = "iterates that may be solutions"
    MEASURE = "all iterates that are not decided, to restart from their residuals"
    LAST = "iterates of what has failed"


@dataclass(eq=False)
class _Block:
    r"""The residuals :math:`R = Q \delta` of some right-hand sides, scaled to unit norm at first.

    Attributes:
        rows: Which right-hand sides, ``(m,)``.
        scales: Norms by which their residuals were divided, ``(m,)``.
        basis: Q, ``(n, r)``, with QᵀMQ = I.
        coefficients: δ, ``(r, m)``.
        directions: P, ``(n, r)``.
        triangle: ρ of the last step, ``(r, r)``, once it has been made.
        is_new: Whether no step has been made.
    """

    rows: Tensor
    scales: Tensor
    basis: Tensor
    coefficients: Tensor
    directions: Tensor
    triangle: Tensor | None = None

    @property
    def is_new(self) -> bool:
        return self.triangle is None


class BlockRun(Run):
    r"""One solve by block conjugate gradients with orthonormal residuals.

    With :math:`R = Q \delta`, Q orthonormal in the inner product of the preconditioner M, a step is

    .. math:: \alpha = (P^\top A P)^{-1}, \quad X += P \alpha \delta, \quad
              Q_+ \rho = Q - A P \alpha, \quad \delta \leftarrow \rho \delta, \quad
              P \leftarrow M Q_+ + P \rho^\top

    (Dubrulle 2001, his method BCGrQ; O'Leary 1980 for the recurrence without orthonormal
    residuals). The rank of the block is revealed before the first step and reduced to what the
    tolerances need (breakdown-free in the sense of Ji & Li 2017); a rank that is lost on the way
    only leaves arbitrary columns in Q that no right-hand side has a part in. No right-hand side
    leaves its block when it is solved: the others would lose their conjugacy. Its solution is kept
    as it was verified, in the same application as the next step.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        start = problem.start
        self.iterate = torch.zeros_like(problem.rhs) if start is None else start.clone()
        # Right-hand sides whose recurrence is no longer true; they wait for the others.
        self.drifted = torch.zeros_like(self.estimates, dtype=torch.bool)
        self.candidates = torch.zeros(0, dtype=torch.int64, device=problem.rhs.device)
        self.candidate_iterates = problem.rhs[:0]
        self.candidate_estimates = self.estimates[:0]
        self.steps = 0
        self.operator_norm = 0.0
        # What it is called when a restart does not help; ``None`` restarts unconditionally.
        self.reason: SolveStatus | None = None
        self.phase = _Phase.MEASURE
        undecided = self._undecided()
        # Right-hand sides whose residual at the start is not known before it is measured.
        self.awaited = self.drifted if start is None else self.outcomes.undecided
        self.outcomes.keep(self.estimates, ~self.awaited)
        if start is None and len(undecided):
            self._begin(undecided, problem.rhs[undecided])

    def _undecided(self) -> Tensor:
        return self.outcomes.undecided.nonzero().squeeze(1)

    def is_finished(self) -> bool:
        """Whether every right-hand side has its outcome, verified."""
        return self.phase is not _Phase.LAST and not bool(self.outcomes.undecided.any())

    def vectors(self) -> Tensor:
        """Rows to multiply next, as the phase says."""
        if self.phase is _Phase.MEASURE:
            return self.iterate[self._undecided()]
        if self.phase is _Phase.STEP:
            return torch.cat([self.block.directions.T, self.candidate_iterates])
        return self.candidate_iterates

    def advance(self, products: Tensor) -> None:
        """Goes on with the products of `vectors`."""
        self.num_applications += 1
        if self.phase is _Phase.MEASURE:
            rows = self._undecided()
            residual = self.problem.rhs[rows] - products
            if bool(self.awaited.any()):
                residual = self._without_useless_starts(rows, residual)
            self._restart(rows, residual, self._measured(rows, self.iterate[rows], residual))
        elif self.phase is _Phase.STEP:
            rank = self.block.directions.shape[1]
            self._verify(products[rank:])
            self._step(products[:rank].T)
        else:
            self._verify_alone(products)

    def _without_useless_starts(self, rows: Tensor, residual: Tensor) -> Tensor:
        """The residuals, where a start that is worse than zero is replaced by zero."""
        useless = ~(residual.norm(dim=1) <= self.outcomes.rhs_norms[rows])
        self.iterate[rows[useless]] = 0
        return torch.where(useless.unsqueeze(1), self.problem.rhs[rows], residual)

    # --- one step ------------------------------------------------------------------------

    def _begin(self, rows: Tensor, residual: Tensor) -> None:
        """Starts a block from the true residuals ``(m, n)`` of some right-hand sides."""
        scales = residual.norm(dim=1)
        self.estimates[rows] = scales
        self.drifted[rows] = False
        self.next_check[rows] = following_check(scales, self.problem.tolerances[rows])
        # What is cut off adds up over the columns.
        allowed = TRUNCATION_FACTOR * (self.problem.tolerances[rows] / scales).min().item()
        noise = PIVOT_NOISE * torch.finfo(residual.dtype).eps
        truncation = max(min(allowed, TRUNCATION_FACTOR) / len(rows) ** 0.5, noise)
        basis, coefficients = _reduced((residual / scales.unsqueeze(1)).T, truncation)
        self.phase, self.reason = _Phase.STEP, SolveStatus.STAGNATED
        self.block = _Block(rows, scales, basis, coefficients, directions=basis)
        self._turn()

    def _step(self, products: Tensor) -> None:
        block = self.block
        if not bool(self.outcomes.undecided.any()):
            return
        if not bool(products.isfinite().all()):
            self._fail(SolveStatus.NON_FINITE)
            return
        inverse = self._inverse_of_projection(products)
        if inverse is None:
            return
        along = block.directions @ (inverse @ block.coefficients)
        self.iterate[block.rows] += (along * block.scales).T
        residual = block.basis - products @ inverse
        block.basis, block.triangle = torch.linalg.qr(residual)
        block.coefficients = block.triangle @ block.coefficients
        self.estimates[block.rows] = block.coefficients.norm(dim=0) * block.scales
        undecided = self.outcomes.undecided
        self.steps += 1
        self.outcomes.iterations[undecided] = self.steps
        self.outcomes.keep(self.estimates, undecided)
        self._choose_candidates()

    def _turn(self) -> None:
        """Makes the basis M-orthonormal, and the next directions."""
        block, precondition = self.block, self.problem.precondition
        preconditioned = block.basis
        triangle = block.triangle
        if precondition.product is not None:
            applied = precondition(block.basis.T.contiguous()).T
            factor = _cholesky(_symmetrised(block.basis.T @ applied), applied.dtype)
            if factor is None:
                self._fail(SolveStatus.PRECONDITIONER)
                return
            factor = factor.to(applied.dtype)
            block.basis = _divided(block.basis, factor)
            preconditioned = _divided(applied, factor)
            block.coefficients = factor @ block.coefficients
            triangle = factor if triangle is None else factor @ triangle
        if block.is_new:
            block.directions = preconditioned
        elif triangle is not None:
            block.directions = preconditioned + block.directions @ triangle.T

    def _inverse_of_projection(self, products: Tensor) -> Tensor | None:
        """(PᵀAP)⁻¹, or ``None`` where the step cannot be made and something else is to be done."""
        directions = self.block.directions
        projection = _symmetrised(directions.T @ products)
        lengths = directions.square().sum(dim=0).double()
        self.operator_norm = max(
            self.operator_norm, (safe_norms(products.T) / lengths.sqrt()).max().item()
        )
        self._note_curvature((projection.diagonal() / lengths).min())
        factor = _cholesky(projection, directions.dtype)
        if factor is not None:
            return torch.cholesky_inverse(factor, upper=True).to(directions.dtype)
        return self._inverse_on_curved_part(projection, lengths.sum().item())

    def _inverse_on_curved_part(self, projection: Tensor, squared_norm: float) -> Tensor | None:
        """The pseudo-inverse of PᵀAP where that is singular up to rounding, or ``None``."""
        block = self.block
        values, vectors = torch.linalg.eigh(projection)
        noise = torch.finfo(block.basis.dtype).eps * self.operator_norm * squared_norm
        smallest, direction = values[0], block.directions @ vectors[:, 0].to(block.basis.dtype)
        self._note_curvature(smallest / direction.square().sum())
        if smallest < -CURVATURE_NOISE * noise:
            self._fail(SolveStatus.INDEFINITE)
            return None
        if not block.is_new:
            # The directions of an old block may have become dependent; those of a new one are not.
            self.reason = SolveStatus.BREAKDOWN
            self.phase = _Phase.MEASURE
            return None
        flat = values <= noise
        parts = (vectors[:, flat].T @ block.coefficients.double()).norm(dim=0) * block.scales
        stuck = torch.zeros_like(self.drifted)
        stuck[block.rows] = parts > self.problem.tolerances[block.rows]
        stuck &= self.outcomes.undecided
        if bool(stuck.any()):
            self._fail(SolveStatus.BREAKDOWN, stuck.nonzero().squeeze(1))
            return None
        curved = vectors[:, ~flat]
        inverse: Tensor = ((curved / values[~flat]) @ curved.T).to(block.basis.dtype)
        return inverse

    def _note_curvature(self, curvature: Tensor) -> None:
        smallest = self.outcomes.smallest_curvatures
        met = smallest.minimum(curvature.to(smallest.dtype))
        self.outcomes.smallest_curvatures = torch.where(self.outcomes.undecided, met, smallest)

    # --- true residuals ------------------------------------------------------------------

    def _choose_candidates(self) -> None:
        """Which iterates to verify, and whether to step on beside them."""
        undecided = self.outcomes.undecided
        due = (self.estimates <= self.next_check) | (self.steps % CHECK_INTERVAL == 0)
        due = due & undecided & ~self.drifted
        spent = self.steps >= self.problem.maxiter
        if spent:
            due = undecided
        self._set_candidates(due.nonzero().squeeze(1))
        target = CANDIDATE_FACTOR * self.problem.tolerances
        others = undecided & ~self.drifted & ~(due & (self.estimates <= target))
        if not spent and bool(others.any()):
            self.phase = _Phase.STEP
            self._turn()
        else:
            self.phase = _Phase.VERIFY if len(self.candidates) else _Phase.MEASURE

    def _set_candidates(self, rows: Tensor) -> None:
        self.candidates = rows
        self.candidate_iterates = self.iterate[rows].clone()
        self.candidate_estimates = self.estimates[rows].clone()

    def _verify(self, products: Tensor) -> Tensor:
        """Measures the candidates; returns their best residual norms before."""
        rows = self.candidates
        if not len(rows):
            return rows.to(self.estimates.dtype)
        residual = self.problem.rhs[rows] - products
        before = self._measured(rows, self.candidate_iterates, residual)
        norms = residual.norm(dim=1)
        self.drifted[rows] = ~(norms <= DRIFT_FACTOR * self.candidate_estimates)
        self.next_check[rows] = following_check(
            self.candidate_estimates, self.problem.tolerances[rows]
        )
        self._set_candidates(rows[:0])
        return before

    def _verify_alone(self, products: Tensor) -> None:
        """Goes on after an application that only verified."""
        rows, residual = self.candidates, self.problem.rhs[self.candidates] - products
        before = self._verify(products)
        if self.phase is _Phase.LAST:
            self.phase = _Phase.MEASURE
            return
        if self.steps >= self.problem.maxiter:
            self.outcomes.decide(torch.ones_like(self.drifted), SolveStatus.MAX_ITERATIONS)
        undecided = self.outcomes.undecided
        if not bool(undecided.any()):
            return
        if not bool((undecided & ~self.drifted).any()):
            left = undecided[rows]
            if int(left.sum()) == int(undecided.sum()):
                # Nothing has moved since: their residuals are known.
                self._restart(rows[left], residual[left], before[left])
            else:
                self.phase = _Phase.MEASURE
            return
        self.phase = _Phase.STEP
        self._turn()

    def _measured(self, rows: Tensor, iterates: Tensor, residual: Tensor) -> Tensor:
        """Takes true residuals of some iterates; returns the best norms before."""
        chosen = torch.zeros_like(self.drifted)
        chosen[rows] = True
        iterate = torch.zeros_like(self.iterate)
        iterate[rows] = iterates
        norms = torch.zeros_like(self.estimates)
        norms[rows] = residual.norm(dim=1)
        before = self.outcomes.measured(iterate, norms, chosen)
        self.outcomes.keep(norms, self.awaited)
        self.awaited = torch.zeros_like(self.awaited)
        self.outcomes.decide(chosen & ~norms.isfinite(), SolveStatus.NON_FINITE)
        return before[rows]

    def _restart(self, rows: Tensor, residual: Tensor, before: Tensor) -> None:
        """Begins a new block for what is not decided, where the last one has helped."""
        norms = residual.norm(dim=1)
        if self.reason is not None:
            norms_of_all, before_of_all = self.estimates.clone(), self.estimates.clone()
            norms_of_all[rows], before_of_all[rows] = norms, before
            restarting = torch.zeros_like(self.drifted)
            restarting[rows] = True
            self.outcomes.judge_restart(restarting, norms_of_all, before_of_all, self.reason)
        left = self.outcomes.undecided[rows]
        if bool(left.any()):
            self._begin(rows[left], residual[left])

    def _fail(self, status: SolveStatus, rows: Tensor | None = None) -> None:
        """Verifies what is not decided one last time; it has failed unless that is met."""
        rows = self._undecided() if rows is None else rows
        chosen = torch.zeros_like(self.drifted)
        chosen[rows] = True
        self.outcomes.decide(chosen, status)
        self._set_candidates(rows)
        # What has not failed goes on in a block of its own.
        self.phase, self.reason = _Phase.LAST, None


def _reduced(columns: Tensor, truncation: float) -> tuple[Tensor, Tensor]:
    """Orthonormal Q ``(n, r)`` and δ ``(r, m)`` with Qδ equal to the columns up to truncation."""
    basis, triangle = torch.linalg.qr(columns)
    left, values, right = torch.linalg.svd(triangle, full_matrices=False)
    rank = max(1, int((values > truncation).sum()))
    return basis @ left[:, :rank], values[:rank].unsqueeze(1) * right[:rank]


def _symmetrised(matrix: Tensor) -> Tensor:
    wide = matrix.double()
    return (wide + wide.T) / 2


def _cholesky(gram: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The upper factor of a Gram matrix in float64; ``None`` where it is not clearly definite.

    Scaled to a unit diagonal first, so that the pivots are relative to their columns. They are
    compared with the rounding of `dtype`, in which the matrix was computed.
    """
    diagonal = gram.diagonal()
    if not bool((diagonal > 0).all()) or not bool(gram.isfinite().all()):
        return None
    roots = diagonal.sqrt()
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(gram / torch.outer(roots, roots), upper=True)
    noise = PIVOT_NOISE * torch.finfo(dtype).eps
    if int(info) > 0 or factor.diagonal().square().min().item() <= noise:
        return None
    return factor * roots


def _divided(columns: Tensor, factor: Tensor) -> Tensor:
    """Columns times the inverse of an upper triangular factor."""
    quotient: Tensor = torch.linalg.solve_triangular(factor, columns, upper=True, left=False)
    return quotient
