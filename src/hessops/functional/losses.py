"""Losses as pure functions of a dictionary of parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from hessops.errors import ArgumentTypeError, ParameterNameError
from hessops.functional.hvp import require_like
from hessops.functional.seen import SeenBatches
from hessops.isolation import (
    is_transformed,
    isolated,
    outside_transforms,
    untransformed,
    without_autocast,
    without_remarks,
)
from hessops.nested import map_tensors, tensor_leaves
from hessops.objective import Objective
from hessops.point_loss import Loss, Reduction
from hessops.space import ParameterSpace
from hessops.streaming import Batch, BatchStream, Unpack

Params = Mapping[str, Tensor]


class ModelFunctions:
    """A model and a loss as functions of any of the model's parameters and of a batch.

    Every batch is checked when it is first seen (see `Objective.check`), except inside a ``vmap``
    over it, where its values are hidden.

    Args:
        model: A module; the functions work on a copy.
        loss: ``loss(output, target)``.
        reduction: What `loss` returns.
    """

    def __init__(self, model: nn.Module, loss: Loss, reduction: Reduction) -> None:
        self.objective = Objective(model, loss, reduction=reduction)
        module = self.objective.model
        self._every = dict(module.named_parameters())
        first_names = {id(p): name for name, p in self._every.items()}
        self._names = {
            name: first_names[id(p)] for name, p in module.named_parameters(remove_duplicate=False)
        }
        self._seen = SeenBatches()

    def params(self, params: Params) -> dict[str, Tensor]:
        """The given parameters under their first names, in the model's order.

        Raises:
            ArgumentTypeError: Not a mapping of tensors.
            ParameterNameError: No entry, an unknown name, or one parameter named twice.
            ShapeError, DtypeError: An entry unlike the model's.
        """
        if not isinstance(params, Mapping):
            raise ArgumentTypeError(
                f"params must be a mapping from names to tensors, got {type(params).__name__}"
            )
        given: dict[str, Tensor] = {}
        for key, tensor in params.items():
            name = self._names.get(key)
            if name is None:
                raise ParameterNameError(
                    f"params names the unknown parameter {key!r}; the model has "
                    f"{list(self._names)[:8]}"
                )
            if name in given:
                raise ParameterNameError(f"params names the parameter {name!r} twice ({key!r})")
            if not isinstance(tensor, Tensor):
                raise ArgumentTypeError(
                    f"params[{key!r}] must be a tensor, got {type(tensor).__name__}"
                )
            require_like(tensor, self._every[name], f"params[{key!r}]")
            given[name] = tensor
        if not given:
            raise ParameterNameError("params is empty: name at least one parameter")
        return {name: given[name] for name in self._every if name in given}

    def batch(self, x: object, y: object) -> Batch:
        """Inputs and targets on the model's device, checked when they are new."""
        batch = Batch.from_raw((x, y))
        self._check_if_new(batch)
        device = self.objective.device
        return replace(
            batch,
            x=map_tensors(lambda t: t.to(device), batch.x),
            y=map_tensors(lambda t: t.to(device), batch.y),
        )

    def _check_if_new(self, batch: Batch) -> None:
        batch = replace(
            batch,
            x=map_tensors(untransformed, batch.x),
            y=map_tensors(untransformed, batch.y),
        )
        leaves = list(tensor_leaves((batch.x, batch.y)))
        if any(is_transformed(t) for t in leaves) or self._seen.holds(batch):
            return
        with outside_transforms():
            self.check(batch.to(self.objective.device))
        self._seen.add(batch)

    def check(self, batch: Batch) -> None:
        """What is verified of a batch that was not seen before."""
        self.objective.check(batch)

    @contextmanager
    def state(self) -> Iterator[None]:
        """The torch state in which the functions can be differentiated to any order."""
        device = self.objective.device
        with without_remarks(), without_autocast(device), self.objective.kernels(any_order=True):
            yield


def space_of(params: Params) -> ParameterSpace:
    """The flat order of parameters that are in the model's order."""
    return ParameterSpace.from_tensors(params)


class CheckedStream:
    """The batches of a loader on the model's device, each checked in the first whole pass."""

    def __init__(
        self,
        data_loader: Iterable[object],
        device: torch.device,
        check: Callable[[Batch], None],
        unpack: Unpack | None,
    ) -> None:
        self._stream = BatchStream(data_loader, device=device, unpack=unpack)
        self._check = check
        self.is_checked = False

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self._stream)
        while True:
            with outside_transforms(), isolated(self._stream.device):
                batch = next(batches, None)
                if batch is not None and not self.is_checked:
                    self._check(batch)
            if batch is None:
                break
            yield batch
        self.is_checked = True


def create_batch_loss_function(
    model: nn.Module, loss: Loss, *, reduction: Reduction = "mean"
) -> Callable[[Params, object, object], Tensor]:
    r"""The function ``(params, x, y)`` ↦ :math:`\frac1n \sum_i \ell_i(\theta)`, shape ``()``.

    It composes with `torch.func` (``grad``, ``jacrev``, ``vmap`` over parameters, forward mode) and
    with autograd: layers of which torch gets third or forward derivatives wrong are written out.
    The model's values, taken when the function is made, stand in for parameters that are not given.

    Args:
        model: A module in eval mode; the function works on a copy.
        loss: ``loss(output, target)``; see `Objective` for what is required of model and loss.
        reduction: What `loss` returns: ``"mean"``, ``"sum"`` or ``"none"``. The function is the
            mean in each case.

    Returns:
        A function of a dictionary with some or all of the model's parameters, and of inputs and
        targets whose tensors share their leading dimension n.

    Raises:
        HessopsError: Here and from the returned function; see `Objective`.

    Example:
        >>> import torch
        >>> from hessops.functional import create_batch_loss_function
        >>> batch_loss = create_batch_loss_function(
        ...     torch.nn.Linear(1, 1, bias=False), torch.nn.MSELoss()
        ... )
        >>> params, x, y = (
        ...     {"weight": torch.ones(1, 1)},
        ...     torch.tensor([[1.0], [3.0]]),
        ...     torch.zeros(2, 1),
        ... )
        >>> batch_loss(params, x, y)
        tensor(5.)
        >>> torch.func.grad(batch_loss)(params, x, y)
        {'weight': tensor([[10.]])}
    """
    functions = ModelFunctions(model, loss, reduction)

    def batch_loss(params: Params, x: object, y: object) -> Tensor:
        values, batch = functions.params(params), functions.batch(x, y)
        with functions.state():
            return functions.objective.batch_loss(values, batch)

    return batch_loss


def batch_loss_function(
    model: nn.Module, loss: Loss, x: object, y: object, *, reduction: Reduction = "mean"
) -> Callable[[Params], Tensor]:
    """`create_batch_loss_function` at one batch: ``params`` ↦ a tensor ``()``.

    Args:
        model: As of `create_batch_loss_function`, like `loss` and `reduction`.
        loss: ``loss(output, target)``.
        x: Inputs.
        y: Targets.
        reduction: What `loss` returns.

    Returns:
        A function of a dictionary of parameters to a tensor ``()``.

    Raises:
        HessopsError: Here and from the returned function; see `Objective`.

    Example:
        >>> import torch
        >>> from hessops.functional import batch_loss_function
        >>> model, x = torch.nn.Linear(1, 1, bias=False), torch.tensor([[1.0], [3.0]])
        >>> batch_loss = batch_loss_function(model, torch.nn.MSELoss(), x, torch.zeros(2, 1))
        >>> batch_loss({"weight": torch.ones(1, 1)})
        tensor(5.)
    """
    batch_loss = create_batch_loss_function(model, loss, reduction=reduction)
    return lambda params: batch_loss(params, x, y)


def create_per_sample_loss_function(
    model: nn.Module, loss: Loss, *, reduction: Reduction = "mean"
) -> Callable[[Params, object, object], Tensor]:
    r"""The function ``(params, x, y)`` ↦ the losses :math:`\ell_i(\theta)` of the points, ``(n,)``.

    Args:
        model: As of `create_batch_loss_function`, like the other arguments.
        loss: ``loss(output, target)``.
        reduction: What `loss` returns.

    Returns:
        A function of a dictionary of parameters, inputs and targets to a tensor ``(n,)``.

    Raises:
        HessopsError: Here and from the returned function; see `Objective`.

    Example:
        >>> import torch
        >>> from hessops.functional import create_per_sample_loss_function
        >>> losses = create_per_sample_loss_function(
        ...     torch.nn.Linear(1, 1, bias=False), torch.nn.MSELoss()
        ... )
        >>> losses({"weight": torch.ones(1, 1)}, torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))
        tensor([1., 9.])
    """
    functions = ModelFunctions(model, loss, reduction)

    def per_sample_loss(params: Params, x: object, y: object) -> Tensor:
        values, batch = functions.params(params), functions.batch(x, y)
        with functions.state():
            return functions.objective.sample_losses(values, batch)

    return per_sample_loss


def create_empirical_loss_function(
    model: nn.Module,
    loss: Loss,
    data_loader: Iterable[object],
    *,
    reduction: Reduction = "mean",
    unpack: Unpack | None = None,
) -> Callable[[Params], Tensor]:
    r"""The function ``params`` ↦ :math:`L(\theta) = \frac1N \sum_i \ell_i(\theta)`, shape ``()``.

    The mean over all points of the data, however they are split into batches. Differentiating it
    keeps the graphs of all batches.

    Args:
        model: As of `create_batch_loss_function`, like `loss` and `reduction`.
        loss: ``loss(output, target)``.
        data_loader: A ``DataLoader`` or list of batches; see `BatchStream`.
        reduction: What `loss` returns.
        unpack: Function from a raw batch to ``(x, y)``; ``None`` expects pairs.

    Returns:
        A function of a dictionary of parameters to a tensor ``()``.

    Raises:
        HessopsError: Here and from the returned function; see `Objective`.

    Example:
        >>> import torch
        >>> from hessops.functional import create_empirical_loss_function
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> batches = [
        ...     (torch.ones(3, 1), torch.zeros(3, 1)),
        ...     (torch.zeros(1, 1), torch.zeros(1, 1)),
        ... ]
        >>> empirical_loss = create_empirical_loss_function(model, torch.nn.MSELoss(), batches)
        >>> empirical_loss({"weight": torch.ones(1, 1)})
        tensor(0.7500)
    """
    functions = ModelFunctions(model, loss, reduction)
    batches = CheckedStream(data_loader, functions.objective.device, functions.check, unpack)

    def empirical_loss(params: Params) -> Tensor:
        values = functions.params(params)
        with functions.state():
            return mean_over_batches(functions.objective, values, batches)

    return empirical_loss


empirical_loss_function = create_empirical_loss_function


def mean_over_batches(objective: Objective, params: Params, batches: Iterable[Batch]) -> Tensor:
    """The mean loss over the points of several batches, shape ``()``."""
    total, num_points = torch.zeros((), dtype=objective.space.dtype, device=objective.device), 0
    for batch in batches:
        total = total + batch.size * objective.batch_loss(params, batch)
        num_points += batch.size
    return total / num_points
