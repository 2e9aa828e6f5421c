"""Inverse-Hessian-vector products of plain functions, no model needed.

Import the module, ``from hessops import ihvp``: its `hvp` has another signature than
`hessops.hvp`. In all functions `func` returns a single element; the result has the shape of ``v``,
which is ``(p,)`` or a batch of rows ``(k, p)`` with p the number of entries of the arguments that
are differentiated (flattened, and concatenated for a tuple of `argnums`). The others may be
anything that `func` takes, integer tensors included. `regularization` adds λv to every product.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp

from hessops.errors import ArgumentError, ArgumentTypeError, ConvergenceWarning, IHVPUsageError
from hessops.functional.checks import require_forward_agreement, require_symmetry
from hessops.functional.hvp import (
    explaining_forward_mode,
    product_state,
    pull_rows,
    single_element,
)
from hessops.functional.krylov import ritz_pairs
from hessops.functional.low_rank import LowRankProductRepresentation
from hessops.functional.products import LinearFunction
from hessops.isolation import is_transformed, isolated
from hessops.operators.base import TensorOperator
from hessops.operators.dense import DirectSolveOperator
from hessops.operators.inverse import default_rtol
from hessops.operators.low_rank import LowRankOperator
from hessops.operators.solution import SolveStatus
from hessops.randomness import resolved_generator
from hessops.solvers.conjugate_gradient import CgOperator
from hessops.solvers.lissa import lissa_recursion
from hessops.space import ParameterSpace
from hessops.validation import checked_count, checked_number
from hessops.warn import warn

__all__ = [
    "IHVPUsageError",
    "hvp",
    "hvp_at_x",
    "ihvp_arnoldi",
    "ihvp_at_x_arnoldi",
    "ihvp_at_x_cg",
    "ihvp_at_x_explicit",
    "ihvp_at_x_lissa",
    "ihvp_cg",
    "ihvp_explicit",
    "ihvp_lissa",
]

logger = logging.getLogger(__name__)

Mode = Literal["rev-rev", "rev-fwd"]
Argnums = int | tuple[int, ...]
Function = Callable[..., Tensor]
Arguments = tuple[Any, ...]
InDims = Sequence[int | None] | None
MODES = ("rev-rev", "rev-fwd")


# --- products ----------------------------------------------------------------------------


def hvp(
    func: Function, argnums: Argnums = 0, mode: Mode = "rev-rev", regularization: float = 0.0
) -> Callable[[Arguments, Tensor], Tensor]:
    r"""The function ``(x, v)`` ↦ :math:`(\nabla^2 f(x) + \lambda I) v`.

    Works under `torch.func.vmap` over x.

    Args:
        func: From tensors to a tensor with a single element.
        argnums: Which arguments to differentiate by; negative ones count from the end.
        mode: ``"rev-rev"``, or ``"rev-fwd"`` for forward over reverse mode, whose first product is
            compared with reverse mode, because torch gets some forward derivatives wrong.
        regularization: λ.

    Returns:
        A function of the tuple x of `func`'s arguments and of v.

    Raises:
        IHVPUsageError: Here for an unknown `mode`, a malformed `argnums` or `regularization`; from
            the returned function for `argnums` out of range and an x or v that does not fit.
        ForwardModeError: From the returned function, where forward mode is wrong.

    Example:
        >>> import torch
        >>> from hessops import ihvp
        >>> product = ihvp.hvp(lambda x, y: (x**3 * y).sum(), argnums=0)
        >>> product((torch.tensor([1.0, 2.0]), torch.ones(2)), torch.ones(2))
        tensor([ 6., 12.])
    """
    settings = _Settings.checked(func, argnums, mode, regularization)
    unverified = [settings]

    def product(x: Arguments, v: Tensor) -> Tensor:
        target = _Target.at(settings, x)
        rows = target.rows(v)
        verify = bool(unverified) and not target.is_transformed(v)
        result = target.products(rows, verify=verify)
        if verify:
            unverified.clear()
        return result.reshape(v.shape)

    return product


def hvp_at_x(
    func: Function,
    x: Arguments,
    argnums: Argnums = 0,
    mode: Mode = "rev-rev",
    regularization: float = 0.0,
) -> Callable[[Tensor], Tensor]:
    r"""The function v ↦ :math:`(\nabla^2 f(x) + \lambda I) v` at one x.

    What depends on x alone, the gradient and its graph, is computed once.

    Args:
        func: As of `hvp`, like the other arguments.
        x: The tuple of `func`'s arguments.
        argnums: Which arguments to differentiate by.
        mode: ``"rev-rev"`` or ``"rev-fwd"``.
        regularization: λ.

    Returns:
        A function of v.

    Raises:
        IHVPUsageError: Here for everything but a v that does not fit.
        ForwardModeError: Where forward mode is wrong.

    Example:
        >>> import torch
        >>> from hessops import ihvp
        >>> product = ihvp.hvp_at_x(lambda x: (x**3).sum(), (torch.tensor([1.0, 2.0]),))
        >>> product(torch.eye(2))
        tensor([[ 6.,  0.],
                [ 0., 12.]])
    """
    target = _Target.at(_Settings.checked(func, argnums, mode, regularization), x)
    multiply = target.linearized(verify=not target.is_transformed())

    def product(v: Tensor) -> Tensor:
        return multiply(target.rows(v)).reshape(v.shape)

    return product


# --- explicit ----------------------------------------------------------------------------


def ihvp_explicit(
    func: Function, argnums: Argnums = 0, regularization: float = 0.0
) -> Callable[[Arguments, Tensor], Tensor]:
    r"""The function ``(x, v)`` ↦ :math:`(\nabla^2 f(x) + \lambda I)^{-1} v` by a dense solve.

    Args:
        func: From tensors to a tensor with a single element.
        argnums: Which arguments to differentiate by.
        regularization: λ.

    Returns:
        A function of the tuple x of `func`'s arguments and of v ``(p,)`` or ``(k, p)``, p the
        number of entries that are differentiated; the result has the shape and dtype of v and no
        graph.

    Raises:
        IHVPUsageError: As of `hvp`.
        SingularOperatorError: From the returned function: the matrix is singular.

    Example:
        >>> import torch
        >>> from hessops import ihvp
        >>> solve = ihvp.ihvp_explicit(lambda x: (x**3).sum())
        >>> solve((torch.tensor([1.0, 2.0]),), torch.tensor([6.0, 6.0]))
        tensor([1.0000, 0.5000])
    """
    settings = _Settings.checked(func, argnums, "rev-rev", regularization)
    return lambda x, v: _explicit_at(settings, x)(v)


def ihvp_at_x_explicit(
    func: Function, *x: Any, argnums: Argnums = 0, regularization: float = 0.0
) -> Callable[[Tensor], Tensor]:
    """As `ihvp_explicit` at one x; the matrix is factorised once.

    Args:
        func: From tensors to a tensor with a single element.
        *x: Its arguments.
        argnums: Which arguments to differentiate by.
        regularization: λ.

    Returns:
        A function of v ``(p,)`` or ``(k, p)``, p the number of entries that are differentiated; the
        result has the shape and dtype of v and no graph.

    Raises:
        IHVPUsageError: As of `hvp_at_x`.
        SingularOperatorError: The matrix is singular.

    Example:
        >>> import torch
        >>> from hessops import ihvp
        >>> solve = ihvp.ihvp_at_x_explicit(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]))
        >>> solve(torch.tensor([6.0, 6.0]))
        tensor([1.0000, 0.5000])
    """
    return _explicit_at(_Settings.checked(func, argnums, "rev-rev", regularization), x)


def _explicit_at(settings: _Settings, x: Arguments) -> Callable[[Tensor], Tensor]:
    target = _Target.at(settings, x)
    matrix = _Hessian(target).to_dense()
    inverse = DirectSolveOperator((matrix + matrix.T) / 2)
    return partial(_solved_by, target, inverse)


# --- conjugate gradients -----------------------------------------------------------------


def ihvp_cg(
    func: Function,
    argnums: Argnums = 0,
    max_iter: int = 10,
    tol: float = 1e-7,
    mode: Mode = "rev-rev",
    regularization: float = 0.0,
) -> Callable[[Arguments, Tensor], Tensor]:
    r"""The function ``(x, v)`` ↦ :math:`(\nabla^2 f(x) + \lambda I)^{-1} v` by conjugate gradients.

    `hessops.CgOperator` with ``rtol=0`` and ``atol=tol``. When `max_iter` steps are used up the
    iterate is returned as it is, that is what a truncated solve is for, and the residual is logged
    at DEBUG.

    Args:
        func: From tensors to a tensor with a single element, with a positive definite Hessian.
        argnums: Which arguments to differentiate by.
        max_iter: Most steps.
        tol: Stops where the norm of the true residual is at most this.
        mode: ``"rev-rev"`` or ``"rev-fwd"``, see `hvp`.
        regularization: λ.

    Returns:
        A function of the tuple x of `func`'s arguments and of v ``(p,)`` or ``(k, p)``, p the
        number of entries that are differentiated; the result has the shape and dtype of v and no
        graph.

    Raises:
        IHVPUsageError: As of `hvp`, and for `max_iter` below 1 or a negative `tol`.
        IndefiniteOperatorError: From the returned function: negative curvature was met.
        SolverBreakdownError: From the returned function: the Hessian is singular.

    Example:
        >>> import torch
        >>> from hessops import ihvp
        >>> solve = ihvp.ihvp_cg(lambda x: (x**3).sum(), max_iter=2)
        >>> solve((torch.tensor([1.0, 2.0]),), torch.tensor([6.0, 6.0])).round(decimals=4)
        tensor([1.0000, 0.5000])
    """
    settings = _Settings.checked(func, argnums, mode, regularization)
    _check_iterations(max_iter, tol)
    return lambda x, v: _cg_at(settings, x, max_iter, tol)(v)


def ihvp_at_x_cg(
    func: Function,
    *x: Any,
    argnums: Argnums = 0,
    max_iter: int = 10,
    tol: float = 1e-7,
    mode: Mode = "rev-rev",
    regularization: float = 0.0,
) -> Callable[[Tensor], Tensor]:
    """As `ihvp_cg` at one x; the gradient and its graph are computed once.

    Args:
        func: From tensors to a tensor with a single element, with a positive definite Hessian.
        *x: Its arguments.
        argnums: Which arguments to differentiate by.
        max_iter: Most steps.
        tol: Stops where the norm of the true residual is at most this.
        mode: ``"rev-rev"`` or ``"rev-fwd"``, see `hvp`.
        regularization: λ.

    Returns:
        A function of v ``(p,)`` or ``(k, p)``, p the number of entries that are differentiated; the
        result has the shape and dtype of v and no graph.

    Raises:
        HessopsError: As of `ihvp_cg`; usage errors but those of v are raised here.

    Example:
        >>> import torch
        >>> from hessops import ihvp
        >>> solve = ihvp.ihvp_at_x_cg(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]))
        >>> solve(torch.tensor([6.0, 6.0])).round(decimals=4)
        tensor([1.0000, 0.5000])
    """
    _check_iterations(max_iter, tol)
    return _cg_at(_Settings.checked(func, argnums, mode, regularization), x, max_iter, tol)


def _cg_at(
    settings: _Settings, x: Arguments, max_iter: int, tol: float
) -> Callable[[Tensor], Tensor]:
    target = _Target.at(settings, x)
    inverse = CgOperator(
        _Hessian(target), rtol=0.0, atol=tol, maxiter=max_iter, warn_on_max_iteration=False
    )
    return partial(_solved_by_cg, target, inverse)


def _solved_by_cg(target: _Target, inverse: CgOperator, v: Tensor) -> Tensor:
    target.rows(v)
    solution = inverse.solve(v)
    inverse._enforce(solution)
    relative = solution.relative_residual_norms.tolist()
    stagnated = [
        norm
        for norm, status in zip(relative, solution.status, strict=True)
        if status is SolveStatus.STAGNATED
    ]
    # An absolute tolerance may be out of reach of the dtype; that is no failure while the
    # residual is as small as the dtype allows.
    if max(stagnated, default=0.0) > default_rtol(v.dtype):
        warn(
            f"conjugate gradients stagnated at a relative residual of {max(stagnated):.1e}. "
            f"{SolveStatus.STAGNATED.advice}",
            ConvergenceWarning,
        )
    return solution.value


# --- Arnoldi -----------------------------------------------------------------------------


def ihvp_arnoldi(
    func: Function,
    argnums: Argnums = 0,
    max_iter: int = 100,
    tol: float = 1e-7,
    mode: Mode = "rev-fwd",
    regularization: float = 0.0,
    *,
    generator: torch.Generator | None = None,
) -> Callable[[Arguments, Tensor], Tensor]:
    r"""The function ``(x, v)`` ↦ :math:`V D^{-1} V^\top v` on a Krylov space of the Hessian.

    As `ihvp_at_x_arnoldi` with all Ritz pairs of the space.

    Args:
        func: From tensors to a tensor with a single element.
        argnums: Which arguments to differentiate by.
        max_iter: Most products with the Hessian, so the dimension of the space.
        tol: See `ihvp_at_x_arnoldi`.
        mode: ``"rev-fwd"`` (compared with reverse mode once) or ``"rev-rev"``.
        regularization: λ.
        generator: Draws the starting vector; without one, `torch.manual_seed` decides.

    Returns:
        A function of the tuple x of `func`'s arguments and of v ``(p,)`` or ``(k, p)``, p the
        number of entries that are differentiated; the result has the shape and dtype of v and no
        graph.

    Raises:
        HessopsError: As of `hvp`, and `IHVPUsageError` for `max_iter` below 1 or a negative `tol`.

    Example:
        >>> import torch
        >>> from hessops import ihvp
        >>> solve = ihvp.ihvp_arnoldi(lambda x: (x**3).sum())
        >>> solve((torch.tensor([1.0, 2.0]),), torch.tensor([6.0, 6.0])).round(decimals=4)
        tensor([1.0000, 0.5000])
    """
    settings = _Settings.checked(func, argnums, mode, regularization)
    krylov = _Krylov(max_iter, None, 1.0, tol, generator)
    return lambda x, v: krylov.inverse_at(settings, x)(v)


def ihvp_at_x_arnoldi(
    func: Function,
    *x: Any,
    argnums: Argnums = 0,
    max_iter: int = 100,
    top_k: int = 100,
    norm_constant: float = 1.0,
    tol: float = 1e-7,
    mode: Mode = "rev-fwd",
    regularization: float = 0.0,
    generator: torch.Generator | None = None,
) -> Callable[[Tensor], Tensor]:
    r"""The function v ↦ :math:`V D^{-1} V^\top v` on the dominant eigenspace of the Hessian at x.

    :math:`V D V^\top` are the `top_k` Ritz pairs of largest absolute value of
    :math:`\nabla^2 f(x) + \lambda I` on a Krylov space (Schioppa et al. 2022). The space is built
    in float64 with full reorthogonalisation, and continued by a random vector where it is
    exhausted; with `max_iter` at least p the result is the pseudo-inverse of rank `top_k`. Ritz
    values that cannot be told from zero are left out. With `max_iter` below p it is an
    approximation; the largest residual of its pairs is logged at DEBUG.

    Args:
        func: From tensors to a tensor with a single element.
        *x: Its arguments.
        argnums: Which arguments to differentiate by.
        max_iter: Most products with the Hessian.
        top_k: Most eigenpairs to keep.
        norm_constant: Norm of the vectors that are handed to the product. It changes no answer; a
            large one keeps tiny curvatures of float32 functions from underflowing.
        tol: The Krylov space is exhausted where the norm of the next basis vector is at most this.
        mode: ``"rev-fwd"`` (compared with reverse mode once) or ``"rev-rev"``.
        regularization: λ.
        generator: Draws the starting vector; without one, `torch.manual_seed` decides.

    Returns:
        A function of v ``(p,)`` or ``(k, p)``, p the number of entries that are differentiated; the
        result has the shape and dtype of v and no graph.

    Raises:
        HessopsError: As of `hvp_at_x`, and `IHVPUsageError` for numbers out of range.

    Example:
        >>> import torch
        >>> from hessops import ihvp
        >>> x = torch.tensor([1.0, 2.0])
        >>> solve = ihvp.ihvp_at_x_arnoldi(lambda x: (x**3).sum(), x, top_k=1)
        >>> solve(torch.tensor([6.0, 6.0])).round(decimals=4).abs()
        tensor([0.0000, 0.5000])
    """
    settings = _Settings.checked(func, argnums, mode, regularization)
    krylov = _Krylov(max_iter, top_k, norm_constant, tol, generator)
    return krylov.inverse_at(settings, x)


@dataclass(frozen=True)
class _Krylov:
    """How the dominant eigenspace is computed."""

    max_iter: int
    top_k: int | None
    norm_constant: float
    tol: float
    generator: torch.Generator | None

    def __post_init__(self) -> None:
        _check_iterations(self.max_iter, self.tol)
        with _as_usage_error():
            if self.top_k is not None:
                checked_count(self.top_k, "top_k")
            checked_number(self.norm_constant, "norm_constant", minimum=0, exclusive=True)

    def inverse_at(self, settings: _Settings, x: Arguments) -> Callable[[Tensor], Tensor]:
        target = _Target.at(settings, x)
        hessian = _Hessian(target)

        def product(vector: Tensor) -> Tensor:
            scaled = (self.norm_constant * vector).to(hessian.dtype)
            return hessian.apply(scaled).to(torch.float64) / self.norm_constant

        with isolated(hessian.device):
            every = ritz_pairs(
                product,
                hessian.input_size,
                max_iter=self.max_iter,
                tol=self.tol,
                generator=resolved_generator(self.generator),
                device=hessian.device,
            )
        pairs = every.largest(self.top_k)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(
                "ihvp_arnoldi keeps %d of %d Ritz pairs, with residuals up to %.1e",
                len(pairs.values),
                len(every.values),
                pairs.residual_norms.max().item() if len(pairs.values) else 0.0,
            )
        representation = LowRankProductRepresentation(pairs.values, pairs.vectors)
        if not representation.is_orthonormal():
            representation = representation.orthonormalized()
        inverse = LowRankOperator(representation, exact=False)

        def solve(v: Tensor) -> Tensor:
            target.rows(v)
            return inverse.apply(v.to(torch.float64)).to(v.dtype)

        return solve


# --- LiSSA -------------------------------------------------------------------------------


def ihvp_lissa(
    func: Function,
    argnums: Argnums = 0,
    batch_size: int = 1,
    num_repeat: int = 1,
    recursion_depth: int = 5000,
    damping: float = 0.0,
    scaling: float = 50.0,
    collate_fn: Callable[[Arguments], Arguments] | None = None,
    mode: Mode = "rev-rev",
    *,
    generator: torch.Generator | None = None,
) -> Callable[..., Tensor]:
    r"""The function ``(x, v, in_dims=None)`` ↦ an inverse-Hessian-vector product by LiSSA.

    See `ihvp_at_x_lissa`; x is the tuple of `func`'s arguments, ``(params, *data)``.

    Args:
        func: From tensors to a tensor with a single element, the mean over the points it is given.
        argnums: Which arguments to differentiate by.
        batch_size: Points per update.
        num_repeat: Independent chains that are averaged.
        recursion_depth: Updates of each chain.
        damping: d.
        scaling: s.
        collate_fn: From the sampled tuple to `func`'s arguments.
        mode: ``"rev-rev"`` or ``"rev-fwd"``, see `hvp`.
        generator: Draws the samples.

    Returns:
        A function of the tuple x of `func`'s arguments, of v ``(p,)`` or ``(k, p)``, p the number
        of entries that are differentiated, and of `in_dims`; the result has the shape and dtype of
        v and no graph.

    Raises:
        HessopsError: As of `ihvp_at_x_lissa`.

    Example:
        >>> import torch
        >>> from hessops import ihvp
        >>> solve = ihvp.ihvp_lissa(
        ...     lambda w, x: ((x * w) ** 2).mean(), batch_size=2, recursion_depth=200, scaling=4.0
        ... )
        >>> solve((torch.ones(1), torch.tensor([1.0, 1.0, 1.0])), torch.ones(1)).round(decimals=4)
        tensor([0.5000])
    """
    settings = _Settings.checked(func, argnums, mode, 0.0)
    recursion = _Recursion(
        batch_size, num_repeat, recursion_depth, damping, scaling, collate_fn, generator
    )

    def solve(x: Arguments, v: Tensor, in_dims: InDims = None) -> Tensor:
        return recursion.inverse_at(settings, x, in_dims)(v)

    return solve


def ihvp_at_x_lissa(
    func: Function,
    *x: Any,
    in_dims: InDims = None,
    argnums: Argnums = 0,
    batch_size: int = 1,
    num_repeat: int = 1,
    recursion_depth: int = 5000,
    damping: float = 0.0,
    scaling: float = 50.0,
    collate_fn: Callable[[Arguments], Arguments] | None = None,
    mode: Mode = "rev-rev",
    generator: torch.Generator | None = None,
) -> Callable[[Tensor], Tensor]:
    r"""The function v ↦ an inverse-Hessian-vector product by LiSSA at one x.

    .. math:: h \leftarrow v + (1 - d) h - H_b h / s, \qquad \text{answer } h / s

    from h = v, with :math:`H_b` the Hessian of `func` on `batch_size` points drawn without
    replacement (Agarwal, Bullins & Hazan 2017; Koh & Liang 2017). Its fixed point with all points
    in every batch is :math:`(H + d s I)^{-1} v`: damping is relative to scaling. It needs
    eigenvalues of every :math:`H_b / s + d I` between 0 and 2. All rows of v share their samples.

    Args:
        func: From tensors to a tensor with a single element, the mean over the points it is given.
        *x: Its arguments.
        in_dims: Per argument the dimension over points, ``None`` for those without (the ones that
            are differentiated among them). By default dimension 0 of every tensor but those that
            are differentiated and those without dimensions.
        argnums: Which arguments to differentiate by.
        batch_size: Points per update.
        num_repeat: Independent chains that are averaged.
        recursion_depth: Updates of each chain.
        damping: d >= 0.
        scaling: s > 0.
        collate_fn: From the sampled tuple to `func`'s arguments; ``None`` passes it as it is.
        mode: ``"rev-rev"`` or ``"rev-fwd"``, see `hvp`.
        generator: Draws the samples; without one, `torch.manual_seed` decides, and the global
            state stays as it is either way.

    Returns:
        A function of v ``(p,)`` or ``(k, p)``, p the number of entries that are differentiated; the
        result has the shape and dtype of v and no graph.

    Raises:
        IHVPUsageError: Everything that does not fit; usage errors but those of v are raised here.
        NonFiniteProductError: From the returned function: the recursion diverged.

    Example:
        >>> import torch
        >>> from hessops import ihvp
        >>> solve = ihvp.ihvp_at_x_lissa(
        ...     lambda w, x: ((x * w) ** 2).mean(),
        ...     torch.ones(1),
        ...     torch.tensor([1.0, 1.0, 1.0]),
        ...     recursion_depth=200,
        ...     scaling=4.0,
        ... )
        >>> solve(torch.ones(1)).round(decimals=4)
        tensor([0.5000])
    """
    settings = _Settings.checked(func, argnums, mode, 0.0)
    recursion = _Recursion(
        batch_size, num_repeat, recursion_depth, damping, scaling, collate_fn, generator
    )
    return recursion.inverse_at(settings, x, in_dims)


@dataclass(frozen=True)
class _Recursion:
    """How LiSSA samples and iterates."""

    batch_size: int
    num_repeat: int
    recursion_depth: int
    damping: float
    scaling: float
    collate_fn: Callable[[Arguments], Arguments] | None
    generator: torch.Generator | None

    def __post_init__(self) -> None:
        with _as_usage_error():
            checked_count(self.batch_size, "batch_size")
            checked_count(self.num_repeat, "num_repeat")
            checked_count(self.recursion_depth, "recursion_depth")
            checked_number(self.damping, "damping", minimum=0)
            checked_number(self.scaling, "scaling", minimum=0, exclusive=True)
        if self.collate_fn is not None and not callable(self.collate_fn):
            raise IHVPUsageError(f"collate_fn must be callable or None, got {self.collate_fn!r}")

    def inverse_at(
        self, settings: _Settings, x: Arguments, in_dims: InDims
    ) -> Callable[[Tensor], Tensor]:
        target = _Target.at(settings, x)
        dims = target.point_dimensions(in_dims)
        num_points = _common_number_of_points(x, dims)
        if self.batch_size > num_points:
            raise IHVPUsageError(
                f"batch_size is {self.batch_size}, but there are only {num_points} points"
            )

        def solve(v: Tensor) -> Tensor:
            rows = target.rows(v).detach()
            source = resolved_generator(self.generator)
            with isolated(rows.device):
                chains = [
                    lissa_recursion(
                        self._steps(target, dims, num_points, source),
                        rows,
                        dampen=self.damping,
                        scale=self.scaling,
                    )
                    for _ in range(self.num_repeat)
                ]
            return torch.stack(chains).mean(dim=0).reshape(v.shape)

        return solve

    def _steps(
        self,
        target: _Target,
        dims: tuple[int | None, ...],
        num_points: int,
        source: torch.Generator,
    ) -> Iterator[Callable[[Tensor], Tensor]]:
        for step in range(self.recursion_depth):
            drawn = torch.randperm(num_points, generator=source, device=source.device)
            # In their own order, so that a batch of all points is the data as they are.
            chosen = drawn[: self.batch_size].sort().values
            sampled = self._arguments(target, dims, chosen)
            yield partial(sampled.products, verify=step == 0)

    def _arguments(self, target: _Target, dims: tuple[int | None, ...], chosen: Tensor) -> _Target:
        sampled = tuple(
            argument if dim is None else argument.index_select(dim, chosen.to(argument.device))
            for argument, dim in zip(target.x, dims, strict=True)
        )
        if self.collate_fn is None:
            return replace(target, x=sampled)
        collated = tuple(self.collate_fn(sampled))
        for position in target.positions:
            fits = position < len(collated) and isinstance(collated[position], Tensor)
            if not fits or collated[position].shape != target.x[position].shape:
                raise IHVPUsageError(
                    f"collate_fn must keep the differentiated argument {position} of func, got "
                    f"{len(collated)} arguments"
                )
        return replace(target, x=collated)


def _common_number_of_points(x: Arguments, dims: tuple[int | None, ...]) -> int:
    numbers = {
        position: argument.shape[dim]
        for position, (argument, dim) in enumerate(zip(x, dims, strict=True))
        if dim is not None
    }
    if not numbers:
        raise IHVPUsageError(
            "no argument of func has points to sample (in_dims is None for all of them); LiSSA is "
            "for data, use ihvp_cg or ihvp_explicit for a plain function"
        )
    if len(set(numbers.values())) > 1:
        raise IHVPUsageError(
            "the arguments of func disagree in their number of points: "
            + ", ".join(f"argument {position} has {n}" for position, n in numbers.items())
        )
    return int(next(iter(numbers.values())))


# --- what all share ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Settings:
    """What is differentiated, checked as far as it can be without arguments."""

    func: Function
    argnums: tuple[int, ...]
    mode: Mode
    regularization: float

    @classmethod
    def checked(
        cls, func: Function, argnums: Argnums, mode: Mode, regularization: float
    ) -> _Settings:
        if not callable(func):
            raise IHVPUsageError(f"func must be callable, got {type(func).__name__}")
        if mode not in MODES:
            raise IHVPUsageError(f"mode must be one of {MODES}, got {mode!r}")
        numbers = argnums if isinstance(argnums, tuple) else (argnums,)
        if not numbers or any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
            raise IHVPUsageError(
                f"argnums must be an integer or a non-empty tuple of them, got {argnums!r}"
            )
        with _as_usage_error():
            shift = checked_number(regularization, "regularization")
        return cls(func, numbers, mode, shift)


@dataclass(frozen=True, eq=False)
class _Target:
    """A function at its arguments, as a function of one flat vector."""

    settings: _Settings
    x: Arguments
    positions: tuple[int, ...]

    @classmethod
    def at(cls, settings: _Settings, x: Arguments) -> _Target:
        if not isinstance(x, (tuple, list)):
            raise IHVPUsageError(
                f"x must be the tuple of func's arguments, got {type(x).__name__}; one argument is "
                "(x,)"
            )
        positions = []
        for number in settings.argnums:
            if not -len(x) <= number < len(x):
                raise IHVPUsageError(
                    f"argnums names the argument {number}, but func is given {len(x)}"
                )
            positions.append(number % len(x))
        if len(set(positions)) < len(positions):
            raise IHVPUsageError(f"argnums names an argument twice: {settings.argnums}")
        target = cls(settings, tuple(x), tuple(positions))
        target._require_differentiable()
        return target

    def _require_differentiable(self) -> None:
        for position in self.positions:
            argument = self.x[position]
            if not isinstance(argument, Tensor) or not argument.is_floating_point():
                kind = argument.dtype if isinstance(argument, Tensor) else type(argument).__name__
                raise IHVPUsageError(
                    f"argument {position} of func cannot be differentiated by: expected a "
                    f"floating-point tensor, got {kind}"
                )
        kinds = {(a.dtype, a.device) for a in self.arguments}
        if len(kinds) > 1:
            raise IHVPUsageError(
                f"the differentiated arguments differ in dtype or device: {sorted(map(str, kinds))}"
            )

    @property
    def arguments(self) -> list[Tensor]:
        """The differentiated arguments."""
        return [self.x[position] for position in self.positions]

    @property
    def size(self) -> int:
        """p."""
        return sum(argument.numel() for argument in self.arguments)

    def is_transformed(self, *others: Tensor) -> bool:
        """Whether any tensor belongs to a transform of the caller, so that values are hidden."""
        tensors = [a for a in (*self.x, *others) if isinstance(a, Tensor)]
        return any(is_transformed(tensor) for tensor in tensors)

    def rows(self, v: Tensor) -> Tensor:
        """v as rows ``(k, p)``."""
        dtype = self.arguments[0].dtype
        if not isinstance(v, Tensor):
            raise IHVPUsageError(f"v must be a tensor, got {type(v).__name__}")
        if v.ndim not in (1, 2) or v.shape[-1] != self.size:
            raise IHVPUsageError(
                f"v has shape {tuple(v.shape)}, expected ({self.size},) or (k, {self.size}): the "
                "differentiated arguments, flattened"
            )
        if v.dtype != dtype:
            raise IHVPUsageError(f"v is {v.dtype}, the differentiated arguments are {dtype}")
        return v if v.ndim == 2 else v.unsqueeze(0)

    def flat(self) -> Tensor:
        """The differentiated arguments as one vector ``(p,)``."""
        return torch.cat([argument.reshape(-1) for argument in self.arguments])

    def space(self) -> ParameterSpace:
        """The flat vectors, under one name."""
        return ParameterSpace.from_tensors({"v": self.flat()})

    def value(self, flat: Tensor) -> Tensor:
        """The function of the flat vector."""
        arguments, start = list(self.x), 0
        for position, old in zip(self.positions, self.arguments, strict=True):
            arguments[position] = flat[start : start + old.numel()].reshape(old.shape)
            start += old.numel()
        return single_element(self.settings.func, IHVPUsageError)(*arguments)

    def products(self, rows: Tensor, *, verify: bool) -> Tensor:
        """(H + λI) times rows ``(k, p)``, from a fresh traversal."""
        return self.linearized(verify=verify)(rows)

    def linearized(self, *, verify: bool) -> Callable[[Tensor], Tensor]:
        """The map of rows ``(k, p)`` by H + λI; the graph of the gradient is made once.

        With `verify`, forward mode is compared with reverse mode on one vector.
        """
        flat, gradient = self.flat(), grad(self.value)
        forward = self.settings.mode == "rev-fwd"

        def push(row: Tensor) -> tuple[Tensor, ...]:
            with explaining_forward_mode():
                return (jvp(gradient, (flat,), (row,))[1],)

        with product_state(self.arguments):
            by_row = push if forward else vjp(gradient, flat)[1]
            if verify and forward:
                require_forward_agreement(
                    _on_stacks(partial(pull_rows, push)),
                    _on_stacks(partial(pull_rows, vjp(gradient, flat)[1])),
                    self.space(),
                    "mode='rev-fwd'",
                )

        def multiply(rows: Tensor) -> Tensor:
            if len(rows) == 0:
                return torch.zeros_like(rows)
            with product_state(self.arguments):
                result = pull_rows(by_row, rows)
            shift = self.settings.regularization
            return result + shift * rows if shift else result

        return multiply

    def point_dimensions(self, in_dims: InDims) -> tuple[int | None, ...]:
        """Per argument the dimension over points."""
        if in_dims is None:
            return tuple(
                0 if position not in self.positions and isinstance(a, Tensor) and a.ndim else None
                for position, a in enumerate(self.x)
            )
        if not isinstance(in_dims, (tuple, list)) or len(in_dims) != len(self.x):
            raise IHVPUsageError(
                f"in_dims must have one entry for each of the {len(self.x)} arguments of func, got "
                f"{in_dims!r}"
            )
        for position, dim in enumerate(in_dims):
            self._require_dimension(position, dim)
        return tuple(in_dims)

    def _require_dimension(self, position: int, dim: int | None) -> None:
        argument = self.x[position]
        if dim is None:
            return
        if position in self.positions:
            raise IHVPUsageError(
                f"in_dims gives the differentiated argument {position} a dimension over points "
                f"({dim!r}); it must be None"
            )
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise IHVPUsageError(f"in_dims[{position}] must be an integer or None, got {dim!r}")
        if not isinstance(argument, Tensor) or not -argument.ndim <= dim < argument.ndim:
            raise IHVPUsageError(
                f"in_dims[{position}] is {dim}, but argument {position} of func has no such "
                "dimension"
            )


class _Hessian(TensorOperator):
    """H + λI of a function at its arguments, checked for symmetry."""

    def __init__(self, target: _Target) -> None:
        if target.is_transformed():
            raise IHVPUsageError(
                "x belongs to a torch.func transform, which hides the values that a solve needs; "
                "call it outside (hvp works inside)"
            )
        kept = replace(
            target, x=tuple(a.detach() if isinstance(a, Tensor) else a for a in target.x)
        )
        first = kept.arguments[0]
        super().__init__(kept.size, first.dtype, first.device, symmetric=True)
        with isolated(self.device):
            self._multiply = kept.linearized(verify=True)
            what = "the products with the Hessian of func"
            require_symmetry(_on_stacks(self._multiply), kept.space(), what)

    def _apply_rows(self, rows: Tensor) -> Tensor:
        return self._multiply(rows)


def _on_stacks(multiply: Callable[[Tensor], Tensor]) -> LinearFunction:
    """A map of rows as a map of stacks of `_Target.space`."""
    return lambda stack: {"v": multiply(stack["v"])}


def _solved_by(target: _Target, inverse: TensorOperator, v: Tensor) -> Tensor:
    target.rows(v)
    return inverse.apply(v)


@contextmanager
def _as_usage_error() -> Iterator[None]:
    """What the checks of single arguments refuse is a misuse here."""
    try:
        yield
    except (ArgumentError, ArgumentTypeError) as error:
        raise IHVPUsageError(str(error)) from None


def _check_iterations(max_iter: int, tol: float) -> None:
    with _as_usage_error():
        checked_count(max_iter, "max_iter")
        checked_number(tol, "tol", minimum=0)
