"""Influences of training points on test points."""

from setting import loader, loss, model, x, x_test, y, y_test

from hessops.influence import (
    BlockMode,
    CgInfluence,
    DirectInfluence,
    EkfacInfluence,
    InverseHarmonicMeanInfluence,
)


def scores(influence):
    # (test points, training points) here; the other way round there.
    return influence.fit(loader).influences(x_test, y_test, x, y).T


direct = scores(DirectInfluence(model, loss, regularization=0.05))
data_inf = InverseHarmonicMeanInfluence(
    model, loss, regularization=0.05, block_structure=BlockMode.LAYER_WISE
)
ekfac = EkfacInfluence(model, update_diagonal=True, fisher_type="empirical", regularization=0.05)

results = {
    "explicit, data in one batch": direct,
    "explicit, data in four batches": direct,
    "CG, data in one batch": scores(CgInfluence(model, loss, regularization=0.05, rtol=1e-10)),
    "DataInf": scores(data_inf),
    "EKFAC": scores(ekfac),
}
differs = {
    "explicit, data in four batches": "dattri adds up the inverses of the Hessians of the batches",
    "EKFAC": "dattri multiplies by matrices of eigenvectors where their transposes belong, and "
    "lays weights and biases of a layer out in another order than its factors",
}
