"""Compiled products: the derivative of a model as one flat graph, for `torch.compile`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from hessops.errors import CompileWarning
from hessops.functional.checks import excess_difference, random_probes
from hessops.functional.products import Params, Stack
from hessops.nested import map_tensors, tensor_leaves
from hessops.space import ParameterSpace
from hessops.streaming import Batch
from hessops.warn import warn

BatchProduct = Callable[[Params, Batch, Stack], Stack]
FlatProduct = Callable[..., Sequence[Tensor]]
# How much of torch's message a warning repeats: the rest is a trace of the compiler.
MESSAGE_LENGTH = 300


class CompiledProducts:
    r"""Products :math:`(\theta, b, V) \mapsto m(b)\, V`, compiled once per form of batch and stack.

    `torch.compile` cannot differentiate twice, but it need not: the product is traced with its
    backward passes into one flat graph of tensor operations
    (`torch.fx.experimental.proxy_tensor.make_fx`), and that is compiled. The trace runs on tensors
    without values, so that nothing in the graph can stem from the values of one batch: a model that
    looks at them (control flow on data, ``.item()``, numpy) is not traced.

    What is compiled is compared with the uncompiled product once, by random vectors. Where tracing
    or compiling fails, where there is no compiler, or where the comparison does, a
    `CompileWarning` says so and the product is computed without. So the result never depends on the
    compiler but for rounding.

    On a CPU it seldom pays. On one core of a busy x86 server, with torch 2.13, compiled products of
    the three matrices of perceptrons with 26 000 and 670 000 parameters took 0.5 to 0.9 of the time
    of others, for one vector as for eight; `TensorOperator.linearize` brought as much. But each
    form took 4 to 15 seconds to compile (some minutes for a transformer), and the last, shorter
    batch is a form of its own, as is each number of vectors.

    Args:
        what: The matrix, for messages.

    Example:
        >>> import torch
        >>> from hessops import Batch
        >>> from hessops.functional.compiled import CompiledProducts
        >>> def product(params, batch, stack):
        ...     return {"w": stack["w"] @ batch.x.T @ batch.x}
        >>> compiled = CompiledProducts("a second moment")
        >>> batch = Batch.from_raw((torch.eye(2), None))
        >>> compiled.forms
        0
        >>> compiled(product, {"w": torch.zeros(2)}, batch, {"w": torch.ones(1, 2)})
        {'w': tensor([[1., 1.]])}
        >>> compiled.forms
        1
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._made: dict[object, FlatProduct | None] = {}
        self._warned: set[str] = set()

    @property
    def forms(self) -> int:
        """How many forms of batch and stack are compiled."""
        return sum(product is not None for product in self._made.values())

    def __call__(self, product: BatchProduct, params: Params, batch: Batch, stack: Stack) -> Stack:
        """The product, compiled where that works.

        Args:
            product: A pure function of its arguments but for what never changes: the buffers of the
                model, say.
            params: ``{name: tensor}``, without gradients.
            batch: Some points.
            stack: ``{name: (k, *shape)}``, k >= 1.
        """
        # The strides of a slice are of no account.
        stack = {name: t.contiguous().reshape(-1).view(t.shape) for name, t in stack.items()}
        try:
            form = _form((batch.x, batch.y, params, stack))
        except _UnknownForm as error:
            self._warn(f"takes a batch with a {error}, of which the compiler knows nothing")
            return product(params, batch, stack)
        if form not in self._made:
            self._made[form] = self._attempted(product, params, batch, stack)
        compiled = self._made[form]
        if compiled is not None:
            try:
                return _call(compiled, params, batch, stack)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self._warn(f"failed ({_told(error)})")
                self._made[form] = None
        return product(params, batch, stack)

    def _attempted(
        self, product: BatchProduct, params: Params, batch: Batch, stack: Stack
    ) -> FlatProduct | None:
        """The compiled product for inputs of this form; ``None`` where it does not work."""
        space = ParameterSpace.from_tensors(params)
        count = len(next(iter(stack.values())))
        # Not the caller's vectors, which may be zero.
        probes = space.unflatten(random_probes(space, count, seed=batch.position))
        try:
            with _quiet():
                compiled = _compiled(product, params, batch, probes)
                found = space.flatten(_call(compiled, params, batch, probes))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._warn(f"cannot be compiled ({_told(error)})")
            return None
        difference = excess_difference(found, space.flatten(product(params, batch, probes)))
        if difference is not None:
            self._warn(f"differs by {difference:.1e} relative when it is compiled")
            return None
        return compiled

    def _warn(self, reason: str) -> None:
        # Once for each reason: every form of batch would give the same again.
        if reason in self._warned:
            return
        self._warned.add(reason)
        warn(
            f"compile=True: a product of {self.what} {reason}; it is computed without, with the "
            "same result. Leave compile=True out to silence this",
            CompileWarning,
        )

    def anew(self) -> Self:
        """With nothing compiled, for another model or another device."""
        return type(self)(self.what)

    def __deepcopy__(self, memo: object) -> Self:
        """Without what is compiled, which cannot be copied."""
        return self.anew()

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        """Without what is compiled, which cannot be pickled."""
        return type(self), (self.what,)


def _compiled(product: BatchProduct, params: Params, batch: Batch, stack: Stack) -> FlatProduct:
    """A product traced and handed to the compiler, which begins with the first call."""
    # Imported here: it takes a second, and few need it.
    from torch.fx.experimental.proxy_tensor import make_fx

    names = list(stack)

    def flat(*tensors: Tensor) -> list[Tensor]:
        remaining = iter(tensors)

        def taken(_: Tensor) -> Tensor:
            return next(remaining)

        inner_params = {name: next(remaining) for name in params}
        x, y = map_tensors(taken, batch.x), map_tensors(taken, batch.y)
        inner_stack = {name: next(remaining) for name in names}
        products = product(inner_params, replace(batch, x=x, y=y), inner_stack)
        return [products[name].detach() for name in names]

    inputs = _flattened(params, batch, stack)
    # Tensors that the model holds beside its parameters are constants of the graph.
    graph = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    compiled: FlatProduct = torch.compile(graph, fullgraph=True, dynamic=False)
    return compiled


def _call(compiled: FlatProduct, params: Params, batch: Batch, stack: Stack) -> Stack:
    with torch.no_grad():
        return dict(zip(stack, compiled(*_flattened(params, batch, stack)), strict=True))


def _flattened(params: Params, batch: Batch, stack: Stack) -> list[Tensor]:
    return [*params.values(), *tensor_leaves((batch.x, batch.y)), *stack.values()]


class _UnknownForm(Exception):  # not an error: the product is computed without
    """Inputs hold an object that may say anything about the points."""


def _form(nested: object) -> object:
    """What inputs must share to be computed by one graph."""
    if isinstance(nested, Tensor):
        return (nested.shape, nested.stride(), nested.dtype, nested.device)
    if nested is None or isinstance(nested, (bool, int, float, complex, str, bytes)):
        return (type(nested), nested)
    if isinstance(nested, (tuple, list)):
        return (type(nested), *(_form(item) for item in nested))
    if isinstance(nested, Mapping):
        return (type(nested), *((key, _form(value)) for key, value in nested.items()))
    raise _UnknownForm(type(nested).__name__)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what torch says of itself while it traces and compiles."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _told(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:MESSAGE_LENGTH]
