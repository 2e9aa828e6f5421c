"""Influences by preconditioned conjugate gradients, with hessops."""

from setting import loader, loss, model, x, x_test, y, y_test
from torch.utils.data import DataLoader, TensorDataset

from hessops import NystroemPreconditioner
from hessops.influence import CgInfluence

influence = CgInfluence(
    model, loss, regularization=0.1, preconditioner=NystroemPreconditioner(rank=30), rtol=1e-10
).fit(loader)

whole = DataLoader(TensorDataset(x, y), batch_size=250)
at_once = CgInfluence(model, loss, regularization=0.1, use_block_cg=True, rtol=1e-10).fit(whole)

fisher = CgInfluence(
    model, loss, regularization=0.1, second_order_mode="gauss_newton", rtol=1e-10
).fit(loader)

results = {
    "influences, batches of 64": influence.influences(x_test, y_test, x, y),
    "influences, one batch": at_once.influences(x_test, y_test, x, y),
    "Gauss-Newton": fisher.influences(x_test[:2], y_test[:2], x, y),
}
differs = {
    "influences, batches of 64": "`HessianOperator` of pyDVL is the mean of the batch means",
    "Gauss-Newton": "`PointAveraging` of pyDVL weights batches by the shape of the product",
}
