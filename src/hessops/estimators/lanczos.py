"""The method of Lanczos from several starting vectors at once, each by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from hessops.functional.krylov import EXHAUSTION_FACTOR

# Where small results are kept, whatever torch's default device is.
CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Tridiagonal:
    r"""The projection :math:`T = Q^\top A Q` on the Krylov space of one unit vector.

    Attributes:
        diagonal: Of T, ``(s,)`` float64 on the CPU.
        off_diagonal: ``(s - 1,)``.
        is_exhausted: Whether A maps the Krylov space to itself, up to rounding.
    """

    diagonal: Tensor
    off_diagonal: Tensor
    is_exhausted: bool

    @property
    def num_steps(self) -> int:
        """s, the dimension of the Krylov space."""
        return len(self.diagonal)

    def quadrature(self, num_steps: int | None = None) -> tuple[Tensor, Tensor]:
        r"""Nodes and weights with :math:`q^\top f(A) q \approx \sum_j w_j f(\theta_j)`.

        The nodes are the Ritz values, the eigenvalues of T, and the weights the squared first
        components of its eigenvectors (Golub & Welsch 1969): exact for polynomials of degree
        2s - 1, and for all functions where the Krylov space is exhausted.

        Args:
            num_steps: Takes the first steps only.

        Returns:
            The nodes in ascending order, and the weights, which sum to 1; float64 on the CPU.
        """
        kept = min(num_steps or self.num_steps, self.num_steps)
        diagonal = self.diagonal[:kept].numpy()
        nodes, vectors = eigh_tridiagonal(diagonal, self.off_diagonal[: kept - 1].numpy())
        weights = torch.from_numpy(np.square(vectors[0]))
        return torch.from_numpy(nodes), weights / weights.sum()


def lanczos(
    product: Callable[[Tensor], Tensor], starts: Tensor, num_steps: int
) -> list[Tridiagonal]:
    r"""Steps of Lanczos (1950) from each of some vectors; one product for all of them in each step.

    .. math:: \beta_{j+1} q_{j+1} = A q_j - \alpha_j q_j - \beta_j q_{j-1}

    with each new vector orthogonalised against all earlier ones of its own space, twice (Giraud et
    al. 2005: twice is enough), in the dtype of the vectors; α and β are summed in float64. Without
    that, Ritz values repeat themselves. A recurrence ends where its next vector is rounding.

    Args:
        product: Rows V ↦ AV of a symmetric A, ``(k, n)``.
        starts: The vectors, ``(m, n)``, none of them zero.
        num_steps: Most steps of each; n where it is larger.

    Example:
        >>> import torch
        >>> from hessops.estimators.lanczos import lanczos
        >>> values = torch.tensor([1.0, 3.0, 3.0])
        >>> (found,) = lanczos(lambda rows: values * rows, torch.ones(1, 3), num_steps=3)
        >>> nodes, weights = found.quadrature()
        >>> nodes.round(decimals=4), weights.round(decimals=4), found.is_exhausted
        (tensor([1., 3.], ...), tensor([0.3333, 0.6667], ...), True)
    """
    (count, size), steps = starts.shape, min(num_steps, starts.shape[1])
    basis = starts.new_empty(count, steps, size)
    diagonal, off_diagonal = torch.zeros(2, count, steps, dtype=torch.float64, device=CPU)
    lengths = torch.full((count,), steps, device=CPU)
    scales = torch.zeros(count, dtype=torch.float64, device=CPU)
    rounding = EXHAUSTION_FACTOR * torch.finfo(starts.dtype).eps
    running = torch.arange(count, device=CPU)
    vectors = _normalised(starts, running)
    for step in range(steps):
        basis[:, step] = vectors
        rows = running.to(starts.device)
        # Those that have ended are zero, and so are their products.
        images = torch.zeros_like(vectors).index_copy_(0, rows, product(vectors[rows]))
        diagonal[:, step] = _rayleigh_quotients(vectors, images).cpu()
        outside = _outside(images, basis[:, : step + 1])
        off_diagonal[:, step] = _norms(outside).cpu()
        scales = torch.maximum(scales, _norms(images).cpu())
        is_rounding = (off_diagonal[:, step] <= rounding * scales)[running]
        lengths[running[is_rounding]] = step + 1
        running = running[~is_rounding]
        if len(running) == 0:
            break
        vectors = _normalised(outside, running)
    exhausted = torch.ones(count, dtype=torch.bool, device=CPU)
    exhausted[running] = steps == size
    return [
        Tridiagonal(a[:length], b[: length - 1], bool(is_exhausted))
        for a, b, length, is_exhausted in zip(
            diagonal, off_diagonal, lengths.tolist(), exhausted, strict=True
        )
    ]


def working_bytes(size: int, num_steps: int, dtype: torch.dtype) -> int:
    """What `lanczos` takes for one starting vector, the products not counted."""
    # Beside the basis some vectors of its dtype, and some of float64 for the inner products.
    return size * ((num_steps + 4) * dtype.itemsize + 3 * torch.float64.itemsize)


def _outside(vectors: Tensor, bases: Tensor) -> Tensor:
    """The part of each vector ``(m, n)`` outside the span of its own rows ``(m, j, n)``."""
    for _ in range(2):
        coefficients = torch.bmm(bases, vectors.unsqueeze(2))
        vectors = torch.baddbmm(vectors.unsqueeze(1), coefficients.mT, bases, alpha=-1).squeeze(1)
    return vectors


def _normalised(vectors: Tensor, running: Tensor) -> Tensor:
    """The vectors at some positions with norm 1, and zero elsewhere."""
    rows = running.to(vectors.device)
    chosen = vectors[rows]
    units = chosen / _norms(chosen).to(chosen.dtype).unsqueeze(1)
    return torch.zeros_like(vectors).index_copy_(0, rows, units)


def _rayleigh_quotients(vectors: Tensor, images: Tensor) -> Tensor:
    """⟨v, Av⟩/⟨v, v⟩ in float64, as the norm of a rounded vector is not quite 1; 0 for zero."""
    wide = vectors.double()
    squares = wide.square().sum(dim=1)
    return (wide * images).sum(dim=1) / torch.where(squares > 0, squares, 1.0)


def _norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norms
