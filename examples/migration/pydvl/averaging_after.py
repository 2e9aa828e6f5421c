"""Matrices of one batch and averages over batches, with hessops."""

import torch
from setting import loader, loss, model, x, y

from hessops import (
    Batch,
    BatchOperator,
    ChunkAveraging,
    GaussNewtonBatchOperation,
    HessianBatchOperation,
    InverseHarmonicMeanBatchOperation,
    PointAveraging,
)

batch = Batch.from_raw((x[:64], y[:64]))
hessian = HessianBatchOperation(model, loss)
fisher = GaussNewtonBatchOperation(model, loss)
harmonic = InverseHarmonicMeanBatchOperation(model, loss, 0.1)
vector = torch.linspace(-1, 1, hessian.space.size, dtype=torch.float64)
rows = torch.stack([vector, vector.flip(0), vector.cos()])

results = {
    "Hessian of a batch": hessian.apply(batch, rows),
    "Gauss-Newton of a batch": fisher.apply(batch, rows),
    "inverse harmonic mean of a batch": harmonic.apply(batch, rows),
    "mean of batch means": BatchOperator(hessian, loader, ChunkAveraging()).apply(rows),
    "mean over points": BatchOperator(hessian, loader, PointAveraging()).apply(rows),
}
differs = {
    "mean over points": "`PointAveraging` of pyDVL weights batches by the shape of the product"
}
