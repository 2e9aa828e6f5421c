"""Influences by KFAC and EKFAC, with pyDVL."""

import torch
from pydvl.influence.torch import EkfacInfluence
from setting import model, x, x_test, y, y_test
from torch.utils.data import DataLoader, TensorDataset

# With a model in double precision, pyDVL 0.10.0 fails in `update_diagonal=True`.
model.float()
x, x_test = x.float(), x_test.float()
loader = DataLoader(TensorDataset(x, y), batch_size=64)

kfac = EkfacInfluence(model, hessian_regularization=0.1).fit(loader)
ekfac = EkfacInfluence(model, update_diagonal=True, hessian_regularization=0.1).fit(loader)
by_layer = ekfac.influences_by_layer(x_test, y_test, x, y)

results = {
    "KFAC": kfac.influences(x_test, y_test, x, y),
    "EKFAC": ekfac.influences(x_test, y_test, x, y),
    "EKFAC, layer 2": by_layer["2"].detach(),
    # What `fit` has left in the gradients of the model.
    "norm of model.grad": torch.stack([p.grad.norm() for p in model.parameters()]),
}
