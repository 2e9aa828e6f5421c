"""KFAC and EKFAC against Kronecker factors and exact matrices built by loops over points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from kronecker_cases import (
    CASES,
    EXACT,
    KRONECKER,
    LOSSES,
    MIXED,
    OPERATORS,
    Case,
    KroneckerReference,
    Problem,
    eigenbasis,
    exact_matrix,
    groups_of,
    kronecker_block,
    mlp,
    problem,
)
from reference import DenseReference, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hessops import (
    BlockDiagonalOperator,
    CgOperator,
    ChunkAveraging,
    Damping,
    EkfacOperator,
    GeneralizedGaussNewtonOperator,
    IdentityOperator,
    InverseOperator,
    KfacOperator,
)
from hessops.errors import (
    ArgumentError,
    DtypeError,
    ModelError,
    ParameterNameError,
    SingularOperatorError,
    StructureError,
    TrainingModeError,
)
from hessops.testing import check_operator

FISHER_TYPES = ["type-2", "empirical"]
APPROXIMATIONS = ["expand", "reduce"]
LAMBDA = 0.03


def kronecker_blocks(operator: KfacOperator) -> list[str]:
    return [name for name, b in operator.blocks.items() if repr(b).startswith("Kronecker")]


def blocks_of(matrix: Tensor, operator: KfacOperator) -> dict[str, Tensor]:
    """The diagonal blocks of a matrix over all parameters."""
    found = {}
    for name, block in operator.blocks.items():
        where = operator.space.indices(list(block.input_dict_structure))
        found[name] = matrix[where[:, None], where]
    return found


def corrected(operator: KfacOperator, matrix: Tensor) -> Tensor:
    """diag(Qᵀ F Q)."""
    basis = eigenbasis(operator)
    return (basis.T @ matrix @ basis).diagonal()


def inverted(matrix: Tensor, regularization: float = LAMBDA) -> Tensor:
    return torch.linalg.inv(matrix + regularization * torch.eye(len(matrix), dtype=matrix.dtype))


# --- KFAC is what it is defined to be ----------------------------------------------------


@pytest.mark.parametrize("kfac_approx", APPROXIMATIONS)
@pytest.mark.parametrize("fisher_type", FISHER_TYPES)
@pytest.mark.parametrize("case_name", KRONECKER)
def test_blocks_of_kfac_are_kronecker_products_of_the_factors(
    case_name: str, fisher_type: str, kfac_approx: str
) -> None:
    given = problem(case_name)
    operator = given.kfac(fisher_type=fisher_type, kfac_approx=kfac_approx)
    reference = given.factored(fisher_type, kfac_approx)
    expected = {name: reference.block(name) for name in KRONECKER[case_name].layers}
    assert list(operator.blocks) == list(expected)
    for name, block in operator.blocks.items():
        assert relative_error(block.to_dense(), expected[name]) < 1e-10


@pytest.mark.parametrize(
    ("case_name", "loss_name"),
    [("linear", name) for name in LOSSES]
    + [("classes_last", name) for name in ("mse", "binary_cross_entropy", "without_structure")],
)
@pytest.mark.parametrize("fisher_type", FISHER_TYPES)
def test_every_loss_has_its_own_root(fisher_type: str, case_name: str, loss_name: str) -> None:
    given = problem(case_name, loss_name)
    operator = given.kfac(fisher_type=fisher_type)
    reference = given.factored(fisher_type)
    for name, block in operator.blocks.items():
        assert relative_error(block.to_dense(), reference.block(name)) < 1e-10


def test_the_matrix_has_the_blocks_in_the_order_of_the_parameters_and_nothing_else() -> None:
    operator = problem("linear").kfac()
    expected = torch.block_diag(*[b.to_dense() for b in operator.blocks.values()])
    assert torch.equal(operator.to_dense(), expected)


@pytest.mark.parametrize("operator_name", OPERATORS)
@pytest.mark.parametrize("fisher_type", FISHER_TYPES)
def test_weights_of_points_weight_the_factors(fisher_type: str, operator_name: str) -> None:
    given = problem("linear")
    weights = torch.linspace(0.0, 3.0, len(given.x), dtype=torch.float64)
    y = torch.stack([given.y.double(), weights], dim=1)

    def weighted(out: Tensor, target: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(out, target[:, 0].long(), reduction="none")
        return losses * target[:, 1]

    def alone(out: Tensor, target: Tensor) -> Tensor:
        return weighted(out, target).sum()

    points = replace(given, loss=weighted, y=y)
    operator = OPERATORS[operator_name](*points.arguments(), fisher_type, reduction="none")
    reference = KroneckerReference(given.model, alone, given.x, y, fisher_type)
    exact = getattr(DenseReference(given.model, alone, given.x, y), EXACT[fisher_type])()
    for name, block in operator.blocks.items():
        if operator_name == "kfac":
            assert relative_error(block.to_dense(), reference.block(name)) < 1e-10
    if operator_name == "ekfac":
        assert relative_error(operator.eigenvalues, corrected(operator, exact)) < 1e-10


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reduction_says_what_the_loss_returns_and_leaves_the_matrix(reduction: str) -> None:
    given = problem("linear")
    loss = nn.CrossEntropyLoss(reduction=reduction)
    operator = KfacOperator(given.model, loss, given.batches(), reduction=reduction)
    assert relative_error(operator.to_dense(), given.kfac().to_dense()) < 1e-12


# --- where KFAC is exact -----------------------------------------------------------------


def require_exact_blocks(given: Problem) -> None:
    operator = given.kfac()
    expected = blocks_of(given.reference.generalized_gauss_newton(), operator)
    for name, block in operator.blocks.items():
        assert relative_error(block.to_dense(), expected[name]) < 1e-10


def test_kfac_is_exact_for_deep_linear_networks_with_squared_errors() -> None:
    case = Case(lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 2)), (3,), [])
    x = case.inputs()
    require_exact_blocks(Problem(case.model(), nn.MSELoss(), x, x[:, :2].square()))


def test_kfac_is_exact_for_one_point_with_one_output() -> None:
    case = Case(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), (3,), [])
    x = case.inputs(1)
    require_exact_blocks(Problem(case.model(), nn.MSELoss(), x, x[:, :1]))


def test_kfac_is_exact_for_softmax_regression_on_one_point() -> None:
    case = Case(lambda: nn.Linear(3, 4), (3,), [])
    require_exact_blocks(
        Problem(case.model(), nn.CrossEntropyLoss(), case.inputs(1), torch.tensor([2]))
    )


# --- EKFAC is what it is defined to be ---------------------------------------------------


@pytest.mark.parametrize("fisher_type", FISHER_TYPES)
@pytest.mark.parametrize("case_name", CASES)
def test_eigenvalues_of_ekfac_are_the_exact_diagonal_in_the_eigenbasis(
    case_name: str, fisher_type: str
) -> None:
    operator = problem(case_name).ekfac(fisher_type=fisher_type)
    expected = corrected(operator, exact_matrix(case_name, fisher_type))
    assert relative_error(operator.eigenvalues, expected) < 1e-10


@pytest.mark.parametrize("case_name", ["positions", "reused", "conv2d_grouped", "embedding"])
def test_ekfac_has_the_eigenbasis_of_kfac(case_name: str) -> None:
    given = problem(case_name)
    basis = eigenbasis(given.ekfac())
    assert torch.equal(basis, eigenbasis(given.kfac()))
    assert torch.allclose(basis.T @ basis, torch.eye(len(basis)).to(basis), atol=1e-12)


@pytest.mark.parametrize("loss_name", LOSSES)
def test_ekfac_is_exact_for_every_loss(loss_name: str) -> None:
    operator = problem("linear", loss_name).ekfac()
    expected = corrected(operator, exact_matrix("linear", "type-2", loss_name))
    assert relative_error(operator.eigenvalues, expected) < 1e-10


def test_ekfac_is_closer_to_the_exact_matrix_than_kfac() -> None:
    given, exact = problem("conv2d"), exact_matrix("conv2d")
    errors = [
        sum((b - k.blocks[name].to_dense()).norm() ** 2 for name, b in blocks_of(exact, k).items())
        for k in (given.ekfac(), given.kfac())
    ]
    assert errors[0] < 0.99 * errors[1]


@pytest.mark.parametrize("operator_name", OPERATORS)
def test_chunk_averaging_is_the_mean_of_the_batches(operator_name: str) -> None:
    given = problem("linear")
    operator = OPERATORS[operator_name](*given.arguments(5), averaging=ChunkAveraging())
    pieces = [replace(given, x=x, y=y) for x, y in given.batches(5)]
    if operator_name == "ekfac":
        exact = [p.reference.generalized_gauss_newton() for p in pieces]
        expected = corrected(operator, torch.stack(exact).mean(dim=0))
        assert relative_error(operator.eigenvalues, expected) < 1e-10
        return
    for name, block in operator.blocks.items():
        factors = [p.factored().factors(name) for p in pieces]
        a, b = (torch.stack(f).mean(dim=0) for f in zip(*factors, strict=True))
        expected = kronecker_block(given.model.get_submodule(name), [(a, b)])
        assert relative_error(block.to_dense(), expected) < 1e-10


# --- parameters without Kronecker factors ------------------------------------------------


@pytest.mark.parametrize("case_name", MIXED)
def test_layers_have_kronecker_factors_only_where_they_are_what_they_seem(case_name: str) -> None:
    assert kronecker_blocks(problem(case_name).kfac()) == list(MIXED[case_name].layers)


@pytest.mark.parametrize("fisher_type", FISHER_TYPES)
@pytest.mark.parametrize("case_name", MIXED)
def test_other_parameters_have_their_exact_block(case_name: str, fisher_type: str) -> None:
    operator = problem(case_name).kfac(fisher_type=fisher_type)
    expected = blocks_of(exact_matrix(case_name, fisher_type), operator)
    for name in set(operator.blocks) - set(MIXED[case_name].layers):
        assert relative_error(operator.blocks[name].to_dense(), expected[name]) < 1e-10


@pytest.mark.parametrize("case_name", ["layer_norm", "tied", "attention", "root_parameters"])
def test_other_parameters_have_their_exact_diagonal_where_blocks_are_too_large(
    case_name: str,
) -> None:
    operator = problem(case_name).kfac(max_dense=0)
    expected = blocks_of(exact_matrix(case_name), operator)
    for name in set(operator.blocks) - set(MIXED[case_name].layers):
        diagonal = expected[name].diagonal()
        assert relative_error(operator.blocks[name].to_dense(), diagonal.diag()) < 1e-10


@pytest.mark.parametrize("names", [["2.bias", "0.weight"], ["0.bias"], ["2.weight", "0.bias"]])
def test_restrict_to_takes_the_parameters_in_the_models_order(names: list[str]) -> None:
    given = problem("linear")
    operator = given.ekfac(restrict_to=names)
    ordered = [name for name, _ in given.model.named_parameters() if name in names]
    assert list(operator.input_dict_structure) == ordered
    params = [given.model.get_parameter(name) for name in ordered]
    exact = DenseReference(given.model, given.loss, given.x, given.y, params)
    expected = corrected(operator, exact.generalized_gauss_newton())
    assert relative_error(operator.eigenvalues, expected) < 1e-10


def test_layers_that_the_output_ignores_have_zero_blocks() -> None:
    class HalfUsed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    given = replace(problem("linear"), model=HalfUsed().double())
    assert given.kfac().blocks["unused"].trace() == 0.0
    assert given.ekfac().blocks["unused"].trace() == 0.0


def test_mappings_and_several_outputs_are_taken_apart() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.first, self.second = (nn.Linear(3, n) for n in (3, 2, 1))

        def forward(self, inputs: dict[str, Tensor]) -> dict[str, object]:
            hidden = torch.tanh(self.trunk(inputs["x"]))
            return {"classes": self.first(hidden), "rest": (self.second(hidden), hidden.argmax(1))}

    class Joined(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            out = self.inner({"x": x})
            return torch.cat([out["classes"], out["rest"][0]], dim=1)

    def of_joined(out: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(out[:, :2], y) + out[:, 2:].square().mean()

    given = problem("linear")
    torch.manual_seed(0)
    model = TwoHeads().double()
    operator = EkfacOperator(
        model,
        lambda out, y: of_joined(torch.cat([out["classes"], out["rest"][0]], dim=1), y),
        [({"x": x}, y) for x, y in given.batches()],
    )
    exact = DenseReference(Joined(model), of_joined, given.x, given.y).generalized_gauss_newton()
    assert relative_error(operator.eigenvalues, corrected(operator, exact)) < 1e-10


def test_batches_may_have_different_numbers_of_positions() -> None:
    model = problem("positions").model
    batches = [(torch.randn(3, t, 3).double(), torch.tensor([0, 1, 1])) for t in (2, 5)]
    operator = EkfacOperator(model, nn.CrossEntropyLoss(), batches)
    matrices = [
        DenseReference(model, nn.CrossEntropyLoss(), *batch).generalized_gauss_newton()
        for batch in batches
    ]
    expected = corrected(operator, torch.stack(matrices).mean(dim=0))
    assert relative_error(operator.eigenvalues, expected) < 1e-10


def test_checkpoints_that_keep_the_graph_change_nothing() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module, *, reentrant: bool) -> None:
            super().__init__()
            self.inner, self.reentrant = inner, reentrant

        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_(self.reentrant)
            return checkpoint(self.inner, x, use_reentrant=self.reentrant)

    given = problem("linear")
    first, activation, last = given.model
    inner = nn.Sequential(first, activation)
    kept = replace(given, model=nn.Sequential(Checkpointed(inner, reentrant=False), last))
    assert relative_error(kept.ekfac().to_dense(), given.ekfac().to_dense()) < 1e-12
    hidden = replace(given, model=nn.Sequential(Checkpointed(inner, reentrant=True), last))
    with pytest.raises(ModelError, match="use_reentrant"):
        hidden.ekfac()


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_the_user_are_part_of_the_model(register: str) -> None:
    model = CASES["linear"].model()
    hook = (
        (lambda module, args, out: out * args[0][:, :1])
        if register == "register_forward_hook"
        else (lambda module, args: (args[0] ** 2,))
    )
    getattr(model[0], register)(hook)
    given = replace(problem("linear"), model=model)
    operator = given.ekfac()
    expected = corrected(operator, given.reference.generalized_gauss_newton())
    assert relative_error(operator.eigenvalues, expected) < 1e-10


# --- batches -----------------------------------------------------------------------------


class PositionalEmbedding(nn.Module):
    """Adds a vector for each position to the points, whose number it does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(6, 4), nn.Embedding(5, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(torch.arange(x.shape[1]))
        return self.head(torch.tanh(self.tokens(x) + places).mean(dim=1))


@pytest.mark.parametrize("operator_name", OPERATORS)
def test_what_a_layer_is_does_not_depend_on_batches_of_one(operator_name: str) -> None:
    torch.manual_seed(0)
    model, x, y = PositionalEmbedding().double(), torch.randint(6, (7, 5)), torch.randint(3, (7,))
    kind, loss = OPERATORS[operator_name], nn.CrossEntropyLoss()
    whole = kind(model, loss, [(x, y)])
    alone = kind(model, loss, list(zip(x.split(1), y.split(1), strict=True)))
    assert "Exact('places', Embedding)" in repr(whole)
    assert "Kronecker('tokens', Embedding" in repr(whole)
    assert relative_error(alone.to_dense(), whole.to_dense()) < 1e-10


@pytest.mark.parametrize(
    "case_name", ["reused_at_positions", "conv2d_grouped", "transformer", "stacked_halves"]
)
@pytest.mark.parametrize("fisher_type", [*FISHER_TYPES, "monte-carlo"])
@pytest.mark.parametrize("operator_name", OPERATORS)
def test_batches_mean_nothing(operator_name: str, fisher_type: str, case_name: str) -> None:
    def matrix(size: int) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        arguments = (*problem(case_name).arguments(size), fisher_type)
        return OPERATORS[operator_name](*arguments, generator=generator).to_dense()

    whole = matrix(7)
    for size in (1, 3):
        assert relative_error(matrix(size), whole) < 1e-10


@pytest.mark.parametrize("loss_name", LOSSES)
def test_random_columns_belong_to_points_whatever_the_batches(loss_name: str) -> None:
    def matrix(size: int) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        given = problem("linear", loss_name)
        return given.kfac(size, fisher_type="monte-carlo", generator=generator).to_dense()

    assert relative_error(matrix(1), matrix(7)) < 1e-10
    assert relative_error(matrix(3), matrix(7)) < 1e-10


def test_points_of_very_different_scales_keep_their_digits() -> None:
    given = problem("linear")
    x = given.x.clone()
    x[0], x[1] = 1e6 * x[0], 1e-6 * x[1]
    given = replace(given, x=x)
    operator = given.ekfac()
    expected = corrected(operator, given.reference.generalized_gauss_newton())
    assert relative_error(operator.eigenvalues, expected) < 1e-10


def test_confident_predictions_keep_their_digits() -> None:
    model = CASES["linear"].model()
    with torch.no_grad():
        model[2].weight.mul_(40)
    given = replace(problem("linear"), model=model)
    operator = given.ekfac()
    expected = corrected(operator, given.reference.generalized_gauss_newton())
    assert relative_error(operator.eigenvalues, expected) < 1e-10


@pytest.mark.parametrize("operator_name", OPERATORS)
def test_single_precision_is_right_to_single_precision(operator_name: str) -> None:
    given = problem("conv2d")
    single = replace(given, model=CASES["conv2d"].model().float(), x=given.x.float())
    operator_type = OPERATORS[operator_name]
    expected = operator_type(*given.arguments()).to_dense()
    result = operator_type(*single.arguments()).to_dense()
    assert result.dtype == torch.float32
    assert relative_error(result.double(), expected) < 1e-4


# --- monte-carlo -------------------------------------------------------------------------


def sampled(given: Problem, seed: int, operator_name: str = "kfac", **keywords) -> KfacOperator:
    generator = torch.Generator().manual_seed(seed)
    arguments = (*given.arguments(7), "monte-carlo")
    return OPERATORS[operator_name](*arguments, generator=generator, **keywords)


@pytest.mark.parametrize("loss_name", ["cross_entropy", "binary_cross_entropy"])
def test_sampled_factors_are_right_on_average(loss_name: str) -> None:
    given = problem("linear", loss_name)
    draws = torch.stack([sampled(given, seed).to_dense() for seed in range(150)])
    error = (draws.mean(dim=0) - given.kfac().to_dense()).abs()
    standard = draws.std(dim=0) / len(draws) ** 0.5
    # Entries are many and not independent: their root mean square, and none far off.
    assert error.norm() < 3 * standard.norm()
    assert (error <= 5 * standard + 1e-12).all()


def test_sampled_eigenvalues_are_right_on_average() -> None:
    given = problem("linear")
    draws = torch.tensor([sampled(given, seed, "ekfac").trace() for seed in range(150)])
    expected = exact_matrix("linear").trace().item()
    assert abs(draws.mean() - expected) < 3 * draws.std() / len(draws) ** 0.5


def test_more_samples_are_closer() -> None:
    given = problem("linear")
    expected = given.kfac().to_dense()
    few, many = (
        sum(relative_error(sampled(given, s, num_samples=k).to_dense(), expected) for s in range(5))
        for k in (1, 200)
    )
    assert many < few / 5


def test_seeds_decide_and_the_global_generator_stays() -> None:
    given = problem("linear")

    def matrix(seed: int) -> Tensor:
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        result = given.kfac(fisher_type="monte-carlo").to_dense()
        assert torch.equal(torch.get_rng_state(), state)
        return result

    first = matrix(1)
    assert torch.equal(matrix(1), first)
    assert not torch.equal(matrix(2), first)
    assert torch.equal(sampled(given, 3).to_dense(), sampled(given, 3).to_dense())


def test_a_layer_that_is_demoted_leaves_the_draws() -> None:
    given = problem("tied")
    first, second = (sampled(given, 3, max_dense=size).blocks["head"] for size in (0, 512))
    assert torch.equal(first.to_dense(), second.to_dense())


# --- inverses ----------------------------------------------------------------------------


@pytest.mark.parametrize("case_name", ["linear", "embedding", "layer_norm", "conv2d_grouped"])
@pytest.mark.parametrize("operator_name", OPERATORS)
def test_the_damped_inverse_is_exact(operator_name: str, case_name: str) -> None:
    operator = OPERATORS[operator_name](*problem(case_name).arguments())
    expected = inverted(operator.to_dense())
    inverse = operator.inverse(regularization=LAMBDA)
    assert relative_error(inverse.to_dense(), expected) < 1e-10
    assert relative_error(operator.shift(LAMBDA).inverse().to_dense(), expected) < 1e-10
    assert relative_error(inverse.inverse().to_dense(), inverted(expected, 0.0)) < 1e-10


def test_with_regularization_is_a_new_inverse_with_the_same_bases() -> None:
    operator = problem("layer_norm").ekfac()
    inverse = operator.inverse(regularization=LAMBDA).with_regularization(0.7)
    rebuilt = operator.inverse(regularization=0.7)
    assert torch.equal(inverse.to_dense(), rebuilt.to_dense())
    assert inverse.operator is operator


@pytest.mark.parametrize("kind", ["one for all", "mapping", "sequence"])
def test_regularization_may_differ_by_block(kind: str) -> None:
    operator = problem("layer_norm").kfac()
    blocks = list(operator.blocks.values())
    values: list[float | Damping] = [0.1, Damping(relative=0.5), 0.0]
    shifts = [0.1, 0.5 * blocks[1].to_dense().diagonal().mean().item(), 0.0]
    if kind == "one for all":
        values = [Damping(relative=0.2)] * 3
        shifts = [0.2 * b.to_dense().diagonal().mean().item() for b in blocks]
    else:
        values[2], shifts[2] = 0.3, 0.3
    regularization: object = {
        "one for all": values[0],
        "mapping": dict(zip(reversed(operator.blocks), reversed(values), strict=True)),
        "sequence": values,
    }[kind]
    inverse = operator.inverse(regularization=regularization)
    inverses = [inverted(b.to_dense(), s) for b, s in zip(blocks, shifts, strict=True)]
    assert relative_error(inverse.to_dense(), torch.block_diag(*inverses)) < 1e-10
    assert list(inverse.block_regularization.values()) == pytest.approx(shifts)


def damped(factors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A + π√λ I and B + √λ/π I."""
    a, b = factors
    ratio = (a.diagonal().mean() / b.diagonal().mean()).sqrt()
    root = LAMBDA**0.5
    return a + ratio * root * torch.eye(len(a)).to(a), b + root / ratio * torch.eye(len(b)).to(b)


@pytest.mark.parametrize("case_name", ["linear", "conv2d_grouped", "embedding"])
def test_factored_damping_damps_each_factor(case_name: str) -> None:
    given = problem(case_name)
    operator, reference = given.kfac(), given.factored()
    inverse = operator.inverse(regularization=LAMBDA, damping="factored-tikhonov")
    for name, block in blocks_of(inverse.to_dense(), operator).items():
        module = given.model.get_submodule(name)
        factors = [damped(reference.factors(name, g)) for g in range(groups_of(module))]
        assert relative_error(block, torch.linalg.inv(kronecker_block(module, factors))) < 1e-10


def test_factored_damping_leaves_exact_blocks_with_the_plain_one() -> None:
    operator = problem("layer_norm").kfac()
    plain = operator.inverse(regularization=LAMBDA).to_dense()
    factored = operator.inverse(regularization=LAMBDA, damping="factored-tikhonov").to_dense()
    assert torch.equal(*(blocks_of(m, operator)["1"] for m in (plain, factored)))


def test_corrected_eigenvalues_have_no_factored_damping() -> None:
    operator = problem("linear").ekfac()
    with pytest.raises(ArgumentError, match="factored-tikhonov"):
        operator.inverse(regularization=LAMBDA, damping="factored-tikhonov")


@pytest.mark.parametrize("operator_name", OPERATORS)
def test_a_singular_operator_has_a_pseudo_inverse_only(operator_name: str) -> None:
    operator = OPERATORS[operator_name](*problem("layer_norm").arguments())
    with pytest.raises(SingularOperatorError, match="pseudo_inverse"):
        operator.inverse()
    with pytest.raises(SingularOperatorError):
        operator.logdet()
    with pytest.raises(SingularOperatorError):
        operator.power(-0.5)
    pieces = []
    for block in operator.blocks.values():
        bound = block.cutoff.max().item()
        pieces.append(torch.linalg.pinv(block.to_dense(), atol=bound, rtol=0.0, hermitian=True))
    expected = torch.block_diag(*pieces)
    assert relative_error(operator.pseudo_inverse().to_dense(), expected) < 1e-8


def test_a_cutoff_of_the_pseudo_inverse_is_absolute() -> None:
    operator = problem("linear").ekfac()
    cutoff = operator.eigenvalues.median().item() * (1 + 1e-9)
    expected = torch.linalg.pinv(operator.to_dense(), atol=cutoff, rtol=0.0, hermitian=True)
    assert relative_error(operator.pseudo_inverse(cutoff).to_dense(), expected) < 1e-10


def test_a_regular_operator_needs_no_regularization() -> None:
    operator = problem("linear", "without_structure", n=40).ekfac()
    expected = torch.linalg.inv(operator.to_dense())
    assert relative_error(operator.inverse().to_dense(), expected) < 1e-8


@pytest.mark.parametrize("operator_name", OPERATORS)
def test_functions_of_the_operator_are_those_of_its_matrix(operator_name: str) -> None:
    operator = OPERATORS[operator_name](*problem("layer_norm").arguments())
    matrix = operator.to_dense()
    damped = matrix + LAMBDA * torch.eye(len(matrix)).to(matrix)
    assert operator.trace() == pytest.approx(matrix.trace().item(), rel=1e-12)
    assert operator.logdet(LAMBDA) == pytest.approx(torch.logdet(damped).item(), rel=1e-10)
    root = operator.power(0.5).to_dense()
    assert relative_error(root @ root, matrix) < 1e-10
    whitening = operator.damped(LAMBDA).power(-0.5).to_dense()
    assert relative_error(whitening @ whitening, torch.linalg.inv(damped)) < 1e-10


def test_its_inverse_preconditions_the_exact_matrix() -> None:
    case = Case(lambda: nn.Linear(8, 4), (8,), [])
    x = case.inputs(60) * torch.logspace(1, -1, 8, dtype=torch.float64)
    given = Problem(case.model(), nn.CrossEntropyLoss(), x, torch.arange(60).remainder(4))
    matrix = GeneralizedGaussNewtonOperator(*given.arguments(60))
    rhs = torch.randn(3, matrix.input_size, dtype=torch.float64)
    preconditioner = given.ekfac(60).inverse(regularization=1e-4)
    plain = CgOperator(matrix, 1e-4, rtol=1e-10).solve(rhs)
    solution = CgOperator(matrix, 1e-4, rtol=1e-10, preconditioner=preconditioner).solve(rhs)
    assert solution.iterations.max() < plain.iterations.min() / 2
    expected = rhs @ inverted(matrix.to_dense(), 1e-4)
    assert relative_error(solution.value, expected) < 1e-6


def test_a_solver_may_take_the_place_of_the_closed_form() -> None:
    operator = problem("linear").kfac()
    inverse = operator.inverse(lambda system: CgOperator(system, LAMBDA, rtol=1e-12))
    assert relative_error(inverse.to_dense(), inverted(operator.to_dense())) < 1e-8
    with pytest.raises(ArgumentError, match="solver"):
        operator.inverse(CgOperator, regularization=LAMBDA)


# --- an operator like any other ----------------------------------------------------------


@pytest.mark.parametrize("case_name", ["layer_norm", "embedding", "conv2d_grouped"])
@pytest.mark.parametrize("operator_name", OPERATORS)
def test_the_contract_of_operators_is_kept(operator_name: str, case_name: str) -> None:
    operator = OPERATORS[operator_name](*problem(case_name).arguments())
    matrix = torch.block_diag(*[b.to_dense() for b in operator.blocks.values()])
    check_operator(operator, matrix)
    check_operator(operator.inverse(regularization=LAMBDA), inverted(matrix), accuracy=1e-8)
    check_operator(operator.pseudo_inverse(), accuracy=1e-8)


def test_sums_multiples_and_blocks_are_operators() -> None:
    kfac, ekfac = problem("linear").kfac(), problem("linear").ekfac()
    vector = torch.randn(26, dtype=torch.float64)
    mixed = 0.5 * kfac + 2.0 * ekfac + IdentityOperator(26, dtype=torch.float64)
    expected = 0.5 * kfac.apply(vector) + 2.0 * ekfac.apply(vector) + vector
    assert relative_error(mixed.apply(vector), expected) < 1e-12
    joined = BlockDiagonalOperator([ekfac.inverse(regularization=LAMBDA), kfac])
    both = torch.cat([inverted(ekfac.to_dense()) @ vector, kfac.apply(vector)])
    assert relative_error(joined.apply(torch.cat([vector, vector])), both) < 1e-10


def test_reordered_keys_mean_the_same_vector() -> None:
    operator = problem("layer_norm").ekfac()
    vector = torch.randn(operator.input_size, dtype=torch.float64)
    tensors = operator.space.unflatten(vector)
    result = operator.apply_to_dict(dict(reversed(tensors.items())))
    assert list(result) == list(tensors)
    assert torch.equal(operator.space.flatten(result), operator.apply(vector))


def test_moving_to_the_meta_device_moves_every_part() -> None:
    operator = problem("layer_norm").ekfac()
    inverse = operator.inverse(regularization=LAMBDA)
    for moved in (operator.to("meta"), inverse.to("meta")):
        assert moved.apply(torch.ones(moved.input_size, dtype=torch.float64)).is_meta
    assert operator.device.type == inverse.device.type == "cpu"


def test_the_operator_stays_until_refresh() -> None:
    model = CASES["layer_norm"].model()
    given = replace(problem("layer_norm"), model=model)
    operator = given.ekfac()
    before = operator.to_dense()
    with torch.no_grad():
        model[0].weight[0].add_(0.5)
    assert torch.equal(operator.to_dense(), before)
    after = operator.refresh().to_dense()
    assert torch.equal(after, given.ekfac().to_dense())
    assert relative_error(after, before) > 1e-3


@pytest.mark.parametrize(
    "invert",
    [
        lambda operator: operator.inverse(regularization=Damping(relative=0.1)),
        lambda operator: operator.shift(LAMBDA).inverse(),
    ],
    ids=["inverse", "shifted"],
)
def test_an_inverse_stays_until_refresh(
    invert: Callable[[EkfacOperator], InverseOperator],
) -> None:
    model = CASES["layer_norm"].model()
    given = replace(problem("layer_norm"), model=model)
    inverse = invert(given.ekfac())
    before = inverse.to_dense()
    with torch.no_grad():
        model[0].weight[0].add_(0.5)
    assert torch.equal(inverse.to_dense(), before)
    assert inverse.refresh() is inverse
    after = inverse.to_dense()
    assert torch.equal(after, invert(given.ekfac()).to_dense())
    assert relative_error(after, before) > 1e-3
    assert bool(inverse.solve(torch.ones_like(after[0])).converged.all())


def test_the_callers_state_is_left_alone() -> None:
    model = CASES["batch_norm"].model()
    given = replace(problem("batch_norm"), model=model)
    given.loss(model(given.x), given.y).backward()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    given.ekfac(fisher_type="monte-carlo")
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def hooks_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if module._forward_hooks]


def test_no_hooks_are_left() -> None:
    operator = problem("layer_norm").ekfac()
    assert operator.curvature.objective is not None
    assert hooks_of(problem("layer_norm").model) == []
    assert hooks_of(operator.curvature.objective.model) == []


def test_no_hooks_are_left_by_a_batch_that_fails() -> None:
    class Picky(nn.Module):
        ran: Picky

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.limit = nn.Linear(3, 2), 1e3

        def forward(self, x: Tensor) -> Tensor:
            Picky.ran = self
            hidden = self.layer(x)
            if (x > self.limit).any():
                raise RuntimeError("too large")
            return hidden

    model, given = Picky().double(), problem("linear")
    x = given.x.clone()
    x[-1] = 100.0
    operator = replace(given, model=model, x=x).ekfac()
    model.limit = 50.0
    with pytest.raises(ModelError, match="too large"):
        operator.refresh()
    assert operator.curvature.objective is not None
    assert operator.curvature.objective.model.limit == 1e3
    assert Picky.ran.limit == 50.0
    assert hooks_of(model) == hooks_of(Picky.ran) == []


@pytest.mark.parametrize("progress", [True, False])
def test_progress_changes_nothing(progress: bool, capsys: pytest.CaptureFixture[str]) -> None:
    given = problem("linear")
    result = given.ekfac(progress=progress).to_dense()
    assert torch.equal(result, given.ekfac().to_dense())
    assert ("decompositions" in capsys.readouterr().err) == progress


def test_factors_may_be_decomposed_in_double_precision() -> None:
    given = problem("linear")
    single = replace(given, model=CASES["linear"].model().float(), x=given.x.float())
    operator = single.kfac(eigh_dtype=torch.float64)
    assert operator.dtype == torch.float32
    assert relative_error(operator.to_dense().double(), given.kfac().to_dense()) < 1e-5


def test_repr_shows_what_each_block_is() -> None:
    text = repr(problem("layer_norm").ekfac(kfac_approx="reduce"))
    assert "EkfacOperator(type-2, reduce) [34 x 34, float64, cpu]" in text
    assert "GeneralizedGaussNewtonOperator(Sequential, 7 points" in text
    assert "Kronecker('0', Linear, 4 x 4) [16 x 16" in text
    assert "Exact('1', LayerNorm) [8 x 8" in text
    assert "ExactDiagonal('1', LayerNorm)" in repr(problem("layer_norm").kfac(max_dense=7))
    assert "Kronecker('0', Conv2d, 2 x 2 x 9)" in repr(problem("conv2d_grouped").kfac())
    reduced = problem("embedding").kfac(kfac_approx="reduce")
    assert "Kronecker('0', Embedding, 3 x 5, expand)" in repr(reduced)
    inverse = problem("linear").kfac().inverse(regularization=0.5, damping="factored-tikhonov")
    assert "regularization=0.5, damping='factored-tikhonov'" in repr(inverse)


# --- refusals ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keywords",
    [{"fisher_type": "type-1"}, {"kfac_approx": "both"}, {"eigh_dtype": torch.float16}],
    ids=lambda keywords: next(iter(keywords)),
)
def test_unknown_options_are_refused(keywords: dict[str, object]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(keywords))):
        problem("linear").kfac(**keywords)


def test_unknown_dampings_and_blocks_are_refused() -> None:
    operator = problem("linear").kfac()
    with pytest.raises(ArgumentError, match="damping"):
        operator.inverse(regularization=LAMBDA, damping="tikhonov")
    with pytest.raises(ParameterNameError, match="blocks"):
        operator.inverse(regularization={"0": LAMBDA})


def test_half_precision_is_refused() -> None:
    data = [(torch.randn(4, 3).bfloat16(), torch.tensor([0, 1, 0, 1]))]
    with pytest.raises(DtypeError, match="float32 or float64"):
        KfacOperator(mlp().bfloat16(), nn.CrossEntropyLoss(), data)


NOT_CONVEX: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "separable": lambda out, y: out.sin().mean(),
    "not_separable": lambda out, y: (out[:, 0] * out[:, 1]).mean(),
}


@pytest.mark.parametrize("loss_name", NOT_CONVEX)
def test_a_loss_that_is_not_convex_has_an_empirical_matrix_only(loss_name: str) -> None:
    given = replace(problem("linear"), loss=NOT_CONVEX[loss_name])
    with pytest.raises(StructureError, match="negative eigenvalue"):
        given.kfac()
    operator = given.ekfac(fisher_type="empirical")
    expected = corrected(operator, given.reference.gauss_newton())
    assert relative_error(operator.eigenvalues, expected) < 1e-10


def test_log_probabilities_have_an_empirical_matrix_only() -> None:
    given = problem("linear")
    log_probabilities = nn.Sequential(given.model, nn.LogSoftmax(dim=1))
    changed = replace(given, model=log_probabilities, loss=nn.NLLLoss())
    with pytest.raises(StructureError, match="logits"):
        changed.kfac()
    result = changed.kfac(fisher_type="empirical").to_dense()
    assert relative_error(result, given.kfac(fisher_type="empirical").to_dense()) < 1e-10


def test_models_in_training_mode_are_refused() -> None:
    dropping = nn.Sequential(mlp(), nn.Dropout(0.5)).double()
    with pytest.raises(TrainingModeError, match="eval"):
        replace(problem("linear"), model=dropping).kfac()


# --- what it is not yet ------------------------------------------------------------------


class SequenceFirst(nn.Module):
    """Runs on (positions, points, features) and reads some positions."""

    def __init__(self, read: Callable[[Tensor], Tensor], norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(3, 4), norm, nn.Linear(4, 2)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.read(torch.tanh(self.norm(self.layer(x.transpose(0, 1))))))


def require_corrected(model: nn.Module, x: Tensor) -> None:
    given = Problem(
        model.double().eval(), nn.CrossEntropyLoss(), x, torch.arange(len(x)).remainder(2)
    )
    operator = given.ekfac(len(x))
    expected = corrected(operator, given.reference.generalized_gauss_newton())
    assert relative_error(operator.eigenvalues, expected) < 1e-10


@pytest.mark.parametrize(("n", "positions"), [(5, 5), (8, 8), (20, 8)])
def test_positions_are_not_mistaken_for_points_of_a_module(n: int, positions: int) -> None:
    model = SequenceFirst(lambda h: h.mean(dim=0), nn.LayerNorm(4))
    require_corrected(model, torch.randn(n, positions, 3, dtype=torch.float64))


@pytest.mark.parametrize(("n", "position"), [(4, 0), (5, 0), (8, -1), (16, 0), (16, -1)])
def test_positions_are_not_mistaken_for_points_of_a_layer(n: int, position: int) -> None:
    model = SequenceFirst(lambda h: h[position], nn.Identity())
    require_corrected(model, torch.randn(n, n, 3, dtype=torch.float64))


def test_a_single_position_may_be_read_of_any_number_of_points() -> None:
    for position in (0, -1):
        model = SequenceFirst(lambda h, position=position: h[position], nn.Identity())
        require_corrected(model, torch.randn(20, 16, 3, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e4, 1e6])
def test_a_small_part_of_a_loss_keeps_its_curvature_in_single_precision(scale: float) -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.classes, self.value = (nn.Linear(3, n) for n in (3, 2, 1))

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.trunk(x))
            return torch.cat([self.classes(hidden), self.value(hidden)], dim=1)

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(out[:, :2], y) + scale * out[:, 2].square().mean()

    model = TwoHeads()
    given = replace(problem("linear"), model=model, loss=loss, x=problem("linear").x.float())
    single = given.kfac().blocks["classes"].to_dense()
    double = replace(given, model=model.double(), x=given.x.double()).kfac().blocks["classes"]
    assert relative_error(single.double(), double.to_dense()) < 1e-3


def test_a_large_point_leaves_the_curvature_of_others_in_single_precision() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x[:, :1] > 0, self.branches[0](x), self.branches[1](x))

    def loss(out: Tensor, y: Tensor) -> Tensor:
        distances = (1 + out.square().sum(dim=1)).sqrt()
        return torch.where(y > 0, 1e6 * out.sum(dim=1).square(), distances).mean()

    model = Branches()
    x = torch.cat([torch.ones(1, 3), -torch.rand(5, 3)])
    given = Problem(model, loss, x, torch.tensor([1, 0, 0, 0, 0, 0]))
    small = [given.kfac(size).blocks["branches.1"].to_dense() for size in (6, 1)]
    assert relative_error(*small) < 1e-3


def rank_by_point(out: Tensor, y: Tensor) -> Tensor:
    along, extra = out.sum(dim=1).square(), 3 * out[:, 0].square()
    return (along + torch.where(y > 0, extra, torch.zeros_like(extra))).mean()


def test_hessians_without_structure_may_be_singular_with_random_columns() -> None:
    given = replace(problem("linear"), loss=rank_by_point)
    first, second = (
        given.kfac(
            size, fisher_type="monte-carlo", generator=torch.Generator().manual_seed(0)
        ).to_dense()
        for size in (7, 1)
    )
    assert relative_error(first, second) < 1e-10


def test_random_columns_do_not_depend_on_batches_of_points_without_weight() -> None:
    def losses(out: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(out, y, reduction="none")

    given = problem("linear")
    y = given.y.clone()
    y[3] = -100  # the index that cross-entropy ignores
    first, second = (
        replace(given, loss=losses, y=y)
        .kfac(
            size,
            fisher_type="monte-carlo",
            generator=torch.Generator().manual_seed(0),
            reduction="none",
        )
        .to_dense()
        for size in (1, 7)
    )
    assert relative_error(first, second) < 1e-10


class RarelyTied(nn.Module):
    """A weight that also acts outside of its layer, on few points."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        again = nn.functional.linear(x, self.layer.weight)
        return self.head(torch.tanh(self.layer(x))) + torch.where(x[:, :1] > 1.5, again, 0.0)


def test_a_weight_that_is_shared_on_few_points_has_its_exact_block() -> None:
    x = torch.randn(40, 3, dtype=torch.float64).clamp(max=1.4)
    x[3, 0] = 3.0
    require_corrected(RarelyTied(), x)


def test_modules_that_vmap_gets_wrong_are_looped_over() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2))
    require_corrected(model, torch.randn(8, 3, dtype=torch.float64))


def test_an_embedding_of_one_token_is_a_layer() -> None:
    model = nn.Sequential(nn.Embedding(1, 3), nn.Linear(3, 2))
    require_corrected(model, torch.zeros(4, dtype=torch.long))


def test_a_module_that_is_called_more_often_on_a_batch_is_no_failure_of_the_library() -> None:
    class Adaptive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden, steps = x, 0
            while bool((x[:, 0] > steps).any()):
                hidden = torch.where(x[:, :1] > steps, self.norm(hidden).tanh(), hidden)
                steps += 1
            return self.head(hidden)

    x = torch.rand(40, 3, dtype=torch.float64)
    x[3, 0] = 2.5
    require_corrected(Adaptive(), x)
