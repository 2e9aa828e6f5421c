"""The order in which programs and recipes are shown: that of reading, not of the alphabet."""

from __future__ import annotations

RECIPES = (
    "regression",
    "classification",
    "class_weights",
    "custom_loss",
    "mapping_inputs",
    "larger_than_memory",
    "several_machines",
    "composing_operators",
    "custom_operator",
    "custom_preconditioner",
    "custom_averaging",
    "laplace_sampling",
    "pruning_scores",
    "sharpness_in_training",
)
PROGRAMS = (
    "mislabelled_digits",
    "influence_digits",
    "curvature_digits",
    "kronecker_digits",
    "distributed_influence",
    "dask_influence",
)
PLACES = {name: place for place, name in enumerate((*RECIPES, *PROGRAMS))}


def by_reading(filename: str) -> tuple[int, str]:
    """Sort the names above as listed there, and all others after them by name."""
    name = filename.removesuffix(".py")
    return PLACES.get(name, len(PLACES)), name
