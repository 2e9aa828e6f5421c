"""Layers that torch itself gets wrong somewhere: products against explicit loops over points."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reference import DenseReference, relative_error
from torch import Tensor, nn

from hessops import (
    GaussNewtonOperator,
    GeneralizedGaussNewtonOperator,
    HessianOperator,
    InverseHarmonicMeanOperator,
)
from hessops.errors import ForwardModeError, HessopsError, ModelError

N = 7
VOCABULARY = 6


class MeanOverTime(nn.Module):
    """The mean over the second dimension, then a linear head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean(dim=1))


class LastOfLstm(nn.Module):
    """The outputs of an LSTM without its states."""

    def __init__(self, **keywords) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 3, batch_first=True, **keywords)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.lstm(x)
        return self.head(output[:, -1])


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        attended, _ = self.attention(x, x, x, need_weights=False)
        return self.head(attended.mean(dim=1))


def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(VOCABULARY, 4, padding_idx=0), nn.Tanh(), MeanOverTime(4))


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.1, batch_first=True)
    return nn.Sequential(layer, MeanOverTime(4))


def layer_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))


def group_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.Tanh(), nn.Linear(6, 3))


def batch_norm() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    model(torch.randn(20, 4))
    return model


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=2, dilation=2, groups=2),
        nn.BatchNorm1d(4),
        nn.Softplus(),
        nn.MaxPool1d(2),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (N, 3)).index_fill(1, torch.tensor([2]), 0)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "embedding with padding_idx": (embedding, tokens),
    "transformer encoder layer": (transformer, lambda: torch.randn(N, 3, 4)),
    "multi-head attention": (SelfAttention, lambda: torch.randn(N, 3, 4)),
    "lstm": (LastOfLstm, lambda: torch.randn(N, 3, 3)),
    "lstm, two layers, both ways": (
        lambda: LastOfLstm(num_layers=2, dropout=0.2),
        lambda: torch.randn(N, 3, 3),
    ),
    "layer norm": (layer_norm, lambda: torch.randn(N, 4)),
    "group norm": (group_norm, lambda: torch.randn(N, 4)),
    "batch norm in eval": (batch_norm, lambda: torch.randn(N, 4)),
    "grouped and dilated convolution": (convolutional, lambda: torch.randn(N, 2, 4)),
}
OPERATORS = {
    "hessian": HessianOperator,
    "gauss_newton": GaussNewtonOperator,
    "generalized_gauss_newton": GeneralizedGaussNewtonOperator,
}
TOLERANCES = {torch.float64: 1e-10, torch.float32: 3e-4}


def case(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    build, inputs = LAYERS[name]
    model = build().eval().to(dtype)
    x = inputs()
    return model, x.to(dtype) if x.is_floating_point() else x, torch.randint(3, (N,))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("operator_name", OPERATORS)
@pytest.mark.parametrize("name", LAYERS)
def test_products_equal_explicit_loops(name: str, operator_name: str, dtype: torch.dtype) -> None:
    model, x, y = case(name, dtype)
    operator = OPERATORS[operator_name](
        model, nn.CrossEntropyLoss(), [(x[:5], y[:5]), (x[5:], y[5:])]
    )
    exact_model, exact_x, _ = case(name, torch.float64)
    exact_model.load_state_dict(model.state_dict())
    exact_x = x.double() if x.is_floating_point() else x
    reference = DenseReference(exact_model, nn.CrossEntropyLoss(), exact_x, y)
    matrix = getattr(reference, operator_name)()
    vectors = torch.randn(3, operator.input_size, dtype=dtype)
    expected = vectors.double() @ matrix
    for stack in (vectors, vectors[:1]):  # vectorised passes, and a single one
        error = relative_error(operator.apply(stack).double(), expected[: len(stack)])
        assert error < TOLERANCES[dtype]


@pytest.mark.parametrize("name", LAYERS)
def test_inverse_harmonic_mean_equals_explicit_loops(name: str) -> None:
    model, x, y = case(name, torch.float64)
    operator = InverseHarmonicMeanOperator(
        model, nn.CrossEntropyLoss(), [(x[:5], y[:5]), (x[5:], y[5:])], 1e-2
    )
    matrix = DenseReference(model, nn.CrossEntropyLoss(), x, y).inverse_harmonic_mean(1e-2)
    vectors = torch.randn(2, operator.input_size, dtype=torch.float64)
    assert relative_error(operator.apply(vectors), vectors @ matrix) < 1e-10


@pytest.mark.parametrize("operator_name", OPERATORS)
@pytest.mark.parametrize("name", LAYERS)
def test_forward_mode_is_right_or_refused(name: str, operator_name: str) -> None:
    model, x, y = case(name, torch.float64)
    loss = nn.CrossEntropyLoss()
    operator = OPERATORS[operator_name](model, loss, [(x, y)], mode="rev-fwd")
    vectors = torch.randn(2, operator.input_size, dtype=torch.float64)
    try:
        result = operator.apply(vectors)
    except ForwardModeError as error:
        assert "rev-rev" in str(error)  # noqa: PT017  # right or refused: either is a pass
        return
    matrix = getattr(DenseReference(model, loss, x, y), operator_name)()
    assert relative_error(result, vectors @ matrix) < 1e-9


def test_forward_mode_is_refused_where_torch_is_wrong() -> None:
    model, x, y = case("embedding with padding_idx", torch.float64)
    operator = HessianOperator(model, nn.CrossEntropyLoss(), [(x, y)], mode="rev-fwd")
    with pytest.raises(ForwardModeError, match="differs from reverse mode"):
        operator.apply(torch.randn(operator.input_size, dtype=torch.float64))


def test_forward_mode_of_the_mse_hessian_is_refused_or_right() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(N, 4).double(), torch.randn(N, 3).double()
    operator = GeneralizedGaussNewtonOperator(model, nn.MSELoss(), [(x, y)], mode="rev-fwd")
    matrix = DenseReference(model, nn.MSELoss(), x, y).generalized_gauss_newton()
    vector = torch.randn(operator.input_size, dtype=torch.float64)
    assert relative_error(operator.apply(vector), matrix @ vector) < 1e-10


@pytest.mark.parametrize(
    "loss",
    [nn.MSELoss(), nn.HuberLoss(), nn.SmoothL1Loss(), nn.SoftMarginLoss(), nn.L1Loss()],
    ids=lambda loss: type(loss).__name__,
)
@pytest.mark.parametrize("operator_name", OPERATORS)
def test_losses_whose_forward_derivatives_torch_lacks(operator_name: str, loss: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(N, 4).double(), torch.randn(N, 3).double().sign()
    matrix = getattr(DenseReference(model, loss, x, y), operator_name)()
    operator = OPERATORS[operator_name](model, loss, [(x, y)])
    error = (operator.to_dense() - matrix).norm()
    assert error <= 1e-10 * matrix.norm()


def test_bfloat16_products_are_near_the_exact_ones() -> None:
    model, x, y = case("lstm", torch.bfloat16)
    operator = HessianOperator(model, nn.CrossEntropyLoss(), [(x, y)])
    exact_model, _, _ = case("lstm", torch.float64)
    exact_model.load_state_dict(model.state_dict())
    matrix = DenseReference(exact_model, nn.CrossEntropyLoss(), x.double(), y).hessian()
    vectors = torch.randn(2, operator.input_size).to(torch.bfloat16)
    result = operator.apply(vectors)
    assert result.dtype == torch.bfloat16
    assert relative_error(result.double(), vectors.double() @ matrix) < 0.1


def test_buffers_written_in_the_forward_stay_as_they_were() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return torch.tanh(self.linear(x)) * (1 + self.calls)

    model = Counting().double().eval()
    x, y = torch.randn(N, 4).double(), torch.randint(3, (N,))
    operator = HessianOperator(model, nn.CrossEntropyLoss(), [(x[:4], y[:4]), (x[4:], y[4:])])
    vector = torch.randn(operator.input_size, dtype=torch.float64)
    assert torch.equal(operator.apply(vector), operator.apply(vector))
    assert model.calls == 0


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), lambda: torch.randn(N, 4)),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), lambda: torch.randn(N, 4)),
        (transformer, lambda: torch.randn(N, 3, 4)),
        (
            lambda: nn.Sequential(nn.Embedding(6, 4, max_norm=1.0), MeanOverTime(4)),
            tokens,
        ),
    ],
    ids=["dropout", "batch norm", "transformer with dropout", "max_norm"],
)
@pytest.mark.parametrize("operator_name", OPERATORS)
def test_training_mode_and_rewritten_weights_are_refused(
    operator_name: str, model: Callable[[], nn.Module], inputs: Callable[[], Tensor]
) -> None:
    torch.manual_seed(0)
    x, y = inputs(), torch.randint(3, (N,))

    def product() -> Tensor:
        operator = OPERATORS[operator_name](model().train(), nn.CrossEntropyLoss(), [(x, y)])
        return operator.apply(torch.ones(operator.input_size))

    with pytest.raises(HessopsError, match=r"eval|max_norm"):
        product()


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0])),
        nn.CrossEntropyLoss(ignore_index=0),
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(reduction="none"),
    ],
    ids=["class weights", "ignore_index", "sum", "none"],
)
@pytest.mark.parametrize("operator_name", OPERATORS)
def test_losses_that_are_not_the_mean_are_refused_with_advice(
    operator_name: str, loss: nn.Module
) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(N, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    operator = OPERATORS[operator_name](nn.Linear(4, 3), loss, [(x, y)])
    with pytest.raises(HessopsError, match="reduction='none'"):
        operator.apply(torch.ones(operator.input_size))


class OnceTanh(torch.autograd.Function):
    """A right first derivative that cannot be differentiated again."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        result = x.tanh()
        ctx.save_for_backward(result)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, weight: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors
        return weight * (1 - result.square())


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(OnceTanh.apply(self.first(x)))


@pytest.mark.parametrize("operator_name", OPERATORS)
def test_custom_functions_without_a_second_derivative_are_refused(operator_name: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(N, 4).double(), torch.randint(3, (N,))
    operator = OPERATORS[operator_name](Custom().double(), nn.CrossEntropyLoss(), [(x, y)])
    with pytest.raises(ModelError, match=r"not symmetric|cannot compute"):
        operator.apply(torch.ones(operator.input_size, dtype=torch.float64))


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("operator_name", OPERATORS)
def test_weight_norm_equals_the_formula_written_out(operator_name: str, dim: int | None) -> None:
    torch.manual_seed(0)
    normed = [torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4), dim=dim) for _ in "ab"]
    model = nn.Sequential(normed[0], nn.Tanh(), normed[1]).double()

    class WrittenOut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tensors = nn.ParameterList(model.parameters())

        def forward(self, x: Tensor) -> Tensor:
            others = {0: 1, 1: 0, None: (0, 1)}[dim]
            for layer in (self.tensors[:3], self.tensors[3:]):
                bias, g, v = layer
                weight = v * g / v.square().sum(dim=others, keepdim=dim is not None).sqrt()
                x = x @ weight.T + bias
                x = x.tanh() if layer[0] is self.tensors[0] else x
            return x

    x, y = torch.randn(N, 4).double(), torch.randint(3, (N,))
    matrix = getattr(DenseReference(WrittenOut(), nn.CrossEntropyLoss(), x, y), operator_name)()
    operator = OPERATORS[operator_name](model, nn.CrossEntropyLoss(), [(x, y)])
    assert relative_error(operator.to_dense(), matrix) < 1e-10


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("operator_name", OPERATORS)
def test_writing_to_what_a_gradient_needs_is_refused(operator_name: str, rows: int) -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x).sigmoid()
            output = self.second(hidden)
            hidden.mul_(2)
            return output

    x, y = torch.randn(N, 4), torch.randint(3, (N,))
    operator = OPERATORS[operator_name](Writing(), nn.CrossEntropyLoss(), [(x, y)])
    with pytest.raises(ModelError, match=r"in-?place operation"):
        operator.apply(torch.ones(rows, operator.input_size))


def test_cached_parametrizations_of_the_caller_do_not_reach_in() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        torch.nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3)
    ).double()
    x, y = torch.randn(N, 4).double(), torch.randint(3, (N,))
    operator = HessianOperator(model, nn.CrossEntropyLoss(), [(x, y)])
    vector = torch.randn(operator.input_size, dtype=torch.float64)
    expected = operator.apply(vector)
    with torch.nn.utils.parametrize.cached():
        model(x)
        assert torch.equal(operator.apply(vector), expected)


@pytest.mark.parametrize("loss", [nn.MultiMarginLoss()], ids=lambda loss: type(loss).__name__)
def test_losses_without_a_second_derivative_are_refused_by_name(loss: nn.Module) -> None:
    x, y = torch.randn(N, 4), torch.randint(3, (N,))
    operator = HessianOperator(nn.Linear(4, 3), loss, [(x, y)])
    with pytest.raises(ModelError, match="second derivative"):
        operator.apply(torch.ones(operator.input_size))
