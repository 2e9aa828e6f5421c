"""The torch state under which products are computed, whatever the caller has switched on."""

from __future__ import annotations

import pickle
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from hessops.progress import bars_closed_on_error


@contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """No gradient recording, inference mode or autocast: plain results in full precision.

    Under a caller's ``inference_mode`` nothing could be differentiated, and under ``autocast`` a
    float32 product would silently be a bfloat16 one. An error leaves no progress bar behind.
    """
    with (
        bars_closed_on_error(),
        torch.inference_mode(False),
        torch.no_grad(),
        without_autocast(device),
    ):
        yield


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Full precision, whatever the caller's autocast says."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def without_remarks() -> Iterator[None]:
    """Silences what torch says of itself while it differentiates.

    It compiles its own forward derivatives with what it deprecates itself, and says of some layers
    that its vectorised backward is a loop.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        yield


@contextmanager
def outside_transforms() -> Iterator[None]:
    """Suspends the caller's `torch.func` transforms, for work on tensors that are not theirs.

    Inside ``torch.func.grad`` or ``vmap`` every new tensor belongs to the transform, a random
    number is refused, and nothing may be kept. Loading and checking data is none of its business.
    """
    with temporarily_clear_interpreter_stack():
        yield


def is_transformed(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a `torch.func` transform."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def untransformed(tensor: Tensor) -> Tensor:
    """The caller's tensor behind one that a ``grad`` or ``vjp`` follows."""
    while torch._C._functorch.is_gradtrackingtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


@contextmanager
def twice_differentiable_kernels(
    *,
    without_cudnn: bool = False,
    with_explicit_weight_norm: bool = False,
    with_explicit_layers: bool = False,
) -> Iterator[None]:
    """Selects kernels that can be differentiated twice, and restores the caller's choice.

    Fused attention has no double backward and no forward mode: the mathematical form is used. The
    fast path of `torch.nn.MultiheadAttention` is another function than the one that is
    differentiated. Recurrent networks in cuDNN have no double backward either (`without_cudnn`).
    The double backward of `torch._weight_norm` is wrong (`with_explicit_weight_norm`). A caller's
    `torch.nn.utils.parametrize.cached` would hand out weights that belong to other parameters.

    `with_explicit_layers` writes out every layer of which torch gets a third derivative or a
    forward derivative wrong, at some cost: for functions whose results are differentiated again.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(_without_cached_parametrizations())
        if with_explicit_layers:
            stack.enter_context(_Rewritten(_EXPLICIT_LAYERS))
        elif with_explicit_weight_norm:
            stack.enter_context(_Rewritten(_EXPLICIT_WEIGHT_NORM))
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


class _Rewritten(TorchFunctionMode):
    """Calls other functions in place of some of torch's."""

    def __init__(self, replacements: Mapping[Callable[..., Any], Callable[..., Any]]) -> None:
        super().__init__()
        self._replacements = replacements

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        return self._replacements.get(function, function)(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """As `torch._weight_norm`: the norm is over all dimensions but `dim`, over all for -1."""
    others = [d for d in range(v.ndim) if d != dim] if dim != -1 else None
    norms: Tensor = torch.linalg.vector_norm(v, dim=others, keepdim=dim != -1)
    return v * (g / norms)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """As `torch.nn.functional.layer_norm`, whose third and forward derivatives are wrong."""
    dims = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(dim=dims, keepdim=True)
    result = centred * (centred.square().mean(dim=dims, keepdim=True) + eps).rsqrt()
    result = result if weight is None else result * weight
    return result if bias is None else result + bias


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """As `torch.nn.functional.embedding`, whose forward derivative forgets `padding_idx`."""
    if padding_idx is not None:
        is_padding = torch.arange(len(weight), device=weight.device) == padding_idx % len(weight)
        weight = torch.where(is_padding.unsqueeze(1), weight.detach(), weight)
    return functional.embedding(
        input, weight, None, max_norm, norm_type, scale_grad_by_freq, sparse
    )


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As `torch.nn.functional.instance_norm`: the group norm of single channels, if stateless."""
    if use_input_stats and running_mean is None and input.ndim > 2:
        return functional.group_norm(input, input.shape[1], weight, bias, eps)
    others = (running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return functional.instance_norm(input, *others)


def _mse_loss(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    """As `torch.nn.functional.mse_loss`, whose gradient has no forward derivative."""
    reduced = _plain_reduction(input, target, options)
    if reduced is None:
        return functional.mse_loss(input, target, **options)
    return reduced((input - target).square())


def _huber_loss(input: Tensor, target: Tensor, delta: float = 1.0, **options: Any) -> Tensor:
    """As `torch.nn.functional.huber_loss`, whose gradient has no forward derivative."""
    reduced = _plain_reduction(input, target, options)
    if reduced is None:
        return functional.huber_loss(input, target, delta=delta, **options)
    size = (input - target).abs()
    return reduced(torch.where(size <= delta, size.square() / 2, delta * (size - delta / 2)))


def _soft_margin_loss(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    """As `torch.nn.functional.soft_margin_loss`, whose gradient has no forward derivative."""
    reduced = _plain_reduction(input, target, options)
    if reduced is None:
        return functional.soft_margin_loss(input, target, **options)
    return reduced(functional.softplus(-target * input))


def _plain_reduction(
    input: Tensor, target: Tensor, options: Mapping[str, Any]
) -> Callable[[Tensor], Tensor] | None:
    """How a loss without other options reduces; ``None`` leaves it to torch."""
    given = {name: value for name, value in options.items() if value is not None}
    if given.keys() - {"reduction"} or input.shape != target.shape:
        return None
    return _REDUCTIONS.get(given.get("reduction", "mean"))


_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.mean,
    "sum": torch.sum,
    "none": lambda losses: losses,
}
_EXPLICIT_WEIGHT_NORM: dict[Callable[..., Any], Callable[..., Any]] = {
    torch._weight_norm: _weight_norm
}
_EXPLICIT_LAYERS: dict[Callable[..., Any], Callable[..., Any]] = {
    **_EXPLICIT_WEIGHT_NORM,
    functional.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    functional.embedding: _embedding,
    functional.instance_norm: _instance_norm,
    functional.mse_loss: _mse_loss,
    functional.huber_loss: _huber_loss,
    functional.soft_margin_loss: _soft_margin_loss,
}


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
