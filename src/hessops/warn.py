"""Warnings that point at the caller's own line, however deep the library is."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from pathlib import Path
from types import FrameType

import scipy
import torch

from hessops.errors import HessopsWarning

# Between a line of the caller and a warning lie frames of these alone: the library itself, and
# those that it hands its functions to.
_PASSED = (
    *(f"{Path(path).parent}{os.sep}" for path in (__file__, torch.__file__, scipy.__file__)),
    contextlib.__file__,
)


def warn(message: str, category: type[HessopsWarning]) -> None:
    """Warns at the innermost line that is not the library's.

    Args:
        message: What happened and what to do.
        category: See `hessops.errors`.

    Example:
        >>> import warnings
        >>> from hessops.errors import ConvergenceWarning
        >>> from hessops.warn import warn
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     warn("stopped short", ConvergenceWarning)
        >>> caught[0].filename.startswith("<doctest")
        True
    """
    warnings.warn(message, category, stacklevel=_level_of_caller())


def _level_of_caller() -> int:
    """The ``stacklevel`` of the caller's line, for `warn`."""
    level = 1
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_PASSED):
        level, frame = level + 1, frame.f_back
    return level
