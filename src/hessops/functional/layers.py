"""Layers that apply a matrix at every position, and what of them is a matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from hessops.space import ParameterSpace

# Memory for the gradients of some points by one matrix in the eigenbasis.
SQUARES_BYTES = 2**26
# Columns of a Gram matrix that are computed at once.
GRAM_BLOCK = 192
# Memory for the images of inputs, or for the gradients of points, in inner products.
PRODUCT_BYTES = 2**26
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
        weight = parts[self.weight]
        if self.transposed:
            weight = weight.mT
        lead = (len(rows), self.groups, weight.shape[1] // self.groups)
        matrices = weight.reshape(*lead, -1)
        if self.bias is None:
            return matrices
        return torch.cat([matrices, parts[self.bias].reshape(*lead, 1)], dim=3)

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
        rows = torch.empty(1, self.space.size, device="meta")
        _, groups, outputs, inputs = self.matrices(rows).shape
        return groups, outputs, inputs

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
        rows = self._patches(tensor.movedim(dim, 0))
        rows = rows.reshape(self.form.groups, size, -1, rows.shape[-1])
        return rows if self.form.bias is None else functional.pad(rows, (0, 1), value=1.0)

    def _patches(self, tensor: Tensor) -> Tensor:
        """An input ``(N, ...)`` as ``(groups, N, positions, inputs)``."""
        return tensor.reshape(1, len(tensor), -1, tensor.shape[-1])

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
        """See `MatrixLayer.inner_products`; a single position needs no gradients of points."""
        k, size, itemsize = len(matrices), inputs.shape[1], inputs.element_size()
        total = inputs.new_zeros(k, size)
        if inputs.shape[2] == 1:
            a, b = inputs[:, :, 0].mT, outputs[:, 0, :, 0].mT  # (groups, inputs or outputs, n)
            width = b.shape[1]
            some = max(1, PRODUCT_BYTES // (width * size * itemsize))
            for group, (a_group, b_group) in enumerate(zip(a, b, strict=True)):
                for start in range(0, k, some):
                    part = matrices[start : start + some, group]
                    images = (part.reshape(-1, part.shape[2]) @ a_group).reshape(-1, width, size)
                    total[start : start + some] += (images * b_group).sum(dim=1)
            return total
        flat = matrices.flatten(1).T
        some = max(1, PRODUCT_BYTES // (len(flat) * itemsize))
        for start in range(0, size, some):
            points = slice(start, start + some)
            rows = self.point_gradients(inputs[:, points], outputs[:, :, points])
            total[:, points] = (rows.flatten(1) @ flat).T
        return total

    def add_squares(self, total: Tensor, inputs: Tensor, outputs: Tensor) -> None:
        """See `MatrixLayer.add_squares`; a single position needs no gradients of points."""
        if inputs.shape[2] == 1:
            total.baddbmm_(outputs.square().sum(dim=1)[:, :, 0].mT, inputs.square()[:, :, 0])
            return
        for some_a, some_b in _pieces(inputs, outputs, self.form.space.size):
            # (groups, k, n, outputs, inputs)
            total += (some_b.mT @ some_a.unsqueeze(1)).square_().sum(dim=(1, 2))


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
        n, dims = len(tensor), len(conv.kernel_size)
        channels = tensor.shape[1] // conv.groups
        grouped = tensor.reshape(n, conv.groups, channels, *tensor.shape[2:]).movedim(1, 0)
        positions = grouped.movedim(2, 2 + dims)  # (groups, N, *positions, channels, *kernel)
        inputs = channels * tensor.shape[2 + dims :].numel()
        return positions.reshape(conv.groups, n, -1, inputs)

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

    def add_squares(self, total: Tensor, inputs: Tensor, outputs: Tensor) -> None:
        """See `MatrixLayer.add_squares`; only the rows of the tokens that occur are made."""
        _, width, vocabulary = self.form.shape
        known, keys = self._keys(inputs)
        pairs, where = torch.unique(keys, return_inverse=True)
        rows_of_tokens = total[0].mT
        for column in outputs[0]:
            rows = column.new_zeros(len(pairs), width)
            rows.index_add_(0, where, column.flatten(0, 1)[known])
            rows_of_tokens.index_add_(0, pairs % vocabulary, rows.square_())


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
