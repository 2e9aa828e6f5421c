"""KFAC and EKFAC: Kronecker-factored approximations of the Fisher matrix of a model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from hessops.batch.averaging import Averaging
from hessops.batch.kronecker import (
    Demotion,
    ExactBlock,
    FisherType,
    KfacApprox,
    KroneckerEstimation,
    require_kinds,
)
from hessops.errors import ArgumentError, NonFiniteProductError, StructureError
from hessops.functional.layers import MatrixLayer
from hessops.hashing import word_of_values
from hessops.isolation import isolated
from hessops.operators.base import TensorOperator
from hessops.operators.curvature import (
    POINT_AVERAGING,
    CurvatureOperator,
    GaussNewtonOperator,
    GeneralizedGaussNewtonOperator,
)
from hessops.operators.eigen import (
    DenseEigenOperator,
    DiagonalEigenOperator,
    EigenOperator,
)
from hessops.operators.eigen_blocks import BlockEigenOperator
from hessops.operators.kronecker_block import KroneckerOperator
from hessops.operators.kronecker_file import save_factors
from hessops.point_loss import Loss, Reduction
from hessops.processes import ONE_PROCESS, Processes
from hessops.progress import progress_bar
from hessops.randomness import resolved_generator
from hessops.space import RestrictTo
from hessops.streaming import Batch, Unpack
from hessops.validation import (
    checked_count,
    require_single_or_double,
)

logger = logging.getLogger(__name__)


class KfacOperator(BlockEigenOperator):
    r"""KFAC: the Fisher matrix, block by block, as Kronecker products.

    For a layer with inputs a and gradients b by its outputs, at positions t of points i and for
    columns c of a root of the loss Hessian (see `fisher_type`),

    .. math:: \frac1N \sum_{i,c} \mathrm{vec}(G_{ic}) \mathrm{vec}(G_{ic})^\top \approx B \otimes A,
              \qquad G_{ic} = \sum_t b_{ict} a_{it}^\top

    (Martens & Grosse 2015; Grosse & Martens 2016 for convolutions). With ``"expand"``

    .. math:: A = \frac{1}{\sum_i T_i} \sum_{i,t} a_{it} a_{it}^\top, \quad
              B = \frac1N \sum_{i,c,t} b_{ict} b_{ict}^\top

    and with ``"reduce"`` the mean of a over the positions of a point and the sum of b take their
    place (Eschenhagen et al. 2023). Exact for a single point at a single position, and for linear
    networks with squared errors.

    Layers are `torch.nn.Linear`, convolutions with any stride, padding, dilation and groups (a
    Kronecker product for each group) and `torch.nn.Embedding` (always ``"expand"``). A bias is a
    weight of an input that is always 1. A module that is called several times has the positions of
    all calls. All other parameters, and those of a layer that is something else than it seems
    (tied weights, attention), have the block of the exact matrix, or its diagonal where that block
    is large. The printed operator says which is which.

    The constructor makes one pass over the data and decomposes the factors, of which only the
    eigenvectors and eigenvalues are kept: functions of the operator are closed forms, see
    `EigenOperator`, and ``inverse(regularization=...)`` is a `KfacInverse`. Parameters of different
    modules do not interact.

    `apply` takes a vector ``(P,)`` or a stack ``(k, P)`` of the parameters' dtype and returns the
    same shape; `apply_to_dict` takes ``{name: shape}`` or ``{name: (k, *shape)}``.

    Args:
        model: A module; the operator works on a copy, see `refresh`.
        loss: ``loss(output, target)``; see `Objective` for what is required of model and loss.
        dataloader: A ``DataLoader``, list of batches or other iterable that can be iterated again.
        fisher_type: Which matrix. ``"type-2"``: the generalized Gauss-Newton matrix, exactly, with
            the Hessian :math:`H_i` of the loss by the output in the middle; as many backward passes
            as outputs or classes. ``"monte-carlo"``: the same in expectation, with random columns
            of covariance :math:`H_i`, which are gradients of would-be labels for cross-entropy.
            ``"empirical"``: the gradients of the losses themselves, for any loss.
        restrict_to: The parameters to differentiate by; ``None`` takes all trainable ones.
        kfac_approx: ``"expand"`` or ``"reduce"``, for layers with several positions.
        num_samples: Random columns per point with ``"monte-carlo"``.
        generator: Draws them; without one, `torch.manual_seed` decides.
        max_dense: The most parameters of a module with a whole exact block; larger ones have its
            diagonal.
        eigh_dtype: Dtype in which factors are decomposed; ``None`` is that of the parameters.
        reduction: What `loss` returns: ``"mean"``, ``"sum"`` or ``"none"``.
        averaging: The weights of the batches; see `BatchOperator`.
        cache: What may be kept on the device; see `BatchStream`.
        progress: Shows progress bars over batches and decompositions.
        unpack: Function from a raw batch to ``(x, y)``; ``None`` expects pairs.

    Attributes:
        blocks: The operators of the blocks, by name of the module; each is an `EigenOperator`.
        curvature: The exact operator that is approximated, on the same data.

    Raises:
        ArgumentError: An unknown `fisher_type` or `kfac_approx`.
        DtypeError: Parameters of half precision.
        StructureError: A loss that is not convex in the output, or has no second derivative by it,
            with another `fisher_type` than ``"empirical"``.
        MemoryLimitError: Its Hessian by the output has no structure and too many entries.
        ModelError: The gradients of points do not add up to that of their sum.
        HessopsError: See `Objective` and `BatchStream`.

    Example:
        >>> import torch
        >>> from hessops import KfacOperator
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.LayerNorm(1))
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> K = KfacOperator(model, torch.nn.MSELoss(), [(x, torch.zeros(2, 1))])
        >>> K
        KfacOperator(type-2) [4 x 4, float32, cpu]
        ├─ GeneralizedGaussNewtonOperator(Sequential, 2 points, ...
        ├─ Kronecker('0', Linear, 1 x 2) [2 x 2, float32, cpu]
        └─ Exact('1', LayerNorm) [2 x 2, float32, cpu]
        >>> K.inverse(regularization=1.0).apply(torch.ones(4))
        tensor([1.0000, 1.0000, 1.0000, 0.3333])
    """

    # Whether eigenvalues are those of the exact matrix in the Kronecker eigenbasis.
    corrects_eigenvalues: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        dataloader: Iterable[object],
        fisher_type: FisherType = "type-2",
        restrict_to: RestrictTo | None = None,
        *,
        kfac_approx: KfacApprox = "expand",
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        max_dense: int = 512,
        eigh_dtype: torch.dtype | None = None,
        reduction: Reduction = "mean",
        averaging: Averaging = POINT_AVERAGING,
        cache: str | bool | int = "auto",
        progress: bool = False,
        unpack: Unpack | None = None,
    ) -> None:
        require_kinds(fisher_type, kfac_approx)
        curvature_type: type[CurvatureOperator] = (
            GaussNewtonOperator if fisher_type == "empirical" else GeneralizedGaussNewtonOperator
        )
        self.curvature: CurvatureOperator = curvature_type(
            model,
            loss,
            dataloader,
            restrict_to,
            reduction=reduction,
            averaging=averaging,
            cache=cache,
            progress=progress,
            unpack=unpack,
        )
        self.fisher_type: FisherType = fisher_type
        self.kfac_approx: KfacApprox = kfac_approx
        self._num_samples = checked_count(num_samples, "num_samples")
        self._generator = resolved_generator(generator)
        self._max_dense = checked_count(max_dense, "max_dense", minimum=0)
        if eigh_dtype not in (None, torch.float32, torch.float64):
            raise ArgumentError(f"eigh_dtype must be float32 or float64, got {eigh_dtype}")
        self._eigh_dtype = eigh_dtype
        self._progress = progress
        require_single_or_double(self.curvature.dtype, "model", type(self).__name__)
        self._require_same_settings()
        super().__init__(self._estimated(), space=self.curvature.space)

    # --- estimation -----------------------------------------------------------------------

    def _estimated(self) -> dict[str, EigenOperator]:
        """Passes over the data and decomposes what they gave."""
        objective = self.curvature.objective
        assert objective is not None
        estimation = KroneckerEstimation(
            objective,
            self.fisher_type,
            self.kfac_approx,
            self._num_samples,
            self.curvature.processes.generator(self._generator),
            self._max_dense,
        )
        device = self.curvature.device
        with isolated(device), objective.differentiating(type(self).__name__):
            statistics = self._factors(estimation)
            blocks = self._decomposed(estimation, statistics)
            if self.corrects_eigenvalues and estimation.layers:
                blocks = self._corrected(estimation, blocks)
        logger.info("%s: %d blocks are decomposed", type(self).__name__, len(blocks))
        return blocks

    def _factors(self, estimation: KroneckerEstimation) -> list[Tensor]:
        """The averages of what `KroneckerEstimation.add_factors` adds."""
        state = estimation.generator.get_state()
        while True:
            flat, demoted = self._attempted(estimation)
            if not demoted:
                break
            estimation.demote(demoted)
            estimation.generator.set_state(state)
        # A sum is quick, and only where it overflows it says nothing of the entries.
        if not flat.sum().isfinite() and not flat.isfinite().all():
            raise NonFiniteProductError(
                f"{type(self).__name__}: a factor is NaN or infinite; check the scale of "
                f"parameters and data, or use a wider dtype than {flat.dtype}"
            )
        statistics = estimation.split(flat, estimation.factor_shapes)
        of_outputs = statistics[2 : 3 * len(estimation.layers) : 3]
        exact = statistics[3 * len(estimation.layers) :]
        if self.fisher_type != "empirical" and not any(t.any() for t in (*of_outputs, *exact)):
            raise StructureError(
                "the Hessian of the loss by the model's output is zero on all points (an L1 loss, "
                "or NLLLoss on log-probabilities that the model computes?), and so is the matrix; "
                "let the model return logits and use CrossEntropyLoss, or fisher_type='empirical'"
            )
        return statistics

    def _attempted(self, estimation: KroneckerEstimation) -> tuple[Tensor, list[str]]:
        """The averages by one pass, and the layers that turned out to be none in any process.

        Where there are some, the averages mean nothing, and are of the shapes there were before:
        processes that found out and others make the same sum.
        """
        layers, shapes = list(estimation.layers), estimation.factor_shapes
        flat = self._averaged(self._checked_batches(), shapes, estimation.add_factors)

        def gone() -> list[int]:
            return [int(name not in estimation.layers) for name in layers]

        found = zip(*self.curvature.processes.gathered(gone, len(layers)), strict=True)
        return flat, [name for name, votes in zip(layers, found, strict=True) if any(votes)]

    def _averaged(
        self,
        batches: Iterable[Batch],
        shapes: Iterable[tuple[int, ...]],
        add: Callable[[Tensor, Batch], None],
    ) -> Tensor:
        """The average over batches of what `add` adds to a flat tensor for the points of one.

        Where it raises `Demotion`, what it has added is the last.
        """
        averaging, size = self.curvature.averaging, sum(prod(shape) for shape in shapes)
        like = torch.zeros((), dtype=self.curvature.dtype, device=self.curvature.device)

        def sums() -> Iterator[tuple[Tensor, int]]:
            total, count = like.new_zeros(size), 0
            for batch in batches:
                count += batch.size
                try:
                    add(total, batch)
                except Demotion:
                    break
                # Weights that do not depend on the batches are numbers of points: one sum will do.
                if averaging.depends_on_batches:
                    yield total.div_(count), count
                    total, count = like.new_zeros(size), 0
            if count:
                yield total.div_(count), count

        return averaging.reduce(sums(), like.expand(size), self.curvature.sameness())

    def _require_same_settings(self) -> None:
        """Raises `DistributedError` where other processes estimate something else."""
        settings = [
            type(self).__name__,
            self.fisher_type,
            self.kfac_approx,
            self._num_samples,
            self._max_dense,
            self._eigh_dtype,
        ]
        self.curvature.processes.require_equal("settings", lambda: word_of_values(settings))

    def _checked_batches(self) -> Iterator[Batch]:
        """One pass over the data; `curvature` checks in its own first pass what it needs more."""
        objective = self.curvature.objective
        assert objective is not None
        for batch in self.curvature.stream:
            objective.check(batch)
            yield batch

    def _decomposed(
        self, estimation: KroneckerEstimation, statistics: Sequence[Tensor]
    ) -> dict[str, EigenOperator]:
        """The blocks, by name of the module; the largest are decomposed first."""
        values = iter(statistics)
        moments: dict[tuple[str, str], Tensor] = {}
        for name in estimation.layers:
            a, positions, b = next(values), next(values), next(values)
            moments[name, "A"] = a / positions if positions else a
            moments[name, "B"] = b
        moments |= {(name, "exact"): next(values) for name in estimation.exact}
        is_matrix = {
            (name, kind): kind == "B"
            or (
                estimation.layers[name].can_reduce
                if kind == "A"
                else estimation.exact[name].is_dense
            )
            for name, kind in moments
        }
        pairs: dict[tuple[str, str], tuple[Tensor, Tensor | None]] = {
            key: (moment, None) for key, moment in moments.items() if not is_matrix[key]
        }
        matrices = {key: moment for key, moment in moments.items() if is_matrix[key]}
        pairs |= self._decomposed_by_all(matrices)
        blocks: dict[str, EigenOperator] = {
            name: self._kronecker_block(layer, *pairs[name, "A"], *pairs[name, "B"])
            for name, layer in estimation.layers.items()
        }
        for name, block in estimation.exact.items():
            blocks[name] = _exact_block(block, *pairs[name, "exact"])
        # In the order of the parameters.
        starts = self.curvature.space.slices
        firsts = {name: next(iter(b.input_dict_structure)) for name, b in blocks.items()}
        return {
            name: blocks[name] for name in sorted(blocks, key=lambda n: starts[firsts[n]].start)
        }

    def _decomposed_by_all(
        self, matrices: Mapping[tuple[str, str], Tensor]
    ) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
        """Eigenvalues and eigenvectors; each process decomposes its share and tells the others."""
        processes = self.curvature.processes
        costs = [m.numel() * m.shape[-1] for m in matrices.values()]
        owners = dict(zip(matrices, processes.owners(costs), strict=True))
        mine = {key: m for key, m in matrices.items() if owners[key] == processes.rank}
        with processes.together():
            found = {key: self._eigh(matrix) for key, matrix in self._with_progress(mine)}
        pairs = {}
        for key, matrix in matrices.items():
            pair = found.pop(key, None) or (matrix.new_empty(matrix.shape[:-1]), matrix)
            values, vectors = (processes.broadcast(t, owners[key]) for t in pair)
            pairs[key] = values, vectors
        return pairs

    @property
    def processes(self) -> Processes:
        """Products are with what each process has; its exact counterpart is `curvature`."""
        return ONE_PROCESS

    def _kronecker_block(
        self,
        layer: MatrixLayer,
        of_inputs: Tensor,
        input_basis: Tensor | None,
        of_outputs: Tensor,
        output_basis: Tensor | None,
    ) -> KroneckerOperator:
        assert output_basis is not None
        groups, outputs, inputs = layer.form.shape
        kind = type(layer.module).__name__
        size = f"{groups} x {outputs} x {inputs}" if groups > 1 else f"{outputs} x {inputs}"
        shared = "" if self.kfac_approx == "expand" or layer.can_reduce else ", expand"
        return KroneckerOperator(
            layer.form,
            of_outputs.unsqueeze(2) * of_inputs.unsqueeze(1),
            output_basis,
            input_basis,
            factor_eigenvalues=(of_outputs, of_inputs),
            label=f"Kronecker({layer.name!r}, {kind}, {size}{shared})",
        )

    def _with_progress(
        self, matrices: Mapping[tuple[str, str], Tensor]
    ) -> Iterator[tuple[tuple[str, str], Tensor]]:
        ordered = sorted(matrices.items(), key=lambda item: -item[1].shape[-1])
        show = self._progress and not self.curvature.processes.rank
        with progress_bar("decompositions", "factor", len(ordered), show=show) as bar:
            for key, matrix in ordered:
                bar.say(factor=f"{key[0]} {key[1]}", size=matrix.shape[-1])
                yield key, matrix
                bar.advance()

    def _eigh(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues, without the negative ones of rounding, and eigenvectors."""
        wide = matrix.to(self._eigh_dtype or matrix.dtype)
        values, vectors = torch.linalg.eigh(wide, UPLO="L")
        return values.clamp(min=0).to(matrix.dtype), vectors.to(matrix.dtype)

    def _corrected(
        self, estimation: KroneckerEstimation, blocks: dict[str, EigenOperator]
    ) -> dict[str, EigenOperator]:
        """The blocks with the eigenvalues of EKFAC, by another pass over the data."""
        bases = {}
        for name in estimation.layers:
            block = blocks[name]
            assert isinstance(block, KroneckerOperator)
            bases[name] = (block.input_basis, block.output_basis)
        flat = self._averaged(
            self.curvature.stream,
            estimation.correction_shapes,
            lambda total, batch: estimation.add_corrections(total, batch, bases),
        )
        shapes = [(blocks[name].input_size,) for name in estimation.layers]
        corrected = dict(zip(estimation.layers, estimation.split(flat, shapes), strict=True))
        return {
            name: block._with_eigenvalues(corrected[name]) if name in corrected else block
            for name, block in blocks.items()
        }

    def refresh(self) -> Self:
        """Takes a new copy of the model as it is now, and new passes, in place; returns itself.

        Where that fails or is interrupted, it stays as it was.
        """
        before, drawn = self.curvature, self._generator.get_state()
        self.curvature = copy.copy(before)
        try:
            self.curvature.refresh()
            blocks = self._estimated()
        except BaseException:
            self.curvature = before
            self._generator.set_state(drawn)
            raise
        self._hold_blocks(blocks, self.space)
        self._hold(torch.cat([block.eigenvalues for block in blocks.values()]))
        return self

    # --- what it is -----------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Writes the eigen-decomposition to a file of tensors, whole or not at all.

        `load_factors` reads it, without the data.

        Raises:
            OSError: Of the file system; an earlier file stays as it was.
        """
        objective = self.curvature.objective
        assert objective is not None
        settings = {
            "operator": type(self).__name__,
            "fisher_type": self.fisher_type,
            "kfac_approx": self.kfac_approx,
        }
        save_factors(self, objective, settings, path)

    def _move(self, device: torch.device) -> Self:
        moved = super()._move(device)
        moved.curvature = self.curvature.to(device)
        return moved

    def _children(self) -> Sequence[TensorOperator]:
        return (self.curvature, *super()._children())

    def _label(self) -> str:
        shared = "" if self.kfac_approx == "expand" else f", {self.kfac_approx}"
        return f"{type(self).__name__}({self.fisher_type}{shared})"


def _exact_block(block: ExactBlock, eigenvalues: Tensor, basis: Tensor | None) -> EigenOperator:
    if basis is None:
        label = f"ExactDiagonal({block.name!r}, {block.kind})"
        return DiagonalEigenOperator(eigenvalues, space=block.space, label=label)
    label = f"Exact({block.name!r}, {block.kind})"
    return DenseEigenOperator(eigenvalues, basis, space=block.space, label=label)


class EkfacOperator(KfacOperator):
    r"""EKFAC: the exact diagonal of the Fisher matrix in the eigenbasis of KFAC.

    .. math:: \Lambda_{jk} = \frac1N \sum_{i,c} \bigl(Q_B^\top G_{ic}\, Q_A\bigr)_{jk}^2

    in place of :math:`\lambda_{B,j} \lambda_{A,k}`, in the notation of `KfacOperator` (George et
    al. 2018): of all matrices with these eigenvectors the closest one in Frobenius norm. One pass
    more over the data. Activations and gradients are rotated before the outer product; where a
    point has a single position, the sum is a product of two matrices. Arguments, errors and exact
    blocks are those of `KfacOperator`.

    Example:
        >>> import torch
        >>> from hessops import CgOperator, EkfacOperator, GeneralizedGaussNewtonOperator
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
        ... )
        >>> data = [(torch.randn(50, 4), torch.randint(3, (50,)))]
        >>> loss = torch.nn.CrossEntropyLoss()
        >>> K = EkfacOperator(model, loss, data)
        >>> {name: round(block.trace(), 3) for name, block in K.blocks.items()}
        {'0': 0.616, '2': 1.897}

        Its inverse preconditions a solve with the exact matrix:

        >>> G = GeneralizedGaussNewtonOperator(model, loss, data)
        >>> inverse = CgOperator(G, 0.1, preconditioner=K.inverse(regularization=0.1))
        >>> bool(inverse.solve(torch.ones(67)).converged)
        True
    """

    corrects_eigenvalues = True
