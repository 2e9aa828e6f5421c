"""Roots of the Hessian of a loss by the model's outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hessops.errors import MemoryLimitError, StructureError
from hessops.functional.outputs import with_parts
from hessops.functional.products import gradient_by_outputs
from hessops.nested import differentiable_leaves
from hessops.objective import Objective
from hessops.streaming import Batch

# What the Hessians of the points of a batch by their outputs may take where they have no structure.
DENSE_BYTES = 2**30
# How far a product with a Hessian may be from its structure, in units of the rounding of a product.
STRUCTURE_TOLERANCE = 1e3


@dataclass(frozen=True)
class OutputRoot:
    r"""Columns :math:`s_{ic}` by the outputs of each point.

    Their outer products :math:`\sum_c s_{ic} s_{ic}^\top` are a matrix for each point i.

    Attributes:
        shapes: The shapes ``(n, ...)`` of the outputs.
        count: Number of columns.
        flat_columns: From a range of columns to ``(k, n, outputs)``, all outputs in a row.

    Example:
        >>> import torch
        >>> from hessops import Batch, Objective
        >>> from hessops.functional.roots import hessian_root
        >>> objective = Objective(torch.nn.Linear(3, 2), torch.nn.MSELoss())  # H = I for 2 outputs
        >>> batch = Batch.from_raw((torch.zeros(4, 3), torch.ones(4, 2)))
        >>> root = hessian_root(objective, torch.zeros(4, 2), batch)
        >>> root.count, root.columns(0, 2)[0][:, 0]
        (2, tensor([[1., 0.],
                [0., 1.]]))
    """

    shapes: tuple[torch.Size, ...]
    count: int
    flat_columns: Callable[[int, int], Tensor]

    def columns(self, start: int, stop: int) -> list[Tensor]:
        """Some of the columns, one tensor ``(k, n, ...)`` per output."""
        flat = self.flat_columns(start, min(stop, self.count))
        sizes = [shape[1:].numel() for shape in self.shapes]
        parts = torch.split(flat, sizes, dim=2)
        return [p.reshape(len(p), *shape) for p, shape in zip(parts, self.shapes, strict=True)]


def gradient_root(objective: Objective, output: object, batch: Batch) -> OutputRoot:
    r"""The root of :math:`r_i r_i^\top`, with :math:`r_i` the gradient of the loss on point i."""
    parts = differentiable_leaves(output)
    gradients, _ = gradient_by_outputs(_loss_of(objective, output, batch), parts)
    # The mean loss has r_i / n as its gradient by output i.
    row = batch.size * torch.cat([g.reshape(batch.size, -1) for g in gradients], dim=1)
    return OutputRoot(_shapes(parts), 1, lambda start, stop: row[None][start:stop])


def hessian_root(objective: Objective, output: object, batch: Batch) -> OutputRoot:
    r"""The root of :math:`H_i`, the Hessian of the loss on point i by its output.

    Its structure is found by products, without a list of known losses: diagonal (squared errors,
    binary cross-entropy and every other sum over outputs); multiples of
    :math:`\mathrm{diag}(p) - pp^\top` with p the softmax over one dimension (cross-entropy, with or
    without label smoothing, class weights and positions); or none, and then the Hessian of every
    point is decomposed.

    Raises:
        StructureError: A Hessian has a negative eigenvalue: the loss is not convex in the output.
        MemoryLimitError: The Hessians have no structure and would not fit.
    """
    return _structured(objective, output, batch).root()


def sampled_root(
    objective: Objective,
    output: object,
    batch: Batch,
    generator: torch.Generator,
    num_samples: int,
) -> OutputRoot:
    r"""Random columns with :math:`\mathbb E \sum_c s_{ic} s_{ic}^\top = H_i`.

    Where H is that of a softmax, :math:`\sqrt{c/m}\,(e_{\hat y} - p)` with a label
    :math:`\hat y \sim p` at each position; signs :math:`z = \pm 1` in Sz for a root S elsewhere.
    Every point draws from a generator of its own, which is seeded by one number of `generator`, so
    that batches mean nothing.

    Args:
        objective: Model and loss.
        output: The model's output on the batch.
        batch: n points.
        generator: Draws.
        num_samples: m.

    Raises:
        StructureError, MemoryLimitError: As of `hessian_root`.
    """
    structure = _structured(objective, output, batch)
    seeds = torch.randint(2**53, (batch.size,), generator=generator, device=generator.device)
    uniform = _uniform(seeds, (num_samples, structure.draws)).to(objective.device)
    columns = structure.sampled(uniform).movedim(1, 0) / num_samples**0.5
    return OutputRoot(structure.shapes, num_samples, lambda start, stop: columns[start:stop])


def _uniform(seeds: Tensor, shape: tuple[int, int]) -> Tensor:
    """Uniform numbers ``(n, *shape)``, those of each point from a generator with its seed."""
    if shape == (1, 1):  # a seed of 53 bits is as random as a number
        return (seeds.double() / 2**53).reshape(-1, 1, 1)
    rows = [
        torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in seeds.tolist()
    ]
    return torch.stack(rows)


# --- structures --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Diagonal:
    """Hᵢ = diag(dᵢ), with d ``(n, outputs)``."""

    shapes: tuple[torch.Size, ...]
    diagonal: Tensor

    @property
    def draws(self) -> int:
        return self.diagonal.shape[1]

    def root(self) -> OutputRoot:
        roots = self.diagonal.sqrt()
        active = roots.any(dim=0).nonzero().flatten()

        def columns(start: int, stop: int) -> Tensor:
            which = active[start:stop]
            flat = roots.new_zeros(len(which), *roots.shape)
            flat[torch.arange(len(which), device=which.device), :, which] = roots[:, which].T
            return flat

        return OutputRoot(self.shapes, len(active), columns)

    def sampled(self, uniform: Tensor) -> Tensor:
        return _signs(uniform, self.diagonal.dtype) * self.diagonal.sqrt().unsqueeze(1)


@dataclass(frozen=True)
class _Softmax:
    """Blocks c (diag(p) - ppᵀ) for each position, with p ``(n, positions, classes)``."""

    shapes: tuple[torch.Size, ...]
    dim: int
    probabilities: Tensor
    scales: Tensor  # c, (n, positions)

    @property
    def draws(self) -> int:
        return self.scales.shape[1]

    def root(self) -> OutputRoot:
        p, n = self.probabilities, len(self.probabilities)
        positions, classes = p.shape[1:]
        # H = c D (I - uuᵀ) D with D = diag(√p) and u = √p, of norm 1. Columns 1 .. classes - 1 of
        # the reflection that maps u to the last unit vector are a basis of what is orthogonal to u.
        u = p.sqrt()
        v = u.clone()
        v[..., -1] += 1
        weights = v / (1 + u[..., -1:])
        scaled = self.scales.sqrt().unsqueeze(2) * u

        def columns(start: int, stop: int) -> Tensor:
            flat = p.new_zeros(stop - start, n, positions, classes)
            for row, column in enumerate(range(start, stop)):
                position, c = divmod(column, classes - 1)
                reflected = -v[:, position] * weights[:, position, c].unsqueeze(1)
                reflected[:, c] += 1
                flat[row, :, position] = scaled[:, position] * reflected
            return self._placed(flat)

        return OutputRoot(self.shapes, positions * (classes - 1), columns)

    def sampled(self, uniform: Tensor) -> Tensor:
        cumulative = self.probabilities.double().cumsum(dim=2)
        cumulative = cumulative / cumulative[..., -1:]
        # (n, samples, positions): the first class whose cumulative probability is above the draw.
        thresholds = uniform.movedim(2, 1).contiguous()
        labels = torch.searchsorted(cumulative, thresholds, right=True).movedim(1, 2)
        labels = labels.clamp(max=self.probabilities.shape[2] - 1)
        flat = -self.probabilities.unsqueeze(1).repeat(1, uniform.shape[1], 1, 1)
        flat.scatter_add_(3, labels.unsqueeze(3), torch.ones_like(flat[..., :1]))
        flat = self.scales.sqrt()[:, None, :, None] * flat
        return self._placed(flat.movedim(1, 0)).movedim(1, 0)

    def _placed(self, flat: Tensor) -> Tensor:
        """From ``(k, n, positions, classes)`` to the order of the output, ``(k, n, outputs)``."""
        shape = self.shapes[0]
        others = [size for d, size in enumerate(shape) if d not in (0, self.dim)]
        unflattened = flat.reshape(*flat.shape[:2], *others, flat.shape[3])
        return unflattened.movedim(-1, self.dim + 1).reshape(*flat.shape[:2], -1)


@dataclass(frozen=True)
class _Dense:
    """Hᵢ = SᵢSᵢᵀ with S ``(n, outputs, columns)``, of all possible columns those that are kept."""

    shapes: tuple[torch.Size, ...]
    columns: Tensor
    kept: Tensor

    @property
    def draws(self) -> int:
        return self.columns.shape[1]

    def root(self) -> OutputRoot:
        by_column = self.columns.movedim(2, 0)
        return OutputRoot(self.shapes, len(by_column), lambda start, stop: by_column[start:stop])

    def sampled(self, uniform: Tensor) -> Tensor:
        return _signs(uniform[..., self.kept], self.columns.dtype) @ self.columns.mT


def _signs(uniform: Tensor, dtype: torch.dtype) -> Tensor:
    return (2 * (uniform < 0.5).to(torch.int8) - 1).to(dtype)


class _Products:
    """Products of the points' Hessians with vectors ``(k, n, outputs)``."""

    def __init__(self, objective: Objective, output: object, batch: Batch) -> None:
        self.parts = differentiable_leaves(output)
        self.shapes = _shapes(self.parts)
        self.size = batch.size
        _, self._apply = gradient_by_outputs(_loss_of(objective, output, batch), self.parts)

    def __call__(self, flat: Tensor) -> Tensor:
        split = OutputRoot(self.shapes, len(flat), lambda start, stop: flat[start:stop])
        products = self._apply(split.columns(0, len(flat)))
        # Of the mean loss over the points.
        return self.size * torch.cat([p.reshape(*flat.shape[:2], -1) for p in products], dim=2)


def _structured(
    objective: Objective, output: object, batch: Batch
) -> _Diagonal | _Softmax | _Dense:
    product = _Products(objective, output, batch)
    parts = product.parts
    total = sum(part[0].numel() for part in parts)
    like = parts[0]
    seeded = torch.Generator().manual_seed(batch.position)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    probe = torch.randn(batch.size, total, generator=seeded, dtype=dtype).to(like)
    ones = torch.ones_like(probe)
    along_probe, along_ones = product(torch.stack([probe, ones]))
    precision = STRUCTURE_TOLERANCE * torch.finfo(like.dtype).eps

    # Entry by entry, as a large part of a loss is no measure for a small one.
    distance = (along_probe - along_ones * probe).abs()
    if bool((distance <= precision * along_probe.abs()).all()):
        _require_convex(along_ones, like.dtype, batch)
        return _Diagonal(product.shapes, along_ones.clamp(min=0))
    for dim in dict.fromkeys((1, like.ndim - 1)) if len(parts) == 1 and like.ndim > 1 else ():
        found = _as_softmax(like, dim, probe, along_probe, precision)
        if found is not None:
            return found
    return _decomposed(product, total, batch)


def _as_softmax(
    output: Tensor, dim: int, probe: Tensor, along_probe: Tensor, precision: float
) -> _Softmax | None:
    """The structure, if the product with the probe is that of softmaxes along a dimension."""

    def arranged(flat: Tensor) -> Tensor:  # (n, positions, classes)
        moved = flat.reshape(output.shape).movedim(dim, -1)
        return moved.reshape(len(output), -1, output.shape[dim])

    p = arranged(output.detach().to(probe.dtype)).softmax(dim=2)
    v, product = arranged(probe), arranged(along_probe)
    unscaled = p * (v - (p * v).sum(dim=2, keepdim=True))
    squares = unscaled.square().sum(dim=2)
    inner = (unscaled * product).sum(dim=2)
    scales = torch.where(squares > 0, inner / squares.where(squares > 0, 1.0), 0.0).clamp(min=0)
    distance = (product - scales.unsqueeze(2) * unscaled).norm(dim=2)
    # Where one class has nearly all of the probability, the product is what cancellation left.
    rounding = torch.finfo(probe.dtype).eps * scales * v.norm(dim=2)
    if bool((distance <= precision * product.norm(dim=2) + 8 * rounding).all()):
        return _Softmax((output.shape,), dim, p, scales)
    return None


def _decomposed(product: _Products, total: int, batch: Batch) -> _Dense:
    like = product.parts[0]
    needed = 3 * batch.size * total**2 * like.element_size()
    if needed > DENSE_BYTES:
        raise MemoryLimitError(
            f"batch {batch.position}: the Hessian of the loss by its {total} outputs has neither a "
            f"diagonal nor a softmax structure, and decomposing it for {batch.size} points takes "
            f"{needed:,} bytes, more than {DENSE_BYTES:,}; use smaller batches or "
            "fisher_type='empirical'"
        )
    units = torch.eye(total, dtype=like.dtype, device=like.device)
    columns = product(units.unsqueeze(1).expand(total, batch.size, total).contiguous())
    hessians = columns.movedim(0, 2)
    # In double precision, so that a large part of a loss does not blur a small one.
    wide = hessians.double()
    values, vectors = torch.linalg.eigh((wide + wide.mT) / 2)
    _require_convex(values, like.dtype, batch)
    # A point with a large Hessian is no measure for the others.
    precision = STRUCTURE_TOLERANCE * torch.finfo(wide.dtype).eps
    kept = (values > precision * values.amax(dim=1, keepdim=True)).any(dim=0)
    roots = vectors[:, :, kept] * values[:, kept].clamp(min=0).sqrt().unsqueeze(1)
    return _Dense(product.shapes, roots.to(like.dtype), kept.nonzero().flatten())


def _require_convex(values: Tensor, dtype: torch.dtype, batch: Batch) -> None:
    """Raises where one of the eigenvalues ``(n, outputs)`` is negative by more than rounding.

    Args:
        values: Eigenvalues.
        dtype: That of the Hessians.
        batch: The points.
    """
    sizes = values.abs()
    precision = torch.finfo(dtype).eps
    rounding = STRUCTURE_TOLERANCE * precision * sizes.amax(dim=1, keepdim=True)
    if bool((values < -rounding - precision * sizes.max()).any()):
        raise StructureError(
            f"batch {batch.position}: the Hessian of the loss by the model's output has a negative "
            f"eigenvalue ({values.min().item():.3e}), so that it is no Fisher matrix; use "
            "fisher_type='empirical'"
        )


def _shapes(parts: Sequence[Tensor]) -> tuple[torch.Size, ...]:
    return tuple(part.shape for part in parts)


def _loss_of(
    objective: Objective, output: object, batch: Batch
) -> Callable[[Sequence[Tensor]], Tensor]:
    def loss_of(parts: Sequence[Tensor]) -> Tensor:
        return objective.output_loss(with_parts(output, parts), batch)

    return loss_of
