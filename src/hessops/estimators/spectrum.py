"""The spectral density of any symmetric operator, by stochastic Lanczos quadrature."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hessops.errors import MemoryLimitError
from hessops.estimators.density import SpectralDensity
from hessops.estimators.lanczos import Tridiagonal, lanczos, working_bytes
from hessops.estimators.products import (
    CountedProducts,
    checked_operator,
    counted_products,
    require_symmetric,
)
from hessops.isolation import isolated
from hessops.operators.base import TensorOperator
from hessops.randomness import rademacher, resolved_generator
from hessops.validation import checked_count

# What the Krylov bases of the probes that advance together may take. A constant and not a share of
# the free memory, so that equal calls take the same route.
BASIS_BYTES = 2**31


def spectral_density(
    operator: TensorOperator,
    num_probes: int = 10,
    num_steps: int = 100,
    *,
    max_bytes: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> SpectralDensity:
    r"""The distribution of the eigenvalues, by stochastic Lanczos quadrature.

    The entries of each probe are random signs over :math:`\sqrt n`, so that the expectation of
    :math:`q^\top f(A) q` is :math:`\mathrm{tr} f(A)/n`; s steps of Lanczos with full
    reorthogonalisation give the quadrature of it (Golub & Meurant 1994; Ubaru, Chen & Saad 2017;
    Ghorbani, Krishnan & Xiao 2019 for networks). All probes advance together, with one pass over
    the data for a step, in groups whose bases fit `max_bytes`: n·s numbers of the operator's dtype
    for each. A probe whose Krylov space is exhausted ends, and its quadrature is exact.

    Args:
        operator: A, any symmetric operator of float32 or float64. Where symmetry is unknown, two
            products test it.
        num_probes: m >= 2; the standard error falls as its square root.
        num_steps: s, the most steps of each, which are no more than n. It decides the detail that
            is seen: see `SpectralDensity.default_width`.
        max_bytes: Memory of the Krylov bases; ``None`` is 2 GiB.
        generator: Draws the probes; without one, `torch.manual_seed` decides.
        progress: Shows a progress bar that counts products.

    Raises:
        ArgumentTypeError, ArgumentError: `operator` is no operator, or a number does not fit.
        DtypeError: Half precision.
        StructureError: A is not symmetric.
        MemoryLimitError: The basis of one probe does not fit.
        NonFiniteProductError: A product is NaN or infinite.

    Example:
        >>> import torch
        >>> from hessops import DiagonalOperator
        >>> from hessops.estimators import spectral_density
        >>> A = DiagonalOperator(torch.tensor([1.0, 1.0, 1.0, 5.0]))
        >>> density = spectral_density(A, num_probes=2)
        >>> density
        SpectralDensity(2 probes of 100 steps, eigenvalues of 4 from 1 to 5, 4 products)
        >>> fraction, error = density.cumulative(torch.tensor([0.0, 2.0, 6.0]))
        >>> fraction.round(decimals=4)
        tensor([0.0000, 0.7500, 1.0000], dtype=torch.float64)
    """
    checked_operator(operator, "spectral_density")
    probes = Probes(operator, num_probes, num_steps, max_bytes)
    source = resolved_generator(generator)
    with (
        isolated(operator.device),
        counted_products(
            operator, "spectral density", total=probes.most_products, progress=progress
        ) as product,
    ):
        require_symmetric(product, "spectral_density", source)
        quadratures = [found.quadrature() for found in probes.tridiagonals(product, source)]
    return density_of(quadratures, num_steps, operator.input_size, product.count)


class Probes:
    """Random probes of an operator, in groups that fit into memory.

    Args:
        operator: A.
        num_probes: m >= 2.
        num_steps: s >= 1.
        max_bytes: What the bases of a group may take; ``None`` is 2 GiB.

    Raises:
        ArgumentTypeError, ArgumentError: A number does not fit.
        MemoryLimitError: One probe does not fit.
    """

    def __init__(
        self, operator: TensorOperator, num_probes: int, num_steps: int, max_bytes: int | None
    ) -> None:
        self._operator = operator
        size = operator.input_size
        self.count = checked_count(num_probes, "num_probes", minimum=2)
        self.num_steps = min(checked_count(num_steps, "num_steps"), size)
        limit = BASIS_BYTES if max_bytes is None else checked_count(max_bytes, "max_bytes")
        each = working_bytes(size, self.num_steps, operator.dtype)
        if each > limit:
            raise MemoryLimitError(
                f"{self.num_steps} steps of Lanczos on {operator.dtype} vectors of {size} entries "
                f"take {each:,} bytes, more than the {limit:,} allowed; lower num_steps, or raise "
                "max_bytes"
            )
        self._at_once = min(self.count, limit // each)

    @property
    def most_products(self) -> int:
        """Products, unless a Krylov space is exhausted."""
        return self.count * self.num_steps

    def tridiagonals(
        self, product: CountedProducts, generator: torch.Generator
    ) -> Iterator[Tridiagonal]:
        """The projection of A on the Krylov space of each probe."""
        for start in range(0, self.count, self._at_once):
            number = min(self._at_once, self.count - start)
            # One by one, so that they do not depend on the groups.
            starts = torch.stack([self._drawn(generator) for _ in range(number)])
            yield from lanczos(product, starts, self.num_steps)

    def _drawn(self, generator: torch.Generator) -> Tensor:
        operator = self._operator
        shape = (operator.input_size,)
        return rademacher(shape, generator, dtype=operator.dtype, device=operator.device)


def density_of(
    quadratures: list[tuple[Tensor, Tensor]], num_steps: int, size: int, num_products: int
) -> SpectralDensity:
    """Quadratures of several probes, filled up to one length."""
    nodes = torch.stack([_filled(n, num_steps, n[-1].item()) for n, _ in quadratures])
    weights = torch.stack([_filled(w, num_steps, 0.0) for _, w in quadratures])
    return SpectralDensity(nodes, weights, size, num_products)


def _filled(values: Tensor, length: int, value: float) -> Tensor:
    return torch.cat([values, values.new_full((length - len(values),), value)])
