"""Gradients of points layer by layer, where a layer is known to apply a matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hessops.errors import ModelError
from hessops.functional.capture import Call, CapturedRun
from hessops.functional.layers import MatrixLayer, matrix_layer
from hessops.functional.products import Params
from hessops.functional.roots import gradient_root
from hessops.objective import Objective
from hessops.streaming import Batch

# Points of a batch on which it is verified that layers are what they are taken for.
VERIFIED_POINTS = 8
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}


class Demotion(Exception):  # not an error: what was begun begins anew
    """A layer turned out not to be what it was taken for."""


@dataclass(frozen=True)
class Probe:
    """A run on some points of a batch, followed back from random weights of half of the outputs.

    Attributes:
        points: The points.
        run: The run.
        columns: The weights of the outputs, zero for the points `others`.
        gradients: Those by the outputs of the calls of each module.
        expected: Those by the parameters.
        others: Positions of the points without weight.
    """

    points: Batch
    run: CapturedRun
    columns: list[Tensor]
    gradients: Mapping[str, list[Tensor]]
    expected: Params
    others: Tensor

    def agrees(self, total: Tensor, wanted: Tensor, scale: Tensor) -> bool:
        """Whether a sum over points is a gradient, up to rounding of terms of this total size."""
        return bool((total - wanted).norm() <= tolerance(total.dtype) * scale)


def tolerance(dtype: torch.dtype) -> float:
    """How far the sum of gradients may be from the gradient of the sum, relatively."""
    return _TOLERANCES.get(dtype, 5e-2)


class MatrixLayers:
    r"""The layers of a model that apply a matrix, each verified to be what it seems.

    On some points of every batch it is verified that :math:`\sum_t b_t a_t^\top` is the gradient by
    a layer, and that the rows of its output belong to the points they are attributed to. A layer
    that fails (its weight is used elsewhere too, it is called with other arguments, a hook changes
    its output) is one no more.

    Args:
        objective: Model and loss.

    Attributes:
        layers: Name of a module -> its layer.

    Example:
        >>> import torch
        >>> from hessops import Batch, Objective
        >>> from hessops.functional.layerwise import MatrixLayers
        >>> objective = Objective(torch.nn.Linear(3, 2), torch.nn.MSELoss())
        >>> batch = Batch.from_raw((torch.zeros(4, 3), torch.ones(4, 2)))
        >>> MatrixLayers(objective).verified(batch)  # the points lie along dimension 0
        {'': [0]}
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.layers: dict[str, MatrixLayer] = {}
        for name, module in objective.model.named_modules():
            layer = matrix_layer(name, module, objective.space)
            if layer is not None:
                self.layers[name] = layer

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Name -> module of the layers."""
        return {name: layer.module for name, layer in self.layers.items()}

    def verified(self, batch: Batch) -> dict[str, list[int]]:
        """Where the points lie in each call of each layer that is one."""
        while True:
            try:
                return self.dims(self.probe(batch, self.modules))
            except Demotion:
                continue

    def probe(self, batch: Batch, modules: Mapping[str, nn.Module]) -> Probe:
        """A run on some points of a batch, to verify what is said of some modules."""
        device = self.objective.device
        generator = torch.Generator().manual_seed(batch.position)
        order = torch.randperm(batch.size, generator=generator)[:VERIFIED_POINTS].sort().values
        points = batch.rows(order.to(device), len(order))
        run = CapturedRun(self.objective, points, modules)
        is_probed = torch.zeros(len(order), dtype=torch.bool)
        is_probed[torch.randperm(len(order), generator=generator)[: (len(order) + 1) // 2]] = True
        columns = [_probing(part, is_probed, generator) for part in run.parts]
        return Probe(
            points,
            run,
            columns,
            run.gradients([column.unsqueeze(0) for column in columns]),
            run.parameter_gradients(columns),
            (~is_probed).nonzero().flatten().to(device),
        )

    def dims(self, probe: Probe) -> dict[str, list[int]]:
        """As `verified`, from a run.

        Raises:
            Demotion: A layer is none, and was removed: begin anew.
        """
        found = {name: _dims(layer, probe) for name, layer in self.layers.items()}
        demoted = [name for name, dims in found.items() if dims is None]
        if demoted:
            for name in demoted:
                del self.layers[name]
            raise Demotion
        return {name: dims for name, dims in found.items() if dims is not None}

    def inputs(
        self, run: CapturedRun, batch: Batch, dims: Mapping[str, list[int]]
    ) -> dict[str, Tensor]:
        """The inputs of the layers that were called, those of several calls as positions.

        Raises:
            ModelError: The model runs otherwise than on some of the points alone.
        """
        found = {}
        for name, layer in self.layers.items():
            calls = run.calls.get(name, [])
            if len(calls) != len(dims[name]):
                raise ModelError(
                    f"batch {batch.position}: module {name!r} was called {len(calls)} times, and "
                    f"{len(dims[name])} times on some of the points: their number decides"
                )
            parts = []
            for call, dim in zip(calls, dims[name], strict=True):
                if call is None or not layer.fits(call.input, call.output, batch.size, dim):
                    raise ModelError(
                        f"batch {batch.position}: module {name!r} is called with other shapes than "
                        "on some of the points alone"
                    )
                parts.append(layer.inputs(call.input, batch.size, dim))
            if parts:
                found[name] = torch.cat(parts, dim=layer.position_dim)
        return found

    def outputs(
        self, gradients: Mapping[str, Sequence[Tensor]], batch: Batch, dims: Mapping[str, list[int]]
    ) -> dict[str, Tensor]:
        """Gradients by the outputs of the layers, those of several calls as positions."""
        return {
            name: torch.cat(
                [
                    layer.outputs(gradient, batch.size, dim)
                    for gradient, dim in zip(gradients[name], dims[name], strict=True)
                ],
                dim=-2,
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
        >>> found.rows("").shape, found.products("", torch.ones(5, 8)).shape
        (torch.Size([4, 8]), torch.Size([5, 4]))
    """

    layers: Mapping[str, MatrixLayer]
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    size: int

    @classmethod
    def of(cls, matrices: MatrixLayers, batch: Batch) -> PointGradients:
        """One run forward and one backward, without a gradient by a parameter.

        Raises:
            ModelError: The model runs otherwise than on some of the points alone.
        """
        dims = matrices.verified(batch)
        if not matrices.layers:
            return cls({}, {}, {}, batch.size)
        run = CapturedRun(matrices.objective, batch, matrices.modules)
        root = gradient_root(matrices.objective, run.output, batch)
        outputs = matrices.outputs(run.gradients(root.columns(0, 1)), batch, dims)
        return cls(dict(matrices.layers), matrices.inputs(run, batch, dims), outputs, batch.size)

    def rows(self, name: str) -> Tensor:
        """The gradients by the parameters of a layer, ``(n, P_layer)``."""
        layer = self.layers[name]
        return layer.form.rows(self.matrices(name, slice(0, self.size)))

    def matrices(self, name: str, points: slice) -> Tensor:
        """The gradients of some points by a layer, ``(m, groups, outputs, inputs)``."""
        layer = self.layers[name]
        if name not in self.inputs:
            return layer.form.matrices(layer.zeros(len(range(self.size)[points])))
        inputs = self.inputs[name]
        some = inputs[:, points] if layer.can_reduce else inputs[points]
        return layer.point_gradients(some, self.outputs[name][:, :, points])

    def products(self, name: str, rows: Tensor) -> Tensor:
        """Inner products of rows ``(m, P_layer)`` with the gradients by a layer, ``(m, n)``."""
        return self.inner_products(name, self.layers[name].form.matrices(rows))

    def inner_products(self, name: str, matrices: Tensor) -> Tensor:
        """As `products`, with matrices ``(m, groups, outputs, inputs)``."""
        if name not in self.inputs:
            return matrices.new_zeros(len(matrices), self.size)
        layer = self.layers[name]
        return layer.inner_products(matrices, self.inputs[name], self.outputs[name])

    def rotated(self, bases: Mapping[str, tuple[Tensor | None, Tensor]]) -> PointGradients:
        """The gradients by some layers, in other bases of the inputs and the outputs.

        Args:
            bases: Name of a layer -> bases; ``None`` leaves the inputs as they are.
        """
        inputs, outputs = {}, {}
        for name, (of_inputs, of_outputs) in bases.items():
            if name not in self.inputs:
                continue
            a, b = self.inputs[name], self.outputs[name]
            inputs[name] = (
                a if of_inputs is None else (a.flatten(1, 2) @ of_inputs).reshape(a.shape)
            )
            outputs[name] = (b.flatten(1, 3) @ of_outputs).reshape(b.shape)
        layers = {name: self.layers[name] for name in bases}
        return PointGradients(layers, inputs, outputs, self.size)


def _probing(part: Tensor, is_probed: Tensor, generator: torch.Generator) -> Tensor:
    """Random weights of an output that are zero for the other points."""
    drawn = torch.randn(part.shape, generator=generator, dtype=torch.float64)
    return (drawn * is_probed.reshape(-1, *[1] * (part.ndim - 1))).to(part)


def _dims(layer: MatrixLayer, probe: Probe) -> list[int] | None:
    """Where the points lie in each call of a layer; ``None`` where it is none."""
    form, size = layer.form, probe.points.size
    calls: Sequence[Call | None] = probe.run.calls.get(layer.name, [])
    flat = form.space.flatten({name: probe.expected[name] for name in form.space.names})
    wanted = form.matrices(flat.unsqueeze(0))[0]
    known = [call for call in calls if call is not None]
    if len(known) < len(calls):
        return None
    if not known:
        return None if wanted.any() else []
    dims, inputs, outputs = [], [], []
    for call, gradient in zip(known, probe.gradients[layer.name], strict=True):
        for dim in (0, 1):
            if not layer.fits(call.input, call.output, size, dim):
                continue
            rows = layer.outputs(gradient, size, dim)
            if not rows[:, :, probe.others].any():
                dims.append(dim)
                inputs.append(layer.inputs(call.input, size, dim))
                outputs.append(rows)
                break
        else:
            return None
    a, b = torch.cat(inputs, dim=layer.position_dim), torch.cat(outputs, dim=-2)
    return dims if probe.agrees(layer.gradient(a, b), wanted, layer.scale(a, b)) else None
