"""Layers that apply a matrix at every position, and what of them is a matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from hessops.functional.precision import safe_norms
from hessops.space import ParameterSpace

# Memory for the gradients of some points by one matrix in the eigenbasis.
SQUARES_BYTES = 2**26
# Columns of a Gram matrix that are computed at once.
GRAM_BLOCK = 192
# Memory for the gradients of points that a caller holds at once.
PRODUCT_BYTES = 2**26
# Memory for what is multiplied and summed at once in inner products and weighted sums: images of
# inputs, weighted outputs. On a CPU it stays in the cache; elsewhere few large kernels are quicker.
IMAGE_BYTES, IMAGE_BYTES_OF_DEVICES = 2**20, 2**26
# Memory for the gradients of points in inner products and weighted sums.
GRADIENT_BYTES = 2**24
# What it takes to write and read one entry of a gradient of a point, in multiply-adds.
GRADIENT_COST = 8
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class MatrixForm:
    r"""The parameters of a layer as matrices M, so that the layer maps a to M a.

    Weights are ``(outputs, inputs)``, those of an embedding the other way round; a bias is the
    last column, for an input that is always 1. A grouped convolution has a matrix for each group.

    Attributes:
        space: The parameters of the layer.
        weight: The name of the weight.
        bias: The name of the bias, if there is one.
        groups: Number of matrices.
        transposed: Whether the weight is ``(inputs, outputs)``.

    Example:
        >>> import torch
        >>> from hessops import ParameterSpace
        >>> from hessops.functional.layers import MatrixForm
        >>> space = ParameterSpace.from_model(torch.nn.Linear(2, 1))
        >>> form = MatrixForm(space, "weight", "bias")
        >>> form.matrices(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[[[1., 2., 3.]]]])
        >>> form.rows(form.matrices(torch.tensor([[1.0, 2.0, 3.0]])))
        tensor([[1., 2., 3.]])
    """

    space: ParameterSpace
    weight: str
    bias: str | None = None
    groups: int = 1
    transposed: bool = False

    def matrices(self, rows: Tensor) -> Tensor:
        """Rows ``(k, P)`` as ``(k, groups, outputs, inputs)``."""
        parts = self.space.unflatten(rows)
        matrices = self.weights(parts[self.weight])
        if self.bias is None:
            return matrices
        return torch.cat([matrices, parts[self.bias].reshape(*matrices.shape[:3], 1)], dim=3)

    def weights(self, stack: Tensor) -> Tensor:
        """Weights ``(k, *shape)`` as ``(k, groups, outputs, inputs)``, without a bias."""
        weight = stack.mT if self.transposed else stack
        return weight.reshape(len(stack), self.groups, weight.shape[1] // self.groups, -1)

    def rows(self, matrices: Tensor) -> Tensor:
        """The inverse of `matrices`."""
        count, parts = len(matrices), {}
        if self.bias is not None:
            parts[self.bias] = matrices[..., -1].reshape(count, -1)
            matrices = matrices[..., :-1]
        weight = matrices.mT if self.transposed else matrices
        parts[self.weight] = weight.reshape(count, -1)
        return torch.cat([parts[name] for name in self.space.names], dim=1)

    def times(self, parts: Mapping[str, Tensor], vector: Tensor) -> Tensor:
        """The matrices of some parameters by name times ``(inputs,)``, ``(groups, outputs)``."""
        weight = parts[self.weight]
        if self.transposed:
            weight = weight.mT
        rows = weight.reshape(self.groups, weight.shape[0] // self.groups, -1)
        if self.bias is None:
            return rows @ vector
        bias = parts[self.bias].reshape(self.groups, -1)
        return rows @ vector[:-1] + vector[-1] * bias

    @property
    def shape(self) -> tuple[int, int, int]:
        """(groups, outputs, inputs) of the matrices."""
        first, *others = self.weight_shape
        if self.transposed:
            return self.groups, prod(others), first
        return self.groups, first // self.groups, prod(others) + (self.bias is not None)

    @property
    def weight_shape(self) -> torch.Size:
        """The shape of the weight."""
        return self.space.shapes[self.weight]

    def to(self, device: torch.device) -> MatrixForm:
        """The same on another device."""
        return replace(self, space=self.space.to(device))


@dataclass(frozen=True)
class MatrixLayer(ABC):
    r"""A module whose output at each position is M a, with M made of its own parameters.

    The gradient of a point's loss by M is :math:`\sum_t b_t a_t^\top` over the positions t of the
    point, with :math:`b_t` the gradient by the output there.

    Attributes:
        name: The name of the module.
        module: The module.
        form: Its parameters as matrices.

    Example:
        >>> import torch
        >>> from hessops import ParameterSpace
        >>> from hessops.functional.layers import matrix_layer
        >>> module = torch.nn.Linear(3, 2)
        >>> layer = matrix_layer("", module, ParameterSpace.from_model(module))
        >>> layer.inputs(torch.zeros(4, 5, 3), 4, 0).shape  # 1 group, 4 points, 5 positions
        torch.Size([1, 4, 5, 4])
        >>> layer.outputs(torch.zeros(1, 4, 5, 2), 4, 0).shape  # 1 column
        torch.Size([1, 1, 4, 5, 2])
    """

    name: str
    module: nn.Module
    form: MatrixForm

    # Whether the inputs of a point can be averaged over its positions.
    can_reduce: ClassVar[bool] = True
    # The dimension of `inputs` along which the positions lie.
    position_dim: ClassVar[int] = -2

    @abstractmethod
    def fits(self, inputs: Tensor, outputs: Tensor, size: int, dim: int) -> bool:
        """Whether the points can lie along dimension `dim` of an input and an output.

        Along the first dimension several rows may belong to a point, one after the other.
        """

    @abstractmethod
    def inputs(self, tensor: Tensor, size: int, dim: int) -> Tensor:
        """An input of the module as ``(groups, n, positions, inputs)``; tokens ``(n, positions)``.

        Args:
            tensor: What the module was called with.
            size: n, the number of points.
            dim: The dimension along which the points lie.
        """

    @abstractmethod
    def outputs(self, tensor: Tensor, size: int, dim: int) -> Tensor:
        """Gradients ``(k, *output)`` by an output as ``(groups, k, n, positions, outputs)``."""

    @abstractmethod
    def add_input_moment(self, total: Tensor, inputs: Tensor) -> None:
        r"""Adds :math:`\sum_t a_t a_t^\top`, the lower half of ``(groups, inputs, inputs)``.

        For tokens it is the diagonal, ``(groups, inputs)``.
        """

    def add_output_moment(self, total: Tensor, outputs: Tensor) -> None:
        r"""Adds :math:`\sum_t b_t b_t^\top`, the lower half of ``(groups, outputs, outputs)``."""
        _add_gram(total, outputs.flatten(1, 3))

    @abstractmethod
    def gradient_times(self, vector: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
        r""":math:`\sum_t b_t\, a_t^\top v` of one column, ``(groups, outputs)``."""

    @abstractmethod
    def point_gradients(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        r""":math:`\sum_t b_{it} a_{it}^\top` of one column, ``(n, groups, outputs, inputs)``."""

    @abstractmethod
    def inner_products(self, matrices: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
        r"""Those with matrices ``(k, groups, outputs, inputs)``, ``(k, n)``."""

    @abstractmethod
    def products(self, parts: Mapping[str, Tensor], inputs: Tensor, outputs: Tensor) -> Tensor:
        """As `inner_products`, with stacks ``{name: (k, *shape)}`` of some of the parameters."""

    @abstractmethod
    def weighted_sum(self, weights: Tensor, inputs: Tensor, outputs: Tensor) -> dict[str, Tensor]:
        r""":math:`\sum_i w_{ji} \nabla\ell_i` for weights ``(k, n)``, ``{name: (k, *shape)}``."""

    @abstractmethod
    def weighted_squares(self, weights: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
        r""":math:`\sum_{oi} w_{oi} (\sum_t b_{to} a_{ti})^2`, ``(n,)``.

        Args:
            weights: w, ``(groups, outputs, inputs)``.
            inputs: a, in a basis of its own; see `turned`.
            outputs: b of one column, in a basis of its own.
        """

    @abstractmethod
    def norms(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        r"""Those of the gradients of points, ``(n,)``, with no square out of range."""

    def scale(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        r""":math:`\sum_t \lVert b_t\rVert \lVert a_t\rVert` of one column."""
        sizes: Tensor = outputs.norm(dim=-1).sum(dim=1) * inputs.norm(dim=-1)
        return sizes.sum()

    @abstractmethod
    def add_squares(self, total: Tensor, inputs: Tensor, outputs: Tensor) -> None:
        r"""Adds the squared gradients of points and columns, summed over both.

        .. math:: \sum_{n,c} \Bigl(\sum_t b_{nct}\, a_{nt}^\top\Bigr)^{\odot 2}

        to ``(groups, outputs, inputs)``, for a and b in bases of their own (`turned`).
        """


@dataclass(frozen=True)
class AffineLayer(MatrixLayer):
    """`torch.nn.Linear`: the points lie along the first dimension, or along the second."""

    def fits(self, inputs: Tensor, outputs: Tensor, size: int, dim: int) -> bool:
        """See `MatrixLayer.fits`."""
        if inputs.ndim < 2 or outputs.ndim < 2 or not inputs.is_floating_point():
            return False
        if dim == 0:
            return len(inputs) % size == 0 and len(outputs) == len(inputs) > 0
        return inputs.ndim > 2 and outputs.ndim > 2 and inputs.shape[1] == outputs.shape[1] == size

    def inputs(self, tensor: Tensor, size: int, dim: int) -> Tensor:
        """See `MatrixLayer.inputs`."""
        patches = self._patches(tensor.movedim(dim, 0))
        entries = patches.shape[-self._entry_dims :]
        if self.form.bias is None:
            return patches.reshape(self.form.groups, size, -1, entries.numel())
        # Written once, beside the ones: patches overlap, so that they are larger than the input.
        rows = patches.new_empty(*patches.shape[: -self._entry_dims], entries.numel() + 1)
        rows[..., :-1].view(patches.shape).copy_(patches)
        rows[..., -1] = 1.0
        return rows.reshape(self.form.groups, size, -1, rows.shape[-1])

    @property
    def _entry_dims(self) -> int:
        """The last dimensions of `_patches` that are those of one input of the matrix."""
        return 1

    def _patches(self, tensor: Tensor) -> Tensor:
        """An input ``(N, ...)`` as ``(groups, N, *positions, *inputs)``, a view if possible."""
        return tensor.unsqueeze(0)

    def outputs(self, tensor: Tensor, size: int, dim: int) -> Tensor:
        """See `MatrixLayer.outputs`."""
        moved = tensor.movedim(dim + 1, 1)
        rows = self._positions(moved.flatten(0, 1))
        return rows.reshape(self.form.groups, len(tensor), size, -1, rows.shape[-1])

    def _positions(self, tensor: Tensor) -> Tensor:
        """Gradients ``(N, ...)`` by outputs as ``(groups, N, positions, outputs)``."""
        return tensor.reshape(1, len(tensor), -1, tensor.shape[-1])

    def add_input_moment(self, total: Tensor, inputs: Tensor) -> None:
        """See `MatrixLayer.add_input_moment`."""
        _add_gram(total, inputs.flatten(1, 2))

    def gradient_times(self, vector: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
        """See `MatrixLayer.gradient_times`."""
        along = inputs.flatten(1, 2) @ vector
        return (outputs.flatten(1, 3).mT @ along.unsqueeze(2)).squeeze(2)

    def point_gradients(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """See `MatrixLayer.point_gradients`."""
        return (outputs[:, 0].mT @ inputs).movedim(0, 1)

    def inner_products(self, matrices: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
        """See `MatrixLayer.inner_products`."""
        if not _forms_gradients(len(matrices), inputs.shape[2]):
            return _products_by_position(matrices, inputs, outputs[:, 0])
        total = inputs.new_empty(inputs.shape[1], len(matrices))
        flat = matrices.flatten(1).T
        for points, rows in self._gradients_in_pieces(inputs, outputs):
            torch.mm(rows, flat, out=total[points])
        return total.T

    def products(self, parts: Mapping[str, Tensor], inputs: Tensor, outputs: Tensor) -> Tensor:
        """See `MatrixLayer.products`."""
        total = inputs.new_zeros(len(next(iter(parts.values()))), inputs.shape[1])
        if self.form.weight in parts:
            weights = self.form.weights(parts[self.form.weight])
            total = self.inner_products(weights, self._without_bias(inputs), outputs)
        if self.form.bias is not None and self.form.bias in parts:
            total = total + parts[self.form.bias] @ self._bias_gradients(outputs).T
        return total

    def weighted_sum(self, weights: Tensor, inputs: Tensor, outputs: Tensor) -> dict[str, Tensor]:
        """See `MatrixLayer.weighted_sum`."""
        form, k, some = self.form, len(weights), self._without_bias(inputs)
        if not _forms_gradients(k, inputs.shape[2]):
            total = _sums_by_position(weights, some, outputs[:, 0])
        else:
            total = inputs.new_zeros(k, form.weight_shape.numel())
            for points, rows in self._gradients_in_pieces(some, outputs):
                total.addmm_(weights[:, points], rows)
        parts = {form.weight: total.reshape(k, *form.weight_shape)}
        if form.bias is not None:
            parts[form.bias] = weights @ self._bias_gradients(outputs)
        return parts

    def weighted_squares(self, weights: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
        """See `MatrixLayer.weighted_squares`; a single position needs no gradients of points."""
        if inputs.shape[2] == 1:
            return self.inner_products(weights.unsqueeze(0), inputs.square(), outputs.square())[0]
        flat = weights.flatten()
        pieces = self._gradients_in_pieces(inputs, outputs)
        return torch.cat([rows.square() @ flat for _, rows in pieces])

    def norms(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """See `MatrixLayer.norms`; a single position needs no gradients of points."""
        if inputs.shape[2] == 1:
            by_group = _norms_of_points(inputs[:, :, 0]) * _norms_of_points(outputs[:, 0, :, 0])
            return safe_norms(by_group.T)
        a, largest_a = _scaled_points(inputs)
        b, largest_b = _scaled_points(outputs[:, 0])
        norms = [rows.norm(dim=1) for _, rows in self._gradients_in_pieces(a, b.unsqueeze(1))]
        return torch.cat(norms) * largest_a * largest_b

    def _gradients_in_pieces(
        self, inputs: Tensor, outputs: Tensor
    ) -> Iterator[tuple[slice, Tensor]]:
        """The gradients of some points at a time, in a row for each."""
        groups, size, _, width = inputs.shape
        row_bytes = groups * outputs.shape[-1] * width * inputs.element_size()
        some = max(1, GRADIENT_BYTES // row_bytes)
        for start in range(0, size, some):
            points = slice(start, start + some)
            rows = self.point_gradients(inputs[:, points], outputs[:, :, points])
            yield points, rows.flatten(1)

    def _without_bias(self, inputs: Tensor) -> Tensor:
        return inputs if self.form.bias is None else inputs[..., :-1]

    def _bias_gradients(self, outputs: Tensor) -> Tensor:
        """``(n, groups * outputs)``."""
        return outputs[:, 0].sum(dim=2).movedim(0, 1).flatten(1)

    def add_squares(self, total: Tensor, inputs: Tensor, outputs: Tensor) -> None:
        """See `MatrixLayer.add_squares`; a single position needs no gradients of points."""
        if inputs.shape[2] == 1:
            total.baddbmm_(outputs.square().sum(dim=1)[:, :, 0].mT, inputs.square()[:, :, 0])
            return
        for some_a, some_b in _pieces(inputs, outputs, self.form.space.size):
            # (groups, k, n, outputs, inputs)
            total += (some_b.mT @ some_a.unsqueeze(1)).square_().sum(dim=(1, 2))


def _forms_gradients(vectors: int, positions: int) -> bool:
    """Whether products with the gradients of points are cheaper than products at every position.

    In multiply-adds for each point and parameter, those take k T for T positions and k vectors. To
    make the gradients takes T, by large matrices and so about twice as quick, to write and to read
    them as much as `GRADIENT_COST`, and products with them k. On one core of a Xeon, in float32 and
    for matrices of 64 x 65 to 512 x 65, both took equally long at (T, k) = (2, 16), (4, 4) and
    (16, 1); of T = 64 positions the gradients were 1.4 to 12 times as quick for k = 1 to 16.
    """
    return vectors * positions > vectors + positions / 2 + GRADIENT_COST


def _image_bytes(tensor: Tensor) -> int:
    return IMAGE_BYTES if tensor.device.type == "cpu" else IMAGE_BYTES_OF_DEVICES


def _products_by_position(matrices: Tensor, a: Tensor, b: Tensor) -> Tensor:
    r""":math:`\sum_t b_{it}^\top M_j a_{it}` as products of matrices and weighted sums, ``(k, n)``.

    Args:
        matrices: M, ``(k, groups, outputs, inputs)``.
        a: ``(groups, n, positions, inputs)``.
        b: ``(groups, n, positions, outputs)``.
    """
    if 2 * a.shape[3] < b.shape[3]:
        matrices, a, b = matrices.mT, b, a  # images are made on the narrower side
    k, width, (_, size, positions, _) = len(matrices), b.shape[3], a.shape
    total = a.new_zeros(k, size * positions)
    fitting = max(1, _image_bytes(a) // (width * a.element_size()))
    columns = min(fitting, max(1, size * positions))
    some = min(k, fitting // columns)
    buffer = a.new_empty(some * width * columns)
    for group in range(len(a)):
        inputs = a[group].flatten(0, 1).T.contiguous()
        outputs = b[group].flatten(0, 1).T.contiguous()
        for first in range(0, size * positions, columns):
            where = slice(first, first + columns)
            x, weights = inputs[:, where], outputs[:, where]
            for start in range(0, k, some):
                part = matrices[start : start + some, group]
                images = buffer[: len(part) * weights.numel()].view(len(part), *weights.shape)
                torch.mm(part.reshape(-1, len(x)), x, out=images.view(-1, x.shape[1]))
                total[start : start + some, where] += images.mul_(weights).sum(dim=1)
    return total.view(k, size, positions).sum(dim=2) if positions > 1 else total


def _sums_by_position(weights: Tensor, a: Tensor, b: Tensor) -> Tensor:
    r""":math:`\sum_{it} w_{ji} b_{it} a_{it}^\top`, ``(k, groups, outputs, inputs)``.

    Args:
        weights: w, ``(k, n)``.
        a: ``(groups, n, positions, inputs)``.
        b: ``(groups, n, positions, outputs)``.
    """
    k, (groups, _, positions, width) = len(weights), b.shape
    total = a.new_zeros(k, groups, width, a.shape[3])
    by_position = weights.repeat_interleave(positions, dim=1) if positions > 1 else weights
    fitting = max(1, _image_bytes(a) // (width * a.element_size()))
    columns = min(fitting, max(1, by_position.shape[1]))
    some = min(k, fitting // columns)
    for group in range(groups):
        inputs, outputs = a[group].flatten(0, 1), b[group].flatten(0, 1).T.contiguous()
        for start in range(0, k, some):
            part = total[start : start + some, group]
            for first in range(0, by_position.shape[1], columns):
                where = slice(first, first + columns)
                scaled = by_position[start : start + some, None, where] * outputs[:, where]
                part += (scaled.flatten(0, 1) @ inputs[where]).view(part.shape)
    return total


def _norms_of_points(rows: Tensor) -> Tensor:
    """Norms of rows ``(groups, n, width)``, ``(groups, n)``."""
    return safe_norms(rows.flatten(0, 1)).view(rows.shape[:2])


def _scaled_points(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``(groups, n, positions, width)`` divided by the largest entry of each point."""
    largest = rows.abs().amax(dim=(0, 2, 3))
    scales = torch.where(largest > 0, largest, 1.0)
    return rows / scales[:, None, None], largest


def turned(rows: Tensor, basis: Tensor | None) -> Tensor:
    """Inputs or gradients by outputs in another basis ``(groups, width, width)``; ``None`` is I.

    Example:
        >>> import torch
        >>> from hessops.functional.layers import turned
        >>> turned(torch.tensor([[[[1.0, 2.0]]]]), torch.eye(2).flip(0)[None])
        tensor([[[[2., 1.]]]])
    """
    return rows if basis is None else (rows.flatten(1, -2) @ basis).reshape(rows.shape)


def _add_gram(total: Tensor, rows: Tensor) -> None:
    """Adds XᵀX for X ``(groups, m, d)``: of a symmetric matrix little more than one half."""
    size = rows.shape[2]
    for start in range(0, size, GRAM_BLOCK):
        stop = min(start + GRAM_BLOCK, size)
        total[:, start:stop, :stop].baddbmm_(rows[:, :, start:stop].mT, rows[:, :, :stop])


def _pieces(a: Tensor, b: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Some points, and some columns where one point is too many, whose gradients fit."""
    fitting = max(1, SQUARES_BYTES // (size * a.element_size()))
    columns = min(b.shape[1], fitting)
    points = max(1, fitting // columns)
    for start in range(0, a.shape[1], points):
        some = slice(start, start + points)
        for first in range(0, b.shape[1], columns):
            yield a[:, some], b[:, first : first + columns, some]


@dataclass(frozen=True)
class ConvolutionLayer(AffineLayer):
    """A convolution: the positions are those of the output, the inputs the patches under them."""

    def fits(self, inputs: Tensor, outputs: Tensor, size: int, dim: int) -> bool:
        """See `MatrixLayer.fits`; the channels are along the second dimension."""
        spatial = self._convolution.weight.ndim
        return dim == 0 and inputs.ndim == spatial and super().fits(inputs, outputs, size, dim)

    @property
    def _convolution(self) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
        assert isinstance(self.module, _CONVOLUTIONS)
        return self.module

    def _patches(self, tensor: Tensor) -> Tensor:
        conv = self._convolution
        padding = conv._reversed_padding_repeated_twice
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        tensor = functional.pad(tensor, padding, mode=mode)
        # (N, channels, *positions, *kernel)
        for d, (kernel, stride, dilation) in enumerate(
            zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)
        ):
            windows = tensor.unfold(2 + d, dilation * (kernel - 1) + 1, stride)
            tensor = windows[..., ::dilation]
        split = tensor.reshape(len(tensor), conv.groups, -1, *tensor.shape[2:])
        grouped = split.movedim(1, 0)
        # (groups, N, *positions, channels, *kernel)
        return grouped.movedim(2, 2 + len(conv.kernel_size))

    @property
    def _entry_dims(self) -> int:
        """As of `AffineLayer`: the channels and the kernel."""
        return 1 + len(self._convolution.kernel_size)

    def _positions(self, tensor: Tensor) -> Tensor:
        channels = tensor.shape[1] // self.form.groups
        grouped = tensor.reshape(len(tensor), self.form.groups, channels, -1)
        return grouped.movedim(1, 0).mT


@dataclass(frozen=True)
class EmbeddingLayer(MatrixLayer):
    """`torch.nn.Embedding`: a position has one token, and the input moment is diagonal.

    Tokens of ``padding_idx``, whose row has no gradient, are -1.
    """

    can_reduce: ClassVar[bool] = False
    position_dim: ClassVar[int] = -1

    def fits(self, inputs: Tensor, outputs: Tensor, size: int, dim: int) -> bool:
        """See `MatrixLayer.fits`."""
        if inputs.ndim == 0 or inputs.is_floating_point() or outputs.ndim != inputs.ndim + 1:
            return False
        if dim == 0:
            return len(inputs) % size == 0 and len(inputs) > 0
        return inputs.ndim > 1 and inputs.shape[1] == size

    def inputs(self, tensor: Tensor, size: int, dim: int) -> Tensor:
        """See `MatrixLayer.inputs`."""
        assert isinstance(self.module, nn.Embedding)
        tokens = tensor.movedim(dim, 0).reshape(size, -1).long()
        padding = self.module.padding_idx
        return tokens if padding is None else tokens.masked_fill(tokens == padding, -1)

    def outputs(self, tensor: Tensor, size: int, dim: int) -> Tensor:
        """See `MatrixLayer.outputs`."""
        moved = tensor.movedim(dim + 1, 1)
        return moved.reshape(1, len(tensor), size, -1, tensor.shape[-1])

    def add_input_moment(self, total: Tensor, inputs: Tensor) -> None:
        """See `MatrixLayer.add_input_moment`."""
        _, _, vocabulary = self.form.shape
        total += torch.bincount(inputs[inputs >= 0].flatten(), minlength=vocabulary)

    def scale(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """See `MatrixLayer.scale`."""
        sizes: Tensor = outputs.norm(dim=-1)
        return sizes.sum()

    def gradient_times(self, vector: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
        """See `MatrixLayer.gradient_times`."""
        along = vector[inputs.clamp(min=0)].masked_fill(inputs < 0, 0.0)
        return (outputs[0, 0] * along.unsqueeze(2)).sum(dim=(0, 1)).unsqueeze(0)

    def point_gradients(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """See `MatrixLayer.point_gradients`."""
        _, width, vocabulary = self.form.shape
        known, keys = self._keys(inputs)
        rows = outputs.new_zeros(len(inputs) * vocabulary, width)
        rows.index_add_(0, keys, outputs[0, 0].flatten(0, 1)[known])
        return rows.reshape(len(inputs), 1, vocabulary, width).mT

    def _keys(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Which positions have a token, and (point, token) there as one number."""
        size, positions = inputs.shape
        known = (inputs >= 0).flatten()
        owners = torch.arange(size, device=inputs.device).repeat_interleave(positions)
        return known, (owners * self.form.shape[2] + inputs.flatten())[known]

    def inner_products(self, matrices: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
        """See `MatrixLayer.inner_products`; the columns of the tokens are looked up."""
        gradients = outputs[0, 0].masked_fill((inputs < 0).unsqueeze(2), 0.0)  # (n, positions, d)
        tokens = inputs.clamp(min=0)
        return torch.stack(
            [(matrix[0].T[tokens] * gradients).sum(dim=(1, 2)) for matrix in matrices]
        )

    def products(self, parts: Mapping[str, Tensor], inputs: Tensor, outputs: Tensor) -> Tensor:
        """See `MatrixLayer.products`."""
        return self.inner_products(self.form.weights(parts[self.form.weight]), inputs, outputs)

    def weighted_sum(self, weights: Tensor, inputs: Tensor, outputs: Tensor) -> dict[str, Tensor]:
        """See `MatrixLayer.weighted_sum`."""
        known = inputs >= 0
        owners, tokens, gradients = known.nonzero()[:, 0], inputs[known], outputs[0, 0][known]
        total = gradients.new_zeros(len(weights), *self.form.weight_shape)
        for rows, row in zip(total, weights, strict=True):
            rows.index_add_(0, tokens, row[owners].unsqueeze(1) * gradients)
        return {self.form.weight: total}

    def weighted_squares(self, weights: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
        """See `MatrixLayer.weighted_squares`; only the rows of tokens that occur are made."""
        pairs, rows = self._rows_of_pairs(inputs, outputs[0, 0])
        vocabulary = self.form.shape[2]
        squares = (rows.square() * weights[0].T[pairs % vocabulary]).sum(dim=1)
        return squares.new_zeros(len(inputs)).index_add_(0, pairs // vocabulary, squares)

    def norms(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """See `MatrixLayer.norms`; only the rows of the tokens that occur are made."""
        scaled, largest = _scaled_points(outputs[:, 0])
        pairs, rows = self._rows_of_pairs(inputs, scaled[0])
        squares = rows.square().sum(dim=1)
        total = squares.new_zeros(len(inputs)).index_add_(0, pairs // self.form.shape[2], squares)
        return total.sqrt() * largest

    def _rows_of_pairs(self, inputs: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """The (point, token) that occur, as numbers, and the rows of their gradients."""
        known, keys = self._keys(inputs)
        pairs, where = torch.unique(keys, return_inverse=True)
        rows = column.new_zeros(len(pairs), column.shape[-1])
        return pairs, rows.index_add_(0, where, column.flatten(0, 1)[known])

    def add_squares(self, total: Tensor, inputs: Tensor, outputs: Tensor) -> None:
        """See `MatrixLayer.add_squares`; only the rows of the tokens that occur are made."""
        rows_of_tokens = total[0].mT
        for column in outputs[0]:
            pairs, rows = self._rows_of_pairs(inputs, column)
            rows_of_tokens.index_add_(0, pairs % self.form.shape[2], rows.square_())


def matrix_layer(name: str, module: nn.Module, space: ParameterSpace) -> MatrixLayer | None:
    """The layer of a module, if it is of a known kind and nothing else has a share in it.

    Args:
        name: Its name.
        module: The module.
        space: The parameters to differentiate by.

    Returns:
        ``None`` for other modules, those with parameters beside a weight and a bias, and those
        whose weight is frozen. What is returned is a claim, which remains to be verified.
    """
    prefix = f"{name}." if name else ""
    own = {key for key, _ in module.named_parameters(recurse=False)}
    in_space = [key for key in ("weight", "bias") if prefix + key in space.shapes]
    if not own <= {"weight", "bias"} or "weight" not in in_space or any(module.children()):
        return None
    block = space.subspace([prefix + key for key in in_space])
    bias = prefix + "bias" if "bias" in in_space else None
    form = MatrixForm(block, prefix + "weight", bias)
    if isinstance(module, nn.Linear):
        return AffineLayer(name, module, form)
    if isinstance(module, _CONVOLUTIONS) and not isinstance(
        module, nn.modules.conv._ConvTransposeNd
    ):
        return ConvolutionLayer(name, module, replace(form, groups=module.groups))
    if isinstance(module, nn.Embedding):
        return EmbeddingLayer(name, module, replace(form, transposed=True))
    return None
