"""scipy's `LinearOperator` around any operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from hessops.errors import DtypeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NUMPY_DTYPES = {torch.float64: np.float64, torch.float32: np.float32, torch.float16: np.float16}


class AppliesToRows(Protocol):
    """What of an operator is needed here."""

    @property
    def input_size(self) -> int:
        """n."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors."""

    @property
    def symmetric(self) -> bool | None:
        """Whether the operator is its own adjoint."""

    @property
    def T(self) -> AppliesToRows:
        """The adjoint."""

    def apply(self, tensor: Tensor) -> Tensor:
        """Products with rows."""


def as_linear_operator(operator: AppliesToRows) -> LinearOperator[Any]:
    """A `scipy.sparse.linalg.LinearOperator` of the operator's own dtype.

    ``matvec`` and ``matmat`` take one pass over the data each, and copy vectors between numpy and
    the operator's device. ``rmatvec`` and ``rmatmat`` use the adjoint. Real arrays are converted to
    the operator's dtype, in which all products are computed; complex ones are applied to by parts.

    Args:
        operator: A `hessops.TensorOperator` of size n.

    Returns:
        A linear operator of shape ``(n, n)``.

    Raises:
        DtypeError: bfloat16, which numpy does not have.

    Example:
        >>> import torch
        >>> from scipy.sparse.linalg import eigsh
        >>> from hessops import DiagonalOperator
        >>> diagonal = DiagonalOperator(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
        >>> eigsh(diagonal.to_scipy(), k=1, return_eigenvectors=False).round(6)
        array([4.])
    """
    dtype = operator.dtype
    if dtype not in _NUMPY_DTYPES:
        raise DtypeError(f"numpy has no {dtype}; convert the model to float32 or float64")

    def columns(apply_from: AppliesToRows, array: NDArray[Any]) -> NDArray[Any]:
        if np.iscomplexobj(array):
            # The operator is real, so that it acts on both parts alone.
            return columns(apply_from, array.real) + 1j * columns(apply_from, array.imag)
        flat = array.reshape(operator.input_size, -1)
        rows = torch.from_numpy(flat.T.astype(_NUMPY_DTYPES[dtype]))
        return apply_from.apply(rows).cpu().numpy().T.reshape(array.shape)

    def matvec(array: NDArray[Any]) -> NDArray[Any]:
        return columns(operator, array)

    def rmatvec(array: NDArray[Any]) -> NDArray[Any]:
        return columns(operator.T, array)

    return LinearOperator(
        shape=(operator.input_size, operator.input_size),
        matvec=matvec,
        rmatvec=rmatvec,
        matmat=matvec,
        rmatmat=rmatvec,
        dtype=np.dtype(_NUMPY_DTYPES[dtype]),
    )
