"""Gradients of points layer by layer, where a layer is known to apply a matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hessops.errors import ModelError
from hessops.functional.capture import Call, CapturedRun
from hessops.functional.layers import MatrixLayer, matrix_layer, turned
from hessops.functional.products import Params
from hessops.functional.roots import gradient_root
from hessops.functional.seen import BatchMemory
from hessops.objective import Objective
from hessops.streaming import Batch

# How far sums of the same terms may be apart, in units of rounding of their total size.
SUM_TOLERANCE = 1e3
# How far the gradient of a point with other weights may be from a multiple of what it was.
_OWNER_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}
# Multiples ±2^k of the weights, by which points are told apart: exact in floating point.
NUM_MULTIPLES = 32


@dataclass(frozen=True)
class Probe:
    r"""A run followed back from random weights of the outputs, and from multiples of them.

    The weights of the outputs of point i are multiplied by :math:`c_i`. Backward passes are linear:
    a gradient that belongs to point i alone is multiplied by the same number. A single point is
    run twice, as a batch of two: of one point alone every row is its own, whatever the layout.

    Attributes:
        run: The run.
        points: The n points.
        weights: The weights of the outputs.
        multiples: c, ``(n,)``.
        first: The gradients by the outputs of the calls of each module.
        second: Those of the multiplied weights.
        expected: The gradients by the parameters of the first weights; ``None`` where sums are not
            verified.
    """

    run: CapturedRun
    points: Batch
    weights: list[Tensor]
    multiples: Tensor
    first: Mapping[str, list[Tensor]]
    second: Mapping[str, list[Tensor]]
    expected: Params | None

    @classmethod
    def of(cls, run: CapturedRun, batch: Batch, *, sums: bool = True) -> Probe:
        """Two backward passes, one of them to the parameters if there are `sums` to be verified."""
        if batch.size == 1:
            device = run.parts[0].device
            batch = batch.rows(torch.zeros(2, dtype=torch.int64, device=device), 2)
            run = run.on(batch)
        generator = torch.Generator().manual_seed(batch.position)
        kinds = torch.randperm(batch.size, generator=generator) % NUM_MULTIPLES
        multiples = torch.where(kinds % 2 == 0, 1.0, -1.0) * 2.0 ** (kinds // 2)
        weights, multiplied = [], []
        for part in run.parts:
            dtype = torch.float64 if part.dtype == torch.float64 else torch.float32
            drawn = torch.randn(part.shape, generator=generator, dtype=dtype)
            weights.append(drawn.to(part))
            by_point = multiples.to(part).reshape(-1, *[1] * (part.ndim - 1))
            multiplied.append(weights[-1] * by_point)
        first, expected = run.follow_to_parameters(weights) if sums else (run.follow(weights), None)
        second = run.follow(multiplied)
        return cls(run, batch, weights, multiples, first, second, expected)

    def owned(self, first: Tensor, second: Tensor) -> bool:
        """Whether rows ``(n, ..., width)`` of gradients belong to the points in their order."""
        by_point = self.multiples.to(first).reshape(-1, *[1] * (first.ndim - 1))
        if first.numel() == 0:
            return True
        sizes = first.norm(dim=-1)
        distances = (second - by_point * first).norm(dim=-1)
        relative = _OWNER_TOLERANCES.get(first.dtype, 5e-2)
        # On devices that add in any order, what cancels leaves rounding of what did not.
        rounding = 10 * torch.finfo(first.dtype).eps * sizes.max()
        return bool((distances <= by_point.squeeze(-1).abs() * (relative * sizes + rounding)).all())

    def agrees(self, total: Tensor, wanted: Tensor, scale: Tensor) -> bool:
        """Whether a sum over points is a gradient, up to rounding of terms of this total size."""
        precision = SUM_TOLERANCE * torch.finfo(total.dtype).eps
        return bool((total - wanted).norm() <= precision * scale)


class MatrixLayers:
    r"""The layers of a model that apply a matrix, each verified to be what it seems.

    On every batch it is verified that :math:`\sum_t b_t a_t^\top` is the gradient by a layer, for
    random weights of the outputs, and that each row of its output belongs to the point that it is
    attributed to (`Probe`). A layer that fails (its weight is used elsewhere too, it is called with
    other arguments, a hook changes its output) is one no more. What was found of a batch is
    remembered as long as its tensors live and are not written to: at the same parameters the model
    runs on it as before.

    Args:
        objective: Model and loss.

    Attributes:
        layers: Name of a module -> its layer.

    Example:
        >>> import torch
        >>> from hessops import Batch, Objective
        >>> from hessops.functional.capture import CapturedRun
        >>> from hessops.functional.layerwise import MatrixLayers, Probe
        >>> objective = Objective(torch.nn.Linear(3, 2), torch.nn.MSELoss())
        >>> batch = Batch.from_raw((torch.zeros(4, 3), torch.ones(4, 2)))
        >>> matrices = MatrixLayers(objective)
        >>> run = CapturedRun(objective, batch, matrices.modules)
        >>> matrices.dims(Probe.of(run, batch))  # the points lie along dimension 0
        {'': [0]}
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.layers: dict[str, MatrixLayer] = {}
        self._known: BatchMemory[dict[str, list[int]]] = BatchMemory()
        for name, module in objective.model.named_modules():
            layer = matrix_layer(name, module, objective.space)
            if layer is not None:
                self.layers[name] = layer

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Name -> module of the layers."""
        return {name: layer.module for name, layer in self.layers.items()}

    def dims(self, probe: Probe) -> dict[str, list[int]]:
        """Where the points lie in each call of each layer; a layer that is none is removed.

        Args:
            probe: A run with the modules of the layers.
        """
        return {name: found.dims for name, found in self._located(probe).items()}

    def _located(self, probe: Probe) -> dict[str, _Located]:
        found = {name: _located(layer, probe) for name, layer in self.layers.items()}
        located = {name: some for name, some in found.items() if some is not None}
        self.layers = {name: self.layers[name] for name in located}
        return located

    def verified(
        self, run: CapturedRun, batch: Batch
    ) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
        """`dims` and `inputs`, verified unless the batch was before and not written to since.

        Args:
            run: A run on the batch, with the modules of the layers.
            batch: n points.
        """
        dims = self._known.get(batch)
        if dims is not None:
            # Other batches may have shown since that a layer is none.
            dims = {name: some for name, some in dims.items() if name in self.layers}
            return dims, self.inputs(run, batch, dims)
        probe = Probe.of(run, batch)
        located = self._located(probe)
        dims = {name: some.dims for name, some in located.items()}
        self._known.keep(batch, dims)
        if probe.points is not batch:
            return dims, self.inputs(run, batch, dims)
        inputs = {name: some.inputs for name, some in located.items()}
        return dims, {name: a for name, a in inputs.items() if a is not None}

    def verify(self, batch: Batch) -> None:
        """Removes the layers that are none on a batch, unless it was verified before.

        Args:
            batch: n points.
        """
        if self.layers and self._known.get(batch) is None:
            self.verified(CapturedRun(self.objective, batch, self.modules), batch)

    def remove(self, names: Iterable[str]) -> None:
        """Layers that are none, as is known from other points."""
        gone = set(names)
        self.layers = {name: layer for name, layer in self.layers.items() if name not in gone}

    def inputs(
        self, run: CapturedRun, batch: Batch, dims: Mapping[str, list[int]]
    ) -> dict[str, Tensor]:
        """The inputs of the layers that were called, those of several calls as positions.

        Raises:
            ModelError: A single point is run otherwise than a batch of two.
        """
        found = {}
        for name, layer in self.layers.items():
            calls = [call for call in run.calls.get(name, []) if call is not None]
            fits = [
                layer.fits(call.input, call.output, batch.size, dim)
                for call, dim in zip(calls, dims[name], strict=False)
            ]
            if len(calls) != len(dims[name]) or not all(fits):
                raise ModelError(
                    f"batch {batch.position}: module {name!r} is called otherwise for a single "
                    "point than for two; use larger batches"
                )
            parts = [
                layer.inputs(call.input, batch.size, dim)
                for call, dim in zip(calls, dims[name], strict=True)
            ]
            if parts:
                found[name] = _joined(parts, layer.position_dim)
        return found

    def outputs(
        self, gradients: Mapping[str, Sequence[Tensor]], batch: Batch, dims: Mapping[str, list[int]]
    ) -> dict[str, Tensor]:
        """Gradients by the outputs of the layers, those of several calls as positions."""
        return {
            name: _joined(
                [
                    layer.outputs(gradient, batch.size, dim)
                    for gradient, dim in zip(gradients[name], dims[name], strict=True)
                ],
                -2,
            )
            for name, layer in self.layers.items()
            if name in gradients
        }


@dataclass(frozen=True)
class PointGradients:
    r"""The gradients :math:`\nabla\ell_i` of points by the layers of a model, as factors.

    Attributes:
        layers: Name -> layer, of those that have a share in the losses.
        inputs: Name -> inputs a; see `MatrixLayer.inputs`.
        outputs: Name -> gradients b by the outputs of one column; see `MatrixLayer.outputs`.
        size: n, the number of points.

    Example:
        >>> import torch
        >>> from hessops import Batch, Objective
        >>> from hessops.functional.layerwise import MatrixLayers, PointGradients
        >>> objective = Objective(torch.nn.Linear(3, 2), torch.nn.MSELoss())
        >>> batch = Batch.from_raw((torch.zeros(4, 3), torch.ones(4, 2)))
        >>> found = PointGradients.of(MatrixLayers(objective), batch)
        >>> found.rows("").shape, found.products("", {"bias": torch.ones(5, 2)}).shape
        (torch.Size([4, 8]), torch.Size([5, 4]))
    """

    layers: Mapping[str, MatrixLayer]
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    size: int

    @classmethod
    def of(cls, matrices: MatrixLayers, batch: Batch) -> PointGradients:
        """One run forward and one pass backward, after those that verify the layers of new points.

        Args:
            matrices: The layers.
            batch: n points.
        """
        if not matrices.layers:
            return cls({}, {}, {}, batch.size)
        run = CapturedRun(matrices.objective, batch, matrices.modules)
        dims, inputs = matrices.verified(run, batch)
        root = gradient_root(matrices.objective, run.output, batch)
        outputs = matrices.outputs(run.gradients(root.columns(0, 1)), batch, dims)
        return cls(dict(matrices.layers), inputs, outputs, batch.size)

    def rows(self, name: str) -> Tensor:
        """The gradients by the parameters of a layer, ``(n, P_layer)``."""
        return self.layers[name].form.rows(self.matrices(name, slice(0, self.size)))

    def matrices(self, name: str, points: slice) -> Tensor:
        """The gradients of some points by a layer, ``(m, groups, outputs, inputs)``."""
        layer = self.layers[name]
        if name not in self.inputs:
            space, count = layer.form.space, len(range(self.size)[points])
            return torch.zeros(count, *layer.form.shape, dtype=space.dtype, device=space.device)
        inputs = self.inputs[name]
        some = inputs[:, points] if layer.can_reduce else inputs[points]
        return layer.point_gradients(some, self.outputs[name][:, :, points])

    def some(self, points: slice) -> PointGradients:
        """Those of some of the points."""
        inputs = {
            name: a[:, points] if self.layers[name].can_reduce else a[points]
            for name, a in self.inputs.items()
        }
        outputs = {name: b[:, :, points] for name, b in self.outputs.items()}
        return replace(self, inputs=inputs, outputs=outputs, size=len(range(self.size)[points]))

    def to(self, dtype: torch.dtype) -> PointGradients:
        """The same in another dtype."""
        inputs = {n: a.to(dtype) if a.is_floating_point() else a for n, a in self.inputs.items()}
        outputs = {name: b.to(dtype) for name, b in self.outputs.items()}
        return replace(self, inputs=inputs, outputs=outputs)

    def scaled(self, factors: Tensor) -> PointGradients:
        r""":math:`c_i \nabla\ell_i` for factors c, ``(n,)``."""
        outputs = {name: b * factors[:, None, None] for name, b in self.outputs.items()}
        return replace(self, outputs=outputs)

    def weighted_squares(self, name: str, weights: Tensor) -> Tensor:
        """Weighted sums of the squared entries of the gradients by a layer, ``(n,)``.

        Args:
            name: The layer.
            weights: ``(groups, outputs, inputs)``.
        """
        if name not in self.inputs:
            return weights.new_zeros(self.size)
        return self.layers[name].weighted_squares(weights, self.inputs[name], self.outputs[name])

    def norms(self) -> dict[str, Tensor]:
        """Norms of the gradients by each layer, name -> ``(n,)``, with no square out of range."""
        return {
            name: layer.norms(self.inputs[name], self.outputs[name])
            if name in self.inputs
            else torch.zeros(
                self.size, dtype=layer.form.space.dtype, device=layer.form.space.device
            )
            for name, layer in self.layers.items()
        }

    def products(self, name: str, parts: Mapping[str, Tensor]) -> Tensor:
        """Inner products with the gradients by parameters of a layer, ``(k, n)``.

        Args:
            name: The layer.
            parts: ``{name: (k, *shape)}`` of at least one of its parameters.
        """
        if name not in self.inputs:
            some = next(iter(parts.values()))
            return some.new_zeros(len(some), self.size)
        return self.layers[name].products(parts, self.inputs[name], self.outputs[name])

    def weighted_sum(self, name: str, weights: Tensor) -> dict[str, Tensor]:
        r""":math:`\sum_i w_{ji} \nabla\ell_i` by a layer, ``{name: (k, *shape)}``.

        Args:
            name: The layer.
            weights: w, ``(k, n)``.
        """
        layer = self.layers[name]
        if name not in self.inputs:
            shapes = layer.form.space.shapes
            return {key: weights.new_zeros(len(weights), *shape) for key, shape in shapes.items()}
        return layer.weighted_sum(weights, self.inputs[name], self.outputs[name])

    def inner_products(self, name: str, matrices: Tensor) -> Tensor:
        """Inner products with matrices ``(m, groups, outputs, inputs)``, ``(m, n)``."""
        if name not in self.inputs:
            return matrices.new_zeros(len(matrices), self.size)
        layer = self.layers[name]
        return layer.inner_products(matrices, self.inputs[name], self.outputs[name])

    def rotated(self, bases: Mapping[str, tuple[Tensor | None, Tensor]]) -> PointGradients:
        """The gradients by some layers, in other bases of the inputs and the outputs.

        Args:
            bases: Name of a layer -> bases; ``None`` leaves the inputs as they are.
        """
        called = [name for name in bases if name in self.inputs]
        inputs = {name: turned(self.inputs[name], bases[name][0]) for name in called}
        outputs = {name: turned(self.outputs[name], bases[name][1]) for name in called}
        layers = {name: self.layers[name] for name in bases}
        return PointGradients(layers, inputs, outputs, self.size)


@dataclass(frozen=True)
class _Located:
    """Where the points lie in each call of a layer, and its inputs if there was a call."""

    dims: list[int]
    inputs: Tensor | None


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """What several calls have, one after the other; that of a single call is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def _located(layer: MatrixLayer, probe: Probe) -> _Located | None:
    """What is known of the calls of a layer; ``None`` where it is none."""
    form, size = layer.form, probe.points.size
    calls: Sequence[Call | None] = probe.run.calls.get(layer.name, [])
    known = [call for call in calls if call is not None]
    if len(known) < len(calls):
        return None
    if not known:
        by_parameter = probe.expected or {}
        has_gradient = any(g.any() for name, g in by_parameter.items() if name in form.space.shapes)
        return None if has_gradient else _Located([], None)
    dims, inputs, outputs = [], [], []
    gradients = zip(probe.first[layer.name], probe.second[layer.name], strict=True)
    for call, (first, second) in zip(known, gradients, strict=True):
        for dim in (0, 1):
            if not layer.fits(call.input, call.output, size, dim):
                continue
            rows, others = (layer.outputs(g.unsqueeze(0), size, dim) for g in (first, second))
            if probe.owned(rows.movedim(2, 0), others.movedim(2, 0)):
                dims.append(dim)
                inputs.append(layer.inputs(call.input, size, dim))
                outputs.append(rows)
                break
        else:
            return None
    a, b = _joined(inputs, layer.position_dim), _joined(outputs, -2)
    if probe.expected is None:
        return _Located(dims, a)
    generator = torch.Generator().manual_seed(size)
    drawn = torch.randn(form.shape[2], generator=generator, dtype=torch.float64).to(b)
    total = layer.gradient_times(drawn, a, b)
    wanted = form.times(probe.expected, drawn)
    return _Located(dims, a) if probe.agrees(total, wanted, layer.scale(a, b)) else None
