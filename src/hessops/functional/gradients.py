"""Per-sample gradients of an objective."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, vjp

from hessops.errors import (
    ArgumentTypeError,
    HessopsError,
    ModelError,
    NonFiniteProductError,
    ShapeError,
)
from hessops.functional.hvp import pull_rows
from hessops.functional.losses import ModelFunctions, Params, space_of
from hessops.functional.products import Stack, differentiable
from hessops.objective import Objective
from hessops.point_loss import Loss, Reduction, map_points
from hessops.streaming import Batch

# Memory for the per-sample gradients of one chunk of points.
GRADIENT_BYTES = 2**28


def per_sample_gradients(
    objective: Objective, params: Mapping[str, Tensor], batch: Batch, *, vectorize: bool = True
) -> Stack:
    r"""The gradients :math:`g_i = \nabla\ell_i(\theta)` of every point alone.

    Args:
        objective: Model and loss.
        params: Where to take the gradients, ``{name: tensor}``.
        batch: n points.
        vectorize: Uses `torch.func.vmap`, which some models refuse; without it, one backward pass
            per point.

    Returns:
        ``{name: (n, *shape)}``: n·P numbers; callers bound n.

    Example:
        >>> import torch
        >>> from hessops import Batch, Objective
        >>> from hessops.functional import per_sample_gradients
        >>> objective = Objective(torch.nn.Linear(3, 2), torch.nn.MSELoss())
        >>> batch = Batch.from_raw((torch.zeros(4, 3), torch.ones(4, 2)))
        >>> per_sample_gradients(objective, objective.params, batch)["weight"].shape
        torch.Size([4, 2, 3])
    """
    if vectorize:

        def gradient_of_row(point: Batch) -> Stack:
            gradients: Stack = grad(lambda p: objective.batch_loss(p, point))(dict(params))
            return gradients

        return map_points(gradient_of_row, batch)
    points = [batch.rows(slice(i, i + 1), 1) for i in range(batch.size)]
    gradients = [mean_gradient(objective, params, point) for point in points]
    return {name: torch.stack([g[name] for g in gradients]) for name in params}


def mean_gradient(
    objective: Objective, params: Mapping[str, Tensor], batch: Batch
) -> dict[str, Tensor]:
    """The gradient of the mean loss over the batch, by one backward pass.

    Args:
        objective: Model and loss.
        params: Where to take the gradient, ``{name: tensor}``.
        batch: n points.

    Returns:
        ``{name: shape}``, without a graph.

    Example:
        >>> import torch
        >>> from hessops import Batch, Objective
        >>> from hessops.functional import mean_gradient
        >>> objective = Objective(torch.nn.Linear(3, 2), torch.nn.MSELoss())
        >>> batch = Batch.from_raw((torch.zeros(4, 3), torch.ones(4, 2)))
        >>> mean_gradient(objective, objective.params, batch)["weight"].shape
        torch.Size([2, 3])
    """
    leaves = differentiable(params)
    with torch.enable_grad():
        value = objective.batch_loss(leaves, batch)
    if not value.requires_grad:
        return {name: torch.zeros_like(p) for name, p in leaves.items()}
    gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(leaves.items(), gradients, strict=True)
    }


@dataclass
class PerSampleGradients:
    r"""The flat gradients :math:`g_i = \nabla\ell_i(\theta)` of points, some at a time.

    Vectorised where torch can, and where the result adds up; one backward pass per point elsewhere.

    Attributes:
        chunk_size: Points whose gradients are held at once; ``None`` takes what fits 256 MiB.
        vectorize: Whether several points are tried at once.

    Example:
        >>> import torch
        >>> from hessops import Batch, Objective
        >>> from hessops.functional import PerSampleGradients
        >>> objective = Objective(torch.nn.Linear(3, 2), torch.nn.MSELoss())
        >>> batch = Batch.from_raw((torch.zeros(5, 3), torch.ones(5, 2)))
        >>> [rows.shape for rows in PerSampleGradients(chunk_size=3).chunks(objective, batch)]
        [torch.Size([3, 8]), torch.Size([2, 8])]
    """

    chunk_size: int | None = None
    vectorize: bool = True

    def chunks(self, objective: Objective, batch: Batch) -> Iterator[Tensor]:
        """The gradients by the parameters of the objective, as rows ``(m, P)`` of a few points."""
        for points in self._pieces(objective, batch):
            yield self._rows(objective, points)

    def check(self, objective: Objective, batch: Batch) -> None:
        """Compares their sum with the gradient of the batch; turns to a loop where vmap is wrong.

        Raises:
            ModelError: They do not add up either way.
        """
        self._verified(objective, batch, None)

    def verified(self, objective: Objective, batch: Batch) -> Tensor:
        """All of them, ``(n, P)``, after that comparison.

        Raises:
            ModelError: As of `check`.
            NonFiniteProductError: NaN or infinity in a gradient.
        """
        return torch.cat(self._verified(objective, batch, lambda rows: rows))

    def images(
        self, objective: Objective, batch: Batch, image: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """As `verified`, of each chunk ``(m, P)`` only what `image` makes of it, ``(m, ...)``."""
        return torch.cat(self._verified(objective, batch, image))

    def _verified(
        self, objective: Objective, batch: Batch, image: Callable[[Tensor], Tensor] | None
    ) -> list[Tensor]:
        """Images of the chunks, whose sum is the gradient of the batch."""
        space = objective.space
        expected = space.flatten(mean_gradient(objective, objective.params, batch)) * batch.size
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-3}.get(space.dtype, 5e-2)
        while True:
            was_vectorized, kept = self.vectorize, []
            total, scale = torch.zeros_like(expected), torch.zeros((), device=expected.device)
            for rows in self.chunks(objective, batch):
                total += rows.sum(dim=0)
                scale += rows.norm(dim=1).sum()
                kept += [] if image is None else [image(rows)]
            if (total - expected).norm() <= tolerance * scale:
                return kept
            if not was_vectorized:
                raise _unequal_sum(total, batch)
            self.vectorize = False

    def _pieces(self, objective: Objective, batch: Batch) -> list[Batch]:
        gradient_bytes = objective.space.size * objective.space.dtype.itemsize
        size = self.chunk_size or max(1, GRADIENT_BYTES // (2 * gradient_bytes))
        starts = range(0, batch.size, size)
        return [batch.rows(slice(s, s + size), min(size, batch.size - s)) for s in starts]

    def _rows(self, objective: Objective, batch: Batch) -> Tensor:
        flatten, params = objective.space.flatten, objective.params
        if self.vectorize:
            try:
                return flatten(per_sample_gradients(objective, params, batch))
            except torch.OutOfMemoryError:
                raise
            except Exception:  # whatever vmap refuses, the loop below does
                self.vectorize = False
        return flatten(per_sample_gradients(objective, params, batch, vectorize=False))


def _unequal_sum(total: Tensor, batch: Batch) -> HessopsError:
    if not total.isfinite().all():
        return NonFiniteProductError(
            f"batch {batch.position}: the gradient of a point's loss is NaN or infinite; check the "
            f"scale of parameters and data, or use a wider dtype than {total.dtype}"
        )
    return ModelError(
        f"batch {batch.position}: the gradients of the points alone do not add up to the gradient "
        "of their mean loss, so that the model is not a function of one point at a time"
    )


def create_per_sample_gradient_function(
    model: nn.Module, loss: Loss, *, reduction: Reduction = "mean"
) -> Callable[[Params, object, object], Stack]:
    r"""The function ``(params, x, y)`` ↦ ``{name: (n, *shape)}``, the gradients of the points.

    :math:`g_i = \nabla_\theta \ell_i(\theta)` by the parameters that are given. Vectorised over the
    points where torch can, one backward pass per point elsewhere.

    Args:
        model: A module in eval mode; the function works on a copy. See
            `create_batch_loss_function`.
        loss: ``loss(output, target)``.
        reduction: What `loss` returns.

    Raises:
        HessopsError: Here and from the returned function; see `Objective`.

    Example:
        >>> import torch
        >>> from hessops.functional import create_per_sample_gradient_function
        >>> gradients = create_per_sample_gradient_function(
        ...     torch.nn.Linear(1, 1, bias=False), torch.nn.MSELoss()
        ... )
        >>> x, y = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
        >>> gradients({"weight": torch.ones(1, 1)}, x, y)["weight"].flatten()
        tensor([ 2., 18.])
    """
    functions = ModelFunctions(model, loss, reduction)

    def per_sample_gradient(params: Params, x: object, y: object) -> Stack:
        values, batch = functions.params(params), functions.batch(x, y)
        with functions.state():
            return vectorised_or_looped(
                lambda vectorize: per_sample_gradients(
                    functions.objective, values, batch, vectorize=vectorize
                )
            )

    return per_sample_gradient


def create_per_sample_mixed_derivative_function(
    model: nn.Module, loss: Loss, *, reduction: Reduction = "mean"
) -> Callable[[Params, Tensor, object], Stack]:
    r"""The function ``(params, x, y)`` ↦ :math:`\nabla_x \nabla_\theta \ell_i` of every point.

    Args:
        model: A module in eval mode that takes one floating-point tensor. See
            `create_batch_loss_function`.
        loss: ``loss(output, target)``.
        reduction: What `loss` returns.

    Returns:
        A function to ``{name: (n, *x.shape[1:], *shape)}``; that many numbers, so callers bound n.

    Raises:
        ArgumentTypeError: From the returned function: x is not a floating-point tensor.
        HessopsError: Here and from the returned function; see `Objective`.

    Example:
        >>> import torch
        >>> from hessops.functional import create_per_sample_mixed_derivative_function
        >>> mixed = create_per_sample_mixed_derivative_function(
        ...     torch.nn.Linear(1, 1, bias=False), torch.nn.MSELoss()
        ... )
        >>> x, y = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
        >>> mixed({"weight": torch.ones(1, 1)}, x, y)["weight"].flatten()  # of (w x)^2: 4 w x
        tensor([ 4., 12.])
    """
    functions = ModelFunctions(model, loss, reduction)

    def per_sample_mixed_derivative(params: Params, x: Tensor, y: object) -> Stack:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ArgumentTypeError(
                f"x must be a floating-point tensor to differentiate by, got {kind}"
            )
        values, batch = functions.params(params), functions.batch(x, y)
        with functions.state():
            return vectorised_or_looped(
                lambda vectorize: mixed_derivatives(
                    functions.objective, values, batch, vectorize=vectorize
                )
            )

    return per_sample_mixed_derivative


def mixed_derivatives(
    objective: Objective, params: Params, batch: Batch, *, vectorize: bool
) -> Stack:
    """Gradients of the points by input and parameter, ``{name: (n, *x.shape[1:], *shape)}``."""

    def of_point(point: Batch) -> Stack:
        def gradient_by_input(p: Params) -> Tensor:
            def loss_at(x: object) -> Tensor:
                return objective.batch_loss(p, replace(point, x=x))

            gradient: Tensor = grad(loss_at)(point.x)
            return gradient[0]

        # One row at a time in the loop, where a kernel has no batching rule.
        jacobian = jacrev(gradient_by_input, chunk_size=None if vectorize else 1)
        mixed: Stack = jacobian(dict(params))
        return mixed

    if vectorize:
        return map_points(of_point, batch)
    points = [batch.rows(slice(i, i + 1), 1) for i in range(batch.size)]
    pieces = [of_point(point) for point in points]
    return {name: torch.stack([piece[name] for piece in pieces]) for name in params}


def create_matrix_jacobian_product_function(
    model: nn.Module, loss: Loss, g: Tensor, *, reduction: Reduction = "mean"
) -> Callable[[Params, object, object], Tensor]:
    r"""The function ``(params, x, y)`` ↦ :math:`G J^\top`, shape ``(m, n)``.

    Entry (j, i) is :math:`\langle G_j, \nabla_\theta \ell_i(\theta)\rangle`. J v is computed as the
    derivative of :math:`u \mapsto \langle J^\top u, v\rangle`, without per-sample gradients and
    without forward mode.

    Args:
        model: A module in eval mode; the function works on a copy. See
            `create_batch_loss_function`.
        loss: ``loss(output, target)``.
        g: G, ``(m, P)`` in the flat order of the parameters that are given later.
        reduction: What `loss` returns.

    Raises:
        ShapeError: `g` is not ``(m, P)``; for P, from the returned function.
        DtypeError: `g` is of another dtype than the parameters.
        HessopsError: Here and from the returned function; see `Objective`.

    Example:
        >>> import torch
        >>> from hessops.functional import create_matrix_jacobian_product_function
        >>> product = create_matrix_jacobian_product_function(
        ...     torch.nn.Linear(1, 1, bias=False), torch.nn.MSELoss(), torch.tensor([[1.0], [0.5]])
        ... )
        >>> x, y = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
        >>> product({"weight": torch.ones(1, 1)}, x, y)
        tensor([[ 2., 18.],
                [ 1.,  9.]])
    """
    if not isinstance(g, Tensor) or g.ndim != 2:
        shape = tuple(g.shape) if isinstance(g, Tensor) else type(g).__name__
        raise ShapeError(f"g must be a tensor of shape (m, P), got {shape}")
    functions = ModelFunctions(model, loss, reduction)

    def matrix_jacobian_product(params: Params, x: object, y: object) -> Tensor:
        values, batch = functions.params(params), functions.batch(x, y)
        space = space_of(values)
        if g.shape[1] != space.size or g.dtype != space.dtype:
            raise ShapeError(
                f"g has shape {tuple(g.shape)} and {g.dtype}, expected (m, {space.size}) and "
                f"{space.dtype}, the size of the given parameters"
            )
        with functions.state():
            # Indexed, because vjp is annotated as if it always returned an auxiliary output too.
            traversal = vjp(lambda p: functions.objective.sample_losses(p, batch), values)
            losses, pull = traversal[0], traversal[1]
            push = vjp(lambda u: space.flatten(pull(u)[0]), torch.zeros_like(losses))[1]
            return pull_rows(push, g.to(space.device))

    return matrix_jacobian_product


def vectorised_or_looped(compute: Callable[[bool], Stack]) -> Stack:
    """`compute(True)`, or `compute(False)` where torch cannot vectorise it."""
    try:
        return compute(True)
    except (torch.OutOfMemoryError, HessopsError):
        raise
    except Exception:  # control flow on values, or a kernel without a batching rule
        return compute(False)
