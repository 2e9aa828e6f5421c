"""Products at fixed parameters, recorded once and computed again without autograd."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hessops.functional.checks import random_probes
from hessops.functional.products import LinearFunction, Stack
from hessops.functional.recording import NotRecordable, recorded
from hessops.functional.replay import Replay
from hessops.space import ParameterSpace

_LOGGER = logging.getLogger(__name__)


class ReplayedProducts:
    """A linear map of stacks; for one vector at a time, computed from a record of its operations.

    The first product with one vector is computed by autograd and recorded; the record is compared
    with autograd for a random vector. What is computed outside of torch's dispatcher (by numpy in a
    custom function, say) is missing from the record, and the comparison tells; such a map is
    computed as it is. Answers of the record and of autograd differ by rounding, so that one of them
    gives all answers. Products with several vectors at once are not recorded: on two small
    networks of seven, that was faster (1.4 times), and slower on others.

    Args:
        linear: The map, on the CPU.
        space: Where the vectors live.
        max_bytes: What the record may take beside the graph that it was made from.

    Example:
        >>> import torch
        >>> from hessops import ParameterSpace
        >>> from hessops.functional.replayed import ReplayedProducts
        >>> space = ParameterSpace.from_tensors({"x": torch.zeros(2)})
        >>> products = ReplayedProducts(lambda stack: {"x": 2 * stack["x"]}, space)
        >>> with products.one_at_a_time():
        ...     products({"x": torch.ones(1, 2)})
        {'x': tensor([[2., 2.]])}
    """

    def __init__(
        self, linear: LinearFunction, space: ParameterSpace, max_bytes: float = math.inf
    ) -> None:
        self._linear, self._space, self._max_bytes = linear, space, max_bytes
        self._replay: Replay | None = None
        self._is_tried = False
        self._lock = threading.Lock()

    @property
    def is_recorded(self) -> bool:
        """Whether there is a record."""
        return self._replay is not None

    @contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """For as long as products are computed and used: the next one overwrites them."""
        with self._lock:
            yield

    def __call__(self, stack: Stack) -> Stack:
        """The products with k vectors, which the next call may overwrite."""
        if len(next(iter(stack.values()))) != 1:
            return self._linear(stack)
        if not self._is_tried:
            self._replay = self._recorded(stack)
            self._is_tried = True
        return self._linear(stack) if self._replay is None else self._replay(stack)

    def _recorded(self, stack: Stack) -> Replay | None:
        """The record, or ``None`` where it would not give the products."""
        try:
            recording, _ = recorded(self._linear, stack)
            replay = Replay(recording)
            if replay.num_bytes > self._max_bytes:
                raise NotRecordable(f"it would take {replay.num_bytes} bytes")
            probe = self._space.unflatten(random_probes(self._space, 1, seed=0))
            difference = _difference(replay(probe), self._linear(probe))
        except torch.OutOfMemoryError:
            raise
        except (NotRecordable, RuntimeError) as reason:
            # What the map itself raises, it raises again.
            _LOGGER.debug("products are not recorded: %s", reason)
            return None
        if difference is not None:
            _LOGGER.debug("a record gives other products, by %.1e relative", difference)
            return None
        return replay


def _difference(found: Stack, expected: Stack) -> float | None:
    """The largest relative difference of a parameter's part, where it is beyond rounding."""
    dtype = next(iter(expected.values())).dtype
    tolerance = min(0.1, 1e4 * torch.finfo(dtype).eps)
    largest = 0.0
    for name, one in expected.items():
        difference = (found[name] - one).double().norm()
        # Negated, so that NaN differs.
        if not difference <= tolerance * one.double().norm():
            relative: float = (difference / one.double().norm()).nan_to_num(1.0, 1.0).item()
            largest = max(largest, relative)
    return largest or None
