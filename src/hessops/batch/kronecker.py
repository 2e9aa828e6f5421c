"""What a batch contributes to Kronecker factors, to corrected eigenvalues and to exact blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from hessops.errors import ArgumentError, HessopsError, ModelError
from hessops.functional.capture import Call, CapturedRun
from hessops.functional.gradients import vectorised_or_looped
from hessops.functional.layers import MatrixLayer, turned
from hessops.functional.layerwise import MatrixLayers, Probe
from hessops.functional.products import Params, Stack, StackedGradient, differentiable
from hessops.functional.roots import OutputRoot, gradient_root, hessian_root, sampled_root
from hessops.nested import differentiable_leaves
from hessops.objective import Objective
from hessops.point_loss import map_points
from hessops.space import ParameterSpace
from hessops.streaming import Batch

FisherType = Literal["type-2", "monte-carlo", "empirical"]
KfacApprox = Literal["expand", "reduce"]
FISHER_TYPES = ("type-2", "monte-carlo", "empirical")
KFAC_APPROXIMATIONS = ("expand", "reduce")

# Memory for the gradients by the outputs of all layers, of some columns of the root.
COLUMN_BYTES = 2**27
# Memory for the gradients of points by the parameters of an exact block.
ROW_BYTES = 2**27
OutputMap = Callable[[Params, object], list[Tensor]]


@dataclass(frozen=True)
class ExactBlock:
    """Parameters whose block of the matrix is computed exactly, or its diagonal.

    Attributes:
        name: The name of the module that holds them.
        kind: The type of that module.
        space: The parameters.
        is_dense: Whether the whole block is computed.
        module: The module, where the gradients of points follow from its input and the gradients by
            its output; ``None`` where they need the whole model.
        vectorize: Whether several points are tried at once.
    """

    name: str
    kind: str
    space: ParameterSpace
    is_dense: bool
    module: nn.Module | None = None
    vectorize: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the statistic."""
        size = self.space.size
        return (size, size) if self.is_dense else (size,)

    def moment(self, rows: Tensor) -> Tensor:
        """The sum over the rows ``(m, P)`` of their outer products, or of its diagonal."""
        return rows.T @ rows if self.is_dense else rows.square().sum(dim=0)


def require_kinds(fisher_type: object, kfac_approx: object) -> None:
    """Raises `ArgumentError` unless both have one of their values."""
    if fisher_type not in FISHER_TYPES:
        raise ArgumentError(f"fisher_type must be one of {FISHER_TYPES}, got {fisher_type!r}")
    if kfac_approx not in KFAC_APPROXIMATIONS:
        raise ArgumentError(
            f"kfac_approx must be one of {KFAC_APPROXIMATIONS}, got {kfac_approx!r}"
        )


class Demotion(Exception):  # not an error: what was begun begins anew
    """Layers turned out not to be what they were taken for; they are among `layers` no more."""


class KroneckerEstimation:
    r"""Kronecker statistics of batches, for an objective and a kind of Fisher matrix.

    Layers that apply a matrix (`hessops.functional.layers`) have Kronecker factors; everything else
    has an exact block, or its exact diagonal, from the gradients of the points: by a local backward
    pass through the module where it is called once with a tensor of one row for each point, by one
    through the whole model elsewhere. All of it is verified on every batch, see `MatrixLayers`;
    what fails is demoted, a layer to an exact block.

    Args:
        objective: Model and loss.
        fisher_type: ``"type-2"``, ``"monte-carlo"`` or ``"empirical"``.
        kfac_approx: ``"expand"`` or ``"reduce"``.
        num_samples: Columns per point with ``"monte-carlo"``.
        generator: Draws them.
        max_dense: The most parameters of an exact block that is not only a diagonal.

    Raises:
        ArgumentError: An unknown `fisher_type` or `kfac_approx`.
    """

    def __init__(
        self,
        objective: Objective,
        fisher_type: FisherType,
        kfac_approx: KfacApprox,
        num_samples: int,
        generator: torch.Generator,
        max_dense: int,
    ) -> None:
        require_kinds(fisher_type, kfac_approx)
        self.objective = objective
        self.fisher_type = fisher_type
        self.kfac_approx = kfac_approx
        self.num_samples = num_samples
        self.generator = generator
        self.max_dense = max_dense
        self._gradient_of = StackedGradient()
        self._demoted: set[str] = set()
        self._modules = dict(objective.model.named_modules())
        self._matrices = MatrixLayers(objective)
        self.exact: dict[str, ExactBlock] = {}
        self._arrange()

    @property
    def layers(self) -> dict[str, MatrixLayer]:
        """The layers with Kronecker factors, by name of the module."""
        return self._matrices.layers

    def _arrange(self) -> None:
        """Gives every parameter that no layer has a share in an exact block, by module."""
        space = self.objective.space
        covered = {name for layer in self.layers.values() for name in layer.form.space.names}
        owned: dict[str, list[str]] = {}
        for name in space.names:
            if name not in covered:
                owned.setdefault(name.rpartition(".")[0], []).append(name)
        for name, names in owned.items():
            known = self.exact.get(name)
            if known is not None and known.space.names == tuple(names):
                continue
            # A parametrized weight belongs to a module that has no call of its own.
            module = self._modules.get(name)
            block = space.subspace(names)
            alone = module is not None and not any(module.children()) and name not in self._demoted
            self.exact[name] = ExactBlock(
                name,
                type(module).__name__,
                block,
                block.size <= self.max_dense,
                module if alone else None,
            )
        # In an order that does not depend on which was found first: processes add up by place.
        starts = space.slices
        self.exact = dict(
            sorted(self.exact.items(), key=lambda i: starts[i[1].space.names[0]].start)
        )

    @property
    def _watched(self) -> dict[str, nn.Module]:
        local = {name: b.module for name, b in self.exact.items() if b.module is not None}
        return {**self._matrices.modules, **local}

    # --- is a layer what it is taken for? -------------------------------------------------

    def verify(self, run: CapturedRun, batch: Batch) -> dict[str, list[int]]:
        """Checks what is said of layers and modules; where the points lie in each call of a layer.

        Raises:
            Demotion: A layer is none of the kind it was taken for: begin anew.
            ModelError: The gradients of the points alone do not add up to that of the batch.
        """
        probe, count = Probe.of(run, batch), len(self.layers)
        dims = self._matrices.dims(probe)
        if len(dims) < count:
            self._arrange()
            raise Demotion
        for name in self.exact:
            while not self._is_verified(self.exact[name], probe):
                self.exact[name] = self._demoted_block(self.exact[name], batch)
        return dims

    def demote(self, names: Iterable[str]) -> None:
        """Gives layers exact blocks, as another process found out about its points."""
        self._matrices.remove(names)
        self._arrange()

    def _is_verified(self, block: ExactBlock, probe: Probe) -> bool:
        """Whether the gradients of the points add up, and follow from the call of the module."""
        assert probe.expected is not None
        wanted = block.space.flatten({name: probe.expected[name] for name in block.space.names})
        columns, size = [weight.unsqueeze(0) for weight in probe.weights], probe.points.size
        if block.module is None:
            rows = self._model_rows(block, probe.points, columns)
        else:
            calls = probe.run.calls.get(block.name, [])
            if not calls:
                return not wanted.any()
            call = calls[0]
            if len(calls) > 1 or call is None or not _lie_first(call, size):
                return False
            (first,), (second,) = probe.first[block.name], probe.second[block.name]
            if not probe.owned(first.reshape(size, 1, -1), second.reshape(size, 1, -1)):
                return False
            rows = self._module_rows(block, call, first.unsqueeze(0))
        total, scale = torch.zeros_like(wanted), wanted.new_zeros(())
        try:
            for some in rows:
                total += some.sum(dim=0)
                scale += some.norm(dim=1).sum()
        except (torch.OutOfMemoryError, HessopsError):
            raise
        except Exception:  # a module that takes no single point; the whole model may
            return False
        return probe.agrees(total, wanted, scale)

    def _demoted_block(self, block: ExactBlock, batch: Batch) -> ExactBlock:
        """The next way to the gradients of the points: a loop, the whole model, and a loop."""
        if block.vectorize:
            return replace(block, vectorize=False)
        if block.module is not None:
            self._demoted.add(block.name)
            return replace(block, module=None, vectorize=True)
        raise ModelError(
            f"batch {batch.position}: the gradients of the points alone by the parameters of "
            f"module {block.name!r} do not add up to the gradient of their sum, so that the "
            "model is not a function of one point at a time"
        )

    # --- statistics of a batch ------------------------------------------------------------

    @property
    def factor_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of what `add_factors` joins: A, positions and B of each layer; exact blocks."""
        shapes: list[tuple[int, ...]] = []
        for layer in self.layers.values():
            groups, outputs, inputs = layer.form.shape
            of_inputs = (groups, inputs, inputs) if layer.can_reduce else (groups, inputs)
            shapes += [of_inputs, (), (groups, outputs, outputs)]
        return shapes + [block.shape for block in self.exact.values()]

    def add_factors(self, total: Tensor, batch: Batch) -> None:
        r"""Adds sums over positions, columns and points to a flat tensor of `factor_shapes`.

        For each layer :math:`\sum a a^\top`, the number of positions, :math:`\sum b b^\top`; then
        the exact blocks. Of symmetric matrices only the lower half means anything.

        Raises:
            Demotion: See `verify`.
        """
        run = CapturedRun(self.objective, batch, self._watched)
        dims = self.verify(run, batch)
        inputs = self._matrices.inputs(run, batch, dims)
        root = self._root(run.output, batch)
        values = iter(self.split(total, self.factor_shapes))
        moments = {name: (next(values), next(values), next(values)) for name in self.layers}
        exact = {name: next(values) for name in self.exact}
        for name, x in inputs.items():
            layer = self.layers[name]
            layer.add_input_moment(moments[name][0], self._shared(layer, x, is_output=False))
            positions = 1 if self._reduces(layer) else x.shape[layer.position_dim]
            moments[name][1].add_(batch.size * positions)
        for columns, outputs in self._columns(run, root, batch, dims):
            for name in inputs:
                layer = self.layers[name]
                shared = self._shared(layer, outputs[name], is_output=True)
                layer.add_output_moment(moments[name][2], shared)
            for name, block in self.exact.items():
                for rows in self._rows(block, run, batch, columns, outputs):
                    exact[name].add_(block.moment(rows))

    @property
    def correction_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of what `add_corrections` joins, by layer."""
        return [layer.form.shape for layer in self.layers.values()]

    def add_corrections(
        self, total: Tensor, batch: Batch, bases: Mapping[str, tuple[Tensor | None, Tensor]]
    ) -> None:
        """Adds squared gradients in the eigenbases, to a flat tensor of `correction_shapes`.

        Args:
            total: The flat tensor.
            batch: n points, which `add_factors` has verified.
            bases: Name of a layer -> eigenvectors of A (``None`` for the identity) and of B.

        Raises:
            ModelError: A layer is none of the kind it was taken for, and was in the first pass.
        """
        run = CapturedRun(self.objective, batch, self._matrices.modules)
        dims = self._matrices.dims(Probe.of(run, batch, sums=False))
        if len(dims) < len(bases):
            raise ModelError(
                f"batch {batch.position}: the model runs otherwise than in the first pass"
            )
        # Rotated before the outer product: what is of the size of M is never multiplied by a basis.
        inputs = {
            name: turned(x, bases[name][0])
            for name, x in self._matrices.inputs(run, batch, dims).items()
        }
        root = self._root(run.output, batch)
        totals = dict(zip(self.layers, self.split(total, self.correction_shapes), strict=True))
        for _, outputs in self._columns(run, root, batch, dims):
            for name, x in inputs.items():
                b = turned(outputs[name], bases[name][1])
                self.layers[name].add_squares(totals[name], x, b)

    def split(self, flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """What was joined in a flat tensor, in its shapes."""
        parts = torch.split(flat, [prod(shape) for shape in shapes])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _root(self, output: object, batch: Batch) -> OutputRoot:
        if self.fisher_type == "empirical":
            return gradient_root(self.objective, output, batch)
        if self.fisher_type == "type-2":
            return hessian_root(self.objective, output, batch)
        return sampled_root(self.objective, output, batch, self.generator, self.num_samples)

    def _reduces(self, layer: MatrixLayer) -> bool:
        return self.kfac_approx == "reduce" and layer.can_reduce

    def _shared(self, layer: MatrixLayer, rows: Tensor, *, is_output: bool) -> Tensor:
        """Inputs averaged, gradients summed over the positions of a point, with ``"reduce"``."""
        if not self._reduces(layer):
            return rows
        return rows.sum(dim=-2, keepdim=True) if is_output else rows.mean(dim=-2, keepdim=True)

    def _columns(
        self, run: CapturedRun, root: OutputRoot, batch: Batch, dims: Mapping[str, list[int]]
    ) -> Iterator[tuple[list[Tensor], dict[str, Tensor]]]:
        """Some columns of the root at a time, with the gradients by the outputs of each layer."""
        bytes_each = sum(output.numel() * output.element_size() for output in run.outputs)
        chunk = max(1, COLUMN_BYTES // (3 * bytes_each + 1))
        for start in range(0, root.count, chunk):
            columns = root.columns(start, start + chunk)
            gradients = run.gradients(columns, self._gradient_of)
            outputs = self._matrices.outputs(gradients, batch, dims)
            for name, block in self.exact.items():
                if block.module is not None and name in gradients:
                    (outputs[name],) = gradients[name]
            yield columns, outputs

    # --- exact blocks ---------------------------------------------------------------------

    def _rows(
        self,
        block: ExactBlock,
        run: CapturedRun,
        batch: Batch,
        columns: Sequence[Tensor],
        outputs: Mapping[str, Tensor],
    ) -> Iterator[Tensor]:
        """The gradients of the points by the parameters of a block, for every column, as rows."""
        if block.module is None:
            yield from self._model_rows(block, batch, columns)
        elif block.name in outputs:
            (call,) = run.calls[block.name]
            assert call is not None
            yield from self._module_rows(block, call, outputs[block.name])

    def _module_rows(self, block: ExactBlock, call: Call, gradients: Tensor) -> Iterator[Tensor]:
        module = block.module
        assert module is not None
        prefix = len(block.name) + 1 if block.name else 0

        def output(params: Params, x: object) -> list[Tensor]:
            return [functional_call(module, {n[prefix:]: p for n, p in params.items()}, (x,))]

        yield from self._pulled_back(block, output, call.input, [gradients.movedim(0, 1)])

    def _model_rows(
        self, block: ExactBlock, batch: Batch, columns: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        def output(params: Params, x: object) -> list[Tensor]:
            return differentiable_leaves(self.objective.output(params, x))

        weights = [column.movedim(0, 1) for column in columns]
        yield from self._pulled_back(block, output, batch.x, weights)

    def _pulled_back(
        self, block: ExactBlock, output: OutputMap, x: object, weights: list[Tensor]
    ) -> Iterator[Tensor]:
        """Rows ``(m, P)`` of some points at a time, for weights ``(n, k, ...)`` of outputs."""
        params = {name: self.objective.params[name] for name in block.space.names}
        count, num_columns = weights[0].shape[:2]
        points = Batch(x, weights, count)
        size = max(
            1, ROW_BYTES // (4 * num_columns * block.space.size * block.space.dtype.itemsize)
        )
        for start in range(0, count, size):
            some = points.rows(slice(start, start + size), min(size, count - start))
            pull = partial(_pulled_back, output, params, some)
            stack = vectorised_or_looped(pull) if block.vectorize else pull(False)
            parts = [stack[name].flatten(0, 1).flatten(1) for name in block.space.names]
            yield torch.cat([part.reshape(len(part), -1) for part in parts], dim=1)


def _pulled_back(output: OutputMap, params: Params, points: Batch, vectorize: bool) -> Stack:
    """Gradients of ⟨columns, output⟩ of every point alone, ``{name: (n, k, *shape)}``.

    Args:
        output: From parameters and inputs to outputs.
        params: The parameters.
        points: Inputs, and as targets a list of weights ``(n, k, ...)`` of the outputs.
        vectorize: Tries all points at once.
    """
    if vectorize:

        def of_point(point: Batch) -> Stack:
            _, pull = vjp(lambda p: tuple(output(p, point.x)), dict(params))[:2]

            def along(*weights: Tensor) -> Stack:
                gradients: Stack = pull(tuple(w.unsqueeze(0) for w in weights))[0]
                return gradients

            stack: Stack = vmap(along)(*(w[0] for w in cast(list[Tensor], point.y)))
            return stack

        return map_points(of_point, points)
    found: dict[str, list[Tensor]] = {name: [] for name in params}
    for i in range(points.size):
        point = points.rows(slice(i, i + 1), 1)
        leaves = differentiable(params)
        with torch.enable_grad():
            parts = output(leaves, point.x)
        weights = [w.movedim(0, 1) for w in cast(list[Tensor], point.y)]
        gradients = StackedGradient()(parts, list(leaves.values()), weights)
        for name, gradient in zip(leaves, gradients, strict=True):
            found[name].append(gradient)
    return {name: torch.stack(rows) for name, rows in found.items()}


def _lie_first(call: Call, size: int) -> bool:
    return all(t.ndim > 0 and len(t) == size for t in (call.input, call.output))
