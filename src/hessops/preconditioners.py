"""Preconditioners: recipes that turn an operator into an operator close to its inverse."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Self

import torch
from torch import Tensor

from hessops.copies import Copyable
from hessops.errors import (
    ArgumentError,
    ArgumentTypeError,
    MemoryLimitError,
    StructureError,
    ZeroShiftWarning,
)
from hessops.functional.low_rank import LowRankProductRepresentation
from hessops.functional.nystroem import operator_sketch
from hessops.operators.base import DENSE_CHUNK_BYTES, TensorOperator
from hessops.operators.dense import MatrixOperator
from hessops.operators.diagonal import BlockDiagonalOperator, DiagonalBlock
from hessops.operators.probing import exact_diagonal, probed_diagonal
from hessops.printed import Node, Printed, settings_of
from hessops.randomness import resolved_generator
from hessops.validation import (
    available_bytes,
    checked_count,
    checked_regularization,
)
from hessops.warn import warn

# A sketch whose smallest eigenvalue is below this multiple of the shift leaves a condition number
# of about that; more columns gain little (Frangella, Tropp & Udell 2023, Section 5.4).
ADAPTIVE_FACTOR = 10
# Columns that an adaptive sketch begins with.
ADAPTIVE_START = 10


class Preconditioner(Copyable, Printed, ABC):
    r"""A recipe: fitted to A and λ it yields an operator close to :math:`(A + \lambda I)^{-1}`.

    A subclass defines `fit`. Any solver with a ``preconditioner`` argument takes an instance, fits
    it in its first solve, and adapts it by `refit` when its regularization changes.

    Example:
        >>> import torch
        >>> from hessops import CgOperator, DiagonalOperator, Preconditioner
        >>> class ExactDiagonal(Preconditioner):
        ...     def fit(self, operator, regularization=None):
        ...         diagonal = operator.to_dense().diagonal()
        ...         return DiagonalOperator(1 / (diagonal + (regularization or 0.0)))
        >>> A = DiagonalOperator(torch.tensor([1.0, 10.0, 100.0]))
        >>> solution = CgOperator(A, preconditioner=ExactDiagonal()).solve(torch.ones(3))
        >>> solution.iterations.tolist(), solution.num_preconditioner_applications
        ([1], 2)
    """

    @abstractmethod
    def fit(self, operator: TensorOperator, regularization: float | None = None) -> TensorOperator:
        r"""A symmetric positive definite operator close to :math:`(A + \lambda I)^{-1}`.

        Args:
            operator: A.
            regularization: λ >= 0, on top of any shift of A; ``None`` is 0.

        Returns:
            An operator of the size, dtype and device of A.
        """

    def refit(
        self, fitted: TensorOperator, operator: TensorOperator, regularization: float | None
    ) -> TensorOperator:
        """What `fit` would give for another λ, from what it gave before where that is possible."""
        if isinstance(fitted, FittedPreconditioner):
            return fitted.with_regularization(regularization)
        return self.fit(operator, regularization)

    def _node(self) -> Node:
        names = (f.name for f in fields(self)) if is_dataclass(self) else ()
        return Node(settings_of(self, *names))


class FittedPreconditioner(TensorOperator):
    r"""An operator close to :math:`(A + \lambda I)^{-1}` that can be had for another λ.

    Symmetric positive definite. A subclass defines the product from what was fitted and
    `total_shift`, as ``_apply_rows`` or ``_apply_vector``, and ``_move``.

    Args:
        like: A, for size, dtype, device and parameters.
        shift: A shift c that was taken out of A, A = B + c·I; it adds to λ.
        regularization: λ >= 0.

    Example:
        >>> import torch
        >>> from hessops import DiagonalOperator, FittedPreconditioner, JacobiPreconditioner
        >>> A = DiagonalOperator(torch.tensor([1.0, 3.0]))
        >>> fitted = JacobiPreconditioner().fit(A, 1.0)
        >>> isinstance(fitted, FittedPreconditioner), fitted.apply(torch.ones(2))
        (True, tensor([0.5000, 0.2500]))
        >>> fitted.with_regularization(0.0).apply(torch.ones(2))
        tensor([1.0000, 0.3333])
    """

    def __init__(self, like: TensorOperator, shift: float, regularization: float) -> None:
        super().__init__(
            like.input_size,
            like.dtype,
            like.device,
            symmetric=True,
            positive_semidefinite=True,
            space=like.space,
        )
        self.shift_of_operator = shift
        self.regularization = regularization

    @property
    def total_shift(self) -> float:
        """c + λ, which is added to what was fitted."""
        return self.shift_of_operator + self.regularization

    def with_regularization(self, regularization: float | None) -> Self:
        """The preconditioner for another λ, without a product with A."""
        changed = self._copy_on(self.device)
        changed.regularization = checked_regularization(regularization)
        return changed

    def _label(self) -> str:
        return f"{super()._label()}(regularization={self.regularization:g})"


def _separated(operator: TensorOperator) -> tuple[TensorOperator, float]:
    """B and c >= 0 with A = B + c·I: what to sketch, and what to add."""
    base, shift = operator._without_shift()
    return (base, shift) if shift > 0 else (operator, 0.0)


# --- Jacobi ------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class JacobiPreconditioner(Preconditioner):
    r"""The inverse of the diagonal, estimated by probing.

    .. math:: \mathrm{diag}(A) \approx \frac{\sum_j z_j \odot A z_j}{\sum_j z_j \odot z_j}

    with Rademacher probes z (Bekas, Kokiopoulou & Saad 2007), all in one application of A. What is
    inverted is :math:`\sqrt{m^2 + s^2}` with m an entry and s its standard error, so that a lucky
    zero is not, and that it is positive whatever the sign of the estimate. With as many probes as
    parameters the diagonal is computed exactly, by products with all unit vectors.

    Args:
        num_samples_estimator: Number of probes.
        generator: Draws them; without one, `torch.manual_seed` decides.

    Raises:
        ArgumentTypeError, ArgumentError: `num_samples_estimator` is not an integer >= 1.

    Example:
        >>> import torch
        >>> from hessops import DiagonalOperator, JacobiPreconditioner
        >>> A = DiagonalOperator(torch.tensor([1.0, 3.0]))
        >>> JacobiPreconditioner(num_samples_estimator=2).fit(A, 1.0).apply(torch.ones(2))
        tensor([0.5000, 0.2500])
    """

    num_samples_estimator: int = 10
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        checked_count(self.num_samples_estimator, "num_samples_estimator")

    def fit(self, operator: TensorOperator, regularization: float | None = None) -> TensorOperator:
        """One application of A to all probes, or n products where there are as many probes."""
        base, shift = _separated(operator)
        count, source = self.num_samples_estimator, resolved_generator(self.generator)
        if count >= base.input_size:
            diagonal = exact_diagonal(base).abs()
        else:
            diagonal = torch.hypot(*probed_diagonal(base, count, source))
        own = checked_regularization(regularization)
        return _Jacobi(operator, shift, own, diagonal.to(base.dtype))


class _Jacobi(FittedPreconditioner):
    """1 / (d + λ)."""

    def __init__(
        self, like: TensorOperator, shift: float, regularization: float, diagonal: Tensor
    ) -> None:
        super().__init__(like, shift, regularization)
        # What is zero in a diagonal without a shift must not become infinite.
        floor = torch.finfo(diagonal.dtype).eps ** 0.5 * diagonal.mean()
        self.diagonal = torch.where(floor > 0, diagonal.maximum(floor), 1.0)

    def _apply_rows(self, rows: Tensor) -> Tensor:
        return rows / (self.diagonal + self.total_shift)

    def _move(self, device: torch.device) -> Self:
        moved = self._copy_on(device)
        moved.diagonal = self.diagonal.to(device)
        return moved


# --- Nyström -----------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class NystroemPreconditioner(Preconditioner):
    r"""The randomized Nyström preconditioner, for spectra that decay.

    .. math:: P^{-1} = (\sigma_r + \mu)\, U (\Sigma + \mu I)^{-1} U^\top + (I - U U^\top)

    with :math:`U \Sigma U^\top` the Nyström approximation of A without its shift, :math:`\sigma_r`
    its smallest eigenvalue, and μ the whole shift, that of A and λ (Frangella, Tropp & Udell 2023,
    Section 5). The condition number falls to about :math:`(\sigma_r + \mu) / \mu`. It takes one
    application of A to `rank` + `oversampling` columns; another μ needs none.

    Without any shift the smallest safe one is taken for μ, the rounding error √n·ε·σ₁ of the
    sketch, with a `ZeroShiftWarning`: a singular operator has no other.

    Of an operator that is not positive semi-definite, such as a raw Hessian, the positive part is
    sketched, at the price of a second application and with an `IndefiniteSketchWarning`.

    Args:
        rank: r, the number of eigenpairs that are kept.
        oversampling: Columns of the sketch beyond `rank`, which make those pairs better.
        adaptive: Doubles the sketch until :math:`\sigma_r \le 10 \mu`; `rank` is then the most it
            may reach. It needs a positive μ.
        generator: Draws the sketch; without one, `torch.manual_seed` decides.

    Raises:
        ArgumentTypeError, ArgumentError: `rank` is not an integer >= 1, or `oversampling` >= 0.

    Example:
        >>> import torch
        >>> from hessops import CgOperator, DiagonalOperator, NystroemPreconditioner
        >>> A = DiagonalOperator(10.0 ** -torch.arange(12, dtype=torch.float64))
        >>> b = torch.ones(12, dtype=torch.float64)
        >>> plain = CgOperator(A, 1e-6).solve(b)
        >>> sketched = CgOperator(A, 1e-6, preconditioner=NystroemPreconditioner(rank=8)).solve(b)
        >>> bool(4 * sketched.iterations < plain.iterations), sketched.status[0].value
        (True, 'converged')
    """

    rank: int = 10
    oversampling: int = 10
    adaptive: bool = False
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        checked_count(self.rank, "rank")
        checked_count(self.oversampling, "oversampling", minimum=0)

    def fit(self, operator: TensorOperator, regularization: float | None = None) -> TensorOperator:
        """One application of A to the columns of the sketch; with `adaptive`, one per doubling.

        Raises:
            ArgumentError: `adaptive` without a positive shift.
            DtypeError: Half precision.
            StructureError: A is not symmetric.
        """
        base, shift = _separated(operator)
        own = checked_regularization(regularization)
        if base.symmetric is False:
            raise StructureError(
                f"operator ({type(base).__name__}) is not symmetric: it has no Nyström sketch"
            )
        if self.adaptive and shift + own <= 0:
            raise ArgumentError(
                "adaptive=True compares the sketch with the regularization, which is 0; pass a "
                "positive regularization to the solver, or adaptive=False"
            )
        return _Nystroem(operator, shift, own, self._sketched(base, shift + own))

    def refit(
        self, fitted: TensorOperator, operator: TensorOperator, regularization: float | None
    ) -> TensorOperator:
        """The same sketch for another λ, unless an adaptive one is too small for it."""
        if self.adaptive and isinstance(fitted, _Nystroem):
            changed = fitted.with_regularization(regularization)
            smaller = changed.total_shift < fitted.total_shift
            if smaller and changed.smallest > ADAPTIVE_FACTOR * changed.total_shift:
                return self.fit(operator, regularization)
            return changed
        return super().refit(fitted, operator, regularization)

    def _sketched(self, base: TensorOperator, shift: float) -> LowRankProductRepresentation:
        sketch = operator_sketch(base, self.generator)
        rank = min(self.rank, ADAPTIVE_START) if self.adaptive else self.rank
        while True:
            sketch.grow(rank + self.oversampling)
            pairs = sketch.approximation()
            largest = replace(
                pairs, eigen_vals=pairs.eigen_vals[:rank], projections=pairs.projections[:, :rank]
            )
            complete = rank >= min(self.rank, base.input_size)
            if complete or largest.eigen_vals[-1] <= ADAPTIVE_FACTOR * shift:
                return largest
            rank = min(2 * rank, self.rank)


class _Nystroem(FittedPreconditioner):
    """(σ + μ) U (Σ + μI)⁻¹ Uᵀ + (I − UUᵀ)."""

    def __init__(
        self,
        like: TensorOperator,
        shift: float,
        regularization: float,
        sketch: LowRankProductRepresentation,
    ) -> None:
        super().__init__(like, shift, regularization)
        values = sketch.eigen_vals
        # Eigenvalues that are rounding must not be inverted when there is no shift.
        kept = values > self._rounding * values.max() if len(values) else values > 0
        self.sketch = replace(
            sketch, eigen_vals=values[kept], projections=sketch.projections[:, kept].contiguous()
        )
        self._warn_without_shift()

    @property
    def damping(self) -> float:
        """μ: the whole shift, or without one the rounding error of the sketched eigenvalues."""
        if self.total_shift > 0 or not self.sketch.rank:
            return self.total_shift
        return self._rounding * self.sketch.eigen_vals[0].item()

    @property
    def _rounding(self) -> float:
        return float(torch.finfo(self.dtype).eps * self.input_size**0.5)

    def _warn_without_shift(self) -> None:
        if self.damping != self.total_shift:
            warn(
                "the Nyström preconditioner of an operator without shift takes the smallest safe "
                f"one, mu = {self.damping:.1e} (its rounding error); eigenvalues below it are not "
                "told from zero. Pass a regularization where the operator may be singular",
                ZeroShiftWarning,
            )

    def with_regularization(self, regularization: float | None) -> Self:
        """The preconditioner for another λ, without a product with A."""
        changed = super().with_regularization(regularization)
        changed._warn_without_shift()
        return changed

    @property
    def smallest(self) -> float:
        """σ_r, the smallest eigenvalue that was kept."""
        values = self.sketch.eigen_vals
        return values[-1].item() if len(values) else 0.0

    def _apply_rows(self, rows: Tensor) -> Tensor:
        values, basis = self.sketch.eigen_vals, self.sketch.projections
        if not len(values):
            return rows.clone()
        gains = (values[-1] + self.damping) / (values + self.damping) - 1
        return rows + (rows @ basis * gains) @ basis.T

    def _move(self, device: torch.device) -> Self:
        moved = self._copy_on(device)
        moved.sketch = self.sketch.to(device)
        return moved

    def _label(self) -> str:
        return f"Nystroem(rank={self.sketch.rank}, regularization={self.regularization:g})"


# --- block-diagonal ----------------------------------------------------------------------

Blocks = Mapping[str, Sequence[str]] | int | None


@dataclass(frozen=True, repr=False)
class BlockDiagonalPreconditioner(Preconditioner):
    r"""The inverses of diagonal blocks of A.

    Args:
        blocks: Label -> names of parameters, of which every one must belong to one block; an
            integer cuts the flat vector into blocks of that size; ``None`` takes each parameter
            as a block.
        recipe: How each block is inverted, any other `Preconditioner`; ``None`` inverts the dense
            block by its eigenpairs, in absolute value, so that it stays positive definite for an
            indefinite A. The dense blocks take as many products with A as there are parameters.

    Raises:
        ArgumentTypeError, ArgumentError: `blocks` is something else.

    Example:
        >>> import torch
        >>> from hessops import BlockDiagonalPreconditioner, MatrixOperator
        >>> A = MatrixOperator(torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 5.0]]))
        >>> fitted = BlockDiagonalPreconditioner(blocks=2).fit(A)
        >>> fitted.apply(torch.tensor([3.0, 3.0, 5.0])).round(decimals=4)
        tensor([1., 1., 1.])
    """

    blocks: Blocks = None
    recipe: Preconditioner | None = None

    def __post_init__(self) -> None:
        if isinstance(self.blocks, Mapping) or self.blocks is None:
            pass
        elif isinstance(self.blocks, int) and not isinstance(self.blocks, bool):
            checked_count(self.blocks, "blocks")
        else:
            raise ArgumentTypeError(
                "blocks must be a mapping from labels to parameter names, an integer or None, got "
                f"{self.blocks!r}"
            )
        if self.recipe is not None and not isinstance(self.recipe, Preconditioner):
            raise ArgumentTypeError(
                f"recipe must be a Preconditioner or None, got {type(self.recipe).__name__}"
            )

    def fit(self, operator: TensorOperator, regularization: float | None = None) -> TensorOperator:
        """Fits every block.

        Raises:
            StructureError: Named blocks of an operator without named parameters.
            ParameterNameError: A parameter that is unknown, in two blocks or in none.
            MemoryLimitError: The dense blocks would not fit.
        """
        base, shift = _separated(operator)
        own = checked_regularization(regularization)
        positions = self._positions(operator)
        blocks: list[TensorOperator] = []
        if self.recipe is None:
            matrices = _dense_blocks(base, positions)
            blocks += [_SpectralInverse(matrix, shift + own) for matrix in matrices]
        else:
            parts = [DiagonalBlock(base, where) for where in positions]
            blocks += [self.recipe.fit(part, shift + own) for part in parts]
        return BlockDiagonalOperator._at(blocks, positions, operator.space)

    def refit(
        self, fitted: TensorOperator, operator: TensorOperator, regularization: float | None
    ) -> TensorOperator:
        """The same blocks for another λ, each as its recipe does that."""
        if not isinstance(fitted, BlockDiagonalOperator):
            return self.fit(operator, regularization)
        base, shift = _separated(operator)
        total = shift + checked_regularization(regularization)
        recipe = self.recipe or _DenseBlocks()
        blocks = [
            recipe.refit(block, DiagonalBlock(base, where), total)
            for block, where in zip(fitted.blocks, fitted._positions, strict=True)
        ]
        return BlockDiagonalOperator._at(blocks, fitted._positions, operator.space)

    def _positions(self, operator: TensorOperator) -> list[Tensor]:
        size, device = operator.input_size, operator.device
        if isinstance(self.blocks, int):
            return list(torch.split(torch.arange(size, device=device), self.blocks))
        space = operator.space
        if space is None:
            raise StructureError(
                f"operator ({type(operator).__name__}) has no named parameters to make blocks of; "
                "pass blocks as an integer, the size of a block"
            )
        names = self.blocks or {name: [name] for name in space.names}
        return [space.indices(piece.names) for piece in space.partition(names).values()]


def _dense_blocks(operator: TensorOperator, positions: Sequence[Tensor]) -> list[Tensor]:
    """The diagonal blocks at some positions, by products with all unit vectors in chunks."""
    size, itemsize = operator.input_size, operator.dtype.itemsize
    needed = sum(len(where) ** 2 for where in positions) * itemsize
    with operator.processes.together():
        limit = available_bytes(operator.device) // 2
        if needed > limit:
            raise MemoryLimitError(
                f"the dense blocks take {needed:,} bytes, more than the {limit:,} that may be "
                "used; choose smaller blocks, or a recipe such as NystroemPreconditioner for each"
            )
    blocks = [
        torch.zeros(len(where), len(where), dtype=operator.dtype, device=operator.device)
        for where in positions
    ]
    places = [(block, row) for block, where in enumerate(positions) for row in range(len(where))]
    chunk = max(1, DENSE_CHUNK_BYTES // (size * itemsize))
    for start in range(0, len(places), chunk):
        some = places[start : start + chunk]
        units = operator.apply(_unit_rows(operator, [positions[b][row] for b, row in some]))
        for product, (block, row) in zip(units, some, strict=True):
            blocks[block][row] = product[positions[block]]
    return [(block + block.T) / 2 for block in blocks]


def _unit_rows(operator: TensorOperator, positions: Sequence[Tensor]) -> Tensor:
    rows = torch.zeros(
        len(positions), operator.input_size, dtype=operator.dtype, device=operator.device
    )
    rows[torch.arange(len(positions)), torch.stack(list(positions))] = 1
    return rows


class _SpectralInverse(FittedPreconditioner):
    """U / |D + λ| Uᵀ of a dense symmetric matrix."""

    def __init__(self, matrix: Tensor, regularization: float) -> None:
        super().__init__(MatrixOperator(matrix, symmetric=True, copy=False), 0.0, regularization)
        self.values, self.vectors = torch.linalg.eigh(matrix)

    def _apply_rows(self, rows: Tensor) -> Tensor:
        sizes = (self.values + self.total_shift).abs()
        floor = torch.finfo(self.dtype).eps * sizes.max()
        sizes = torch.where(floor > 0, sizes.maximum(floor), 1.0)
        inverted: Tensor = (rows @ self.vectors / sizes) @ self.vectors.T
        return inverted

    def _move(self, device: torch.device) -> Self:
        moved = self._copy_on(device)
        moved.values, moved.vectors = self.values.to(device), self.vectors.to(device)
        return moved


class _DenseBlocks(Preconditioner):
    """What inverts each block without a recipe."""

    def fit(self, operator: TensorOperator, regularization: float | None = None) -> TensorOperator:
        return _SpectralInverse(operator.to_dense(), checked_regularization(regularization))


# The spellings of pyDVL.
JacobiPreConditioner = JacobiPreconditioner
NystroemPreConditioner = NystroemPreconditioner
