"""A = U Uᵀ with a column of U for each point and output: products with U, and the Gram matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise

import torch
from torch import Tensor

from hessops.errors import DataChangedError, DataError, ModelError, StructureError
from hessops.functional.capture import CapturedRun
from hessops.functional.columns import columns_that_fit
from hessops.functional.gradients import GRADIENT_BYTES
from hessops.functional.layers import EmbeddingLayer, MatrixLayer
from hessops.functional.layerwise import MatrixLayers, Probe
from hessops.functional.memory import RetainedBytes
from hessops.functional.outputs import LinearizedOutputs
from hessops.functional.precision import accumulation_dtype
from hessops.functional.products import StackedGradient
from hessops.functional.roots import OutputRoot
from hessops.objective import Objective
from hessops.streaming import Batch

RootOf = Callable[[Objective, object, Batch], OutputRoot]
RowsMap = Callable[[Tensor], Tensor]

# What the two sides of a pair of blocks take between them: as for per-sample gradients.
BLOCK_BYTES = GRADIENT_BYTES // 2
# Memory for the products of one tile of the Gram matrix by one layer.
TILE_BYTES = 2**26
# Points in one backward pass for rows of their own, all but one of which are wasted: few enough for
# that to cost little beside the products of rows, many enough for passes to be worth their calls.
UNIT_POINTS = 8
# Rows of such passes that are computed at once.
UNIT_ROWS = 64
# A backward pass holds the gradients by the outputs of layers, and about twice that between them.
PASS_FACTOR = 3


@dataclass(frozen=True)
class PartColumns:
    r"""The columns of U that belong to the points of one batch.

    Attributes:
        size: n, the points.
        root: Columns S by the outputs of each point.
        weight: That of a point in the average; U has its square root as a factor.
        dims: Where the points lie in the calls of each layer; see `MatrixLayers.dims`.
        positions: Name of a layer -> positions of a point, over all calls.
    """

    size: int
    root: OutputRoot
    weight: float
    dims: Mapping[str, list[int]]
    positions: Mapping[str, int]

    @property
    def count(self) -> int:
        """The number of columns."""
        return self.size * self.root.count

    def weights(self, points: slice) -> list[Tensor]:
        """S of some points, one tensor ``(c, n, ...)`` per output of the model."""
        return [s[:, points] for s in self.root.columns(0, self.root.count)]

    def flat_weights(self) -> Tensor:
        """S of all points times the root of their weight, ``(n, outputs, c)`` in float64."""
        flat = self.root.flat_columns(0, self.root.count)
        weighted: Tensor = self.weight**0.5 * flat.double()
        return weighted.movedim(0, 2)


@dataclass(frozen=True)
class _Block:
    """What the inner products of some columns with others need.

    Attributes:
        columns: Which columns of U they are, here without the root of the weight.
        weight: That of a point.
        inputs: Name of a layer -> inputs a, ``(groups, n, positions, inputs)``, or tokens.
        outputs: Name of a layer -> gradients b, ``(groups, n, c, positions, outputs)``.
        rows: The columns by all other parameters, ``(n c, P_rows)``.
    """

    columns: slice
    weight: float
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    rows: Tensor


class SampleSpace:
    r"""The columns of U with :math:`A = U U^\top = \frac1N \sum_i J_i^\top S_i S_i^\top J_i`.

    For point i of a batch b, whose weight is :math:`w_b / (n_b \sum_b w_b)`, the columns of U are
    those of :math:`J_i^\top S_i` times the root of the weight. None of them is kept: products are
    passes over the data, one :math:`Jv` or one :math:`J^\top u` each. The order of the columns is
    that of the points in a pass; those of a point follow one another.

    The Gram matrix is computed layer by layer where a layer applies a matrix and it costs less:
    the gradients of points i and j by its parameters are :math:`\sum_t b_{it} a_{it}^\top`, with
    inner product :math:`\sum_{ts} (a_{it}^\top a_{js}) (b_{it}^\top b_{js})` (Goodfellow 2015;
    Novak et al. 2022). By other parameters the columns themselves are made, for some points at a
    time.

    Args:
        objective: Model and loss.
        data: The batches, the same in the same order in every pass.
        first_pass: One pass over them.
        weight: From the number of points of a batch to w.
        root_of: S, such as `hessops.functional.roots.hessian_root`.
        most_columns: Refuse more.

    Attributes:
        size: m, the number of columns.
        num_points: N.
        num_batches: The batches that they come in.

    Raises:
        StructureError: There are more columns, or `root_of` finds no root.
        MemoryLimitError: From `root_of`.
        DataError: All weights are zero.

    Example:
        >>> import torch
        >>> from hessops import BatchStream, Objective
        >>> from hessops.functional.roots import gradient_root
        >>> from hessops.functional.sample_space import SampleSpace
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # gradients (2, 0) and (0, 2)
        >>> stream = BatchStream([(x, torch.zeros(2, 1))])
        >>> objective = Objective(model, torch.nn.MSELoss())
        >>> U = SampleSpace(objective, stream, stream, float, gradient_root, most_columns=10)
        >>> U.gram()
        tensor([[2., 0.],
                [0., 2.]], dtype=torch.float64)
        >>> U.expand(U.project(torch.ones(1, 2)))  # A times (1, 1)
        tensor([[2., 2.]])
    """

    def __init__(
        self,
        objective: Objective,
        data: Iterable[Batch],
        first_pass: Iterable[Batch],
        weight: Callable[[int], float],
        root_of: RootOf,
        most_columns: int,
    ) -> None:
        self._objective, self._data, self._root_of = objective, data, root_of
        self._matrices = MatrixLayers(objective)
        self._gradient_of = StackedGradient()
        parts, self.size, self.num_points = [], 0, 0
        for batch in first_pass:
            with self._differentiating():
                parts.append(self._surveyed(batch))
            self.size += parts[-1].count
            self.num_points += batch.size
            if self.size > most_columns:
                raise StructureError(
                    f"it is U Uᵀ with more than {most_columns} columns, which must be fewer than "
                    f"the {objective.space.size} parameters, and their Gram matrix fit into memory"
                )
        self.num_batches = len(parts)
        weights = [float(weight(part.size)) for part in parts]
        total = sum(weights)
        if not total > 0:
            raise DataError("there is nothing to average: no batches, or all of weight zero")
        self._parts = [
            replace(part, weight=w / (total * part.size))
            for part, w in zip(parts, weights, strict=True)
        ]

    def _differentiating(self) -> AbstractContextManager[None]:
        return self._objective.differentiating("the Gram matrix of a Gauss-Newton matrix")

    def _surveyed(self, batch: Batch) -> PartColumns:
        """The columns of a batch, not yet weighted, and what its layers look like."""
        matrices = self._matrices
        try:
            run = CapturedRun(self._objective, batch, matrices.modules)
        except ModelError:  # a layer that cannot be followed is no matrix, and no obstacle
            matrices.remove(list(matrices.layers))
            run = CapturedRun(self._objective, batch, {})
        dims = matrices.dims(Probe.of(run, batch)) if matrices.layers else {}
        positions = {}
        for name in dims:
            groups, outputs, _ = matrices.layers[name].form.shape
            numbers = sum(call.output.numel() for call in run.calls.get(name, []) if call)
            positions[name] = numbers // (batch.size * groups * outputs)
        root = self._root_of(self._objective, run.output, batch)
        return PartColumns(batch.size, root, 1.0, dims, positions)

    # --- what it costs -------------------------------------------------------------------

    @property
    def _layers(self) -> dict[str, MatrixLayer]:
        """The layers that are matrices on every batch."""
        return self._matrices.layers

    @cached_property
    def _ghosts(self) -> dict[str, MatrixLayer]:
        """The layers whose inner products cost less by inputs and outputs than by gradients."""
        c = max(part.root.count for part in self._parts)
        cheap = {}
        for name, layer in self._layers.items():
            t = max(part.positions[name] for part in self._parts)
            if t**2 * _ghost_operations(layer, c) < c**2 * layer.form.space.size:
                cheap[name] = layer
        return cheap

    @property
    def _row_layers(self) -> dict[str, MatrixLayer]:
        return {name: self._layers[name] for name in self._layers if name not in self._ghosts}

    @property
    def _others(self) -> list[str]:
        """The parameters that belong to no layer."""
        known = {name for layer in self._layers.values() for name in layer.form.space.names}
        return [name for name in self._objective.space.names if name not in known]

    @property
    def _row_size(self) -> int:
        shapes = self._objective.space.shapes
        of_layers = sum(layer.form.space.size for layer in self._row_layers.values())
        return of_layers + sum(shapes[name].numel() for name in self._others)

    @property
    def gram_operations(self) -> float:
        """Multiplications for the lower half of the Gram matrix."""
        total = self.size**2 * self._row_size
        for name, layer in self._ghosts.items():
            groups, outputs, _ = layer.form.shape
            inputs = sum(part.size * part.positions[name] for part in self._parts)
            columns = sum(part.count * part.positions[name] for part in self._parts)
            total += groups * (inputs**2 * _input_width(layer) + columns**2 * (outputs + 1))
        return total / 2

    @property
    def gradient_operations(self) -> float:
        """Multiplications for one gradient over the data, at least: one forward, two backward."""
        shapes = self._objective.space.shapes
        others = sum(shapes[name].numel() for name in self._others)
        forward = self.num_points * others
        for name, layer in self._layers.items():
            positions = sum(part.size * part.positions[name] for part in self._parts)
            forward += positions * layer.form.space.size
        return 3.0 * forward

    # --- products ------------------------------------------------------------------------

    def _pass(self) -> Iterator[tuple[Batch, PartColumns]]:
        """One pass over the data, with the columns of each batch."""
        # Not strict: a stream counts its points, and raises what there is to say.
        for batch, part in zip(self._data, self._parts, strict=False):
            if batch.size != part.size:
                raise DataChangedError(
                    f"batch {batch.position} has {batch.size} points, and {part.size} in the pass "
                    "that the Gram matrix was made of; pass data in a fixed order, or cache=True"
                )
            yield batch, part

    def project(self, rows: Tensor) -> Tensor:
        """Rows ``(k, P)`` times U, ``(k, m)`` in float64."""
        pieces = []
        for batch, part in self._pass():
            with self._differentiating():
                pieces.append(self._in_chunks(rows, partial(self._projection, batch, part)))
        return torch.cat(pieces, dim=1)

    def expand(self, coefficients: Tensor) -> Tensor:
        """Rows ``(k, m)`` in float64 times Uᵀ, ``(k, P)``; half precision is summed in float32."""
        space = self._objective.space
        dtype = accumulation_dtype(space.dtype)
        total = torch.zeros(len(coefficients), space.size, dtype=dtype, device=space.device)
        start = 0
        for batch, part in self._pass():
            some = coefficients[:, start : start + part.count]
            start += part.count
            with self._differentiating():
                total += self._in_chunks(some, partial(self._expansion, batch, part))
        return total

    def _in_chunks(self, rows: Tensor, traversal: Callable[[], RowsMap]) -> Tensor:
        """The map that a traversal of the model yields, for as many rows at once as fit."""
        retained = RetainedBytes()
        with retained.counting():
            product = traversal()
        size = retained.size
        chunk = columns_that_fit(self._objective.space, size.num_bytes, size.num_tensors)
        return torch.cat([product(some) for some in torch.split(rows, chunk)])

    def _projection(self, batch: Batch, part: PartColumns) -> RowsMap:
        push = LinearizedOutputs(self._objective, batch, self._gradient_of).jacobian.push
        weights = part.flat_weights()  # (n, outputs, c)

        def project(rows: Tensor) -> Tensor:
            stack = self._objective.space.unflatten(rows)
            pushed = [p.reshape(len(p), part.size, -1) for p in push(stack)]
            along = torch.cat(pushed, dim=2).movedim(1, 0).double()  # (n, k, outputs)
            return (along @ weights).movedim(0, 1).flatten(1)

        return project

    def _expansion(self, batch: Batch, part: PartColumns) -> RowsMap:
        outputs = LinearizedOutputs(self._objective, batch, self._gradient_of)
        weights = part.flat_weights().mT  # (n, c, outputs)
        sizes = [shape[1:].numel() for shape in part.root.shapes]

        def expand(coefficients: Tensor) -> Tensor:
            count = len(coefficients)
            by_point = coefficients.reshape(count, part.size, -1).movedim(1, 0)  # (n, k, c)
            flat = (by_point @ weights).movedim(0, 1)
            pieces = zip(torch.split(flat, sizes, dim=2), outputs.gradients, strict=True)
            pulled = outputs.jacobian.pull([p.to(g).reshape(count, *g.shape) for p, g in pieces])
            return self._objective.space.flatten(pulled)

        return expand

    # --- the Gram matrix -----------------------------------------------------------------

    def gram(self) -> Tensor:
        r""":math:`U^\top U`, ``(m, m)`` in float64.

        Blocks of columns are held as many at a time as fit, and meet all later ones in one pass
        over the data.
        """
        device = self._objective.device
        total = torch.zeros(self.size, self.size, dtype=torch.float64, device=device)
        plan = self._plan()
        first = 0
        while first < len(plan):
            last = self._end_of_panel(plan, first)
            panel: list[_Block] = []
            for number, block in enumerate(self._blocks(plan, first), start=first):
                if number < last:
                    panel.append(block)
                for other in panel:
                    products = self._products(block, other)
                    total[block.columns, other.columns] = products
                    if other is not block:
                        total[other.columns, block.columns] = products.T
            first = last
        return total

    def _plan(self) -> list[tuple[int, slice]]:
        """The blocks: the number of a batch, and some of its points."""
        plan = []
        for number, part in enumerate(self._parts):
            some = max(1, BLOCK_BYTES // self._bytes_of_point(part))
            if part.count:
                plan += [(number, slice(*ends)) for ends in _ranges(part.size, some)]
        return plan

    def _bytes_of_point(self, part: PartColumns) -> int:
        c, numbers = part.root.count, part.root.count * self._row_size
        for name, layer in self._layers.items():
            groups, outputs, _ = layer.form.shape
            width = _input_width(layer) + PASS_FACTOR * c * outputs
            numbers += part.positions[name] * groups * width
        return max(1, numbers * self._objective.space.dtype.itemsize)

    def _end_of_panel(self, plan: Sequence[tuple[int, slice]], first: int) -> int:
        """The end of the blocks that are held together, at least one."""
        held, last = 0, first
        while last < len(plan):
            number, points = plan[last]
            part = self._parts[number]
            held += len(range(part.size)[points]) * self._bytes_of_point(part)
            if held > BLOCK_BYTES and last > first:
                break
            last += 1
        return last

    def _blocks(self, plan: Sequence[tuple[int, slice]], first: int) -> Iterator[_Block]:
        """The blocks from number `first` on, in one pass over the data."""
        wanted: dict[int, list[slice]] = {}
        for number, points in plan[first:]:
            wanted.setdefault(number, []).append(points)
        starts = [0]
        for part in self._parts:
            starts.append(starts[-1] + part.count)
        for number, (batch, part) in enumerate(self._pass()):
            for points in wanted.get(number, []):
                with self._differentiating():
                    block = self._block(batch, part, points, starts[number])
                yield block

    def _block(self, batch: Batch, part: PartColumns, points: slice, start: int) -> _Block:
        size, count = len(range(part.size)[points]), part.root.count
        some, weights = batch.rows(points, size), part.weights(points)
        run = CapturedRun(self._objective, some, self._matrices.modules)
        gradients = run.gradients(weights, self._gradient_of)
        inputs = self._matrices.inputs(run, some, part.dims)
        outputs = {
            name: rows.movedim(1, 2)
            for name, rows in self._matrices.outputs(gradients, some, part.dims).items()
        }
        rows = [
            self._rows_of_layer(layer, inputs.get(name), outputs.get(name), size, count)
            for name, layer in self._row_layers.items()
        ]
        if self._others:
            rows.append(self._rows_of_others(run, some, weights))
        space, ghosts = self._objective.space, self._ghosts
        nothing = torch.zeros(size * count, 0, dtype=space.dtype, device=space.device)
        first = start + points.start * count
        return _Block(
            columns=slice(first, first + size * count),
            weight=part.weight,
            inputs={name: a for name, a in inputs.items() if name in ghosts},
            outputs={name: b for name, b in outputs.items() if name in ghosts},
            rows=torch.cat([nothing, *rows], dim=1),
        )

    def _rows_of_layer(
        self, layer: MatrixLayer, a: Tensor | None, b: Tensor | None, size: int, count: int
    ) -> Tensor:
        """The columns by the parameters of a layer, ``(n c, P_layer)``."""
        space = layer.form.space
        if a is None or b is None:
            return torch.zeros(size * count, space.size, dtype=space.dtype, device=space.device)
        by_column = [
            layer.form.rows(layer.point_gradients(a, b[:, :, c].unsqueeze(1))) for c in range(count)
        ]
        return torch.stack(by_column, dim=1).flatten(0, 1)

    def _rows_of_others(self, run: CapturedRun, batch: Batch, weights: list[Tensor]) -> Tensor:
        """The columns by the parameters of no layer, ``(n c, P_others)``, by backward passes."""
        pieces = []
        for start, stop in _ranges(batch.size, UNIT_POINTS):
            points, size = slice(start, stop), stop - start
            few = run if size == batch.size else self._run_without_layers(batch.rows(points, size))
            leaves = [few.leaves[name] for name in self._others]
            units = [_units(s[:, points]).to(p) for s, p in zip(weights, few.parts, strict=True)]
            for first in range(0, len(units[0]), UNIT_ROWS):
                some = [u[first : first + UNIT_ROWS] for u in units]
                gradients = self._gradient_of(few.parts, leaves, some)
                pieces.append(torch.cat([g.flatten(1) for g in gradients], dim=1))
        return torch.cat(pieces)

    def _run_without_layers(self, batch: Batch) -> CapturedRun:
        return CapturedRun(self._objective, batch, {})

    def _products(self, left: _Block, right: _Block) -> Tensor:
        """The inner products of the columns of two blocks, in float64."""
        total = _row_products(left.rows, right.rows)
        for name, layer in self._ghosts.items():
            if name in left.outputs and name in right.outputs:
                _add_ghost_products(total, layer, name, left, right)
        return total.mul_((left.weight * right.weight) ** 0.5)


def _units(columns: Tensor) -> Tensor:
    """From ``(c, n, ...)`` to weights ``(n c, n, ...)`` with a single point and column in each."""
    count, size = columns.shape[:2]
    units = columns.new_zeros(size, count, *columns.shape[1:])
    for point in range(size):
        units[point, :, point] = columns[:, point]
    return units.flatten(0, 1)


def _row_products(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of rows in float64, of which a part at a time is a copy."""
    total = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    width = max(1, TILE_BYTES // (8 * max(len(left), len(right), 1)))
    for start in range(0, left.shape[1], width):
        some = slice(start, start + width)
        total.addmm_(left[:, some].double(), right[:, some].double().T)
    return total


def _add_ghost_products(
    total: Tensor, layer: MatrixLayer, name: str, left: _Block, right: _Block
) -> None:
    """Adds the inner products by one layer, in tiles of points that fit."""
    b, d = left.outputs[name], right.outputs[name]
    groups, left_size, left_count, left_positions = b.shape[:4]
    _, right_size, right_count, right_positions = d.shape[:4]
    each = 8 * groups * left_count * left_positions * right_count * right_positions
    many = max(1, min(right_size, TILE_BYTES // each))
    few = max(1, TILE_BYTES // (each * many))
    for start, stop in _ranges(left_size, few):
        for first, last in _ranges(right_size, many):
            by_outputs = b[:, start:stop].double().flatten(1, 3) @ (
                d[:, first:last].double().flatten(1, 3).mT
            )
            shape = (stop - start, left_count, left_positions)
            others = (last - first, right_count, right_positions)
            by_inputs = _input_products(
                layer, left.inputs[name], slice(start, stop), right.inputs[name], slice(first, last)
            ).reshape(groups, shape[0], 1, shape[2], others[0], 1, others[2])
            products = by_outputs.reshape(groups, *shape, *others) * by_inputs
            rows = slice(start * left_count, stop * left_count)
            columns = slice(first * right_count, last * right_count)
            summed = products.sum(dim=(0, 3, 6)).flatten(2, 3).flatten(0, 1)
            total[rows, columns] += summed


def _input_products(
    layer: MatrixLayer, left: Tensor, rows: slice, right: Tensor, columns: slice
) -> Tensor:
    """Those of the inputs at all positions, ``(groups, n t, m s)``; of tokens, whether equal."""
    if isinstance(layer, EmbeddingLayer):
        tokens, others = left[rows].flatten(), right[columns].flatten()
        # Of padding, which is -1, nothing is known.
        equal = (tokens.unsqueeze(1) == others) & (tokens >= 0).unsqueeze(1)
        return equal.double().unsqueeze(0)
    a, other = left[:, rows].double().flatten(1, 2), right[:, columns].double().flatten(1, 2)
    return a @ other.mT


def _ranges(size: int, step: int) -> Iterator[tuple[int, int]]:
    return pairwise([*range(0, size, step), size])


def _ghost_operations(layer: MatrixLayer, count: int) -> int:
    """Multiplications for two positions of two points, with `count` columns each."""
    groups, outputs, _ = layer.form.shape
    return groups * (_input_width(layer) + count**2 * (outputs + 1))


def _input_width(layer: MatrixLayer) -> int:
    """The numbers that an input is at one position: a token is one."""
    return 1 if isinstance(layer, EmbeddingLayer) else layer.form.shape[2]
