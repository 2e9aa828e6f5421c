"""GradientProvider: derivatives of the points' losses at fixed parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from hessops.copies import Copyable
from hessops.errors import ArgumentTypeError, DtypeError, NonFiniteProductError, ShapeError
from hessops.functional.columns import columns_that_fit
from hessops.functional.gradients import (
    PerSampleGradients,
    mixed_derivatives,
    vectorised_or_looped,
)
from hessops.functional.layerwise import MatrixLayers, PointGradients
from hessops.functional.memory import RetainedBytes
from hessops.functional.outputs import LinearizedOutputs
from hessops.functional.products import (
    Stack,
    StackedGradient,
    differentiable,
    gradient_with_graph,
)
from hessops.functional.seen import BatchMemory, SeenBatches
from hessops.isolation import isolated
from hessops.nested import tensor_leaves
from hessops.objective import Objective
from hessops.printed import Node, Printed
from hessops.space import ParameterSpace
from hessops.streaming import Batch
from hessops.validation import checked_rows, is_finite

# What products by Jacobians and by gradients of points move, in units of the bytes that the graph
# retains, and of those of the gradients. For 16 factors and 256 points on one core, products took
# 26 gradients of the loss on a small transformer, 18 on a small convolutional net and 9 on a
# perceptron of 670k parameters; the gradients of points took 5, 7 and 180.
JACOBIAN_MOVES, GRADIENT_MOVES, ROW_MOVES = 4, 12, 10


class GradientProvider(Copyable, Printed):
    r"""Derivatives of :math:`\ell_i(\theta)`, the loss on each point alone, at the objective's θ.

    Every batch is checked when it is first seen; see `Objective.check`. Flat vectors are in the
    order of `space`. Nothing that is returned carries a graph.

    Args:
        objective: A model and a loss; see `Objective`.

    Raises:
        ArgumentTypeError: `objective` is something else.

    Example:
        >>> import torch
        >>> from hessops import Objective
        >>> from hessops.influence import GradientProvider
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> provider = GradientProvider(Objective(model, torch.nn.MSELoss()))
        >>> x, y = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
        >>> provider.flat_grads(x, y)  # of (w x)^2: 2 w x^2
        tensor([[ 2.],
                [18.]])
        >>> provider.jacobian_prod(x, y, torch.tensor([[0.5]]))
        tensor([[1., 9.]])
        >>> provider.mixed_jacobian_prod(x, y, torch.tensor([[0.5]])).shape
        torch.Size([1, 2, 1])
    """

    def __init__(self, objective: Objective) -> None:
        if not isinstance(objective, Objective):
            raise ArgumentTypeError(
                f"objective must be an Objective, got {type(objective).__name__}"
            )
        self.objective = objective
        self._per_sample = PerSampleGradients()
        self._stacked_gradient = StackedGradient()
        self._matrices = MatrixLayers(objective)
        self._seen = SeenBatches()
        self._moved: BatchMemory[Batch] = BatchMemory()

    def _node(self) -> Node:
        return Node("GradientProvider()", parts=[self.objective])

    @property
    def space(self) -> ParameterSpace:
        """The parameters to differentiate by."""
        return self.objective.space

    def to(self, device: torch.device | str) -> GradientProvider:
        """The same provider on another device."""
        return GradientProvider(self.objective.to(device))

    # --- batches -------------------------------------------------------------------------

    def batch(self, x: object, y: object) -> Batch:
        """Inputs and targets as a batch on the model's device, checked when it is new.

        Raises:
            HessopsError: See `Objective.check`.
        """
        batch = Batch.from_raw((x, y))
        moved = self._moved.get(batch)
        if moved is not None:
            return moved
        moved = batch.to(self.space.device)
        if not self._seen.holds(batch):
            self.check(moved)
            self._seen.add(batch)
        if all(t.device == self.space.device for t in tensor_leaves((batch.x, batch.y))):
            # The same tensors for the same points, so that what is known of them is found again;
            # they share their memory. Copies on another device would take some.
            self._moved.keep(batch, moved)
        return moved

    def check(self, batch: Batch) -> None:
        """See `Objective.check`."""
        with isolated(self.space.device):
            self.objective.check(batch)

    # --- per-sample gradients ------------------------------------------------------------

    def grads(self, x: object, y: object) -> Stack:
        r""":math:`\nabla_\theta \ell_i`, ``{name: (n, *shape)}``.

        Args:
            x: Inputs of n points, as the model takes them.
            y: Their targets.

        Raises:
            HessopsError: See `Objective.check`.
            NonFiniteProductError: NaN or infinity in a gradient.
        """
        return self.space.unflatten(self.flat_grads(x, y))

    def flat_grads(self, x: object, y: object) -> Tensor:
        """As `grads`, ``(n, P)``."""
        return self.rows(self.batch(x, y))

    def rows(self, batch: Batch) -> Tensor:
        """As `flat_grads`, of a batch that was checked.

        Raises:
            ModelError: The gradients do not add up to that of the batch.
        """
        with self._state("the points' gradients"):
            found = PointGradients.of(self._matrices, batch)
            if not found.layers:
                return finite(self._per_sample.verified(self.objective, batch))
            parts: Stack = {}
            for name, layer in found.layers.items():
                parts |= layer.form.space.unflatten(found.rows(name))
            others = self._others(found)
            if others:
                parts |= self.rows_by(batch, others)
            return finite(self.space.flatten(parts))

    def by_layer(self, batch: Batch) -> PointGradients:
        """The gradients by the layers that apply a matrix, as their factors.

        Args:
            batch: n points that were checked.
        """
        with self._state("the points' gradients"):
            return PointGradients.of(self._matrices, batch)

    def rows_by(self, batch: Batch, names: Iterable[str]) -> Stack:
        """As `rows`, by some of the parameters only, ``{name: (n, *shape)}``.

        Raises:
            ParameterNameError: A name that is not in `space`, or none.
            ModelError: As of `rows`.
        """
        fewer = self.objective.restricted(names)
        with self._state("the points' gradients"):
            return fewer.space.unflatten(finite(self._per_sample.verified(fewer, batch)))

    def _others(self, found: PointGradients) -> list[str]:
        """The parameters that no layer is known to apply as a matrix."""
        covered = {name for layer in found.layers.values() for name in layer.form.space.names}
        return [name for name in self.space.names if name not in covered]

    def mixed_grads(self, x: Tensor, y: object) -> Stack:
        r""":math:`\nabla_x \nabla_\theta \ell_i`, ``{name: (n, *x.shape[1:], *shape)}``.

        As many numbers as inputs times parameters; `mixed_jacobian_prod` needs none of them.

        Raises:
            ArgumentTypeError: `x` is not a floating-point tensor.
            HessopsError: As of `grads`.
        """
        require_floating(x)
        batch = self.batch(x, y)
        with self._state("the points' mixed derivatives", any_order=True):
            mixed = vectorised_or_looped(
                lambda vectorize: mixed_derivatives(
                    self.objective, self.objective.params, batch, vectorize=vectorize
                )
            )
            return {name: finite(mixed[name].detach()) for name in self.space.names}

    def flat_mixed_grads(self, x: Tensor, y: object) -> Tensor:
        """As `mixed_grads`, ``(n, *x.shape[1:], P)``."""
        mixed = self.mixed_grads(x, y)
        lead = x.shape
        return torch.cat([mixed[name].reshape(*lead, -1) for name in self.space.names], dim=-1)

    # --- products ------------------------------------------------------------------------

    def jacobian_prod(self, x: object, y: object, g: Tensor) -> Tensor:
        r"""Entry (j, i) is :math:`\langle G_j, \nabla_\theta \ell_i\rangle`, ``(m, n)``.

        For layers that apply a matrix M, from their inputs a and the gradients b by their outputs
        alone: :math:`b_i^\top M_j a_i` at every position. For other parameters without per-sample
        gradients too: with :math:`J_i` the Jacobian of the output of point i and :math:`r_i` the
        gradient of its loss by that, it is :math:`\langle J_i G_j, r_i\rangle`, and products with J
        are two backward passes.

        Args:
            x: Inputs of n points.
            y: Their targets.
            g: G, ``(m, P)`` of the parameters' dtype.

        Raises:
            ShapeError, DtypeError, NonFiniteError: `g` does not fit.
            HessopsError: As of `grads`.
        """
        return self.products(self.batch(x, y), self._checked_factors(g))

    def products(self, batch: Batch, g: Tensor) -> Tensor:
        """As `jacobian_prod`, of what was checked."""
        (product,) = self.block_products(batch, g, [self.space]).values()
        return product

    def block_products(
        self, batch: Batch, g: Tensor, blocks: Iterable[ParameterSpace]
    ) -> dict[tuple[str, ...], Tensor]:
        """As `products`, by blocks of parameters: names of the block -> ``(m, n)``."""
        blocks = list(blocks)
        with self._state(_Scores.what):
            found = PointGradients.of(self._matrices, batch)
        if not found.layers or len(g) == 0:
            return self._by_block(batch, g, blocks, _Scores)
        stack = self.space.unflatten(g)
        by_others = self._products_of_others(batch, stack, blocks, self._others(found))
        results = {}
        for block in blocks:
            total = by_others.get(block.names, g.new_zeros(len(g), batch.size))
            for name, layer in found.layers.items():
                parts = {key: stack[key] for key in layer.form.space.names if key in block.shapes}
                if parts:
                    total = total + found.products(name, parts)
            results[block.names] = finite(total)
        return results

    def _products_of_others(
        self, batch: Batch, stack: Stack, blocks: Iterable[ParameterSpace], others: Iterable[str]
    ) -> dict[tuple[str, ...], Tensor]:
        """The share of some parameters in `block_products`, of the blocks that have some."""
        names = {
            block.names: [key for key in block.names if key in set(others)] for block in blocks
        }
        spaces = {block: self.space.subspace(rest) for block, rest in names.items() if rest}
        if not spaces:
            return {}
        products = self.products_of(batch, stack, spaces.values())
        return {block: products[space.names] for block, space in spaces.items()}

    def no_scores(self, g: Tensor, batch: Batch, by_input: bool) -> Tensor:
        """As `products`, or as `mixed_products`, of a batch of no points."""
        if not by_input:
            return g.new_zeros(len(g), 0)
        x = require_floating(batch.x)
        return torch.zeros(len(g), *x.shape, dtype=x.dtype, device=g.device)

    def mixed_jacobian_prod(self, x: Tensor, y: object, g: Tensor) -> Tensor:
        r"""Entry (j, i) is :math:`\nabla_x \langle G_j, \nabla_\theta \ell_i\rangle`.

        One backward pass through the gradient for each row of G, for all points at once.

        Args:
            x: Inputs of n points, a floating-point tensor.
            y: Their targets.
            g: G, ``(m, P)`` of the parameters' dtype.

        Returns:
            ``(m, n, *x.shape[1:])``, of the dtype of x.

        Raises:
            ArgumentTypeError: `x` is not a floating-point tensor.
            ShapeError, DtypeError, NonFiniteError: `g` does not fit.
            HessopsError: As of `grads`.
        """
        require_floating(x)
        return self.mixed_products(self.batch(x, y), self._checked_factors(g))

    def mixed_products(self, batch: Batch, g: Tensor) -> Tensor:
        """As `mixed_jacobian_prod`, of what was checked."""
        (product,) = self.block_mixed_products(batch, g, [self.space]).values()
        return product

    def block_mixed_products(
        self, batch: Batch, g: Tensor, blocks: Iterable[ParameterSpace]
    ) -> dict[tuple[str, ...], Tensor]:
        """As `mixed_products`, by blocks of parameters: names -> ``(m, n, *x.shape[1:])``."""
        return self._by_block(batch, g, blocks, _MixedScores)

    def _by_block(
        self,
        batch: Batch,
        g: Tensor,
        blocks: Iterable[ParameterSpace],
        kind: type[_Scores] | type[_MixedScores],
    ) -> dict[tuple[str, ...], Tensor]:
        return self._stacked_by_block(batch, self.space.unflatten(g), blocks, kind)

    def products_of(
        self, batch: Batch, stack: Stack, blocks: Iterable[ParameterSpace]
    ) -> dict[tuple[str, ...], Tensor]:
        """As `block_products`, by differentiation of the whole model for some parameters only.

        By products with its Jacobian, two backward passes for each factor, or with the gradients of
        the points by these parameters, some points at a time: whichever moves fewer bytes.

        Args:
            batch: n points that were checked.
            stack: ``{name: (m, *shape)}``, of the parameters in `blocks`.
            blocks: Blocks of parameters.
        """
        return self._stacked_by_block(batch, stack, blocks, _Scores)

    def _stacked_by_block(
        self,
        batch: Batch,
        stack: Stack,
        blocks: Iterable[ParameterSpace],
        kind: type[_Scores] | type[_MixedScores],
    ) -> dict[tuple[str, ...], Tensor]:
        blocks, retained = list(blocks), RetainedBytes()
        with self._state(kind.what):
            with retained.counting():
                scores = kind(self.objective, batch, self._stacked_gradient)
            if kind is _Scores and self._prefers_rows(batch, stack, blocks, retained.total):
                return self._products_by_rows(batch, stack, blocks)
            return self._products_in_chunks(scores, stack, blocks, retained.total)

    def _products_in_chunks(
        self,
        scores: _Scores | _MixedScores,
        stack: Stack,
        blocks: Iterable[ParameterSpace],
        retained_bytes: int,
    ) -> dict[tuple[str, ...], Tensor]:
        chunk = columns_that_fit(self.space, retained_bytes)
        count, results = len(next(iter(stack.values()))), {}
        for block in blocks:
            part = {name: stack[name] for name in block.names}
            pieces = [
                scores({name: t[start : start + chunk] for name, t in part.items()})
                for start in range(0, count, chunk)
            ]
            results[block.names] = finite(torch.cat(pieces) if pieces else scores.empty())
        return results

    def _prefers_rows(
        self, batch: Batch, stack: Stack, blocks: list[ParameterSpace], retained_bytes: int
    ) -> bool:
        """Whether gradients of points by the parameters of blocks take less than Jacobian products.

        In bytes: a product moves what the graph retains `JACOBIAN_MOVES` times; the gradients move
        it `GRADIENT_MOVES` times, and themselves `ROW_MOVES` times.
        """
        count = len(next(iter(stack.values())))
        names = {name for block in blocks for name in block.names}
        entries = sum(self.space.shapes[name].numel() for name in names)
        row_bytes = batch.size * entries * self.space.dtype.itemsize
        by_products = JACOBIAN_MOVES * count * len(blocks) * retained_bytes
        return by_products > GRADIENT_MOVES * retained_bytes + ROW_MOVES * row_bytes

    def _products_by_rows(
        self, batch: Batch, stack: Stack, blocks: Iterable[ParameterSpace]
    ) -> dict[tuple[str, ...], Tensor]:
        fewer = self.objective.restricted({name for block in blocks for name in block.names})
        space = fewer.space
        factors = []
        for block in blocks:
            names = [name for name in space.names if name in block.shapes]
            factors.append((block.names, space.indices(names), _flat(stack, names)))

        def images(rows: Tensor) -> Tensor:
            parts = [rows[:, where] @ flat.T for _, where, flat in factors]
            return torch.stack(parts, dim=1)

        products = finite(self._per_sample.images(fewer, batch, images))
        return {names: products[:, i].T for i, (names, _, _) in enumerate(factors)}

    def _checked_factors(self, g: Tensor) -> Tensor:
        return checked_factors(g, self.space, "g")

    @contextmanager
    def _state(self, what: str, *, any_order: bool = False) -> Iterator[None]:
        with (
            isolated(self.space.device),
            self.objective.differentiating(what, any_order=any_order),
        ):
            yield


def _flat(stack: Stack, names: Iterable[str]) -> Tensor:
    """Some parts of a stack in a row for each vector, ``(k, ...)``."""
    return torch.cat([stack[name].flatten(1) for name in names], dim=1)


class _Scores:
    """⟨f, ∇ℓᵢ⟩ = ⟨Jᵢ f, rᵢ⟩ for stacks of f, which may leave out parameters."""

    what = "the points' gradients"

    def __init__(self, objective: Objective, batch: Batch, gradient: StackedGradient) -> None:
        self._outputs = LinearizedOutputs(objective, batch, gradient)
        self._size, self._dtype = batch.size, objective.space.dtype

    def __call__(self, stack: Stack) -> Tensor:
        # The mean loss has r_i / n as its gradient by output i.
        along = self._outputs.along_gradients(self._outputs.jacobian.push(stack))
        return (self._size * along).to(self._dtype)

    def empty(self) -> Tensor:
        return self._outputs.gradients[0].new_zeros(0, self._size, dtype=self._dtype)


class _MixedScores:
    """∇ₓ⟨f, ∇ℓᵢ⟩ for stacks of f, which may leave out parameters."""

    what = "the points' mixed derivatives"

    def __init__(self, objective: Objective, batch: Batch, gradient: StackedGradient) -> None:
        leaves = differentiable(objective.params)
        self._x = require_floating(batch.x).detach().requires_grad_()
        with torch.enable_grad():
            output = objective.output(leaves, self._x)
            # Row i of x has a share in the loss of point i only: one sum serves all points.
            total = batch.size * objective.output_loss(output, batch)
            gradients = gradient_with_graph([total], None, list(leaves.values()))
        self._gradients = dict(zip(leaves, gradients, strict=True))
        self._gradient_of = gradient

    def __call__(self, stack: Stack) -> Tensor:
        outputs = [self._gradients[name] for name in stack]
        (mixed,) = self._gradient_of(outputs, [self._x], list(stack.values()))
        return mixed

    def empty(self) -> Tensor:
        return self._x.detach().new_zeros(0, *self._x.shape)


def checked_factors(factors: object, space: ParameterSpace, name: str) -> Tensor:
    """Flat factors ``(m, P)`` on the device of the space, also from a dictionary of stacks.

    Raises:
        ShapeError: Not a stack of vectors of the space.
        DtypeError, NonFiniteError, ParameterNameError: As their names say.
    """
    if isinstance(factors, Mapping):
        factors = space.flatten(factors)
    if isinstance(factors, Tensor) and factors.ndim == 1:
        raise ShapeError(
            f"{name} has shape {tuple(factors.shape)}, expected (m, {space.size}); "
            "one vector is unsqueeze(0)"
        )
    return checked_rows(factors, space.size, space.dtype, space.device, name)


def require_floating(x: object) -> Tensor:
    """An input that can be perturbed.

    Raises:
        ArgumentTypeError: Not a tensor.
        DtypeError: Not real floating point.
    """
    if not isinstance(x, Tensor):
        raise ArgumentTypeError(
            f"x must be a floating-point tensor to be perturbed, got {type(x).__name__}"
        )
    if not x.is_floating_point():
        raise DtypeError(f"x is {x.dtype}; only a floating-point input can be perturbed")
    return x


def finite(result: Tensor) -> Tensor:
    """A result itself.

    Raises:
        NonFiniteProductError: It holds NaN or infinity.
    """
    if not is_finite(result):
        raise NonFiniteProductError(
            "a derivative of a point's loss is NaN or infinite; check the scale of parameters and "
            f"data, or use a wider dtype than {result.dtype}"
        )
    return result
