"""Influences by LiSSA, with pyDVL."""

from pydvl.influence.torch import LissaInfluence
from setting import loss, model, x, x_test, y, y_test
from torch.utils.data import DataLoader, TensorDataset

# One batch of all points: a recursion without noise.
whole = DataLoader(TensorDataset(x, y), batch_size=250)
influence = LissaInfluence(
    model, loss, regularization=0.5, scale=2.0, maxiter=150, rtol=1e-12, warn_on_max_iteration=False
).fit(whole)
dampened = LissaInfluence(
    model,
    loss,
    regularization=0.5,
    scale=2.0,
    dampen=0.1,
    maxiter=100,
    rtol=1e-12,
    warn_on_max_iteration=False,
).fit(whole)

results = {
    "influences": influence.influences(x_test, y_test, x, y),
    "with dampening": dampened.influences(x_test, y_test, x, y),
}
