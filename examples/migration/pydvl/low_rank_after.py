"""Influences from eigenpairs and sketches, with hessops."""

import warnings

import torch
from setting import loader, loss, model, x, x_test, y, y_test
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hessops.errors import IndefiniteSketchWarning
from hessops.influence import ArnoldiInfluence, NystroemSketchInfluence

whole = DataLoader(TensorDataset(x, y), batch_size=250)
pairs = ArnoldiInfluence(model, loss, regularization=0.1, rank=20, tol=1e-12)
woodbury = ArnoldiInfluence(model, loss, regularization=0.1, rank=20, tol=1e-12, use_woodbury=True)

torch.manual_seed(1)
linear = nn.Linear(16, 10).double()
sketch = NystroemSketchInfluence(linear, loss, regularization=0.1, rank=165)
# The positive part is sketched, which a warning says.
warnings.simplefilter("ignore", IndefiniteSketchWarning)
indefinite = NystroemSketchInfluence(model, loss, regularization=0.1, rank=334)

results = {
    "Arnoldi, one batch": pairs.fit(whole).influences(x_test, y_test, x, y),
    "Arnoldi, batches of 64": pairs.fit(loader).influences(x_test, y_test, x, y),
    "Woodbury, one batch": woodbury.fit(whole).influences(x_test, y_test, x, y),
    "Nyström, convex": sketch.fit(whole).influences(x_test, y_test, x, y),
    "Nyström, indefinite": indefinite.fit(whole).influences(x_test, y_test, x, y),
}
differs = {
    "Arnoldi, batches of 64": "`HessianOperator` of pyDVL is the mean of the batch means",
    "Nyström, indefinite": "a sketch is of the positive part, which pyDVL does not form",
}
tolerances = {"Nyström, convex": 1e-6, "Nyström, indefinite": 1e-6}
