"""The damped inverse of a Gauss-Newton matrix by the Gram matrix of its columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, Self, cast

import torch
from torch import Tensor, nn

from hessops.batch.averaging import Averaging
from hessops.batch.gauss_newton import (
    GaussNewtonBatchOperation,
    GeneralizedGaussNewtonBatchOperation,
)
from hessops.batch.operation import BatchOperation
from hessops.errors import (
    ArgumentTypeError,
    MemoryLimitError,
    MissingInverseError,
    SingularOperatorError,
    StructureError,
)
from hessops.functional.roots import OutputRoot, gradient_root, hessian_root
from hessops.functional.sample_space import RootOf, SampleSpace
from hessops.isolation import isolated
from hessops.objective import Objective
from hessops.operators.base import TensorOperator
from hessops.operators.inverse import DirectInverse, default_rtol
from hessops.operators.outcomes import Outcomes, Problem
from hessops.operators.solution import Solution, SolveStatus
from hessops.processes import ONE_PROCESS, Processes
from hessops.streaming import Batch, BatchStream

# What the Gram matrix, a copy with the shift and its factor may take between them.
GRAM_BYTES = 2**30
# An inverse in closed form may take the operations of this many iterations of conjugate gradients
# for one right-hand side. They need about √κ/2 · log(2/ε) of them: 1000 for a condition number of
# κ = 14 000 and ε = 1e-7. What is dearer is left to a solver that the user chooses, who knows how
# many right-hand sides there will be.
CG_ITERATIONS = 1000
# A product at fixed parameters, in gradients.
PRODUCT_GRADIENTS = 1.5
# What a product with one batch takes at least, however small: about a millisecond, in which large
# matrices are multiplied with this many multiplications.
BATCH_OPERATIONS = 10**7


class SampledOperator(Protocol):
    """An average over data of the Gauss-Newton matrices of batches, as `BatchOperator` is one."""

    batch_operation: BatchOperation
    stream: BatchStream
    averaging: Averaging

    @property
    def objective(self) -> Objective | None:
        """Model and loss."""

    @property
    def processes(self) -> Processes:
        """Who holds the data."""

    def checked_batches(self, stream: BatchStream) -> Iterator[Batch]:
        """One pass over the data."""


class _Gram:
    """U and UᵀU of an operator: found when needed, and again when it was refreshed.

    Args:
        operator: Its model and data.
    """

    def __init__(self, operator: SampledOperator) -> None:
        self._operator = operator
        self._space: SampleSpace | None = None
        self._matrix: Tensor | None = None
        # The copy of the model that they are of: a refreshed operator has another.
        self._model: nn.Module | None = None

    def __reduce__(self) -> tuple[type[Self], tuple[SampledOperator]]:
        """Copies and pickles start without, and find the same again."""
        return type(self), (self._operator,)

    @property
    def size(self) -> int | None:
        """m; ``None`` while it is not known."""
        return self._space.size if self._space is not None and self._is_current else None

    @property
    def _is_current(self) -> bool:
        return self._model is _objective(self._operator).model

    def space(self) -> SampleSpace:
        """U.

        Raises:
            MissingInverseError: There is none; the message says why.
        """
        if self._space is None or not self._is_current:
            self._space, self._matrix = _surveyed(self._operator), None
            self._model = _objective(self._operator).model
        return self._space

    def matrix(self) -> Tensor:
        """UᵀU, ``(m, m)`` in float64."""
        space = self.space()
        if self._matrix is None:
            self._matrix = space.gram()
        return self._matrix


class SampleSpaceInverse(DirectInverse):
    r"""The damped inverse of an empirical or generalized Gauss-Newton matrix, in sample space.

    With :math:`A = U U^\top` and a column of U for each point and each column of a root of its loss
    Hessian,

    .. math:: (A + \lambda I)^{-1} b
              = \tfrac1\lambda \left(b - U (\lambda I + U^\top U)^{-1} U^\top b\right)

    (Woodbury 1950). The Gram matrix :math:`U^\top U` ``(m, m)`` is computed in float64 when it is
    first needed, factorised by Cholesky and kept; U is not kept. Each right-hand side is refined
    once with the operator's own product. The true residual is measured; it grows like eps·‖A‖/λ,
    and where it is above what the dtype allows the outcome is *stagnated* (see `DirectInverse`).

    ``A.shift(λ).inverse()`` takes this route where m < P, the Gram matrix fits 1 GiB with its
    factor, and it costs no more than 1000 iterations of conjugate gradients. Constructed directly,
    it does not ask what it costs.

    Args:
        operator: A `GaussNewtonOperator` or `GeneralizedGaussNewtonOperator`, or one that is
            shifted. Its data must come in the same order in every pass: in memory
            (``cache=True``), from a list, or from a loader that does not shuffle.
        regularization: λ >= 0, on top of any shift of the operator; the two must be positive
            together.
        warn_on_max_iteration: ``True`` warns and logs when a residual stays above the tolerance,
            ``False`` logs at DEBUG.

    Raises:
        ArgumentTypeError: `operator` is none of these.
        MissingInverseError: λ is zero; m >= P; the Gram matrix would not fit; the loss is not
            convex in the output; the order of the data may change; or they are spread over several
            processes.

    Example:
        >>> import torch
        >>> from hessops import GaussNewtonOperator
        >>> from hessops.operators.sample_space import SampleSpaceInverse
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> G = GaussNewtonOperator(model, torch.nn.MSELoss(), [(x, torch.zeros(2, 1))])
        >>> G.to_dense().diagonal()
        tensor([2., 2., 0.])
        >>> inverse = SampleSpaceInverse(G, regularization=2.0)
        >>> inverse.apply(torch.ones(3))
        tensor([0.2500, 0.2500, 0.5000])
        >>> print(inverse)
        SampleSpaceInverse(2 columns, Gram matrix in float64, regularization=2) [3 x 3, ...]
        └─ GaussNewtonOperator(Linear, 2 points, ...) [3 x 3, float32, cpu]
    """

    _left_behind = ("_factor",)

    def __init__(
        self,
        operator: TensorOperator,
        regularization: float | None = None,
        *,
        warn_on_max_iteration: bool = True,
    ) -> None:
        super().__init__(operator, regularization, warn_on_max_iteration=warn_on_max_iteration)
        # Of a loss that is not convex there is no U.
        self._symmetric = self._positive_semidefinite = True
        base, self._shift = _sampled(operator)
        self._require_positive()
        self._gram = _Gram(base)
        self._factor: tuple[Tensor, float, Tensor] | None = None
        with isolated(self.device):
            self._gram.space()

    def _require_positive(self) -> None:
        if self._total <= 0:
            raise MissingInverseError(
                _without_inverse(
                    self.operator,
                    f"it has one only with a shift λ > 0, which is {self._total:g} here",
                )
            )

    @property
    def _total(self) -> float:
        """λ and the operator's shift."""
        return self._shift + self.regularization

    def _inverse_rows(self, rows: Tensor) -> Tensor:
        """The formula, without refinement."""
        if rows.is_meta:
            return torch.empty_like(rows)
        factor, space = self._factorised(), self._gram.space()
        coefficients = torch.cholesky_solve(space.project(rows).T, factor).T
        return ((rows - space.expand(coefficients)) / self._total).to(rows.dtype)

    def _factorised(self) -> Tensor:
        """The Cholesky factor of λI + UᵀU."""
        gram, shift = self._gram.matrix(), self._total
        if self._factor is None or self._factor[0] is not gram or self._factor[1] != shift:
            shifted = gram.clone()
            shifted.diagonal().add_(shift)
            factor, failures = torch.linalg.cholesky_ex(shifted)
            if bool(failures):
                raise SingularOperatorError(
                    f"{type(self).__name__}: the Gram matrix of the {len(gram)} columns with the "
                    f"shift {shift:g} is not positive definite in float64; use a larger shift"
                )
            self._factor = gram, shift, factor
        return self._factor[2]

    def _solve_rows(
        self, rhs: Tensor, start: Tensor | None = None, *, history: bool = False
    ) -> Solution:
        problem = Problem.scaled(rhs, None, rtol=default_rtol(rhs.dtype))
        outcomes = Outcomes(problem)
        product = self.system._product
        value = self._inverse_rows(problem.rhs)
        # The better of the two, by their true residuals, is the outcome.
        for is_refined in (False, True):
            finite = value.isfinite().all(dim=1)
            value = torch.where(finite.unsqueeze(1), value, 0.0)
            residuals = problem.rhs - product(value)
            norms = residuals.norm(dim=1)
            outcomes.decide(~finite | ~norms.isfinite(), SolveStatus.NON_FINITE)
            outcomes.measured(value, norms, finite & norms.isfinite())
            if not is_refined:
                known = torch.where(norms.isfinite().unsqueeze(1), residuals, 0.0)
                value = value + self._inverse_rows(known)
        outcomes.decide(outcomes.undecided, SolveStatus.STAGNATED)
        return outcomes.solution(2, product, f"By a Gram matrix of {self._gram.size} columns.")

    def with_regularization(self, regularization: float | None) -> SampleSpaceInverse:
        """The same inverse with its own λ replaced; a shift of the operator stays.

        The Gram matrix is shared, and only its factor computed again.

        Raises:
            MissingInverseError: λ and the operator's shift are not positive together.
        """
        changed = super().with_regularization(regularization)
        assert isinstance(changed, SampleSpaceInverse)
        changed._require_positive()
        return changed

    def _move(self, device: torch.device) -> Self:
        moved = super()._move(device)
        # Made again there when it is needed.
        moved._gram, moved._factor = _Gram(_sampled(moved.operator)[0]), None
        return moved

    def _label(self) -> str:
        size = self._gram.size
        columns = "columns not yet counted" if size is None else f"{size} columns"
        return (
            f"{type(self).__name__}({columns}, Gram matrix in float64, "
            f"regularization={self.regularization:g})"
        )


def sample_space_inverse(operator: TensorOperator, shift: float) -> SampleSpaceInverse:
    """(A + shift·I)⁻¹ in sample space, where it is the cheaper way.

    Args:
        operator: A, a Gauss-Newton operator over data.
        shift: λ.

    Raises:
        MissingInverseError: It is not, or cannot be taken; the message says why.
    """
    inverse = SampleSpaceInverse(operator.shift(shift))
    space = inverse._gram.space()
    operations = space.gram_operations + space.size**3 / 6
    product = PRODUCT_GRADIENTS * space.gradient_operations + BATCH_OPERATIONS * space.num_batches
    limit = CG_ITERATIONS * product
    if operations > limit:
        raise MissingInverseError(
            _without_inverse(
                operator,
                f"the Gram matrix of its {space.size} columns takes {operations:.1e} operations, "
                f"more than {CG_ITERATIONS} iterations of conjugate gradients ({limit:.1e}); "
                "SampleSpaceInverse takes it nonetheless",
            )
        )
    return inverse


def _sampled(operator: TensorOperator) -> tuple[SampledOperator, float]:
    """The operator over data, and how it is shifted."""
    base, shift = operator._without_shift()
    operation = getattr(base, "batch_operation", None)
    if not isinstance(operation, GaussNewtonBatchOperation | GeneralizedGaussNewtonBatchOperation):
        raise ArgumentTypeError(
            "operator must be a GaussNewtonOperator or a GeneralizedGaussNewtonOperator, shifted "
            f"or not, got {type(base).__name__}; use CgOperator for others"
        )
    return cast("SampledOperator", base), shift


def _objective(operator: SampledOperator) -> Objective:
    objective = operator.objective
    assert objective is not None
    return objective


def _surveyed(operator: SampledOperator) -> SampleSpace:
    """U of an operator, by a pass over its data."""
    reason = _obstacle(operator)
    if reason is not None:
        raise MissingInverseError(_without_inverse(operator, reason))
    objective = _objective(operator)
    # The Gram matrix, a copy with the shift and the factor, all in float64.
    fitting = int((GRAM_BYTES / 24) ** 0.5)
    try:
        space = SampleSpace(
            objective,
            operator.stream,
            operator.checked_batches(operator.stream),
            operator.averaging.weight,
            _root_of(operator.batch_operation),
            most_columns=min(objective.space.size - 1, fitting),
        )
    except (StructureError, MemoryLimitError) as error:
        raise MissingInverseError(_without_inverse(operator, str(error))) from error
    # Known after the pass: the stream keeps its batches or not.
    if not (operator.stream.is_cached or operator.stream.has_fixed_order):
        reason = (
            "its data are neither kept in memory nor known to come in the same order in every "
            "pass; pass cache=True or a loader that does not shuffle"
        )
        raise MissingInverseError(_without_inverse(operator, reason))
    return space


def _root_of(operation: BatchOperation) -> RootOf:
    """The root of the matrix of a point by its outputs."""
    return gradient_root if isinstance(operation, GaussNewtonBatchOperation) else _convex_root


def _convex_root(objective: Objective, output: object, batch: Batch) -> OutputRoot:
    try:
        return hessian_root(objective, output, batch)
    except StructureError as error:
        raise StructureError(
            "the loss is not convex in the model's output: the Hessian of a point has a negative "
            "eigenvalue, so that the matrix may be indefinite. Use MinresOperator, or CgOperator "
            "with a shift larger than the magnitude of the most negative eigenvalue"
        ) from error
    except MemoryLimitError as error:
        raise MemoryLimitError(
            "the Hessian of the loss by the model's output is neither diagonal nor that of a "
            f"softmax, and too large to decompose for the {batch.size} points of batch "
            f"{batch.position}; use smaller batches"
        ) from error


def _obstacle(operator: SampledOperator) -> str | None:
    """Why there is no U, as far as it is known without a pass over the data."""
    if operator.processes is not ONE_PROCESS:
        return "its data are spread over several processes"
    if _objective(operator).device.type == "meta":
        return "on the meta device there are no values to invert"
    return None


def _without_inverse(operator: object, reason: str) -> str:
    return (
        f"{type(operator).__name__} has no inverse in closed form: {reason}; pass a solver: "
        "A.inverse(partial(CgOperator, rtol=1e-6))"
    )
