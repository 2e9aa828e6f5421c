"""Batch operations of a model and a loss: what Hessian, Gauss-Newton and others share."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Self

import torch
from torch import Tensor, nn

from hessops.batch.operation import BatchOperation
from hessops.errors import ArgumentError, ForwardModeError, ModelError
from hessops.functional.memory import RetainedBytes
from hessops.functional.products import LinearFunction, Stack, StackedGradient
from hessops.objective import Loss, Objective, Reduction
from hessops.space import RestrictTo
from hessops.streaming import Batch
from hessops.validation import checked_count

Mode = Literal["rev-rev", "rev-fwd"]
MODES = ("rev-rev", "rev-fwd")

# Memory that the columns of one stacked product may take beside the graph itself.
COLUMN_BYTES = 2**29


class ModelBatchOperation(BatchOperation):
    """A batch operation that differentiates an `Objective`.

    A subclass defines `_linearize`: one traversal of the model that yields a linear map of stacks.

    Args:
        model: A module; see `Objective` for what is required of model and loss.
        loss: ``loss(output, target)``.
        restrict_to: The parameters to differentiate by; ``None`` takes all trainable ones.
        reduction: What `loss` returns: ``"mean"``, ``"sum"`` or ``"none"``.
        mode: ``"rev-rev"`` differentiates in reverse mode throughout. ``"rev-fwd"`` uses forward
            mode for products with a Jacobian; torch gets some layers wrong there, so it is compared
            with reverse mode on every batch of the first pass.
        chunk_size: Vectors that share one vectorised backward pass; ``None`` takes as many as fit
            512 MiB by a model of bytes. Never changes what is computed.

    Raises:
        ArgumentError: An unknown `mode`, or `chunk_size` below 1.
        HessopsError: Whatever `Objective` raises.
    """

    always_positive_semidefinite: bool | None = None
    # Products by double backward are symmetric only if torch's second derivatives are right.
    symmetric_by_construction = False

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        restrict_to: RestrictTo | None = None,
        *,
        reduction: Reduction = "mean",
        mode: Mode = "rev-rev",
        chunk_size: int | None = None,
    ) -> None:
        if mode not in MODES:
            raise ArgumentError(f"mode must be one of {MODES}, got {mode!r}")
        if chunk_size is not None:
            checked_count(chunk_size, "chunk_size")
        self.objective = Objective(model, loss, restrict_to, reduction=reduction)
        super().__init__(
            self.objective.space,
            symmetric=True,
            positive_semidefinite=self.always_positive_semidefinite,
        )
        self.mode: Mode = mode
        self.chunk_size = chunk_size
        self._stacked_gradient = StackedGradient()
        self._symmetry_is_checked = self.symmetric_by_construction

    @abstractmethod
    def _linearize(self, batch: Batch, *, forward_mode: bool) -> LinearFunction:
        """Traverses the model once; returns the map of stacks ``{name: (k, *shape)}``."""

    def _apply_stack(self, batch: Batch, tensors: Stack) -> Stack:
        with self._differentiating():
            if self.mode == "rev-fwd":
                return self._forward_product(batch, tensors)
            return self._reverse_product(batch, tensors)

    @contextmanager
    def _differentiating(self) -> Iterator[None]:
        """The state for a product: the right kernels, torch's own remarks silenced."""
        with self.objective.kernels(), warnings.catch_warnings():
            # Torch compiles its own forward derivatives with what it deprecates itself, and says
            # of some layers that its vectorised backward is a loop.
            warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            try:
                yield
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError) as error:
                raise ModelError(
                    f"torch cannot compute a product of {type(self).__name__} for this model and "
                    f"loss: {error}. A layer or loss without a second derivative, or an operation "
                    "in place, must be replaced (checkpoints need use_reentrant=False)"
                ) from error

    def _reverse_product(self, batch: Batch, tensors: Stack) -> Stack:
        num_rows = len(next(iter(tensors.values())))
        if num_rows == 1:
            return self._linearize(batch, forward_mode=False)(tensors)
        retained = RetainedBytes()
        with retained.counting():
            product = self._linearize(batch, forward_mode=False)
        chunk = self.chunk_size or self._columns_that_fit(retained.total)
        pieces = [
            product({name: t[start : start + chunk] for name, t in tensors.items()})
            for start in range(0, num_rows, chunk)
        ]
        return {name: torch.cat([piece[name] for piece in pieces]) for name in tensors}

    def _columns_that_fit(self, retained_bytes: int) -> int:
        """Columns of a vectorised backward pass within the budget.

        Each holds its own copy of the activations' gradients, about as large as what the graph
        retains, and a few vectors of the space.
        """
        vector_bytes = self.space.size * self.space.dtype.itemsize
        return max(1, COLUMN_BYTES // (4 * vector_bytes + retained_bytes + 1))

    def _forward_product(self, batch: Batch, tensors: Stack) -> Stack:
        try:
            return self._linearize(batch, forward_mode=True)(tensors)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            raise ForwardModeError(
                f"mode='rev-fwd': forward mode fails on this model ({error}); use mode='rev-rev'"
            ) from error

    def check(self, batch: Batch) -> None:
        """The check of `Objective.check`, symmetry once, and forward against reverse mode.

        A layer whose backward cannot be differentiated (``once_differentiable``, a ``detach`` or
        numpy inside a custom function) makes the product asymmetric without any error from torch.
        """
        self.objective.check(batch)
        if self.space.device.type == "meta":
            return
        if not self._symmetry_is_checked:
            self._check_symmetry(batch)
            self._symmetry_is_checked = True
        if self.mode == "rev-fwd":
            self._check_forward_mode(batch)

    def _probes(self, batch: Batch, count: int) -> Tensor:
        """Random vectors ``(count, P)`` that depend on the place of the batch only."""
        generator = torch.Generator(device="cpu").manual_seed(batch.position)
        rows = torch.randn(count, self.space.size, generator=generator, device="cpu")
        return rows.to(self.space.device, self.space.dtype)

    def _check_symmetry(self, batch: Batch) -> None:
        """Compares ⟨u, Av⟩ with ⟨v, Au⟩ for two random vectors."""
        probes = self._probes(batch, 2)
        with self._differentiating():
            products = self._reverse_product(batch, self.space.unflatten(probes))
        u, v = probes.double()
        au, av = self.space.flatten(products).double()
        tolerance = {torch.float64: 1e-6, torch.float32: 1e-2}.get(self.space.dtype, 0.3)
        # For normal u the form ⟨u, Av⟩ is of the size of ‖Av‖.
        difference, scale = (u.dot(av) - v.dot(au)).abs(), au.norm() + av.norm()
        if difference > tolerance * scale:
            raise ModelError(
                f"batch {batch.position}: the products of {type(self).__name__} are not symmetric "
                f"(by {difference / scale:.1e} relative), so that second derivatives of this model "
                "or loss are wrong: a custom autograd.Function whose backward is not "
                "differentiable? Write the layer in torch operations"
            )

    def _check_forward_mode(self, batch: Batch) -> None:
        r"""Compares J v in both modes for one random v.

        Stronger than the adjoint identity ⟨u, Jv⟩ = ⟨Jᵀu, v⟩ for one u: reverse mode gives the
        product itself.
        """
        probe = self.space.unflatten(self._probes(batch, 1))
        with self._differentiating():
            forward = self.space.flatten(self._forward_product(batch, probe))
            reverse = self.space.flatten(self._reverse_product(batch, probe))
        tolerance = {torch.float64: 1e-8, torch.float32: 1e-3}.get(self.space.dtype, 5e-2)
        difference, scale = (forward - reverse).norm(), reverse.norm()
        if not difference <= tolerance * scale:
            raise ForwardModeError(
                f"batch {batch.position}: mode='rev-fwd' differs from reverse mode by "
                f"{difference / scale:.1e} relative (a layer whose forward derivative torch gets "
                "wrong, such as LayerNorm or Embedding(padding_idx=...)); use mode='rev-rev'"
            )

    def _move_parts(self, device: torch.device) -> None:
        self.objective = self.objective.to(device)
        self._stacked_gradient = StackedGradient()

    def refresh(self) -> Self:
        """Takes a new copy of the model as it is now, in place; returns itself."""
        self.objective.refresh()
        self._symmetry_is_checked = self.symmetric_by_construction
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.objective!r}, mode={self.mode!r})"
