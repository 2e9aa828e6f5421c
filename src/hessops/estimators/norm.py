"""Estimates of norms."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hessops.estimators.arguments import (
    DEFAULT_PRODUCTS,
    Work,
    estimate_of,
    require_choice,
    require_memory,
    require_operator,
    require_products,
    shown,
    transpose_of,
)
from hessops.estimators.estimate import Estimate
from hessops.functional.krylov import ritz_pairs
from hessops.isolation import isolated
from hessops.operators.base import TensorOperator
from hessops.operators.probing import rademacher_products, unit_products
from hessops.randomness import resolved_generator
from hessops.validation import checked_count

NormOrder = Literal["fro", 2]

# The basis, its Ritz vectors, and what a product takes.
HELD_VECTORS = 3


def norm(
    operator: TensorOperator,
    ord: NormOrder = "fro",  # as in numpy and torch
    *,
    num_products: int = DEFAULT_PRODUCTS,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Estimate:
    r"""The Frobenius or the spectral norm of an operator, from products with random vectors.

    - ``"fro"``: the root of the mean of :math:`\lVert Az\rVert^2` over vectors z of random signs,
      whose expectation is :math:`\lVert A\rVert_F^2` (Hutchinson 1990, of :math:`A^\top A`), one
      product for each. The square is unbiased; its root v is too small by :math:`e^2 / (2v)` on
      average, with e the standard error. With as many products as rows, or more, it is computed
      exactly by n products with unit vectors.
    - ``2``: the largest singular value, by the method of Lanczos (1950) with full
      reorthogonalisation in float64, from a random vector: on A where that is symmetric, and on
      :math:`A^\top A` otherwise, with two products for a step. It stops early where the residual
      is rounding.

    Operators that know it (diagonal matrices, Kronecker factors, low rank, shifts and multiples of
    such ones; for ``"fro"`` explicit matrices as well) take no product.

    Args:
        operator: A.
        ord: ``"fro"`` or ``2``.
        num_products: Most products with A and its transpose, at least 2.
        generator: Draws the vectors; without one, `torch.manual_seed` decides.
        progress: Shows a progress bar that counts products.

    Returns:
        The norm. For ``"fro"`` the standard error is the standard deviation of the estimate, to
        first order. For ``2`` it is no sampling error but a bound: A has a singular value that
        close to the estimate, by the norm of the residual and the precision of A's dtype. The
        estimate is never above the norm, rounding apart; where the bound is not small beside it,
        there may be larger singular values that the iteration has not found yet.

    Raises:
        ArgumentTypeError, ArgumentError: An argument is something else.
        StructureError: ``2`` of an operator that is not known to be symmetric and has no adjoint.
        NonFiniteProductError: A product is NaN or infinite.
        MemoryLimitError: The basis for ``2`` would not fit.

    Example:
        >>> import torch
        >>> from hessops import HessianOperator
        >>> from hessops.estimators import norm
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(300, 1, bias=False)
        >>> x = torch.randn(20, 300)  # the Hessian is XᵀX / 10, of rank 20
        >>> H = HessianOperator(model, torch.nn.MSELoss(), [(x, torch.zeros(20, 1))])
        >>> exact = torch.linalg.svdvals(x) ** 2 / 10
        >>> found = norm(H)
        >>> abs(found.value - exact.norm().item()) < 3 * found.standard_error
        True
        >>> found = norm(H, 2)
        >>> abs(found.value - exact[0].item()) < 1e-4, found.num_products <= 21
        (True, True)
    """
    require_operator(operator)
    require_choice(ord, ("fro", 2), "ord")
    budget, source = checked_count(num_products, "num_products"), resolved_generator(generator)
    estimate = _frobenius if ord == "fro" else _spectral
    if budget < operator.input_size:
        require_products(budget, 2, f"ord={ord!r}")
    with isolated(operator.device), shown(operator, budget, "norm", progress) as work:
        return estimate(operator, budget, source, work)


def _frobenius(
    operator: TensorOperator, count: int, source: torch.Generator, work: Work
) -> Estimate:
    exact = operator._exact_squared_norm()
    if exact is not None:
        value = torch.tensor(exact, dtype=torch.float64).sqrt()
        return estimate_of(value, torch.zeros_like(value), 0, "exact")
    size = operator.input_size
    if count >= size:
        work.expect(size)
        squares = [products.square().sum() for _, products in unit_products(operator, work)]
        value = torch.stack(squares).sum().sqrt()
        return estimate_of(value, torch.zeros_like(value), work.num_products, "exact")
    pairs = rademacher_products(operator, count, source, work)
    samples = torch.cat([products.square().sum(dim=1) for _, products in pairs])
    value, error = samples.mean().sqrt(), samples.std() / count**0.5
    # The derivative of the root; zero products have no error.
    error = torch.where(value > 0, error / (2 * value), 0.0)
    return estimate_of(value, error, work.num_products, "hutchinson")


def _spectral(
    operator: TensorOperator, count: int, source: torch.Generator, work: Work
) -> Estimate:
    exact = operator._exact_eigenvalues()
    if exact is not None:
        value = exact.abs().max()
        return estimate_of(value, torch.zeros_like(value), 0, "exact")
    linear = operator.linearize()
    factors = [linear]
    if not linear.symmetric:
        advice = "pass symmetric=True to an operator that is, or use ord='fro'"
        factors.append(transpose_of(linear, "ord=2", advice))
    steps = min(max(count // len(factors), 1), operator.input_size)
    require_memory(operator, HELD_VECTORS * steps, "use fewer num_products")
    precision = torch.finfo(operator.dtype).eps

    def product(vector: Tensor) -> Tensor:
        for factor in factors:
            vector = factor.apply(vector.to(operator.dtype))
            work(1)
        return vector.double()

    def is_enough(values: Tensor, residuals: Tensor) -> bool:
        value, residual = _largest(values, residuals)
        return bool(residual <= precision * value)

    pairs = ritz_pairs(
        product,
        operator.input_size,
        max_iter=steps,
        tol=0.0,
        generator=source,
        device=operator.device,
        is_enough=is_enough,
        with_vectors=False,
    )
    value, bound = _largest(pairs.values, pairs.residual_norms)
    if len(factors) == 2:
        # |σ² - θ| <= r means |σ - √θ| <= r / (σ + √θ).
        value, residual = value.sqrt(), bound
        bound = torch.where(value > 0, residual / value, residual.sqrt())
    return estimate_of(value, bound + precision * value, work.num_products, "lanczos")


def _largest(values: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
    """The largest Ritz value in size, and its residual norm."""
    position = values.abs().argmax()
    return values[position].abs(), residuals[position]
