"""Images of points, inlined as PNG."""

from __future__ import annotations

import base64
from io import BytesIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hessops.errors import NonFiniteError, ShapeError
from hessops.reporting.markup import Html, element

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

# Sides are reduced to this many pixels; images of fewer than the other show their pixels.
MOST_PIXELS, FEW_PIXELS = 192, 48


def data_uri(content: bytes, kind: str) -> str:
    """A file within the page."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def as_image(value: object, what: str) -> Floats | Bytes:
    """An image as ``(height, width, channels)``, of bytes or of numbers as they are.

    Args:
        value: ``(height, width)``, ``(channels, height, width)`` or ``(height, width, channels)``,
            with 1, 3 or 4 channels.
        what: What it is, for messages.

    Raises:
        ShapeError: It has another shape.
        NonFiniteError: It holds NaN or infinity.
    """
    found = (
        value.detach().cpu() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    )
    if found.ndim == 2:
        found = found.unsqueeze(2)
    elif found.ndim == 3 and found.shape[0] in (1, 3, 4):  # channels first, as in torch
        found = found.permute(1, 2, 0)
    if found.ndim != 3 or found.shape[2] not in (1, 3, 4) or not found.numel():
        raise ShapeError(
            f"{what} is no image: its shape is {tuple(found.shape)}, expected (height, width) or "
            "1, 3 or 4 channels of that; images may be a function that makes one from an input, as "
            "in images=lambda x: x.reshape(28, 28)"
        )
    if found.dtype is torch.uint8:
        return found.numpy()
    numbers = found.double()
    if not bool(numbers.isfinite().all()):
        raise NonFiniteError(f"{what} holds NaN or infinite values")
    return numbers.numpy()


def has_many_pixels(image: Floats | Bytes) -> bool:
    """Whether an image is more than a mosaic of a few pixels."""
    return bool(max(image.shape[:2]) > FEW_PIXELS)


def image_element(image: Floats | Bytes, low: float, high: float, alt: str) -> Html:
    """An image, with numbers from `low` to `high` shown from black to white."""
    from matplotlib.image import imsave

    pixels = _as_bytes(_reduced(image), low, high)
    if pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    buffer = BytesIO()
    imsave(buffer, pixels, format="png")
    height, width, _ = pixels.shape
    kind = None if has_many_pixels(pixels) else "few-pixels"
    source = data_uri(buffer.getvalue(), "png")
    return element("img", src=source, alt=alt, width=width, height=height, class_=kind)


def _reduced(image: Floats | Bytes) -> Floats | Bytes:
    """An image of at most so many pixels on a side, each the mean of those it stands for."""
    largest = max(image.shape[:2])
    if largest <= MOST_PIXELS:
        return image
    rows, columns = (max(1, round(side * MOST_PIXELS / largest)) for side in image.shape[:2])
    planes = torch.from_numpy(image).double().permute(2, 0, 1)
    small = (
        torch.nn.functional.adaptive_avg_pool2d(planes, (rows, columns)).permute(1, 2, 0).numpy()
    )
    return small.round().astype(np.uint8) if image.dtype == np.uint8 else small


def _as_bytes(image: Floats | Bytes, low: float, high: float) -> Bytes:
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image, np.uint8)
    scaled = (image - low) / (high - low) if high > low else np.zeros_like(image)
    return (255 * scaled.clip(0, 1)).round().astype(np.uint8)
