"""Influences of training points on test points."""

import torch
from dattri.algorithm.influence_function import (
    IFAttributorCG,
    IFAttributorDataInf,
    IFAttributorEKFAC,
    IFAttributorExplicit,
)
from dattri.task import AttributionTask
from setting import loader, loss, model, test_loader, x, y
from torch.func import functional_call

whole = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=250)
torch.set_default_dtype(torch.float64)  # scores are made in the default dtype


def point_loss(params, data):
    inputs, targets = data
    return loss(functional_call(model, params, inputs), targets)


def scores(attributor_type, data, **settings):
    task = AttributionTask(loss_func=point_loss, model=model, checkpoints=model.state_dict())
    attributor = attributor_type(task, **settings)
    attributor.cache(data)
    with torch.no_grad():
        return attributor.attribute(loader, test_loader)


results = {
    "explicit, data in one batch": scores(IFAttributorExplicit, whole, regularization=0.05),
    "explicit, data in four batches": scores(IFAttributorExplicit, loader, regularization=0.05),
    "CG, data in one batch": scores(IFAttributorCG, whole, max_iter=60, regularization=0.05),
    "DataInf": scores(IFAttributorDataInf, whole, regularization=0.05),
    "EKFAC": scores(IFAttributorEKFAC, loader, damping=0.05),
}
