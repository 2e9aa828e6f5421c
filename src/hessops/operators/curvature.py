"""BatchOperator and the curvature operators: batch operation, data and averaging joined."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from hessops.batch.averaging import Averaging, PointAveraging
from hessops.batch.gauss_newton import (
    GaussNewtonBatchOperation,
    GeneralizedGaussNewtonBatchOperation,
)
from hessops.batch.hessian import HessianBatchOperation
from hessops.batch.inverse_harmonic_mean import InverseHarmonicMeanBatchOperation
from hessops.batch.model import Mode, ModelBatchOperation
from hessops.batch.operation import BatchOperation
from hessops.batch.precision import LowerPrecisionBatchOperation
from hessops.errors import ArgumentError, ArgumentTypeError, StructureError
from hessops.hashing import hash_of_entries, word_of_values
from hessops.isolation import isolated
from hessops.objective import Objective
from hessops.operators.base import TensorDictOperator, TensorOperator
from hessops.operators.linearized import Linearization, Product, RetainedGraphs
from hessops.operators.sample_space import sample_space_inverse
from hessops.point_loss import Loss, Reduction
from hessops.processes import ONE_PROCESS, Processes, Same
from hessops.space import RestrictTo
from hessops.streaming import Batch, BatchStream, Unpack

# The default of every `averaging`; it has no state.
POINT_AVERAGING = PointAveraging()


class BatchOperator(TensorDictOperator):
    r"""The average of a batch operation over the data.

    .. math:: A v = \frac{\sum_b w_b\, m(b)\, v}{\sum_b w_b}

    An application is one pass over the data, for one vector as for many. The first pass checks
    every batch (see `Objective.check`).

    Args:
        batch_operation: m.
        dataloader: A ``DataLoader``, list of batches or other iterable that can be iterated again;
            or a `BatchStream`, which is shared and needs none of the arguments from `cache` on.
        averaging: The weights w; ``PointAveraging()`` makes the result independent of how the data
            are split into batches.
        cache: ``"auto"`` keeps all batches on the device when they fit 1 GiB; ``True``, ``False``
            or a number of bytes. See `BatchStream`.
        progress: Shows a progress bar over the batches of each application.
        unpack: Function from a raw batch to ``(x, y)``; ``None`` expects pairs.

    Raises:
        ArgumentTypeError: `batch_operation` or `averaging` is something else, or `dataloader`
            cannot be iterated.
        DataError: `dataloader` is empty or one-shot.

    Example:
        >>> import torch
        >>> from hessops import BatchOperator, ChunkAveraging, HessianBatchOperation
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> operation = HessianBatchOperation(model, torch.nn.MSELoss())
        >>> batches = [
        ...     (torch.ones(3, 1), torch.zeros(3, 1)),
        ...     (torch.zeros(1, 1), torch.zeros(1, 1)),
        ... ]
        >>> BatchOperator(operation, batches, ChunkAveraging()).apply(torch.ones(1))
        tensor([1.])
        >>> BatchOperator(operation, batches).apply(torch.ones(1))
        tensor([1.5000])
    """

    def __init__(
        self,
        batch_operation: BatchOperation,
        dataloader: Iterable[object],
        averaging: Averaging = POINT_AVERAGING,
        *,
        cache: str | bool | int = "auto",
        progress: bool = False,
        unpack: Unpack | None = None,
    ) -> None:
        with _in_step(averaging):
            self._join(batch_operation, dataloader, averaging, cache, progress, unpack)

    def _join(
        self,
        batch_operation: BatchOperation,
        dataloader: Iterable[object],
        averaging: Averaging,
        cache: str | bool | int,
        progress: bool,
        unpack: Unpack | None,
    ) -> None:
        """What the constructors do, in step with other processes."""
        if not isinstance(batch_operation, BatchOperation):
            raise ArgumentTypeError(
                f"batch_operation must be a BatchOperation, got {type(batch_operation).__name__}"
            )
        super().__init__(
            batch_operation.space,
            symmetric=batch_operation.symmetric,
            positive_semidefinite=batch_operation.positive_semidefinite,
        )
        self.batch_operation = batch_operation
        self.averaging = averaging
        processes = averaging.processes
        if isinstance(dataloader, BatchStream):
            self.stream = _shared(dataloader, self.device, averaging)
        else:
            self.stream = BatchStream(
                dataloader,
                device=self.device,
                unpack=unpack,
                cache=cache,
                progress=progress and processes.rank == 0,
                same_batches=averaging.depends_on_batches,
                may_be_empty=processes is not ONE_PROCESS,
            )
        processes.require_shard(self.stream.data)
        self._is_checked = False
        self._graphs: RetainedGraphs | None = None

    def _apply_rows(self, rows: Tensor) -> Tensor:
        same = {"right-hand sides": lambda: hash_of_entries(rows), **self.sameness()}
        return self.averaging.reduce(self._batch_products(rows), like=rows, same=same)

    @property
    def processes(self) -> Processes:
        """As of the averaging."""
        return self.averaging.processes

    def sameness(self) -> Same:
        """What must be equal in all processes that average over their data together."""
        operation, objective = self.batch_operation, self.objective

        def kind() -> int:
            of_model = None if objective is None else (objective.reduction, objective.space.names)
            regularization = getattr(operation, "regularization", None)
            averaging = self.averaging.within_process
            name, dtype = type(operation).__name__, str(self.dtype)
            if isinstance(operation, LowerPrecisionBatchOperation):
                name += f" of {type(operation.exact).__name__} in {operation.product_dtype}"
            return word_of_values([name, dtype, averaging, regularization, of_model])

        return {
            "operators": kind,
            "samplers": lambda: self.processes.plan_of(self.stream.data),
            "parameters, buffers or loss": lambda: (
                0 if objective is None else objective.hash_of_values()
            ),
        }

    def _batch_products(self, rows: Tensor) -> Iterator[tuple[Product, int]]:
        if self._graphs is not None and self._keeps_data():
            yield from self._graphs.products(self.batch_operation, self.stream, rows)
            return
        for batch in self.checked_batches(self.stream):
            yield Product(partial(self.batch_operation.add_rows, batch), rows), batch.size

    def _keeps_data(self) -> bool:
        """Whether the data are kept on the device, by a pass over them if there was none.

        The first product takes the route of all others, so that equal calls give equal bits.
        """
        if not (self._is_checked and self.stream.is_settled):
            for _ in self.checked_batches(self.stream):
                pass
        return self.stream.is_cached

    def checked_batches(self, stream: BatchStream) -> Iterator[Batch]:
        """One pass over a stream of the operator's data; the first one checks every batch."""
        for batch in stream:
            if not self._is_checked:
                self.batch_operation.check(batch)
            yield batch
        self._is_checked = True

    def check_data(self) -> None:
        """A pass over the data that checks every batch, unless one was made before.

        Raises:
            HessopsError: See `Objective.check` and `BatchStream`.
        """
        with isolated(self.device), self.processes.together():
            if not self._is_checked:
                for _ in self.checked_batches(self.stream):
                    pass

    def refresh(self) -> Self:
        """Takes a new copy of the model as it is now, in place; returns itself.

        Without it, an operator stays at the parameters that the model had when it was made.
        """
        with self.processes.together():
            self.batch_operation.refresh()
        self._is_checked = False
        self._forget_graphs()
        return self

    def __copy__(self) -> Self:
        """An operator on the same data and copy of the model, until either is refreshed."""
        twin = super().__copy__()
        twin.batch_operation = copy.copy(self.batch_operation)
        twin._forget_graphs()
        return twin

    def _linearized(self, call: Linearization[TensorOperator]) -> Self:
        operation = self.batch_operation
        keeps_nothing = self._graphs is not None or self.stream.budget == 0
        if keeps_nothing or not isinstance(operation, ModelBatchOperation):
            return self
        linearized = copy.copy(self)  # with parameters of its own
        linearized._graphs = RetainedGraphs(call.memory)
        return linearized

    def _in_precision(self, dtype: torch.dtype) -> TensorOperator:
        if not isinstance(self.batch_operation, ModelBatchOperation):
            return self
        lower = copy.copy(self)
        lower.batch_operation = LowerPrecisionBatchOperation(self.batch_operation, dtype)
        lower._is_checked = False
        lower._forget_graphs()
        return lower

    def _forget_graphs(self) -> None:
        """For another matrix or another device than that of the graphs."""
        if self._graphs is not None:
            self._graphs = self._graphs.anew()

    @property
    def objective(self) -> Objective | None:
        """The model and loss of the batch operation; ``None`` where it has none."""
        operation = self.batch_operation
        return operation.objective if isinstance(operation, ModelBatchOperation) else None

    def restricted(self, names: Iterable[str]) -> Self:
        """The diagonal block of some of the parameters, in the order of the space.

        The copy of the model, the data and what was found out about both are shared, until either
        operator is refreshed.

        Args:
            names: Names of parameters of `space`.

        Raises:
            ParameterNameError: A name that is not in `space`, or none.
            StructureError: The batch operation is not one of a model.

        Example:
            >>> import torch
            >>> from hessops import HessianOperator
            >>> model = torch.nn.Linear(2, 1)
            >>> H = HessianOperator(model, torch.nn.MSELoss(), [(torch.eye(2), torch.zeros(2, 1))])
            >>> H.restricted(["bias"]).to_dense()
            tensor([[2.]])
        """
        operation = self.batch_operation
        if not isinstance(operation, ModelBatchOperation):
            raise StructureError(
                f"{type(operation).__name__} has no restriction to some of its parameters; build "
                "the batch operation for those"
            )
        fewer = copy.copy(self)
        fewer.batch_operation = operation.restricted(names)
        fewer._space = fewer.batch_operation.space
        fewer._input_size = fewer._space.size
        fewer._forget_graphs()
        return fewer

    def _move(self, device: torch.device) -> Self:
        moved = self._copy_on(device)
        moved.batch_operation = self.batch_operation.to(device)
        moved.stream = self.stream.to(device)
        moved._forget_graphs()
        return moved

    def _label(self) -> str:
        points = self.stream.num_points
        count = "points not yet counted" if points is None else f"{points} points"
        shown = [self._source(), count]
        if self.stream.is_cached:
            shown.append("cached")
        if self._graphs is not None:
            shown.append(self._graphs.description)
        if type(self.averaging) is not PointAveraging:
            shown.append(repr(self.averaging))
        operation = self.batch_operation
        if isinstance(operation, LowerPrecisionBatchOperation):
            shown.append(f"products in {operation.product_dtype}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def _source(self) -> str:
        return type(self.batch_operation).__name__


def _in_step(averaging: Averaging) -> AbstractContextManager[None]:
    """The construction of an operator, which fails in all processes where it does in one."""
    if not isinstance(averaging, Averaging):
        raise ArgumentTypeError(
            f"averaging must be an Averaging, got {averaging!r}; use PointAveraging()"
        )
    return averaging.processes.together()


def _shared(stream: BatchStream, device: torch.device, averaging: Averaging) -> BatchStream:
    """A stream for another operator, which keeps no second copy of the data.

    Raises:
        ArgumentError: It does not watch over the batches that the averaging weighs.
    """
    if averaging.depends_on_batches and not stream.same_batches:
        raise ArgumentError(
            f"dataloader is a BatchStream that accepts other batches of the same points, but "
            f"{averaging!r} depends on them: make it with same_batches=True"
        )
    return stream if stream.device == device else stream.to(device)


def batch_operators(operator: TensorOperator) -> Iterator[BatchOperator]:
    """The parts of an operator that pass over data."""
    if isinstance(operator, BatchOperator):
        yield operator
    for child in operator._children():
        yield from batch_operators(child)


class CurvatureOperator(BatchOperator):
    """The average over the data of a batch operation of a model and a loss.

    Abstract: a subclass names its ``batch_operation_type``, and the constructor is spelled here
    once for all of them.

    Args:
        model: A module. The operator works on a copy: later steps of an optimizer do not change it
            until `refresh`.
        loss: ``loss(output, target)``; see `Objective` for what is required of model and loss.
        dataloader: A ``DataLoader``, list of batches or other iterable that can be iterated again.
        restrict_to: The parameters to differentiate by, ``{name: parameter}`` or names; ``None``
            takes all trainable ones. The order is the model's either way.
        reduction: What `loss` returns: the scalar ``"mean"`` over points, their scalar ``"sum"``,
            or a vector ``(n,)`` (``"none"``). The matrix is that of the mean in each case.
        averaging: The weights of the batches; see `BatchOperator`.
        mode: ``"rev-rev"`` or ``"rev-fwd"``; see `ModelBatchOperation`.
        cache: What may be kept on the device; see `BatchStream`.
        chunk_size: Vectors that share one vectorised backward pass; ``None`` bounds their memory.
        progress: Shows a progress bar over the batches of each application.
        unpack: Function from a raw batch to ``(x, y)``; ``None`` expects pairs.
        compile: Compiles products by `torch.compile` where that works, and warns (`CompileWarning`)
            where it does not; see `ModelBatchOperation`. The numbers stay the same up to rounding.

    Raises:
        HessopsError: On construction and in the first pass; see `Objective` and `BatchStream`.
    """

    batch_operation_type: ClassVar[type[ModelBatchOperation]]

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        dataloader: Iterable[object],
        restrict_to: RestrictTo | None = None,
        *,
        reduction: Reduction = "mean",
        averaging: Averaging = POINT_AVERAGING,
        mode: Mode = "rev-rev",
        cache: str | bool | int = "auto",
        chunk_size: int | None = None,
        progress: bool = False,
        unpack: Unpack | None = None,
        compile: bool = False,
    ) -> None:
        with _in_step(averaging):
            operation = self.batch_operation_type(
                model,
                loss,
                restrict_to,
                reduction=reduction,
                mode=mode,
                chunk_size=chunk_size,
                compile=compile,
            )
            self._join(operation, dataloader, averaging, cache, progress, unpack)

    def _source(self) -> str:
        objective = self.objective
        return type(None if objective is None else objective.model).__name__


class HessianOperator(CurvatureOperator):
    r"""The Hessian :math:`\nabla^2_\theta \frac1N \sum_i \ell_i(\theta)` of the mean loss.

    Symmetric, in general indefinite. Products by double backward (Pearlmutter 1994).

    `apply` takes a vector ``(P,)`` or a stack ``(k, P)`` of the parameters' dtype and returns the
    same shape; `apply_to_dict` takes ``{name: shape}`` or ``{name: (k, *shape)}``.
    Constructor arguments and errors are those of `CurvatureOperator`.

    Example:
        >>> import torch
        >>> from hessops import HessianOperator
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> H = HessianOperator(model, torch.nn.MSELoss(), [(x, torch.zeros(2, 1))])
        >>> H.to_dense()
        tensor([[1., 0.],
                [0., 4.]])
        >>> H.apply_to_dict({"weight": torch.ones(1, 2)})
        {'weight': tensor([[1., 4.]])}
    """

    batch_operation_type = HessianBatchOperation


class GaussNewtonOperator(CurvatureOperator):
    r"""The empirical Gauss-Newton matrix :math:`\frac1N \sum_i g_i g_i^\top`.

    With :math:`g_i = \nabla_\theta \ell_i(\theta)`; also called the empirical Fisher matrix
    (Martens 2020, Section 11). Symmetric positive semi-definite. A product makes no per-sample
    gradients.

    `apply` takes a vector ``(P,)`` or a stack ``(k, P)`` of the parameters' dtype and returns the
    same shape; `apply_to_dict` takes ``{name: shape}`` or ``{name: (k, *shape)}``.
    Constructor arguments and errors are those of `CurvatureOperator`.

    Example:
        >>> import torch
        >>> from hessops import GaussNewtonOperator
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # gradients (2, 0) and (0, 2)
        >>> G = GaussNewtonOperator(model, torch.nn.MSELoss(), [(x, torch.zeros(2, 1))])
        >>> G.to_dense()
        tensor([[2., 0.],
                [0., 2.]])
    """

    batch_operation_type = GaussNewtonBatchOperation

    def _closed_form_inverse(self, shift: float) -> TensorOperator:
        return sample_space_inverse(self, shift)


class GeneralizedGaussNewtonOperator(CurvatureOperator):
    r"""The generalized Gauss-Newton matrix :math:`\frac1N \sum_i J_i^\top H_i J_i`.

    With :math:`J_i` the Jacobian of the output of point i by the parameters and :math:`H_i` the
    Hessian of :math:`\ell_i` by that output (Schraudolph 2002). Symmetric; positive semi-definite
    when the loss is convex in the output.

    `apply` takes a vector ``(P,)`` or a stack ``(k, P)`` of the parameters' dtype and returns the
    same shape; `apply_to_dict` takes ``{name: shape}`` or ``{name: (k, *shape)}``.
    Constructor arguments and errors are those of `CurvatureOperator`.

    Example:
        >>> import torch
        >>> from hessops import GeneralizedGaussNewtonOperator
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> A = GeneralizedGaussNewtonOperator(model, torch.nn.MSELoss(), [(x, torch.zeros(2, 1))])
        >>> A.to_dense()
        tensor([[1., 0.],
                [0., 4.]])
    """

    batch_operation_type = GeneralizedGaussNewtonBatchOperation

    def _closed_form_inverse(self, shift: float) -> TensorOperator:
        return sample_space_inverse(self, shift)


class InverseHarmonicMeanOperator(BatchOperator):
    r"""The mean of the inverses of damped gradient outer products.

    .. math:: \frac1N \sum_i (g_i g_i^\top + \lambda I)^{-1}

    with :math:`g_i = \nabla_\theta \ell_i(\theta)`, each term by the formula of Sherman & Morrison
    (Kwon et al. 2024, DataInf). Symmetric positive definite, and itself an approximate inverse of
    the damped empirical Gauss-Newton matrix: apply it, do not invert it.

    Args:
        model: A module; the operator works on a copy, see `refresh`.
        loss: ``loss(output, target)``; see `Objective` for what is required of model and loss.
        dataloader: A ``DataLoader``, list of batches or other iterable that can be iterated again.
        regularization: λ > 0; the formula divides by it.
        restrict_to: The parameters to differentiate by; ``None`` takes all trainable ones.
        reduction: What `loss` returns: ``"mean"``, ``"sum"`` or ``"none"``.
        averaging: The weights of the batches; see `BatchOperator`.
        cache: What may be kept on the device; see `BatchStream`.
        chunk_size: Points whose gradients are held at once; ``None`` takes what fits 256 MiB.
        progress: Shows a progress bar over the batches of each application.
        unpack: Function from a raw batch to ``(x, y)``; ``None`` expects pairs.

    Raises:
        ArgumentError: `regularization` is not positive.
        HessopsError: On construction and in the first pass; see `Objective` and `BatchStream`.

    Example:
        >>> import torch
        >>> from hessops import InverseHarmonicMeanOperator
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x = torch.tensor([[0.0], [1.0]])  # gradients 0 and 2: (1 + 1/5) / 2
        >>> A = InverseHarmonicMeanOperator(
        ...     model, torch.nn.MSELoss(), [(x, torch.zeros(2, 1))], regularization=1.0
        ... )
        >>> A.apply(torch.ones(1))
        tensor([0.6000])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        dataloader: Iterable[object],
        regularization: float,
        restrict_to: RestrictTo | None = None,
        *,
        reduction: Reduction = "mean",
        averaging: Averaging = POINT_AVERAGING,
        cache: str | bool | int = "auto",
        chunk_size: int | None = None,
        progress: bool = False,
        unpack: Unpack | None = None,
    ) -> None:
        with _in_step(averaging):
            operation = InverseHarmonicMeanBatchOperation(
                model, loss, regularization, restrict_to, reduction=reduction, chunk_size=chunk_size
            )
            self._join(operation, dataloader, averaging, cache, progress, unpack)

    @property
    def regularization(self) -> float:
        """λ."""
        return self._operation.regularization

    @property
    def _operation(self) -> InverseHarmonicMeanBatchOperation:
        operation = self.batch_operation
        if not isinstance(operation, InverseHarmonicMeanBatchOperation):
            raise ArgumentTypeError("the batch operation was replaced by another kind")
        return operation

    def _source(self) -> str:
        model = type(self._operation.objective.model).__name__
        return f"{model}, regularization={self.regularization:g}"

    def with_regularization(self, regularization: float) -> Self:
        """The same operator for another λ > 0; the copy of the model and the data are shared."""
        changed = copy.copy(self)
        changed.batch_operation = self._operation.with_regularization(regularization)
        return changed

    def mean_squared_gradient(self) -> float:
        r""":math:`\frac1N \sum_i \lVert g_i\rVert^2`, the trace of the Gauss-Newton matrix.

        One pass over the data.
        """
        like = torch.zeros((), dtype=torch.float64, device=self.device)

        def means() -> Iterator[tuple[Tensor, int]]:
            for batch in self.checked_batches(self.stream):
                total = self._operation.squared_gradients(batch)
                yield like + total / batch.size, batch.size

        with isolated(self.device):
            return self.averaging.by_points().reduce(means(), like, self.sameness()).item()
