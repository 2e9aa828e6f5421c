"""Objective: a model and a loss as pure functions of parameters and a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Literal, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from hessops.errors import (
    ArgumentError,
    ArgumentTypeError,
    DataError,
    DtypeError,
    LossError,
    ModelError,
    NonFiniteError,
    TrainingModeError,
)
from hessops.isolation import (
    isolated,
    preserved_random_state,
    random_state,
    twice_differentiable_kernels,
)
from hessops.nested import (
    differentiable_leaves,
    map_tensors,
    named_tensor_leaves,
    tensor_leaves,
)
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
        _refuse_shared_parameters(model, loss)
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
            if current[name].dtype != self.space.dtype:
                raise DtypeError(
                    f"parameter {name!r} of the model is {current[name].dtype} now and was "
                    f"{self.space.dtype}; make a new operator"
                )
        # Inside inference_mode the copies would be inference tensors, which have no gradient.
        with isolated(self.space.device):
            require_finite(current, "parameter")
            # Attention masks are -inf where nothing may be seen.
            require_finite(dict(model.named_buffers()), "buffer", allow_infinite=True)
            self._module = _copied(model, "model").to(self.space.device)
            self._loss = (
                _copied(loss, "loss").to(self.space.device).requires_grad_(False)
                if isinstance(loss, nn.Module)
                else loss
            )
        self._bind()

    def _bind(self) -> None:
        """Names the tensors of the copied model: where to differentiate, and what stays."""
        every = {name: p.detach() for name, p in self._module.named_parameters()}
        self._params = {name: every[name] for name in self.space.names}
        self._frozen = {name: p for name, p in every.items() if name not in self._params}
        self._buffers = {name: b.detach() for name, b in self._module.named_buffers()}
        self._has_rnn = any(isinstance(m, nn.RNNBase) for m in self._module.modules())
        # The parametrization's class is private to torch.
        self._has_weight_norm = any(
            type(m).__name__ == "_WeightNorm" for m in self._module.modules()
        )

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
            without_cudnn=self._has_rnn and self.device.type == "cuda",
            with_explicit_weight_norm=self._has_weight_norm,
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
        batch's loss must be the mean, sum or vector of the loss over the rows of the output, in its
        value and in its gradient by the output: where all outputs are zero, as those of a new last
        layer may be, every weighted mean has the same value. Costs about half a gradient. The
        random state is restored. Values on the meta device are not looked at.

        Raises:
            DataError: A batch of no points.
            NonFiniteError: NaN or infinity in the inputs, targets, output, loss or its gradient.
            DtypeError: Floating-point inputs or targets of another dtype than the parameters that
                the model or loss does not take.
            TrainingModeError: A random forward, or one that couples points.
            ModelError: The output has no leading dimension over points, does not depend on the
                parameters, or reaches them by ways that cannot be replaced; weights or inputs are
                rewritten.
            LossError: The loss is not what `reduction` claims, or not a function of output and
                target alone.
        """
        if batch.size == 0:
            raise DataError(f"batch {batch.position} has no points")
        require_finite(_named_inputs(batch), f"batch {batch.position}: tensor")
        if self.device.type == "meta":
            return
        with (
            isolated(self.device),
            torch.enable_grad(),
            self.kernels(),
            preserved_random_state(self.device),
        ):
            output = self._checked_output(batch)
            self._check_points_are_separate(output, batch)
            self._check_loss(output, batch)

    def _checked_output(self, batch: Batch) -> object:
        before = random_state(self.device)
        # Copies throughout: what the forward writes to is seen, and nobody's tensors are changed.
        values = {**self._frozen, **self._params}
        leaves = {
            name: p.detach().requires_grad_(p.is_floating_point()) for name, p in values.items()
        }
        params = {name: leaf.clone() for name, leaf in leaves.items()}
        buffers = {name: b.clone() for name, b in self._buffers.items()}
        x = map_tensors(torch.clone, batch.x)
        versions = {name: t._version for name, t in {**params, **buffers}.items()}
        with self._explaining_dtypes(batch, _floating(batch.x, "x")):
            output = functional_call(self._module, {**buffers, **params}, (x,))
        if random_state(self.device) != before:
            raise TrainingModeError(
                "the model's forward draws random numbers (active dropout?)" + self._mode_advice()
            )
        if _is_written(x):
            raise ModelError(
                "the model's forward writes to its input (an in-place operation on x), so that "
                "the next pass would see other data; use the out-of-place form"
            )
        # Writing through `.data` leaves no other trace than the values.
        rewritten = [
            name
            for name, p in params.items()
            if p._version != versions[name] or not torch.equal(p, values[name])
        ]
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
        self._require_dependence(output, leaves)
        return map_tensors(Tensor.detach, output)

    def _require_dependence(self, output: object, leaves: Mapping[str, Tensor]) -> None:
        """The parameters that were passed to the forward, and no others, lead to its output."""
        reached = _leaves_of_graph(tensor_leaves(output))
        for module in (self._module, self._users_model):
            bypassed = [name for name, p in module.named_parameters() if id(p) in reached]
            if bypassed:
                raise ModelError(
                    f"the model's forward reaches its parameters {bypassed[:8]} by other ways than "
                    "as attributes of its modules (a list of parameters, a function that closes "
                    "over the module, a replaced forward), so that it cannot be taken as a "
                    "function of them; use nn.ParameterList, or methods of the module"
                )
        if not any(id(leaf) in reached for leaf in leaves.values()):
            raise ModelError(
                "the model's output does not depend on its parameters as far as autograd sees (a "
                "forward under torch.no_grad or inference_mode, or detach?)"
            )

    @contextmanager
    def _explaining_dtypes(
        self, batch: Batch, tensors: Iterable[tuple[str, Tensor]]
    ) -> Iterator[None]:
        """Says which of some tensors has another dtype than the parameters where torch fails."""
        try:
            yield
        except RuntimeError as error:
            for name, tensor in tensors:
                if tensor.dtype != self.space.dtype:
                    raise DtypeError(
                        f"batch {batch.position}: {name} is {tensor.dtype}, the parameters are "
                        f"{self.space.dtype}; convert one of them ({error})"
                    ) from error
            raise

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
            if tensor.is_complex():
                raise ModelError(
                    f"batch {batch.position}: the model's {name} is {tensor.dtype}, expected real "
                    "numbers; let the model return torch.view_as_real of it"
                )
            # Infinity is left to the loss, which must be finite: masked logits are -inf.
            if tensor.isnan().any():
                raise NonFiniteError(f"batch {batch.position}: the model's {name} holds NaN")

    def _check_points_are_separate(self, output: object, batch: Batch) -> None:
        half = batch.size // 2
        if half == 0:
            return
        generator = torch.Generator().manual_seed(batch.position)
        chosen = torch.randperm(batch.size, generator=generator, device="cpu")[:half]
        chosen = chosen.sort().values.to(self.device)
        alone = self._output_of_half(batch.rows(chosen, half))
        expected = take_rows(output, chosen)
        for rows, row_alone in zip(tensor_leaves(expected), tensor_leaves(alone), strict=True):
            if not rows.is_floating_point():
                continue
            if not _are_close(rows, row_alone, self._tolerance(rows.dtype)):
                raise TrainingModeError(
                    f"batch {batch.position}: the model's output for half of the points differs "
                    "from its output for them within the whole batch, so that there is no loss of "
                    "one point alone (batch-norm in training mode?)" + self._mode_advice()
                )

    def _output_of_half(self, batch: Batch) -> object:
        try:
            return self.output({}, batch.x)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ModelError(
                f"batch {batch.position}: the model fails on {batch.size} of the points alone "
                f"({error}); it must take any number of points"
            ) from error

    def _tolerance(self, dtype: torch.dtype) -> float:
        """Relative rounding difference that another batch size may cause."""
        tolerances = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2}
        tolerance = max(tolerances.get(t, 5e-2) for t in (dtype, self.space.dtype))
        # TF32 convolutions are the default of cuDNN, with ten bits of mantissa.
        is_tf32 = self.device.type == "cuda" and self.space.dtype == torch.float32
        return max(5e-3, tolerance) if is_tf32 else tolerance

    def _check_loss(self, output: object, batch: Batch) -> None:
        output = map_tensors(lambda t: t.detach().requires_grad_(t.is_floating_point()), output)
        leaves = differentiable_leaves(output)
        value = self._checked_loss(output, batch)
        with self._explaining_dtypes(batch, named_tensor_leaves(batch.y, "y")):
            gradient = self._output_gradient(value, leaves)
        if not gradient.isfinite().all():
            raise NonFiniteError(
                f"batch {batch.position}: the gradient of loss by the model's output holds NaN or "
                "infinite values (a square root or norm at zero?)"
            )
        for vectorize in (True, False):
            rows = self._checked_losses_of_rows(output, batch, vectorize=vectorize)
            if rows.shape != (batch.size,) or not self._is_reduction_of(value.detach(), rows):
                reason = (
                    f"it gave {_values(value)}, but the points alone give "
                    f"{_values(_reduced(rows, self.reduction))}"
                )
            elif not self._is_gradient_of(gradient, rows, leaves):
                reason = "its gradient by the output is not that of the losses of the points"
            else:
                return
        raise LossError(
            f"batch {batch.position}: loss is not the {_reduction_name(self.reduction)} "
            f"(reduction={self.reduction!r}): {reason} "
            "(class weights, ignore_index, or another reduction?). " + _ADVICE_ON_LOSS
        )

    def _checked_loss(self, output: object, batch: Batch) -> Tensor:
        """The loss of an output that records gradients."""
        before = random_state(self.device)
        y = map_tensors(torch.clone, batch.y)
        with self._explaining_dtypes(batch, _floating(batch.y, "y")):
            value = self._loss(map_tensors(torch.clone, output), y)
        if random_state(self.device) != before:
            raise TrainingModeError("loss draws random numbers; it must be deterministic")
        self._require_loss_shape(value, batch)
        if _is_written(y):
            raise LossError("loss writes to its target (an in-place operation on y)")
        if not value.isfinite().all():
            raise NonFiniteError(
                f"batch {batch.position}: loss returned NaN or infinite values "
                "(are all targets of the batch ignored?)"
            )
        if not value.requires_grad:
            raise LossError(
                "loss is not a differentiable function of the model's output (computed under "
                "torch.no_grad, from .item(), numpy or argmax?)"
            )
        constant = map_tensors(lambda t: t.detach().clone(), output)
        if self._loss(constant, y).requires_grad:
            raise LossError(
                "loss depends on other tensors with gradients than the model's output (a penalty "
                "on its parameters?), whose curvature would be missing; add a quadratic penalty "
                "c/2·|θ|² as operator.shift(c), and detach what is a constant"
            )
        return value

    def _checked_losses_of_rows(self, output: object, batch: Batch, *, vectorize: bool) -> Tensor:
        copies = map_tensors(torch.clone, output)
        try:
            return self._losses_of_rows(copies, batch, vectorize=vectorize)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise LossError(
                f"batch {batch.position}: loss fails on one point alone ({error}), so that it is "
                f"not the {_reduction_name(self.reduction)}. {_ADVICE_ON_LOSS}"
            ) from error

    def _output_gradient(self, value: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        """The gradient of a loss by the output, flat; of a vector, with weights that differ."""
        weights = torch.linspace(1, 2, value.numel(), dtype=value.dtype, device=value.device)
        gradients = torch.autograd.grad(value, leaves, weights.view_as(value), allow_unused=True)
        parts = [
            torch.zeros_like(leaf) if g is None else g
            for g, leaf in zip(gradients, leaves, strict=True)
        ]
        return torch.cat([part.reshape(-1) for part in parts])

    def _is_gradient_of(self, gradient: Tensor, rows: Tensor, leaves: Sequence[Tensor]) -> bool:
        if not rows.requires_grad:
            return False
        expected = self._output_gradient(_reduced(rows, self.reduction), leaves)
        if gradient.dtype == torch.float16:
            return True  # where 1/n may underflow
        difference = (gradient - expected).abs().max()
        return bool(difference <= self._tolerance(gradient.dtype) * expected.abs().max())

    def _is_reduction_of(self, value: Tensor, rows: Tensor) -> bool:
        tolerances = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3}
        tolerance = tolerances.get(value.dtype, 3e-2)
        rows = rows.detach()
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


def _floating(nested: object, name: str) -> list[tuple[str, Tensor]]:
    return [(leaf, t) for leaf, t in named_tensor_leaves(nested, name) if t.is_floating_point()]


def _leaves_of_graph(tensors: Iterable[Tensor]) -> set[int]:
    """The identities of the leaves that the graphs of some tensors lead to."""
    recording = [t for t in tensors if t.requires_grad]
    leaves = {id(t) for t in recording if t.grad_fn is None}
    pending = [t.grad_fn for t in recording if t.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        following = {fn for fn, _ in node.next_functions if fn is not None} - seen
        seen |= following
        pending.extend(following)
    return leaves


def _are_close(first: Tensor, second: Tensor, tolerance: float) -> bool:
    """Whether two tensors agree, relative to their largest finite entry; equal infinities do."""
    if first.shape != second.shape:
        return False
    scale = torch.where(first.isfinite(), first, 0.0).abs().max()
    difference = torch.where(first == second, 0.0, (first - second).abs()).max()
    return bool(difference <= tolerance * scale)


def _is_written(copies: object) -> bool:
    """Whether any of some tensors that were just cloned has been written to since."""
    return any(tensor._version > 0 for tensor in tensor_leaves(copies))


def _named_inputs(batch: Batch) -> dict[str, Tensor]:
    return {**dict(named_tensor_leaves(batch.x, "x")), **dict(named_tensor_leaves(batch.y, "y"))}


def _refuse_unsuitable(model: nn.Module) -> None:
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ModelError(f"model is a {type(model).__name__}; pass the module inside, model.module")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
            part = f" in its module {name!r}" if name else ""
            raise ModelError(
                f"model is compiled{part} ({type(module).__name__}) and cannot be differentiated "
                "twice; use the original module (_orig_mod of a torch.compile result)"
            )
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
        if module.scale_grad_by_freq:
            raise ModelError(
                f"module {name!r} ({type(module).__name__}) has scale_grad_by_freq=True, so that "
                "its gradients are not those of the loss; set it to False"
            )


def _refuse_shared_parameters(model: nn.Module, loss: Loss) -> None:
    if not isinstance(loss, nn.Module):
        return
    of_model = {id(p): name for name, p in model.named_parameters()}
    shared = [of_model[id(p)] for p in loss.parameters() if id(p) in of_model]
    if shared:
        raise LossError(
            f"loss holds parameters of the model {shared[:8]}, by which it would not be "
            "differentiated: a loss is a function of output and target; add a quadratic penalty "
            "c/2·|θ|² as operator.shift(c), or let the model return what the loss needs"
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
