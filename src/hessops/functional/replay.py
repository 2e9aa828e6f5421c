"""Linear maps that are computed again from a recording, in memory that was laid out before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch._ops import OpOverload

from hessops.functional.recording import (
    NotRecordable,
    Operation,
    Recording,
    Value,
    with_values,
)

aten = torch.ops.aten
Overload: TypeAlias = "OpOverload[Any, Any]"  # older versions of torch do not subscript it

# Where a function writes its result to a given tensor, and by what name it gets that. Only what
# torch computes there directly; of the others, it would copy.
_OUT: dict[Overload, tuple[Overload, str]] = {
    aten.mm.default: (aten.mm.out, "out"),
    aten.addmm.default: (aten.addmm.out, "out"),
    aten.bmm.default: (aten.bmm.out, "out"),
    aten.baddbmm.default: (aten.baddbmm.out, "out"),
    aten.sum.dim_IntList: (aten.sum.IntList_out, "out"),
    aten.mean.dim: (aten.mean.out, "out"),
    aten.cat.default: (aten.cat.out, "out"),
    aten._softmax_backward_data.default: (aten._softmax_backward_data.out, "grad_input"),
    aten._log_softmax_backward_data.default: (aten._log_softmax_backward_data.out, "out"),
}
# The same for functions of each element, which may write where they read.
_POINTWISE: dict[Overload, tuple[Overload, str]] = {
    aten.add.Tensor: (aten.add.out, "out"),
    aten.sub.Tensor: (aten.sub.out, "out"),
    aten.mul.Tensor: (aten.mul.out, "out"),
    aten.div.Tensor: (aten.div.out, "out"),
    aten.neg.default: (aten.neg.out, "out"),
    aten.addcmul.default: (aten.addcmul.out, "out"),
    aten.where.self: (aten.where.self_out, "out"),
    aten.tanh_backward.default: (aten.tanh_backward.grad_input, "grad_input"),
    aten.sigmoid_backward.default: (aten.sigmoid_backward.grad_input, "grad_input"),
    aten.threshold_backward.default: (aten.threshold_backward.grad_input, "grad_input"),
    aten.gelu_backward.default: (aten.gelu_backward.grad_input, "grad_input"),
    aten.silu_backward.default: (aten.silu_backward.grad_input, "grad_input"),
    aten.elu_backward.default: (aten.elu_backward.grad_input, "grad_input"),
    aten.softplus_backward.default: (aten.softplus_backward.grad_input, "grad_input"),
    aten.leaky_relu_backward.default: (aten.leaky_relu_backward.grad_input, "grad_input"),
}
# A number for a tensor.
_BY_NUMBER: dict[Overload, Overload] = {
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
}
# These add to their first argument, and may do so in place.
_ADDS_TO_FIRST = frozenset({aten.addmm.default, aten.baddbmm.default})
# What an addition of such a product becomes.
_FUSED: dict[Overload, Overload] = {
    aten.mm.default: aten.addmm.default,
    aten.mul.Tensor: aten.addcmul.default,
}
_ALIGNMENT = 64


class Replay:
    """Computes a recorded map for other inputs.

    Constants are those of the recording. Intermediate results are written to one block of memory
    that is laid out once, so that nothing is allocated and little is read that the processor's
    cache has lost; sums of products are computed by one function each.

    Args:
        recording: Of a map of tensors on the CPU.

    Raises:
        NotRecordable: It has tensors of several dtypes on one storage.

    Example:
        >>> import torch
        >>> from hessops.functional.recording import recorded
        >>> from hessops.functional.replay import Replay
        >>> A = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
        >>> recording, _ = recorded(lambda t: {"y": t["x"] @ A + t["x"]}, {"x": torch.eye(2)})
        >>> Replay(recording)({"x": torch.ones(2, 2)})["y"]
        tensor([[3., 2.],
                [3., 2.]])
    """

    def __init__(self, recording: Recording) -> None:
        operations = fused(recording)
        plan = _Plan(operations, recording)
        tensors = _Tensors(plan, recording)
        self.num_bytes = plan.num_bytes + recording.made_bytes
        self._inputs = {name: tensors.of(value) for name, value in recording.inputs.items()}
        self._steps = [_Step.of(one, plan, tensors) for one in operations]
        self._outputs = dict(recording.outputs)
        self._tensors = tensors

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The map of other inputs; the results are overwritten by the next call.

        Raises:
            NotRecordable: A function returned a tensor of another form than when it was recorded.
        """
        with torch.no_grad():
            for name, place in self._inputs.items():
                place.copy_(inputs[name])
            for step in self._steps:
                step()
        results = {name: self._tensors.of(value) for name, value in self._outputs.items()}
        self._tensors.forget()
        return results


def fused(recording: Recording) -> list[Operation]:
    """The operations of a recording, with sums of products in one.

    A product moves to where it is added: neither it nor what it reads is written to in between.
    """
    operations = [_by_tensors(one) for one in recording.operations]
    readers = Counter(number for one in operations for number in {v.storage for v in one.reads})
    readers.update({value.storage for value in recording.outputs.values()})
    # By the storage of the result, and in their order.
    made: dict[int, Operation] = {}
    result: dict[int, Operation] = {}
    for index, one in enumerate(operations):
        new, gone = one, None
        if not recording.rewritten.intersection(v.storage for v in (*one.reads, *_written(one))):
            new, gone = _with_product(one, made, readers)
        if gone is not None:
            del result[next(number for number, other in result.items() if other is gone)]
        result[index] = new
        if not recording.rewritten.intersection(v.storage for v in (*new.reads, *_written(new))):
            made.update({value.storage: new for value in _written(new)})
    return list(result.values())


def _written(one: Operation) -> list[Value]:
    return [value for value in one.results if value is not None]


def _with_product(
    one: Operation, made: Mapping[int, Operation], readers: Mapping[int, int]
) -> tuple[Operation, Operation | None]:
    """An addition together with the product that it adds, and that product; or as it is."""
    if one.function is not aten.add.Tensor or one.keywords.get("alpha", 1) != 1:
        return one, None
    first, second = one.arguments[:2]
    (result,) = one.results
    if not (isinstance(first, Value) and isinstance(second, Value) and result is not None):
        return one, None
    if first.storage == second.storage:
        return one, None
    for added, other in ((second, first), (first, second)):
        product = made.get(added.storage)
        if product is None or readers[added.storage] > 1 or product.function not in _FUSED:
            continue
        if product.keywords or not all(isinstance(a, (Value, Tensor)) for a in product.arguments):
            continue
        if not added.dtype == other.dtype == result.dtype or other.size != result.size:
            continue
        whole = product.results[0]
        function = _FUSED[product.function]
        if added == whole:
            arguments = (other, *product.arguments)
            return Operation(function, arguments, {}, (result,)), product
        if len(added.size) == 2 and added.transposed() == whole:
            arguments = (other.transposed(), *product.arguments)
            return Operation(function, arguments, {}, (result.transposed(),)), product
    return one, None


def _by_tensors(one: Operation) -> Operation:
    """The same with a tensor in place of a number, where only that has a place for the result."""
    function = _BY_NUMBER.get(one.function, one.function)
    if function not in _BY_NUMBER.values() or len(one.arguments) != 2:
        return one
    first, second = one.arguments
    result = one.results[0]
    if not isinstance(first, Value) or result is None or result.dtype != first.dtype:
        return one
    if not isinstance(second, (int, float)):
        return one
    scalar = torch.tensor(second, dtype=first.dtype)
    return replace(one, function=function, arguments=(first, scalar))


# --- memory ------------------------------------------------------------------------------------


class _Plan:
    """Where the storages of a recording lie in one block of memory.

    Args:
        operations: In order.
        recording: What they were recorded with.
    """

    def __init__(self, operations: Sequence[Operation], recording: Recording) -> None:
        self._sizes = recording.num_bytes
        self._kept = {value.storage for value in recording.outputs.values()}
        self._inputs = {value.storage for value in recording.inputs.values()}
        self._ends: dict[int, int] = {}
        for index, one in enumerate(operations):
            for value in (*one.reads, *_written(one)):
                self._ends[value.storage] = index
        self.last = len(operations)
        self.offsets: dict[int, int] = {}
        self.num_bytes = 0
        self._taken: list[tuple[int, int, int]] = []  # offset, end, storage
        for storage in sorted(self._inputs):
            self._place(storage, 0)
        for index, one in enumerate(operations):
            self._free(index)
            if is_placed(one):
                self._place_result(one, index)

    def _until(self, storage: int) -> int:
        """The last operation that needs it."""
        # What is written to the inputs must not fall on what an earlier call left there, so they
        # keep their places as outputs do.
        if storage in self._kept or storage in self._inputs:
            return self.last
        return self._ends[storage]

    def _free(self, index: int) -> None:
        self._taken = [one for one in self._taken if self._until(one[2]) >= index]

    def _place_result(self, one: Operation, index: int) -> None:
        result = one.results[0]
        assert result is not None
        reused = self._overwritten(one, index)
        if reused is None:
            self._place(result.storage, index)
            return
        offset = self.offsets[reused]
        self.offsets[result.storage] = offset
        self._taken = [
            (start, end, result.storage if number == reused else number)
            for start, end, number in self._taken
        ]

    def _overwritten(self, one: Operation, index: int) -> int | None:
        """The storage of an argument in whose place the result may be written."""
        result = one.results[0]
        assert result is not None
        reads = one.reads
        in_place = one.function in _POINTWISE
        candidates = reads[:1] if one.function in _ADDS_TO_FIRST else reads if in_place else []
        for value in candidates:
            number = value.storage
            if number not in self.offsets or self._until(number) != index:
                continue
            if number in self._inputs or self._sizes[number] != self._sizes[result.storage]:
                continue
            if replace(value, storage=0) != replace(result, storage=0):
                continue
            others = [v for v in reads if v.storage == number]
            is_alone = len(others) == 1 if not in_place else all(v == value for v in others)
            if is_alone:
                return number
        return None

    def _place(self, storage: int, index: int) -> None:
        """The first gap that is large enough."""
        size = -(-self._sizes[storage] // _ALIGNMENT) * _ALIGNMENT
        start = 0
        for begin, end, _ in sorted(self._taken):
            if begin - start >= size:
                break
            start = max(start, end)
        self._taken.append((start, start + size, storage))
        self.offsets[storage] = start
        self.num_bytes = max(self.num_bytes, start + size)


def is_placed(one: Operation) -> bool:
    """Whether the result is written to a given place."""
    is_single = len(one.results) == 1 and one.results[0] is not None
    return is_single and (one.function in _OUT or one.function in _POINTWISE)


class _Tensors:
    """The tensors of a recording in their places.

    Args:
        plan: Where they are.
        recording: The constants.
    """

    def __init__(self, plan: _Plan, recording: Recording) -> None:
        self._block = torch.empty(plan.num_bytes + _ALIGNMENT, dtype=torch.uint8)
        self._begin = -self._block.data_ptr() % _ALIGNMENT
        self._plan, self._recording = plan, recording
        self._made: dict[Value, Tensor] = {}
        self._now: dict[int, Tensor] = {}

    def is_fixed(self, value: Value) -> bool:
        """Whether it is the same tensor in every call."""
        return value.storage in self._recording.constants or value.storage in self._plan.offsets

    def of(self, value: Value) -> Tensor:
        """The tensor, as it is now."""
        if not self.is_fixed(value):
            return self._view(self._now[value.storage], value)
        if value not in self._made:
            self._made[value] = self._fixed(value)
        return self._made[value]

    def set(self, value: Value, tensor: Tensor) -> None:
        """Takes what a function returned in this call."""
        if (tuple(tensor.size()), tuple(tensor.stride())) != (value.size, value.stride):
            raise NotRecordable("a function returned a tensor of another form than before")
        self._now[value.storage] = tensor

    def forget(self) -> None:
        """Drops what belongs to one call."""
        self._now.clear()

    def _fixed(self, value: Value) -> Tensor:
        constant = self._recording.constants.get(value.storage)
        if constant is not None:
            return self._view(constant, value)
        begin = self._begin + self._plan.offsets[value.storage]
        size = self._recording.num_bytes[value.storage]
        memory = self._block[begin : begin + size].view(value.dtype)
        return memory.as_strided(value.size, value.stride, memory.storage_offset() + value.offset)

    def _view(self, tensor: Tensor, value: Value) -> Tensor:
        if tensor.dtype != value.dtype:
            raise NotRecordable("tensors of several dtypes share a storage")
        return tensor.as_strided(value.size, value.stride, value.offset)


@dataclass(frozen=True, eq=False)
class _Step:
    """An operation with its tensors.

    Attributes:
        function: What to call.
        arguments: With values in place of tensors that are others in each call.
        keywords: Likewise.
        results: What to keep of what it returns.
        tensors: Where the other tensors are.
        is_fixed: Whether all arguments are the same in each call.
    """

    function: Callable[..., object]
    arguments: tuple[object, ...]
    keywords: dict[str, object]
    results: tuple[Value | None, ...]
    tensors: _Tensors
    is_fixed: bool

    @classmethod
    def of(cls, one: Operation, plan: _Plan, tensors: _Tensors) -> _Step:
        """An operation in the places of a plan."""

        def placed(value: Value) -> object:
            return tensors.of(value) if tensors.is_fixed(value) else value

        arguments = cast("tuple[object, ...]", with_values(one.arguments, placed))
        keywords = {name: with_values(value, placed) for name, value in one.keywords.items()}
        is_fixed = all(tensors.is_fixed(value) for value in one.reads)
        if not is_placed(one):
            results = () if one.in_place else one.results
            return cls(one.function, arguments, keywords, results, tensors, is_fixed)
        function, name = _OUT.get(one.function) or _POINTWISE[one.function]
        result = one.results[0]
        assert result is not None
        keywords[name] = tensors.of(result)
        return cls(function, arguments, keywords, (), tensors, is_fixed)

    def __call__(self) -> None:
        arguments, keywords = self.arguments, self.keywords
        if not self.is_fixed:
            arguments = cast("tuple[object, ...]", with_values(arguments, self.tensors.of))
            keywords = {n: with_values(v, self.tensors.of) for n, v in keywords.items()}
        returned = self.function(*arguments, **keywords)
        if self.results:
            several = returned if isinstance(returned, (tuple, list)) else [returned]
            for value, tensor in zip(self.results, several, strict=True):
                if value is not None and isinstance(tensor, Tensor):
                    self.tensors.set(value, tensor)
