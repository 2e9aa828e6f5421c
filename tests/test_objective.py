"""Objective: model and loss as pure functions, every claim about them checked, nothing touched."""

from __future__ import annotations

import copy
import functools
import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import DenseReference, relative_error
from torch import Tensor, nn

from hessops import Batch, GaussNewtonOperator, HessianOperator, Objective
from hessops.errors import (
    ArgumentError,
    ArgumentTypeError,
    DataError,
    DtypeError,
    HessopsError,
    LossError,
    ModelError,
    NonFiniteError,
    TrainingModeError,
)

N, D, C = 8, 4, 3
WEIGHTS = torch.tensor([1.0, 5.0, 20.0], dtype=torch.float64)

LossFunction = Callable[..., Tensor]


def mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, C)).to(dtype)


def inputs(n: int = N, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(1), dtype=dtype)


def classes(n: int = N) -> Tensor:
    return torch.arange(n) % C


def values(n: int = N, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, C, generator=torch.Generator().manual_seed(2), dtype=dtype)


def checked(
    model: nn.Module, loss: LossFunction, x: object, y: object, reduction: str = "mean"
) -> Objective:
    """Made, and checked on one batch, as an operator does in its first pass."""
    objective = Objective(model, loss, reduction=reduction)  # type: ignore[arg-type]
    objective.check(Batch.from_raw((x, y)))
    return objective


# --- values --------------------------------------------------------------------------------------

# Per loss: its mean, sum and vector over points, and targets.
REDUCTIONS = ("mean", "sum", "none")
LOSSES: dict[str, tuple[dict[str, LossFunction], Callable[[], Tensor]]] = {
    "cross-entropy": ({r: nn.CrossEntropyLoss(reduction=r) for r in REDUCTIONS}, classes),
    "mse": (
        {
            "mean": nn.MSELoss(),
            "sum": lambda o, y: (o - y).square().mean(dim=1).sum(),
            "none": lambda o, y: (o - y).square().mean(dim=1),
        },
        values,
    ),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_batch_loss_is_the_mean_whatever_the_loss_returns(name: str, reduction: str) -> None:
    losses, targets = LOSSES[name]
    torch.manual_seed(0)
    model, batch = mlp(), Batch.from_raw((inputs(), targets()))
    objective = Objective(model, losses[reduction], reduction=reduction)  # type: ignore[arg-type]
    objective.check(batch)
    value = objective.batch_loss(objective.params, batch)
    expected = losses["mean"](model(batch.x), batch.y).detach()
    torch.testing.assert_close(value, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_sample_losses_are_those_of_each_point_alone(name: str, reduction: str) -> None:
    losses, targets = LOSSES[name]
    model, batch = mlp(), Batch.from_raw((inputs(), targets()))
    objective = Objective(model, losses[reduction], reduction=reduction)  # type: ignore[arg-type]
    alone = [
        losses["mean"](model(batch.x[i : i + 1]), batch.y[i : i + 1]).detach()  # type: ignore[index]
        for i in range(N)
    ]
    result = objective.sample_losses(objective.params, batch)
    torch.testing.assert_close(result, torch.stack(alone), rtol=1e-13, atol=0)


def test_params_may_name_some_of_the_parameters() -> None:
    model, batch = mlp(), Batch.from_raw((inputs(), values()))
    objective = Objective(model, nn.MSELoss())
    bias = torch.ones(C).double()
    changed = copy.deepcopy(model)
    changed[2].bias.data = bias
    expected = nn.MSELoss()(changed(batch.x), batch.y).detach()
    torch.testing.assert_close(objective.batch_loss({"2.bias": bias}, batch), expected)


# --- losses that are what they claim -------------------------------------------------------------


def _labels(n: int = N) -> Tensor:
    return (values(n) > 0).double()


def _masked_mse(output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    y, mask = target
    return (mask * (output - y).square()).mean()


def _control_flow(output: Tensor, target: Tensor) -> Tensor:
    rows = [
        (o - t).square().sum() if t[0] > 0 else (o - t).abs().sum()
        for o, t in zip(output, target, strict=True)
    ]
    return torch.stack(rows).mean()


HONEST: dict[str, tuple[LossFunction, object, str]] = {
    "cross-entropy": (nn.CrossEntropyLoss(), classes(), "mean"),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), classes(), "mean"),
    "class probabilities": (nn.CrossEntropyLoss(), values().softmax(1), "mean"),
    "ignore_index that never occurs": (nn.CrossEntropyLoss(ignore_index=-1), classes(), "mean"),
    "equal weights": (nn.CrossEntropyLoss(weight=torch.ones(C).double()), classes(), "mean"),
    "weighted vector": (nn.CrossEntropyLoss(WEIGHTS, reduction="none"), classes(), "none"),
    "weighted sum": (nn.CrossEntropyLoss(WEIGHTS, reduction="sum"), classes(), "sum"),
    "ignored in a vector": (
        nn.CrossEntropyLoss(ignore_index=0, reduction="none"),
        classes(),
        "none",
    ),
    "nll": (lambda o, y: F.nll_loss(o.log_softmax(1), y), classes(), "mean"),
    "huber": (nn.HuberLoss(delta=0.3), values(), "mean"),
    "smooth l1": (nn.SmoothL1Loss(), values(), "mean"),
    "l1": (nn.L1Loss(), values(), "mean"),
    "binary": (nn.BCEWithLogitsLoss(), _labels(), "mean"),
    "binary with pos_weight": (nn.BCEWithLogitsLoss(pos_weight=WEIGHTS), _labels(), "mean"),
    "probabilities": (lambda o, y: F.binary_cross_entropy(o.sigmoid(), y), _labels(), "mean"),
    "poisson": (nn.PoissonNLLLoss(), values().exp(), "mean"),
    "multi margin": (nn.MultiMarginLoss(), classes(), "mean"),
    "lambda": (lambda o, y: (o - y).pow(4).sum() / len(o), values(), "mean"),
    "partial": (functools.partial(F.cross_entropy, reduction="sum"), classes(), "sum"),
    "loop over points": (_control_flow, values(), "mean"),
    "weights of points as a target": (_masked_mse, (values(), _labels()), "mean"),
    "no target": (lambda o, _: o.square().mean(), None, "mean"),
    "writes to the output": (lambda o, y: o.sub_(y).square().mean(), values(), "mean"),
    "zero": (lambda o, _: 0 * o.sum(), None, "mean"),
}


@pytest.mark.parametrize("case", HONEST)
def test_a_loss_that_is_what_it_claims_is_accepted(case: str) -> None:
    loss, y, reduction = HONEST[case]
    checked(mlp(), loss, inputs(), y, reduction)


# --- losses that are not -------------------------------------------------------------------------


def _contrastive(output: Tensor, target: Tensor) -> Tensor:
    similarity = output @ output.T
    return F.cross_entropy(similarity, torch.arange(len(output)))


def _of_pairs(output: Tensor, target: Tensor) -> Tensor:
    if len(output) < 2:
        raise ValueError("needs two points")
    return torch.pdist(output).mean()


def _correlation(output: Tensor, target: Tensor) -> Tensor:
    return 1 - torch.corrcoef(torch.stack([output.reshape(-1), target.reshape(-1)]))[0, 1]


DISHONEST: dict[str, tuple[LossFunction, object, str, str]] = {
    "weighted mean": (nn.CrossEntropyLoss(WEIGHTS), classes(), "mean", "reduction='none'"),
    "ignored targets": (nn.CrossEntropyLoss(ignore_index=0), classes(), "mean", "ignore"),
    "sum claimed as mean": (nn.MSELoss(reduction="sum"), values(), "mean", "reduction='sum'"),
    "mean claimed as sum": (nn.MSELoss(), values(), "sum", "reduction='mean'"),
    "vector claimed as mean": (
        nn.CrossEntropyLoss(reduction="none"),
        classes(),
        "mean",
        r"shape \(8,\)",
    ),
    "mean claimed as vector": (nn.CrossEntropyLoss(), classes(), "none", r"shape \(\)"),
    "elements claimed as vector": (
        nn.MSELoss(reduction="none"),
        values(),
        "none",
        r"shape \(8, 3\)",
    ),
    "root of the mean": (lambda o, y: F.mse_loss(o, y).sqrt(), values(), "mean", "mean"),
    "contrastive": (_contrastive, classes(), "mean", "not the mean"),
    "pairs": (_of_pairs, classes(), "mean", "needs two points"),
    "correlation": (_correlation, values(), "mean", "mean"),
    "centred vector": (
        lambda o, y: (o - y).square().mean(1) - (o - y).square().mean() / 2,
        values(),
        "none",
        "vector",
    ),
    "no tensor": (lambda o, y: 3.0, values(), "mean", "tensor"),
    "no gradient": (lambda o, y: F.mse_loss(o, y).detach(), values(), "mean", "differentiable"),
    "accuracy": (
        lambda o, y: (o.argmax(1) == y).double().mean(),
        classes(),
        "mean",
        "differentiable",
    ),
    "writes to the target": (lambda o, y: y.sub_(o).square().mean(), values(), "mean", "target"),
}


@pytest.mark.parametrize("case", DISHONEST)
def test_a_loss_that_is_not_what_it_claims_is_refused_with_advice(case: str) -> None:
    loss, y, reduction, text = DISHONEST[case]
    with pytest.raises(LossError, match="loss") as caught:
        checked(mlp(), loss, inputs(), y, reduction)
    caught.match(text)


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_target_that_broadcasts_against_the_output_is_refused() -> None:
    model = nn.Linear(D, 1).double()
    with pytest.raises(LossError, match="mean"):
        checked(model, nn.MSELoss(), inputs(), values()[:, 0])


SAME_AT_ZERO: dict[str, tuple[LossFunction, str]] = {
    "weighted mean": (nn.CrossEntropyLoss(WEIGHTS), "mean"),
    "ignored targets": (nn.CrossEntropyLoss(ignore_index=0), "mean"),
    "coupled vector": (
        lambda o, y: F.cross_entropy(o - o.mean(0), y, reduction="none"),
        "none",
    ),
}


@pytest.mark.parametrize("case", SAME_AT_ZERO)
def test_a_wrong_claim_is_seen_where_all_outputs_are_zero(case: str) -> None:
    loss, reduction = SAME_AT_ZERO[case]
    model = nn.Linear(D, C).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    with pytest.raises(LossError, match="loss is not the"):
        checked(model, loss, inputs(), classes(), reduction)


class Penalised(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, target) + sum(p.square().sum() for p in self.model.parameters())


PENALTIES: dict[str, Callable[[nn.Module], LossFunction]] = {
    "function": lambda model: Penalised(model).forward,
    "module": Penalised,
}


@pytest.mark.parametrize("form", PENALTIES)
def test_a_penalty_on_the_parameters_within_the_loss_is_refused(form: str) -> None:
    model = mlp()
    with pytest.raises(LossError, match=r"operator\.shift"):
        checked(model, PENALTIES[form](model), inputs(), values())


def test_a_loss_module_may_have_parameters_of_its_own() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0).double())

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return self.scale * F.mse_loss(output, target)

    checked(mlp(), Scaled(), inputs(), values())


def test_a_random_loss_is_refused() -> None:
    with pytest.raises(TrainingModeError, match="loss"):
        checked(mlp(), lambda o, y: F.mse_loss(F.dropout(o), y), inputs(), values())


def test_every_batch_of_the_first_pass_is_checked() -> None:
    y = torch.tensor([0, 0, 0, 0, 0, 1, 2, 1])
    loss = nn.CrossEntropyLoss(WEIGHTS)
    data = [(inputs()[:4], y[:4]), (inputs()[4:], y[4:])]
    operator = HessianOperator(mlp(), loss, data)
    with pytest.raises(LossError, match="batch 1"):
        operator.apply(torch.ones(operator.input_size).double())


# --- models that are no function of one point ----------------------------------------------------


class Rewriting(nn.Module):
    """A linear layer that constrains its weights in the forward, in one of three ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.linear = nn.Linear(D, C).double()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.linear.weight
        if self.how == "in place":
            with torch.no_grad():
                weight.clamp_(-0.1, 0.1)
        elif self.how == "through data":
            weight.data.clamp_(-0.1, 0.1)
        else:
            weight.data = torch.renorm(weight.data, 2, 0, 0.1)
        return self.linear(x)


class Around(nn.Module):
    """A linear layer and a function around it: what users write in a forward."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], object], outputs: int = C) -> None:
        super().__init__()
        self.linear = nn.Linear(D, outputs).double()
        self.function = forward

    def forward(self, x: Tensor) -> object:
        return self.function(self.linear, x)


class Normalised(nn.Module):
    """Writes a running mean, in training mode only where `always` is false."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(D, C).double()
        self.always = always
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.always or self.training:
            self.calls.add_(1)
            self.count.add_(1)
        return self.linear(x)


class Listed(nn.Module):
    """Keeps a parameter in a plain list too, and uses it from there."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, C).double()
        self.weights = [self.linear.weight]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weights[0].T + self.linear.bias


class Closure(nn.Module):
    """Calls a function that closes over the module it was made in."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D, D).double()
        self.second = nn.Linear(D, C).double()
        self.function = lambda x: torch.tanh(self.first(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(x))


def _patched() -> nn.Module:
    model = mlp()
    original = model.forward
    model.forward = lambda x: original(x).square()  # type: ignore[method-assign]
    return model


class First(nn.Module):
    def forward(self, pair: tuple[Tensor, object]) -> Tensor:
        return pair[0]


def _in_place(layer: nn.Module, x: Tensor) -> object:
    x /= 255
    return layer(x)


def _noisy_by_numpy(layer: nn.Module, x: Tensor) -> object:
    return layer(x) if np.random.rand() < 0.99 else x  # noqa: NPY002


def _noisy_by_python(layer: nn.Module, x: Tensor) -> object:
    return layer(x) if random.random() < 0.99 else x


@torch.no_grad()
def _without_gradient(layer: nn.Module, x: Tensor) -> object:
    return layer(x)


@torch.inference_mode()
def _for_inference(layer: nn.Module, x: Tensor) -> object:
    return layer(x)


def _batch_norm(**keywords: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(D, 5), nn.BatchNorm1d(5, **keywords), nn.Linear(5, C)).double()


def _around(function: Callable[[nn.Module, Tensor], object]) -> Callable[[], nn.Module]:
    return lambda: Around(function)


UNSUITABLE: dict[str, tuple[Callable[[], nn.Module], type[HessopsError], str]] = {
    "active dropout": (
        lambda: nn.Sequential(nn.Linear(D, C), nn.Dropout(0.5)).double(),
        TrainingModeError,
        r"1.*model\.eval\(\)",
    ),
    "functional dropout": (
        lambda: Around(lambda layer, x: F.dropout(layer(x))).eval(),
        TrainingModeError,
        "random",
    ),
    "numpy randomness": (_around(_noisy_by_numpy), TrainingModeError, "random"),
    "python randomness": (_around(_noisy_by_python), TrainingModeError, "random"),
    "batch-norm in training mode": (_batch_norm, TrainingModeError, r"model\.eval\(\)"),
    "batch-norm without running statistics": (
        lambda: _batch_norm(track_running_stats=False).eval(),
        TrainingModeError,
        "batch-norm",
    ),
    "coupled points": (
        _around(lambda layer, x: layer(x - x.mean(dim=0))),
        TrainingModeError,
        "half of the points",
    ),
    "recurrence over the first dimension": (
        lambda: nn.Sequential(nn.LSTM(D, C, dtype=torch.float64), First()),
        TrainingModeError,
        "half of the points",
    ),
    "weights clamped in place": (lambda: Rewriting("in place"), ModelError, r"linear\.weight"),
    "weights clamped through data": (
        lambda: Rewriting("through data"),
        ModelError,
        r"linear\.weight",
    ),
    "weights renormalised": (lambda: Rewriting("renorm"), ModelError, r"linear\.weight"),
    "buffers written in training": (lambda: Normalised(False), TrainingModeError, "calls"),
    "input written": (_around(_in_place), ModelError, "input"),
    "parameters in a list": (Listed, ModelError, r"linear\.weight.*ParameterList"),
    "closure over the module": (Closure, ModelError, r"first\.weight.*closes"),
    "replaced forward": (_patched, ModelError, r"0\.weight.*replaced forward"),
    "no gradient": (_around(_without_gradient), ModelError, "no_grad"),
    "inference mode": (_around(_for_inference), ModelError, "inference_mode"),
    "detached": (_around(lambda layer, x: layer(x).detach()), ModelError, "detach"),
    "mean over points": (
        _around(lambda layer, x: layer(x).mean(dim=0)),
        ModelError,
        r"shape \(3,\)",
    ),
    "scalar": (_around(lambda layer, x: layer(x).mean()), ModelError, r"shape \(\)"),
    "scalar beside the output": (
        _around(lambda layer, x: {"loss": layer(x).mean(), "logits": layer(x)}),
        ModelError,
        r"output\['loss'\]",
    ),
    "points in the second dimension": (
        _around(lambda layer, x: layer(x).T),
        ModelError,
        r"shape \(3, 8\)",
    ),
    "fixed batch size": (
        _around(lambda layer, x: layer(x.view(N, D))),
        ModelError,
        "4 of the points",
    ),
    "no tensor": (_around(lambda layer, x: layer(x).tolist()), ModelError, "list"),
    "complex output": (_around(lambda layer, x: layer(x) * 1j), ModelError, "complex"),
    "NaN output": (_around(lambda layer, x: layer(x).sub(9).log()), NonFiniteError, "output"),
}


@pytest.mark.parametrize("case", UNSUITABLE)
def test_a_model_that_is_no_function_of_one_point_is_refused(case: str) -> None:
    build, error, text = UNSUITABLE[case]
    torch.manual_seed(0)
    x = inputs()
    original = x.clone()
    with pytest.raises(error, match=text):
        checked(build(), lambda o, y: F.mse_loss(o, y), x, values())
    assert torch.equal(x, original)


def _scripted() -> nn.Module:
    return torch.jit.script(mlp())


def _holding_a_graph() -> nn.Module:
    model = mlp()
    model.last = model(inputs())
    return model


def _compiled_within() -> nn.Module:
    model = mlp()
    model[0] = torch.compile(model[0])  # type: ignore[assignment]
    return model


def _embedding(**keywords: object) -> nn.Module:
    return nn.Sequential(nn.Embedding(5, D, **keywords), nn.Linear(D, C))  # type: ignore[arg-type]


UNSUITABLE_AT_ONCE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "max_norm": (lambda: _embedding(max_norm=1.0), "'0'.*max_norm"),
    "sparse": (lambda: _embedding(sparse=True), "'0'.*sparse"),
    "gradients scaled": (lambda: _embedding(scale_grad_by_freq=True), "'0'.*scale_grad_by_freq"),
    "wrapped": (lambda: nn.DataParallel(mlp()), r"model\.module"),
    "bag with max_norm": (lambda: nn.EmbeddingBag(5, D, max_norm=1.0), "max_norm"),
    "compiled": (lambda: torch.compile(mlp()), "compiled"),  # type: ignore[arg-type, return-value]
    "compiled within": (_compiled_within, "'0'"),
    "scripted": (_scripted, "compiled"),
    "lazy": (lambda: nn.LazyLinear(2), "lazy"),
    "frozen": (lambda: mlp().requires_grad_(False), "trainable"),
    "holding a graph": (_holding_a_graph, "copied"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("case", UNSUITABLE_AT_ONCE)
def test_a_model_that_cannot_be_differentiated_twice_is_refused_at_once(case: str) -> None:
    build, text = UNSUITABLE_AT_ONCE[case]
    with pytest.raises(ModelError, match=text):
        Objective(build(), nn.MSELoss())


class Attention(nn.Module):
    """Causal attention, with the mask of minus infinity that torch makes for it."""

    def __init__(self, dtype: torch.dtype, length: int = 6, width: int = 16) -> None:
        super().__init__()
        mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=dtype)
        self.register_buffer("mask", mask)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, batch_first=True, dtype=dtype, activation="gelu"
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, C, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x, mask=self.mask)[:, -1])


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.GroupNorm(4, 16),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, C),
    )


def deep() -> nn.Module:
    width = 64
    layers = [nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(12)]
    return nn.Sequential(*layers, nn.Linear(width, C))


def _saturated() -> nn.Module:
    model = deep()
    model[-1].weight.data.mul_(1e4)  # type: ignore[operator, union-attr]
    return model


def _zero() -> nn.Module:
    model = deep()
    nn.init.zeros_(model[-1].weight)  # type: ignore[index, arg-type]
    nn.init.zeros_(model[-1].bias)  # type: ignore[index, arg-type]
    return model


def _masked_logits() -> nn.Module:
    hidden = torch.tensor([False, False, True])
    return nn.Sequential(deep(), Mapped(lambda o: o.masked_fill(hidden, -torch.inf)))


class Mapped(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


LARGE_N = 512
SUITABLE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "deep": (deep, (LARGE_N, 64)),
    "saturated": (_saturated, (LARGE_N, 64)),
    "zero outputs": (_zero, (LARGE_N, 64)),
    "masked logits": (_masked_logits, (LARGE_N, 64)),
    "convolutional": (convolutional, (64, 3, 12, 12)),
    "recurrent": (
        lambda: nn.Sequential(
            nn.LSTM(8, 16, batch_first=True), First(), nn.Flatten(), nn.Linear(96, C)
        ),
        (64, 6, 8),
    ),
}
TARGETS: dict[str, tuple[LossFunction, Callable[[Tensor], Tensor]]] = {
    "cross-entropy": (nn.CrossEntropyLoss(), lambda o: classes(len(o)) % 2),
    "huber": (nn.HuberLoss(), torch.randn_like),
    "loss of zero": (nn.MSELoss(), lambda o: o),
}


# Where a logit is minus infinity, only a cross-entropy is finite.
SUITABLE_PAIRS = [
    (name, target)
    for name in SUITABLE
    for target in TARGETS
    if name != "masked logits" or target == "cross-entropy"
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "target"), SUITABLE_PAIRS)
def test_well_behaved_models_are_accepted_in_every_precision(
    name: str, target: str, dtype: torch.dtype
) -> None:
    build, shape = SUITABLE[name]
    loss, targets_of = TARGETS[target]
    model = build().eval().to(dtype)
    x = torch.randn(shape).to(dtype)
    with torch.no_grad():
        y = targets_of(model(x))
    checked(model, loss, x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_attention_with_a_causal_mask_is_accepted(dtype: torch.dtype) -> None:
    checked(
        Attention(dtype).eval(),
        nn.CrossEntropyLoss(),
        torch.randn(64, 6, 16).to(dtype),
        classes(64),
    )


HARMLESS: dict[str, Callable[[], nn.Module]] = {
    "training mode without effect": lambda: mlp().train(),
    "inactive dropout": lambda: nn.Sequential(mlp(), nn.Dropout(0.5)).eval(),
    "dropout of zero": lambda: nn.Sequential(mlp(), nn.Dropout(0.0)).train(),
    "batch-norm in evaluation": lambda: _batch_norm().eval(),
    "instance norm": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2), nn.Flatten(), nn.Linear(D, C)
    ).double(),
    "buffers written in evaluation": lambda: Normalised(True).eval(),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(D, C).double()),
    "derivative by the input": _around(
        lambda layer, x: torch.autograd.grad(
            layer(x.requires_grad_()).square().sum(), x, create_graph=True
        )[0][:, :C]
    ),
    "compiled in place": lambda: _compiled_in_place(),
}


def _compiled_in_place() -> nn.Module:
    model = mlp()
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("case", HARMLESS)
def test_what_has_no_effect_is_accepted(case: str) -> None:
    checked(HARMLESS[case](), nn.MSELoss(), inputs(), values())


def test_a_batch_of_one_point_is_accepted() -> None:
    checked(mlp(), nn.CrossEntropyLoss(), inputs(1), classes(1))


# --- forms of inputs and outputs -----------------------------------------------------------------

OUTPUTS: dict[str, tuple[Callable[[nn.Module, Tensor], object], LossFunction]] = {
    "dictionary": (
        lambda layer, x: {"logits": layer(x), "hidden": x},
        lambda o, y: F.mse_loss(o["logits"], y),
    ),
    "tuple": (lambda layer, x: (layer(x), x), lambda o, y: F.mse_loss(o[0], y)),
    "list": (lambda layer, x: [layer(x), layer(-x)], lambda o, y: F.mse_loss(o[0] + o[1], y)),
    "with whole numbers": (
        lambda layer, x: (layer(x), layer(x).argmax(1)),
        lambda o, y: F.mse_loss(o[0], y),
    ),
}


@pytest.mark.parametrize("form", OUTPUTS)
def test_outputs_may_be_nested(form: str) -> None:
    function, loss = OUTPUTS[form]
    model = Around(function)
    reference = DenseReference(model, loss, inputs(), values())
    operator = HessianOperator(model, loss, [(inputs(), values())])
    assert relative_error(operator.to_dense(), reference.hessian()) < 1e-12


class OfMapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, C).double()

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        return self.linear(x["a"]) * x["b"].unsqueeze(1)


def test_inputs_and_targets_may_be_mappings() -> None:
    x = {"a": inputs(), "b": torch.arange(N).double()}
    y = {"value": values()}
    checked(OfMapping(), lambda o, t: F.mse_loss(o, t["value"]), x, y)


@pytest.mark.parametrize(
    ("x", "call"),
    [({"a": inputs(), "b": inputs()}, r"model\(\*\*x\)"), ((inputs(),) * 2, r"model\(\*x\)")],
)
def test_a_model_of_several_inputs_fails_with_a_note_how_to_pass_them(x: object, call: str) -> None:
    with pytest.raises(TypeError) as raised:
        checked(nn.Bilinear(D, D, C).double(), F.mse_loss, x, values())
    (note,) = raised.value.__notes__
    assert re.search(call, note)


# --- NaN and dtypes ------------------------------------------------------------------------------


def with_nan(tensor: Tensor) -> Tensor:
    spoiled = tensor.clone()
    spoiled.view(-1)[3] = float("nan")
    return spoiled


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_parameters_that_are_not_finite_are_refused_by_name(value: float) -> None:
    model = mlp()
    model[2].bias.data[0] = value
    with pytest.raises(NonFiniteError, match=r"parameter '2\.bias'"):
        Objective(model, nn.MSELoss())


def test_nan_in_a_buffer_is_refused_by_name() -> None:
    model = _batch_norm().eval()
    model[1].running_mean[0] = float("nan")  # type: ignore[index]
    with pytest.raises(NonFiniteError, match=r"buffer '1\.running_mean'"):
        Objective(model, nn.MSELoss())


NOT_FINITE: dict[str, tuple[Callable[[], tuple[object, object]], str]] = {
    "inputs": (lambda: (with_nan(inputs()), values()), "'x'"),
    "one of several inputs": (lambda: ({"a": inputs(), "b": with_nan(values())}, None), "x.*'b'"),
    "targets": (lambda: (inputs(), with_nan(values())), "'y'"),
}


@pytest.mark.parametrize("case", NOT_FINITE)
def test_nan_in_the_data_is_refused_by_name(case: str) -> None:
    build, text = NOT_FINITE[case]
    with pytest.raises(NonFiniteError, match=text):
        checked(mlp(), nn.MSELoss(), *build())


NOT_FINITE_LOSSES: dict[str, tuple[LossFunction, str]] = {
    "everything ignored": (lambda o, y: F.cross_entropy(o, y * 0, ignore_index=0), "ignored"),
    "logarithm of a negative number": (lambda o, y: (o - 9).log().mean(), "loss"),
    "root of zero": (lambda o, y: (0 * o).square().sum(1).sqrt().mean(), "gradient"),
}


@pytest.mark.parametrize("case", NOT_FINITE_LOSSES)
def test_a_loss_or_gradient_that_is_not_finite_is_refused(case: str) -> None:
    loss, text = NOT_FINITE_LOSSES[case]
    with pytest.raises(NonFiniteError, match=text):
        checked(mlp(), loss, inputs(), classes())


def test_inputs_of_another_dtype_are_refused_by_name() -> None:
    with pytest.raises(DtypeError, match=r"x is torch\.float32, the parameters are torch\.float64"):
        checked(mlp(), nn.MSELoss(), inputs(dtype=torch.float32), values())


def test_targets_of_a_dtype_that_the_loss_does_not_take_are_refused_by_name() -> None:
    with pytest.raises(DtypeError, match=r"y is torch\.float64, the parameters are torch\.float32"):
        checked(mlp(torch.float32), nn.HuberLoss(), inputs(dtype=torch.float32), values())


def test_whole_numbers_that_a_loss_cannot_differentiate_at_are_refused_by_name() -> None:
    y = (values() > 0).long()
    with pytest.raises(DtypeError, match=r"y is torch\.int64"):
        checked(mlp(), nn.HuberLoss(), inputs(), y)


def test_a_batch_of_no_points_is_refused() -> None:
    with pytest.raises(DataError, match="no points"):
        checked(mlp(), nn.MSELoss(), inputs()[:0], values()[:0])


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(ArgumentError, match="reduction"):
        Objective(mlp(), nn.MSELoss(), reduction="average")  # type: ignore[arg-type]


def test_a_loss_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(ArgumentTypeError, match="loss"):
        Objective(mlp(), "mse")  # type: ignore[arg-type]


# --- the user's model ----------------------------------------------------------------------------


def state_of(model: nn.Module) -> list[object]:
    """Everything of a model that an operator could disturb, in comparable form."""
    tensors = [*model.parameters(), *model.buffers()]
    return [
        [t.tolist() for t in tensors],
        [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        [t.requires_grad for t in tensors],
        [t._version for t in tensors],
        [t.data_ptr() for t in tensors],
        [module.training for module in model.modules()],
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # type: ignore[index]  # noqa: NPY002
    ]


def with_buffers() -> nn.Module:
    """Buffers that every forward writes, and a frozen parameter."""
    model = nn.Sequential(Normalised(True), nn.BatchNorm1d(C), nn.Linear(C, C)).double().eval()
    model[2].bias.requires_grad_(False)
    return model


def partly_in_training_mode() -> nn.Module:
    model = nn.Sequential(nn.Linear(D, 5), nn.BatchNorm1d(5), nn.Linear(5, C)).double().train()
    model[1].eval()
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "with buffers": with_buffers,
    "partly in training mode": partly_in_training_mode,
}


USES: dict[str, Callable[[nn.Module], object]] = {
    "construction": lambda model: Objective(model, nn.MSELoss()),
    "check": lambda model: checked(model, nn.MSELoss(), inputs(), values()),
    "product": lambda model: HessianOperator(
        model, nn.MSELoss(), [(inputs(), values())]
    ).to_dense(),
    "gauss-newton product": lambda model: GaussNewtonOperator(
        model, nn.MSELoss(), [(inputs(), values())]
    ).to_dense(),
    "refresh": lambda model: Objective(model, nn.MSELoss()).refresh(),
    "move": lambda model: Objective(model, nn.MSELoss()).to("meta"),
    "refused check": lambda model: refused(
        lambda: checked(model, nn.MSELoss(reduction="sum"), inputs(), values())
    ),
}


def refused(call: Callable[[], object]) -> None:
    with pytest.raises(HessopsError):
        call()


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", MODELS)
def test_the_users_model_and_random_state_are_left_as_they_were(name: str, use: str) -> None:
    model = MODELS[name]()
    model(inputs()).square().sum().backward()
    before = state_of(model)
    USES[use](model)
    assert state_of(model) == before


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "optimizer step": lambda model: torch.optim.SGD(model.parameters(), 0.1).step(),
    "training mode": nn.Module.train,
    "conversion": lambda model: model.to(torch.float32),
    "buffers": lambda model: model.get_buffer("1.running_var").fill_(9.0),
    "frozen parameters": lambda model: model.requires_grad_(False),
    "values": lambda model: model.get_parameter("2.weight").data.zero_(),
    "gradients": nn.Module.zero_grad,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_leaves_an_operator_unchanged(change: str) -> None:
    model = _batch_norm().eval()
    model(inputs()).square().sum().backward()
    operator = HessianOperator(model, nn.MSELoss(), [(inputs(), values())])
    fresh = HessianOperator(copy.deepcopy(model), nn.MSELoss(), [(inputs(), values())])
    CHANGES[change](model)
    assert torch.equal(operator.to_dense(), fresh.to_dense())


def test_refresh_takes_the_model_as_it_is_now() -> None:
    model = mlp()
    operator = HessianOperator(model, nn.MSELoss(), [(inputs(), values())])
    operator.to_dense()
    model[0].weight.data.mul_(2)
    expected = HessianOperator(model, nn.MSELoss(), [(inputs(), values())]).to_dense()
    assert torch.equal(operator.refresh().to_dense(), expected)


def test_refresh_checks_the_model_again() -> None:
    model = nn.Sequential(mlp(), nn.Dropout(0.5)).eval()
    operator = HessianOperator(model, nn.MSELoss(), [(inputs(), values())])
    operator.to_dense()
    model.train()
    operator.refresh()
    with pytest.raises(TrainingModeError):
        operator.to_dense()


REFUSED_REFRESHES: dict[str, tuple[Callable[[nn.Sequential], object], type[HessopsError]]] = {
    "other dtype": (lambda model: model.float(), DtypeError),
    "other shape": (lambda model: model.__setitem__(2, nn.Linear(5, 7).double()), ModelError),
    "parameter gone": (lambda model: model.__delitem__(2), ModelError),
    "NaN": (lambda model: model[0].bias.data.fill_(float("nan")), NonFiniteError),
}


@pytest.mark.parametrize("case", REFUSED_REFRESHES)
def test_refresh_to_a_model_that_does_not_fit_is_refused(case: str) -> None:
    change, error = REFUSED_REFRESHES[case]
    model = mlp()
    objective = Objective(model, nn.MSELoss())
    before = objective.params
    change(model)
    with pytest.raises(error, match="parameter"):
        objective.refresh()
    assert all(torch.equal(objective.params[name], before[name]) for name in before)


def test_a_loss_module_is_copied_with_its_weights() -> None:
    weight = WEIGHTS.clone()
    loss = nn.CrossEntropyLoss(weight=weight, reduction="none")
    data = [(inputs(), classes())]
    operator = HessianOperator(mlp(), loss, data, reduction="none")
    expected = operator.to_dense()
    weight.fill_(7.0)
    assert torch.equal(operator.to_dense(), expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_buffers_that_a_forward_writes_after_their_use_are_refused_as_torch_does(rows: int) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, C).double()
            self.register_buffer("calls", torch.ones(()).double())

        def forward(self, x: Tensor) -> Tensor:
            output = self.linear(x) * self.calls
            self.calls.add_(1)
            return output

    operator = HessianOperator(Counting().eval(), nn.MSELoss(), [(inputs(), values())])
    with pytest.raises(ModelError, match=r"in-?place operation"):
        operator.apply(torch.ones(rows, operator.input_size, dtype=torch.float64))


# --- the caller's contexts -----------------------------------------------------------------------


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CONTEXTS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default dtype": lambda: _default_dtype(torch.float64),
}


@pytest.mark.parametrize("when", ["construction", "product", "both"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_the_callers_context_does_not_change_a_product(context: str, when: str) -> None:
    model, x, y = mlp(torch.float32), inputs(dtype=torch.float32), classes()

    def operator() -> HessianOperator:
        return HessianOperator(model, nn.CrossEntropyLoss(), [(x, y)])

    expected = operator().to_dense()
    made = None
    if when != "product":
        with CONTEXTS[context]():
            made = operator()
    made = made or operator()
    if when == "construction":
        result = made.to_dense()
    else:
        with CONTEXTS[context]():
            result = made.to_dense()
    assert torch.equal(result, expected)


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_callers_context_does_not_change_a_check(context: str) -> None:
    objective = Objective(mlp(), nn.MSELoss())
    batch = Batch.from_raw((inputs(), values()))
    with CONTEXTS[context]():
        objective.check(batch)


def test_a_model_made_in_inference_mode_can_be_differentiated() -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        model = mlp()
    torch.manual_seed(0)
    data = [(inputs(), values())]
    expected = HessianOperator(mlp(), nn.MSELoss(), data).to_dense()
    assert torch.equal(HessianOperator(model, nn.MSELoss(), data).to_dense(), expected)


def test_another_thread_that_draws_now_and_then_is_not_the_model() -> None:
    """The threads of a cluster's client draw from Python's generator at any time."""
    drawn = iter([True, False, True, True, False])

    class Disturbed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] == 6 and next(drawn, False):
                random.random()
            return self.layer(x)

    def disturbed_loss(output: Tensor, target: Tensor) -> Tensor:
        if output.shape[0] == 6 and next(drawn, False):
            random.random()
        return nn.functional.cross_entropy(output, target)

    objective = Objective(Disturbed(), disturbed_loss)
    objective.check(Batch.from_raw((torch.randn(6, 3), torch.arange(6) % 2)))
    assert next(drawn, None) is None
