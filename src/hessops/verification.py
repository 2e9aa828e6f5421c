"""Verification: whether a model and a loss are on a batch what they are taken for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from hessops.errors import (
    DataError,
    DtypeError,
    LossError,
    ModelError,
    NonFiniteError,
    TrainingModeError,
)
from hessops.isolation import isolated, preserved_random_state, random_state
from hessops.nested import (
    differentiable_leaves,
    map_tensors,
    named_tensor_leaves,
    tensor_leaves,
)
from hessops.point_loss import ADVICE_ON_LOSS, PointLoss
from hessops.snapshot import ModelSnapshot
from hessops.space import require_finite
from hessops.streaming import Batch, take_rows

_Result = TypeVar("_Result")
# Threads of other libraries (the client of a cluster, for one) draw from Python's global generator
# at any time. What draws in each of so many runs is the model itself.
NUM_RUNS = 5


class Verification:
    """The check of every claim about a model and a loss on one batch.

    What is claimed, what it costs and what is raised stands at `Objective.check`.

    Args:
        snapshot: The model.
        point_loss: The loss and its reduction.
        batch: The points, on the device of the model.

    Example:
        >>> import torch
        >>> from hessops import Batch
        >>> from hessops.point_loss import PointLoss
        >>> from hessops.snapshot import ModelSnapshot
        >>> from hessops.verification import Verification
        >>> weighted = torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9.0]))
        >>> snapshot = ModelSnapshot(torch.nn.Linear(3, 2), weighted)
        >>> batch = Batch.from_raw((torch.ones(4, 3), torch.tensor([0, 1, 1, 0])))
        >>> Verification(snapshot, PointLoss(snapshot.loss, "mean"), batch).run()
        Traceback (most recent call last):
        hessops.errors.LossError: batch 0: loss is not the mean of the losses of its points ...
    """

    def __init__(self, snapshot: ModelSnapshot, point_loss: PointLoss, batch: Batch) -> None:
        self._snapshot = snapshot
        self._point_loss = point_loss
        self._batch = batch
        self._device = snapshot.space.device
        self._dtype = snapshot.space.dtype
        self._place = f"batch {batch.position}"

    def run(self) -> None:
        """Raises an error of `hessops` for the first claim that does not hold."""
        batch = self._batch
        if batch.size == 0:
            raise DataError(f"{self._place} has no points")
        inputs = [*named_tensor_leaves(batch.x, "x"), *named_tensor_leaves(batch.y, "y")]
        require_finite(dict(inputs), f"{self._place}: tensor")
        if self._device.type == "meta":
            return
        with (
            isolated(self._device),
            torch.enable_grad(),
            self._snapshot.kernels(),
            preserved_random_state(self._device),
        ):
            output = self._verified_output()
            self._require_separate_points(output)
            self._require_claimed_loss(output)

    # --- the model ------------------------------------------------------------------------

    def _verified_output(self) -> object:
        """The output of one forward, without its graph."""

        def run() -> tuple[_WatchedForward, object]:
            forward = _WatchedForward(self._snapshot, self._batch.x)
            with (
                self._explaining_arguments(),
                self._explaining_dtypes(_floating(self._batch.x, "x")),
            ):
                return forward, forward.run()

        (forward, output), draws = self._observed(run)
        if draws:
            raise TrainingModeError(
                "the model's forward draws random numbers (active dropout?)" + self._mode_advice()
            )
        self._require_nothing_written(forward)
        self._require_rows(output)
        self._require_dependence(output, forward.leaves)
        return map_tensors(Tensor.detach, output)

    def _observed(self, run: Callable[[], _Result]) -> tuple[_Result, bool]:
        """What something returns, and whether it draws from the global generators."""
        for _ in range(NUM_RUNS):
            *before, of_python = random_state(self._device)
            result = run()
            *after, of_python_after = random_state(self._device)
            if after != before:
                return result, True
            if of_python_after == of_python:
                return result, False
        return result, True

    def _require_nothing_written(self, forward: _WatchedForward) -> None:
        if forward.writes_input:
            raise ModelError(
                "the model's forward writes to its input (an in-place operation on x), so that "
                "the next pass would see other data; use the out-of-place form"
            )
        if forward.written_parameters:
            raise ModelError(
                f"the model's forward rewrites its parameters {forward.written_parameters} "
                "(max_norm?), so that it is not a function of them; remove the rewriting"
            )
        is_training = any(m.training for m in self._snapshot.module.modules())
        if forward.written_buffers and is_training:
            raise TrainingModeError(
                f"the model's forward rewrites its buffers {forward.written_buffers}"
                + self._mode_advice()
            )

    def _require_rows(self, output: object) -> None:
        leaves = dict(named_tensor_leaves(output, "output"))
        if not leaves:
            raise ModelError(f"the model returned {type(output).__name__}, expected tensors")
        size = self._batch.size
        for name, tensor in leaves.items():
            if tensor.ndim == 0 or len(tensor) != size:
                raise ModelError(
                    f"{self._place}: the model's {name} has shape {tuple(tensor.shape)}, "
                    f"expected the {size} points of the batch in its leading dimension; wrap "
                    "the model so that it returns what the loss needs, one row per point"
                )
            if tensor.is_complex():
                raise ModelError(
                    f"{self._place}: the model's {name} is {tensor.dtype}, expected real "
                    "numbers; let the model return torch.view_as_real of it"
                )
            # Infinity is left to the loss, which must be finite: masked logits are -inf.
            if tensor.isnan().any():
                raise NonFiniteError(f"{self._place}: the model's {name} holds NaN")

    def _require_dependence(self, output: object, leaves: Iterable[Tensor]) -> None:
        """The parameters that were passed to the forward, and no others, lead to its output."""
        reached = _leaves_of_graph(tensor_leaves(output))
        for module in (self._snapshot.module, self._snapshot.users_model):
            bypassed = [name for name, p in module.named_parameters() if id(p) in reached]
            if bypassed:
                raise ModelError(
                    f"the model's forward reaches its parameters {bypassed[:8]} by other ways than "
                    "as attributes of its modules (a list of parameters, a function that closes "
                    "over the module, a replaced forward), so that it cannot be taken as a "
                    "function of them; use nn.ParameterList, or methods of the module"
                )
        if not any(id(leaf) in reached for leaf in leaves):
            raise ModelError(
                "the model's output does not depend on its parameters as far as autograd sees (a "
                "forward under torch.no_grad or inference_mode, or detach?)"
            )

    def _require_separate_points(self, output: object) -> None:
        """The forward of a random half of the points gives their rows of the output."""
        half = self._batch.size // 2
        if half == 0:
            return
        generator = torch.Generator().manual_seed(self._batch.position)
        chosen = torch.randperm(self._batch.size, generator=generator, device="cpu")[:half]
        chosen = chosen.sort().values.to(self._device)
        alone = self._output_of_half(self._batch.rows(chosen, half))
        expected = take_rows(output, chosen)
        for rows, row_alone in zip(tensor_leaves(expected), tensor_leaves(alone), strict=True):
            if not rows.is_floating_point():
                continue
            if not _are_close(rows, row_alone, self._tolerance(rows.dtype)):
                raise TrainingModeError(
                    f"{self._place}: the model's output for half of the points differs "
                    "from its output for them within the whole batch, so that there is no loss of "
                    "one point alone (batch-norm in training mode?)" + self._mode_advice()
                )

    def _output_of_half(self, half: Batch) -> object:
        try:
            return self._snapshot.output({}, half.x)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ModelError(
                f"{self._place}: the model fails on {half.size} of the points alone "
                f"({error}); it must take any number of points"
            ) from error

    def _mode_advice(self) -> str:
        active = [
            name or type(module).__name__
            for name, module in self._snapshot.module.named_modules()
            if module.training and not list(module.children())
        ]
        if not active:
            return "; an operator needs a deterministic function of the parameters"
        listed = ", ".join(active[:8]) + (", ..." if len(active) > 8 else "")
        return f"; modules in training mode: {listed}. Call model.eval() before making the operator"

    # --- the loss -------------------------------------------------------------------------

    def _require_claimed_loss(self, output: object) -> None:
        """The loss is what it claims to be of the losses of its points, and so is its gradient."""
        output = map_tensors(lambda t: t.detach().requires_grad_(t.is_floating_point()), output)
        leaves = differentiable_leaves(output)
        value = self._verified_loss(output)
        gradient = self._verified_gradient(value, leaves)
        for vectorize in (True, False):
            rows = self._losses_of_rows(output, vectorize=vectorize)
            contradiction = self._contradiction(value.detach(), gradient, rows, leaves)
            if contradiction is None:
                return
        raise LossError(
            f"{self._place}: loss is not the {self._point_loss.claim} "
            f"(reduction={self._point_loss.reduction!r}): {contradiction} "
            "(class weights, ignore_index, another reduction, or targets that broadcast against "
            "the output?). " + ADVICE_ON_LOSS
        )

    def _verified_loss(self, output: object) -> Tensor:
        """The loss of an output that records gradients."""

        def run() -> tuple[object, Tensor]:
            y = map_tensors(torch.clone, self._batch.y)
            with self._explaining_dtypes(_floating(self._batch.y, "y")):
                return y, self._point_loss.function(map_tensors(torch.clone, output), y)

        (y, value), draws = self._observed(run)
        if draws:
            raise TrainingModeError("loss draws random numbers; it must be deterministic")
        self._point_loss.require_shape(value, self._batch)
        if _is_written(y):
            raise LossError("loss writes to its target (an in-place operation on y)")
        if not value.isfinite().all():
            raise NonFiniteError(
                f"{self._place}: loss returned NaN or infinite values "
                "(are all targets of the batch ignored?)"
            )
        self._require_function_of_output(value, output, y)
        return value

    def _require_function_of_output(self, value: Tensor, output: object, y: object) -> None:
        if not value.requires_grad:
            raise LossError(
                "loss is not a differentiable function of the model's output (computed under "
                "torch.no_grad, from .item(), numpy or argmax?)"
            )
        constant = map_tensors(lambda t: t.detach().clone(), output)
        if self._point_loss.function(constant, y).requires_grad:
            raise LossError(
                "loss depends on other tensors with gradients than the model's output (a penalty "
                "on its parameters?), whose curvature would be missing; add a quadratic penalty "
                "c/2·|θ|² as operator.shift(c), and detach what is a constant"
            )

    def _verified_gradient(self, value: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        """The gradient of the loss by the output."""
        with self._explaining_dtypes(named_tensor_leaves(self._batch.y, "y")):
            gradient = _output_gradient(value, leaves)
        if not gradient.isfinite().all():
            raise NonFiniteError(
                f"{self._place}: the gradient of loss by the model's output holds NaN or "
                "infinite values (a square root or norm at zero?)"
            )
        return gradient

    def _losses_of_rows(self, output: object, *, vectorize: bool) -> Tensor:
        copies = map_tensors(torch.clone, output)
        try:
            return self._point_loss.losses_of_rows(copies, self._batch, vectorize=vectorize)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise LossError(
                f"{self._place}: loss fails on one point alone ({error}), so that it is "
                f"not the {self._point_loss.claim}. {ADVICE_ON_LOSS}"
            ) from error

    def _contradiction(
        self, value: Tensor, gradient: Tensor, rows: Tensor, leaves: Sequence[Tensor]
    ) -> str | None:
        """How the losses of the points alone differ from what the loss claims, if they do."""
        if rows.shape != (self._batch.size,) or not self._is_value_of(value, rows):
            expected = self._point_loss.reduce(rows)
            return f"it gave {_values(value)}, but the points alone give {_values(expected)}"
        if not self._is_gradient_of(gradient, rows, leaves):
            return "its gradient by the output is not that of the losses of the points"
        return None

    def _is_value_of(self, value: Tensor, rows: Tensor) -> bool:
        tolerances = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3}
        tolerance = tolerances.get(value.dtype, 3e-2)
        rows = rows.detach()
        if not rows.isfinite().all():
            return False
        expected = self._point_loss.reduce(rows)
        scale = self._point_loss.reduce(rows.abs()).max()
        return bool((value - expected).abs().max() <= tolerance * scale)

    def _is_gradient_of(self, gradient: Tensor, rows: Tensor, leaves: Sequence[Tensor]) -> bool:
        if not rows.requires_grad:
            return False
        expected = _output_gradient(self._point_loss.reduce(rows), leaves)
        if gradient.dtype == torch.float16:
            return True  # where 1/n may underflow
        difference = (gradient - expected).abs().max()
        return bool(difference <= self._tolerance(gradient.dtype) * expected.abs().max())

    # --- for both -------------------------------------------------------------------------

    @contextmanager
    def _explaining_dtypes(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[None]:
        """Says which of some tensors has another dtype than the parameters where torch fails."""
        try:
            yield
        except RuntimeError as error:
            for name, tensor in tensors:
                if tensor.dtype != self._dtype:
                    raise DtypeError(
                        f"{self._place}: {name} is {tensor.dtype}, the parameters are "
                        f"{self._dtype}; convert one of them ({error})"
                    ) from error
            raise

    @contextmanager
    def _explaining_arguments(self) -> Iterator[None]:
        """Says where a forward fails that it was given a tuple or mapping as one argument."""
        try:
            yield
        except Exception as error:
            for kind, call in ((tuple, "*x"), (Mapping, "**x")):
                if isinstance(self._batch.x, kind):
                    error.add_note(
                        f"{self._place}: x is a {type(self._batch.x).__name__}, which the model "
                        "gets as one argument; for a model that takes several, pass a module whose "
                        f"forward(x) returns model({call})"
                    )
            raise

    def _tolerance(self, dtype: torch.dtype) -> float:
        """Relative rounding difference that another batch size may cause."""
        tolerances = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2}
        tolerance = max(tolerances.get(t, 5e-2) for t in (dtype, self._dtype))
        # TF32 convolutions are the default of cuDNN, with ten bits of mantissa.
        is_tf32 = self._device.type == "cuda" and self._dtype == torch.float32
        return max(5e-3, tolerance) if is_tf32 else tolerance


class _WatchedForward:
    """One forward on copies throughout: what it writes to is seen, and nobody's tensors change."""

    def __init__(self, snapshot: ModelSnapshot, x: object) -> None:
        self._snapshot = snapshot
        self._values = {**snapshot.frozen, **snapshot.params}
        self._leaves = {
            name: p.detach().requires_grad_(p.is_floating_point())
            for name, p in self._values.items()
        }
        self._params = {name: leaf.clone() for name, leaf in self._leaves.items()}
        self._buffers = {name: b.clone() for name, b in snapshot.buffers.items()}
        self._x = map_tensors(torch.clone, x)
        tensors = {**self._params, **self._buffers}
        self._versions = {name: t._version for name, t in tensors.items()}

    def run(self) -> object:
        """The output, with a graph that leads to `leaves`."""
        return self._snapshot.call({**self._buffers, **self._params}, self._x)

    @property
    def leaves(self) -> Iterable[Tensor]:
        """The parameters, frozen ones too, as the graph knows them."""
        return self._leaves.values()

    @property
    def writes_input(self) -> bool:
        """Whether the forward wrote to its input."""
        return _is_written(self._x)

    @property
    def written_parameters(self) -> list[str]:
        """The parameters that the forward wrote to."""
        # Writing through `.data` leaves no other trace than the values.
        return [
            name
            for name, p in self._params.items()
            if p._version != self._versions[name] or not torch.equal(p, self._values[name])
        ]

    @property
    def written_buffers(self) -> list[str]:
        """The buffers that the forward wrote to, but for counters."""
        return [
            name
            for name, b in self._buffers.items()
            if b.is_floating_point() and b._version != self._versions[name]
        ]


def _output_gradient(value: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """The gradient of a loss by the output, flat; of a vector, with weights that differ."""
    weights = torch.linspace(1, 2, value.numel(), dtype=value.dtype, device=value.device)
    gradients = torch.autograd.grad(value, leaves, weights.view_as(value), allow_unused=True)
    parts = [
        torch.zeros_like(leaf) if g is None else g
        for g, leaf in zip(gradients, leaves, strict=True)
    ]
    return torch.cat([part.reshape(-1) for part in parts])


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


def _floating(nested: object, name: str) -> list[tuple[str, Tensor]]:
    return [(leaf, t) for leaf, t in named_tensor_leaves(nested, name) if t.is_floating_point()]


def _values(tensor: Tensor) -> str:
    return f"{tensor.item():.6g}" if tensor.ndim == 0 else f"{tensor[:4].tolist()}"
