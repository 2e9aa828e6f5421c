"""InfluenceFunctionModel: what every influence model has, whatever inverts its curvature."""

from __future__ import annotations

import copy
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Self, TypedDict

import torch
from torch import Tensor, nn

from hessops.batch.averaging import Averaging
from hessops.copies import Copyable
from hessops.errors import (
    ArgumentError,
    ArgumentTypeError,
    ModelError,
    NotFittedError,
    StoreError,
    StructureError,
    UncoveredParametersWarning,
)
from hessops.hashing import plain_items, word_of_values
from hessops.influence.arguments import SILENT, changed_settings, recorded_constructor
from hessops.influence.bilinear import BilinearForm
from hessops.influence.blocks import BlockStructure, blocks_of
from hessops.influence.description import (
    Description,
    describe,
    describe_class,
    describe_modules,
    digest_of_generator,
)
from hessops.influence.fitted import FittedBlock, FittedModel, TrainingData
from hessops.influence.gradients import GradientProvider, checked_factors
from hessops.influence.modes import BlockMode, InfluenceMode, SecondOrderMode, checked_mode
from hessops.influence.persistence import SavedFit, load_fit, save_fit
from hessops.objective import Objective
from hessops.operators.algebra import require_compatible
from hessops.operators.base import TensorOperator
from hessops.operators.curvature import (
    POINT_AVERAGING,
    BatchOperator,
    CurvatureOperator,
    GaussNewtonOperator,
    GeneralizedGaussNewtonOperator,
    HessianOperator,
)
from hessops.operators.damping import (
    BlockRegularization,
    Damping,
    Regularization,
    by_block,
    mean_eigenvalue,
    resolved,
)
from hessops.operators.dense import MatrixOperator
from hessops.operators.diagonal import DiagonalBlock
from hessops.operators.eigen import EigenOperator
from hessops.point_loss import Loss, Reduction
from hessops.printed import Node, Printed, counted, name_of
from hessops.processes import ONE_PROCESS
from hessops.randomness import resolved_generator
from hessops.space import ParameterSpace
from hessops.streaming import Batch, BatchStream
from hessops.streaming import Unpack as RawUnpack

logger = logging.getLogger(__name__)

CURVATURES: Mapping[SecondOrderMode, type[CurvatureOperator]] = {
    SecondOrderMode.HESSIAN: HessianOperator,
    SecondOrderMode.GAUSS_NEWTON: GaussNewtonOperator,
    SecondOrderMode.GENERALIZED_GAUSS_NEWTON: GeneralizedGaussNewtonOperator,
}


class CommonSettings(TypedDict, total=False):
    """The keyword arguments that every influence model takes; see `InfluenceFunctionModel`."""

    reduction: Reduction
    unpack: RawUnpack | None
    cache: str | bool | int
    averaging: Averaging
    generator: torch.Generator | None


class InfluenceFunctionModel(Copyable, Printed, ABC):
    r"""Influences of training points on the losses of other points.

    With :math:`g(z) = \nabla_\theta \ell(z; \theta)` and A the curvature of the mean training loss
    :math:`\frac1N \sum_i \ell_i`, the influence of a training point z on a test point z' is

    .. math:: \mathcal I(z', z) = \langle g(z'), (A + \lambda I)^{-1} g(z)\rangle

    in mode UP. Leaving z out of the training set moves the trained parameters by about
    :math:`\frac1N (A + \lambda I)^{-1} g(z)` and so the loss on z' by :math:`+\frac1N \mathcal I`:
    a positive influence is one of a helpful point, a negative one of a harmful one (Koh & Liang
    2017, whose :math:`\mathcal I_{\mathrm{up,loss}}` has the opposite sign). In mode PERTURBATION
    it is :math:`\nabla_x \mathcal I(z', (x, y))`, of the shape of x: moving the input of z by δ
    changes the loss on z' by about :math:`-\frac1N \langle \nabla_x \mathcal I, \delta\rangle`.

    Abstract: a subclass defines ``_invert(operator, regularization)``, from the curvature A of a
    block and its λ to an operator close to :math:`(A + \lambda I)^{-1}`. It may also define
    ``_approximate(operator)``, what of A is kept after `fit`, and ``_curvature(dataloader)``.

    Args:
        model: A module. `fit` works on a copy of it; see `Objective` for what is required.
        loss: ``loss(output, target)``.
        regularization: λ >= 0, or a `Damping` relative to each block; or one for each block, as a
            mapping by block name or a sequence in the order of the blocks. ``None`` is 0.
        block_structure: Which parameters interact: a `BlockMode` or its name, or a mapping from
            block names to lists of parameter names. Its order means nothing.
        second_order_mode: The curvature A: a `SecondOrderMode` or its name.
        reduction: What `loss` returns: ``"mean"``, ``"sum"`` or ``"none"``; see `Objective`.
        unpack: Function from a raw batch of a loader to ``(x, y)``; ``None`` expects pairs.
        cache: What of the training data may be kept on the device; see `BatchStream`.
        averaging: The weights of the batches of training data; see `hessops.BatchOperator`. With a
            `hessops.DistributedAveraging` every process fits on its shard of them, and takes part
            wherever factors are solved for; points are scored by each process alone.
        generator: Draws what is random; without one, `torch.manual_seed` decides.

    Raises:
        ArgumentTypeError, ArgumentError: An argument that is something else.
        ParameterNameError: A block with an unknown or frozen parameter, one in two blocks, or an
            empty block; a `regularization` for other blocks.
        HessopsError: The model is unsuitable; see `ParameterSpace.from_model`.

    Example:
        A new model is the choice of an inverse:

        >>> import torch
        >>> from hessops import MinresOperator
        >>> from hessops.influence import InfluenceFunctionModel
        >>> class MinresInfluence(InfluenceFunctionModel):
        ...     def _invert(self, operator, regularization):
        ...         return MinresOperator(operator, regularization)
        >>> x, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.ones(3, 1)
        >>> influence = MinresInfluence(torch.nn.Linear(1, 1), torch.nn.MSELoss(), 0.01)
        >>> influence.fit([(x, y)]).influences(x[:1], y[:1], x, y).shape
        torch.Size([1, 3])
    """

    # Whether what `fit` finds needs the training data again, and not just what it kept of them.
    needs_data: ClassVar[bool] = True
    # What `_approximate` returns.
    kept_type: ClassVar[type[TensorOperator]] = TensorOperator

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Lets every constructor accept the historical keywords, and remember its arguments."""
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = recorded_constructor(cls.__init__, InfluenceFunctionModel.__init__)  # type: ignore[method-assign]  # same signature

    @recorded_constructor
    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        regularization: Regularization = None,
        block_structure: BlockStructure = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
        *,
        reduction: Reduction = "mean",
        unpack: RawUnpack | None = None,
        cache: str | bool | int = "auto",
        averaging: Averaging = POINT_AVERAGING,
        generator: torch.Generator | None = None,
    ) -> None:
        self.model, self.loss = model, loss
        self.block_structure = block_structure
        self._trainable = ParameterSpace.from_model(model).names
        self._space, self._blocks = blocks_of(model, block_structure)
        self._dampings = by_block(regularization, list(self._blocks))
        self.second_order_mode = checked_mode(
            second_order_mode, SecondOrderMode, "second_order_mode"
        )
        self.reduction: Reduction = reduction
        if unpack is not None and not callable(unpack):
            raise ArgumentTypeError(f"unpack must be callable, got {type(unpack).__name__}")
        self.unpack = unpack
        self.cache = cache
        if not isinstance(averaging, Averaging):
            raise ArgumentTypeError(
                f"averaging must be an Averaging, got {averaging!r}; use PointAveraging()"
            )
        self.averaging = averaging
        if generator is not None:
            resolved_generator(generator)
        self.generator = generator
        self._fit: FittedModel | None = None

    # --- what a subclass defines ---------------------------------------------------------

    @abstractmethod
    def _invert(self, operator: TensorOperator, regularization: float) -> TensorOperator:
        """The hook: an operator close to (A + λI)⁻¹, for A what `_approximate` kept of a block."""

    def _reinvert(
        self, inverse: TensorOperator, operator: TensorOperator, regularization: float
    ) -> TensorOperator:
        """The hook for `with_regularization`: as `_invert`, given the inverse for another λ."""
        return self._invert(operator, regularization)

    def _approximate(self, operator: TensorOperator) -> TensorOperator:
        """The hook for what is kept of the curvature of a block: all of it."""
        return operator

    def _curvature(self, dataloader: Iterable[object]) -> TensorOperator:
        """The hook for A on the covered parameters, in their order."""
        return CURVATURES[self.second_order_mode](
            self.model,
            self.loss,
            dataloader,
            self._space.names,
            reduction=self.reduction,
            averaging=self.averaging,
            cache=self.cache,
            unpack=self.unpack,
        )

    def _split(self, operator: TensorOperator) -> dict[str, TensorOperator]:
        """The hook for the diagonal blocks of A, by block."""
        if len(self._blocks) == 1:
            return dict.fromkeys(self._blocks, operator)
        if isinstance(operator, BatchOperator) and operator.objective is not None:
            return {name: operator.restricted(b.names) for name, b in self._blocks.items()}
        return {
            name: DiagonalBlock(operator, self._space.indices(block.names), block)
            for name, block in self._blocks.items()
        }

    def _mean_eigenvalue(self, operator: TensorOperator) -> float:
        """The hook for the scale of a relative damping."""
        return mean_eigenvalue(operator, self.generator)

    # --- fitting -------------------------------------------------------------------------

    def fit(self, dataloader: Iterable[object]) -> Self:
        """Takes a copy of the model as it is now, checks the training data, and fits the inverses.

        Args:
            dataloader: The training data: a ``DataLoader``, list of batches or other iterable that
                can be iterated again.

        Returns:
            Itself. Where an error is raised, an earlier fit stays as it was.

        Raises:
            HessopsError: See `Objective` for the model and the loss, `BatchStream` for the data,
                and the operator that inverts.
        """
        self._fit = self._fitted_on(dataloader)
        logger.info("%s is fitted: %s", type(self).__name__, self._fit.summary)
        return self

    def _fitted_on(
        self, dataloader: Iterable[object], known: Mapping[str, float] | None = None
    ) -> FittedModel:
        """What `fit` finds; `known` are mean eigenvalues that need not be estimated."""
        randomness = digest_of_generator(self.generator)
        processes = self.averaging.processes
        processes.require_equal("settings of the influence model", self._hash_of_settings)
        with processes.together():
            self._follow_model()
        operator = self._curvature(dataloader)
        data = TrainingData.under(operator)
        provider = GradientProvider(self._objective_of(operator))
        blocks = {
            name: self._fitted_block(name, block, (known or {}).get(name))
            for name, block in self._split(operator).items()
        }
        return FittedModel(provider, blocks, data, randomness)

    def _hash_of_settings(self) -> int:
        """A hash of the regularization, and of what else is numbers and words."""
        settings = plain_items(_without_silent_keys(self._arguments))
        dampings = sorted((name, repr(damping)) for name, damping in self._dampings.items())
        return word_of_values([type(self).__name__, dampings, settings])

    def _follow_model(self) -> None:
        """Takes note of another dtype or device of the user's model.

        Raises:
            ModelError: It has other trainable parameters than when this model was made.
        """
        now = ParameterSpace.from_model(self.model).names
        if now != self._trainable:
            differing = sorted({*now} ^ {*self._trainable})
            raise ModelError(
                f"the trainable parameters of model changed since {type(self).__name__} was made "
                f"({differing}): make a new one"
            )
        if ParameterSpace.from_model(self.model, self._space.names) != self._space:
            with warnings.catch_warnings():  # said when it was made
                warnings.simplefilter("ignore", UncoveredParametersWarning)
                self._space, self._blocks = blocks_of(self.model, self.block_structure)

    def _objective_of(self, operator: TensorOperator) -> Objective:
        """The model and the loss whose gradients are taken, copied once where that is possible."""
        objective = operator.objective if isinstance(operator, BatchOperator) else None
        if objective is not None and objective.is_of(self.model, self.loss, self.reduction):
            return objective
        return Objective(self.model, self.loss, self._space.names, reduction=self.reduction)

    def _fitted_block(
        self, name: str, operator: TensorOperator, known_mean: float | None
    ) -> FittedBlock:
        kept = self._approximate(operator)
        return self._damped(name, operator, kept, known_mean, None)

    def _damped(
        self,
        name: str,
        operator: TensorOperator | None,
        kept: TensorOperator,
        mean: float | None,
        previous: TensorOperator | None,
    ) -> FittedBlock:
        """The inverse of a block for the λ that is asked for, from the one for another λ if any."""
        damping = self._dampings[name]
        if mean is None and isinstance(damping, Damping):
            mean = self._scale(name, operator, kept)
        regularization = resolved(damping, mean, name)
        inverse = (
            self._invert(kept, regularization)
            if previous is None
            else self._reinvert(previous, kept, regularization)
        )
        return FittedBlock(
            space=self._blocks[name].to(kept.device),
            operator=operator,
            kept=kept,
            mean_eigenvalue=mean,
            regularization=regularization,
            inverse=_checked_inverse(inverse, kept),
        )

    def _scale(self, name: str, operator: TensorOperator | None, kept: TensorOperator) -> float:
        if isinstance(kept, (MatrixOperator, EigenOperator)):
            return self._mean_eigenvalue(kept)
        if operator is None:
            raise ArgumentError(
                f"the mean eigenvalue of block {name!r} is not in the file it was loaded from: "
                "pass an absolute regularization, or fit"
            )
        return self._mean_eigenvalue(operator)

    def with_regularization(self, regularization: Regularization) -> Self:
        """The same model for another λ, fitted if this one is, without another fit.

        Raises:
            HessopsError: As of the constructor, and of the operator that inverts.
        """
        changed = copy.copy(self)
        changed._arguments = {**self._arguments, "regularization": regularization}
        changed._dampings = by_block(regularization, list(self._blocks))
        if self._fit is not None:
            blocks = {
                name: changed._damped(
                    name, block.operator, block.kept, block.mean_eigenvalue, block.inverse
                )
                for name, block in self._fit.blocks.items()
            }
            changed._fit = replace(self._fit, blocks=blocks)
        return changed

    def save(self, path: str | Path) -> None:
        """Writes what was fitted to a file of tensors and numbers, whole or not at all.

        Matrices and eigenpairs are kept, and hashes of the parameters and the data; the model, the
        loss and the data are not. See `load`.

        Raises:
            NotFittedError: Before `fit`.
            StoreError: What was kept of a block cannot be written.
            OSError: Of the file system; an earlier file stays as it was.
        """
        save_fit(self.fitted, self.configuration(), path, with_kept=not self.needs_data)

    def load(self, path: str | Path, dataloader: Iterable[object] | None = None) -> Self:
        """Takes over what `save` wrote, in place of `fit`.

        Args:
            path: A file of a model of the same class, settings and parameters.
            dataloader: The training data, which models that solve by products with the curvature
                need again; others do without, and only compare them with the file.

        Returns:
            Itself. Where an error is raised, an earlier fit stays as it was.

        Raises:
            ArgumentError: The model needs `dataloader`.
            StoreError: The file is none, or was written by another model, for other parameters, or
                with other data.
            HessopsError: As of `fit`.
        """
        together = self.averaging.processes.together
        with together():
            self._follow_model()
            content = load_fit(path, self.configuration())
            if self.needs_data and dataloader is None:
                raise ArgumentError(
                    f"dataloader is needed: {type(self).__name__} solves by products with the "
                    "curvature of the training data, which the file does not hold"
                )
        if self.needs_data and dataloader is not None:
            # Where the data have no fingerprint, they may be others, of another scale.
            known = content.mean_eigenvalues if content.data.fingerprint else None
            fitted = self._fitted_on(dataloader, known)
            with together():
                content.require_parameters(fitted.provider.objective)
                content.require_data(fitted.data.fingerprint)
            self._fit = fitted
            return self
        found = None if dataloader is None else self._fingerprint_of(dataloader)
        with together():
            if found is not None:
                content.require_data(found)
            objective = Objective(
                self.model, self.loss, self._space.names, reduction=self.reduction
            )
            content.require_parameters(objective)
            self._fit = self._rebuilt(content, GradientProvider(objective))
        return self

    def _fingerprint_of(self, dataloader: Iterable[object]) -> str:
        processes = self.averaging.processes
        with processes.together():
            processes.require_shard(dataloader)
            stream = BatchStream(
                dataloader,
                unpack=self.unpack,
                cache=False,
                may_be_empty=processes is not ONE_PROCESS,
            )
        return stream.survey(processes)

    def _rebuilt(self, content: SavedFit, provider: GradientProvider) -> FittedModel:
        blocks = {}
        for name, space in self._blocks.items():
            kept = content.kept(name, space)
            if not isinstance(kept, self.kept_type):
                raise StoreError(
                    f"{content.path} holds a {type(kept).__name__} for block {name!r}, expected a "
                    f"{self.kept_type.__name__}"
                )
            mean = content.mean_eigenvalues.get(name)
            blocks[name] = self._damped(name, None, kept, mean, None)
        return FittedModel(provider, blocks, content.data, content.randomness)

    def to(self, device: torch.device | str) -> Self:
        """The same fitted model on another device; the user's model stays where it is."""
        moved = copy.copy(self)
        moved._fit = None if self._fit is None else self._fit.to(device)
        return moved

    # --- what was fitted -----------------------------------------------------------------

    @property
    def fitted(self) -> FittedModel:
        """What `fit` found.

        Raises:
            NotFittedError: Before `fit`.
        """
        if self._fit is None:
            raise NotFittedError(
                f"{type(self).__name__} is not fitted yet: call fit(train_loader) first"
            )
        return self._fit

    @property
    def is_fitted(self) -> bool:
        """Whether `fit` or `load` has run."""
        return self._fit is not None

    @property
    def space(self) -> ParameterSpace:
        """The parameters that the blocks cover, in the model's order."""
        return self._space if self._fit is None else self._fit.space

    @property
    def block_names(self) -> tuple[str, ...]:
        """The names of the blocks."""
        return tuple(self._blocks)

    @property
    def fitted_regularization(self) -> dict[str, float]:
        """λ by block."""
        return {name: block.regularization for name, block in self.fitted.blocks.items()}

    @property
    def inverses(self) -> dict[str, TensorOperator]:
        """The operator close to (A + λI)⁻¹, by block; a solver's `solve` tells how well it did."""
        return {name: block.inverse for name, block in self.fitted.blocks.items()}

    @property
    def inverse(self) -> TensorOperator:
        """All of them as one operator on the flat vector of the covered parameters."""
        return self.fitted.joint_inverse

    @property
    def gradient_provider(self) -> GradientProvider:
        """The gradients of points at the parameters of the fit."""
        return self.fitted.provider

    # --- factors -------------------------------------------------------------------------

    def influence_factors(self, x: object, y: object) -> Tensor:
        r"""The factors :math:`(A + \lambda I)^{-1} g_i` of n points.

        Args:
            x: Inputs of n points, as the model takes them.
            y: Their targets.

        Returns:
            ``(n, P)`` of the parameters' dtype, in the flat order of `space`.

        Raises:
            NotFittedError: Before `fit`.
            SolverError: A solve ended without an answer; see `InverseOperator`.
            HessopsError: The points do not fit; see `Objective.check`.

        Warns:
            ConvergenceWarning: A solve stopped short of its tolerance.
        """
        with self.inverse.processes.together():
            batch = self.fitted.provider.batch(x, y)
        return self.factors_of(batch)

    def factors_of(self, batch: Batch) -> Tensor:
        """As `influence_factors`, of a batch that was checked."""
        return self.fitted.factors(batch)

    def influence_factors_by_block(self, x: object, y: object) -> dict[str, Tensor]:
        """As `influence_factors`, block name -> ``(n, P_block)`` in the order of the block."""
        parts, inverses = self.fitted.gradients_by_block(x, y), self.inverses
        return {name: inverses[name].apply(part) for name, part in parts.items()}

    # --- influences ----------------------------------------------------------------------

    def influences_from_factors(
        self,
        factors: Tensor | Mapping[str, Tensor],
        x: object,
        y: object,
        mode: InfluenceMode | str = InfluenceMode.UP,
    ) -> Tensor:
        """The influences of n training points, from the factors of m test points.

        Args:
            factors: ``(m, P)`` from `influence_factors`, or a dictionary ``{name: (m, *shape)}``.
            x: Inputs of n >= 0 training points; for PERTURBATION a floating-point tensor.
            y: Their targets.
            mode: An `InfluenceMode` or its name.

        Returns:
            ``(m, n)`` for UP, ``(m, n, *x.shape[1:])`` for PERTURBATION.

        Raises:
            ArgumentError: An unknown `mode`.
            ShapeError, DtypeError, NonFiniteError: `factors` do not fit.
            HessopsError: As of `influence_factors`.
        """
        mode = checked_mode(mode, InfluenceMode, "mode")
        provider = self.fitted.provider
        flat = checked_factors(factors, provider.space, "factors")
        points = Batch.from_raw((x, y))
        if points.size == 0:  # as a process may have with a shard of a few points
            return provider.no_scores(flat, points, mode is InfluenceMode.PERTURBATION)
        return self.scores_of(flat, provider.batch(x, y), mode)

    def scores_of(self, factors: Tensor, batch: Batch, mode: InfluenceMode) -> Tensor:
        """As `influences_from_factors`, of what was checked."""
        return self.fitted.scores(factors, batch, mode)

    def influences(
        self,
        x_test: object,
        y_test: object,
        x: object = None,
        y: object = None,
        mode: InfluenceMode | str = InfluenceMode.UP,
    ) -> Tensor:
        """The influences of n training points on m test points.

        Args:
            x_test: Inputs of m test points.
            y_test: Their targets.
            x: Inputs of n training points; ``None`` takes the test points for both.
            y: Their targets.
            mode: An `InfluenceMode` or its name.

        Returns:
            ``(m, n)`` for UP, ``(m, n, *x.shape[1:])`` for PERTURBATION.

        Raises:
            HessopsError: As of `influence_factors` and `influences_from_factors`.
        """
        mode = checked_mode(mode, InfluenceMode, "mode")
        test, train = self._pair(x_test, y_test, x, y)
        if mode is InfluenceMode.UP:
            return self._scored(test, train)
        form = BilinearForm.of(self.inverse)
        return form.mixed_grads_inner_prod(test, train, self.fitted.provider)

    def _scored(self, test: Batch, train: Batch) -> Tensor:
        """The hook for `influences` in mode UP; `train` may be `test` itself."""
        form, other = BilinearForm.of(self.inverse), None if train is test else train
        return form.grads_inner_prod(test, other, self.fitted.provider)

    def self_influence(self, x: object, y: object) -> Tensor:
        """The influence of each point on itself, ``(n,)``: the diagonal of `influences`.

        Raises:
            HessopsError: As of `influence_factors`.
        """
        provider = self.fitted.provider
        with self.inverse.processes.together():
            rows = provider.rows(provider.batch(x, y))
        return (self.inverse.apply(rows) * rows).sum(dim=1)

    def influences_from_factors_by_block(
        self,
        factors: Mapping[str, Tensor] | Tensor,
        x: object,
        y: object,
        mode: InfluenceMode | str = InfluenceMode.UP,
    ) -> dict[str, Tensor]:
        """As `influences_from_factors`, by block; the sum over blocks is what that returns.

        Args:
            factors: From `influence_factors_by_block`, or ``(m, P)`` from `influence_factors`.
            x: Inputs of n training points.
            y: Their targets.
            mode: An `InfluenceMode` or its name.
        """
        mode, fitted = checked_mode(mode, InfluenceMode, "mode"), self.fitted
        flat, points = fitted.joined(factors), Batch.from_raw((x, y))
        if points.size == 0:
            by_input = mode is InfluenceMode.PERTURBATION
            return dict.fromkeys(fitted.blocks, fitted.provider.no_scores(flat, points, by_input))
        return fitted.block_scores(flat, fitted.provider.batch(x, y), mode)

    def influences_by_block(
        self,
        x_test: object,
        y_test: object,
        x: object = None,
        y: object = None,
        mode: InfluenceMode | str = InfluenceMode.UP,
    ) -> dict[str, Tensor]:
        """As `influences`, by block; the sum over blocks is what that returns."""
        mode = checked_mode(mode, InfluenceMode, "mode")
        test, train = self._pair(x_test, y_test, x, y)
        if mode is InfluenceMode.UP:
            return self._scored_by_block(test, train)
        return self.fitted.block_scores(self.factors_of(test), train, mode)

    def _scored_by_block(self, test: Batch, train: Batch) -> dict[str, Tensor]:
        """The hook for `influences_by_block` in mode UP; `train` may be `test` itself."""
        return self.fitted.block_scores(self.factors_of(test), train, InfluenceMode.UP)

    def self_influence_by_block(self, x: object, y: object) -> dict[str, Tensor]:
        """As `self_influence`, by block; the sum over blocks is what that returns."""
        parts, inverses = self.fitted.gradients_by_block(x, y), self.inverses
        return {
            name: (inverses[name].apply(part) * part).sum(dim=1) for name, part in parts.items()
        }

    def explore_regularization(
        self, x: object, y: object, values: Iterable[BlockRegularization]
    ) -> dict[BlockRegularization, dict[str, Tensor]]:
        """The influences of some points on each other for several λ, by block, without refitting.

        Args:
            x: Inputs of n points.
            y: Their targets.
            values: Regularizations, numbers or `Damping`.

        Returns:
            value -> block name -> ``(n, n)``.

        Raises:
            HessopsError: As of `with_regularization` and `influence_factors`.
        """
        fitted = self.fitted
        if isinstance(values, (str, Mapping)) or not isinstance(values, Iterable):
            raise ArgumentTypeError(
                f"values must be numbers or Dampings to try, as in [0.01, 0.1], got {values!r}"
            )
        values = list(values)
        if not all(isinstance(value, Hashable) for value in values):
            raise ArgumentTypeError(
                f"values must be numbers or Dampings, each for all blocks, got {values!r}"
            )
        parts = fitted.gradients_by_block(x, y)
        results = {}
        for value in values:
            inverses = self.with_regularization(value).inverses
            results[value] = {
                name: inverses[name].apply(part) @ part.T for name, part in parts.items()
            }
        return results

    def _pair(self, x_test: object, y_test: object, x: object, y: object) -> tuple[Batch, Batch]:
        with self.inverse.processes.together():
            return self._checked_pair(x_test, y_test, x, y)

    def _checked_pair(
        self, x_test: object, y_test: object, x: object, y: object
    ) -> tuple[Batch, Batch]:
        provider = self.fitted.provider
        if x is None and y is not None:
            raise ArgumentError("y is given without x: pass the training points as x and y")
        if x is not None and y is None and y_test is not None:
            raise ArgumentError("x is given without y: pass the targets of the training points")
        test = provider.batch(x_test, y_test)
        return test, test if x is None else provider.batch(x, y)

    # --- what it is ----------------------------------------------------------------------

    def configuration(self) -> dict[str, Description]:
        """The settings, in values that JSON has; equal for models that compute the same."""
        blocks = sorted(self._blocks.items())
        model, loss = self.model, self.loss
        if self._fit is not None:  # as they were then
            model, loss = self._fit.provider.objective.model, self._fit.provider.objective.loss
        return {
            "class": describe_class(type(self)),
            "blocks": {name: list(block.names) for name, block in blocks},
            "regularization": {name: describe(self._dampings[name]) for name, _ in blocks},
            "settings": describe(self._settings_in_full()),
            "model": describe_modules(model),
            "loss": describe(loss),
        }

    def _settings_in_full(self) -> dict[str, object]:
        """What the model holds beside model, loss, λ, blocks and fit, as it was understood."""
        apart = ("model", "loss", "block_structure", *SILENT)
        held = {key: value for key, value in vars(self).items() if key not in apart}
        of_base = ("_fit", "_arguments", "_space", "_blocks", "_dampings", "_trainable")
        settings = {key: _without_silent(held[key]) for key in held if key not in of_base}
        # Who holds the data has no part in what is computed from all of them.
        return {**settings, "averaging": self.averaging.within_process}

    def _node(self) -> Node:
        shown = [type(self.model).__name__, name_of(self.loss), *changed_settings(self)]
        head = f"{type(self).__name__}({', '.join(shown)})"
        if self._fit is None:
            return Node(f"{head}, not fitted")
        count = self._fit.data.num_points
        points = "" if count is None else f" on {counted(count, 'point')}"
        return Node(f"{head}, fitted{points}", parts=self._fit._blocks())

    _arguments: Mapping[str, object]


def _without_silent(value: object) -> object:
    """A setting, or a mapping of settings without those that decide nothing."""
    return _without_silent_keys(value) if isinstance(value, Mapping) else value


def _without_silent_keys(settings: Mapping[str, object]) -> dict[str, object]:
    return {key: item for key, item in settings.items() if key not in SILENT}


def _checked_inverse(inverse: object, operator: TensorOperator) -> TensorOperator:
    """An operator on the same vectors, symmetric as far as is known.

    Raises:
        ArgumentTypeError, ShapeError, DtypeError, DeviceError: It is something else.
        StructureError: It is not symmetric, so that an influence would depend on which side it is
            applied to.
    """
    if not isinstance(inverse, TensorOperator):
        raise ArgumentTypeError(
            f"an inverse must be a TensorOperator, got {type(inverse).__name__}; see "
            "InfluenceFunctionModel._invert"
        )
    require_compatible(operator, inverse, "inverted by")
    if inverse.symmetric is False:
        raise StructureError(
            f"the inverse ({type(inverse).__name__}) is not symmetric; influences need a symmetric "
            "curvature and inverse: use (A + A.T) / 2"
        )
    return inverse
