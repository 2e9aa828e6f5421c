"""EkfacInfluence: influences by Kronecker-factored curvature."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from typing import Unpack

import torch
from torch import Tensor, nn

from hessops.batch.kronecker import FisherType, KfacApprox, require_kinds
from hessops.errors import ArgumentTypeError, StructureError
from hessops.functional.layers import PRODUCT_BYTES
from hessops.functional.layerwise import PointGradients
from hessops.influence.gradients import finite
from hessops.influence.model import CommonSettings, InfluenceFunctionModel
from hessops.influence.modes import BlockMode, SecondOrderMode
from hessops.isolation import isolated
from hessops.objective import Objective
from hessops.operators.base import TensorOperator
from hessops.operators.damping import Regularization
from hessops.operators.eigen import EigenOperator
from hessops.operators.kronecker import EkfacOperator, KfacOperator
from hessops.operators.kronecker_block import KroneckerOperator
from hessops.point_loss import Loss
from hessops.streaming import Batch


class EkfacInfluence(InfluenceFunctionModel):
    r"""Influences by KFAC or EKFAC, layer by layer.

    .. math:: \mathcal I(z', z) = \sum_{\text{layers}} \langle g(z'),
              Q\, (\Lambda + \lambda I)^{-1} Q^\top g(z)\rangle, \qquad Q = Q_B \otimes Q_A

    with the eigenvectors of the Kronecker factors of each layer and the eigenvalues of KFAC
    (Martens & Grosse 2015) or EKFAC (George et al. 2018; for influences Grosse et al. 2023). See
    `hessops.KfacOperator` for what a layer is, what becomes of all other parameters, and the
    arguments from `fisher_type` to `eigh_dtype`. The blocks are the layers, under the names of
    their modules: `influences_by_layer`, `influence_factors_by_layer` and
    `influences_from_factors_by_layer` are the methods by block of all models, and
    `explore_hessian_regularization` is `explore_regularization`.

    Without a regularization it is the pseudo-inverse of each block: eigenvalues below 10·m·ε of the
    largest of the block are left out, with ε the precision of the dtype and m the size of the
    largest matrix that was decomposed. `fit` passes over the data once to check them and once for
    the factors, once more with `update_diagonal`, and keeps eigenvectors and eigenvalues: nothing
    else needs the training data.

    Args:
        model: A module.
        update_diagonal: ``False`` is KFAC, ``True`` is EKFAC.
        regularization: λ >= 0, also named ``hessian_regularization``, or a `Damping` relative to
            the mean eigenvalue of each block; or one for each layer.
        progress: Shows progress bars over batches and decompositions.
        loss: ``loss(output, target)``; ``None`` is `torch.nn.CrossEntropyLoss`, of a classifier.
        fisher_type: ``"type-2"``, ``"monte-carlo"`` or ``"empirical"``.
        kfac_approx: ``"expand"`` or ``"reduce"``.
        num_samples: Random columns per point with ``"monte-carlo"``.
        max_dense: The most parameters of a module with a whole exact block.
        eigh_dtype: Dtype in which factors are decomposed; ``None`` is that of the parameters.
        common: `reduction`, `unpack`, `cache`, `averaging` and `generator`; see
            `InfluenceFunctionModel`.

    Raises:
        ArgumentTypeError: `block_structure` or `second_order_mode` is given.
        ArgumentError: An unknown `fisher_type` or `kfac_approx`.
        HessopsError: As of `InfluenceFunctionModel`; from `fit`, as of `hessops.KfacOperator`.

    Example:
        >>> import torch
        >>> from hessops.influence import EkfacInfluence
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x, y = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
        >>> influence = EkfacInfluence(model, update_diagonal=True, loss=torch.nn.MSELoss())
        >>> influence.fit([(x, y)]).influences(x[:1], y[:1], x, y)
        tensor([[0.4000, 3.6000]])
        >>> influence.influences_by_layer(x[:1], y[:1], x, y)
        {'': tensor([[0.4000, 3.6000]])}
    """

    needs_data = False
    kept_type = EigenOperator

    def __init__(
        self,
        model: nn.Module,
        update_diagonal: bool = False,
        regularization: Regularization = 0.0,
        progress: bool = False,
        *,
        loss: Loss | None = None,
        fisher_type: FisherType = "type-2",
        kfac_approx: KfacApprox = "expand",
        num_samples: int = 1,
        max_dense: int = 512,
        eigh_dtype: torch.dtype | None = None,
        **common: Unpack[CommonSettings],
    ) -> None:
        for name in ("block_structure", "second_order_mode"):
            if name in common:
                raise ArgumentTypeError(
                    f"{name} is not a choice here: the blocks are the layers, and fisher_type says "
                    "which matrix is approximated"
                )
        require_kinds(fisher_type, kfac_approx)
        if not isinstance(update_diagonal, bool):
            raise ArgumentTypeError(
                f"update_diagonal must be True or False, got {update_diagonal!r}; is it the loss? "
                "That is a keyword, loss=..."
            )
        super().__init__(
            model,
            nn.CrossEntropyLoss() if loss is None else loss,
            regularization,
            BlockMode.LAYER_WISE,
            SecondOrderMode.GAUSS_NEWTON
            if fisher_type == "empirical"
            else SecondOrderMode.GENERALIZED_GAUSS_NEWTON,
            **common,
        )
        self.update_diagonal = update_diagonal
        self.progress = progress
        self.fisher_type: FisherType = fisher_type
        self.kfac_approx: KfacApprox = kfac_approx
        self.num_samples = num_samples
        self.max_dense = max_dense
        self.eigh_dtype = eigh_dtype

    def _curvature(self, dataloader: Iterable[object]) -> TensorOperator:
        kind = EkfacOperator if self.update_diagonal else KfacOperator
        return kind(
            self.model,
            self.loss,
            dataloader,
            self.fisher_type,
            self._space.names,
            kfac_approx=self.kfac_approx,
            num_samples=self.num_samples,
            generator=self.generator,
            max_dense=self.max_dense,
            eigh_dtype=self.eigh_dtype,
            reduction=self.reduction,
            averaging=self.averaging,
            cache=self.cache,
            progress=self.progress,
            unpack=self.unpack,
        )

    def _split(self, operator: TensorOperator) -> dict[str, TensorOperator]:
        assert isinstance(operator, KfacOperator)
        blocks = operator.blocks
        if set(blocks) != set(self._blocks):
            raise StructureError(
                f"the factors have the blocks {list(blocks)}, expected {list(self._blocks)}"
            )
        return {name: blocks[name] for name in self._blocks}

    def _objective_of(self, operator: TensorOperator) -> Objective:
        assert isinstance(operator, KfacOperator)
        return super()._objective_of(operator.curvature)

    def _invert(self, operator: TensorOperator, regularization: float) -> TensorOperator:
        assert isinstance(operator, EigenOperator)
        if regularization == 0:
            return operator.pseudo_inverse()
        return operator._inverted(regularization)

    # --- in the eigenbases ----------------------------------------------------------------

    def factors_of(self, batch: Batch) -> Tensor:
        """As `influence_factors`, of a batch that was checked."""
        fitted = self.fitted
        gradients = self._in_eigenbases(batch)
        space = fitted.space
        factors = torch.empty(batch.size, space.size, dtype=space.dtype, device=space.device)
        with isolated(space.device):
            for name in gradients.layers:
                inverse = self._kronecker_inverse(name)
                for points in _pieces(batch.size, inverse):
                    images = self._images(gradients, name, points).flatten(1)
                    factors[points, fitted.positions[name]] = inverse._out_of_basis(images)
        for name, rows in self._other_factors(batch, gradients.layers).items():
            factors[:, fitted.positions[name]] = rows
        return factors

    def _scored(self, test: Batch, train: Batch) -> Tensor:
        return torch.stack([*self._scored_by_block(test, train).values()]).sum(dim=0)

    def _scored_by_block(self, test: Batch, train: Batch) -> dict[str, Tensor]:
        """By layer, without leaving the eigenbases."""
        fitted = self.fitted
        of_test = self._in_eigenbases(test)
        of_train = of_test if train is test else self._in_eigenbases(train)
        layers = [name for name in of_test.layers if name in of_train.layers]
        scores = {}
        with isolated(fitted.space.device):
            for name in layers:
                pieces = [
                    of_train.inner_products(name, self._images(of_test, name, points))
                    for points in _pieces(test.size, self._kronecker_inverse(name))
                ]
                scores[name] = finite(torch.cat(pieces))
        others = self._other_factors(test, layers)
        if others:
            spaces = {name: fitted.blocks[name].space for name in others}
            stack = {
                key: part for n in others for key, part in spaces[n].unflatten(others[n]).items()
            }
            products = fitted.provider.products_of(train, stack, spaces.values())
            scores |= {name: products[space.names] for name, space in spaces.items()}
        return {name: scores[name] for name in fitted.blocks}

    def _in_eigenbases(self, batch: Batch) -> PointGradients:
        """The gradients of points by the layers with Kronecker factors."""
        found = self.fitted.provider.by_layer(batch)
        bases = {}
        for name, inverse in self.inverses.items():
            if name in found.layers and isinstance(inverse, KroneckerOperator):
                bases[name] = (inverse.input_basis, inverse.output_basis)
        with isolated(self.fitted.space.device):
            return found.rotated(bases)

    def _other_gradients(self, batch: Batch, layers: Container[str]) -> dict[str, Tensor]:
        """The gradients of points by all other blocks, ``(n, P_block)``."""
        spaces = {n: b.space for n, b in self.fitted.blocks.items() if n not in layers}
        if not spaces:
            return {}
        names = [name for space in spaces.values() for name in space.names]
        parts = self.fitted.provider.rows_by(batch, names)
        return {
            name: torch.cat([parts[key].flatten(1) for key in space.names], dim=1)
            for name, space in spaces.items()
        }

    def _other_factors(self, batch: Batch, layers: Container[str]) -> dict[str, Tensor]:
        """The factors of points by all other blocks, ``(n, P_block)``."""
        rows = self._other_gradients(batch, layers)
        return {name: self.inverses[name].apply(part) for name, part in rows.items()}

    def self_influence(self, x: object, y: object) -> Tensor:
        """As of `InfluenceFunctionModel`, without the gradients of points by the layers."""
        return torch.stack([*self.self_influence_by_block(x, y).values()]).sum(dim=0)

    def self_influence_by_block(self, x: object, y: object) -> dict[str, Tensor]:
        """As of `InfluenceFunctionModel`: in the eigenbases it is a sum of weighted squares."""
        fitted = self.fitted
        with self.inverse.processes.together():
            batch = fitted.provider.batch(x, y)
        gradients = self._in_eigenbases(batch)
        scores = {}
        with isolated(fitted.space.device):
            for name in gradients.layers:
                inverse = self._kronecker_inverse(name)
                eigenvalues = inverse.eigenvalues.reshape(inverse.form.shape)
                scores[name] = finite(gradients.weighted_squares(name, eigenvalues))
        for name, rows in self._other_gradients(batch, gradients.layers).items():
            scores[name] = (self.inverses[name].apply(rows) * rows).sum(dim=1)
        return {name: scores[name] for name in fitted.blocks}

    def _kronecker_inverse(self, name: str) -> KroneckerOperator:
        inverse = self.inverses[name]
        assert isinstance(inverse, KroneckerOperator)
        return inverse

    def _images(self, gradients: PointGradients, name: str, points: slice) -> Tensor:
        """The factors of points in the eigenbasis of a layer, ``(n, groups, outputs, inputs)``."""
        inverse = self._kronecker_inverse(name)
        return gradients.matrices(name, points) * inverse.eigenvalues.reshape(inverse.form.shape)

    # --- by layer -------------------------------------------------------------------------

    influence_factors_by_layer = InfluenceFunctionModel.influence_factors_by_block
    influences_from_factors_by_layer = InfluenceFunctionModel.influences_from_factors_by_block
    influences_by_layer = InfluenceFunctionModel.influences_by_block
    explore_hessian_regularization = InfluenceFunctionModel.explore_regularization


def _pieces(size: int, inverse: KroneckerOperator) -> Iterator[slice]:
    """Some points at a time, whose gradients by a layer fit."""
    some = max(1, PRODUCT_BYTES // (inverse.input_size * inverse.dtype.itemsize))
    for start in range(0, size, some):
        yield slice(start, min(start + some, size))
