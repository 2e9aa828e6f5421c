"""Small models with layers of every kind, and dense Kronecker factors by loops over points."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from reference import DenseReference, PointLoss
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from hessops import EkfacOperator, KfacOperator

Points = tuple[Tensor, Tensor]
OPERATORS = {"kfac": KfacOperator, "ekfac": EkfacOperator}
N = 7


# --- the matrix of KFAC, from its definition ---------------------------------------------


def hessian_columns(loss: PointLoss, out: Tensor, y: Tensor) -> list[Tensor]:
    """Columns of a root of the Hessian of the loss on one point by its output."""

    def value(flat: Tensor) -> Tensor:
        return loss(flat.reshape(out.shape), y)

    hessian = torch.autograd.functional.hessian(value, out.detach().reshape(-1))
    values, vectors = torch.linalg.eigh(hessian)
    columns = vectors * values.clamp(min=0).sqrt()
    return [column.reshape(out.shape) for column in columns.T]


def gradient_column(loss: PointLoss, out: Tensor, y: Tensor) -> list[Tensor]:
    leaf = out.detach().requires_grad_()
    return [torch.autograd.grad(loss(leaf, y), leaf)[0]]


COLUMNS = {"type-2": hessian_columns, "empirical": gradient_column}
EXACT = {"type-2": "generalized_gauss_newton", "empirical": "gauss_newton"}


def groups_of(module: nn.Module) -> int:
    return getattr(module, "groups", 1)


def by_position(module: nn.Module, out: Tensor) -> Tensor:
    """What is of the shape of an output as ``(positions, outputs)``."""
    is_convolution = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    last = out.movedim(1, -1) if is_convolution else out
    return last.reshape(-1, last.shape[-1])


def inputs_of(module: nn.Module, x: Tensor, group: int) -> Tensor:
    """What the matrix of a group is applied to, by position: ∂(output)/∂(a row of it)."""
    out = by_position(module, module(x.detach()))
    channel = group * out.shape[1] // groups_of(module)
    rows = []
    for entry in out[:, channel]:
        (by_weight,) = torch.autograd.grad(entry, module.weight, retain_graph=True)
        embeds = isinstance(module, nn.Embedding)
        row = by_weight[:, channel] if embeds else by_weight[channel].reshape(-1)
        has_bias = getattr(module, "bias", None) is not None and module.bias.requires_grad
        rows.append(torch.cat([row, row.new_ones(1)]) if has_bias else row)
    return torch.stack(rows)


def outputs_of(module: nn.Module, b: Tensor, group: int) -> Tensor:
    return by_position(module, b).chunk(groups_of(module), dim=1)[group]


def flat_indices(module: nn.Module, group: int) -> Tensor:
    """Where the entries of the matrix of a group are in the flat parameters, row by row."""
    weight = torch.arange(module.weight.numel()).reshape(len(module.weight), -1)
    if isinstance(module, nn.Embedding):
        weight = weight.T
    if getattr(module, "bias", None) is not None and module.bias.requires_grad:
        bias = module.weight.numel() + torch.arange(len(module.bias))
        weight = torch.cat([weight, bias.unsqueeze(1)], dim=1)
    return weight.chunk(groups_of(module))[group].reshape(-1)


class KroneckerReference:
    """Blocks of KFAC for some layers of a model, one point and one column at a time.

    Args:
        model: The model.
        loss: From the output of one point, with leading dimension 1, and its target to a scalar.
        x: Inputs ``(n, ...)``.
        y: Targets ``(n, ...)``.
        fisher_type: ``"type-2"`` or ``"empirical"``.
        kfac_approx: ``"expand"`` or ``"reduce"``.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: PointLoss,
        x: Tensor,
        y: Tensor,
        fisher_type: str = "type-2",
        kfac_approx: str = "expand",
    ) -> None:
        self.model, self.loss, self.x, self.y = model, loss, x, y
        self.columns_of, self.kfac_approx = COLUMNS[fisher_type], kfac_approx

    def factors(self, layer: str, group: int = 0) -> tuple[Tensor, Tensor]:
        """A and B."""
        module = self.model.get_submodule(layer)
        reduces = self.kfac_approx == "reduce" and not isinstance(module, nn.Embedding)
        of_inputs, of_outputs, positions = [], [], 0
        for i in range(len(self.x)):
            calls: list[tuple[Tensor, Tensor]] = []

            def keep(_, args, out, calls=calls):
                calls.append((args[0].detach().clone(), out))
                return out.clone()  # of which operations in place may make something else

            hook = module.register_forward_hook(keep)
            out = self.model(self.x[i : i + 1])
            hook.remove()
            a = torch.cat([inputs_of(module, x, group) for x, _ in calls])
            a = a.mean(dim=0, keepdim=True) if reduces else a
            of_inputs.append(a.T @ a)
            positions += len(a)
            for column in self.columns_of(self.loss, out, self.y[i : i + 1]):
                found = torch.autograd.grad(
                    out, [call[1] for call in calls], column, retain_graph=True
                )
                b = torch.cat([outputs_of(module, g, group) for g in found])
                b = b.sum(dim=0, keepdim=True) if reduces else b
                of_outputs.append(b.T @ b)
        return sum(of_inputs) / positions, sum(of_outputs) / len(self.x)

    def block(self, layer: str) -> Tensor:
        """B ⊗ A of every group, in the flat order of the layer's parameters."""
        module = self.model.get_submodule(layer)
        groups = range(groups_of(module))
        return kronecker_block(module, [self.factors(layer, group) for group in groups])


def kronecker_block(module: nn.Module, factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """B ⊗ A of every group, in the flat order of a module's parameters."""
    size = sum(p.numel() for p in module.parameters() if p.requires_grad)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for group, (a, b) in enumerate(factors):
        where = flat_indices(module, group)
        matrix[where[:, None], where] = torch.kron(b, a)
    return matrix.detach()


# --- models with layers of every kind ----------------------------------------------------


class Residual(nn.Module):
    """Adds what is inside, over whatever dimensions."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        once = torch.tanh(self.layer(x))
        return self.head(torch.tanh(self.layer(once)) + once)


class Mean(nn.Module):
    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=self.dims)


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)


class Flattened(nn.Module):
    """Runs what is inside on all positions of all points in a row."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class RootParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain, self.offset = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(2))
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * torch.tanh(self.layer(x)) + self.offset


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(dim=1))


class FunctionalTie(nn.Module):
    """A weight that a layer and a product outside of it share."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x)) @ self.layer.weight)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, 0.5 * self.weight, self.bias)


class SharedBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x))) + self.layer.bias


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(3, 2, batch_first=True), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Stacked(nn.Module):
    """Runs both halves of an input, stacked one after the other, as a batch twice as large."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.tanh(self.layer(torch.cat([x[:, 0], x[:, 1]]))).chunk(2)
        return self.head(first * second)


class Experts(nn.Module):
    """Each point goes through one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[:, :1] > 0).to(x.dtype)
        return chosen * self.experts[0](x) + (1 - chosen) * self.experts[1](x)


class Forces(nn.Module):
    """The gradient of an energy by the input: weights act in the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.energy = nn.Linear(3, 4), nn.Linear(4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.energy(torch.tanh(self.hidden(x))).sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0][:, :2]


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def convolutional(layer: nn.Module, width: int) -> nn.Module:
    dims = (2,) if isinstance(layer, nn.Conv1d) else (2, 3)
    return nn.Sequential(layer, nn.Tanh(), Mean(*dims), nn.Linear(width, 2))


@dataclass(frozen=True)
class Case:
    """A model and the shape of an input.

    Attributes:
        build: Builds the model.
        shape: Of the input of a point.
        layers: Those with Kronecker factors.
        vocabulary: Of inputs that are tokens.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    layers: Sequence[str]
    vocabulary: int = 0

    def model(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.build().to(torch.float64).eval()

    def inputs(self, n: int = N) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        if self.vocabulary:
            return torch.randint(self.vocabulary, (n, *self.shape), generator=generator)
        return torch.randn(n, *self.shape, generator=generator, dtype=torch.float64)


def mlp(*, bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Tanh(), nn.Linear(4, 2, bias=bias))


def _conv1d(**keywords: object) -> Callable[[], nn.Module]:
    return lambda: convolutional(nn.Conv1d(2, 4, 3, **keywords), 4)


def _conv2d(kernel: object = 3, **keywords: object) -> Callable[[], nn.Module]:
    return lambda: convolutional(nn.Conv2d(2, 4, kernel, **keywords), 4)


# Every layer has Kronecker factors.
KRONECKER: Mapping[str, Case] = {
    "linear": Case(mlp, (3,), ["0", "2"]),
    "linear_without_bias": Case(lambda: mlp(bias=False), (3,), ["0", "2"]),
    "positions": Case(lambda: nn.Sequential(mlp(), Mean(1)), (3, 3), ["0.0", "0.2"]),
    "grid_of_positions": Case(lambda: nn.Sequential(mlp(), Mean(1, 2)), (2, 2, 3), ["0.0", "0.2"]),
    "sequence_first": Case(
        lambda: nn.Sequential(Transposed(), mlp(), Mean(0)), (3, 3), ["1.0", "1.2"]
    ),
    "flattened_positions": Case(
        lambda: nn.Sequential(Flattened(mlp()), Mean(1)), (3, 3), ["0.inner.0", "0.inner.2"]
    ),
    "flattened_frames": Case(
        lambda: nn.Sequential(Flattened(convolutional(nn.Conv1d(2, 3, 2), 3)), Mean(1)),
        (3, 2, 4),
        ["0.inner.0", "0.inner.3"],
    ),
    "reused": Case(Reused, (3,), ["layer", "head"]),
    "reused_at_positions": Case(
        lambda: nn.Sequential(Reused(), Mean(1)), (3, 3), ["0.layer", "0.head"]
    ),
    "conv1d": Case(_conv1d(stride=2, padding=1), (2, 6), ["0", "3"]),
    "conv1d_dilated_circular": Case(
        _conv1d(dilation=2, padding=1, padding_mode="circular"), (2, 6), ["0", "3"]
    ),
    "conv1d_same": Case(_conv1d(padding="same", bias=False), (2, 5), ["0", "3"]),
    "conv2d": Case(_conv2d(stride=(1, 2), padding=(0, 1)), (2, 4, 4), ["0", "3"]),
    "conv2d_grouped": Case(_conv2d(groups=2, bias=False), (2, 4, 4), ["0", "3"]),
    "conv2d_grouped_bias_reflect": Case(
        _conv2d((2, 3), groups=2, padding=1, padding_mode="reflect"), (2, 3, 3), ["0", "3"]
    ),
    "conv2d_dilated_replicate": Case(
        _conv2d(2, dilation=(1, 2), padding=(1, 0), padding_mode="replicate"),
        (2, 2, 3),
        ["0", "3"],
    ),
    "embedding": Case(
        lambda: nn.Sequential(nn.Embedding(5, 3), nn.Tanh(), Mean(1), nn.Linear(3, 2)),
        (4,),
        ["0", "3"],
        vocabulary=5,
    ),
    "embedding_with_padding": Case(
        lambda: nn.Sequential(
            nn.Embedding(5, 3, padding_idx=1), nn.Tanh(), Mean(1), nn.Linear(3, 2)
        ),
        (4,),
        ["0", "3"],
        vocabulary=5,
    ),
    "relu_in_place": Case(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)),
        (3,),
        ["0", "2"],
    ),
    "experts": Case(Experts, (3,), ["experts.0", "experts.1"]),
    "frozen_bias": Case(lambda: frozen(mlp(), "0.bias"), (3,), ["0", "2"]),
    "classes_before_positions": Case(
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Conv1d(3, 2, 1)),
        (2, 4),
        ["0", "2"],
    ),
    "classes_last": Case(mlp, (3, 3), ["0", "2"]),
}

# Some parameters have exact blocks.
MIXED: Mapping[str, Case] = {
    "layer_norm": Case(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)),
        (3,),
        ["0", "3"],
    ),
    "layer_norm_sequence_first": Case(
        lambda: nn.Sequential(Transposed(), nn.Linear(3, 4), nn.LayerNorm(4), Mean(0)),
        (5, 3),
        ["1"],
    ),
    "group_norm": Case(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), Mean(2, 3), nn.Linear(4, 2)
        ),
        (1, 3, 3),
        ["0", "4"],
    ),
    "batch_norm": Case(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)),
        (3,),
        ["0", "3"],
    ),
    "tied": Case(Tied, (3,), ["head"]),
    "root_parameters": Case(RootParameters, (3,), ["layer"]),
    "attention": Case(Attention, (3, 4), ["head"]),
    "transformer": Case(
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True), Mean(1)
        ),
        (3, 4),
        ["0.linear1", "0.linear2"],
    ),
    "transformer_sequence_first": Case(
        lambda: nn.Sequential(
            Transposed(), nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0), Mean(0)
        ),
        (3, 4),
        ["1.linear1", "1.linear2"],
    ),
    "weight_norm": Case(
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2)),
        (3,),
        ["1"],
    ),
    "frozen_weight": Case(lambda: frozen(mlp(), "0.weight"), (3,), ["2"]),
    "functional_tie": Case(FunctionalTie, (3,), ["head"]),
    "scaled_subclass": Case(lambda: nn.Sequential(Scaled(3, 2), nn.Linear(2, 2)), (3,), ["1"]),
    "shared_bias": Case(SharedBias, (3,), ["head"]),
    "recurrent": Case(Recurrent, (3, 3), ["head"]),
    "stacked_halves": Case(Stacked, (2, 3), ["head"]),
    "forces": Case(Forces, (3,), []),
    "transposed_convolution": Case(
        lambda: nn.Sequential(nn.ConvTranspose1d(1, 2, 2), nn.Tanh(), Mean(2)), (1, 3), []
    ),
}
CASES = {**KRONECKER, **MIXED}


# --- losses ------------------------------------------------------------------------------


def smooth_distance(out: Tensor, y: Tensor) -> Tensor:
    """Convex in the output, and no sum over its entries: its Hessians have no structure."""
    distance = (out - y).flatten(1)
    return (1 + distance.square().sum(dim=1)).sqrt().mean()


def class_targets(out: Tensor) -> Tensor:
    return torch.arange(len(out)).remainder(out.shape[1])


def token_targets(out: Tensor) -> Tensor:
    tokens = torch.arange(out[:, 0].numel()).remainder(out.shape[1])
    return tokens.reshape(out[:, 0].shape)


def last_token_targets(out: Tensor) -> Tensor:
    return token_targets(out.transpose(1, -1))


def cross_entropy_of_last(out: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(out.transpose(1, -1), y)


def real_targets(out: Tensor) -> Tensor:
    return torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)


def binary_targets(out: Tensor) -> Tensor:
    return (real_targets(out) > 0).to(torch.float64)


Targets = Callable[[Tensor], Tensor]
LOSSES: dict[str, tuple[PointLoss, Targets]] = {
    "cross_entropy": (nn.CrossEntropyLoss(), class_targets),
    "mse": (nn.MSELoss(), real_targets),
    "binary_cross_entropy": (nn.BCEWithLogitsLoss(), binary_targets),
    "label_smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), class_targets),
    "without_structure": (smooth_distance, real_targets),
}
TOKEN_LOSSES: dict[str, tuple[PointLoss, Targets]] = {
    "tokens": (nn.CrossEntropyLoss(), token_targets),
    "last_tokens": (cross_entropy_of_last, last_token_targets),
}


@dataclass(frozen=True)
class Problem:
    """A model, a loss and points, all at once and in ragged batches."""

    model: nn.Module
    loss: PointLoss
    x: Tensor
    y: Tensor

    def batches(self, size: int = 4) -> list[Points]:
        return list(zip(self.x.split(size), self.y.split(size), strict=True))

    def arguments(self, size: int = 4) -> tuple[nn.Module, PointLoss, list[Points]]:
        return self.model, self.loss, self.batches(size)

    def kfac(self, size: int = 4, **keywords: object) -> KfacOperator:
        return KfacOperator(*self.arguments(size), **keywords)

    def ekfac(self, size: int = 4, **keywords: object) -> EkfacOperator:
        return EkfacOperator(*self.arguments(size), **keywords)

    @property
    def reference(self) -> DenseReference:
        return DenseReference(self.model, self.loss, self.x, self.y)

    def factored(
        self, fisher_type: str = "type-2", kfac_approx: str = "expand"
    ) -> KroneckerReference:
        return KroneckerReference(self.model, self.loss, self.x, self.y, fisher_type, kfac_approx)


def default_loss(case_name: str) -> str:
    own = {"classes_before_positions": "tokens", "classes_last": "last_tokens"}
    return own.get(case_name, "cross_entropy")


@cache
def problem(case_name: str, loss_name: str = "", n: int = N) -> Problem:
    loss_name = loss_name or default_loss(case_name)
    case, (loss, targets) = CASES[case_name], (LOSSES | TOKEN_LOSSES)[loss_name]
    model, x = case.model(), case.inputs(n)
    return Problem(model, loss, x, targets(model(x).detach()))


@cache
def exact_matrix(case_name: str, fisher_type: str = "type-2", loss_name: str = "") -> Tensor:
    return getattr(problem(case_name, loss_name).reference, EXACT[fisher_type])()


def eigenbasis(operator: KfacOperator) -> Tensor:
    """Q."""
    return operator._into_basis(torch.eye(operator.input_size, dtype=operator.dtype))
