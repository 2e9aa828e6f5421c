"""Approximations of low rank of a model's Hessian."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from hessops.functional.approximation import lanczos_low_rank_hessian_approx
from hessops.functional.hessian import EmpiricalHessian
from hessops.functional.low_rank import LowRankProductRepresentation
from hessops.functional.nystroem import ShiftFunction, randomized_nystroem_approximation
from hessops.point_loss import Loss, Reduction
from hessops.streaming import Unpack


def model_hessian_low_rank(
    model: nn.Module,
    loss: Loss,
    training_data: Iterable[object],
    hessian_perturbation: float = 0.0,
    rank_estimate: int = 10,
    krylov_dimension: int | None = None,
    tol: float = 1e-6,
    max_iter: int | None = None,
    eigen_computation_on_gpu: bool = False,
    precompute_grad: bool = False,
    *,
    reduction: Reduction = "mean",
    unpack: Unpack | None = None,
    generator: torch.Generator | None = None,
) -> LowRankProductRepresentation:
    """The eigenpairs of largest absolute value of the Hessian of a model's mean loss.

    Args:
        model: A module in eval mode of float32 or float64.
        loss: ``loss(output, target)``; see `Objective` for what is required of model and loss.
        training_data: A ``DataLoader`` or list of batches; see `BatchStream`.
        hessian_perturbation: See `lanczos_low_rank_hessian_approx`, as for the arguments below.
        rank_estimate: Number of eigenpairs.
        krylov_dimension: Vectors of the Krylov basis.
        tol: Relative accuracy of the eigenvalues.
        max_iter: Most restarts.
        eigen_computation_on_gpu: Uses cupy; needs a model on a CUDA device.
        precompute_grad: Keeps the gradient's graph of all batches, see `create_hvp_function`.
        reduction: What `loss` returns.
        unpack: Function from a raw batch to ``(x, y)``.
        generator: Draws the starting vector.

    Returns:
        D ``(r,)`` in descending absolute value and V ``(P, r)``, of the model's dtype and device.

    Raises:
        HessopsError: As of `create_hvp_function` and `lanczos_low_rank_hessian_approx`.

    Example:
        >>> import torch
        >>> from hessops.functional import model_hessian_low_rank
        >>> x = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        >>> model = torch.nn.Linear(4, 1, bias=False)
        >>> approximation = model_hessian_low_rank(
        ...     model, torch.nn.MSELoss(), [(x, torch.zeros(4, 1))], rank_estimate=2
        ... )
        >>> approximation.eigen_vals.round(decimals=2)
        tensor([8.0000, 4.5000])
    """
    products = EmpiricalHessian(
        model,
        loss,
        training_data,
        precompute_grad=precompute_grad,
        reduction=reduction,
        unpack=unpack,
    )
    space = products.objective.space
    return lanczos_low_rank_hessian_approx(
        products,
        (space.size, space.size),
        hessian_perturbation,
        rank_estimate,
        krylov_dimension,
        tol,
        max_iter,
        space.device,
        eigen_computation_on_gpu,
        space.dtype,
        generator=generator,
    )


def model_hessian_nystroem_approximation(
    model: nn.Module,
    loss: Loss,
    data_loader: Iterable[object],
    rank: int,
    shift_func: ShiftFunction | None = None,
    *,
    reduction: Reduction = "mean",
    unpack: Unpack | None = None,
    generator: torch.Generator | None = None,
) -> LowRankProductRepresentation:
    """The randomized Nyström approximation of the Hessian of a model's mean loss.

    One pass over the data; a second where the Hessian is not positive semi-definite, of which a
    warning tells (see `randomized_nystroem_approximation`).

    Args:
        model: A module in eval mode of float32 or float64.
        loss: ``loss(output, target)``; see `Objective` for what is required of model and loss.
        data_loader: A ``DataLoader`` or list of batches; see `BatchStream`.
        rank: Number of columns of the sketch.
        shift_func: See `randomized_nystroem_approximation`.
        reduction: What `loss` returns.
        unpack: Function from a raw batch to ``(x, y)``.
        generator: Draws the sketch.

    Returns:
        Σ ``(r,)`` in descending order and U ``(P, r)``, of the model's dtype and device.

    Raises:
        HessopsError: As of `create_hvp_function` and `randomized_nystroem_approximation`.

    Example:
        >>> import torch
        >>> from hessops.functional import model_hessian_nystroem_approximation
        >>> x = torch.diag(torch.tensor([1.0, 2.0, 0.0, 0.0]))
        >>> model = torch.nn.Linear(4, 1, bias=False)
        >>> sketch = model_hessian_nystroem_approximation(
        ...     model, torch.nn.MSELoss(), [(x, torch.zeros(4, 1))], rank=2
        ... )
        >>> sketch.eigen_vals.round(decimals=2)
        tensor([2.0000, 0.5000])
    """
    products = EmpiricalHessian(model, loss, data_loader, reduction=reduction, unpack=unpack)
    space = products.objective.space
    return randomized_nystroem_approximation(
        lambda columns: products(columns.T).T,
        space.size,
        rank,
        space.dtype,
        shift_func,
        space.device,
        generator=generator,
    )
