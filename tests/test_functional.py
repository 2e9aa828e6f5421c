"""Losses, derivatives and Hessians as pure functions, against dense loops over points."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from reference import DenseReference, flat_gradient, relative_error, trainable
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hessops import functional
from hessops.errors import (
    ArgumentTypeError,
    DataError,
    DtypeError,
    ForwardModeError,
    LossError,
    ModelError,
    OneShotDataError,
    ParameterNameError,
    ShapeError,
    TrainingModeError,
)

N = 11
BATCH_SIZES = {"all": N, "ragged": 4, "one": 1}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}
DTYPES = [torch.float64, torch.float32]


class TiedNormalised(nn.Module):
    """A layer norm, a weight under two names, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.norm, self.frozen, self.head = nn.LayerNorm(3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(self.first(x)))
        return self.head(torch.tanh(self.frozen(self.second(hidden))))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def grouped() -> nn.Module:
    """Group norm has no batching rule for its second backward."""
    return nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Tanh(), nn.Linear(4, 2))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "tied": TiedNormalised,
    "grouped": grouped,
}
LOSSES = {"cross_entropy": nn.CrossEntropyLoss, "mse": nn.MSELoss}


@cache
def problem(
    model_name: str, loss_name: str, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, Tensor, Tensor, DenseReference]:
    torch.manual_seed(0)
    model = MODELS[model_name]().to(dtype)
    x = torch.randn(N, 3, dtype=dtype)
    y = torch.randint(2, (N,)) if loss_name == "cross_entropy" else torch.randn(N, 2, dtype=dtype)
    exact = MODELS[model_name]().double()
    exact.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    exact_y = y.double() if y.is_floating_point() else y
    return model, x, y, DenseReference(exact, LOSSES[loss_name](), x.double(), exact_y)


@cache
def dense_hessian(model_name: str, loss_name: str, dtype: torch.dtype) -> Tensor:
    return problem(model_name, loss_name, dtype)[3].hessian()


def params_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def loader(x: Tensor, y: Tensor, batching: str = "ragged") -> DataLoader[object]:
    return DataLoader(TensorDataset(x, y), batch_size=BATCH_SIZES[batching])


def cases(test: Callable[..., None]) -> Callable[..., None]:
    test = pytest.mark.parametrize("loss_name", LOSSES)(test)
    return pytest.mark.parametrize("model_name", MODELS)(test)


def gradients_of_points(reference: DenseReference) -> Tensor:
    return torch.stack(
        [
            flat_gradient(reference.loss(reference.model(x), y), reference.params)
            for x, y in zip(reference.x.split(1), reference.y.split(1), strict=True)
        ]
    )


# --- Hessians over loaders ---------------------------------------------------------------


@cases
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batching", BATCH_SIZES)
def test_hessian_is_that_of_the_mean_over_points(
    model_name: str, loss_name: str, batching: str, dtype: torch.dtype
) -> None:
    model, x, y, _ = problem(model_name, loss_name, dtype)
    expected = dense_hessian(model_name, loss_name, dtype)
    for use_hessian_avg in (True, False):
        result = functional.hessian(
            model, LOSSES[loss_name](), loader(x, y, batching), use_hessian_avg=use_hessian_avg
        )
        assert relative_error(result.double(), expected) < TOLERANCE[dtype]


@cases
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gauss_newton_is_the_mean_of_outer_products(
    model_name: str, loss_name: str, reduction: str
) -> None:
    model, x, y, reference = problem(model_name, loss_name)
    if reduction == "none" and loss_name == "mse":
        loss: object = lambda out, y: (out - y).square().mean(dim=1)  # noqa: E731
    elif reduction == "sum" and loss_name == "mse":
        loss = lambda out, y: (out - y).square().mean(dim=1).sum()  # noqa: E731
    else:
        loss = LOSSES[loss_name](reduction=reduction)
    result = functional.gauss_newton(model, loss, loader(x, y), reduction=reduction)
    assert relative_error(result, reference.gauss_newton()) < 1e-10
    hessian = functional.hessian(model, loss, loader(x, y), reduction=reduction)
    assert relative_error(hessian, dense_hessian(model_name, loss_name, x.dtype)) < 1e-10


HVP_ROUTES = {
    "precomputed": {},
    "precomputed, one function": {"use_average": False},
    "streamed": {"precompute_grad": False},
    "streamed, one function": {"precompute_grad": False, "use_average": False},
    "forward": {"precompute_grad": False, "reverse_only": False},
    "tracked": {"track_gradients": True},
    "tracked, streamed": {"precompute_grad": False, "track_gradients": True},
}


@cases
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", HVP_ROUTES)
def test_hvp_function_by_every_route(
    model_name: str, loss_name: str, route: str, dtype: torch.dtype
) -> None:
    model, x, y, _ = problem(model_name, loss_name, dtype)
    expected = dense_hessian(model_name, loss_name, dtype)
    product = functional.create_hvp_function(
        model, LOSSES[loss_name](), loader(x, y), **HVP_ROUTES[route]
    )
    rows = torch.randn(3, len(expected), dtype=dtype)
    for vec in (rows, rows[:1], rows[0], rows):
        result = product(vec)
        assert result.shape == vec.shape
        assert relative_error(result.double(), vec.double() @ expected) < TOLERANCE[dtype]
    assert product(rows[:0]).shape == (0, len(expected))
    assert product(rows).requires_grad == ("tracked" in route)


def test_older_names_give_the_same_products() -> None:
    model, x, y, _ = problem("mlp", "cross_entropy")
    expected, loss = dense_hessian("mlp", "cross_entropy", x.dtype), nn.CrossEntropyLoss()
    vec = torch.randn(len(expected), dtype=x.dtype)
    for average in (True, False):
        product = functional.get_hvp_function(model, loss, loader(x, y), use_hessian_avg=average)
        assert relative_error(product(vec), expected @ vec) < 1e-10
    for reverse_only in (True, False):
        products = functional.batch_hvp_gen(model, loss, loader(x, y), reverse_only)
        by_batch = torch.stack([product(vec) for product in products])
        sizes = torch.tensor([4.0, 4.0, 3.0], dtype=x.dtype)
        assert relative_error(sizes @ by_batch / N, expected @ vec) < 1e-10


def test_hvp_function_stays_at_the_parameters_it_was_made_with() -> None:
    model, x, y, _ = problem("mlp", "mse")
    model = MODELS["mlp"]().double()
    vec = torch.randn(26, dtype=x.dtype)
    for precompute in (True, False):
        product = functional.create_hvp_function(
            model, nn.MSELoss(), loader(x, y), precompute_grad=precompute
        )
        before = product(vec)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
        assert torch.equal(product(vec), before)


def test_restricted_hessian_is_a_block() -> None:
    model, x, y, _ = problem("mlp", "mse")
    block = functional.hessian(model, nn.MSELoss(), loader(x, y), restrict_to=["2.weight"])
    assert relative_error(block, dense_hessian("mlp", "mse", x.dtype)[16:24, 16:24]) < 1e-10


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("precompute_grad", [True, False])
def test_tracked_products_have_the_right_third_derivative(
    model_name: str, precompute_grad: bool
) -> None:
    model, x, y, _ = problem(model_name, "cross_entropy")
    product = functional.create_hvp_function(
        model,
        nn.CrossEntropyLoss(),
        loader(x, y),
        precompute_grad=precompute_grad,
        track_gradients=True,
    )
    size = len(dense_hessian(model_name, "cross_entropy", x.dtype))
    u, v, w = torch.randn(3, size, dtype=x.dtype)
    v.requires_grad_()
    form = u.dot(product(v))
    third = flat_gradient(form, trainable(model)).dot(w)
    by_vector = torch.autograd.grad(form, v)[0]
    hessian = functional.hessian(model, nn.CrossEntropyLoss(), loader(x, y), track_gradients=True)
    of_matrix = flat_gradient(u @ hessian @ v.detach(), trainable(model)).dot(w)
    expected = _third_derivative(model, x, y, u, v.detach(), w)
    assert third.item() == pytest.approx(expected, rel=1e-6)
    assert of_matrix.item() == pytest.approx(expected, rel=1e-6)
    assert relative_error(by_vector, hessian.detach() @ u) < 1e-10


def _third_derivative(
    model: nn.Module, x: Tensor, y: Tensor, u: Tensor, v: Tensor, w: Tensor
) -> float:
    """d/dt uᵀH(θ + tw)v by central differences of fourth order of reverse-mode Hessians."""

    def form(t: float) -> float:
        offset = 0
        moved = copy.deepcopy(model)
        for p in trainable(moved):
            step = w[offset : offset + p.numel()].reshape(p.shape)
            p.data.add_(t * step)
            offset += p.numel()
        loss = nn.CrossEntropyLoss()(moved(x), y)
        gradient = flat_gradient(loss, trainable(moved), graph=True)
        return flat_gradient(gradient.dot(v), trainable(moved)).dot(u).item()

    h = 1e-4
    return (8 * (form(h) - form(-h)) - (form(2 * h) - form(-2 * h))) / (12 * h)


# --- functions of parameters and a batch -------------------------------------------------


@cases
def test_losses_are_means_over_points(model_name: str, loss_name: str) -> None:
    model, x, y, reference = problem(model_name, loss_name)
    loss, params = LOSSES[loss_name](), params_of(model)
    expected = torch.stack(
        [loss(model(a), b).detach() for a, b in zip(x.split(1), y.split(1), strict=True)]
    )
    batch_loss = functional.create_batch_loss_function(model, loss)
    per_sample = functional.create_per_sample_loss_function(model, loss)
    empirical = functional.create_empirical_loss_function(model, loss, loader(x, y))
    at_batch = functional.batch_loss_function(model, loss, x, y)
    assert functional.empirical_loss_function is functional.create_empirical_loss_function
    assert relative_error(per_sample(params, x, y), expected) < 1e-12
    for value in (batch_loss(params, x, y), empirical(params), at_batch(params)):
        assert value.shape == ()
        assert value.item() == pytest.approx(expected.mean().item(), rel=1e-12)
    subset = {"head.weight": params["head.weight"]} if model_name == "tied" else params
    assert batch_loss(subset, x, y).item() == pytest.approx(expected.mean().item(), rel=1e-12)
    assert len(reference.params) > 0


@cases
@pytest.mark.parametrize("reverse_only", [True, False])
def test_batch_hvp(model_name: str, loss_name: str, reverse_only: bool) -> None:
    model, x, y, _ = problem(model_name, loss_name)
    expected = dense_hessian(model_name, loss_name, x.dtype)
    product = functional.create_batch_hvp_function(model, LOSSES[loss_name](), reverse_only)
    params = params_of(model)
    shuffled = dict(reversed(params.items()))
    rows = torch.randn(3, len(expected), dtype=x.dtype)
    for given in (params, shuffled):
        for vec in (rows, rows[0]):
            result = product(given, x, y, vec)
            assert result.shape == vec.shape
            assert relative_error(result, vec @ expected) < 1e-10


@cases
def test_per_sample_gradients_and_products_with_them(model_name: str, loss_name: str) -> None:
    model, x, y, reference = problem(model_name, loss_name)
    loss, params = LOSSES[loss_name](), params_of(model)
    expected = gradients_of_points(reference)
    gradients = functional.create_per_sample_gradient_function(model, loss)(params, x, y)
    flat = torch.cat([gradients[name].reshape(N, -1) for name in params], dim=1)
    assert relative_error(flat, expected) < 1e-10
    g = torch.randn(5, expected.shape[1], dtype=x.dtype)
    product = functional.create_matrix_jacobian_product_function(model, loss, g)
    assert relative_error(product(params, x, y), g @ expected.T) < 1e-10


@cases
def test_mixed_derivatives(model_name: str, loss_name: str) -> None:
    model, x, y, reference = problem(model_name, loss_name)
    params = params_of(model)
    mixed = functional.create_per_sample_mixed_derivative_function(model, LOSSES[loss_name]())(
        params, x[:3], y[:3]
    )
    for name, p in params.items():
        assert mixed[name].shape == (3, 3, *p.shape)
    flat = torch.cat([mixed[name].reshape(3, 3, -1) for name in params], dim=2)
    for i in range(3):
        point = x[i : i + 1].clone().requires_grad_()
        gradient = flat_gradient(
            reference.loss(reference.model(point), y[i : i + 1]), reference.params, graph=True
        )
        columns = [torch.autograd.grad(e, point, retain_graph=True)[0][0] for e in gradient]
        assert relative_error(flat[i], torch.stack(columns, dim=1)) < 1e-10


def test_functions_compose_with_transforms() -> None:
    model, x, y, _ = problem("tied", "cross_entropy")
    loss, params = nn.CrossEntropyLoss(), params_of(model)
    batch_loss = functional.create_batch_loss_function(model, loss)
    empirical = functional.create_empirical_loss_function(model, loss, loader(x, y))
    expected = flat_gradient(loss(model(x), y), trainable(model)).detach()
    for gradient in (torch.func.grad(batch_loss)(params, x, y), torch.func.grad(empirical)(params)):
        assert relative_error(torch.cat([gradient[n].flatten() for n in params]), expected) < 1e-10
    reference = dense_hessian("tied", "cross_entropy", x.dtype)
    # Forward over reverse mode, of which torch gets the layer norm wrong.
    name = "head.weight"
    block = torch.func.hessian(lambda p: batch_loss({name: p}, x, y))(params[name])
    start = len(reference) - params[name].numel() - 2
    rows = slice(start, start + params[name].numel())
    assert relative_error(block.reshape(6, 6), reference[rows, rows]) < 1e-10
    stacked = {key: torch.stack([p, 2 * p]) for key, p in params.items()}
    values = torch.func.vmap(batch_loss, in_dims=(0, None, None))(stacked, x, y)
    assert values[0].item() == pytest.approx(batch_loss(params, x, y).item(), rel=1e-12)
    products = functional.create_batch_hvp_function(model, loss)
    vectors = torch.randn(3, len(reference), dtype=x.dtype)
    mapped = torch.func.vmap(products, in_dims=(None, None, None, 0))(params, x, y, vectors)
    assert relative_error(mapped, vectors @ reference) < 1e-10


def test_functions_leave_the_global_random_state_alone() -> None:
    model, x, y, _ = problem("mlp", "mse")
    shuffled = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    before = torch.get_rng_state()
    functional.hessian(model, nn.MSELoss(), shuffled)
    functional.create_empirical_loss_function(model, nn.MSELoss(), shuffled)(params_of(model))
    assert torch.equal(torch.get_rng_state(), before)


# --- hvp ---------------------------------------------------------------------------------

STRUCTURES = {
    "tensor": (lambda a, b: torch.cat([a, b]), lambda s: s.split([2, 3])),
    "tuple": (lambda a, b: (a, b), lambda s: s),
    "list": (lambda a, b: [a, b], lambda s: s),
    "dict": (lambda a, b: {"a": a, "b": b}, lambda s: (s["a"], s["b"])),
}


def coupled(a: Tensor, b: Tensor) -> Tensor:
    return (a.sin().sum() * b.square()).sum() + (b**3).sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reverse_only", [True, False])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_hvp_keeps_the_structure(structure: str, reverse_only: bool, dtype: torch.dtype) -> None:
    make, take = STRUCTURES[structure]
    a, b, u, v = (torch.randn(n, dtype=torch.float64) for n in (2, 3, 2, 3))
    flat = torch.cat([a, b])
    matrix = torch.autograd.functional.hessian(lambda t: coupled(*t.split([2, 3])), flat)
    expected = matrix @ torch.cat([u, v])
    params, vec = make(a.to(dtype), b.to(dtype)), make(u.to(dtype), v.to(dtype))
    result = functional.hvp(lambda p: coupled(*take(p)), params, vec, reverse_only)
    assert type(result) is type(params)
    parts = torch.cat([t.double() for t in take(result)])
    assert relative_error(parts, expected) < (1e-12 if dtype == torch.float64 else 1e-5)


def test_hvp_aligns_keys_and_maps_over_vectors() -> None:
    params = {"a": torch.randn(2).double(), "b": torch.randn(3).double()}
    vec = {"b": torch.randn(3).double(), "a": torch.randn(2).double()}

    def func(p: dict[str, Tensor]) -> Tensor:
        return coupled(p["a"], p["b"])

    result = functional.hvp(func, params, vec)
    assert list(result) == ["a", "b"]
    stacked = {key: torch.stack([t, 2 * t]) for key, t in vec.items()}
    mapped = torch.func.vmap(lambda v: functional.hvp(func, params, v))(stacked)
    assert relative_error(mapped["b"][1], 2 * result["b"]) < 1e-12


def test_hvp_can_be_differentiated_again_through_a_layer_norm() -> None:
    x, v, w = (torch.randn(2, 4, dtype=torch.float64) for _ in range(3))

    def func(x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (4,)).pow(3).sum()

    leaf = x.clone().requires_grad_()
    product = functional.hvp(func, leaf, v)
    third = torch.autograd.grad((product * v).sum(), leaf)[0]
    h = 1e-4
    shifted = [functional.hvp(func, x + s * h * w, v).flatten().dot(v.flatten()) for s in (1, -1)]
    expected = (shifted[0] - shifted[1]) / (2 * h)
    assert (third * w).sum().item() == pytest.approx(expected.item(), rel=1e-5)


class WrongForward(torch.autograd.Function):
    """x³, with a forward derivative that is not its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return WrongDerivative.apply(ctx.saved_tensors[0]) * grad

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * tangent


class WrongDerivative(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 3 * x**2

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return 6 * ctx.saved_tensors[0] * grad

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        return 7 * ctx.saved_tensors[0] * tangent


def test_wrong_forward_mode_is_refused() -> None:
    x = torch.randn(3, dtype=torch.float64)

    def func(x: Tensor) -> Tensor:
        return WrongForward.apply(x).sum()

    assert relative_error(functional.hvp(func, x, x), 6 * x * x) < 1e-12
    with pytest.raises(ForwardModeError, match="differs from reverse mode"):
        functional.hvp(func, x, x, reverse_only=False)


HVP_MISUSES = {
    "keys": ({"a": torch.ones(2)}, {"b": torch.ones(2)}, ParameterNameError, "keys"),
    "length": ((torch.ones(2),), (torch.ones(2), torch.ones(2)), ParameterNameError, "structure"),
    "shape": (torch.ones(2), torch.ones(3), ShapeError, "vec has shape"),
    "dtype": (torch.ones(2), torch.ones(2).double(), DtypeError, "vec is torch.float64"),
    "integers": (torch.ones(2).long(), torch.ones(2).long(), DtypeError, "params is torch.int64"),
    "no tensor": (2.0, 1.0, ArgumentTypeError, "params must be"),
}


@pytest.mark.parametrize("misuse", HVP_MISUSES)
def test_hvp_names_what_does_not_fit(misuse: str) -> None:
    params, vec, error, message = HVP_MISUSES[misuse]
    with pytest.raises(error, match=message):
        functional.hvp(lambda p: torch.ones(()), params, vec)


def test_hvp_needs_a_single_element() -> None:
    with pytest.raises(ShapeError, match="single element"):
        functional.hvp(lambda x: x, torch.ones(2), torch.ones(2))


# --- refusals ----------------------------------------------------------------------------


def makers(model: nn.Module, loss: object, data: object) -> dict[str, Callable[[], object]]:
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    size = sum(p.numel() for p in model.parameters())
    params, vec = params_of(model), torch.ones(size, dtype=torch.float64)
    return {
        "batch loss": lambda: functional.create_batch_loss_function(model, loss)(params, x, y),
        "grad of batch loss": lambda: torch.func.grad(
            functional.create_batch_loss_function(model, loss)
        )(params, x, y),
        "per-sample loss": lambda: functional.create_per_sample_loss_function(model, loss)(
            params, x, y
        ),
        "per-sample gradient": lambda: functional.create_per_sample_gradient_function(model, loss)(
            params, x, y
        ),
        "batch hvp": lambda: functional.create_batch_hvp_function(model, loss)(params, x, y, vec),
        "empirical loss": lambda: functional.create_empirical_loss_function(model, loss, data)(
            params
        ),
        "hvp function": lambda: functional.create_hvp_function(model, loss, data)(vec),
        "streamed hvp function": lambda: functional.get_hvp_function(model, loss, data)(vec),
        "hessian": lambda: functional.hessian(model, loss, data),
        "gauss_newton": lambda: functional.gauss_newton(model, loss, data),
        "batch_hvp_gen": lambda: [p(vec) for p in functional.batch_hvp_gen(model, loss, data)],
    }


MAKERS = list(makers(mlp(), nn.CrossEntropyLoss(), []))


@pytest.mark.parametrize("maker", MAKERS)
def test_a_loss_that_is_no_mean_over_points_is_refused(maker: str) -> None:
    model, x, _, _ = problem("mlp", "mse")
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0], dtype=torch.float64))
    with pytest.raises(LossError, match="class weights"):
        makers(model, loss, [(x, torch.randint(2, (N,)))])[maker]()


@pytest.mark.parametrize("maker", MAKERS)
def test_active_dropout_is_refused(maker: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    x, y = torch.randn(N, 3, dtype=torch.float64), torch.randint(2, (N,))
    with pytest.raises(TrainingModeError):
        makers(model, nn.CrossEntropyLoss(), [(x, y)])[maker]()


LOADER_MAKERS = [name for name in MAKERS if name in MAKERS[5:]]


@pytest.mark.parametrize("maker", LOADER_MAKERS)
def test_a_generator_and_empty_data_are_refused(maker: str) -> None:
    model, x, y, _ = problem("mlp", "cross_entropy")
    with pytest.raises(OneShotDataError):
        makers(model, nn.CrossEntropyLoss(), iter([(x, y)]))[maker]()
    with pytest.raises(DataError):
        makers(model, nn.CrossEntropyLoss(), [])[maker]()


class OnceTanh(torch.autograd.Function):
    """A tanh whose backward cannot be differentiated again."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.tanh(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * (1 - ctx.saved_tensors[0] ** 2)


class HasOnceTanh(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(OnceTanh.apply(self.inner(x)))


@pytest.mark.parametrize(
    "maker", ["batch hvp", "hvp function", "streamed hvp function", "hessian", "batch_hvp_gen"]
)
def test_a_backward_that_cannot_be_differentiated_is_refused(maker: str) -> None:
    model = HasOnceTanh().double()
    x, y = torch.randn(N, 3, dtype=torch.float64), torch.randint(2, (N,))
    with pytest.raises(ModelError):
        makers(model, nn.CrossEntropyLoss(), [(x, y)])[maker]()


def test_parameters_are_checked() -> None:
    model, x, y, _ = problem("mlp", "mse")
    batch_loss = functional.create_batch_loss_function(model, nn.MSELoss())
    params = params_of(model)
    with pytest.raises(ParameterNameError, match="unknown parameter 'nope'"):
        batch_loss({"nope": x}, x, y)
    with pytest.raises(ParameterNameError, match="empty"):
        batch_loss({}, x, y)
    with pytest.raises(ShapeError, match=r"0\.bias"):
        batch_loss({**params, "0.bias": params["0.bias"][:2]}, x, y)
    with pytest.raises(DtypeError, match=r"0\.bias"):
        batch_loss({**params, "0.bias": params["0.bias"].float()}, x, y)
    with pytest.raises(ArgumentTypeError, match="mapping"):
        batch_loss([x], x, y)  # type: ignore[arg-type]
    tied, x, y, _ = problem("tied", "mse")
    weight = params_of(tied)["first.weight"]
    batch_loss = functional.create_batch_loss_function(tied, nn.MSELoss())
    values = [batch_loss({name: 2 * weight}, x, y) for name in ("first.weight", "second.weight")]
    assert torch.equal(*values)
    with pytest.raises(ParameterNameError, match="twice"):
        batch_loss({"first.weight": weight, "second.weight": weight}, x, y)


def test_mixed_derivatives_need_floating_point_inputs() -> None:
    model = nn.Sequential(nn.Embedding(4, 2), nn.Flatten(), nn.Linear(6, 2))
    mixed = functional.create_per_sample_mixed_derivative_function(model, nn.CrossEntropyLoss())
    with pytest.raises(ArgumentTypeError, match="x must be a floating-point tensor"):
        mixed(params_of(model), torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 1]))


def test_g_must_have_the_size_of_the_parameters() -> None:
    model, x, y, _ = problem("mlp", "mse")
    with pytest.raises(ShapeError, match=r"\(m, P\)"):
        functional.create_matrix_jacobian_product_function(model, nn.MSELoss(), torch.ones(3))
    product = functional.create_matrix_jacobian_product_function(
        model, nn.MSELoss(), torch.ones(2, 3, dtype=x.dtype)
    )
    with pytest.raises(ShapeError, match=r"expected \(m, 26\)"):
        product(params_of(model), x, y)
