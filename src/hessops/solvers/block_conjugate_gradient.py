"""Conjugate gradients in blocks: right-hand sides that share one Krylov space."""

from __future__ import annotations

from collections.abc import Iterator
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
# Above this multiple, the factor of a Gram matrix makes rows orthonormal to some digits at once.
ORTHONORMAL_PIVOT = 1000
# Columns of a stack that are multiplied at once on a CPU: 64 rows of them are 256 KiB in float32.
PIECE = 1024


class _Phase(Enum):
    """What the next application of the operator multiplies."""

    STEP = "directions, and iterates to verify beside them"
    VERIFY = "iterates that may be solutions"
    MEASURE = "all iterates that are not decided, to restart from their residuals"
    LAST = "iterates of what has failed"


@dataclass(eq=False)
class _Block:
    r"""The residuals :math:`R = \delta Q` of some right-hand sides, scaled to unit norm at first.

    Vectors are rows, as operators take them, and are updated in place; the small matrices are in
    float64.

    Attributes:
        rows: Which right-hand sides, ``(m,)``.
        scales: Norms by which their residuals were divided, ``(m,)``.
        basis: Q, ``(r, n)``.
        coefficients: δ, ``(m, r)``.
        directions: P, ``(r, n)``.
        gram: G = QMQᵀ, ``(r, r)``, which is I up to the rounding of one orthogonalisation.
        scratch: Where the next basis and directions are written, ``(r, n)``.
        triangle: ρ of the last step, ``(r, r)``, once it has been made.
        is_new: Whether no step has been made.
    """

    rows: Tensor
    scales: Tensor
    basis: Tensor
    coefficients: Tensor
    directions: Tensor
    gram: Tensor
    scratch: Tensor
    triangle: Tensor | None = None

    @property
    def is_new(self) -> bool:
        return self.triangle is None

    def multiply_basis(self, matrix: Tensor) -> None:
        """Q ← matrix Q."""
        self.basis, self.scratch = _product(matrix, self.basis, self.scratch), self.basis

    def multiply_directions(self, matrix: Tensor) -> None:
        """P ← matrix P."""
        self.directions, self.scratch = (
            _product(matrix, self.directions, self.scratch),
            self.directions,
        )


class BlockRun(Run):
    r"""One solve by block conjugate gradients with orthonormal residuals.

    With residuals :math:`R = \delta Q` in rows, :math:`G = Q M Q^\top` near I for the
    preconditioner M, a step is

    .. math:: \alpha = G (P A P^\top)^{-1}, \quad X += \delta \alpha P, \quad
              \rho Q_+ = Q - \alpha P A, \quad \delta \leftarrow \delta \rho, \quad
              P \leftarrow Q_+ M + G_+ \rho^\top G^{-1} P

    (Dubrulle 2001, his method BCGrQ, in which G = I; O'Leary 1980 for the recurrence with any G).
    Q is orthogonalised by one Cholesky factorisation, and by reflections where that is not safe. It
    is orthonormal up to eps times the squared condition number of one step; G says how far, so that
    nothing is lost. The rank of the block is revealed before the first step and reduced to what the
    tolerances need (breakdown-free in the sense of Ji & Li 2017); a rank that is lost on the way
    only leaves arbitrary columns in Q that no right-hand side has a part in. No right-hand side
    leaves its block when it is solved: the others would lose their conjugacy. Its solution is kept
    as it was verified, in the same application as the next step.

    A step waits for the device three times: for each of its two factorisations, and to choose what
    to verify. Steps that verify wait a few times more.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        start = problem.start
        self.iterate = torch.zeros_like(problem.rhs) if start is None else start.clone()
        # Right-hand sides whose recurrence is no longer true; they wait for the others.
        self.drifted = torch.zeros_like(self.estimates, dtype=torch.bool)
        self.candidates = torch.zeros(0, dtype=torch.int64, device=problem.rhs.device)
        self.candidate_estimates = self.estimates[:0]
        self.steps = 0
        self.operator_norm = torch.zeros_like(self.estimates[:1]).sum()
        # Whether any right-hand side is undecided; ``None`` asks the device.
        self._is_left: bool | None = None
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
        return self.phase is not _Phase.LAST and not self._any_left()

    def _any_left(self) -> bool:
        if self._is_left is None:
            self._is_left = bool(self.outcomes.undecided.any())
        return self._is_left

    def vectors(self) -> Tensor:
        """Rows to multiply next, as the phase says."""
        if self.phase is _Phase.MEASURE:
            return self.iterate[self._undecided()]
        if self.phase is _Phase.STEP:
            directions = self.block.directions
            if not len(self.candidates):
                return directions
            return torch.cat([directions, self.iterate[self.candidates]])
        return self.iterate[self.candidates]

    def advance(self, products: Tensor) -> None:
        """Goes on with the products of `vectors`."""
        self.num_applications += 1
        if self.phase is _Phase.MEASURE:
            rows = self._undecided()
            residual = self.problem.rhs[rows].sub_(products)
            if bool(self.awaited.any()):
                residual = self._without_useless_starts(rows, residual)
            self._restart(rows, residual, self._measured(rows, residual.norm(dim=1)))
        elif self.phase is _Phase.STEP:
            rank = len(self.block.directions)
            if len(self.candidates):
                residual = self.problem.rhs[self.candidates].sub_(products[rank:])
                self._verify(residual.norm(dim=1))
                del residual
            self._step(products[:rank])
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
        basis, coefficients = _reduced(residual / scales.unsqueeze(1), truncation)
        self.phase, self.reason = _Phase.STEP, SolveStatus.STAGNATED
        gram = torch.eye(len(basis), dtype=torch.float64, device=basis.device)
        directions, scratch = basis.clone(), torch.empty_like(basis)
        self.block = _Block(rows, scales, basis, coefficients, directions, gram, scratch)
        self._turn()

    def _step(self, products: Tensor) -> None:
        block = self.block
        if not self._any_left():
            return
        inverse = self._inverse_of_projection(products)
        if inverse is None:
            return
        dtype, alpha = products.dtype, block.gram @ inverse
        # Zero for right-hand sides that are not in the block: all rows move in one product.
        along = torch.zeros(len(self.iterate), len(alpha), dtype=dtype, device=alpha.device)
        along[block.rows] = (block.coefficients @ alpha).to(dtype) * block.scales.unsqueeze(1)
        _add_product(self.iterate, along, block.directions)
        _add_product(block.basis, -alpha, products)
        self._orthogonalise()
        lengths = block.coefficients.norm(dim=1).to(dtype)
        self.estimates[block.rows] = lengths * block.scales
        undecided = self.outcomes.undecided
        self.steps += 1
        self.outcomes.iterations[undecided] = self.steps
        self.outcomes.keep(self.estimates, undecided)
        self._choose_candidates()

    def _orthogonalise(self) -> None:
        """Makes the rows of the basis nearly orthonormal, in the Euclidean inner product."""
        block, dtype = self.block, self.block.basis.dtype
        factor = _cholesky(_symmetrised(block.basis @ block.basis.T), dtype, ORTHONORMAL_PIVOT)
        if factor is None:
            # No rank is lost to a small pivot: arbitrary rows of Q take its place.
            columns, triangle = torch.linalg.qr(block.basis.T)
            block.basis.copy_(columns.T)
            block.triangle = triangle.T.double()
        else:
            block.multiply_basis(_inverted(factor))
            block.triangle = factor
        block.coefficients = block.coefficients @ block.triangle

    def _turn(self) -> None:
        """The next directions."""
        block = self.block
        if self.problem.precondition.product is not None:
            self._turn_preconditioned()
            return
        if block.triangle is None:
            return
        gram = _symmetrised(block.basis @ block.basis.T)
        block.multiply_directions(_conjugation(gram, block.triangle, block.gram))
        block.directions += block.basis
        block.gram = gram

    def _turn_preconditioned(self) -> None:
        """Makes the basis M-orthonormal, and the next directions."""
        block = self.block
        applied = self.problem.precondition(block.basis)
        factor = _cholesky(_symmetrised(block.basis @ applied.T), applied.dtype)
        if factor is None:
            self._fail(SolveStatus.PRECONDITIONER)
            return
        inverse = _inverted(factor)
        block.coefficients = block.coefficients @ factor
        if block.triangle is None:
            # After the last use of the basis, which the preconditioner may have returned.
            _product(inverse, applied, block.directions)
            block.multiply_basis(inverse)
            return
        # G was and is I.
        block.multiply_directions((block.triangle @ factor).T)
        _add_product(block.directions, inverse, applied)
        block.multiply_basis(inverse)

    def _inverse_of_projection(self, products: Tensor) -> Tensor | None:
        """(PᵀAP)⁻¹, or ``None`` where the step cannot be made and something else is to be done."""
        directions, scratch = self.block.directions, self.block.scratch
        projection = _symmetrised(directions @ products.T)
        factor = _cholesky(projection, directions.dtype)
        if factor is None and not bool(products.isfinite().all()):
            self._fail(SolveStatus.NON_FINITE)
            return None
        lengths = directions.norm(dim=1).double().square()
        growth = safe_norms(products, out=scratch).double() / lengths.sqrt()
        self.operator_norm = self.operator_norm.maximum(growth.max())
        self._note_curvature((projection.diagonal() / lengths).min())
        if factor is not None:
            return torch.cholesky_inverse(factor)
        return self._inverse_on_curved_part(projection, lengths.sum().item())

    def _inverse_on_curved_part(self, projection: Tensor, squared_norm: float) -> Tensor | None:
        """The pseudo-inverse of PᵀAP where that is singular up to rounding, or ``None``."""
        block = self.block
        values, vectors = torch.linalg.eigh(projection)
        noise = torch.finfo(block.basis.dtype).eps * self.operator_norm.item() * squared_norm
        smallest, direction = values[0], vectors[:, 0].to(block.basis.dtype) @ block.directions
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
        parts = (block.coefficients @ vectors[:, flat]).norm(dim=1) * block.scales
        stuck = torch.zeros_like(self.drifted)
        stuck[block.rows] = parts > self.problem.tolerances[block.rows]
        stuck &= self.outcomes.undecided
        if bool(stuck.any()):
            self._fail(SolveStatus.BREAKDOWN, stuck.nonzero().squeeze(1))
            return None
        curved = vectors[:, ~flat]
        inverse: Tensor = (curved / values[~flat]) @ curved.T
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
        target = CANDIDATE_FACTOR * self.problem.tolerances
        others = undecided & ~self.drifted & ~(due & (self.estimates <= target))
        # Both answers at once.
        flags = int(due.any() + 2 * others.any())
        self._set_candidates(due.nonzero().squeeze(1) if flags & 1 else self.candidates[:0])
        if not spent and flags & 2:
            self.phase = _Phase.STEP
            self._turn()
        else:
            self.phase = _Phase.VERIFY if len(self.candidates) else _Phase.MEASURE

    def _set_candidates(self, rows: Tensor) -> None:
        self.candidates = rows
        self.candidate_estimates = self.estimates[rows]

    def _verify(self, norms: Tensor) -> Tensor:
        """Takes the true residual norms of the candidates; returns their best ones before."""
        rows = self.candidates
        before = self._measured(rows, norms)
        self.drifted[rows] = ~(norms <= DRIFT_FACTOR * self.candidate_estimates)
        self.next_check[rows] = following_check(
            self.candidate_estimates, self.problem.tolerances[rows]
        )
        self._set_candidates(rows[:0])
        return before

    def _verify_alone(self, products: Tensor) -> None:
        """Goes on after an application that only verified."""
        rows, residual = self.candidates, self.problem.rhs[self.candidates].sub_(products)
        before = self._verify(residual.norm(dim=1))
        if self.phase is _Phase.LAST:
            self.phase = _Phase.MEASURE
            return
        if self.steps >= self.problem.maxiter:
            self._decide(torch.ones_like(self.drifted), SolveStatus.MAX_ITERATIONS)
        undecided = self.outcomes.undecided
        if not self._any_left():
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

    def _measured(self, rows: Tensor, measured: Tensor) -> Tensor:
        """Takes norms of true residuals of some iterates; returns the best norms before."""
        chosen = torch.zeros_like(self.drifted)
        chosen[rows] = True
        norms = torch.zeros_like(self.estimates)
        norms[rows] = measured
        before = self.outcomes.measured(self.iterate, norms, chosen)
        self.outcomes.keep(norms, self.awaited)
        self.awaited = torch.zeros_like(self.awaited)
        self._decide(chosen & ~norms.isfinite(), SolveStatus.NON_FINITE)
        return before[rows]

    def _decide(self, rows: Tensor, status: SolveStatus) -> None:
        self.outcomes.decide(rows, status)
        self._is_left = None

    def _restart(self, rows: Tensor, residual: Tensor, before: Tensor) -> None:
        """Begins a new block for what is not decided, where the last one has helped."""
        norms = residual.norm(dim=1)
        if self.reason is not None:
            norms_of_all, before_of_all = self.estimates.clone(), self.estimates.clone()
            norms_of_all[rows], before_of_all[rows] = norms, before
            restarting = torch.zeros_like(self.drifted)
            restarting[rows] = True
            self.outcomes.judge_restart(restarting, norms_of_all, before_of_all, self.reason)
            self._is_left = None
        left = self.outcomes.undecided[rows]
        if bool(left.any()):
            self._begin(rows[left], residual[left])

    def _fail(self, status: SolveStatus, rows: Tensor | None = None) -> None:
        """Verifies what is not decided one last time; it has failed unless that is met."""
        rows = self._undecided() if rows is None else rows
        chosen = torch.zeros_like(self.drifted)
        chosen[rows] = True
        self._decide(chosen, status)
        self._set_candidates(rows)
        # What has not failed goes on in a block of its own.
        self.phase, self.reason = _Phase.LAST, None


def _reduced(rows: Tensor, truncation: float) -> tuple[Tensor, Tensor]:
    """Orthonormal rows Q ``(r, n)`` and δ ``(m, r)`` with δQ equal to the rows up to truncation."""
    columns, triangle = torch.linalg.qr(rows.T)
    left, values, right = torch.linalg.svd(triangle, full_matrices=False)
    rank = max(1, int((values > truncation).sum()))
    coefficients = right[:rank].T.double() * values[:rank].double()
    return left[:, :rank].T @ columns.T, coefficients


def _symmetrised(matrix: Tensor) -> Tensor:
    wide = matrix.double()
    return (wide + wide.T) / 2


def _cholesky(gram: Tensor, dtype: torch.dtype, noise: float = PIVOT_NOISE) -> Tensor | None:
    """The lower factor of a Gram matrix in float64; ``None`` where it is not clearly definite.

    Scaled to a unit diagonal first, so that the pivots are relative to their rows. They are
    compared with the rounding of `dtype`, in which the matrix was computed.
    """
    roots = gram.diagonal().sqrt()
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(gram / torch.outer(roots, roots))
    # A diagonal that is not positive, and what is not finite, are NaN in the factor or the roots.
    pivots = factor.diagonal().square() + 0 * roots
    usable = (info == 0) & (pivots > noise * torch.finfo(dtype).eps).all()
    return factor * roots.unsqueeze(1) if bool(usable) else None


def _conjugation(gram: Tensor, triangle: Tensor, before: Tensor) -> Tensor:
    """G₊ρᵀG⁻¹, the part of the last directions that makes the next ones conjugate to them."""
    factor, _ = torch.linalg.cholesky_ex(before)
    return gram @ torch.cholesky_solve(triangle, factor).T


def _inverted(factor: Tensor) -> Tensor:
    """The inverse of a lower triangular factor."""
    eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, eye, upper=False)
    return inverse


def _product(matrix: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    """A small matrix times rows, in the dtype of these."""
    matrix = matrix.to(rows.dtype)
    for piece in _pieces(rows):
        torch.mm(matrix, rows[:, piece], out=out[:, piece])
    return out


def _add_product(target: Tensor, matrix: Tensor, rows: Tensor) -> None:
    """Adds a small matrix times rows to other rows."""
    matrix = matrix.to(rows.dtype)
    for piece in _pieces(rows):
        target[:, piece] += matrix @ rows[:, piece]


def _pieces(rows: Tensor) -> Iterator[slice]:
    """Columns that are multiplied together; a CPU keeps a piece of a long row in its cache."""
    n = rows.shape[1]
    width = PIECE if rows.device.type == "cpu" else n
    for first in range(0, n, width):
        yield slice(first, first + width)
