"""Influences of collections, written to a store chunk by chunk, with pyDVL."""

import tempfile

import zarr
from pydvl.influence import SequentialInfluenceCalculator
from pydvl.influence.torch import DirectInfluence
from pydvl.influence.torch.util import (
    NestedTorchCatAggregator,
    TorchCatAggregator,
    TorchNumpyConverter,
)
from setting import loader, loss, model, test_loader

influence = DirectInfluence(model, loss, regularization=0.1).fit(loader)
calculator = SequentialInfluenceCalculator(influence)
lazy = calculator.influences(test_loader, loader)
factors = calculator.influence_factors(test_loader)

with tempfile.TemporaryDirectory() as folder:
    lazy.to_zarr(f"{folder}/influences.zarr", TorchNumpyConverter())
    factors.to_zarr(f"{folder}/factors.zarr", TorchNumpyConverter())
    stored = zarr.open(f"{folder}/influences.zarr", mode="r")[:]
    stored_factors = zarr.open(f"{folder}/factors.zarr", mode="r")[:]

from_factors = calculator.influences_from_factors(factors.compute(), loader)

results = {
    "in memory": lazy.compute(aggregator=NestedTorchCatAggregator()),
    "in the store": stored,
    "factors": factors.compute(aggregator=TorchCatAggregator()),
    "factors in the store": stored_factors,
    "from factors": from_factors.compute(aggregator=NestedTorchCatAggregator()),
}
