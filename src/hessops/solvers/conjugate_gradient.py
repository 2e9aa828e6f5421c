"""The method of conjugate gradients for many right-hand sides at once."""

from __future__ import annotations

import torch
from torch import Tensor

from hessops.errors import StructureError
from hessops.functional.precision import finite_rows, largest_entries
from hessops.operators.base import TensorOperator
from hessops.operators.outcomes import CURVATURE_NOISE, Problem, Run
from hessops.operators.solution import SolveStatus
from hessops.preconditioners import Preconditioner
from hessops.solvers.block_conjugate_gradient import BlockRun
from hessops.solvers.krylov import KrylovOperator
from hessops.solvers.rows import Phase, RowRun


class CgOperator(KrylovOperator):
    r"""The inverse :math:`b \mapsto (A + \lambda I)^{-1} b` by conjugate gradients.

    For symmetric positive definite :math:`A + \lambda I` (Hestenes & Stiefel 1952; Trefethen & Bau
    1997, Lecture 38). All right-hand sides advance together: one application of A per step serves
    all of them. Each stops at

    .. math:: \lVert b - (A + \lambda I) x\rVert
              \le \max(\mathrm{rtol}\,\lVert b\rVert, \mathrm{atol})

    on the *true* residual: it is measured where the residual of the recurrence meets the tolerance,
    and on the way there if the tolerance is near the precision of the dtype; when the recurrence
    has drifted, the method restarts from the true residual. Negative curvature, a NaN, and a
    residual that no longer falls are recognised and reported; see `SolveStatus`.

    By default each right-hand side is on its own, and the others do not change its iterates by a
    bit. With ``use_block_cg=True`` they share one Krylov space (O'Leary 1980), which takes fewer
    applications, the more so the more right-hand sides there are. Dependent, duplicate and zero
    right-hand sides, and more of them than parameters, are no trouble: the rank of the block is
    revealed and reduced (Ji & Li 2017), and its residuals are kept orthonormal (Dubrulle 2001),
    without which an ill-conditioned system loses the gain. Each right-hand side still meets its own
    tolerance.

    `apply` and `solve` take a vector ``(n,)`` or the rows of a stack ``(k, n)`` of A's dtype and
    answer in the same shape. `apply` raises a `SolverError` where the value would be meaningless
    and warns (`ConvergenceWarning`) where it is short of the tolerance; `solve` reports both.

    Args:
        operator: A, any operator of float32 or float64; not known to be non-symmetric or
            indefinite.
        regularization: λ >= 0, on top of any shift of A; ``None`` is 0.
        rtol: Relative tolerance; ``None`` is 1e-7 in float64 and 1e-4 in float32.
        atol: Absolute tolerance. With a positive one, zero solves every small right-hand side.
        maxiter: Most steps for each right-hand side; ``None`` is 10·n.
        progress: Shows a progress bar with the iterations and the worst relative residual.
        preconditioner: A `Preconditioner`, which is fitted in the first solve and kept, or any
            symmetric positive definite operator close to (A + λI)⁻¹, which is used as it is. One
            that is itself iterative will do, with ``use_block_cg=False``.
        use_block_cg: Shares one Krylov space among the right-hand sides.
        warn_on_max_iteration: ``True`` warns and logs when a solve stops short of its tolerance,
            ``False`` logs at DEBUG.

    Raises:
        ArgumentTypeError: `operator` or `preconditioner` is something else.
        StructureError: `operator` is known to be non-symmetric, or known not to be positive
            semi-definite with no `regularization`; `preconditioner` is known to be either.
        ShapeError, DeviceError: `preconditioner` is of another size or elsewhere.
        DtypeError: `operator` is of half precision, or `preconditioner` of another dtype.
        ArgumentError: A negative `regularization` or tolerance, or `maxiter` below 1.

    Example:
        >>> import torch
        >>> from hessops import CgOperator, MatrixOperator
        >>> A = MatrixOperator(torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64))
        >>> solution = CgOperator(A).solve(torch.tensor([3.0, 3.0], dtype=torch.float64))
        >>> solution.value.round(decimals=6), solution.status[0] == "converged"
        (tensor([1., 1.], dtype=torch.float64), True)
        >>> block = CgOperator(A, use_block_cg=True).solve(torch.eye(2, dtype=torch.float64))
        >>> block.converged, block.num_applications
        (tensor([True, True]), 2)
    """

    def __init__(
        self,
        operator: TensorOperator,
        regularization: float | None = None,
        rtol: float | None = None,
        atol: float = 0.0,
        maxiter: int | None = None,
        progress: bool = False,
        preconditioner: Preconditioner | TensorOperator | None = None,
        use_block_cg: bool = False,
        warn_on_max_iteration: bool = True,
    ) -> None:
        super().__init__(
            operator,
            regularization,
            rtol,
            atol,
            maxiter,
            progress,
            preconditioner,
            warn_on_max_iteration,
        )
        self.use_block_cg = use_block_cg

    def _begin(self, problem: Problem) -> Run:
        return BlockRun(problem) if self.use_block_cg else _CgRun(problem)

    def _method(self) -> str:
        return "conjugate gradients"

    def _refuse_unsuitable(self) -> None:
        super()._refuse_unsuitable()
        if self.operator.positive_semidefinite is False and self.regularization == 0:
            raise StructureError(
                f"operator ({type(self.operator).__name__}) is not positive semi-definite; "
                "conjugate gradients need a symmetric positive definite one: pass a regularization "
                "above its most negative eigenvalue, or use MinresOperator"
            )

    def _label(self) -> str:
        label = super()._label()
        return f"{label[:-1]}, use_block_cg=True)" if self.use_block_cg else label


class _CgRun(RowRun):
    r"""Conjugate gradients with M the preconditioner, and z = Mr.

    .. math:: \alpha = r^\top z / p^\top A p, \quad x += \alpha p, \quad r -= \alpha A p, \quad
              p \leftarrow z + \beta p

    :math:`\beta = r_+^\top z_+ / r^\top z`; for an M that varies, an iterative inverse,
    :math:`\beta = z_+^\top (r_+ - r) / r^\top z`, which forgives that (Polak & Ribière 1969; Notay
    2000). The first loses less to rounding.
    """

    def __init__(self, problem: Problem) -> None:
        self.products_of_residual = torch.zeros_like(problem.rhs[:, 0])  # rᵀz
        super().__init__(problem)

    def _step(self, products: Tensor, *, stepping: Tensor, restarted: Tensor) -> None:
        curvature, inner = self.note_curvature(products, stepping)
        noise = torch.finfo(products.dtype).eps * self.operator_norms
        indefinite = stepping & (curvature < -CURVATURE_NOISE * noise)
        step = self.products_of_residual / inner
        flat = stepping & ~indefinite & ((curvature <= noise) | ~step.isfinite())
        moving = stepping & ~indefinite & ~flat
        along = torch.where(moving, step, 0.0)
        self.iterate.addcmul_(self.direction, along.unsqueeze(1))
        self.residual.addcmul_(products, along.unsqueeze(1), value=-1)
        norms = self._cleared_norms()
        lost = moving & ~norms.isfinite()
        moving = moving & ~lost
        if not self.is_idle(moving | restarted):
            self._turn(norms, -along, products, moving, restarted)
        self.estimates = torch.where(moving, norms, self.estimates)
        self.end(lost, SolveStatus.NON_FINITE)
        self.end(indefinite, SolveStatus.INDEFINITE)
        self.end(flat, SolveStatus.BREAKDOWN)
        self.moved(moving)

    def _cleared_norms(self) -> Tensor:
        """Norms of the residuals, of which a preconditioner is to see no NaN.

        Zero times an infinite product is one. Without a preconditioner it stays in the row, which
        has failed, and is cleared before the next product.
        """
        norms: Tensor = self.residual.norm(dim=1)
        if self.problem.precondition.product is not None:
            self.residual.masked_fill_(~norms.isfinite().unsqueeze(1), 0.0)
        return norms

    def _turn(
        self, norms: Tensor, along: Tensor, products: Tensor, moving: Tensor, restarted: Tensor
    ) -> None:
        """The next directions of rows that moved by `along` times Ap, or begin."""
        rows, precondition = moving | restarted, self.problem.precondition
        applied = self.residual
        inner = numerator = norms.square()
        if precondition.product is not None:
            applied = precondition(self.residual)
            if self.urgent is Phase.VERIFY:
                applied = torch.where(rows.unsqueeze(1), applied, 0.0)
            inner = numerator = self._inner(self.residual, applied)
        if precondition.varies:
            numerator = along * self._inner(applied, products)
        before = self.products_of_residual
        # A residual of exactly zero has no next direction; its iterate is verified and done.
        ratio = torch.where(moving & (before > 0), numerator / before, 0.0)
        kept = torch.where(rows, ratio, 1.0).unsqueeze(1)
        self.direction.mul_(kept).addcmul_(applied, rows.to(kept.dtype).unsqueeze(1))
        self.products_of_residual = torch.where(rows, inner, before)
        if precondition.product is not None:
            positive = (inner > 0) & finite_rows(applied)
            is_zero = largest_entries(self.residual).squeeze(1) == 0
            self.end(rows & ~positive & ~is_zero, SolveStatus.PRECONDITIONER)

    def _inner(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.mul(left, right, out=self.scratch).sum(dim=1)
