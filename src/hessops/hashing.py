"""Hashes of tensors that are computed where they lie, without waiting for the device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

_INT_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Words that are mixed at once: a hash of a long vector needs no memory of its length.
_PIECE = 2**20


def words_of(tensor: Tensor) -> Tensor:
    """The bits of ``(n, ...)`` elements as ``(n, L)`` int64; ``(1, 1)`` of a scalar."""
    tensor = tensor.detach()
    tensor = tensor if tensor.ndim else tensor.unsqueeze(0)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    tensor = tensor.resolve_neg()
    flat = tensor.reshape(len(tensor), prod(tensor.shape[1:])).contiguous()
    words = flat.view(_INT_OF_SIZE[flat.element_size()]).to(torch.int64)
    # The sign and exponent of a float64 are its highest bits. A product with a weight would carry
    # most of them beyond 2^64 (two flipped signs would cancel), so they are put below as well.
    return words ^ ((words >> 32) & (2**32 - 1)) if flat.element_size() == 8 else words


def mixed(words: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014) on int64, which wrap modulo 2^64."""
    words = words + _signed(0x9E3779B97F4A7C15)
    words = (words ^ ((words >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    words = (words ^ ((words >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return words ^ ((words >> 31) & (2**33 - 1))


def hash_of_entries(tensor: Tensor) -> Tensor:
    """A 64-bit hash of the bits of a tensor in their order, shape ``()`` int64 on its device.

    Example:
        >>> import torch
        >>> from hessops.hashing import hash_of_entries
        >>> x = torch.tensor([1.0, 2.0])
        >>> bool(hash_of_entries(x) == hash_of_entries(x.flip(0)))
        False
    """
    flat = tensor.detach().reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(flat), _PIECE):
        words = words_of(flat[start : start + _PIECE])[:, 0]
        places = torch.arange(start, start + len(words), device=flat.device)
        total = total + mixed(words * (mixed(places) | 1)).sum()
    return total


def word_of_values(values: Sequence[object]) -> int:
    """A 64-bit hash of numbers and strings by their `repr`; 0 of none."""
    if not values:
        return 0
    digest = hashlib.sha256(repr(list(values)).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word
