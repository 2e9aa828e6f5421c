"""Files of tensors and plain values: whole or not there, and read without running any code."""

from __future__ import annotations

import hashlib
import os
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from hessops.errors import StoreError

# What is being written has this suffix until it is whole; a process that is killed leaves it.
PARTIAL = ".partial"


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes to a file beside `path` and renames it, so that `path` is the old or the new one.

    Raises:
        OSError: Of the file system.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def plain_content(path: Path, what: str) -> object:
    """What `torch.save` wrote; nothing but tensors and plain values is ever unpickled.

    Args:
        path: A file.
        what: What it is taken for, for the message.

    Raises:
        StoreError: It is something else.
        FileNotFoundError, PermissionError, IsADirectoryError: Of the file system.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what torch says of files of others
            return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # torch has no error of its own for what is no file of its own
        raise StoreError(f"{path} is not a file of {what}: {error}") from error


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes, dtypes and bits.

    Example:
        >>> import torch
        >>> from hessops.files import digest_of_tensors
        >>> zero, minus = torch.zeros(1), -torch.zeros(1)
        >>> digest_of_tensors({"a": zero}) == digest_of_tensors({"a": minus})
        False
    """
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
