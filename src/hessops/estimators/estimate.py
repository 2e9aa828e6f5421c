"""What an estimator returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hessops.printed import Node, Printed, counted


@dataclass(frozen=True, eq=False, repr=False)
class Estimate(Printed):
    """A value with its standard error, and what it cost.

    Attributes:
        value: The estimate; a float, or a float64 tensor where the quantity has entries.
        standard_error: The estimated standard deviation of `value` over the generator's draws, of
            the same form; zero where `value` is exact up to rounding.
        num_products: Products with the operator that were computed.
        method: How, by the name that the estimator takes; ``"exact"`` for a formula, or for
            products with all unit vectors.

    Example:
        >>> from hessops.estimators import Estimate
        >>> Estimate(value=10.0, standard_error=0.5, num_products=32, method="hutchinson")
        Estimate(10 ± 0.5, hutchinson, 32 products)
    """

    value: float | Tensor
    standard_error: float | Tensor
    num_products: int
    method: str

    def _node(self) -> Node:
        if isinstance(self.value, Tensor):
            shown = f"of shape {tuple(self.value.shape)}"
        else:
            shown = f"{self.value:.6g} ± {self.standard_error:.2g}"
        products = counted(self.num_products, "product")
        return Node(f"Estimate({shown}, {self.method}, {products})")
