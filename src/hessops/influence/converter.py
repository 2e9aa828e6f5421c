"""TorchNumpyConverter: from the arrays of other libraries to tensors, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from hessops.errors import ArgumentTypeError, DtypeError
from hessops.printed import Node, Printed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    # Of any dtype: that of the tensor decides.
    NumpyArray: TypeAlias = NDArray[Any]
else:
    NumpyArray = np.ndarray


def tensor_of_array(array: NumpyArray, name: str) -> Tensor:
    """The values of an array, in its memory where that can be written to and lies in a row.

    Raises:
        DtypeError: torch has no such dtype.
    """
    native = np.asarray(array, dtype=array.dtype.newbyteorder("="))
    if not (native.flags.writeable and native.flags.c_contiguous):
        # torch warns of memory that it may not write to, and refuses strides that go back.
        native = native.copy(order="C")
    try:
        return torch.from_numpy(native)
    except TypeError as error:
        raise DtypeError(
            f"{name} has the dtype {array.dtype}, which torch lacks: convert it with "
            f"{name}.astype(...)"
        ) from error


@runtime_checkable
class ArrayConverter(Protocol):
    """What `DaskInfluenceCalculator` needs to know of arrays; `TorchNumpyConverter` is one."""

    def from_numpy(self, array: NumpyArray) -> Tensor:
        """The tensor with the values of an array."""
        ...

    def to_numpy(self, tensor: Tensor) -> NumpyArray:
        """The array with the values of a tensor."""
        ...


class TorchNumpyConverter(Printed):
    """Arrays as tensors and tensors as arrays, of the same dtype.

    Args:
        device: Where tensors go; ``None`` leaves them in host memory.

    Example:
        >>> import numpy as np
        >>> from hessops.influence import TorchNumpyConverter
        >>> converter = TorchNumpyConverter()
        >>> converter.from_numpy(np.array([1, 2], dtype=">i2"))
        tensor([1, 2], dtype=torch.int16)
        >>> converter.to_numpy(converter.from_numpy(np.zeros((2, 3)))).shape
        (2, 3)
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.device = None if device is None else torch.device(device)

    def _node(self) -> Node:
        return Node(f"TorchNumpyConverter({self.device or 'host memory'})")

    def from_numpy(self, array: NumpyArray) -> Tensor:
        """The values of an array, in its memory where that can be written to and lies in a row.

        Args:
            array: Of any shape, order of bytes and strides.

        Returns:
            A tensor of its shape and dtype, on `device`.

        Raises:
            ArgumentTypeError: `array` is no numpy array.
            DtypeError: torch has no such dtype.
        """
        if not isinstance(array, (np.ndarray, np.generic)):
            raise ArgumentTypeError(f"array must be a numpy array, got {type(array).__name__}")
        tensor = tensor_of_array(array, "array")
        return tensor if self.device is None else tensor.to(self.device)

    def to_numpy(self, tensor: Tensor) -> NumpyArray:
        """The values of a tensor in host memory, without its graph.

        Raises:
            ArgumentTypeError: `tensor` is none.
            DtypeError: numpy has no such dtype, as for bfloat16.
        """
        if not isinstance(tensor, Tensor):
            raise ArgumentTypeError(f"tensor must be a torch.Tensor, got {type(tensor).__name__}")
        host = tensor.detach().cpu().resolve_conj().resolve_neg()
        try:
            return host.numpy()
        except TypeError as error:
            raise DtypeError(
                f"tensor is {tensor.dtype}, and numpy has no such dtype: convert it with "
                ".to(torch.float32)"
            ) from error
