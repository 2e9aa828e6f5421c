"""TensorOperator and TensorDictOperator: the contract that every operator keeps."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeVar, cast, overload

import torch
from torch import Tensor

from hessops.copies import Copyable
from hessops.errors import (
    ArgumentError,
    ArgumentTypeError,
    DeviceError,
    DtypeError,
    MemoryLimitError,
    MissingInverseError,
    NonFiniteProductError,
    ShapeError,
    StructureError,
)
from hessops.interop.scipy import as_linear_operator
from hessops.isolation import isolated
from hessops.operators.linearized import GraphMemory, Linearization
from hessops.printed import Node, Printed, short_dtype
from hessops.processes import ONE_PROCESS, Processes
from hessops.space import ParameterSpace
from hessops.validation import (
    available_bytes,
    checked_count,
    checked_number,
    checked_rows,
    is_finite,
    resolved_device,
)

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

_Inverse = TypeVar("_Inverse", bound="TensorOperator")

# Rows of the identity that go through one application in `to_dense`.
DENSE_CHUNK_BYTES = 2**28


class TensorOperator(Copyable, Printed, ABC):
    r"""A linear map A on :math:`R^n`, known by its products with vectors.

    A subclass states size, dtype and device to this constructor and defines *one* hook:
    ``_apply_rows(rows)`` for a stack ``(k, n)``, k >= 1, whose row i becomes A times row i, or
    ``_apply_vector(vector)`` for one ``(n,)`` vector. All else follows: checks, `apply`, ``@``, the
    algebra, `to_dense`, `to_scipy`, `inverse`. Further hooks where they apply: ``_move(device)``
    for `to`, ``_apply_rows_adjoint(rows)`` for `T` of a map that is not symmetric,
    ``_closed_form_inverse(shift)`` for `inverse`, ``_exact_logdet(scale, shift)`` for
    `hessops.estimators.logdet`, and ``_children()`` for what the operator is made of.
    `hessops.testing.check_operator` tests a subclass.

    Args:
        input_size: n.
        dtype: Dtype of the vectors, a real floating-point one.
        device: Where products are computed.
        symmetric: Whether A = Aᵀ; ``None`` for unknown.
        positive_semidefinite: Whether vᵀAv >= 0 for all v; ``None`` for unknown.
        space: The parameters that the entries of a vector stand for, if they do: it makes
            `apply_to_dict` work.

    Example:
        >>> import torch
        >>> from hessops import TensorOperator
        >>> class Reversal(TensorOperator):
        ...     def __init__(self, size):
        ...         super().__init__(size, torch.float32, "cpu", symmetric=True)
        ...
        ...     def _apply_rows(self, rows):
        ...         return rows.flip(1)
        >>> A = Reversal(3)
        >>> A.apply(torch.tensor([1.0, 2.0, 3.0]))
        tensor([3., 2., 1.])
        >>> (2 * A + A @ A).to_dense()
        tensor([[1., 0., 2.],
                [0., 3., 0.],
                [2., 0., 1.]])
    """

    _algebra: ClassVar[Algebra]
    # numpy scalars would try to turn an operator into an array before asking it.
    __array_ufunc__: ClassVar[None] = None

    def __init__(
        self,
        input_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        symmetric: bool | None = None,
        positive_semidefinite: bool | None = None,
        space: ParameterSpace | None = None,
    ) -> None:
        _require_hook(type(self))
        if not dtype.is_floating_point:
            raise DtypeError(f"dtype must be a real floating-point one, got {dtype}")
        if input_size < 1:
            raise ArgumentError(f"input_size must be >= 1, got {input_size}")
        self._input_size = input_size
        self._dtype = dtype
        self._device = resolved_device(device)
        self._symmetric = symmetric
        self._positive_semidefinite = positive_semidefinite
        self._space = space

    # --- what a subclass defines ---------------------------------------------------------

    def _apply_rows(self, rows: Tensor) -> Tensor:
        """The hook for a stack: row i of the result is A times row i of `rows`, ``(k, n)``."""
        return torch.stack([self._apply_vector(row) for row in rows])

    def _apply_vector(self, vector: Tensor) -> Tensor:
        """The hook for one vector ``(n,)``, for operators without one for stacks."""
        return self._apply_rows(vector.unsqueeze(0))[0]

    def _apply_rows_adjoint(self, rows: Tensor) -> Tensor:
        """The hook for Aᵀ."""
        raise no_adjoint(self)

    def _move(self, device: torch.device) -> TensorOperator:
        """The hook for `to`: the same operator on another device."""
        raise DeviceError(
            f"{type(self).__name__} cannot be moved to {device}: it defines no _move(device)"
        )

    def _copy_on(self, device: torch.device) -> Self:
        """A shallow copy that says it is on `device`; a `_move` moves its parts into it."""
        moved = copy.copy(self)
        moved._device = device
        moved._space = self._space_on(device)
        return moved

    def _space_on(self, device: torch.device) -> ParameterSpace | None:
        return self._space.to(device) if self._space else None

    def _closed_form_inverse(self, shift: float) -> TensorOperator | None:
        """The hook for `inverse`: (A + shift·I)⁻¹ in closed form, or ``None``."""
        return None

    def _exact_logdet(self, scale: float, shift: float) -> float | None:
        """The hook for `logdet`: log det(scale·A + shift·I) by a formula, or ``None``.

        Raises:
            StructureError: scale·A + shift·I is known not to be positive definite.
            SingularOperatorError: It is singular to working precision.
        """
        return None

    def _identity_factor(self) -> float | None:
        """The hook for simplifications: c where the operator is c·I, else ``None``."""
        return None

    def _without_shift(self) -> tuple[TensorOperator, float]:
        """The hook for sketches: B and c with A = B + c·I, c as large as is evident."""
        return self, 0.0

    def _exact_eigenvalues(self) -> Tensor | None:
        """The hook for estimators: the eigenvalues, ``(n,)`` float64, of a symmetric operator.

        Where they are at hand without a product, else ``None``; so too the three hooks below.
        """
        return None

    def _exact_diagonal(self) -> Tensor | None:
        """The hook for estimators: the diagonal, ``(n,)`` float64."""
        return None

    def _exact_trace(self) -> float | None:
        """The hook for estimators: the trace, where it does not follow from the two above."""
        known = self._exact_eigenvalues()
        if known is None:
            known = self._exact_diagonal()
        return None if known is None else known.sum().item()

    def _exact_squared_norm(self) -> float | None:
        """The hook for estimators: the square of the Frobenius norm."""
        known = self._exact_eigenvalues()
        return None if known is None else known.square().sum().item()

    def _linear_terms(self) -> Sequence[tuple[float, TensorOperator]]:
        """The hook for estimators: c and B of each term, where A is a sum of multiples c·B."""
        return ((1.0, self),)

    def _children(self) -> Sequence[TensorOperator]:
        """The operators that this one is made of, for `refresh` and the printed tree."""
        return ()

    def _linearized(self, call: Linearization[TensorOperator]) -> TensorOperator:
        """The hook for `linearize`: the same operator with what speeds up its products."""
        return self

    def _in_precision(self, dtype: torch.dtype) -> TensorOperator:
        """The hook for `in_precision`: itself where there are no products in lower precision."""
        return self

    def _label(self) -> str:
        """The operator's own line in the printed tree, without size, dtype and device."""
        return type(self).__name__.lstrip("_")

    # --- what it is ----------------------------------------------------------------------

    @property
    def input_size(self) -> int:
        """n, the length of the vectors."""
        return self._input_size

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return (self._input_size, self._input_size)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where products are computed and results lie."""
        return self._device

    @property
    def symmetric(self) -> bool | None:
        """Whether A = Aᵀ: yes, no, or ``None`` for unknown."""
        return self._symmetric

    @property
    def positive_semidefinite(self) -> bool | None:
        """Whether vᵀAv >= 0 for all v: yes, no, or ``None`` for unknown."""
        return self._positive_semidefinite

    @property
    def space(self) -> ParameterSpace | None:
        """The parameters that the entries of a vector stand for, if they do."""
        return self._space

    # --- products ------------------------------------------------------------------------

    def apply(self, tensor: Tensor) -> Tensor:
        """A times a vector ``(n,)``, or times every row of a ``(k, n)`` stack.

        Args:
            tensor: Of the operator's dtype; it is moved to the operator's device.

        Returns:
            A tensor of the shape of `tensor` on the operator's device, without a graph.

        Raises:
            ShapeError: Another trailing size, or neither one nor two dimensions.
            DtypeError: Another dtype; nothing is cast silently.
            NonFiniteError: NaN or infinity in `tensor`, or in the product
                (`NonFiniteProductError`).
        """
        with isolated(self.device):
            rows = checked_rows(tensor, self.input_size, self.dtype, self.device)
            result = self._product(rows)
        if not is_finite(result):
            raise NonFiniteProductError(
                f"{type(self).__name__}: the product is NaN or infinite for finite vectors; check "
                f"the scale of parameters and data, or use a wider dtype than {self.dtype}"
            )
        return result if tensor.ndim == 2 else result[0]

    def _product(self, rows: Tensor) -> Tensor:
        """Products with validated rows ``(k, n)``, for operators that are built on this one.

        Raises:
            ShapeError: The hook maps them to another shape or dtype.
            ArgumentError: The hook writes to its argument.
        """
        if len(rows) == 0:
            return torch.zeros_like(rows)
        version = rows._version
        result = self._apply_rows(rows).detach()
        if result.shape != rows.shape or result.dtype != rows.dtype:
            raise ShapeError(
                f"{type(self).__name__} maps rows of shape {tuple(rows.shape)} and {rows.dtype} to "
                f"{tuple(result.shape)} and {result.dtype}: its hook does not keep the contract"
            )
        if rows._version != version:
            raise ArgumentError(
                f"the hook of {type(self).__name__} writes to its argument; return a new tensor"
            )
        return result

    def _adjoint_product(self, rows: Tensor) -> Tensor:
        """Products of validated rows with Aᵀ."""
        return self._product(rows) if self.symmetric else self._apply_rows_adjoint(rows)

    def apply_to_dict(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A times a dictionary ``{name: shape}``, or a stack ``{name: (k, *shape)}``.

        The order of the keys means nothing, and any name of a tied parameter is accepted. The
        result has the first names, in the order of the space, and the leading dimension of the
        input.

        Raises:
            StructureError: The operator does not act on named parameters.
            ParameterNameError: A missing, unknown or doubly named entry.
            ShapeError, DtypeError, NonFiniteError: An entry that does not fit.
        """
        if self.space is None:
            raise StructureError(
                f"{type(self).__name__} acts on flat vectors only: it has no parameter space; "
                "use apply"
            )
        return self.space.unflatten(self.apply(self.space.flatten(tensors)))

    @property
    def input_dict_structure(self) -> dict[str, torch.Size]:
        """Name -> shape of the entries that `apply_to_dict` takes, in flat order."""
        if self.space is None:
            raise StructureError(f"{type(self).__name__} has no parameter space")
        return dict(self.space.shapes)

    # --- algebra -------------------------------------------------------------------------

    @overload
    def __matmul__(self, other: TensorOperator) -> TensorOperator: ...

    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...

    def __matmul__(self, other: TensorOperator | Tensor) -> TensorOperator | Tensor:
        """A @ B for operators; A @ X for a vector ``(n,)`` or columns ``(n, k)``."""
        if isinstance(other, TensorOperator):
            return self._algebra.composed(self, other)
        if not isinstance(other, Tensor):
            return NotImplemented
        if other.ndim == 2:
            if len(other) != self.input_size:
                raise ShapeError(
                    f"the right factor has shape {tuple(other.shape)}, expected "
                    f"({self.input_size}, k)"
                )
            return self.apply(other.T).T
        return self.apply(other)

    def __rmatmul__(self, other: Tensor) -> Tensor:
        """X @ A for a vector ``(n,)`` or rows ``(k, n)``."""
        return self.T.apply(other) if isinstance(other, Tensor) else NotImplemented

    def __add__(self, other: TensorOperator) -> TensorOperator:
        """A + B; with a multiple of the identity, `shift`."""
        if not isinstance(other, TensorOperator):
            return NotImplemented
        return self._algebra.added(self, other)

    def __sub__(self, other: TensorOperator) -> TensorOperator:
        """A - B."""
        return self + (-other) if isinstance(other, TensorOperator) else NotImplemented

    def __neg__(self) -> TensorOperator:
        """-A."""
        return self._algebra.scaled(self, -1.0)

    def __mul__(self, factor: float) -> TensorOperator:
        """c·A for a number c."""
        if isinstance(factor, TensorOperator):
            raise ArgumentTypeError("A * B is not defined for operators; use A @ B")
        return self._algebra.scaled(self, checked_number(factor, "factor"))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> TensorOperator:
        """A / c for a number c that is not zero."""
        number = checked_number(divisor, "divisor")
        if number == 0:
            raise ArgumentError("divisor must not be zero")
        return self._algebra.scaled(self, 1 / number)

    def shift(self, value: float) -> TensorOperator:
        """A + value·I."""
        return self._algebra.shifted(self, checked_number(value, "value"))

    @property
    def T(self) -> TensorOperator:  # as in torch and numpy
        """Aᵀ: A itself when it is symmetric.

        Raises:
            StructureError: A is not known to be symmetric and has no adjoint.
        """
        return self if self.symmetric else self._algebra.transposed(self)

    @overload
    def inverse(self, solver: None = None) -> TensorOperator: ...

    @overload
    def inverse(self, solver: Callable[[TensorOperator], _Inverse]) -> _Inverse: ...

    def inverse(
        self, solver: Callable[[TensorOperator], TensorOperator] | None = None
    ) -> TensorOperator:
        """A⁻¹: in closed form where there is one, or by a solver.

        Args:
            solver: A class of solver, or one with arguments bound to it:
                ``A.inverse(partial(CgOperator, rtol=1e-6))``.

        Raises:
            MissingInverseError: There is no closed form and no solver was given.
            SingularOperatorError: The closed form does not exist.
        """
        if solver is not None:
            solved = solver(self)
            if not isinstance(solved, TensorOperator):
                raise ArgumentTypeError(
                    f"solver must map an operator to an operator, got {type(solved).__name__}"
                )
            return solved
        closed = self._closed_form_inverse(0.0)
        if closed is None:
            raise MissingInverseError(
                f"{type(self).__name__} has no inverse in closed form; pass a solver: "
                "A.inverse(partial(CgOperator, rtol=1e-6))"
            )
        return self._algebra.inverted(self, closed)

    # --- elsewhere -----------------------------------------------------------------------

    def linearize(self, max_bytes: int | None = None) -> TensorOperator:
        r"""The same operator at fixed parameters, for many products: it retains graphs.

        A product with a Hessian runs the model forward and backward, and backward once more through
        the graph of the gradient, :math:`v \mapsto \nabla\langle\nabla L, v\rangle`. Of that only
        the last part depends on v. What comes back retains the graphs of the batches, made in its
        first product, so that the others need that part alone. It does so for data that are kept on
        the device (``cache=``); where not all graphs fit, some batches are traversed anew in every
        product. Sums, multiples and shifts are linearized in their parts; an operator that is not
        one of a model is returned as it is. On a CPU the operations of that last part are recorded,
        compared with autograd for a random vector, and from then on replayed without it, in memory
        that is laid out beforehand.

        The parameters are those of now: `refresh` of this operator does not reach the new one,
        which has its own. Krylov solvers, eigen-solvers and sketches do this by themselves.

        Args:
            max_bytes: Memory of all graphs and records; ``None`` takes 1 GiB, or what ``cache=``
                allows where that is less.

        Returns:
            An operator with the same products up to rounding.

        Raises:
            ArgumentTypeError, ArgumentError: `max_bytes` is not a number of bytes >= 0.

        Example:
            >>> import torch
            >>> from hessops import HessianOperator
            >>> model = torch.nn.Linear(2, 1, bias=False)
            >>> data = [(torch.eye(2), torch.zeros(2, 1))]
            >>> H = HessianOperator(model, torch.nn.MSELoss(), data).linearize()
            >>> for _ in range(3):
            ...     H.apply(torch.tensor([1.0, 2.0]))
            tensor([1., 2.])
            tensor([1., 2.])
            tensor([1., 2.])
            >>> "1 of 1 graphs retained" in repr(H)
            True
        """
        limit = None if max_bytes is None else checked_count(max_bytes, "max_bytes", minimum=0)
        return self._linearized(Linearization(GraphMemory(limit)))

    def in_precision(self, dtype: torch.dtype) -> TensorOperator:
        r"""The same operator with its products computed in a lower precision.

        Operators of a model take rounded copies of model, loss, data and vectors, and widen what
        comes out: the operator acts on vectors of the same dtype and scale, with an error of about
        :math:`c\,\epsilon\,\lVert A\rVert \lVert v\rVert` for the :math:`\epsilon` of `dtype`. Sums
        over batches, multiples and shifts, and parts that are not of a model, stay in the precision
        of the vectors. `IterativeRefinementOperator` solves with such products to full precision.

        Args:
            dtype: ``torch.float32`` for an operator of float64, ``torch.bfloat16`` for either.

        Raises:
            ArgumentTypeError, ArgumentError: `dtype` is none of these, or not lower.
            StructureError: No part has products in lower precision.
            NonFiniteError: A parameter or buffer is beyond the range of `dtype`.
            HessopsError: In the first pass, where the rounded model does not keep what
                `Objective.check` asks for.

        Example:
            >>> import torch
            >>> from hessops import HessianOperator
            >>> model = torch.nn.Linear(1, 1, bias=False).double()
            >>> x = torch.full((4, 1), 1.01, dtype=torch.float64)  # 1.0078125 in bfloat16
            >>> H = HessianOperator(model, torch.nn.MSELoss(), [(x, torch.zeros_like(x))])
            >>> one = torch.ones(1, dtype=torch.float64)
            >>> H.apply(one), H.in_precision(torch.bfloat16).apply(one)
            (tensor([2.0402], dtype=torch.float64), tensor([2.0312], dtype=torch.float64))
        """
        lower = self._in_precision(dtype)
        if lower is self:
            raise StructureError(
                f"{type(self).__name__} has no products in lower precision: it is not an operator "
                "of a model, nor a sum, multiple, shift or product of such ones"
            )
        return lower

    def to(self, device: torch.device | str) -> Self:
        """The same operator on another device; parts and fitted state move along."""
        resolved = resolved_device(device)
        if resolved == self.device:
            return self
        # A sum moves to a sum, and so does each kind; the hook need not say so.
        return cast("Self", self._move(resolved))

    def refresh(self) -> Self:
        """Lets every part take a new copy of the model it was built from; returns itself."""
        for child in self._children():
            child.refresh()
        return self

    def to_dense(self, max_bytes: int | None = None) -> Tensor:
        """The matrix, ``(n, n)``, by products with the rows of the identity in chunks.

        Args:
            max_bytes: Refuse a larger matrix; ``None`` takes half of the free memory.

        Raises:
            MemoryLimitError: The matrix would not fit.
        """
        size, itemsize = self.input_size, self.dtype.itemsize
        # What is free may differ from process to process.
        with self.processes.together():
            limit = available_bytes(self.device) // 2 if max_bytes is None else max_bytes
            if size * size * itemsize > limit:
                raise MemoryLimitError(
                    f"a dense ({size}, {size}) {self.dtype} matrix takes "
                    f"{size * size * itemsize:,} bytes, more than the {limit:,} allowed; use "
                    "products, or raise max_bytes"
                )
        # Row i of the products is A e_i, which is column i.
        columns = torch.empty(size, size, dtype=self.dtype, device=self.device)
        chunk = max(1, min(size, DENSE_CHUNK_BYTES // (size * itemsize)))
        for start in range(0, size, chunk):
            stop = min(start + chunk, size)
            rows = torch.zeros(stop - start, size, dtype=self.dtype, device=self.device)
            rows.diagonal(start).fill_(1)
            columns[start:stop] = self.apply(rows)
        return columns.T.contiguous()

    @property
    def processes(self) -> Processes:
        """Who takes part in a product: this process, or those that its data are sharded over."""
        several = (child.processes for child in self._children())
        return next((some for some in several if some is not ONE_PROCESS), ONE_PROCESS)

    def to_scipy(self) -> LinearOperator[Any]:
        """A `scipy.sparse.linalg.LinearOperator` with the operator's own dtype.

        Raises:
            DtypeError: bfloat16, which numpy does not have.

        Example:
            >>> import torch
            >>> from hessops import DiagonalOperator
            >>> from scipy.sparse.linalg import eigsh
            >>> A = DiagonalOperator(torch.arange(1.0, 9.0))
            >>> eigsh(A.to_scipy(), k=1, return_eigenvectors=False).round(3)
            array([8.], dtype=float32)
        """
        return as_linear_operator(self)

    def _node(self) -> Node:
        size = f"{self.input_size} x {self.input_size}"
        note = f"{size}, {short_dtype(self.dtype)}, {self.device}"
        return Node(self._label(), note, self._printed_parts(), of=self)

    def _printed_parts(self) -> Sequence[Node | Printed]:
        """What is printed below the operator's own line."""
        return self._children()


def _require_hook(kind: type[TensorOperator]) -> None:
    """Refuses a class that defines neither hook for products, as abstract methods would.

    It is no ``__new__``: editors and `inspect.signature` would show its arguments.
    """
    defines_rows = kind._apply_rows is not TensorOperator._apply_rows
    if not defines_rows and kind._apply_vector is TensorOperator._apply_vector:
        raise TypeError(
            f"Can't instantiate abstract class {kind.__name__}: define _apply_rows for a stack "
            "of rows, or _apply_vector for one vector"
        )


class CompositeOperator(TensorOperator):
    """An operator made of others; abstract.

    A subclass defines the product and ``_mapped(function)``, the same operator made of what a
    function makes of its parts. `to`, `linearize` and `in_precision` follow.

    Example:
        >>> import torch
        >>> from hessops import CompositeOperator, DiagonalOperator
        >>> class Squared(CompositeOperator):
        ...     def __init__(self, operator):
        ...         super().__init__(operator.input_size, operator.dtype, operator.device)
        ...         self.operator = operator
        ...
        ...     def _apply_rows(self, rows):
        ...         return self.operator.apply(self.operator.apply(rows))
        ...
        ...     def _mapped(self, function):
        ...         return Squared(function(self.operator))
        >>> Squared(DiagonalOperator(torch.tensor([2.0, 3.0]))).linearize().apply(torch.ones(2))
        tensor([4., 9.])
    """

    @abstractmethod
    def _mapped(self, function: Callable[[TensorOperator], TensorOperator]) -> TensorOperator:
        """The hook: the same operator, made of what a function makes of its parts."""

    def _move(self, device: torch.device) -> TensorOperator:
        return self._mapped(lambda part: part.to(device))

    def _linearized(self, call: Linearization[TensorOperator]) -> TensorOperator:
        return self._mapped(lambda part: call.once(part, lambda: part._linearized(call)))

    def _in_precision(self, dtype: torch.dtype) -> TensorOperator:
        # Once for a part that occurs twice, as in A @ A.
        lower = {id(part): part._in_precision(dtype) for part in self._children()}
        if all(lower[id(part)] is part for part in self._children()):
            return self
        return self._mapped(lambda part: lower[id(part)])


def no_adjoint(operator: TensorOperator) -> StructureError:
    """The error for an operator without a transpose."""
    return StructureError(
        f"{type(operator).__name__} is not known to be symmetric and defines no adjoint "
        "(_apply_rows_adjoint), so that it has no transpose"
    )


class TensorDictOperator(TensorOperator):
    """A `TensorOperator` on the parameters of a model: it states a `ParameterSpace`.

    Args:
        space: The parameters; size, dtype and device follow from it.
        symmetric: Whether A = Aᵀ; ``None`` for unknown.
        positive_semidefinite: Whether vᵀAv >= 0 for all v; ``None`` for unknown.

    Example:
        >>> import torch
        >>> from hessops import ParameterSpace, TensorDictOperator
        >>> class Doubling(TensorDictOperator):
        ...     def _apply_rows(self, rows):
        ...         return 2 * rows
        >>> A = Doubling(ParameterSpace.from_model(torch.nn.Linear(2, 1)), symmetric=True)
        >>> A.apply_to_dict({"bias": torch.ones(1), "weight": torch.zeros(1, 2)})
        {'weight': tensor([[0., 0.]]), 'bias': tensor([2.])}
    """

    def __init__(
        self,
        space: ParameterSpace,
        *,
        symmetric: bool | None = None,
        positive_semidefinite: bool | None = None,
    ) -> None:
        if not isinstance(space, ParameterSpace):
            raise ArgumentTypeError(f"space must be a ParameterSpace, got {type(space).__name__}")
        super().__init__(
            space.size,
            space.dtype,
            space.device,
            symmetric=symmetric,
            positive_semidefinite=positive_semidefinite,
            space=space,
        )

    @property
    def space(self) -> ParameterSpace:
        """The parameters that the entries of a vector stand for."""
        if self._space is None:
            raise StructureError(f"{type(self).__name__} states no parameter space")
        return self._space


class Algebra(Protocol):
    """How operators are combined; installed by `hessops.operators.algebra`.

    The combinations are operators themselves, defined above this file; an operator reaches them
    through this protocol, so that no import runs in a circle.
    """

    def added(self, left: TensorOperator, right: TensorOperator) -> TensorOperator:
        """A + B."""

    def scaled(self, operator: TensorOperator, factor: float) -> TensorOperator:
        """c·A."""

    def composed(self, left: TensorOperator, right: TensorOperator) -> TensorOperator:
        """A @ B."""

    def shifted(self, operator: TensorOperator, shift: float) -> TensorOperator:
        """A + shift·I."""

    def transposed(self, operator: TensorOperator) -> TensorOperator:
        """Aᵀ."""

    def inverted(self, operator: TensorOperator, closed_form: TensorOperator) -> TensorOperator:
        """A⁻¹, given the map that computes it."""
