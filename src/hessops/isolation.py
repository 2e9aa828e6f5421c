"""The torch state under which products are computed, whatever the caller has switched on."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode


@contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """No gradient recording, inference mode or autocast: plain results in full precision.

    Under a caller's ``inference_mode`` nothing could be differentiated, and under ``autocast`` a
    float32 product would silently be a bfloat16 one.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if torch.is_autocast_enabled(device.type) if device.type != "meta" else False:
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


@contextmanager
def twice_differentiable_kernels(
    *, without_cudnn: bool = False, with_explicit_weight_norm: bool = False
) -> Iterator[None]:
    """Selects kernels that can be differentiated twice, and restores the caller's choice.

    Fused attention has no double backward and no forward mode: the mathematical form is used. The
    fast path of `torch.nn.MultiheadAttention` is another function than the one that is
    differentiated. Recurrent networks in cuDNN have no double backward either (`without_cudnn`).
    The double backward of `torch._weight_norm` is wrong (`with_explicit_weight_norm`). A caller's
    `torch.nn.utils.parametrize.cached` would hand out weights that belong to other parameters.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(_without_cached_parametrizations())
        if with_explicit_weight_norm:
            stack.enter_context(_ExplicitWeightNorm())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if without_cudnn:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def _without_cached_parametrizations() -> Iterator[None]:
    kept = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = kept


class _ExplicitWeightNorm(TorchFunctionMode):
    """Writes g·v/‖v‖ out in operations whose derivatives are right to every order."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if function is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """As `torch._weight_norm`: the norm is over all dimensions but `dim`, over all for -1."""
    others = [d for d in range(v.ndim) if d != dim] if dim != -1 else None
    norms: Tensor = torch.linalg.vector_norm(v, dim=others, keepdim=dim != -1)
    return v * (g / norms)


@contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """Restores the global generators of torch (CPU and `device`), numpy and Python on exit."""
    devices = [device] if device.type == "cuda" else []
    before = HostRandomState.now()
    try:
        with torch.random.fork_rng(devices=devices, device_type="cuda"):
            yield
    finally:
        before.restore()


def random_state(device: torch.device) -> tuple[object, ...]:
    """The states of the global generators that a forward pass may draw from, for comparison."""
    host = HostRandomState.now()
    of_torch = [host.of_torch]
    if device.type == "cuda":
        of_torch.append(torch.cuda.get_rng_state(device))
    of_numpy = pickle.dumps(host.of_numpy)  # its arrays have no single answer to ==
    return ([state.numpy().tobytes() for state in of_torch], of_numpy, host.of_python)


@dataclass(frozen=True)
class HostRandomState:
    """The states of the global generators of torch on the CPU, numpy and Python.

    Attributes:
        of_torch: As `torch.get_rng_state` gives it.
        of_numpy: As `numpy.random.get_state` gives it.
        of_python: As `random.getstate` gives it.
    """

    of_torch: Tensor
    of_numpy: dict[str, Any]
    of_python: tuple[Any, ...]

    @classmethod
    def now(cls) -> HostRandomState:
        """The present states."""
        # The legacy functions are those of the global generator.
        of_numpy = np.random.get_state(legacy=False)  # noqa: NPY002
        return cls(torch.get_rng_state(), of_numpy, random.getstate())

    def restore(self) -> None:
        """Puts the global generators into these states."""
        torch.set_rng_state(self.of_torch)
        np.random.set_state(self.of_numpy)  # noqa: NPY002
        random.setstate(self.of_python)
