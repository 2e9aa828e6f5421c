"""Influences by the inverse harmonic mean, with pyDVL."""

from pydvl.influence.torch import InverseHarmonicMeanInfluence
from setting import loader, loss, model, x, x_test, y, y_test
from torch.utils.data import DataLoader, TensorDataset

whole = DataLoader(TensorDataset(x, y), batch_size=250)
at_once = InverseHarmonicMeanInfluence(model, loss, regularization=0.1).fit(whole)
influence = InverseHarmonicMeanInfluence(model, loss, regularization=0.1).fit(loader)

results = {
    "one batch, a point on itself": at_once.influences(x_test[:1], y_test[:1]),
    "one batch": at_once.influences(x_test, y_test, x, y),
    "batches of 64, a point on itself": influence.influences(x_test[:1], y_test[:1]),
    "batches of 64": influence.influences(x_test, y_test, x, y),
}
