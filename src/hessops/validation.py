"""Checks of vectors, numbers and flags that many arguments share."""

from __future__ import annotations

from math import isfinite
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor

from hessops.errors import (
    ArgumentError,
    ArgumentTypeError,
    DtypeError,
    NonFiniteError,
    ShapeError,
)
from hessops.isolation import is_transformed

# Where the system does not tell what is free.
ASSUMED_MEMORY_BYTES = 2**33


def checked_rows(
    tensor: object, size: int, dtype: torch.dtype, device: torch.device, name: str = "tensor"
) -> Tensor:
    """A ``(size,)`` vector or ``(k, size)`` stack as ``(k, size)`` rows on `device`.

    Raises:
        ArgumentTypeError: Not a tensor.
        ShapeError: Another number of dimensions or trailing size.
        DtypeError: Another dtype.
        NonFiniteError: NaN or infinity.
    """
    if not isinstance(tensor, Tensor):
        raise ArgumentTypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise ArgumentTypeError(f"{name} must be a dense tensor, got {tensor.layout}")
    if is_transformed(tensor):
        raise ArgumentTypeError(
            f"{name} belongs to a torch.func transform, through which operators have no "
            "derivative; use the functions of hessops.functional"
        )
    if tensor.ndim not in (1, 2) or tensor.shape[-1] != size:
        are_columns = tensor.ndim == 2 and tensor.shape[0] == size
        raise ShapeError(
            f"{name} has shape {tuple(tensor.shape)}, expected ({size},) or (k, {size})"
            + ("; vectors are rows: transpose it, or use A @ X for columns" if are_columns else "")
        )
    if tensor.dtype != dtype:
        raise DtypeError(
            f"{name} is {tensor.dtype}, expected {dtype}; convert it with .to({dtype})"
        )
    rows = tensor.detach().to(device)
    if rows.is_inference():
        rows = rows.clone()
    if not is_finite(rows):
        raise NonFiniteError(f"{name} holds NaN or infinite values")
    return rows if rows.ndim == 2 else rows.unsqueeze(0)


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; yes on the meta device, where there are none.

    Example:
        >>> import torch
        >>> from hessops.validation import is_finite
        >>> is_finite(torch.tensor([1.0, torch.nan])), is_finite(torch.full((2,), 3e38))
        (False, True)
    """
    # A sum is quick; only where it overflows it says nothing of the entries.
    if tensor.is_meta or bool(tensor.sum().isfinite()):
        return True
    return bool(tensor.isfinite().all())


def checked_number(
    value: object, name: str, *, minimum: float | None = None, exclusive: bool = False
) -> float:
    """A finite real number, at least or (with `exclusive`) above `minimum`.

    Raises:
        ArgumentTypeError: Not a number; booleans are none.
        ArgumentError: Not finite, or too small.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentTypeError(f"{name} must be a number, got {value!r}")
    number = float(value)
    if not isfinite(number):
        raise ArgumentError(f"{name} must be finite, got {number}")
    if minimum is not None and (number < minimum or (exclusive and number == minimum)):
        bound = (
            "positive"
            if exclusive and minimum == 0
            else f"{'>' if exclusive else '>='} {minimum:g}"
        )
        raise ArgumentError(f"{name} must be {bound}, got {number:g}")
    return number


def checked_regularization(value: object) -> float:
    """λ >= 0, where ``None`` is 0.

    Raises:
        ArgumentTypeError, ArgumentError: As of `checked_number`.
    """
    return 0.0 if value is None else checked_number(value, "regularization", minimum=0)


def checked_count(value: object, name: str, *, minimum: int = 1) -> int:
    """An integer at least `minimum`.

    Raises:
        ArgumentTypeError: Not an integer; booleans are none.
        ArgumentError: Too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"{name} must be an integer, got {value!r}")
    if value < minimum:
        raise ArgumentError(f"{name} must be >= {minimum}, got {value}")
    return value


def require_single_or_double(dtype: torch.dtype, name: str, method: str) -> None:
    """Refuses half precision, in which iterations lose their way.

    Raises:
        DtypeError: Another dtype than float32 and float64.
    """
    if dtype not in (torch.float32, torch.float64):
        raise DtypeError(f"{name} is {dtype}; {method} needs float32 or float64")


def resolved_device(device: torch.device | str) -> torch.device:
    """The device with its index: ``"cuda"`` means the current CUDA device."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if device.type == "cpu" else device


def available_bytes(device: torch.device) -> int:
    """Memory that is free on a device now; on the CPU, physical memory that is not in use."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    try:
        with Path("/proc/meminfo").open() as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return ASSUMED_MEMORY_BYTES


def checked_floating(tensor: object, name: str, *, ndim: int) -> Tensor:
    """A finite, real floating-point tensor with `ndim` dimensions.

    Raises:
        ArgumentTypeError, ShapeError, DtypeError, NonFiniteError: As their names say.
    """
    if not isinstance(tensor, Tensor):
        raise ArgumentTypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.ndim != ndim:
        raise ShapeError(f"{name} must have {ndim} dimension(s), got shape {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise DtypeError(f"{name} must be real floating point, got {tensor.dtype}")
    if not is_finite(tensor):
        raise NonFiniteError(f"{name} holds NaN or infinite values")
    return tensor
