"""The conformance kit: what every operator promises, as checks that subclass authors can run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from hessops.errors import (
    ArgumentError,
    ConformanceError,
    DeviceError,
    DtypeError,
    HessopsError,
    NonFiniteError,
    ShapeError,
    StructureError,
)
from hessops.operators.base import TensorOperator
from hessops.operators.inverse import InverseOperator
from hessops.operators.solution import SolveStatus
from hessops.printed import Node, Printed, counted

__all__ = ["ConformanceReport", "check_operator"]

_T = TypeVar("_T")

# Rows of a matrix up to which closed forms are held against it.
MOST_ROWS = 512
DEFAULT_ACCURACY = {torch.float64: 1e-10, torch.float32: 1e-4}


@dataclass(frozen=True, repr=False)
class ConformanceReport(Printed):
    """What was checked.

    Attributes:
        passed: Names of the checks that passed.
        skipped: Name -> reason of the checks that do not apply to the operator.
    """

    passed: tuple[str, ...]
    skipped: dict[str, str] = field(default_factory=dict)

    def _node(self) -> Node:
        passed = Node(f"passed: {', '.join(self.passed) or 'none'}")
        skipped = [Node(f"skipped {name}: {reason}") for name, reason in self.skipped.items()]
        label = f"ConformanceReport({counted(len(self.passed), 'check')} passed)"
        return Node(label, parts=[passed, *skipped])


def check_operator(
    operator: TensorOperator,
    dense: Tensor | None = None,
    *,
    accuracy: float | None = None,
    generator: torch.Generator | None = None,
) -> ConformanceReport:
    """Checks that an operator keeps the contract of `TensorOperator`.

    Shapes and their refusals, linearity, adjointness, definiteness, single rows against stacks,
    flat vectors against dictionaries, repeatability, the algebra, products against a dense
    reference, closed forms (inverse, trace, eigenvalues, ...) against products, moves between
    devices, and that neither arguments nor the random state are touched.
    Of an `InverseOperator`, that the residuals it reports are true.

    Args:
        operator: The operator to check; it is applied some forty times.
        dense: Its matrix ``(n, n)``, computed by other means; ``None`` checks without.
        accuracy: Relative accuracy of a product. ``None`` is 1e-10 in float64, 1e-4 in float32 and
            5e-2 below. An iterative inverse is linear only up to its tolerance times the condition
            number of the operator; declare that.
        generator: Where the random vectors come from; ``None`` is seeded with
            `torch.initial_seed`.

    Returns:
        The names of the checks that passed and why others were skipped.

    Raises:
        ConformanceError: A promise is broken; the message names the check and what was measured.
        ArgumentError: `accuracy` is not positive.

    Example:
        >>> import torch
        >>> from hessops import DiagonalOperator
        >>> from hessops.testing import check_operator
        >>> diagonal = torch.tensor([1.0, 2.0, 3.0])
        >>> report = check_operator(DiagonalOperator(diagonal), torch.diag(diagonal))
        >>> "linearity" in report.passed
        True
    """
    if accuracy is None:
        accuracy = DEFAULT_ACCURACY.get(operator.dtype, 5e-2)
    if not accuracy > 0:
        raise ArgumentError(f"accuracy must be positive, got {accuracy}")
    if generator is None:
        generator = torch.Generator().manual_seed(torch.initial_seed())
    subject = _Subject(operator, dense, accuracy, generator)
    passed, skipped = [], {}
    for name, check in _CHECKS.items():
        try:
            check(subject)
        except _DoesNotApply as reason:
            skipped[name] = str(reason)
        except ConformanceError as error:
            raise ConformanceError(f"{type(operator).__name__}, {name}: {error}") from error
        else:
            passed.append(name)
    return ConformanceReport(tuple(passed), skipped)


class _DoesNotApply(Exception):  # an outcome, not an error
    """The operator does not claim what the check is about."""


@dataclass
class _Subject:
    operator: TensorOperator
    dense: Tensor | None
    accuracy: float
    generator: torch.Generator

    def random(self, *lead: int) -> Tensor:
        size = (*lead, self.operator.input_size)
        values = torch.randn(size, generator=self.generator, dtype=torch.float64, device="cpu")
        return values.to(self.operator.device, self.operator.dtype)

    def require_close(
        self, result: Tensor, expected: Tensor, what: str, scale: Tensor | None = None
    ) -> None:
        if result.shape != expected.shape:
            raise ConformanceError(
                f"{what}: shape {tuple(result.shape)}, expected {tuple(expected.shape)}"
            )
        difference = (result.double() - expected.double()).norm()
        reference = expected.double().norm() if scale is None else scale.double()
        if not difference <= self.accuracy * reference:
            raise ConformanceError(
                f"{what}: differs by {difference:.2e} of {reference:.2e}, accuracy "
                f"{self.accuracy:.0e}"
            )

    def require_refused(self, tensor: Tensor, error: type[HessopsError], what: str) -> None:
        try:
            self.operator.apply(tensor)
        except error:
            return
        except Exception as other:
            raise ConformanceError(
                f"{what} raised {type(other).__name__} instead of {error.__name__}"
            ) from other
        raise ConformanceError(f"{what} was accepted, expected {error.__name__}")


def _check_shapes(subject: _Subject) -> None:
    operator, n = subject.operator, subject.operator.input_size
    for lead in ((), (0,), (1,), (3,), (min(n, 64) + 1,)):
        vectors = subject.random(*lead)
        result = operator.apply(vectors)
        if result.shape != vectors.shape:
            raise ConformanceError(
                f"a tensor {tuple(vectors.shape)} was mapped to {tuple(result.shape)}"
            )
        if result.dtype != operator.dtype or result.device != operator.device:
            raise ConformanceError(f"the result is {result.dtype} on {result.device}")
    if operator.shape != (n, n):
        raise ConformanceError(f"shape is {operator.shape}, input_size {n}")


def _check_shape_refusals(subject: _Subject) -> None:
    vector = subject.random()
    subject.require_refused(torch.cat([vector, vector[:1]]), ShapeError, "a longer vector")
    subject.require_refused(vector.reshape(1, 1, -1), ShapeError, "a tensor of three dimensions")
    subject.require_refused(vector[0], ShapeError, "a number")


def _check_dtype_refusals(subject: _Subject) -> None:
    vector = subject.random()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.complex64):
        if dtype != subject.operator.dtype:
            subject.require_refused(vector.to(dtype), DtypeError, f"a {dtype} vector")


def _check_non_finite_refusals(subject: _Subject) -> None:
    for value in (float("nan"), float("inf")):
        vectors = subject.random(2)
        vectors[1, -1] = value
        subject.require_refused(vectors, NonFiniteError, f"a stack with one {value}")


def _check_linearity(subject: _Subject) -> None:
    apply = subject.operator.apply
    u, v = subject.random(2)
    au, av = apply(u), apply(v)
    scale = 2.5 * au.norm() + 0.5 * av.norm()
    subject.require_close(apply(2.5 * u - 0.5 * v), 2.5 * au - 0.5 * av, "A(2.5u - 0.5v)", scale)
    zero = apply(torch.zeros_like(u))
    if zero.count_nonzero():
        raise ConformanceError(f"A·0 has norm {zero.norm():.2e}")


def _check_rows_against_stacks(subject: _Subject) -> None:
    vectors = subject.random(4)
    alone = torch.stack([subject.operator.apply(v) for v in vectors])
    subject.require_close(subject.operator.apply(vectors), alone, "a stack against its rows")
    swapped = subject.operator.apply(vectors.flip(0)).flip(0)
    subject.require_close(swapped, alone, "a stack in another order")


def _check_repeatability(subject: _Subject) -> None:
    vectors = subject.random(2)
    first, second = subject.operator.apply(vectors), subject.operator.apply(vectors)
    subject.require_close(second, first, "a second call")


def _check_adjointness(subject: _Subject) -> None:
    operator = subject.operator
    try:
        transposed = operator.T
    except StructureError as error:
        raise _DoesNotApply("not known to be symmetric, and without an adjoint") from error
    u, v = subject.random(2)
    left, right = operator.apply(v), transposed.apply(u)
    scale = u.norm() * left.norm() + v.norm() * right.norm()
    subject.require_close(right.dot(v), u.dot(left), "<Aᵀu, v> against <u, Av>", scale)


def _check_definiteness(subject: _Subject) -> None:
    if not subject.operator.positive_semidefinite:
        raise _DoesNotApply("not claimed to be positive semi-definite")
    if subject.dense is not None:
        smallest = torch.linalg.eigvalsh(subject.dense.double()).min().item()
        if smallest < -subject.accuracy * subject.dense.double().norm().item():
            raise ConformanceError(f"the dense reference has the eigenvalue {smallest:.2e}")
    vectors = subject.random(3)
    products = subject.operator.apply(vectors)
    forms = (vectors * products).sum(dim=1)
    bound = -subject.accuracy * vectors.norm(dim=1) * products.norm(dim=1)
    if not bool((forms >= bound).all()):
        raise ConformanceError(f"vᵀAv is {forms.min():.2e} for a random v")


def _check_dense_reference(subject: _Subject) -> None:
    if subject.dense is None:
        raise _DoesNotApply("no dense reference was given")
    operator = subject.operator
    dense = subject.dense.to(operator.device, torch.float64)
    vectors = subject.random(3)
    exact = vectors.double()
    subject.require_close(operator.apply(vectors), exact @ dense.T, "products with rows")
    columns = operator @ vectors.T
    subject.require_close(columns, dense @ exact.T, "A @ X with columns")
    subject.require_close(operator.to_dense(), dense, "to_dense()")
    asymmetry = (dense - dense.T).norm()
    if operator.symmetric and asymmetry > subject.accuracy * dense.norm():
        raise ConformanceError("claims symmetry, but the dense reference is not symmetric")


def _check_dictionaries(subject: _Subject) -> None:
    operator, space = subject.operator, subject.operator.space
    if space is None:
        raise _DoesNotApply("acts on flat vectors only")
    for lead in ((), (1,), (3,)):
        vectors = subject.random(*lead)
        tensors = space.unflatten(vectors)
        expected = operator.apply(vectors)
        results = operator.apply_to_dict(tensors)
        for name, shape in operator.input_dict_structure.items():
            if results[name].shape != (*lead, *shape):
                raise ConformanceError(f"entry {name!r} has shape {tuple(results[name].shape)}")
        subject.require_close(space.flatten(results), expected, "dictionary against flat")
        reordered = operator.apply_to_dict(dict(reversed(tensors.items())))
        subject.require_close(space.flatten(reordered), expected, "reordered keys")


def _check_side_effects(subject: _Subject) -> None:
    vectors = subject.random(2).requires_grad_()
    before = vectors.detach().clone()
    random_state = torch.get_rng_state()
    result = subject.operator.apply(vectors)
    if not torch.equal(vectors.detach(), before):
        raise ConformanceError("the argument was written to")
    if result.requires_grad:
        raise ConformanceError("the result carries a graph")
    if result.data_ptr() == vectors.data_ptr():
        raise ConformanceError("the result shares the memory of the argument")
    kept = result.clone()
    result.zero_()
    subject.require_close(
        subject.operator.apply(before), kept, "a product after an earlier result was written to"
    )
    if not torch.equal(torch.get_rng_state(), random_state):
        raise ConformanceError("the global random state was advanced")


def _check_algebra(subject: _Subject) -> None:
    operator = subject.operator
    vectors = subject.random(2)
    product = operator.apply(vectors)
    combined = (2 * operator - operator / 2).shift(0.5).apply(vectors)
    subject.require_close(combined, 1.5 * product + 0.5 * vectors, "(2A - A/2).shift(0.5)")
    squared = (operator @ operator).apply(vectors)
    subject.require_close(squared, operator.apply(product), "A @ A")


def _check_devices(subject: _Subject) -> None:
    operator = subject.operator
    if operator.to(operator.device) is not operator:
        raise ConformanceError("a move to its own device does not return the operator itself")
    try:
        moved = operator.to("meta")
    except (DeviceError, NotImplementedError) as error:
        raise _DoesNotApply(f"cannot be moved to the meta device: {error}") from error
    except RuntimeError as error:
        raise ConformanceError(
            f"to('meta') raised {type(error).__name__}: {error}; a move copies tensors, and must "
            "not look at their values"
        ) from error
    if moved.device.type != "meta" or operator.device.type == "meta":
        raise ConformanceError(f"after to('meta'): {moved.device}, the original {operator.device}")
    if isinstance(operator, InverseOperator):
        return  # solving needs values
    result = moved.apply(subject.random(2))
    if result.shape != (2, operator.input_size) or result.device.type != "meta":
        raise ConformanceError(f"on meta the result is {tuple(result.shape)} on {result.device}")


@dataclass(frozen=True)
class _Claim:
    """What a hook says, and what products say of it."""

    hook: str
    value: Tensor
    expected: Tensor
    scale: Tensor


def _check_closed_forms(subject: _Subject) -> None:
    operator = subject.operator
    if isinstance(operator, InverseOperator):
        raise _DoesNotApply("an inverse, whose residuals are checked")
    if operator.input_size > MOST_ROWS:
        raise _DoesNotApply(f"more than {MOST_ROWS} rows to compare with")
    matrix = operator.to_dense().double()
    claims = [*_claims_of_values(operator, matrix)]
    for shift in (0.0, matrix.norm().item() or 1.0):
        claims += _claims_of_inverse(subject, matrix, shift)
        claims += _claims_of_determinant(operator, matrix, 0.5, shift)
    if not claims:
        raise _DoesNotApply("nothing is known without products")
    for claim in claims:
        subject.require_close(claim.value, claim.expected, claim.hook, claim.scale)


def _claims_of_values(operator: TensorOperator, matrix: Tensor) -> Iterator[_Claim]:
    norm = matrix.norm()
    # The trace adds up the rounding of n entries of the diagonal.
    scale = norm * len(matrix) ** 0.5
    # The eigenvalues first: trace and norm follow from them, unless said otherwise.
    eigenvalues = operator._exact_eigenvalues()
    if eigenvalues is not None:
        expected = torch.linalg.eigvalsh(matrix)
        yield _Claim("_exact_eigenvalues()", eigenvalues.sort().values, expected, scale)
    for hook, expected, allowed in (
        ("_exact_diagonal", matrix.diagonal(), scale),
        ("_exact_trace", matrix.trace(), scale),
        ("_exact_squared_norm", matrix.square().sum(), norm**2),
    ):
        value = getattr(operator, hook)()
        if value is not None:
            yield _Claim(
                f"{hook}()",
                torch.as_tensor(value, dtype=torch.float64).to(matrix),
                expected,
                allowed,
            )


def _claims_of_inverse(subject: _Subject, matrix: Tensor, shift: float) -> Iterator[_Claim]:
    inverse = _formula(subject.operator._closed_form_inverse, shift)
    if inverse is not None:
        rhs = subject.random(2)
        value = inverse.apply(rhs).double()
        image = value @ matrix.T + shift * value
        # What rounding of the value makes of the residual.
        scale = rhs.double().norm() + (matrix.norm() + shift) * value.norm()
        yield _Claim(f"A times _closed_form_inverse({shift:.3g})", image, rhs.double(), scale)


def _claims_of_determinant(
    operator: TensorOperator, matrix: Tensor, scale: float, shift: float
) -> Iterator[_Claim]:
    found = _formula(operator._exact_logdet, scale, shift)
    if found is not None:
        system = scale * matrix + shift * torch.eye(len(matrix)).to(matrix)
        expected = torch.linalg.slogdet(system).logabsdet
        # A relative error of the matrix is one of the determinant, times the condition number.
        slack = len(matrix) * torch.linalg.cond(system) + expected.abs()
        value = torch.tensor(found, dtype=torch.float64).to(matrix)
        yield _Claim(f"_exact_logdet({scale}, {shift:.3g})", value, expected, slack)


def _formula(hook: Callable[..., _T | None], *arguments: float) -> _T | None:
    """What a hook says, or ``None`` where it has no formula for these arguments."""
    try:
        return hook(*arguments)
    except HessopsError:
        return None


def _check_true_residuals(subject: _Subject) -> None:
    operator = subject.operator
    if not isinstance(operator, InverseOperator):
        raise _DoesNotApply("not an inverse")
    rhs = torch.cat([subject.random(3), torch.zeros_like(subject.random(1))])
    solution = operator.solve(rhs)
    if len(solution.status) != len(rhs) or solution.value.shape != rhs.shape:
        raise ConformanceError(f"4 right-hand sides, {len(solution.status)} outcomes")
    if not solution.value.isfinite().all():
        raise ConformanceError("the solution is not finite")
    if solution.value[3].count_nonzero():
        raise ConformanceError("the solution for a zero right-hand side is not zero")
    consistent = solution.residual_norms <= solution.tolerances
    for row, status in enumerate(solution.status):
        if (status is SolveStatus.CONVERGED) != bool(consistent[row]):
            raise ConformanceError(
                f"status {status.value!r} with residual {solution.residual_norms[row]:.2e} and "
                f"tolerance {solution.tolerances[row]:.2e}"
            )
    if getattr(operator, "exact", True):
        residual = (rhs - operator.system.apply(solution.value)).norm(dim=1)
        slack = 100 * torch.finfo(operator.dtype).eps * rhs.norm(dim=1)
        reported = solution.residual_norms
        if bool(((residual - reported).abs() > slack + 1e-3 * residual).any()):
            raise ConformanceError(f"reported residuals {reported}, true ones {residual}")


_CHECKS: dict[str, Callable[[_Subject], None]] = {
    "shapes": _check_shapes,
    "shape refusals": _check_shape_refusals,
    "dtype refusals": _check_dtype_refusals,
    "non-finite refusals": _check_non_finite_refusals,
    "linearity": _check_linearity,
    "rows against stacks": _check_rows_against_stacks,
    "repeatability": _check_repeatability,
    "adjointness": _check_adjointness,
    "definiteness": _check_definiteness,
    "dense reference": _check_dense_reference,
    "dictionaries": _check_dictionaries,
    "side effects": _check_side_effects,
    "algebra": _check_algebra,
    "devices": _check_devices,
    "closed forms": _check_closed_forms,
    "true residuals": _check_true_residuals,
}
