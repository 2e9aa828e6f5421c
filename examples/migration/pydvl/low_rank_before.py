"""Influences from eigenpairs and sketches, with pyDVL."""

import torch
from pydvl.influence.torch import ArnoldiInfluence, NystroemSketchInfluence
from setting import loader, loss, model, x, x_test, y, y_test
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

whole = DataLoader(TensorDataset(x, y), batch_size=250)
pairs = ArnoldiInfluence(model, loss, regularization=0.1, rank=20, tol=1e-12)
woodbury = ArnoldiInfluence(model, loss, regularization=0.1, rank=20, tol=1e-12, use_woodbury=True)

# A convex model: its Hessian has no negative eigenvalue, and is of rank 153 at most.
torch.manual_seed(1)
linear = nn.Linear(16, 10).double()
sketch = NystroemSketchInfluence(linear, loss, regularization=0.1, rank=165)
# The network has negative eigenvalues.
indefinite = NystroemSketchInfluence(model, loss, regularization=0.1, rank=334)

results = {
    "Arnoldi, one batch": pairs.fit(whole).influences(x_test, y_test, x, y),
    "Arnoldi, batches of 64": pairs.fit(loader).influences(x_test, y_test, x, y),
    "Woodbury, one batch": woodbury.fit(whole).influences(x_test, y_test, x, y),
    "Nyström, convex": sketch.fit(whole).influences(x_test, y_test, x, y),
    "Nyström, indefinite": indefinite.fit(whole).influences(x_test, y_test, x, y),
}
