"""Influence models: one for each way to invert the curvature."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from hessops.errors import ArgumentError, ArgumentTypeError, StructureError
from hessops.functional.approximation import operator_spectral_approximation
from hessops.functional.low_rank import LowRankProductRepresentation
from hessops.functional.nystroem import operator_nystroem_approximation
from hessops.influence.blocks import BlockStructure
from hessops.influence.model import CommonSettings, InfluenceFunctionModel
from hessops.influence.modes import BlockMode, SecondOrderMode
from hessops.isolation import isolated
from hessops.operators.base import TensorOperator
from hessops.operators.curvature import POINT_AVERAGING, BatchOperator, InverseHarmonicMeanOperator
from hessops.operators.damping import Regularization
from hessops.operators.dense import DirectSolveOperator, MatrixOperator
from hessops.operators.inverse import InverseOperator
from hessops.operators.low_rank import LowRankOperator, LowRankProductOperator
from hessops.point_loss import Loss
from hessops.preconditioners import Preconditioner
from hessops.solvers import CgOperator, LissaOperator
from hessops.solvers.lissa import Scale
from hessops.validation import checked_count, checked_number

# Without a regularization, eigenvalues below this multiple of P·ε of the largest are left out.
CUTOFF_FACTOR = 10

InverseRecipe = Callable[[TensorOperator], TensorOperator]
CurvatureRecipe = Callable[..., TensorOperator]


class DirectInfluence(InfluenceFunctionModel):
    r"""Influences by a direct solve with the explicit matrix of each block.

    `fit` makes the matrix of a block of size P by P products and factorises it. For models of up to
    some thousand parameters, or blocks of that size; exact, and the reference for the others.

    Arguments and errors are those of `InfluenceFunctionModel`; a matrix that is singular to working
    precision is refused (`SingularOperatorError`), and one that does not fit (`MemoryLimitError`).

    Example:
        >>> import torch
        >>> from hessops.influence import DirectInfluence
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x, y = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)  # gradients 2 and 18, Hessian 10
        >>> influence = DirectInfluence(model, torch.nn.MSELoss()).fit([(x, y)])
        >>> influence.influences(x[:1], y[:1], x, y)
        tensor([[0.4000, 3.6000]])
    """

    needs_data = False
    kept_type = MatrixOperator

    def _approximate(self, operator: TensorOperator) -> TensorOperator:
        matrix = operator.to_dense()
        if operator.symmetric:
            matrix = (matrix + matrix.T) / 2
        return MatrixOperator(
            matrix,
            symmetric=operator.symmetric,
            positive_semidefinite=operator.positive_semidefinite,
            space=operator.space,
            copy=False,
        )

    def _invert(self, operator: TensorOperator, regularization: float) -> TensorOperator:
        assert isinstance(operator, MatrixOperator)
        return DirectSolveOperator(operator.matrix, regularization, space=operator.space)


class _SolverInfluence(InfluenceFunctionModel):
    """An inverse by a solver, which adapts to another λ what it found out about the operator."""

    # The arguments of the solver beyond operator and λ.
    _settings: dict[str, Any]

    def _reinvert(
        self, inverse: TensorOperator, operator: TensorOperator, regularization: float
    ) -> TensorOperator:
        assert isinstance(inverse, InverseOperator)
        return inverse.with_regularization(regularization)


class CgInfluence(_SolverInfluence):
    """Influences by conjugate gradients; nothing of the size of a matrix is made.

    See `hessops.CgOperator` for the arguments after `second_order_mode`, the outcomes of a solve
    and what is raised; ``inverses[block].solve(rhs)`` tells how well a right-hand side was solved.
    A `preconditioner` is fitted to each block by `fit`. All other arguments and errors are those of
    `InfluenceFunctionModel`.

    Args:
        rtol: Relative tolerance; ``None`` is 1e-7 in float64 and 1e-4 in float32.
        atol: Absolute tolerance.
        maxiter: Most steps; ``None`` is ten times the size of the block.
        progress: Shows a progress bar.
        preconditioner: A `Preconditioner`, or with a single block also an operator.
        use_block_cg: Shares one Krylov space among the right-hand sides.
        warn_on_max_iteration: Whether a solve that stops short warns.

    Example:
        >>> import torch
        >>> from hessops.influence import CgInfluence
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x, y = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
        >>> influence = CgInfluence(model, torch.nn.MSELoss(), rtol=1e-6).fit([(x, y)])
        >>> influence.influences(x[:1], y[:1], x, y)
        tensor([[0.4000, 3.6000]])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        regularization: Regularization = None,
        block_structure: BlockStructure = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
        rtol: float | None = None,
        atol: float = 0.0,
        maxiter: int | None = None,
        progress: bool = False,
        preconditioner: Preconditioner | TensorOperator | None = None,
        use_block_cg: bool = False,
        warn_on_max_iteration: bool = True,
        **common: Unpack[CommonSettings],
    ) -> None:
        super().__init__(model, loss, regularization, block_structure, second_order_mode, **common)
        if isinstance(preconditioner, TensorOperator) and len(self.block_names) > 1:
            raise ArgumentTypeError(
                "preconditioner is an operator, which fits one block only, and there are "
                f"{len(self.block_names)}: pass a Preconditioner, which is fitted to each"
            )
        self._settings = {
            "rtol": rtol,
            "atol": atol,
            "maxiter": maxiter,
            "progress": progress,
            "preconditioner": preconditioner,
            "use_block_cg": use_block_cg,
            "warn_on_max_iteration": warn_on_max_iteration,
        }

    def _invert(self, operator: TensorOperator, regularization: float) -> TensorOperator:
        inverse = CgOperator(operator, regularization, **self._settings)
        with isolated(operator.device):
            inverse.fitted_preconditioner()
        return inverse


class LissaInfluence(_SolverInfluence):
    """Influences by LiSSA, a recursion over the batches of the training data.

    See `hessops.LissaOperator` for the arguments after `second_order_mode`, what the recursion
    tends to, and what is raised where it diverges. All other arguments and errors are those of
    `InfluenceFunctionModel`.

    Args:
        maxiter: Most steps; a step is one batch.
        dampen: d, 0 <= d < 2, which adds d·s to the diagonal.
        scale: s, or ``"auto"``.
        h0: h at the beginning, ``(P,)``, with a single block; ``None`` is the right-hand side.
        rtol: Relative tolerance.
        progress: Shows a progress bar.
        warn_on_max_iteration: Whether a solve that stops short warns.
        num_chains: Chains that are averaged.

    Example:
        >>> import torch
        >>> from hessops.influence import LissaInfluence
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x, y = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
        >>> influence = LissaInfluence(model, torch.nn.MSELoss(), scale="auto").fit([(x, y)])
        >>> influence.influences(x[:1], y[:1], x, y).round(decimals=3)
        tensor([[0.4000, 3.6000]])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        regularization: Regularization = None,
        block_structure: BlockStructure = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
        maxiter: int = 1000,
        dampen: float = 0.0,
        scale: Scale = 10.0,
        h0: Tensor | None = None,
        rtol: float = 1e-4,
        progress: bool = False,
        warn_on_max_iteration: bool = True,
        *,
        num_chains: int = 1,
        **common: Unpack[CommonSettings],
    ) -> None:
        super().__init__(model, loss, regularization, block_structure, second_order_mode, **common)
        if h0 is not None and not isinstance(h0, Tensor):
            raise ArgumentTypeError(f"h0 must be a tensor or None, got {type(h0).__name__}")
        if h0 is not None and len(self.block_names) > 1:
            raise ArgumentError(
                f"h0 is for one block, and there are {len(self.block_names)}: leave it out"
            )
        self._settings = {
            "maxiter": maxiter,
            "dampen": dampen,
            "scale": scale,
            "h0": None if h0 is None else h0.detach().clone(),
            "rtol": rtol,
            "progress": progress,
            "warn_on_max_iteration": warn_on_max_iteration,
            "num_chains": num_chains,
        }

    def _invert(self, operator: TensorOperator, regularization: float) -> TensorOperator:
        if not isinstance(operator, BatchOperator):
            raise StructureError(
                f"LiSSA steps over batches, which {type(operator).__name__} does not have; use "
                "LissaOperator.from_operator in an Influence"
            )
        return LissaOperator(
            operator.batch_operation,
            operator.stream,
            regularization,
            **self._settings,
            generator=self.generator,
            averaging=operator.averaging,
        )


class _LowRankInfluence(InfluenceFunctionModel):
    """An inverse from r eigenpairs of each block."""

    needs_data = False
    kept_type = LowRankProductOperator

    @abstractmethod
    def _pairs(self, operator: TensorOperator) -> LowRankProductRepresentation:
        """The hook for the eigenpairs of a block."""

    @abstractmethod
    def _inverts_complement(self, regularization: float) -> bool:
        """The hook for whether what the eigenpairs leave out is inverted too, as 1/λ."""

    def _approximate(self, operator: TensorOperator) -> TensorOperator:
        return LowRankProductOperator(self._pairs(operator), space=operator.space)

    def _invert(self, operator: TensorOperator, regularization: float) -> TensorOperator:
        assert isinstance(operator, LowRankProductOperator)
        pairs, exact = operator.low_rank_representation, self._inverts_complement(regularization)
        if regularization == 0:
            pairs = _without_zeros(pairs)
        return LowRankOperator(pairs, regularization, exact, space=operator.space)


def _without_zeros(pairs: LowRankProductRepresentation) -> LowRankProductRepresentation:
    """The pairs whose eigenvalue is not rounding, for a pseudo-inverse."""
    sizes = pairs.eigen_vals.abs()
    if not len(sizes):
        return pairs
    cutoff = CUTOFF_FACTOR * len(pairs.projections) * torch.finfo(pairs.dtype).eps
    kept = sizes > cutoff * sizes.max()
    return replace(
        pairs,
        eigen_vals=pairs.eigen_vals[kept],
        projections=pairs.projections[:, kept].contiguous(),
    )


class ArnoldiInfluence(_LowRankInfluence):
    r"""Influences by the dominant eigenpairs of each block, by the method of Lanczos.

    .. math:: V (D + \lambda I)^{-1} V^\top b

    for the r eigenvalues D of largest absolute value and their eigenvectors V (Schioppa et al.
    2022); with ``use_woodbury=True`` also :math:`\lambda^{-1} (I - V V^\top) b`. Without a
    regularization it is the pseudo-inverse of rank r: eigenvalues below 10·P·ε of the largest,
    with ε the precision of the dtype, are left out. See
    `hessops.functional.operator_spectral_approximation` for the arguments from `krylov_dimension`
    to `eigen_computation_on_gpu`. Other arguments and errors are those of `InfluenceFunctionModel`.

    Args:
        rank: r; all eigenpairs of a block that is not larger.
        krylov_dimension: Vectors of the Krylov basis.
        tol: Relative accuracy of the eigenvalues.
        max_iter: Most restarts.
        eigen_computation_on_gpu: Uses cupy; needs a model on a CUDA device.
        use_woodbury: Whether the complement of the eigenspace is inverted too.

    Example:
        >>> import torch
        >>> from hessops.influence import ArnoldiInfluence
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x, y = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
        >>> influence = ArnoldiInfluence(model, torch.nn.MSELoss(), rank=1).fit([(x, y)])
        >>> influence.influences(x[:1], y[:1], x, y)
        tensor([[0.4000, 3.6000]])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        regularization: Regularization = None,
        block_structure: BlockStructure = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
        rank: int = 10,
        krylov_dimension: int | None = None,
        tol: float = 1e-6,
        max_iter: int | None = None,
        eigen_computation_on_gpu: bool = False,
        use_woodbury: bool = False,
        **common: Unpack[CommonSettings],
    ) -> None:
        super().__init__(model, loss, regularization, block_structure, second_order_mode, **common)
        self.rank = checked_count(rank, "rank")
        self.krylov_dimension = krylov_dimension
        self.tol = checked_number(tol, "tol", minimum=0)
        self.max_iter = max_iter
        self.eigen_computation_on_gpu = eigen_computation_on_gpu
        self.use_woodbury = use_woodbury

    def _pairs(self, operator: TensorOperator) -> LowRankProductRepresentation:
        return operator_spectral_approximation(
            operator,
            self.rank,
            self.krylov_dimension,
            self.tol,
            self.max_iter,
            self.eigen_computation_on_gpu,
            generator=self.generator,
        )

    def _inverts_complement(self, regularization: float) -> bool:
        return self.use_woodbury


class NystroemSketchInfluence(_LowRankInfluence):
    r"""Influences by a randomized Nyström sketch of each block.

    .. math:: U (\Sigma + \lambda I)^{-1} U^\top b + \lambda^{-1} (I - U U^\top) b

    (Hataya & Yamada 2023), from one product with `rank` columns. Without a regularization it is the
    pseudo-inverse of rank r, :math:`U \Sigma^{-1} U^\top b`: eigenvalues below 10·P·ε of the
    largest, with ε the precision of the dtype, are left out, and so is the second term. Of a
    curvature that is not positive semi-definite the positive part is sketched, with an
    `IndefiniteSketchWarning`. Other arguments and errors are those of `InfluenceFunctionModel`.

    Args:
        rank: Columns of the sketch of each block; its size where that is smaller.

    Example:
        >>> import torch
        >>> from hessops.influence import NystroemSketchInfluence
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x, y = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
        >>> influence = NystroemSketchInfluence(model, torch.nn.MSELoss(), rank=1).fit([(x, y)])
        >>> influence.influences(x[:1], y[:1], x, y).round(decimals=4)
        tensor([[0.4000, 3.6000]])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        regularization: Regularization = None,
        block_structure: BlockStructure = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
        rank: int = 10,
        **common: Unpack[CommonSettings],
    ) -> None:
        super().__init__(model, loss, regularization, block_structure, second_order_mode, **common)
        self.rank = checked_count(rank, "rank")

    def _pairs(self, operator: TensorOperator) -> LowRankProductRepresentation:
        rank = min(self.rank, operator.input_size)
        return operator_nystroem_approximation(operator, rank, generator=self.generator)

    def _inverts_complement(self, regularization: float) -> bool:
        return regularization > 0


class InverseHarmonicMeanInfluence(InfluenceFunctionModel):
    r"""Influences by the mean of the inverses of damped gradient outer products.

    .. math:: \frac1N \sum_i (g_i g_i^\top + \lambda I)^{-1} b

    (Kwon et al. 2024, DataInf, who take :math:`\lambda` = ``Damping(relative=0.1)`` for each
    layer), in place of the inverse of the empirical Gauss-Newton matrix. `fit` is one pass that
    checks the data; factors are one pass. All other arguments and errors are those of
    `InfluenceFunctionModel`.

    Args:
        regularization: λ > 0; a relative one is of the mean of :math:`\lVert g_i\rVert^2 / P`.

    Raises:
        ArgumentError: `regularization` is not positive.

    Example:
        >>> import torch
        >>> from hessops.influence import InverseHarmonicMeanInfluence
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x, y = torch.tensor([[0.0], [1.0]]), torch.zeros(2, 1)  # gradients 0 and 2
        >>> influence = InverseHarmonicMeanInfluence(model, torch.nn.MSELoss(), 1.0).fit([(x, y)])
        >>> influence.influence_factors(x, y)  # (1 + 1/5) / 2 of the gradients
        tensor([[0.0000],
                [1.2000]])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        regularization: Regularization,
        block_structure: BlockStructure = BlockMode.FULL,
        **common: Unpack[CommonSettings],
    ) -> None:
        if "second_order_mode" in common:
            raise ArgumentTypeError(
                "second_order_mode is not a choice here: it is the empirical Gauss-Newton matrix "
                "that is inverted"
            )
        super().__init__(
            model, loss, regularization, block_structure, SecondOrderMode.GAUSS_NEWTON, **common
        )
        for name, damping in self._dampings.items():
            value = damping if isinstance(damping, float) else damping.relative
            checked_number(value, f"regularization of {name!r}", minimum=0, exclusive=True)

    def _curvature(self, dataloader: Iterable[object]) -> TensorOperator:
        # The regularization of each block replaces this one.
        return InverseHarmonicMeanOperator(
            self.model,
            self.loss,
            dataloader,
            1.0,
            self._space.names,
            reduction=self.reduction,
            averaging=self.averaging,
            cache=self.cache,
            unpack=self.unpack,
        )

    def _invert(self, operator: TensorOperator, regularization: float) -> TensorOperator:
        assert isinstance(operator, InverseHarmonicMeanOperator)
        return operator.with_regularization(regularization)

    def _mean_eigenvalue(self, operator: TensorOperator) -> float:
        assert isinstance(operator, InverseHarmonicMeanOperator)
        return operator.mean_squared_gradient() / operator.input_size


class Influence(InfluenceFunctionModel):
    r"""Influences by any recipe from an operator to its inverse.

    Args:
        inverse: From the operator :math:`A + \lambda I` of a block to its inverse, like the
            argument of `hessops.TensorOperator.inverse`: a class of solver, one with arguments
            bound to it, or a function. ``None`` is `hessops.CgOperator`.
        curvature: From ``(model, loss, dataloader, names)`` to the operator A on the parameters of
            those names, in place of `second_order_mode`: a class like `hessops.HessianOperator`, or
            a function.

    Raises:
        ArgumentTypeError: `inverse` or `curvature` cannot be called.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from hessops import MinresOperator
        >>> from hessops.influence import Influence
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x, y = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
        >>> recipe = partial(MinresOperator, rtol=1e-6)
        >>> influence = Influence(model, torch.nn.MSELoss(), inverse=recipe).fit([(x, y)])
        >>> influence.influences(x[:1], y[:1], x, y)
        tensor([[0.4000, 3.6000]])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        regularization: Regularization = None,
        block_structure: BlockStructure = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
        inverse: InverseRecipe | None = None,
        *,
        curvature: CurvatureRecipe | None = None,
        **common: Unpack[CommonSettings],
    ) -> None:
        super().__init__(model, loss, regularization, block_structure, second_order_mode, **common)
        for name, recipe in (("inverse", inverse), ("curvature", curvature)):
            if recipe is not None and not callable(recipe):
                raise ArgumentTypeError(f"{name} must be callable, got {type(recipe).__name__}")
        self.inverse_recipe: InverseRecipe = CgOperator if inverse is None else inverse
        self.curvature_recipe = curvature
        if curvature is not None and self.averaging is not POINT_AVERAGING:
            raise ArgumentError(
                "averaging is given beside curvature: let the operator that curvature returns "
                "average"
            )

    def _curvature(self, dataloader: Iterable[object]) -> TensorOperator:
        if self.curvature_recipe is None:
            return super()._curvature(dataloader)
        operator = self.curvature_recipe(self.model, self.loss, dataloader, self._space.names)
        if not isinstance(operator, TensorOperator):
            raise ArgumentTypeError(
                f"curvature must return a TensorOperator, got {type(operator).__name__}"
            )
        fits = operator.space is None or operator.space == self._space
        if operator.input_size != self._space.size or not fits:
            raise StructureError(
                f"curvature returned an operator on {operator.space or operator.input_size} for "
                f"the parameters {list(self._space.names)}"
            )
        return operator

    def _invert(self, operator: TensorOperator, regularization: float) -> TensorOperator:
        shifted = operator.shift(regularization) if regularization else operator
        return shifted.inverse(self.inverse_recipe)
