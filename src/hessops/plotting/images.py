"""Images of several forms, as matplotlib takes them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessops.errors import ArgumentError, ArgumentTypeError, ShapeError
from hessops.plotting.arguments import Floats, Ints, checked_numbers

CHANNELS = (1, 3)
LARGEST_INTEGER = 255


def chosen_images(images: object, points: Ints, count: int) -> Floats:
    """Some of `count` images, ``(k, H, W)`` or ``(k, H, W, 3)``; the others are not looked at.

    Raises:
        ArgumentTypeError: Neither a tensor nor an array.
        ShapeError: Another number of images, or a shape that no image has.
        ArgumentError, NonFiniteError: As of `_checked_range` and `checked_numbers`.
    """
    if not isinstance(images, Tensor | np.ndarray):
        raise ArgumentTypeError(f"images must be a tensor or array, got {type(images).__name__}")
    if images.ndim not in (3, 4) or len(images) != count:
        raise ShapeError(
            f"images has shape {tuple(images.shape)}, expected ({count}, H, W) or one more "
            f"dimension of 1 or 3 channels: one image for each of {count} scores"
        )
    where = torch.as_tensor(points, device=images.device) if isinstance(images, Tensor) else points
    return _channels_last(_checked_range(images[where], images.ndim, "images"))


def single_image(image: object, like: object) -> Floats:
    """One image in the form of others, ``(1, H, W)`` or ``(1, H, W, 3)``.

    Raises:
        ArgumentTypeError: Neither a tensor nor an array.
        ShapeError: Another shape than one of `like`.
        ArgumentError, NonFiniteError: As of `chosen_images`.
    """
    assert isinstance(like, Tensor | np.ndarray)
    if not isinstance(image, Tensor | np.ndarray):
        raise ArgumentTypeError(f"test_image must be a tensor or array, got {type(image).__name__}")
    expected = tuple(like.shape[1:])
    if tuple(image.shape) not in (expected, (1, *expected)):
        raise ShapeError(f"test_image has shape {tuple(image.shape)}, images have {expected}")
    stack: Tensor | NDArray[np.generic] = image.reshape(1, *expected)
    return _channels_last(_checked_range(stack, like.ndim, "test_image"))


def scaled_alike(parts: list[Floats]) -> list[Floats]:
    """The same images within [0, 1]: as they are, or by the extremes of all of them."""
    filled = [part for part in parts if part.size]
    if not filled:
        return parts
    low, high = min(part.min() for part in filled), max(part.max() for part in filled)
    if low >= 0 and high <= 1:
        return parts
    return [(part - low) / ((high - low) or 1.0) for part in parts]


def _checked_range(images: Tensor | NDArray[np.generic], ndim: int, name: str) -> Floats:
    """Floats as they are and integers divided by 255."""
    if not len(images):
        return np.empty(tuple(images.shape))
    numbers = checked_numbers(images, name, ndim=ndim)
    is_float = (
        images.is_floating_point() if isinstance(images, Tensor) else images.dtype.kind == "f"
    )
    if is_float:
        return numbers
    if numbers.min() < 0 or numbers.max() > LARGEST_INTEGER:
        raise ArgumentError(
            f"{name} holds integers from {numbers.min():g} to {numbers.max():g}; those of images "
            "lie between 0 and 255, and others are to be given as floats"
        )
    return numbers / LARGEST_INTEGER


def _channels_last(images: Floats) -> Floats:
    if images.ndim == 3:
        return images
    if images.shape[1] in CHANNELS:
        images = np.moveaxis(images, 1, -1)
    if images.shape[-1] not in CHANNELS:
        raise ShapeError(
            f"images of shape {images.shape[1:]} have neither 1 nor 3 channels, first or last"
        )
    return images[..., 0] if images.shape[-1] == 1 else images
