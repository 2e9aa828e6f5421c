"""What estimators of quantities that are linear in the operator share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hessops.estimators.arguments import (
    Work,
    estimate_of,
    require_choice,
    require_operator,
    require_products,
    shown,
)
from hessops.estimators.estimate import Estimate
from hessops.isolation import isolated
from hessops.operators.base import TensorOperator
from hessops.operators.probing import Advance
from hessops.randomness import resolved_generator
from hessops.validation import checked_count

# From operator, number of products, generator and work to a value and its standard error.
Run = Callable[[TensorOperator, int, torch.Generator, Work], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Method:
    """A way to estimate.

    Attributes:
        minimum: Fewest products.
        run: How.
    """

    minimum: int
    run: Run


@dataclass(frozen=True)
class LinearQuantity:
    """A quantity that is linear in the operator; float64.

    Attributes:
        name: Its name.
        known: The quantity of an operator that knows it, else ``None``.
        by_units: The quantity, from products with all unit vectors.
        methods: Ways to estimate it, by name.
    """

    name: str
    known: Callable[[TensorOperator], Tensor | None]
    by_units: Callable[[TensorOperator, Advance], Tensor]
    methods: Mapping[str, Method]

    def estimate(
        self,
        operator: TensorOperator,
        method: str,
        num_products: int,
        generator: torch.Generator | None,
        progress: bool,
    ) -> Estimate:
        """The quantity: what terms of the operator know of it, and an estimate of the rest.

        Raises:
            HessopsError: See `hessops.estimators.trace`.
        """
        require_operator(operator)
        require_choice(method, tuple(self.methods), "method")
        budget = checked_count(num_products, "num_products")
        source = resolved_generator(generator)
        chosen = self.methods[method]
        if budget < operator.input_size:
            require_products(budget, chosen.minimum, method)
        with isolated(operator.device):
            known, rest = self._separated(operator)
            if rest is None:
                return estimate_of(known, torch.zeros_like(known), 0, "exact")
            with shown(rest, budget, self.name, progress) as work:
                if budget >= rest.input_size:
                    work.expect(rest.input_size)
                    value = self.by_units(rest, work)
                    error, method = torch.zeros_like(value), "exact"
                else:
                    value, error = chosen.run(rest, budget, source, work)
            return estimate_of(known + value, error, work.num_products, method)

    def _separated(self, operator: TensorOperator) -> tuple[Tensor, TensorOperator | None]:
        """The quantity of all terms that know it, and the sum of the others if there are any."""
        known = torch.zeros((), dtype=torch.float64, device=operator.device)
        unknown: list[TensorOperator] = []
        terms = operator._linear_terms()
        for factor, term in terms:
            value = self.known(term)
            if value is None:
                unknown.append(factor * term)
            else:
                known = known + factor * value
        if len(unknown) == len(terms):
            return known, operator
        rest: TensorOperator | None = None
        for term in unknown:
            rest = term if rest is None else rest + term
        return known, rest
