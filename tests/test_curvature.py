"""Curvature operators against matrices built by explicit loops over points."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from reference import DenseReference, relative_error
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hessops import (
    BatchOperation,
    BatchOperator,
    BatchStream,
    ChunkAveraging,
    CurvatureOperator,
    GaussNewtonOperator,
    GeneralizedGaussNewtonOperator,
    HessianOperator,
    InverseHarmonicMeanOperator,
    ParameterSpace,
    TensorDictOperator,
    TensorOperator,
)
from hessops.errors import ArgumentError, DataChangedError, ParameterNameError

N = 12
REGULARIZATION = 1e-3


class TiedAutoencoder(nn.Module):
    """Decodes with the transpose's parameter: one weight under two names, and a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (4,)),
    "convolutional": (convolutional, (1, 4, 4)),
    "tied": (TiedAutoencoder, (4,)),
}
LOSSES = {"cross_entropy": nn.CrossEntropyLoss, "mse": nn.MSELoss}
BATCH_SIZES = {"all": N, "divisor": 4, "ragged": 5, "one": 1}
OPERATORS = {
    "hessian": HessianOperator,
    "gauss_newton": GaussNewtonOperator,
    "generalized_gauss_newton": GeneralizedGaussNewtonOperator,
    "inverse_harmonic_mean": InverseHarmonicMeanOperator,
}


@cache
def problem(model_name: str, loss_name: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    build, shape = MODELS[model_name]
    model = build().to(torch.float64)
    x = torch.randn(N, *shape, dtype=torch.float64)
    is_class = loss_name == "cross_entropy"
    y = torch.randint(3, (N,)) if is_class else torch.randn(N, 3, dtype=torch.float64)
    return model, LOSSES[loss_name](), x, y


@cache
def dense(operator_name: str, model_name: str, loss_name: str) -> Tensor:
    reference = DenseReference(*problem(model_name, loss_name))
    return matrix_of(reference, operator_name)


def matrix_of(reference: DenseReference, operator_name: str) -> Tensor:
    if operator_name == "inverse_harmonic_mean":
        return reference.inverse_harmonic_mean(REGULARIZATION)
    matrix: Tensor = getattr(reference, operator_name)()
    return matrix


def loader(x: Tensor, y: Tensor, batch_size: int) -> DataLoader:
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def build(operator_name: str, model, loss, data, **keywords) -> TensorDictOperator:
    if operator_name == "inverse_harmonic_mean":
        return InverseHarmonicMeanOperator(model, loss, data, REGULARIZATION, **keywords)
    return OPERATORS[operator_name](model, loss, data, **keywords)


@pytest.mark.parametrize("batch_size", BATCH_SIZES.values(), ids=BATCH_SIZES)
@pytest.mark.parametrize("loss_name", LOSSES)
@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("operator_name", OPERATORS)
def test_products_equal_the_dense_matrix_whatever_the_batches(
    operator_name: str, model_name: str, loss_name: str, batch_size: int
) -> None:
    model, loss, x, y = problem(model_name, loss_name)
    matrix = dense(operator_name, model_name, loss_name)
    operator = build(operator_name, model, loss, loader(x, y, batch_size))
    size = operator.input_size
    generator = torch.Generator().manual_seed(1)
    for lead in ((), (1,), (3,), (size + 2,)):
        vectors = torch.randn(*lead, size, generator=generator, dtype=torch.float64)
        result = operator.apply(vectors)
        assert result.shape == vectors.shape
        assert relative_error(result, vectors @ matrix) < 1e-10
        as_dict = operator.apply_to_dict(operator.space.unflatten(vectors))
        assert torch.equal(operator.space.flatten(as_dict), result)


@pytest.mark.parametrize("operator_name", OPERATORS)
def test_to_dense_is_the_dense_matrix(operator_name: str) -> None:
    model, loss, x, y = problem("mlp", "cross_entropy")
    operator = build(operator_name, model, loss, loader(x, y, 5))
    expected = dense(operator_name, "mlp", "cross_entropy")
    assert relative_error(operator.to_dense(), expected) < 1e-10


@pytest.mark.parametrize("operator_name", OPERATORS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reduction_says_what_the_loss_returns_and_leaves_the_matrix(
    operator_name: str, reduction: str
) -> None:
    model, _, x, y = problem("mlp", "cross_entropy")
    loss = nn.CrossEntropyLoss(reduction=reduction)
    operator = build(operator_name, model, loss, loader(x, y, 5), reduction=reduction)
    expected = dense(operator_name, "mlp", "cross_entropy")
    assert relative_error(operator.to_dense(), expected) < 1e-10


@pytest.mark.parametrize("operator_name", OPERATORS)
def test_weighted_loss_without_reduction_weights_the_points(operator_name: str) -> None:
    model, _, x, y = problem("mlp", "cross_entropy")
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 5.0]).double(), reduction="none")
    reference = DenseReference(model, lambda out, t: loss(out, t).sum(), x, y)
    operator = build(operator_name, model, loss, loader(x, y, 5), reduction="none")
    expected = matrix_of(reference, operator_name)
    assert relative_error(operator.to_dense(), expected) < 1e-10


@pytest.mark.parametrize("operator_name", OPERATORS)
def test_restrict_to_takes_the_submatrix_in_the_models_order(operator_name: str) -> None:
    model, loss, x, y = problem("mlp", "mse")
    named = dict(model.named_parameters())
    chosen = {name: named[name] for name in ("2.bias", "0.weight")}
    operator = build(operator_name, model, loss, loader(x, y, 5), restrict_to=chosen)
    assert list(operator.input_dict_structure) == ["0.weight", "2.bias"]
    params = [named["0.weight"], named["2.bias"]]
    reference = DenseReference(model, loss, x, y, params)
    expected = matrix_of(reference, operator_name)
    assert relative_error(operator.to_dense(), expected) < 1e-10


@pytest.mark.parametrize("operator_name", OPERATORS)
def test_frozen_parameters_are_constants(operator_name: str) -> None:
    _, loss, x, y = problem("mlp", "cross_entropy")
    torch.manual_seed(3)
    model = mlp().double()
    model[0].weight.requires_grad_(False)
    operator = build(operator_name, model, loss, loader(x, y, 5))
    reference = DenseReference(model, loss, x, y)
    expected = matrix_of(reference, operator_name)
    assert relative_error(operator.to_dense(), expected) < 1e-10
    assert model[0].weight.requires_grad is False


def test_reordered_keys_and_aliases_mean_the_same_vector() -> None:
    model, loss, x, y = problem("tied", "cross_entropy")
    operator = HessianOperator(model, loss, loader(x, y, 5))
    vector = torch.randn(operator.input_size, dtype=torch.float64)
    tensors = operator.space.unflatten(vector)
    expected = operator.apply_to_dict(tensors)
    reordered = dict(reversed(tensors.items()))
    reordered["second.weight"] = reordered.pop("first.weight")
    result = operator.apply_to_dict(reordered)
    assert list(result) == list(expected)
    assert all(torch.equal(result[name], expected[name]) for name in expected)


@pytest.mark.parametrize("operator_name", OPERATORS)
def test_an_optimizer_step_leaves_the_operator_until_refresh(operator_name: str) -> None:
    _, loss, x, y = problem("mlp", "cross_entropy")
    torch.manual_seed(4)
    model = mlp().double()
    operator = build(operator_name, model, loss, loader(x, y, 5))
    vector = torch.randn(operator.input_size, dtype=torch.float64)
    before = operator.apply(vector)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss(model(x), y).backward()
    optimizer.step()
    model.train()
    assert torch.equal(operator.apply(vector), before)
    after = operator.refresh().apply(vector)
    rebuilt = build(operator_name, model, loss, loader(x, y, 5)).apply(vector)
    assert torch.equal(after, rebuilt)
    assert relative_error(after, before) > 1e-3


@pytest.mark.parametrize("operator_name", OPERATORS)
def test_the_callers_state_is_left_alone(operator_name: str) -> None:
    _, loss, x, y = problem("mlp", "cross_entropy")
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    model(x)
    model.eval()
    loss(model(x), y).backward()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    operator = build(operator_name, model, loss, loader(x, y, 5))
    operator.apply(torch.randn(3, operator.input_size, dtype=torch.float64, generator=_seeded()))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert not model.training


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_chunk_averaging_is_the_mean_of_the_batches() -> None:
    model, loss, x, y = problem("mlp", "cross_entropy")
    operator = HessianOperator(model, loss, loader(x, y, 5), averaging=ChunkAveraging())
    pieces = [(x[i : i + 5], y[i : i + 5]) for i in (0, 5, 10)]
    matrices = [DenseReference(model, loss, *piece).hessian() for piece in pieces]
    expected = torch.stack(matrices).mean(dim=0)
    assert relative_error(operator.to_dense(), expected) < 1e-10
    assert relative_error(expected, dense("hessian", "mlp", "cross_entropy")) > 1e-3


@pytest.mark.parametrize("chunk_size", [1, 2, 7])
@pytest.mark.parametrize("operator_name", OPERATORS)
def test_chunk_size_changes_nothing(operator_name: str, chunk_size: int) -> None:
    model, loss, x, y = problem("mlp", "cross_entropy")
    operator = build(operator_name, model, loss, loader(x, y, 5), chunk_size=chunk_size)
    expected = dense(operator_name, "mlp", "cross_entropy")
    assert relative_error(operator.to_dense(), expected) < 1e-10


@pytest.mark.parametrize("cache_mode", ["auto", True, False, 10, 10**6])
def test_cache_changes_nothing(cache_mode) -> None:
    model, loss, x, y = problem("mlp", "cross_entropy")
    operator = HessianOperator(model, loss, loader(x, y, 5), cache=cache_mode)
    for _ in range(3):
        product = operator.apply(torch.ones(operator.input_size, dtype=torch.float64))
        expected = dense("hessian", "mlp", "cross_entropy").sum(dim=1)
        assert relative_error(product, expected) < 1e-10


@pytest.mark.parametrize("operator_name", ["hessian", "gauss_newton", "generalized_gauss_newton"])
@pytest.mark.parametrize("loss_name", LOSSES)
def test_forward_mode_equals_the_dense_matrix_where_it_is_right(
    operator_name: str, loss_name: str
) -> None:
    model, loss, x, y = problem("convolutional", loss_name)
    if operator_name == "hessian" and loss_name == "mse":
        loss = lambda out, target: (out - target).square().mean()  # noqa: E731
    operator = build(operator_name, model, loss, loader(x, y, 5), mode="rev-fwd")
    expected = dense(operator_name, "convolutional", loss_name)
    vectors = torch.randn(3, operator.input_size, dtype=torch.float64, generator=_seeded())
    assert relative_error(operator.apply(vectors), vectors @ expected) < 1e-10


def test_mappings_and_tuples_reach_the_model_as_one_argument() -> None:
    class TakesMapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, inputs):
            return {"logits": torch.tanh(self.linear(inputs["x"])) * inputs["scale"]}

    torch.manual_seed(0)
    model = TakesMapping().double()
    x, scale = torch.randn(7, 4).double(), torch.rand(7, 1).double()
    y = torch.randint(3, (7,))
    batches = [({"x": x[a:b], "scale": scale[a:b]}, (y[a:b],)) for a, b in ((0, 4), (4, 7))]
    operator = HessianOperator(
        model, lambda out, target: nn.functional.cross_entropy(out["logits"], target[0]), batches
    )

    class TakesTensor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = model.linear

        def forward(self, joined):
            return torch.tanh(self.linear(joined[:, :4])) * joined[:, 4:]

    reference = DenseReference(TakesTensor(), nn.CrossEntropyLoss(), torch.cat([x, scale], 1), y)
    assert relative_error(operator.to_dense(), reference.hessian()) < 1e-10


def test_unpack_reads_other_batches() -> None:
    model, loss, x, y = problem("mlp", "cross_entropy")
    batches = [{"images": x[:5], "labels": y[:5]}, {"images": x[5:], "labels": y[5:]}]
    operator = HessianOperator(
        model, loss, batches, unpack=lambda batch: (batch["images"], batch["labels"])
    )
    expected = dense("hessian", "mlp", "cross_entropy")
    assert relative_error(operator.to_dense(), expected) < 1e-10


def test_batch_operator_joins_the_users_own_parts() -> None:
    model, loss, x, y = problem("mlp", "cross_entropy")
    hessian = HessianOperator(model, loss, loader(x, y, 5))
    operator = BatchOperator(hessian.batch_operation, loader(x, y, 3))
    expected = dense("hessian", "mlp", "cross_entropy")
    assert relative_error(operator.to_dense(), expected) < 1e-10


def test_a_linear_loss_and_a_linear_model_have_zero_hessians() -> None:
    model = nn.Linear(3, 2).double()
    data = [(torch.randn(4, 3).double(), torch.zeros(4, 2).double())]
    operator = HessianOperator(model, lambda out, y: out.sum(1).mean(), data)
    assert torch.equal(operator.to_dense(), torch.zeros(8, 8, dtype=torch.float64))


def test_parameters_that_the_output_ignores_contribute_zero() -> None:
    class HalfUsed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return torch.tanh(self.used(x))

    model = HalfUsed().double()
    x, y = torch.randn(4, 3).double(), torch.randint(2, (4,))
    for operator_name in OPERATORS:
        operator = build(operator_name, model, nn.CrossEntropyLoss(), [(x, y)])
        block = operator.to_dense()[8:, 8:]
        expected = torch.zeros_like(block)
        if operator_name == "inverse_harmonic_mean":
            expected = torch.eye(8).double() / REGULARIZATION
        assert torch.allclose(block, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("context", ["no_grad", "inference_mode", "autocast"])
@pytest.mark.parametrize("operator_name", OPERATORS)
def test_the_callers_contexts_do_not_change_products(operator_name: str, context: str) -> None:
    torch.manual_seed(0)
    model = mlp()
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    vectors = torch.randn(3, 43)[:, : sum(p.numel() for p in model.parameters())]
    expected = build(operator_name, model, nn.CrossEntropyLoss(), [(x, y)]).apply(vectors)
    contexts = {
        "no_grad": torch.no_grad(),
        "inference_mode": torch.inference_mode(),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
    }
    with contexts[context]:
        operator = build(operator_name, model, nn.CrossEntropyLoss(), [(x, y)])
        result = operator.apply(vectors)
        again = operator.apply(vectors.clone())
    assert torch.equal(result, expected)
    assert torch.equal(again, expected)


def test_results_carry_no_graph() -> None:
    model, loss, x, y = problem("mlp", "cross_entropy")
    operator = HessianOperator(model, loss, loader(x, y, 5))
    vector = torch.ones(operator.input_size, dtype=torch.float64, requires_grad=True)
    assert not operator.apply(vector).requires_grad


@pytest.mark.parametrize("operator_name", OPERATORS)
def test_flags_say_what_is_known(operator_name: str) -> None:
    model, loss, x, y = problem("mlp", "cross_entropy")
    operator = build(operator_name, model, loss, loader(x, y, 5))
    assert operator.symmetric is True
    definite = operator_name in ("gauss_newton", "inverse_harmonic_mean")
    assert operator.positive_semidefinite is (True if definite else None)
    assert operator.T is operator


def test_every_operator_has_the_public_bases() -> None:
    for operator_type in OPERATORS.values():
        assert issubclass(operator_type, (BatchOperator, TensorDictOperator, TensorOperator))
    assert issubclass(HessianOperator, CurvatureOperator)


def test_scipy_finds_the_eigenvalues() -> None:
    from scipy.sparse.linalg import eigsh

    model, loss, x, y = problem("mlp", "cross_entropy")
    operator = HessianOperator(model, loss, loader(x, y, 5))
    linear = operator.to_scipy()
    assert linear.dtype == "float64"
    found = eigsh(linear, k=3, which="LA", return_eigenvectors=False)
    expected = torch.linalg.eigvalsh(dense("hessian", "mlp", "cross_entropy"))[-3:]
    assert torch.allclose(torch.from_numpy(found).sort().values, expected, rtol=1e-9, atol=0)


def test_float32_operators_have_float32_scipy_operators() -> None:
    model = nn.Linear(3, 2)
    operator = HessianOperator(model, nn.MSELoss(), [(torch.randn(9, 3), torch.randn(9, 2))])
    assert operator.to_scipy().dtype == "float32"
    assert (operator.to_scipy() @ torch.eye(8).numpy()).dtype == "float32"


def test_moving_to_the_meta_device_moves_every_part() -> None:
    model, loss, x, y = problem("mlp", "cross_entropy")
    operator = HessianOperator(model, loss, loader(x, y, 5))
    moved = operator.to("meta")
    assert moved.device.type == "meta"
    result = moved.apply(torch.ones(operator.input_size, dtype=torch.float64))
    assert result.device.type == "meta"
    assert operator.device.type == "cpu"


def test_repr_shows_model_points_and_size() -> None:
    model, loss, x, y = problem("mlp", "cross_entropy")
    operator = HessianOperator(model, loss, loader(x, y, 5))
    operator.apply(torch.ones(operator.input_size, dtype=torch.float64))
    text = repr(operator.shift(0.5))
    assert "ShiftedOperator(+0.5 I) [43 x 43, float64, cpu]" in text
    assert "HessianOperator(Sequential, 12 points, cached)" in text


@pytest.mark.parametrize("operator_name", ["gauss_newton", "generalized_gauss_newton"])
def test_gauss_newton_products_make_no_tensor_of_the_size_of_all_gradients(
    operator_name: str,
) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return result

    torch.manual_seed(0)
    points, model = 300, nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 3))
    data = [(torch.randn(points, 30), torch.randint(3, (points,)))]
    operator = build(operator_name, model, nn.CrossEntropyLoss(), data)
    with Largest() as largest:
        operator.apply(torch.ones(operator.input_size))
    assert 0 < largest.numel < points * operator.input_size / 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_inverse_harmonic_mean_of_large_gradients_does_not_overflow(dtype: torch.dtype) -> None:
    model = nn.Linear(3, 1, bias=False).to(dtype)
    factor = 200.0 if dtype == torch.float16 else 1e20
    data = [(torch.ones(2, 3, dtype=dtype), torch.zeros(2, 1, dtype=dtype))]
    operator = InverseHarmonicMeanOperator(model, lambda out, y: (out * factor).mean(), data, 1.0)
    along = operator.apply(torch.ones(3, dtype=dtype))
    across = operator.apply(torch.tensor([1.0, -1.0, 0.0], dtype=dtype))
    assert along.abs().max() < 0.02
    assert torch.allclose(across, torch.tensor([1.0, -1.0, 0.0], dtype=dtype), rtol=0.02, atol=0.01)


def test_an_operation_that_writes_to_its_argument_is_refused() -> None:
    class Doubling(BatchOperation):
        def _apply_stack(self, batch, tensors):
            tensors["w"].mul_(2)
            return tensors

    space = ParameterSpace.from_tensors({"w": torch.zeros(3)})
    operator = BatchOperator(Doubling(space), [(torch.ones(2, 1), None)] * 3)
    with pytest.raises(ValueError, match="writes to its argument"):
        operator.apply(torch.ones(3))


def test_averages_over_batches_need_the_same_batches_in_every_pass() -> None:
    model, loss, x, y = problem("mlp", "cross_entropy")
    shuffled = DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True)
    operator = HessianOperator(model, loss, shuffled, averaging=ChunkAveraging(), cache=False)
    vector = torch.ones(operator.input_size, dtype=torch.float64)
    operator.apply(vector)
    with pytest.raises(DataChangedError, match="batches"):
        operator.apply(vector)
    HessianOperator(model, loss, shuffled, cache=False).to_dense()


def test_operators_share_a_stream() -> None:
    x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    model = nn.Linear(3, 2).double()
    stream = BatchStream([(x, y)])
    first = HessianOperator(model, nn.MSELoss(), stream)
    second = GaussNewtonOperator(model, nn.MSELoss(), stream)
    assert first.stream is second.stream is stream
    vector = torch.randn(8).double()
    own = GaussNewtonOperator(model, nn.MSELoss(), [(x, y)])
    assert torch.equal(second.apply(vector), own.apply(vector))
    with pytest.raises(ArgumentError, match="same_batches"):
        HessianOperator(model, nn.MSELoss(), stream, averaging=ChunkAveraging())


@pytest.mark.parametrize("operator_type", [HessianOperator, GaussNewtonOperator])
def test_a_restriction_is_the_diagonal_block_and_shares_the_data(operator_type) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(7, 3).double(), torch.randn(7, 2).double()
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    whole = operator_type(model, nn.MSELoss(), batches)
    dense = whole.to_dense()
    for names in (["2.bias", "0.weight"], ["2.weight"]):
        part = whole.restricted(names)
        where = whole.space.indices(names)
        assert part.space == whole.space.subspace(names)
        alone = operator_type(model, nn.MSELoss(), batches, names)
        assert torch.equal(part.to_dense(), alone.to_dense())
        assert (part.to_dense() - dense[where[:, None], where]).abs().max() < 1e-12
        assert part.stream is whole.stream
    with torch.no_grad():
        model[0].weight.add_(1.0)
    assert torch.equal(whole.restricted(["2.weight"]).to_dense(), part.to_dense())
    assert not torch.equal(part.refresh().to_dense(), whole.restricted(["2.weight"]).to_dense())
    with pytest.raises(ParameterNameError, match="unknown"):
        whole.restricted(["3.weight"])
