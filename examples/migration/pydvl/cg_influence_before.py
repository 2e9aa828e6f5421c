"""Influences by preconditioned conjugate gradients, with pyDVL."""

from pydvl.influence.torch import CgInfluence, NystroemPreconditioner, SecondOrderMode
from setting import loader, loss, model, x, x_test, y, y_test
from torch.utils.data import DataLoader, TensorDataset

influence = CgInfluence(
    model, loss, regularization=0.1, preconditioner=NystroemPreconditioner(rank=30)
).fit(loader)

# All points in one batch, so that there is no last batch that is smaller.
whole = DataLoader(TensorDataset(x, y), batch_size=250)
at_once = CgInfluence(model, loss, regularization=0.1, solve_simultaneously=True).fit(whole)

fisher = CgInfluence(
    model, loss, regularization=0.1, second_order_mode=SecondOrderMode.GAUSS_NEWTON
).fit(loader)

results = {
    "influences, batches of 64": influence.influences(x_test, y_test, x, y),
    "influences, one batch": at_once.influences(x_test, y_test, x, y),
    "Gauss-Newton": fisher.influences(x_test[:2], y_test[:2], x, y),
}
