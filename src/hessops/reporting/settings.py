"""What was run: the model, its loss and curvature, versions, seeds."""

from __future__ import annotations

import platform
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from hessops.influence.arguments import recorded_settings
from hessops.influence.model import InfluenceFunctionModel
from hessops.operators.base import TensorOperator
from hessops.operators.inverse import DirectInverse, InverseOperator
from hessops.reporting.markup import Html, count, cut, element, foreign, table, terms

# Of trees of modules and operators.
MOST_OF_TREE = 20_000
MOST_BLOCKS = 200
# They are shown elsewhere, or say nothing.
APART = ("model", "loss", "regularization", "second_order_mode", "generator")


def settings_of(
    model: InfluenceFunctionModel | None, further: Mapping[str, object], shape: tuple[int, int]
) -> list[Html]:
    """All that is known of a run.

    Args:
        model: The fitted influence model, if it is known.
        further: What the user adds.
        shape: That of the scores.
    """
    pairs: list[tuple[object, object]] = [(foreign(key), foreign(further[key])) for key in further]
    pairs.append(("Scores", f"{shape[0]:,} test points × {shape[1]:,} training points"))
    if model is not None:
        pairs += _of_model(model)
    pairs += [("Versions", _versions()), ("Threads", torch.get_num_threads())]
    parts = [terms(pairs)]
    if model is not None:
        parts += [_blocks(model), *_trees(model)]
    return parts


def _of_model(model: InfluenceFunctionModel) -> list[tuple[object, object]]:
    fitted, space = model.fitted, model.space
    trainable = sum(p.numel() for p in model.model.parameters() if p.requires_grad)
    size = count(space.size, "parameter")
    covered = "" if space.size == trainable else f" of {trainable:,} that are trainable"
    given = recorded_settings(model).get("regularization")
    pairs: list[tuple[object, object]] = [
        ("Influence model", type(model).__name__),
        ("Network", foreign(f"{type(model.model).__name__}, {size}{covered}")),
        ("Loss", foreign(_loss_in_words(model.loss))),
        ("Curvature", model.second_order_mode.value.replace("_", " ")),
        ("Regularization as given", foreign(repr(given))),
        ("Data type and device", f"{str(space.dtype).removeprefix('torch.')}, {space.device}"),
        ("Seed", _seed(model)),
    ]
    if fitted.data.num_points is not None:
        pairs.append(("Points of the fit", f"{fitted.data.num_points:,}"))
    if fitted.data.fingerprint is not None:
        pairs.append(("Fingerprint of these", element("code", cut(fitted.data.fingerprint))))
    settings = recorded_settings(model)
    pairs += [
        (element("code", name), foreign(_in_words(settings[name])))
        for name in settings
        if name not in APART
    ]
    return pairs


def _in_words(value: object) -> str:
    return repr(getattr(value, "value", value))


def _loss_in_words(loss: object) -> str:
    return repr(loss) if isinstance(loss, nn.Module) else getattr(loss, "__name__", repr(loss))


def _seed(model: InfluenceFunctionModel) -> str:
    if model.generator is not None:
        return f"{model.generator.initial_seed()}, of the generator that was given"
    return f"{torch.initial_seed()}, of torch when this page was written"


def _versions() -> str:
    import hessops

    return (
        f"hessops {hessops.__version__}, torch {torch.__version__}, numpy {np.__version__}, "
        f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    )


def _blocks(model: InfluenceFunctionModel) -> Html:
    blocks = model.fitted.blocks
    rows = []
    for name, block in list(blocks.items())[:MOST_BLOCKS]:
        mean = "" if block.mean_eigenvalue is None else f"{block.mean_eigenvalue:.4g}"
        inverse = foreign(block.inverse._label())
        rows.append(
            [foreign(name), f"{block.space.size:,}", f"{block.regularization:.6g}", mean, inverse]
        )
    left_out = len(blocks) - len(rows)
    caption = "Blocks of parameters" + (f"; {left_out} more are not shown" if left_out else "")
    head = ["Block", "Parameters", "λ", "Mean eigenvalue", "Inverse"]
    return table(caption, head, rows, numeric=False)


def _trees(model: InfluenceFunctionModel) -> list[Html]:
    inverses = [f"{name}:\n{inverse!r}" for name, inverse in model.inverses.items()]
    return [
        _folded("The network", repr(model.model)),
        _folded("The inverses", "\n\n".join(inverses)),
    ]


def _folded(title: str, text: str) -> Html:
    return element(
        "details",
        element("summary", title),
        element("pre", cut(text, MOST_OF_TREE), tabindex="0"),
    )


def how_it_inverts(model: InfluenceFunctionModel | None) -> tuple[bool, str]:
    """Whether outcomes are missed where none are given, and a sentence about that."""
    if model is None:
        return False, "None were given, and nothing is known of the inverse."
    if any(_iterates(inverse) for inverse in model.inverses.values()):
        return True, (
            "The inverse is iterative and no outcomes of its solves were given: whether they met "
            "their tolerances is not known here."
        )
    return False, (
        "No iterative solver is known in the inverse, and no outcomes were given: residuals are "
        "not known here."
    )


def _iterates(operator: TensorOperator) -> bool:
    is_solver = isinstance(operator, InverseOperator) and not isinstance(operator, DirectInverse)
    return is_solver or any(_iterates(part) for part in operator._children())
