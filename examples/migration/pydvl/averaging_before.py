"""Matrices of one batch and averages over batches, with pyDVL."""

import torch
from pydvl.influence.torch.base import TorchBatch
from pydvl.influence.torch.batch_operation import (
    ChunkAveraging,
    GaussNewtonBatchOperation,
    HessianBatchOperation,
    InverseHarmonicMeanBatchOperation,
    PointAveraging,
)
from setting import loader, loss, model, x, y

batch = TorchBatch(x[:64], y[:64])
hessian = HessianBatchOperation(model, loss)
fisher = GaussNewtonBatchOperation(model, loss)
harmonic = InverseHarmonicMeanBatchOperation(model, loss, 0.1)
vector = torch.linspace(-1, 1, hessian.input_size, dtype=torch.float64)
rows = torch.stack([vector, vector.flip(0), vector.cos()])


def averaged(operation, averaging, vectors):
    """The products of all batches, averaged."""
    return averaging(operation.apply(TorchBatch(*points), vectors) for points in loader)


results = {
    "Hessian of a batch": hessian.apply(batch, rows),
    "Gauss-Newton of a batch": fisher.apply(batch, rows),
    "inverse harmonic mean of a batch": harmonic.apply(batch, rows),
    "mean of batch means": averaged(hessian, ChunkAveraging(), rows),
    "mean over points": averaged(hessian, PointAveraging(), rows),
}
