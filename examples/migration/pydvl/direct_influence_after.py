"""Influences by a direct solve, with hessops."""

from setting import loader, loss, model, x, x_test, y, y_test

from hessops.influence import DirectInfluence

influence = DirectInfluence(model, loss, regularization=0.1).fit(loader)
scores = influence.influences(x_test, y_test, x, y)
gradients = influence.influences(x_test, y_test, x[:20], y[:20], mode="perturbation")
factors = influence.influence_factors(x_test, y_test)
on_itself = influence.self_influence(x_test, y_test)
by_input = influence.influences_from_factors(factors, x[:20], y[:20], mode="perturbation")

layers = DirectInfluence(model, loss, regularization=0.1, block_structure="layer_wise").fit(loader)
by_layer = layers.influences_by_block(x_test, y_test, x, y)

# A model of its own, which shares the matrix.
stronger = influence.with_regularization(0.5).influences(x_test, y_test, x, y)

fisher = DirectInfluence(model, loss, regularization=0.1, second_order_mode="gauss_newton").fit(
    loader
)

results = {
    "influences": scores,
    "by the input": gradients,
    "factors": factors,
    "by the input, from factors": by_input,
    "of points on themselves": on_itself,
    "layer 0": by_layer["0"],
    "layer 2": by_layer["2"],
    "another λ": stronger,
    "Gauss-Newton": fisher.influences(x_test, y_test, x, y),
}
differs = {
    "Gauss-Newton": "`gauss_newton` of pyDVL divides the sum over points by (batches − 1) · P"
}
