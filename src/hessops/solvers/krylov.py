"""KrylovOperator: what the solvers by Krylov spaces share."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from hessops.errors import ArgumentTypeError, StructureError
from hessops.operators.algebra import require_compatible
from hessops.operators.base import TensorOperator
from hessops.operators.inverse import DirectInverse, InverseOperator, checked_rtol
from hessops.operators.outcomes import CountedMap, Problem, Run
from hessops.operators.solution import Solution
from hessops.preconditioners import Preconditioner
from hessops.printed import Node, Printed, named
from hessops.progress import progress_bar
from hessops.validation import (
    checked_count,
    checked_number,
    checked_regularization,
    require_single_or_double,
)

logger = logging.getLogger(__name__)


class KrylovOperator(InverseOperator):
    r"""An inverse :math:`b \mapsto (A + \lambda I)^{-1} b` by products with A.

    Abstract: a subclass says in ``_begin(problem)`` how it runs, and in ``_refuse_unsuitable`` what
    it cannot solve. Tolerances, scaling, preconditioning and progress are here.

    Args:
        operator: A, any symmetric operator of float32 or float64.
        regularization: λ >= 0, on top of any shift of A; ``None`` is 0.
        rtol: Relative tolerance; ``None`` is 1e-7 in float64 and 1e-4 in float32.
        atol: Absolute tolerance. With a positive one, zero solves every small right-hand side.
        maxiter: Most steps for each right-hand side; ``None`` is 10·n.
        progress: Shows a progress bar with the iterations and the worst relative residual.
        preconditioner: A `Preconditioner`, which is fitted in the first solve and kept, or any
            symmetric positive definite operator close to (A + λI)⁻¹, which is used as it is.
        warn_on_max_iteration: ``True`` warns and logs when a solve stops short of its tolerance,
            ``False`` logs at DEBUG.

    Raises:
        ArgumentTypeError: `operator` or `preconditioner` is something else.
        StructureError: `operator` or `preconditioner` is known to lack the structure it needs.
        ShapeError, DeviceError: `preconditioner` is of another size or elsewhere.
        DtypeError: `operator` is of half precision, or `preconditioner` of another dtype.
        ArgumentError: A negative `regularization` or tolerance, or `maxiter` below 1.
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
        warn_on_max_iteration: bool = True,
    ) -> None:
        super().__init__(operator, regularization, warn_on_max_iteration=warn_on_max_iteration)
        require_single_or_double(operator.dtype, "operator", self._method())
        self._refuse_unsuitable()
        self.rtol = checked_rtol(rtol, operator.dtype)
        self.atol = checked_number(atol, "atol", minimum=0)
        self.maxiter = (
            10 * operator.input_size if maxiter is None else checked_count(maxiter, "maxiter")
        )
        self.progress = progress
        _check_preconditioner(preconditioner, operator)
        self.preconditioner = preconditioner
        self._fitted: TensorOperator | None = None

    @abstractmethod
    def _begin(self, problem: Problem) -> Run:
        """The hook: a run of the method."""

    @abstractmethod
    def _method(self) -> str:
        """The name of the method in messages."""

    def _refuse_unsuitable(self) -> None:
        """Raises `StructureError` for an operator that the method is known not to solve."""
        if self.operator.symmetric is False:
            raise StructureError(
                f"operator ({type(self.operator).__name__}) is not symmetric, which "
                f"{self._method()} needs: solve with A.T @ A, or use DirectSolveOperator"
            )

    def fitted_preconditioner(self) -> TensorOperator | None:
        """The operator that preconditions; a `Preconditioner` is fitted once and kept."""
        return self._fitted_to(self.operator)

    def _fitted_to(self, operator: TensorOperator) -> TensorOperator | None:
        if isinstance(self.preconditioner, Preconditioner):
            if self._fitted is None:
                self._fitted = self.preconditioner.fit(operator, self.regularization)
                _check_preconditioner(self._fitted, self.operator)
                logger.debug("%s fitted %s", type(self).__name__, self._fitted._label())
            return self._fitted
        return self.preconditioner

    def _solve_rows(
        self, rhs: Tensor, start: Tensor | None = None, *, history: bool = False
    ) -> Solution:
        # One set of graphs serves the preconditioner and the solve.
        operator = self.operator.linearize()
        preconditioner = self._fitted_to(operator)
        problem = Problem.scaled(
            rhs,
            start,
            rtol=self.rtol,
            atol=self.atol,
            maxiter=self.maxiter,
            precondition=_counted(preconditioner),
            keeps_history=history,
        )
        run = self._begin(problem)
        system = operator.shift(self.regularization)
        with progress_bar(self._method(), "step", self.maxiter, show=self.progress) as bar:
            while not run.is_finished():
                run.advance(system._product(run.vectors()))
                if bar.is_shown:
                    bar.say(worst_residual=f"{run.worst_residual():.1e}")
                    bar.advance_to(int(run.iterations.max()))
        return run.solution(system._product)

    def with_regularization(self, regularization: float | None) -> Self:
        """The same solver with its own λ replaced; a shift of the operator stays.

        A fitted preconditioner is adapted without products with A where mathematics allows; one
        that was given as an operator stays as it is.

        Raises:
            ArgumentTypeError, ArgumentError: `regularization` is not a number >= 0.
            StructureError: The method is known not to solve the system.
        """
        changed = self._copy_on(self.device)
        changed._regularization = checked_regularization(regularization)
        changed._refuse_unsuitable()
        if isinstance(self.preconditioner, Preconditioner) and self._fitted is not None:
            changed._fitted = self.preconditioner.refit(
                self._fitted, self.operator, changed.regularization
            )
        return changed

    def refresh(self) -> Self:
        """Lets every part take a new copy of its model; the preconditioner is fitted anew."""
        super().refresh()
        self._fitted = None
        if isinstance(self.preconditioner, TensorOperator):
            self.preconditioner.refresh()
        return self

    def _move(self, device: torch.device) -> Self:
        moved = super()._move(device)
        if isinstance(self.preconditioner, TensorOperator):
            moved.preconditioner = self.preconditioner.to(device)
        moved._fitted = None if self._fitted is None else self._fitted.to(device)
        return moved

    def _label(self) -> str:
        settings = [
            f"regularization={self.regularization:g}",
            f"rtol={self.rtol:g}",
            f"atol={self.atol:g}",
        ]
        return f"{type(self).__name__}({', '.join(settings)})"

    def _printed_parts(self) -> Sequence[Node | Printed]:
        if self.preconditioner is None:
            return self._children()
        return (*self._children(), named("preconditioner", self.preconditioner))


def _counted(preconditioner: TensorOperator | None) -> CountedMap:
    if preconditioner is None:
        return CountedMap(None)
    if isinstance(preconditioner, DirectInverse):
        # Not as a solve: it would be measured by a product with its own operator each time.
        return CountedMap(preconditioner._inverse_rows)
    return CountedMap(preconditioner._product, varies=_is_iterative(preconditioner))


def _is_iterative(operator: TensorOperator) -> bool:
    """Whether products with an operator are solves to a tolerance."""
    if isinstance(operator, InverseOperator):
        return not isinstance(operator, DirectInverse)
    return any(_is_iterative(child) for child in operator._children())


def _check_preconditioner(preconditioner: object, operator: TensorOperator) -> None:
    if preconditioner is None or isinstance(preconditioner, Preconditioner):
        return
    if not isinstance(preconditioner, TensorOperator):
        raise ArgumentTypeError(
            "preconditioner must be a Preconditioner or a TensorOperator close to the inverse, got "
            f"{preconditioner!r}"
        )
    require_compatible(operator, preconditioner, "preconditioned by")
    lacks = [
        name
        for name, flag in (
            ("symmetric", preconditioner.symmetric),
            ("positive semi-definite", preconditioner.positive_semidefinite),
        )
        if flag is False
    ]
    if lacks:
        raise StructureError(
            f"preconditioner ({type(preconditioner).__name__}) is not {' and not '.join(lacks)}; "
            "it must be symmetric positive definite"
        )
