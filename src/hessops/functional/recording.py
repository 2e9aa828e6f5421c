"""What a linear map of tensors computes: its operations, recorded while it runs once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from hessops.nested import map_tensors

aten = torch.ops.aten

# Their results depend on the form of an argument, never on its numbers.
_FILLED = frozenset(
    {
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
        aten.new_zeros.default,
        aten.new_ones.default,
        aten.new_full.default,
    }
)
# What one run does not tell of the next: random numbers, and forms that depend on numbers.
_UNTOLD = (
    torch.Tag.nondeterministic_seeded,
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
)


class NotRecordable(Exception):  # not an error: the map is computed as it is
    """A map does something of which the record would not be enough to do it again."""


@dataclass(frozen=True)
class Value:
    """A tensor, by where it lies.

    Attributes:
        storage: The number of its storage in the recording.
        size: Its shape.
        stride: Steps between its elements.
        offset: Where it begins, in elements.
        dtype: Its dtype.
    """

    storage: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def transposed(self) -> Value:
        """The transpose of a matrix."""
        return Value(self.storage, self.size[::-1], self.stride[::-1], self.offset, self.dtype)


@dataclass(frozen=True)
class Operation:
    """One call of a function.

    Attributes:
        function: What was called.
        arguments: Positional ones, with values in place of tensors.
        keywords: Named ones, likewise.
        results: What came back, in order; ``None`` for what is no tensor.
        in_place: Whether the results are arguments that were written to.
    """

    function: OpOverload[Any, Any]
    arguments: tuple[object, ...]
    keywords: dict[str, object]
    results: tuple[Value | None, ...]
    in_place: bool = False

    @property
    def reads(self) -> list[Value]:
        """The values among the arguments."""
        return values_of((self.arguments, tuple(self.keywords.values())))


@dataclass(frozen=True, eq=False)
class Recording:
    """What a map of tensors did.

    Attributes:
        inputs: By name, in the order given.
        outputs: By name.
        operations: In order, those alone whose results depend on the inputs.
        constants: A tensor on every other storage that is read.
        num_bytes: The size of every storage.
        rewritten: The storages that are written to more than once.
        made_bytes: What those constants take that were made meanwhile.
    """

    inputs: dict[str, Value]
    outputs: dict[str, Value]
    operations: list[Operation]
    constants: dict[int, Tensor]
    num_bytes: dict[int, int]
    rewritten: frozenset[int]
    made_bytes: int


def recorded(
    function: Callable[[dict[str, Tensor]], Mapping[str, Tensor]], inputs: Mapping[str, Tensor]
) -> tuple[Recording, dict[str, Tensor]]:
    """Runs a function and records what it computes from its arguments.

    Every function that torch dispatches is recorded, those of a backward pass too. What is computed
    by other means is not seen, and taken for a constant: whoever uses a recording compares.

    Args:
        function: A map of dictionaries of tensors on the CPU.
        inputs: Its argument.

    Returns:
        The recording, and the function's result.

    Raises:
        NotRecordable: It writes to what was there before, is random, or looks at numbers.

    Example:
        >>> import torch
        >>> from hessops.functional.recording import recorded
        >>> recording, result = recorded(lambda t: {"y": 2 * t["x"].T}, {"x": torch.ones(2, 3)})
        >>> [operation.function.name() for operation in recording.operations]
        ['aten::mul.Tensor']
    """
    recorder = _Recorder(inputs)
    with recorder:
        result = dict(function(dict(inputs)))
    outputs = {name: recorder.value_of(tensor) for name, tensor in result.items()}
    return recorder.recording(outputs), result


def values_of(nested: object) -> list[Value]:
    """The values in nested tuples, lists and dictionaries."""
    if isinstance(nested, Value):
        return [nested]
    if isinstance(nested, (tuple, list)):
        return [value for item in nested for value in values_of(item)]
    return []


def with_values(nested: object, replace: Callable[[Value], object]) -> object:
    """Nested tuples and lists with something in place of values."""
    if isinstance(nested, Value):
        return replace(nested)
    if isinstance(nested, (tuple, list)):
        return type(nested)([with_values(item, replace) for item in nested])
    return nested


@dataclass
class _Storages:
    """The storages seen so far; a tensor on each keeps it alive, so that none is used twice."""

    tensors: list[Tensor] = field(default_factory=list)
    varies: list[bool] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)

    def number_of(self, tensor: Tensor, *, varies: bool) -> int:
        """The number of a tensor's storage, entered where it is new."""
        key = tensor.untyped_storage()._cdata
        if key not in self.numbers:
            self.numbers[key] = len(self.tensors)
            self.tensors.append(tensor.detach())
            self.varies.append(varies)
        return self.numbers[key]

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.numbers


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Sees every function that is called inside its context."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would import its compiler here, for two thirds of a second."""
        return False

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._storages = _Storages()
        self._operations: list[Operation] = []
        # Storages that operations have made, and those that others wrote to afterwards.
        self._made: set[int] = set()
        self._rewritten: set[int] = set()
        self._inputs = {name: self.value_of(t, varies=True) for name, t in inputs.items()}

    def value_of(self, tensor: Tensor, *, varies: bool = False) -> Value:
        """Where a tensor lies; what was not seen before is constant unless it is said to vary."""
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
        if not plain or tensor.device.type != "cpu" or tensor.is_conj() or tensor.is_neg():
            raise NotRecordable(f"a tensor of type {type(tensor).__name__} on {tensor.device}")
        number = self._storages.number_of(tensor, varies=varies)
        size, stride = tuple(tensor.size()), tuple(tensor.stride())
        return Value(number, size, stride, int(tensor.storage_offset()), tensor.dtype)

    def __torch_dispatch__(
        self,
        func: OpOverload[Any, Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        keywords = kwargs or {}
        arguments: Any = map_tensors(self.value_of, args)
        named: Any = map_tensors(self.value_of, keywords)
        result = func(*args, **keywords)
        if func._schema.is_mutable:
            self._enter_written(func, arguments, named)
        else:
            self._enter(func, arguments, named, result)
        return result

    def _enter(
        self, function: OpOverload[Any, Any], arguments: Any, named: dict[str, Any], result: object
    ) -> None:
        varies = self._vary(arguments, named)
        # The form of what an index selects depends on the index alone.
        telling = arguments[1:] if function is aten.index.Tensor else (arguments, named)
        if self._vary(*telling) and any(tag in function.tags for tag in _UNTOLD):
            raise NotRecordable(f"{function} is random, or looks at numbers")
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        # A view computes nothing: its storage was there.
        computes = [t not in self._storages for t in results if isinstance(t, Tensor)]
        varies = varies and function not in _FILLED
        values = tuple(
            self.value_of(item, varies=varies) if isinstance(item, Tensor) else None
            for item in results
        )
        if not any(computes):
            return
        if not all(computes):
            raise NotRecordable(f"{function} returns a view beside a new tensor")
        self._made.update(value.storage for value in values if value is not None)
        self._operations.append(Operation(function, arguments, named, values))

    def _enter_written(
        self, function: OpOverload[Any, Any], arguments: Any, named: dict[str, Any]
    ) -> None:
        written = []
        for position, argument in enumerate(function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                at = arguments[position : position + 1] or (named.get(argument.name),)
                written += values_of(at)
        for value in written:
            if value.storage not in self._made:
                raise NotRecordable(f"{function} writes to a tensor that was there before")
            # What it was made with is computed anew each time, even where that was constant.
            self._storages.varies[value.storage] = True
            self._rewritten.add(value.storage)
        self._operations.append(
            Operation(function, arguments, named, tuple(written), in_place=True)
        )

    def _vary(self, *nested: Any) -> bool:
        reads = values_of([tuple(n.values()) if isinstance(n, dict) else n for n in nested])
        return any(self._storages.varies[value.storage] for value in reads)

    def recording(self, outputs: dict[str, Value]) -> Recording:
        """What was recorded, without what is constant and what the outputs do not need."""
        storages = self._storages
        needed = {value.storage for value in outputs.values()}
        operations: list[Operation] = []
        for operation in reversed(self._operations):
            results = [value.storage for value in operation.results if value is not None]
            if any(number in needed and storages.varies[number] for number in results):
                operations.append(operation)
                needed.update(value.storage for value in operation.reads)
        needed.update(value.storage for value in self._inputs.values())
        num_bytes = {n: storages.tensors[n].untyped_storage().nbytes() for n in needed}
        constants = {n: storages.tensors[n] for n in needed if not storages.varies[n]}
        return Recording(
            self._inputs,
            outputs,
            operations[::-1],
            constants,
            num_bytes,
            frozenset(self._rewritten),
            sum(num_bytes[number] for number in self._made.intersection(constants)),
        )
