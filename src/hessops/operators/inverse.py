"""InverseOperator: an inverse is an operator, and it tells how well it solved."""

from __future__ import annotations

import copy
import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from math import log
from typing import Self

import torch
from torch import Tensor

from hessops.errors import (
    ArgumentTypeError,
    ConvergenceWarning,
    DeviceError,
    DivergenceError,
    IndefiniteOperatorError,
    MissingInverseError,
    NonFiniteProductError,
    PreconditionerError,
    ReadOnlyError,
    ShapeError,
    SolverBreakdownError,
    SolverError,
    StructureError,
)
from hessops.isolation import isolated
from hessops.operators.base import TensorOperator
from hessops.operators.outcomes import Outcomes, Problem
from hessops.operators.solution import Solution, SolveStatus
from hessops.validation import checked_number, checked_regularization, checked_rows
from hessops.warn import warn

logger = logging.getLogger(__name__)

_ERRORS: dict[SolveStatus, type[SolverError]] = {
    SolveStatus.INDEFINITE: IndefiniteOperatorError,
    SolveStatus.BREAKDOWN: SolverBreakdownError,
    SolveStatus.NON_FINITE: NonFiniteProductError,
    SolveStatus.DIVERGED: DivergenceError,
    SolveStatus.PRECONDITIONER: PreconditionerError,
}
_DEFAULT_RTOL = {torch.float64: 1e-7, torch.float32: 1e-4}


def default_rtol(dtype: torch.dtype) -> float:
    """The relative tolerance that a solve in this dtype can be expected to meet."""
    return _DEFAULT_RTOL.get(dtype, 5e-2)


def checked_rtol(rtol: float | None, dtype: torch.dtype) -> float:
    """A relative tolerance >= 0; ``None`` is that of `default_rtol`.

    Raises:
        ArgumentTypeError, ArgumentError: Not a number, or negative.
    """
    return default_rtol(dtype) if rtol is None else checked_number(rtol, "rtol", minimum=0)


class InverseOperator(TensorOperator):
    r"""The operator :math:`b \mapsto (A + \lambda I)^{-1} b`.

    `solve` returns a `Solution` with the outcome of every right-hand side. `apply` is
    ``solve(rhs).value`` under a policy: out of iterations or stagnated warns
    (`ConvergenceWarning`), an indefinite operator, a breakdown or a non-finite product raises.

    A subclass defines ``_solve_rows(rhs, start, history=...)`` for a stack of right-hand sides.

    Args:
        operator: A.
        regularization: λ >= 0, on top of any shift of A; ``None`` is 0.
        warn_on_max_iteration: ``True`` warns and logs when a solve stops short, ``False`` logs at
            DEBUG.

    Raises:
        ArgumentTypeError: `operator` is not a `TensorOperator`.
        ArgumentError: `regularization` is negative or not finite.

    Example:
        >>> import torch
        >>> from hessops import CgOperator, InverseOperator, MatrixOperator
        >>> inverse = CgOperator(MatrixOperator(torch.eye(2)), regularization=1.0)
        >>> isinstance(inverse, InverseOperator), inverse.with_regularization(3.0).regularization
        (True, 3.0)
        >>> inverse.apply(torch.ones(2))
        tensor([0.5000, 0.5000])
    """

    def __init__(
        self,
        operator: TensorOperator,
        regularization: float | None = None,
        *,
        warn_on_max_iteration: bool = True,
    ) -> None:
        if not isinstance(operator, TensorOperator):
            raise ArgumentTypeError(
                f"operator must be a TensorOperator, got {type(operator).__name__}; wrap a matrix "
                "as MatrixOperator(matrix)"
            )
        self.operator = operator
        self._regularization = checked_regularization(regularization)
        self.warn_on_max_iteration = warn_on_max_iteration
        super().__init__(
            operator.input_size,
            operator.dtype,
            operator.device,
            symmetric=operator.symmetric,
            positive_semidefinite=True if operator.positive_semidefinite else None,
            space=operator.space,
        )

    @abstractmethod
    def _solve_rows(
        self, rhs: Tensor, start: Tensor | None = None, *, history: bool = False
    ) -> Solution:
        """The hook: solves for the rows of a validated ``(k, n)`` stack, k >= 1.

        `start` are first guesses of the same shape, and `history` asks for the residual history;
        a method that takes no steps has no use for either.
        """

    @property
    def regularization(self) -> float:
        """λ, on top of any shift of A.

        Raises:
            ReadOnlyError: It is assigned; `with_regularization` makes the inverse for another λ.
        """
        return self._regularization

    @regularization.setter
    def regularization(self, value: object) -> None:
        # What was factorised or fitted for the old one would be taken for the new one.
        raise ReadOnlyError(
            f"{type(self).__name__}.regularization cannot be assigned (got {value!r}): take "
            "inverse.with_regularization(value), which returns another inverse"
        )

    @property
    def system(self) -> TensorOperator:
        """A + λI, the operator that is inverted."""
        return self.operator.shift(self.regularization)

    def solve(self, rhs: Tensor, x0: Tensor | None = None, *, history: bool = False) -> Solution:
        """Solves (A + λI) x = b for one right-hand side ``(n,)``, or the rows of ``(k, n)``.

        Args:
            rhs: b, or a stack of them.
            x0: A first guess of the shape of `rhs`, such as the solution of a similar system.
                Tolerances stay relative to ‖b‖. One whose residual is larger than ‖b‖ is replaced
                by zero (not by LiSSA, which does not measure it). Direct methods do not need it.
            history: Keeps the residual norms of every step; see `Solution.residual_history`.

        Returns:
            The solution with the outcome of every right-hand side; nothing in it carries a graph.

        Raises:
            ShapeError, DtypeError, NonFiniteError: `rhs` or `x0` does not fit.
            DeviceError: The operator is on the meta device, where there are no values.
        """
        with self.processes.together():
            self._require_values()
            rows = checked_rows(rhs, self.input_size, self.dtype, self.device, "rhs")
            start = None
            if x0 is not None:
                start = checked_rows(x0, self.input_size, self.dtype, self.device, "x0")
                if x0.shape != rhs.shape:
                    raise ShapeError(
                        f"x0 has shape {tuple(x0.shape)}, rhs {tuple(rhs.shape)}; they must agree"
                    )
        with isolated(self.device):
            solution = (
                self._solve_rows(rows, start, history=history)
                if len(rows)
                else _empty_solution(rows)
            )
        # The outcome is read from the device: only for those who want to know.
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s.solve: %s", type(self).__name__, " ".join(solution.report().split()))
        return solution if rhs.ndim == 2 else replace(solution, value=solution.value[0])

    def _apply_rows(self, rows: Tensor) -> Tensor:
        self._require_values()
        solution = self._solve_rows(rows)
        self._enforce(solution)
        return solution.value

    def _require_values(self) -> None:
        if self.device.type == "meta":
            raise DeviceError(
                f"{type(self).__name__} is on the meta device, where there are no values to solve "
                "with; move it with .to(device)"
            )

    def _enforce(self, solution: Solution) -> None:
        """Raises or warns by the worst outcome."""
        for status, error in _ERRORS.items():
            if status in solution.status:
                raise error(self._message(solution, status))
        for status in (SolveStatus.MAX_ITERATIONS, SolveStatus.STAGNATED):
            if status in solution.status:
                if self.warn_on_max_iteration:
                    message = self._message(solution, status)
                    logger.warning("%s", message)
                    warn(message, ConvergenceWarning)
                elif logger.isEnabledFor(logging.DEBUG):
                    logger.debug("%s", self._message(solution, status))

    def _message(self, solution: Solution, status: SolveStatus) -> str:
        which = [i for i, s in enumerate(solution.status) if s is status]
        worst = solution.relative_residual_norms[which].max().item()
        message = (
            f"{type(self).__name__}: {len(which)} of {len(solution.status)} right-hand sides "
            f"ended as {status.value!r} (the first is number {which[0]}), worst relative residual "
            f"{worst:.2e}. {status.advice}"
        )
        if status is SolveStatus.INDEFINITE:
            curvature = solution.smallest_curvatures.min().item()
            message += f" The most negative curvature met is {curvature:.3e}."
        return f"{message} {solution.detail}" if solution.detail else message

    def with_regularization(self, regularization: float | None) -> InverseOperator:
        """The same inverse with its own λ replaced; a shift of the operator stays."""
        changed = copy.copy(self)
        changed._regularization = checked_regularization(regularization)
        return changed

    def _closed_form_inverse(self, shift: float) -> TensorOperator | None:
        return self.system if shift == 0 else None

    def _exact_logdet(self, scale: float, shift: float) -> float | None:
        # With B = A + λI: c B⁻¹ + s I = (c I + s B) B⁻¹.
        if shift == 0 and scale > 0:
            of_system = self.system._exact_logdet(1.0, 0.0)
            return None if of_system is None else self.input_size * log(scale) - of_system
        try:
            of_system = self.system._exact_logdet(1.0, 0.0)
            of_factor = self.system._exact_logdet(shift, scale)
        except StructureError:
            # An indefinite inverse that scale and shift may make definite.
            return None
        return None if of_system is None or of_factor is None else of_factor - of_system

    def _move(self, device: torch.device) -> Self:
        moved = self._copy_on(device)
        moved.operator = self.operator.to(device)
        return moved

    def _children(self) -> Sequence[TensorOperator]:
        return (self.operator,)

    def _label(self) -> str:
        return f"{type(self).__name__}(regularization={self.regularization:g})"


class DirectInverse(InverseOperator):
    """An inverse that is computed without iterations.

    A subclass defines ``_inverse_rows(rows)``. `solve` and `apply` measure the true residual: where
    it is above the tolerance that the dtype allows (relative 1e-7 in float64, 1e-4 in float32), the
    outcome is *stagnated*. Arguments and errors are those of `InverseOperator`.

    Example:
        >>> import torch
        >>> from hessops import DirectInverse, IdentityOperator
        >>> class InverseOfIdentity(DirectInverse):
        ...     def _inverse_rows(self, rows):
        ...         return rows / (1 + self.regularization)
        >>> InverseOfIdentity(IdentityOperator(2), 1.0).apply(torch.ones(2))
        tensor([0.5000, 0.5000])
    """

    @abstractmethod
    def _inverse_rows(self, rows: Tensor) -> Tensor:
        """The hook: (A + λI)⁻¹ times the rows of a stack."""

    def _apply_rows(self, rows: Tensor) -> Tensor:
        return self._inverse_rows(rows) if rows.is_meta else super()._apply_rows(rows)

    def _solve_rows(
        self, rhs: Tensor, start: Tensor | None = None, *, history: bool = False
    ) -> Solution:
        problem = Problem.scaled(rhs, None, rtol=default_rtol(rhs.dtype))
        value = self._inverse_rows(problem.rhs)
        problem = replace(problem, rhs=self._reachable(problem.rhs))
        outcomes = Outcomes(problem)
        product = self.system._product
        finite = value.isfinite().all(dim=1)
        value = torch.where(finite.unsqueeze(1), value, 0.0)
        norms = (problem.rhs - product(value)).norm(dim=1)
        outcomes.decide(~finite | ~norms.isfinite(), SolveStatus.NON_FINITE)
        outcomes.measured(value, norms, outcomes.undecided)
        outcomes.decide(outcomes.undecided, SolveStatus.STAGNATED)
        return outcomes.solution(1, product)

    def _known_map(self) -> TensorOperator | None:
        """The hook for estimators: an operator with the same products, of which more is known."""
        return None

    def _exact_eigenvalues(self) -> Tensor | None:
        known = self._known_map()
        return None if known is None else known._exact_eigenvalues()

    def _exact_diagonal(self) -> Tensor | None:
        known = self._known_map()
        return None if known is None else known._exact_diagonal()

    def _exact_trace(self) -> float | None:
        known = self._known_map()
        return super()._exact_trace() if known is None else known._exact_trace()

    def _exact_squared_norm(self) -> float | None:
        known = self._known_map()
        return super()._exact_squared_norm() if known is None else known._exact_squared_norm()

    def _reachable(self, rhs: Tensor) -> Tensor:
        """The part of right-hand sides that the residual is measured against: all of it."""
        return rhs


class ClosedFormInverse(DirectInverse):
    """The inverse of an operator, by another operator that is known to be it.

    Args:
        operator: A.
        inverse_map: (A + λI)⁻¹, of the size, dtype and device of A.
        regularization: λ >= 0; ``None`` is 0.

    Raises:
        ArgumentTypeError, ArgumentError: As of `InverseOperator`.

    Example:
        >>> import torch
        >>> from hessops import DiagonalOperator
        >>> inverse = DiagonalOperator(torch.tensor([1.0, 4.0])).inverse()
        >>> type(inverse).__name__
        'ClosedFormInverse'
        >>> inverse.solve(torch.ones(2)).value
        tensor([1.0000, 0.2500])
    """

    def __init__(
        self,
        operator: TensorOperator,
        inverse_map: TensorOperator,
        regularization: float | None = None,
    ) -> None:
        super().__init__(operator, regularization)
        self.inverse_map = inverse_map

    def _inverse_rows(self, rows: Tensor) -> Tensor:
        return self.inverse_map._product(rows)

    def _apply_rows_adjoint(self, rows: Tensor) -> Tensor:
        return self.inverse_map._adjoint_product(rows)

    def _known_map(self) -> TensorOperator:
        return self.inverse_map

    def with_regularization(self, regularization: float | None) -> ClosedFormInverse:
        """The closed-form inverse of A + λI.

        Raises:
            MissingInverseError: A + λI has none.
        """
        shift = checked_regularization(regularization)
        inverse_map = self.operator._closed_form_inverse(shift)
        if inverse_map is None:
            raise MissingInverseError(
                f"{type(self.operator).__name__} with the shift {shift:g} has no inverse in closed "
                "form; pass a solver: A.shift(c).inverse(partial(CgOperator, rtol=1e-6))"
            )
        return ClosedFormInverse(self.operator, inverse_map, shift)

    def refresh(self) -> Self:
        """Lets A take a new copy of its model, and inverts it anew, in place; returns itself."""
        super().refresh()
        known = self.operator._closed_form_inverse(self.regularization)
        self.inverse_map = self.inverse_map.refresh() if known is None else known
        return self

    def _move(self, device: torch.device) -> Self:
        moved = super()._move(device)
        moved.inverse_map = self.inverse_map.to(device)
        return moved


def _empty_solution(rows: Tensor) -> Solution:
    none = rows.new_zeros(0)
    return Solution(
        value=torch.zeros_like(rows),
        status=(),
        iterations=none.to(torch.int64),
        residual_norms=none,
        rhs_norms=none,
        tolerances=none,
        num_applications=0,
        smallest_curvatures=none,
    )
