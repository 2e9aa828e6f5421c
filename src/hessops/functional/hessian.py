"""Hessians of a model's loss over batches and loaders, as products and as dense matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vjp

from hessops.errors import MemoryLimitError
from hessops.functional.checks import require_forward_agreement, require_symmetry
from hessops.functional.columns import chunked
from hessops.functional.gradients import per_sample_gradients, vectorised_or_looped
from hessops.functional.hvp import explaining_forward_mode, pull_rows, require_equal_modes
from hessops.functional.losses import (
    CheckedStream,
    ModelFunctions,
    Params,
    mean_over_batches,
    space_of,
)
from hessops.functional.products import (
    LinearFunction,
    StackedGradient,
    forward_over_reverse_products,
    hessian_products,
)
from hessops.isolation import is_transformed, isolated
from hessops.objective import Objective
from hessops.point_loss import Loss, Reduction
from hessops.space import RestrictTo
from hessops.streaming import Batch, Unpack
from hessops.validation import available_bytes, checked_rows

LossFunction = Callable[[dict[str, Tensor]], Tensor]
HvpFunction = Callable[[Tensor], Tensor]
# Per-sample gradients that `gauss_newton` holds at once.
GRADIENT_BYTES = 2**28


def create_batch_hvp_function(
    model: nn.Module, loss: Loss, reverse_only: bool = True, *, reduction: Reduction = "mean"
) -> Callable[[Params, object, object, Tensor], Tensor]:
    r"""The function ``(params, x, y, vec)`` ↦ :math:`H v` of the mean loss of a batch.

    Composes with `torch.func` and autograd, see `create_batch_loss_function`. A new batch is
    checked when it is first seen, second derivatives included; forward mode in every call.

    Args:
        model: A module in eval mode; the function works on a copy.
        loss: ``loss(output, target)``; see `Objective` for what is required of model and loss.
        reverse_only: ``False`` uses forward over reverse mode, compared with reverse mode.
        reduction: What `loss` returns: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A function of some or all of the parameters, inputs, targets and of a vector ``(P,)`` or
        rows ``(k, P)`` in the flat order of those parameters; the result has the vector's shape.

    Raises:
        ForwardModeError: From the returned function: forward mode is wrong.
        HessopsError: Here and from the returned function; see `Objective`.

    Example:
        >>> import torch
        >>> from hessops.functional import create_batch_hvp_function
        >>> product = create_batch_hvp_function(
        ...     torch.nn.Linear(1, 1, bias=False), torch.nn.MSELoss()
        ... )
        >>> x, y = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
        >>> product({"weight": torch.ones(1, 1)}, x, y, torch.ones(1))
        tensor([10.])
    """
    functions = _HessianFunctions(model, loss, reduction)

    def batch_hvp(params: Params, x: object, y: object, vec: Tensor) -> Tensor:
        values, batch = functions.params(params), functions.batch(x, y)
        space = space_of(values)
        rows = space.flatten(space.unflatten(vec)).reshape(-1, space.size)
        gradient = grad(partial(functions.objective.batch_loss, batch=batch))

        def push(row: Tensor) -> tuple[Tensor, ...]:
            return (space.flatten(jvp(gradient, (values,), (space.unflatten(row),))[1]),)

        def puller() -> Callable[[Tensor], tuple[Tensor, ...]]:
            backward = vjp(gradient, values)[1]
            return lambda row: (space.flatten(backward(space.unflatten(row))[0]),)

        with functions.state():
            if reverse_only:
                return pull_rows(puller(), rows).reshape(vec.shape)
            with explaining_forward_mode():
                result = pull_rows(push, rows)
            tensors = (*values.values(), vec)
            if len(rows) and not any(is_transformed(t) for t in tensors):
                require_equal_modes(result[0], puller()(rows[0])[0])
            return result.reshape(vec.shape)

    return batch_hvp


class _HessianFunctions(ModelFunctions):
    """Functions whose second derivatives are checked too."""

    def check(self, batch: Batch) -> None:
        super().check(batch)
        check_symmetry(self.objective, batch)


def check_symmetry(objective: Objective, batch: Batch) -> None:
    """Refuses a model whose Hessian products on a batch are not symmetric.

    Raises:
        ModelError: Second derivatives are wrong or missing.
    """
    if objective.device.type == "meta":
        return
    with isolated(objective.device), objective.differentiating("the Hessian"):
        products = hessian_products(partial(objective.batch_loss, batch=batch), objective.params)
        what = f"batch {batch.position}: the products of the Hessian"
        require_symmetry(products, objective.space, what, seed=batch.position)


class EmpiricalHessian:
    """Products with the Hessian of the mean loss over a loader; see `create_hvp_function`."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data_loader: Iterable[object],
        *,
        precompute_grad: bool = False,
        use_average: bool = True,
        reverse_only: bool = True,
        track_gradients: bool = False,
        reduction: Reduction = "mean",
        unpack: Unpack | None = None,
        restrict_to: RestrictTo | None = None,
    ) -> None:
        self.objective = Objective(model, loss, restrict_to, reduction=reduction)
        self._stream = CheckedStream(data_loader, self.objective.device, self._check, unpack)
        self._symmetry_is_checked = False
        self._use_average = use_average
        self._forward = not reverse_only and not precompute_grad
        self._track = track_gradients
        # Results that are tracked lead to the user's own parameters.
        live = dict(model.named_parameters())
        self._params = (
            {name: live[name] for name in self.objective.space.names}
            if track_gradients
            else self.objective.params
        )
        self._stacked_gradient = StackedGradient(create_graph=track_gradients)
        self._kept: list[tuple[LinearFunction, int]] | None = None
        if precompute_grad:
            with self._state():
                self._kept = list(self._linearized())

    @contextmanager
    def _state(self) -> Iterator[None]:
        with (
            isolated(self.objective.device),
            torch.set_grad_enabled(self._track),
            self.objective.differentiating("the Hessian", any_order=self._track or self._forward),
        ):
            yield

    def _check(self, batch: Batch) -> None:
        self.objective.check(batch)
        if not self._symmetry_is_checked:
            check_symmetry(self.objective, batch)
            self._symmetry_is_checked = True
        if self._forward:
            function = partial(self.objective.batch_loss, batch=batch)
            with self.objective.differentiating("the Hessian", any_order=True):
                require_forward_agreement(
                    forward_over_reverse_products(function, self.objective.params),
                    hessian_products(function, self.objective.params),
                    self.objective.space,
                    f"batch {batch.position}: reverse_only=False",
                    seed=batch.position,
                )

    def loss_functions(self) -> Iterator[tuple[LossFunction, int]]:
        """What is differentiated, and its weight: batch by batch, or all batches as one."""
        if self._use_average:
            for batch in self._stream:
                yield partial(self.objective.batch_loss, batch=batch), batch.size
        else:
            batches = list(self._stream)
            yield lambda params: mean_over_batches(self.objective, params, batches), 1

    def _linearized(self) -> Iterator[tuple[LinearFunction, int]]:
        for function, weight in self.loss_functions():
            yield self.linearize(function), weight

    def linearize(self, function: LossFunction) -> LinearFunction:
        """The map V ↦ HV for one of the loss functions."""
        if self._forward:
            return forward_over_reverse_products(function, self._params)
        reverse = partial(
            hessian_products,
            function,
            self._params,
            self._stacked_gradient,
            track_gradients=self._track,
        )
        return chunked(reverse, self.objective.space)

    def __call__(self, vec: Tensor) -> Tensor:
        """H times a vector ``(P,)`` or the rows of ``(k, P)``."""
        space = self.objective.space
        rows = checked_rows(vec, space.size, space.dtype, space.device, "vec")
        if self._track:
            rows = vec.to(space.device).reshape(rows.shape)
        if len(rows) == 0:
            return torch.zeros_like(rows)
        with self._state():
            stack = space.unflatten(rows)
            total, weights = torch.zeros_like(rows), 0
            for product, weight in self._kept if self._kept is not None else self._linearized():
                total = total + weight * space.flatten(product(stack))
                weights += weight
            return (total / weights).reshape(vec.shape)

    def products_by_batch(self) -> Iterator[HvpFunction]:
        """One product function per batch."""
        space = self.objective.space

        def of_batch(function: LossFunction, vec: Tensor) -> Tensor:
            rows = checked_rows(vec, space.size, space.dtype, space.device, "vec")
            with self._state():
                product = self.linearize(function)(space.unflatten(rows))
                return space.flatten(product).reshape(vec.shape)

        for function, _ in self.loss_functions():
            yield partial(of_batch, function)


def create_hvp_function(
    model: nn.Module,
    loss: Loss,
    data_loader: Iterable[object],
    precompute_grad: bool = True,
    use_average: bool = True,
    reverse_only: bool = True,
    track_gradients: bool = False,
    *,
    reduction: Reduction = "mean",
    unpack: Unpack | None = None,
    restrict_to: RestrictTo | None = None,
) -> HvpFunction:
    r"""The function v ↦ :math:`H v` with :math:`H = \nabla^2 \frac1N \sum_i \ell_i(\theta)`.

    At the parameters that the model has now; later steps of an optimizer change nothing (with
    `track_gradients` they make torch refuse the graph).

    Args:
        model: A module in eval mode.
        loss: ``loss(output, target)``; see `Objective` for what is required of model and loss.
        data_loader: A ``DataLoader`` or list of batches; see `BatchStream`.
        precompute_grad: Keeps the graph of the gradient of all batches, so that a product pays for
            the second backward pass alone. ``False`` needs the memory of one batch at a time, and
            traverses the model anew for every call.
        use_average: Averages the Hessians of the batches, weighted by their points. ``False``
            differentiates the loss of all batches as one function: the same matrix, in the memory
            of all batches.
        reverse_only: ``False`` uses forward over reverse mode, compared with reverse mode on every
            batch; without effect with `precompute_grad`.
        track_gradients: The products can be differentiated again, by the vector and by the model's
            own parameters.
        reduction: What `loss` returns: ``"mean"``, ``"sum"`` or ``"none"``.
        unpack: Function from a raw batch to ``(x, y)``; ``None`` expects pairs.
        restrict_to: The parameters to differentiate by; ``None`` takes all trainable ones.

    Returns:
        A function of a vector ``(P,)`` or rows ``(k, P)`` to the same shape.

    Raises:
        HessopsError: Here and from the returned function; see `Objective` and `BatchStream`.

    Example:
        >>> import torch
        >>> from hessops.functional import create_hvp_function
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> batches = [
        ...     (torch.ones(3, 1), torch.zeros(3, 1)),
        ...     (torch.zeros(1, 1), torch.zeros(1, 1)),
        ... ]
        >>> create_hvp_function(model, torch.nn.MSELoss(), batches)(torch.ones(1))
        tensor([1.5000])
    """
    return EmpiricalHessian(
        model,
        loss,
        data_loader,
        precompute_grad=precompute_grad,
        use_average=use_average,
        reverse_only=reverse_only,
        track_gradients=track_gradients,
        reduction=reduction,
        unpack=unpack,
        restrict_to=restrict_to,
    )


def get_hvp_function(
    model: nn.Module,
    loss: Loss,
    data_loader: Iterable[object],
    use_hessian_avg: bool = True,
    reverse_only: bool = True,
    track_gradients: bool = False,
    *,
    reduction: Reduction = "mean",
    unpack: Unpack | None = None,
) -> HvpFunction:
    """`create_hvp_function` with ``precompute_grad=False``, under its older name.

    Args:
        model: As of `create_hvp_function`, like the other arguments.
        loss: ``loss(output, target)``.
        data_loader: A ``DataLoader`` or list of batches.
        use_hessian_avg: As `use_average`.
        reverse_only: As there.
        track_gradients: As there.
        reduction: What `loss` returns.
        unpack: Function from a raw batch to ``(x, y)``.

    Returns:
        A function of a vector ``(P,)`` or rows ``(k, P)`` to the same shape.

    Raises:
        HessopsError: As of `create_hvp_function`.

    Example:
        >>> import torch
        >>> from hessops.functional import get_hvp_function
        >>> model, batches = (
        ...     torch.nn.Linear(1, 1, bias=False),
        ...     [(torch.ones(3, 1), torch.zeros(3, 1))],
        ... )
        >>> get_hvp_function(model, torch.nn.MSELoss(), batches)(torch.ones(1))
        tensor([2.])
    """
    return create_hvp_function(
        model,
        loss,
        data_loader,
        precompute_grad=False,
        use_average=use_hessian_avg,
        reverse_only=reverse_only,
        track_gradients=track_gradients,
        reduction=reduction,
        unpack=unpack,
    )


def batch_hvp_gen(
    model: nn.Module,
    loss: Loss,
    data_loader: Iterable[object],
    reverse_only: bool = True,
    *,
    reduction: Reduction = "mean",
    unpack: Unpack | None = None,
) -> Iterator[HvpFunction]:
    """Yields, for every batch, the function v ↦ H_batch v of the mean loss of that batch.

    Args:
        model: As of `create_hvp_function`, like the other arguments.
        loss: ``loss(output, target)``.
        data_loader: A ``DataLoader`` or list of batches.
        reverse_only: ``False`` uses forward over reverse mode.
        reduction: What `loss` returns.
        unpack: Function from a raw batch to ``(x, y)``.

    Returns:
        An iterator of functions of a vector ``(P,)`` or rows ``(k, P)`` to the same shape.

    Raises:
        HessopsError: As of `create_hvp_function`.

    Example:
        >>> import torch
        >>> from hessops.functional import batch_hvp_gen
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> batches = [
        ...     (torch.ones(3, 1), torch.zeros(3, 1)),
        ...     (torch.zeros(1, 1), torch.zeros(1, 1)),
        ... ]
        >>> [
        ...     product(torch.ones(1))
        ...     for product in batch_hvp_gen(model, torch.nn.MSELoss(), batches)
        ... ]
        [tensor([2.]), tensor([0.])]
    """
    by_batch = EmpiricalHessian(
        model,
        loss,
        data_loader,
        reverse_only=reverse_only,
        reduction=reduction,
        unpack=unpack,
    )
    return by_batch.products_by_batch()


def hessian(
    model: nn.Module,
    loss: Loss,
    data_loader: Iterable[object],
    use_hessian_avg: bool = True,
    track_gradients: bool = False,
    *,
    reduction: Reduction = "mean",
    unpack: Unpack | None = None,
    restrict_to: RestrictTo | None = None,
) -> Tensor:
    r"""The Hessian :math:`\nabla^2 \frac1N \sum_i \ell_i(\theta)` as a matrix ``(P, P)``.

    For small models; rows and columns are in the flat order of the trainable parameters.

    Args:
        model: As of `create_hvp_function`, like the other arguments.
        loss: ``loss(output, target)``.
        data_loader: A ``DataLoader`` or list of batches.
        use_hessian_avg: As `use_average`.
        track_gradients: The matrix can be differentiated again by the model's own parameters.
        reduction: What `loss` returns.
        unpack: Function from a raw batch to ``(x, y)``.
        restrict_to: The parameters to differentiate by.

    Raises:
        MemoryLimitError: The matrix does not fit into memory.
        HessopsError: See `Objective` and `BatchStream`.

    Example:
        >>> import torch
        >>> from hessops.functional import hessian
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> hessian(model, torch.nn.MSELoss(), [(x, torch.zeros(2, 1))])
        tensor([[1., 0.],
                [0., 4.]])
    """
    products = EmpiricalHessian(
        model,
        loss,
        data_loader,
        use_average=use_hessian_avg,
        track_gradients=track_gradients,
        reduction=reduction,
        unpack=unpack,
        restrict_to=restrict_to,
    )
    space = products.objective.space
    _require_dense_fits(products.objective)
    return products(torch.eye(space.size, dtype=space.dtype, device=space.device))


def gauss_newton(
    model: nn.Module,
    loss: Loss,
    data_loader: Iterable[object],
    *,
    reduction: Reduction = "mean",
    unpack: Unpack | None = None,
    restrict_to: RestrictTo | None = None,
) -> Tensor:
    r"""The empirical Gauss-Newton matrix :math:`\frac1N \sum_i g_i g_i^\top` as ``(P, P)``.

    For small models, from per-sample gradients of a bounded number of points at a time.

    Args:
        model: As of `create_hvp_function`, like the other arguments.
        loss: ``loss(output, target)``.
        data_loader: A ``DataLoader`` or list of batches.
        reduction: What `loss` returns.
        unpack: Function from a raw batch to ``(x, y)``.
        restrict_to: The parameters to differentiate by.

    Raises:
        MemoryLimitError: The matrix does not fit into memory.
        HessopsError: See `Objective` and `BatchStream`.

    Example:
        >>> import torch
        >>> from hessops.functional import gauss_newton
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # gradients (2, 0) and (0, 2)
        >>> gauss_newton(model, torch.nn.MSELoss(), [(x, torch.zeros(2, 1))])
        tensor([[2., 0.],
                [0., 2.]])
    """
    objective = Objective(model, loss, restrict_to, reduction=reduction)
    space = objective.space
    _require_dense_fits(objective)
    points_at_once = max(1, GRADIENT_BYTES // (space.size * space.dtype.itemsize))
    matrix = torch.zeros(space.size, space.size, dtype=space.dtype, device=space.device)
    num_points = 0
    for batch in CheckedStream(data_loader, objective.device, objective.check, unpack):
        for start in range(0, batch.size, points_at_once):
            size = min(points_at_once, batch.size - start)
            part = batch.rows(slice(start, start + size), size)
            gradients = _flat_gradients(objective, part)
            matrix += gradients.T @ gradients
        num_points += batch.size
    return matrix / num_points


def _flat_gradients(objective: Objective, batch: Batch) -> Tensor:
    """Per-sample gradients as rows ``(n, P)``."""
    with isolated(objective.device), objective.differentiating("the Gauss-Newton matrix"):
        gradients = vectorised_or_looped(
            lambda vectorize: per_sample_gradients(
                objective, objective.params, batch, vectorize=vectorize
            )
        )
        return objective.space.flatten(gradients)


def _require_dense_fits(objective: Objective) -> None:
    space = objective.space
    # The matrix, the identity it is the product of, and the sum.
    needed = 3 * space.size**2 * space.dtype.itemsize
    free = available_bytes(space.device)
    if needed > free:
        raise MemoryLimitError(
            f"a dense matrix of size {space.size} x {space.size} needs about {needed / 2**30:.1f} "
            f"GiB, {free / 2**30:.1f} GiB are free; use create_hvp_function or an operator"
        )
