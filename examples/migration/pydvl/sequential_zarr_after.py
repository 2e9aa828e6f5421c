"""Influences of collections, written to a store chunk by chunk, with hessops."""

import tempfile

import zarr
from setting import loader, loss, model, test_loader

from hessops.influence import DirectInfluence, SequentialInfluenceCalculator

influence = DirectInfluence(model, loss, regularization=0.1).fit(loader)
calculator = SequentialInfluenceCalculator(influence)
lazy = calculator.influences(test_loader, loader)
factors = calculator.influence_factors(test_loader)

with tempfile.TemporaryDirectory() as folder:
    lazy.to_zarr(f"{folder}/influences.zarr")
    factors.to_zarr(f"{folder}/factors.zarr")
    stored = zarr.open(f"{folder}/influences.zarr", mode="r")[:]
    stored_factors = zarr.open(f"{folder}/factors.zarr", mode="r")[:]

from_factors = calculator.influences_from_factors(factors, loader)

results = {
    "in memory": lazy.compute(),
    "in the store": stored,
    "factors": factors.compute(),
    "factors in the store": stored_factors,
    "from factors": from_factors.compute(),
}
