"""The operators of the other libraries, behind one function for each.

A library is imported when one of its functions is called, so that every benchmark also runs where
none of them is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Protocol

import torch
from _cases import LOSS, Batch, Case
from torch import Tensor
from torch.func import functional_call, vmap

HESSIAN, GGN = "Hessian", "GGN"
EMPIRICAL, HARMONIC = "empirical Gauss-Newton", "inverse harmonic mean"
# λ of the inverse harmonic mean.
REGULARIZATION = 0.1

PYDVL, CURVLINOPS, DATTRI, KRONFLUENCE = "pyDVL", "curvlinops", "dattri", "kronfluence"
# Name -> what is imported, what is installed.
PEERS = {
    PYDVL: ("pydvl", "pyDVL"),
    CURVLINOPS: ("curvlinops", "curvlinops-for-pytorch"),
    DATTRI: ("dattri", "dattri"),
    KRONFLUENCE: ("kronfluence", "kronfluence"),
}

Product = Callable[[Tensor], Tensor]


class PydvlOperator(Protocol):
    """What is used of an operator of pyDVL."""

    def apply(self, rows: Tensor) -> Tensor:
        """From ``(k, P)`` to ``(k, P)``."""


def installed(peer: str) -> bool:
    """Whether a peer can be imported."""
    return importlib.util.find_spec(PEERS[peer][0]) is not None


def versions() -> dict[str, str]:
    """Those of the peers that are installed."""
    return {peer: version(PEERS[peer][1]) for peer in PEERS if installed(peer)}


def prepare() -> None:
    """Makes second derivatives possible for everyone, and the peers quiet.

    The fused kernels of attention have no second derivative. `hessops` sees to that itself; for its
    peers they are turned off in the whole process, for the unit of time too.
    """
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.mha.set_fastpath_enabled(False)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


# --- pyDVL -----------------------------------------------------------------------------------


def pydvl(part: str) -> ModuleType:
    """A module of its influence package."""
    with _away_from_the_scripts():
        return importlib.import_module(f"pydvl.influence.torch.{part}")


@contextmanager
def _away_from_the_scripts() -> Iterator[None]:
    """Lets pyDVL import the package `distributed` and not the benchmark of that name."""
    folders, here = list(sys.path), str(Path(__file__).parent)
    sys.path[:] = [folder for folder in folders if folder != here]
    try:
        yield
    finally:
        sys.path[:] = folders


def pydvl_operator(matrix: str, case: Case, batches: list[Batch]) -> PydvlOperator:
    """One of its operators; that of the Hessian averages the means of batches, of equal size here.

    Raises:
        LookupError: It has none for the matrix.
    """
    operators = pydvl("operator")
    if matrix == HARMONIC:
        return operators.InverseHarmonicMeanOperator(case.model, LOSS, batches, REGULARIZATION)
    names = {HESSIAN: "HessianOperator", EMPIRICAL: "GaussNewtonOperator"}
    return getattr(operators, names[matrix])(case.model, LOSS, batches)


# --- curvlinops ------------------------------------------------------------------------------


def curvlinops_operator(matrix: str, case: Case, batches: list[Batch]) -> object:
    """One of its operators, which act on columns.

    Raises:
        LookupError: It has none for the matrix.
    """
    library = importlib.import_module("curvlinops")
    names = {
        HESSIAN: "HessianLinearOperator",
        GGN: "GGNLinearOperator",
        EMPIRICAL: "EFLinearOperator",
    }
    kind = getattr(library, names[matrix])
    data = {"num_data": len(case), "check_deterministic": False}
    return kind(case.model, LOSS, case.parameters, batches, **data)


def curvlinops_shifted(matrix: str, case: Case, batches: list[Batch], shift: float) -> object:
    """One of its operators plus a multiple of the identity."""
    examples = importlib.import_module("curvlinops.examples")
    shapes = [p.shape for p in case.parameters]
    identity = examples.IdentityLinearOperator(shapes, torch.device("cpu"), torch.float32)
    return curvlinops_operator(matrix, case, batches) + shift * identity


# --- dattri ----------------------------------------------------------------------------------


def loss_of_flat_parameters(case: Case) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The mean loss of all points as a function of one vector, and where it is."""
    names = [name for name, _ in case.model.named_parameters()]
    shapes = [p.shape for p in case.parameters]
    sizes = [p.numel() for p in case.parameters]

    def loss(flat: Tensor) -> Tensor:
        parts = zip(names, flat.split(sizes), shapes, strict=True)
        params = {name: part.reshape(shape) for name, part, shape in parts}
        return LOSS(functional_call(case.model, params, (case.x,)), case.y)

    return loss, torch.cat([p.detach().reshape(-1) for p in case.parameters])


def dattri_product(case: Case, mode: str) -> Product:
    """Its Hessian at fixed parameters, for rows; many of them by `vmap`."""
    hessian = importlib.import_module("dattri.func.hessian")
    loss, flat = loss_of_flat_parameters(case)
    product = hessian.hvp_at_x(loss, (flat,), mode=mode)
    stacked = vmap(product)
    return lambda rows: product(rows[0])[None] if len(rows) == 1 else stacked(rows)
