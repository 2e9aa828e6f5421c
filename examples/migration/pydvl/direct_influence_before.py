"""Influences by a direct solve, with pyDVL."""

from pydvl.influence import InfluenceMode
from pydvl.influence.torch import BlockMode, DirectInfluence, SecondOrderMode
from setting import loader, loss, model, x, x_test, y, y_test

influence = DirectInfluence(model, loss, regularization=0.1).fit(loader)
scores = influence.influences(x_test, y_test, x, y)
gradients = influence.influences(x_test, y_test, x[:20], y[:20], mode=InfluenceMode.Perturbation)
factors = influence.influence_factors(x_test, y_test)
on_itself = influence.influences(x_test, y_test).diagonal()
by_input = influence.influences_from_factors(
    factors, x[:20], y[:20], mode=InfluenceMode.Perturbation
)

layers = DirectInfluence(model, loss, regularization=0.1, block_structure=BlockMode.LAYER_WISE).fit(
    loader
)
by_layer = layers.influences_by_block(x_test, y_test, x, y)

# In pyDVL this changes `influence` itself, which is why it stands at the end.
stronger = influence.with_regularization(0.5).influences(x_test, y_test, x, y)

fisher = DirectInfluence(
    model, loss, regularization=0.1, second_order_mode=SecondOrderMode.GAUSS_NEWTON
).fit(loader)

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
