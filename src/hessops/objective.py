"""Objective: a model and a loss as pure functions of parameters and a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Literal, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from hessops.errors import (
    ArgumentError,
    ArgumentTypeError,
    DtypeError,
    LossError,
    ModelError,
    NonFiniteError,
    TrainingModeError,
)
from hessops.isolation import (
    preserved_random_state,
    random_state,
    twice_differentiable_kernels,
)
from hessops.nested import map_tensors, named_tensor_leaves, tensor_leaves
from hessops.space import ParameterSpace, RestrictTo, require_finite
from hessops.streaming import Batch, take_rows

Loss = Callable[..., Tensor]
Reduction = Literal["mean", "sum", "none"]
_Module = TypeVar("_Module", bound=nn.Module)
_Result = TypeVar("_Result")
REDUCTIONS = ("mean", "sum", "none")

_ADVICE_ON_LOSS = (
    "Pass an unweighted mean over points (reduction='mean'), their sum (reduction='sum'), or best "
    "the vector of per-sample losses (reduction='none', as in "
    "torch.nn.CrossEntropyLoss(weight=..., reduction='none') with hessops' reduction='none'); "
    "leave ignored targets out of the data"
)


class Objective:
    r"""The mean loss :math:`L(\theta) = \frac1n \sum_i \ell_i(\theta)` of a model over points.

    :math:`\ell_i` is the loss on point i alone. The objective works on a copy of the model, taken
    when it is made: its parameters, buffers, device and train/eval flags stay what they were then
    (see `refresh`), and the user's model is never written to, moved or switched.

    Args:
        model: Called with the inputs of a batch as its one argument; returns a tensor ``(n, ...)``
            or a tuple or mapping of such tensors.
        loss: ``loss(output, target)``; a module or function.
        restrict_to: The parameters to differentiate by, ``{name: parameter}`` or names; ``None``
            takes all trainable ones.
        reduction: What `loss` returns: the scalar ``"mean"`` over points, their scalar ``"sum"``,
            or a vector ``(n,)`` of per-sample losses (``"none"``).

    Raises:
        ArgumentError: An unknown `reduction`.
        ModelError: No trainable parameter; a model that rewrites its weights
            (``Embedding(max_norm=...)``), has sparse gradients, is compiled, or cannot be copied.
        ParameterNameError: `restrict_to` names an unknown or frozen parameter.
        DtypeError: Parameters of mixed or complex dtype.
        DeviceError: Parameters on several devices.
        NonFiniteError: NaN or infinity in a parameter or buffer.

    Example:
        >>> import torch
        >>> from hessops import Batch, Objective
        >>> objective = Objective(torch.nn.Linear(3, 2), torch.nn.MSELoss())
        >>> batch = Batch.from_raw((torch.zeros(4, 3), torch.zeros(4, 2)))
        >>> objective.check(batch)
        >>> objective.sample_losses(objective.params, batch).shape
        torch.Size([4])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        restrict_to: RestrictTo | None = None,
        *,
        reduction: Reduction = "mean",
    ) -> None:
        if reduction not in REDUCTIONS:
            raise ArgumentError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
        if not callable(loss):
            raise ArgumentTypeError(
                f"loss must be callable as loss(output, target), got {type(loss).__name__}"
            )
        self.space = ParameterSpace.from_model(model, restrict_to)
        _refuse_unsuitable(model)
        self.reduction: Reduction = reduction
        self._users_model = model
        self._users_loss = loss
        self._take_snapshot()

    def _take_snapshot(self) -> None:
        model, loss = self._users_model, self._users_loss
        current = dict(model.named_parameters())
        for name, shape in self.space.shapes.items():
            if name not in current or current[name].shape != shape:
                raise ModelError(f"parameter {name!r} of the model was removed or reshaped")
        require_finite(current, "parameter")
        require_finite(dict(model.named_buffers()), "buffer")
        # Inside inference_mode the copies would be inference tensors, which have no gradient.
        with torch.inference_mode(False):
            self._module = _copied(model, "model").to(self.space.device)
            self._loss = (
                _copied(loss, "loss").to(self.space.device) if isinstance(loss, nn.Module) else loss
            )
        self._bind()

    def _bind(self) -> None:
        """Names the tensors of the copied model: where to differentiate, and what stays."""
        every = {name: p.detach() for name, p in self._module.named_parameters()}
        self._params = {name: every[name] for name in self.space.names}
        self._frozen = {name: p for name, p in every.items() if name not in self._params}
        self._buffers = {name: b.detach() for name, b in self._module.named_buffers()}
        self._has_rnn = any(isinstance(m, nn.RNNBase) for m in self._module.modules())

    @property
    def params(self) -> dict[str, Tensor]:
        """The parameters of the copy, ``{name: tensor}``, without gradients."""
        return dict(self._params)

    @property
    def device(self) -> torch.device:
        """Where the copy of the model lives."""
        return self.space.device

    @property
    def model(self) -> nn.Module:
        """The model's own copy, for its structure; use `params` for values."""
        return self._module

    def refresh(self) -> Self:
        """Takes a new copy of the user's model as it is now, in place; returns itself."""
        self._take_snapshot()
        return self

    def to(self, device: torch.device | str) -> Objective:
        """The same objective, values included, on another device."""
        moved = copy.copy(self)
        moved.space = self.space.to(device)
        moved._module = copy.deepcopy(self._module).to(device)
        if isinstance(self._loss, nn.Module):
            moved._loss = copy.deepcopy(self._loss).to(device)
        moved._bind()
        return moved

    # --- the functions -------------------------------------------------------------------

    def kernels(self) -> AbstractContextManager[None]:
        """A context in which every kernel of the model can be differentiated twice."""
        return twice_differentiable_kernels(
            without_cudnn=self._has_rnn and self.device.type == "cuda"
        )

    def output(self, params: Mapping[str, Tensor], x: object) -> object:
        """The model's output at `params`, which may name some of the parameters only."""
        # Cloned, because a forward may write to its buffers (a counter, a running mean).
        buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        tensors = {**buffers, **self._frozen, **self._params, **params}
        return functional_call(self._module, tensors, (x,))

    def output_loss(self, output: object, batch: Batch) -> Tensor:
        """The mean loss of a given output over the points of the batch, shape ``()``."""
        value = self._loss(output, batch.y)
        self._require_loss_shape(value, batch)
        if self.reduction == "mean":
            return value
        return value / batch.size if self.reduction == "sum" else value.mean()

    def batch_loss(self, params: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """The mean loss over the points of the batch, shape ``()``."""
        return self.output_loss(self.output(params, batch.x), batch)

    def sample_losses(self, params: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """The loss of every point on its own, shape ``(n,)``."""
        output = self.output(params, batch.x)
        if self.reduction == "none":
            value = self._loss(output, batch.y)
            self._require_loss_shape(value, batch)
            return value
        return self._losses_of_rows(output, batch)

    def _require_loss_shape(self, value: object, batch: Batch) -> None:
        if not isinstance(value, Tensor):
            raise LossError(f"loss must return a tensor, got {type(value).__name__}")
        expected = (batch.size,) if self.reduction == "none" else ()
        if tuple(value.shape) != expected:
            raise LossError(
                f"batch {batch.position}: loss returned shape {tuple(value.shape)}, but "
                f"reduction={self.reduction!r} means {expected}. {_ADVICE_ON_LOSS}"
            )

    def _losses_of_rows(self, output: object, batch: Batch, *, vectorize: bool = True) -> Tensor:
        """The loss applied to each row of the output alone, ``(n,)``."""
        outputs = replace(batch, x=output)

        def loss_of_row(point: Batch) -> Tensor:
            value = self._loss(point.x, point.y)
            return value.reshape(()) if self.reduction == "none" else value

        if vectorize:
            try:
                return map_points(loss_of_row, outputs)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # vmap refuses control flow on values; a loop does not
                pass
        points = [outputs.rows(slice(i, i + 1), 1) for i in range(batch.size)]
        return torch.stack([loss_of_row(point) for point in points])

    # --- the check of every claim --------------------------------------------------------

    def check(self, batch: Batch) -> None:
        """Verifies on one batch that the mean over points is what the model and loss compute.

        One forward must leave the global random state unchanged (no active dropout), the forward of
        a random half of the batch must equal those rows (no batch-norm in training mode), and the
        batch's loss must be the mean, sum or vector of the loss over the rows of the output. Costs
        about half a gradient. The random state is restored. Values on the meta device are not
        looked at.

        Raises:
            NonFiniteError: NaN or infinity in the inputs, targets, output or loss.
            DtypeError: Floating-point inputs of another dtype than the parameters.
            TrainingModeError: A random forward, or one that couples points.
            ModelError: The output has no leading dimension over points, or weights are rewritten.
            LossError: The loss is not what `reduction` claims.
        """
        require_finite(_named_inputs(batch), f"batch {batch.position}: tensor")
        if self.device.type == "meta":
            return
        with torch.no_grad(), self.kernels(), preserved_random_state(self.device):
            output = self._checked_output(batch)
            self._check_points_are_separate(output, batch)
            self._check_loss(output, batch)

    def _checked_output(self, batch: Batch) -> object:
        before = random_state(self.device)
        params = {name: p.clone() for name, p in {**self._frozen, **self._params}.items()}
        buffers = {name: b.clone() for name, b in self._buffers.items()}
        versions = {name: t._version for name, t in {**params, **buffers}.items()}
        try:
            output = functional_call(self._module, {**buffers, **params}, (batch.x,))
        except RuntimeError as error:
            self._explain_dtype(batch, error)
            raise
        after = random_state(self.device)
        if not all(torch.equal(b, a) for b, a in zip(before, after, strict=True)):
            raise TrainingModeError(
                "the model's forward draws random numbers (active dropout?)" + self._mode_advice()
            )
        rewritten = [name for name, p in params.items() if p._version != versions[name]]
        if rewritten:
            raise ModelError(
                f"the model's forward rewrites its parameters {rewritten} (max_norm?), so that it "
                "is not a function of them; remove the rewriting"
            )
        written = [
            name
            for name, b in buffers.items()
            if b.is_floating_point() and b._version != versions[name]
        ]
        if written and any(m.training for m in self._module.modules()):
            raise TrainingModeError(
                f"the model's forward rewrites its buffers {written}" + self._mode_advice()
            )
        self._require_rows(output, batch)
        return output

    def _explain_dtype(self, batch: Batch, error: RuntimeError) -> None:
        for name, tensor in named_tensor_leaves(batch.x, "x"):
            if tensor.is_floating_point() and tensor.dtype != self.space.dtype:
                raise DtypeError(
                    f"batch {batch.position}: {name} is {tensor.dtype}, the parameters are "
                    f"{self.space.dtype}; convert one of them"
                ) from error

    def _mode_advice(self) -> str:
        active = [
            name or type(module).__name__
            for name, module in self._module.named_modules()
            if module.training and not list(module.children())
        ]
        if not active:
            return "; an operator needs a deterministic function of the parameters"
        listed = ", ".join(active[:8]) + (", ..." if len(active) > 8 else "")
        return f"; modules in training mode: {listed}. Call model.eval() before making the operator"

    def _require_rows(self, output: object, batch: Batch) -> None:
        leaves = dict(named_tensor_leaves(output, "output"))
        if not leaves:
            raise ModelError(f"the model returned {type(output).__name__}, expected tensors")
        for name, tensor in leaves.items():
            if tensor.ndim == 0 or len(tensor) != batch.size:
                raise ModelError(
                    f"batch {batch.position}: the model's {name} has shape {tuple(tensor.shape)}, "
                    f"expected the {batch.size} points of the batch in its leading dimension; wrap "
                    "the model so that it returns what the loss needs, one row per point"
                )
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise NonFiniteError(
                    f"batch {batch.position}: the model's {name} holds NaN or infinite values"
                )

    def _check_points_are_separate(self, output: object, batch: Batch) -> None:
        half = batch.size // 2
        if half == 0:
            return
        generator = torch.Generator().manual_seed(batch.position)
        chosen = torch.randperm(batch.size, generator=generator, device="cpu")[:half]
        chosen = chosen.sort().values.to(self.device)
        alone = self.output({}, batch.rows(chosen, half).x)
        expected = take_rows(output, chosen)
        for rows, row_alone in zip(tensor_leaves(expected), tensor_leaves(alone), strict=True):
            if not rows.is_floating_point():
                continue
            same = rows.shape == row_alone.shape
            scale = rows.abs().max()
            if not same or (rows - row_alone).abs().max() > self._tolerance() * scale:
                raise TrainingModeError(
                    f"batch {batch.position}: the model's output for half of the points differs "
                    "from its output for them within the whole batch, so that there is no loss of "
                    "one point alone (batch-norm in training mode?)" + self._mode_advice()
                )

    def _tolerance(self) -> float:
        """Relative rounding difference that another batch size may cause."""
        tolerances = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2}
        tolerance = tolerances.get(self.space.dtype, 5e-2)
        # TF32 convolutions are the default of cuDNN, with ten bits of mantissa.
        is_tf32 = self.device.type == "cuda" and self.space.dtype == torch.float32
        return 5e-3 if is_tf32 else tolerance

    def _check_loss(self, output: object, batch: Batch) -> None:
        before = random_state(self.device)
        value = self._loss(output, batch.y)
        if not all(
            torch.equal(b, a) for b, a in zip(before, random_state(self.device), strict=True)
        ):
            raise TrainingModeError("loss draws random numbers; it must be deterministic")
        self._require_loss_shape(value, batch)
        if not value.isfinite().all():
            raise NonFiniteError(
                f"batch {batch.position}: loss returned NaN or infinite values "
                "(are all targets of the batch ignored?)"
            )
        for vectorize in (True, False):
            rows = self._losses_of_rows(output, batch, vectorize=vectorize)
            if rows.shape == (batch.size,) and self._is_reduction_of(value, rows):
                return
        raise LossError(
            f"batch {batch.position}: loss is not the {_reduction_name(self.reduction)} "
            f"(reduction={self.reduction!r}): it gave {_values(value)}, but the points "
            f"alone give {_values(_reduced(rows, self.reduction))} "
            "(class weights, ignore_index, or another reduction?). " + _ADVICE_ON_LOSS
        )

    def _is_reduction_of(self, value: Tensor, rows: Tensor) -> bool:
        tolerances = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3}
        tolerance = tolerances.get(value.dtype, 3e-2)
        if not rows.isfinite().all():
            return False
        expected = _reduced(rows, self.reduction)
        scale = _reduced(rows.abs(), self.reduction).max()
        return bool((value - expected).abs().max() <= tolerance * scale)

    def __repr__(self) -> str:
        loss = self._loss
        loss_name = getattr(loss, "__name__", type(loss).__name__)
        return (
            f"Objective({type(self._module).__name__}, {loss_name}, "
            f"reduction={self.reduction!r}, {self.space!r})"
        )


def map_points(function: Callable[[Batch], _Result], batch: Batch) -> _Result:
    """`torch.func.vmap` over the points of a batch of a function of a batch of one point."""
    leaves = [t for t in tensor_leaves((batch.x, batch.y)) if t.ndim]

    def on_leaves(*rows: Tensor) -> _Result:
        remaining = iter(rows)

        def row(tensor: Tensor) -> Tensor:
            return next(remaining).unsqueeze(0) if tensor.ndim else tensor

        x, y = map_tensors(row, batch.x), map_tensors(row, batch.y)
        return function(replace(batch, x=x, y=y, size=1))

    mapped: _Result = vmap(on_leaves)(*leaves)
    return mapped


def _reduced(rows: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return rows
    return rows.mean() if reduction == "mean" else rows.sum()


def _reduction_name(reduction: Reduction) -> str:
    names = {"mean": "mean", "sum": "sum", "none": "vector"}
    return names[reduction] + " of the losses of its points"


def _values(tensor: Tensor) -> str:
    return f"{tensor.item():.6g}" if tensor.ndim == 0 else f"{tensor[:4].tolist()}"


def _named_inputs(batch: Batch) -> dict[str, Tensor]:
    return {**dict(named_tensor_leaves(batch.x, "x")), **dict(named_tensor_leaves(batch.y, "y"))}


def _refuse_unsuitable(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise ModelError(
            f"model is compiled ({type(model).__name__}) and cannot be differentiated twice; pass "
            "the original module (model._orig_mod of a torch.compile result)"
        )
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            continue
        if module.max_norm is not None:
            raise ModelError(
                f"module {name!r} ({type(module).__name__}) has max_norm={module.max_norm}, which "
                "rewrites the weights in the forward; renormalise once and set max_norm=None"
            )
        if module.sparse:
            raise ModelError(
                f"module {name!r} ({type(module).__name__}) has sparse gradients, which cannot be "
                "differentiated again; set sparse=False"
            )


def _copied(module: _Module, argument: str) -> _Module:
    try:
        return copy.deepcopy(module)
    except Exception as error:
        raise ModelError(
            f"{argument} ({type(module).__name__}) cannot be copied ({error}); operators work on "
            "their own copy. Remove attributes that hold tensors with a graph, or pass the plain "
            "module inside a wrapper (model.module of a DistributedDataParallel)"
        ) from error
