"""Blocks with known eigen-decompositions, by parameters, and their inverse with a λ for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Self, TypeVar, overload

import torch
from torch import Tensor

from hessops.errors import ArgumentError, ArgumentTypeError
from hessops.operators.base import TensorDictOperator, TensorOperator
from hessops.operators.damping import Regularization, by_block, resolved
from hessops.operators.diagonal import every_known
from hessops.operators.eigen import EigenOperator
from hessops.operators.inverse import DirectInverse
from hessops.operators.kronecker_block import KroneckerOperator
from hessops.printed import described
from hessops.space import ParameterSpace

_Inverse = TypeVar("_Inverse", bound=TensorOperator)
DampingKind = Literal["exact", "factored-tikhonov"]
DAMPING_KINDS = ("exact", "factored-tikhonov")


class BlockEigenOperator(EigenOperator, TensorDictOperator):
    """Operators with known eigen-decompositions along the diagonal, by parameters.

    Args:
        blocks: Name -> operator, each with a `space` of its own.
        space: The parameters of the whole. Every one must belong to exactly one block.

    Raises:
        ArgumentError: A block without named parameters.
        ParameterNameError: An unknown parameter, one in two blocks, or one in none.

    Example:
        >>> import torch
        >>> from hessops import ParameterSpace
        >>> from hessops.operators.eigen import DiagonalEigenOperator
        >>> from hessops.operators.eigen_blocks import BlockEigenOperator
        >>> space = ParameterSpace.from_tensors({"a": torch.zeros(1), "b": torch.zeros(2)})
        >>> a, b = (space.subspace([name]) for name in "ab")
        >>> A = BlockEigenOperator(
        ...     {
        ...         "second": DiagonalEigenOperator(torch.full((2,), 4.0), space=b),
        ...         "first": DiagonalEigenOperator(torch.ones(1), space=a),
        ...     },
        ...     space=space,
        ... )
        >>> A.apply(torch.ones(3)), A.trace()
        (tensor([1., 4., 4.]), 9.0)
    """

    def __init__(self, blocks: Mapping[str, EigenOperator], *, space: ParameterSpace) -> None:
        self._hold_blocks(blocks, space)
        super().__init__(torch.cat([b.eigenvalues for b in blocks.values()]), space=space)

    def _hold_blocks(self, blocks: Mapping[str, EigenOperator], space: ParameterSpace) -> None:
        names: dict[str, Sequence[str]] = {}
        for name, block in blocks.items():
            if block.space is None:
                raise ArgumentError(f"blocks[{name!r}] has no parameter space")
            names[name] = block.space.names
        pieces = space.partition(names)
        self.blocks = dict(blocks)
        self._positions = {name: _positions(space, piece.names) for name, piece in pieces.items()}
        super().__init__(torch.cat([b.eigenvalues for b in blocks.values()]), space=space)

    def _into_basis(self, rows: Tensor) -> Tensor:
        parts = [
            block._into_basis(rows[:, self._positions[name]]) for name, block in self.blocks.items()
        ]
        return torch.cat(parts, dim=1)

    def _out_of_basis(self, rows: Tensor) -> Tensor:
        result = torch.empty_like(rows)
        parts = self._by_block(rows, dim=1)
        for name, block in self.blocks.items():
            result[:, self._positions[name]] = block._out_of_basis(parts[name])
        return result

    def _exact_diagonal(self) -> Tensor | None:
        known = every_known([block._exact_diagonal() for block in self.blocks.values()])
        if known is None:
            return None
        diagonal = torch.empty(self.input_size, dtype=torch.float64, device=self.device)
        for name, part in zip(self.blocks, known, strict=True):
            diagonal[self._positions[name]] = part
        return diagonal

    def _by_block(self, values: Tensor, dim: int = 0) -> dict[str, Tensor]:
        """What is in the order of the eigenvalues, by block."""
        sizes = [block.input_size for block in self.blocks.values()]
        return dict(zip(self.blocks, torch.split(values, sizes, dim=dim), strict=True))

    def _with_eigenvalues(self, eigenvalues: Tensor) -> BlockEigenOperator:
        # A plain one, whatever a subclass knows of where its own eigenvalues come from.
        parts = self._by_block(eigenvalues)
        blocks = {name: b._with_eigenvalues(parts[name]) for name, b in self.blocks.items()}
        return BlockEigenOperator(blocks, space=self.space)

    @property
    def cutoff(self) -> Tensor:
        """The size up to which eigenvalues are taken for rounding, ``(n,)``, by block."""
        return torch.cat([b.cutoff.expand(b.input_size) for b in self.blocks.values()])

    @overload
    def inverse(
        self,
        solver: None = None,
        *,
        regularization: Regularization = None,
        damping: DampingKind = "exact",
    ) -> KfacInverse: ...

    @overload
    def inverse(
        self,
        solver: Callable[[TensorOperator], _Inverse],
        *,
        regularization: None = None,
        damping: Literal["exact"] = "exact",
    ) -> _Inverse: ...

    def inverse(
        self,
        solver: Callable[[TensorOperator], TensorOperator] | None = None,
        *,
        regularization: Regularization = None,
        damping: DampingKind = "exact",
    ) -> TensorOperator:
        r"""The damped inverse in closed form, or :math:`K^{-1}` by a solver.

        Args:
            solver: See `TensorOperator.inverse`.
            regularization: λ >= 0, or a `Damping` relative to the mean eigenvalue of each block; or
                one for each block, as a mapping by name or a sequence in the order of `blocks`.
            damping: ``"exact"`` is :math:`(K + \lambda I)^{-1}`; ``"factored-tikhonov"`` the
                heuristic :math:`(B + \tfrac{\sqrt\lambda}{\pi} I)^{-1} \otimes
                (A + \pi \sqrt\lambda I)^{-1}` with :math:`\pi^2` the ratio of the mean
                eigenvalues of A and B (Martens & Grosse 2015, Section 6.3), for Kronecker blocks of
                KFAC; exact for the other blocks.

        Returns:
            A `KfacInverse`, whose `with_regularization` reuses the eigenvectors.

        Raises:
            ArgumentError: An unknown `damping`; or the heuristic for corrected eigenvalues, which
                have no factors.
            ParameterNameError: `regularization` names other blocks.
            SingularOperatorError: It is singular to working precision; see `pseudo_inverse`.
        """
        if solver is not None:
            if regularization is not None or damping != "exact":
                raise ArgumentError(
                    "regularization and damping are for the closed form: with a solver, shift the "
                    "operator, or bind arguments to the solver"
                )
            return super().inverse(solver)
        return KfacInverse(self, regularization, damping)

    def _move(self, device: torch.device) -> Self:
        moved = self._copy_on(device)
        moved.blocks = {}
        for name, block in self.blocks.items():
            there = block.to(device)
            assert isinstance(there, EigenOperator)
            moved.blocks[name] = there
        moved._positions = {
            name: where if isinstance(where, slice) else where.to(device)
            for name, where in self._positions.items()
        }
        moved._hold(self.eigenvalues.to(device))
        return moved

    def _children(self) -> Sequence[TensorOperator]:
        return tuple(self.blocks.values())


class KfacInverse(DirectInverse):
    r"""The damped inverse of a (E)KFAC operator, block by block; see ``KfacOperator.inverse``.

    Args:
        operator: K.
        regularization: λ, for all blocks or for each.
        damping: ``"exact"`` or ``"factored-tikhonov"``.

    Attributes:
        block_regularization: λ by block.
        inverse_map: The inverse, with its eigen-decomposition.

    Raises:
        HessopsError: See `KfacOperator.inverse`.

    Example:
        >>> import torch
        >>> from hessops import Damping, KfacOperator
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> K = KfacOperator(model, torch.nn.MSELoss(), [(x, torch.zeros(2, 1))])
        >>> inverse = K.inverse(regularization=Damping(relative=0.4))  # of (1 + 4) / 2
        >>> inverse.apply(torch.ones(2)).round(decimals=4)
        tensor([0.5000, 0.2000])
        >>> inverse.with_regularization(3.0).apply(torch.ones(2)).round(decimals=4)
        tensor([0.2500, 0.1429])
    """

    def __init__(
        self,
        operator: BlockEigenOperator,
        regularization: Regularization = None,
        damping: DampingKind = "exact",
    ) -> None:
        if not isinstance(operator, BlockEigenOperator):
            raise ArgumentTypeError(
                f"operator must be a KfacOperator or one like it, got {type(operator).__name__}"
            )
        if damping not in DAMPING_KINDS:
            raise ArgumentError(f"damping must be one of {DAMPING_KINDS}, got {damping!r}")
        blocks = operator.blocks
        given = by_block(regularization, list(blocks))
        self.block_regularization = {
            name: resolved(given[name], block.trace() / block.input_size, name)
            for name, block in blocks.items()
        }
        self.damping: DampingKind = damping
        self._given = regularization
        values = set(self.block_regularization.values())
        # What is common to all blocks; the others have no single λ.
        super().__init__(operator, values.pop() if len(values) == 1 else None)
        self._system = self._damped(blocks)
        self.inverse_map = self._inverted()

    def _damped(self, blocks: Mapping[str, EigenOperator]) -> EigenOperator:
        """The operator that is inverted."""
        damped = []
        for name, block in blocks.items():
            value = self.block_regularization[name]
            if self.damping == "exact" or not isinstance(block, KroneckerOperator):
                damped.append(block.eigenvalues + value)
            elif block.factor_eigenvalues is None:
                raise ArgumentError(
                    "damping='factored-tikhonov' damps the two factors of KFAC, which corrected "
                    "eigenvalues do not have; use damping='exact'"
                )
            else:
                damped.append(block.factored_tikhonov(value).eigenvalues)
        return self._blocks._with_eigenvalues(torch.cat(damped))

    def _inverted(self) -> EigenOperator:
        sizes = {name: block.input_size for name, block in self._blocks.blocks.items()}
        shifts = [
            self._blocks.eigenvalues.new_full((size,), self.block_regularization[name])
            for name, size in sizes.items()
        ]
        damped = self._system.eigenvalues
        self._blocks._require_regular(damped, torch.cat(shifts))
        return self._blocks._with_eigenvalues(1 / damped)

    @property
    def _blocks(self) -> BlockEigenOperator:
        assert isinstance(self.operator, BlockEigenOperator)
        return self.operator

    @property
    def system(self) -> TensorOperator:
        """The damped operator that is inverted."""
        return self._system

    def _inverse_rows(self, rows: Tensor) -> Tensor:
        return self.inverse_map._product(rows)

    def _apply_rows(self, rows: Tensor) -> Tensor:
        # Orthogonal maps and a division: there is no residual to look at.
        return self._inverse_rows(rows)

    def with_regularization(self, regularization: Regularization) -> KfacInverse:
        """The same inverse for another λ, or others; the eigenvectors are shared."""
        return KfacInverse(self._blocks, regularization, self.damping)

    def refresh(self) -> Self:
        """Lets K take a new copy of its model, and inverts it anew, in place; returns itself.

        A `Damping` is then relative to the new curvature. Where it fails, the inverse stays as is.
        """
        anew = KfacInverse(self._blocks.refresh(), self._given, self.damping)
        vars(self).update(vars(anew))
        return self

    def _known_map(self) -> TensorOperator:
        return self.inverse_map

    def _closed_form_inverse(self, shift: float) -> TensorOperator:
        # (D⁻¹ + s)⁻¹ in the same eigenbasis.
        return self._system if shift == 0 else self.inverse_map._closed_form_inverse(shift)

    def _move(self, device: torch.device) -> Self:
        moved = super()._move(device)
        for name in ("_system", "inverse_map"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def _label(self) -> str:
        values = self.block_regularization
        shown = (
            f"{self.regularization:g}"
            if len(set(values.values())) == 1
            else described({name: float(f"{value:.6g}") for name, value in values.items()})
        )
        kind = "" if self.damping == "exact" else f", damping={self.damping!r}"
        return f"KfacInverse(regularization={shown}{kind})"


def _positions(space: ParameterSpace, names: Sequence[str]) -> slice | Tensor:
    """Where some parameters are in the flat vector; a slice where they follow one another."""
    first = space.names.index(names[0])
    if space.names[first : first + len(names)] == tuple(names):
        return slice(space.slices[names[0]].start, space.slices[names[-1]].stop)
    return space.indices(names)
