"""Influences as dask arrays, with hessops."""

from distributed import Client, LocalCluster
from setting import loader, loss, model, test_loader

from hessops.influence import (
    DaskInfluenceCalculator,
    DirectInfluence,
    TorchNumpyConverter,
    torch_dataset_to_dask_array,
)

influence = DirectInfluence(model, loss, regularization=0.1).fit(loader)
x_train, y_train = torch_dataset_to_dask_array(loader.dataset, chunk_size=100)
x_test, y_test = torch_dataset_to_dask_array(test_loader.dataset, chunk_size=5)

cluster = LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0")
with cluster, Client(cluster) as client:
    calculator = DaskInfluenceCalculator(influence, TorchNumpyConverter(), client)
    scores = calculator.influences(x_test, y_test, x_train, y_train)
    factors = calculator.influence_factors(x_test, y_test)
    results = {
        "influences": scores.compute(),
        "factors": factors.compute(),
        "bytes of a number": scores.dtype.itemsize,
    }
differs = {"bytes of a number": "pyDVL announces float32 for what is computed in float64"}
