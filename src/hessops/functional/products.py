"""Products with Hessians and Jacobians of pure functions, in reverse mode.

The engine of the library. A function is traversed forward and backward once; what comes back is a
*linear function of stacks*: dictionaries or lists of tensors with a leading dimension k, one entry
per vector. Reverse mode was right on every model tried; forward mode is offered only where a caller
asks for it and is checked against reverse mode by whoever offers it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Params = Mapping[str, Tensor]
Stack = dict[str, Tensor]
LinearFunction = Callable[[Stack], Stack]


@dataclass
class StackedGradient:
    """`torch.autograd.grad` for stacks of output gradients: k backward passes over one graph.

    The passes run vectorised where every kernel allows it. Some have no batching rule
    (`GroupNorm`); from the first refusal on they run one after the other.

    Attributes:
        vectorize: Whether several passes are tried at once.
        create_graph: Whether the results can be differentiated again.

    Example:
        >>> import torch
        >>> from hessops.functional import StackedGradient
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> StackedGradient()([x**2], [x], [torch.eye(2)])
        [tensor([[2., 0.],
                [0., 4.]])]
    """

    vectorize: bool = True
    create_graph: bool = False

    def __call__(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> list[Tensor]:
        """Σ over outputs of ∂(output · weight)/∂input, for each row of the weights.

        Args:
            outputs: Tensors with a graph, or without one: those contribute zero.
            inputs: Tensors to differentiate by.
            weights: One tensor ``(k, *output.shape)`` per output.

        Returns:
            One tensor ``(k, *input.shape)`` per input; zero where nothing depends on it. The graph
            is retained.
        """
        num_rows = len(weights[0])
        graphs = [
            (out, weight) for out, weight in zip(outputs, weights, strict=True) if out.requires_grad
        ]
        if not graphs or num_rows == 0:
            return [t.new_zeros((num_rows, *t.shape)) for t in inputs]
        outs, rows = [out for out, _ in graphs], [weight for _, weight in graphs]
        gradients = self._vectorized(outs, inputs, rows) if num_rows > 1 else None
        if gradients is None:
            gradients = self._one_by_one(outs, inputs, rows)
        return [
            t.new_zeros((num_rows, *t.shape)) if g is None else g
            for t, g in zip(inputs, gradients, strict=True)
        ]

    def _vectorized(
        self, outputs: list[Tensor], inputs: Sequence[Tensor], rows: list[Tensor]
    ) -> Sequence[Tensor | None] | None:
        if not self.vectorize:
            return None
        try:
            return torch.autograd.grad(
                outputs,
                list(inputs),
                rows,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=True,
                create_graph=self.create_graph,
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            self.vectorize = False
            return None

    def _one_by_one(
        self, outputs: list[Tensor], inputs: Sequence[Tensor], rows: list[Tensor]
    ) -> Sequence[Tensor | None]:
        passes = [
            torch.autograd.grad(
                outputs,
                list(inputs),
                [weight[i] for weight in rows],
                retain_graph=True,
                allow_unused=True,
                create_graph=self.create_graph,
            )
            for i in range(len(rows[0]))
        ]
        if len(passes) == 1:
            return [None if gradient is None else gradient.unsqueeze(0) for gradient in passes[0]]
        return [
            None if column[0] is None else torch.stack(column)
            for column in zip(*passes, strict=True)
        ]


def differentiable(params: Params) -> dict[str, Tensor]:
    """Leaves that share the memory of `params` and record gradients."""
    return {name: p.detach().requires_grad_() for name, p in params.items()}


def hessian_products(
    function: Callable[[dict[str, Tensor]], Tensor],
    params: Params,
    stacked_gradient: StackedGradient | None = None,
    *,
    track_gradients: bool = False,
) -> LinearFunction:
    r"""The map V ↦ HV of the Hessian of a scalar function, by double backward.

    .. math:: H v = \nabla_\theta \langle \nabla_\theta f(\theta), v\rangle

    (Pearlmutter 1994, in reverse over reverse mode). One forward and one backward are spent here,
    one backward per vector in the map.

    Args:
        function: From a dictionary of parameters to a tensor ``()``.
        params: Where to take the Hessian.
        stacked_gradient: Reused between calls, it remembers whether vectorising works.
        track_gradients: The products have a graph that leads to `params`, which must record
            gradients, and to the vectors.

    Returns:
        A map of stacks ``{name: (k, *shape)}``, linear and, by default, without a graph.

    Example:
        >>> import torch
        >>> from hessops.functional import hessian_products
        >>> apply = hessian_products(lambda p: (p["x"] ** 3).sum(), {"x": torch.tensor([1.0, 2.0])})
        >>> apply({"x": torch.eye(2)})["x"]
        tensor([[ 6.,  0.],
                [ 0., 12.]])
    """
    gradient_of = stacked_gradient or StackedGradient(create_graph=track_gradients)
    leaves = dict(params) if track_gradients else differentiable(params)
    with torch.enable_grad():
        gradients = gradient_with_graph([function(leaves)], None, list(leaves.values()))

    def apply(stack: Stack) -> Stack:
        rows = [stack[name] for name in leaves]
        return dict(zip(leaves, gradient_of(gradients, list(leaves.values()), rows), strict=True))

    return apply


class JacobianProducts:
    r"""Products with the Jacobian J of several outputs by the parameters, at fixed parameters.

    :math:`J^\top u` is one backward pass. :math:`J v` is the derivative of :math:`u \mapsto
    \langle J^\top u, v\rangle`, which is linear in u ("double vjp"): two backward passes and no
    forward mode.

    Args:
        outputs: Tensors with a graph that leads to `leaves`.
        leaves: The parameters, as they were given to the function.
        stacked_gradient: Reused between calls, it remembers whether vectorising works.

    Example:
        >>> import torch
        >>> from hessops.functional import JacobianProducts
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> jacobian = JacobianProducts([x**2], {"x": x})
        >>> jacobian.push({"x": torch.ones(1, 2)})
        [tensor([[2., 4.]])]
        >>> jacobian.pull([torch.ones(1, 2)])
        {'x': tensor([[2., 4.]])}
    """

    def __init__(
        self,
        outputs: Sequence[Tensor],
        leaves: Mapping[str, Tensor],
        stacked_gradient: StackedGradient | None = None,
    ) -> None:
        self._gradient_of = stacked_gradient or StackedGradient()
        self._outputs = list(outputs)
        self._leaves = dict(leaves)

    @cached_property
    def _pulled_back(self) -> tuple[list[Tensor], list[Tensor]]:
        """A weight u per output, and Jᵀu with the graph that leads back to u."""
        dummies = [torch.zeros_like(out, requires_grad=True) for out in self._outputs]
        with torch.enable_grad():
            return dummies, gradient_with_graph(self._outputs, dummies, list(self._leaves.values()))

    def push(self, stack: Stack) -> list[Tensor]:
        """J v: a stack of parameters to one tensor ``(k, *output.shape)`` per output.

        Parameters that `stack` leaves out count as zero.
        """
        dummies, pulled_back = self._pulled_back
        named = dict(zip(self._leaves, pulled_back, strict=True))
        return self._gradient_of([named[name] for name in stack], dummies, list(stack.values()))

    def pull(self, weights: Sequence[Tensor]) -> Stack:
        """Jᵀ u: one tensor ``(k, *output.shape)`` per output to a stack of parameters."""
        gradients = self._gradient_of(self._outputs, list(self._leaves.values()), weights)
        return dict(zip(self._leaves, gradients, strict=True))


def gradient_with_graph(
    outputs: list[Tensor], weights: list[Tensor] | None, inputs: list[Tensor]
) -> list[Tensor]:
    """Gradients that can be differentiated again; zeros without a graph where there are none."""
    if weights is None:
        weights = [torch.ones_like(out) for out in outputs]
    pairs = [(o, w) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
    if not pairs:
        return [torch.zeros_like(t) for t in inputs]
    gradients = torch.autograd.grad(
        [o for o, _ in pairs],
        inputs,
        [w for _, w in pairs],
        create_graph=True,
        allow_unused=True,
    )
    return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, gradients, strict=True)]


def gradient_by_outputs(
    function: Callable[[list[Tensor]], Tensor], outputs: Sequence[Tensor]
) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], list[Tensor]]]:
    """Gradient of a scalar function of some outputs, and the map that applies its Hessian.

    Args:
        function: From a list of tensors to a tensor ``()``.
        outputs: Where to differentiate; their graphs are not followed.

    Returns:
        The gradient, one tensor per output, and a map of lists of ``(k, *output.shape)``.
    """
    gradient_of = StackedGradient()
    leaves = [out.detach().requires_grad_() for out in outputs]
    with torch.enable_grad():
        # Cloned, so that a loss that writes to its input writes to no leaf.
        value = function([leaf.clone() for leaf in leaves])
        gradients = gradient_with_graph([value], None, leaves)

    def apply_hessian(weights: Sequence[Tensor]) -> list[Tensor]:
        return gradient_of(gradients, leaves, weights)

    return [g.detach() for g in gradients], apply_hessian


def forward_mode_products(
    function: Callable[[dict[str, Tensor]], list[Tensor]], params: Params
) -> Callable[[Stack], list[Tensor]]:
    """The map V ↦ JV of a vector-valued function in forward mode (one tangent per vector).

    Torch has wrong or missing forward derivatives for several layers; callers compare with
    reverse mode.
    """

    def push_one(tangents: Stack) -> tuple[Tensor, ...]:
        # Indexed, because jvp is annotated as if it always returned an auxiliary output too.
        result = torch.func.jvp(lambda p: tuple(function(p)), (dict(params),), (dict(tangents),))
        return tuple(result[1])

    def push(stack: Stack) -> list[Tensor]:
        num_rows = len(next(iter(stack.values())))
        rows = [push_one({name: t[i] for name, t in stack.items()}) for i in range(num_rows)]
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    return push


def forward_over_reverse_products(
    function: Callable[[dict[str, Tensor]], Tensor], params: Params
) -> LinearFunction:
    """The map V ↦ HV of the Hessian of a scalar function, forward over reverse mode."""
    gradient = torch.func.grad(function)
    names = list(params)
    push = forward_mode_products(lambda p: [gradient(p)[name] for name in names], params)
    return lambda stack: dict(zip(names, push(stack), strict=True))
