"""The log-determinant of any symmetric positive definite operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from hessops.errors import (
    ArgumentError,
    ConvergenceWarning,
    SingularOperatorError,
    StructureError,
)
from hessops.estimators.density import mean_with_error
from hessops.estimators.estimate import Estimate
from hessops.estimators.lanczos import Tridiagonal
from hessops.estimators.products import (
    CountedProducts,
    checked_operator,
    counted_products,
    require_symmetric,
)
from hessops.estimators.spectrum import Probes
from hessops.isolation import isolated
from hessops.operators.base import TensorOperator
from hessops.operators.dense import MatrixOperator
from hessops.operators.determinant import not_positive_definite
from hessops.randomness import resolved_generator
from hessops.validation import checked_count
from hessops.warn import warn

LogdetMethod = Literal["auto", "exact", "slq"]

# Ritz values below this multiple of eps of the largest are rounding.
ROUNDING_FACTOR = 10
# The quadratures are compared with those of this part of their steps. Their error falls at least
# like 1/s, for an eigenvalue density that grows like an inverse root towards zero: then it is three
# times the difference. Where the condition number is finite it falls exponentially in the end, and
# the difference is far above it.
FEWER_STEPS = 0.75
ERROR_PER_DIFFERENCE = 3.0
# Beside the standard error, what quadratures may be off by, relative to the sum of |log θ|.
QUADRATURE_RTOL = 1e-5


def logdet(
    operator: TensorOperator,
    *,
    method: LogdetMethod = "auto",
    num_probes: int = 10,
    num_steps: int = 100,
    max_bytes: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Estimate:
    r"""The log-determinant :math:`\log\det A` of a positive definite operator.

    ``"exact"`` takes a formula where the structure has one: identity, diagonal, explicit matrix (by
    Cholesky), low rank with a shift, Kronecker factors, and what is made of those by multiples,
    shifts, blocks, products and inverses. Elsewhere it decomposes the matrix, by n products.
    ``"slq"`` is stochastic Lanczos quadrature of :math:`\mathrm{tr} \log A` (Ubaru, Chen & Saad
    2017), see `spectral_density`. ``"auto"`` takes the formula where there is one, the matrix where
    n is at most `num_probes` · `num_steps`, and the quadrature elsewhere.

    The standard error is that of the probes. The error of the quadratures comes on top: it makes
    the value too large, as the Gaussian quadrature of the logarithm is an upper bound, and takes
    about :math:`\sqrt\kappa` steps for condition number κ. It is judged by what the last quarter of
    the steps changed; where three times that is above the standard error, a warning says so.

    Args:
        operator: A, any symmetric operator of float32 or float64, ``H.shift(0.1)`` for one. Where
            symmetry is unknown, two products test it.
        method: ``"auto"``, ``"exact"`` or ``"slq"``.
        num_probes: At least 2.
        num_steps: Most steps of Lanczos for each probe.
        max_bytes: Memory of the Krylov bases; ``None`` is 2 GiB.
        generator: Draws the probes; without one, `torch.manual_seed` decides.
        progress: Shows a progress bar that counts products.

    Returns:
        The value, and its standard error, which is 0 for an exact one. Where the quadratures have
        not converged, with a `ConvergenceWarning`.

    Raises:
        ArgumentTypeError, ArgumentError: `operator` is no operator, `method` is unknown, or a
            number does not fit.
        DtypeError: Half precision.
        StructureError: A is not symmetric, or not positive definite; the message names its smallest
            eigenvalue, or the smallest Ritz value.
        SingularOperatorError: An eigenvalue, or Ritz value, is zero to working precision.
        MemoryLimitError: The matrix, or the Krylov basis of one probe, does not fit.
        NonFiniteProductError: A product is NaN or infinite.

    Example:
        >>> import torch
        >>> from hessops import DiagonalOperator, HessianOperator
        >>> from hessops.estimators import logdet
        >>> A = DiagonalOperator(torch.tensor([1.0, 3.0], dtype=torch.float64))
        >>> logdet(A.shift(1.0))
        Estimate(2.07944 ± 0, exact, 0 products)
        >>> model = torch.nn.Linear(2, 1).double()
        >>> data = [(torch.eye(2, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64))]
        >>> H = HessianOperator(model, torch.nn.MSELoss(), data)
        >>> logdet(H.shift(1.0))
        Estimate(2.07944 ± 0, exact, 3 products)
    """
    checked_operator(operator, "logdet")
    if method not in get_args(LogdetMethod):
        raise ArgumentError(f"method must be one of {get_args(LogdetMethod)}, got {method!r}")
    most_products = checked_count(num_probes, "num_probes", minimum=2) * min(
        checked_count(num_steps, "num_steps"), operator.input_size
    )
    source = resolved_generator(generator)
    with isolated(operator.device):
        known = None if method == "slq" else operator._exact_logdet(1.0, 0.0)
        if known is not None:
            return Estimate(known, 0.0, 0, "exact")
        by_matrix = method == "exact" or (method == "auto" and operator.input_size <= most_products)
        probes = None if by_matrix else Probes(operator, num_probes, num_steps, max_bytes)
        total = operator.input_size if by_matrix else most_products
        with counted_products(operator, "logdet", total=total, progress=progress) as product:
            require_symmetric(product, "logdet", source)
            if operator.positive_semidefinite is False:
                raise StructureError(
                    f"{type(operator).__name__} has negative eigenvalues, and no real "
                    "log-determinant; shift it: A.shift(c)"
                )
            if probes is None:
                return _of_matrix(product)
            return _by_quadrature(product, list(probes.tridiagonals(product, source)))


def _of_matrix(product: CountedProducts) -> Estimate:
    matrix = product.operator.to_dense()
    product.work(len(matrix))
    known = MatrixOperator(matrix, symmetric=True, copy=False)._exact_logdet(1.0, 0.0)
    assert known is not None
    return Estimate(known, 0.0, product.count, "exact")


def _by_quadrature(product: CountedProducts, found: Sequence[Tridiagonal]) -> Estimate:
    size = product.operator.input_size
    quadratures = [tridiagonal.quadrature() for tridiagonal in found]
    _require_positive(product.operator, torch.cat([nodes for nodes, _ in quadratures]))
    logarithms = [_mean_logarithm(nodes, weights) for nodes, weights in quadratures]
    value, error = mean_with_error(size * torch.stack(logarithms))
    sizes = [weights @ nodes.log().abs() for nodes, weights in quadratures]
    floor = QUADRATURE_RTOL * size * torch.stack(sizes).mean().item()
    _judge(size * _quadrature_error(found), max(error.item(), floor), found[0].num_steps)
    return Estimate(value.item(), error.item(), product.count, "slq")


def _mean_logarithm(nodes: Tensor, weights: Tensor) -> Tensor:
    return weights @ nodes.log()


def _require_positive(operator: TensorOperator, nodes: Tensor) -> None:
    """Raises where a Ritz value, which lies within the spectrum, is negative or rounding."""
    smallest, largest = nodes.min().item(), nodes.abs().max().item()
    rounding = ROUNDING_FACTOR * torch.finfo(operator.dtype).eps * largest
    name = type(operator).__name__
    if smallest < -rounding:
        raise not_positive_definite(name, smallest)
    if smallest <= rounding:
        raise SingularOperatorError(
            f"{name}: the Ritz value {smallest:.3e} is zero to {operator.dtype} precision (the "
            f"largest is {largest:.3e}), and the determinant may be too; shift the operator: "
            "A.shift(c), c > 0"
        )


def _quadrature_error(found: Sequence[Tridiagonal]) -> float:
    """About how much too large the mean of log θ is, by quadratures of fewer steps."""
    errors = [
        0.0 if tridiagonal.is_exhausted else _last_change(tridiagonal) for tridiagonal in found
    ]
    return ERROR_PER_DIFFERENCE * sum(errors) / len(errors)


def _last_change(tridiagonal: Tridiagonal) -> float:
    fewer = max(1, int(FEWER_STEPS * tridiagonal.num_steps))
    if fewer == tridiagonal.num_steps:
        # One step says nothing of the others; its own value is all that there is.
        return float("inf")
    first, last = tridiagonal.quadrature(fewer), tridiagonal.quadrature()
    return (_mean_logarithm(*first) - _mean_logarithm(*last)).abs().item()


def _judge(quadrature_error: float, allowed: float, num_steps: int) -> None:
    if quadrature_error > allowed:
        warn(
            f"logdet: the quadratures have not converged in {num_steps} steps of Lanczos: the "
            f"value may be too large by about {quadrature_error:.2g}, which is above the standard "
            f"error {allowed:.2g} of the probes; raise num_steps, or shift the operator",
            ConvergenceWarning,
        )
