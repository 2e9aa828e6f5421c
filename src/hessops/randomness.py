"""Random numbers that leave the global generators alone."""

from __future__ import annotations

import torch
from torch import Tensor

from hessops.errors import ArgumentTypeError


def resolved_generator(generator: torch.Generator | None) -> torch.Generator:
    """The generator itself, or a fresh one seeded with `torch.initial_seed`.

    So `torch.manual_seed` decides, equal calls give equal results, and the global state stays.

    Raises:
        ArgumentTypeError: `generator` is something else.
    """
    if generator is None:
        return torch.Generator(device="cpu").manual_seed(torch.initial_seed())
    if not isinstance(generator, torch.Generator):
        raise ArgumentTypeError(
            f"generator must be a torch.Generator or None, got {type(generator).__name__}"
        )
    return generator


def standard_normal(
    shape: tuple[int, ...],
    generator: torch.Generator,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Standard normal numbers, drawn where the generator lives and moved to `device`."""
    drawn = torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)
    return drawn.to(device)


def rademacher(
    shape: tuple[int, ...],
    generator: torch.Generator,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Entries of +1 and -1 with equal probability, drawn where the generator lives."""
    drawn = torch.randint(2, shape, generator=generator, dtype=torch.int8, device=generator.device)
    return (2 * drawn - 1).to(device, dtype)
