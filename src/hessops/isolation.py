"""The torch state under which products are computed, whatever the caller has switched on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


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
def twice_differentiable_kernels(*, without_cudnn: bool = False) -> Iterator[None]:
    """Selects kernels that can be differentiated twice, and restores the caller's choice.

    Fused attention has no double backward and no forward mode: the mathematical form is used. The
    fast path of `torch.nn.MultiheadAttention` is another function than the one that is
    differentiated. Recurrent networks in cuDNN have no double backward either (`without_cudnn`).
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if without_cudnn:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """Restores torch's global generators (CPU, and the CUDA device in use) on exit."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, device_type="cuda"):
        yield


def random_state(device: torch.device) -> list[torch.Tensor]:
    """The states of the global generators that a forward pass on `device` may draw from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states
