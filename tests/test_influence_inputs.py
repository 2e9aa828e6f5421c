"""Blocks, arguments, damping, gradients, files: what is accepted and what is refused."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from influence_cases import BLOCKS, CASES, Problem
from reference import relative_error
from torch import Tensor, nn

from hessops import (
    Batch,
    CgOperator,
    DirectSolveOperator,
    GeneralizedGaussNewtonOperator,
    HessianOperator,
    JacobiPreconditioner,
    LissaOperator,
    MatrixOperator,
    MinresOperator,
    NystroemPreconditioner,
    Objective,
)
from hessops.errors import (
    ArgumentError,
    ArgumentTypeError,
    DataChangedError,
    DataError,
    DtypeError,
    HessopsError,
    LossError,
    ModelError,
    NonFiniteError,
    NotFittedError,
    ParameterNameError,
    ShapeError,
    SingularOperatorError,
    StoreError,
    StructureError,
    TrainingModeError,
    UncoveredParametersWarning,
)
from hessops.influence import (
    ArnoldiInfluence,
    BilinearForm,
    BlockMode,
    CgInfluence,
    Damping,
    DirectInfluence,
    GradientProvider,
    Influence,
    InfluenceFunctionModel,
    InfluenceMode,
    InverseHarmonicMeanInfluence,
    LissaInfluence,
    LowRankBilinearForm,
    NystroemSketchInfluence,
    SecondOrderMode,
)

GGN = "generalized_gauss_newton"


@pytest.fixture
def problem() -> Problem:
    return Problem()


def fitted(problem: Problem, **settings: object) -> DirectInfluence:
    settings = {"regularization": 1e-3, **settings}
    return DirectInfluence(problem.model, problem.loss, **settings).fit(problem.batches())


# --- blocks --------------------------------------------------------------------------------


def test_a_bare_layer_is_a_block_of_the_model_itself() -> None:
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    for mode, names in (
        ("layer_wise", ("",)),
        ("PARAMETER_WISE", ("weight", "bias")),
        (BlockMode.FULL, ("full",)),
    ):
        influence = DirectInfluence(nn.Linear(3, 2), nn.MSELoss(), 0.1, mode).fit([(x, y)])
        assert influence.block_names == names
        assert influence.influences(x, y).shape == (6, 6)


def test_the_order_of_blocks_and_of_names_in_them_changes_nothing(problem: Problem) -> None:
    one = {"a": ["gain", "last.weight", "inner.0.bias"], "b": ["inner.0.weight", "last.bias"]}
    other = {"b": ["last.bias", "inner.0.weight"], "a": ["inner.0.bias", "gain", "last.weight"]}
    first, second = (fitted(problem, block_structure=blocks) for blocks in (one, other))
    x, y = problem.x_test, problem.y_test
    assert torch.equal(first.influence_factors(x, y), second.influence_factors(x, y))
    assert torch.equal(first.influences(x, y), second.influences(x, y))
    for name, part in first.influences_by_block(x, y).items():
        assert torch.equal(part, second.influences_by_block(x, y)[name])


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"a": ["gain"], "b": ["gain", "last.bias"]}, "'gain' is in the blocks 'a' and 'b'"),
        ({"a": ["gain", "gain"]}, "named twice"),
        ({"a": ["gian"]}, "unknown parameter 'gian'"),
        ({"a": []}, r"block_structure\['a'\] is empty"),
        ({}, "block_structure is empty"),
    ],
)
def test_blocks_that_are_none_are_refused(
    blocks: dict[str, list[str]], message: str, problem: Problem
) -> None:
    with pytest.raises(ParameterNameError, match=message):
        DirectInfluence(problem.model, problem.loss, 0.1, blocks)


@pytest.mark.parametrize("blocks", [3, None, {"a": "gain"}, {1: ["gain"]}])
def test_block_structures_of_another_type_are_refused(blocks: object, problem: Problem) -> None:
    with pytest.raises(ArgumentTypeError, match="block_structure"):
        DirectInfluence(problem.model, problem.loss, 0.1, blocks)


def test_frozen_parameters_are_in_no_block(problem: Problem) -> None:
    problem.model.gain.requires_grad_(False)
    assert fitted(problem, block_structure="parameter_wise").block_names == tuple(
        name for name in problem.names if name != "gain"
    )
    with pytest.raises(ParameterNameError, match="frozen parameter 'gain'"):
        DirectInfluence(problem.model, problem.loss, 0.1, {"a": ["gain"]})


def test_parameters_that_are_left_out_are_listed_and_count_as_constants(problem: Problem) -> None:
    names = ["last.weight", "last.bias"]
    with pytest.warns(UncoveredParametersWarning, match=r"\['gain', 'inner.0.weight'") as caught:
        influence = fitted(problem, block_structure={"head": names})
    assert caught[0].filename == __file__
    for name, parameter in problem.model.named_parameters():
        parameter.requires_grad_(name in names)
    frozen = fitted(problem)
    x, y = problem.x_test, problem.y_test
    assert influence.space.names == tuple(names)
    assert torch.equal(influence.influences(x, y), frozen.influences(x, y))


def test_tied_parameters_are_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).tanh())

    model, x, y = Tied().double(), torch.randn(5, 3).double(), torch.randn(5, 3).double()
    blocks = {"a": ["second.weight"], "b": ["first.bias", "second.bias"]}
    influence = DirectInfluence(model, nn.MSELoss(), 0.1, blocks).fit([(x, y)])
    assert influence.space.size == 15
    hessian = HessianOperator(model, nn.MSELoss(), [(x, y)]).to_dense()
    block = hessian[:9, :9] + 0.1 * torch.eye(9, dtype=torch.float64)
    rows = influence.gradient_provider.flat_grads(x, y)
    expected = torch.linalg.solve(block, rows[:, :9].T).T
    factors = influence.influence_factors_by_block(x, y)["a"]
    assert relative_error(factors, expected) < 1e-10


# --- arguments -----------------------------------------------------------------------------


def test_the_historical_keywords_are_the_same_arguments(problem: Problem) -> None:
    model, loss = problem.model, problem.loss
    recipe = NystroemPreconditioner(rank=3)
    old = CgInfluence(
        model,
        loss,
        hessian_regularization=0.1,
        pre_conditioner=recipe,
        solve_simultaneously=True,
        second_order_mode=GGN,
    )
    new = CgInfluence(model, loss, 0.1, "full", GGN, preconditioner=recipe, use_block_cg=True)
    assert old.configuration() == new.configuration()
    x, y = problem.x_test, problem.y_test
    old, new = old.fit(problem.batches()), new.fit(problem.batches())
    assert torch.equal(old.influences(x, y), new.influences(x, y))
    assert ArnoldiInfluence(model, loss, rank_estimate=4).rank == 4


@pytest.mark.parametrize(
    "call",
    [
        lambda m, f: DirectInfluence(m, f, regularization=0.1, hessian_regularization=0.1),
        lambda m, f: DirectInfluence(m, f, 0.1, hessian_regularization=0.2),
        lambda m, f: ArnoldiInfluence(m, f, rank=3, rank_estimate=3),
        lambda m, f: CgInfluence(m, f, use_block_cg=True, solve_simultaneously=True),
        lambda m, f: CgInfluence(m, f, preconditioner=None, pre_conditioner=JacobiPreconditioner()),
    ],
)
def test_giving_both_names_is_an_error(call, problem: Problem) -> None:
    with pytest.raises(ArgumentTypeError, match="is another name of"):
        call(problem.model, problem.loss)


def test_unknown_and_missing_arguments_name_the_class(problem: Problem) -> None:
    with pytest.raises(ArgumentTypeError, match=r"DirectInfluence: .*'rank_estimate'"):
        DirectInfluence(problem.model, problem.loss, rank_estimate=3)
    with pytest.raises(ArgumentTypeError, match=r"InverseHarmonicMeanInfluence: .*regularization"):
        InverseHarmonicMeanInfluence(problem.model, problem.loss)


def test_spellings_of_one_setting_are_equal(problem: Problem) -> None:
    def configuration(**settings: object):
        return CgInfluence(problem.model, problem.loss, 0.1, **settings).configuration()

    for mode in (SecondOrderMode.GENERALIZED_GAUSS_NEWTON, GGN, GGN.upper()):
        assert configuration(second_order_mode=mode) == configuration(second_order_mode=GGN)
    assert configuration(atol=0) == configuration(atol=0.0) == configuration(reduction="mean")
    assert configuration(atol=1e-9) != configuration()


@pytest.mark.parametrize("mode", ["up", "UP", "Up", InfluenceMode.UP])
def test_modes_are_equal_by_name(mode: str, problem: Problem) -> None:
    influence = fitted(problem)
    x, y = problem.x_test, problem.y_test
    assert torch.equal(influence.influences(x, y, mode=mode), influence.influences(x, y))


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda i, x, y: i.influences(x, y, mode="down"), "mode"),
        (lambda i, x, y: i.influences(x, y, mode=None), "mode"),
        (lambda i, x, y: i.influences_from_factors(x, x, y), "factors"),
        (lambda i, x, y: i.influences_from_factors(i.influence_factors(x, y)[0], x, y), "factors"),
        (lambda i, x, y: i.influences_from_factors(i.influence_factors(x, y).float(), x, y), "f"),
        (lambda i, x, y: i.influences_from_factors({"gain": x}, x, y), "missing"),
        (lambda i, x, y: i.influences_from_factors_by_block({"other": x}, x, y), "blocks"),
        (lambda i, x, y: i.influences(x, y, y=y), "y is given without x"),
        (lambda i, x, y: i.influences(x, y, x), "x is given without y"),
        (lambda i, x, y: i.explore_regularization(x, y, 0.1), "values"),
        (lambda i, x, y: i.explore_regularization(x, y, [{"full": 0.1}]), "values"),
        (lambda i, x, y: i.influences(x.float(), y), "float"),
        (lambda i, x, y: i.influences(x[:2], y), "2"),
        (lambda i, x, y: i.influences(x / 0, y), "NaN"),
        (lambda i, x, y: i.influences(x[:0], y[:0]), "no point"),
        (lambda i, x, y: i.with_regularization(-1.0), "regularization"),
        (lambda i, x, y: i.with_regularization(float("nan")), "regularization"),
        (lambda i, x, y: i.with_regularization("much"), "regularization"),
        (lambda i, x, y: i.with_regularization([0.1, 0.2]), "2 entries for 1 blocks"),
        (lambda i, x, y: i.with_regularization({"other": 0.1}), "regularization names"),
    ],
)
def test_bad_input_is_an_error_that_names_it(call, argument: str, problem: Problem) -> None:
    influence = fitted(problem)
    with pytest.raises(HessopsError, match=argument):
        call(influence, problem.x_test, problem.y_test)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda m, f: DirectInfluence(m, f, -0.1), "regularization"),
        (lambda m, f: DirectInfluence(m, f, 0.1, second_order_mode="fisher"), "second_order_mode"),
        (lambda m, f: DirectInfluence(m, f, 0.1, "by_layer"), "block_structure"),
        (lambda m, f: Damping(relative=-1.0), "relative"),
        (lambda m, f: DirectInfluence(m, f, b"a"), "regularization"),
        (lambda m, f: DirectInfluence(m, f, 0.1, generator=5), "generator"),
        (lambda m, f: DirectInfluence(m, f, 0.1, unpack=5), "unpack"),
        (lambda m, f: InverseHarmonicMeanInfluence(m, f, 0.0), "regularization"),
        (lambda m, f: InverseHarmonicMeanInfluence(m, f, Damping(0.0)), "regularization"),
        (
            lambda m, f: InverseHarmonicMeanInfluence(m, f, 0.1, second_order_mode="hessian"),
            "second_order_mode",
        ),
        (lambda m, f: ArnoldiInfluence(m, f, rank=0), "rank"),
        (lambda m, f: NystroemSketchInfluence(m, f, rank=1.5), "rank"),
        (lambda m, f: Influence(m, f, inverse=3), "inverse"),
        (lambda m, f: Influence(m, f, curvature="hessian"), "curvature"),
        (lambda m, f: LissaInfluence(m, f, 0.1, "layer_wise", h0=torch.zeros(27)), "h0"),
        (
            lambda m, f: CgInfluence(
                m, f, 0.1, "layer_wise", preconditioner=MatrixOperator(torch.eye(3))
            ),
            "preconditioner",
        ),
        (lambda m, f: GradientProvider(m), "objective"),
        (lambda m, f: BilinearForm(torch.eye(2)), "operator"),
    ],
)
def test_bad_settings_are_refused_at_once(make, argument: str, problem: Problem) -> None:
    with pytest.raises(HessopsError, match=argument):
        make(problem.model, problem.loss)


def test_a_solver_is_refused_by_fit(problem: Problem) -> None:
    singular = DirectInfluence(problem.model, problem.loss, 0.0, second_order_mode="gauss_newton")
    with pytest.raises(SingularOperatorError, match="regularization"):
        singular.fit(problem.batches())
    woodbury = ArnoldiInfluence(problem.model, problem.loss, 0.0, use_woodbury=True)
    with pytest.raises(ArgumentError, match="regularization must be positive"):
        woodbury.fit(problem.batches())
    not_an_operator = Influence(problem.model, problem.loss, inverse=lambda operator: 3)
    with pytest.raises(ArgumentTypeError, match="operator"):
        not_an_operator.fit(problem.batches())


def test_using_a_model_before_fit_says_so(problem: Problem) -> None:
    influence = DirectInfluence(problem.model, problem.loss, 0.1)
    x, y = problem.x_test, problem.y_test
    assert not influence.is_fitted
    for call in (
        lambda: influence.influence_factors(x, y),
        lambda: influence.influences(x, y),
        lambda: influence.self_influence(x, y),
        lambda: influence.influences_by_block(x, y),
        lambda: influence.explore_regularization(x, y, [0.1]),
        lambda: influence.save("never"),
        lambda: influence.inverse,
    ):
        with pytest.raises(NotFittedError, match=r"fit\(train_loader\)"):
            call()


def test_a_fit_that_fails_leaves_the_one_before(problem: Problem) -> None:
    influence = fitted(problem)
    x, y = problem.x_test, problem.y_test
    before = influence.influences(x, y)
    with pytest.raises(DataError):
        influence.fit([])
    assert torch.equal(influence.influences(x, y), before)


def test_training_data_are_checked_by_fit(problem: Problem) -> None:
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0], dtype=torch.float64))
    with pytest.raises(LossError):
        CgInfluence(problem.model, weighted, 0.1).fit(problem.batches())
    dropping = nn.Sequential(problem.model, nn.Dropout(0.5))
    with pytest.raises(TrainingModeError):
        CgInfluence(dropping, problem.loss, 0.1).fit(problem.batches())


def test_the_users_model_is_left_alone_and_later_steps_change_nothing(problem: Problem) -> None:
    influence = fitted(problem)
    x, y = problem.x_test, problem.y_test
    state = torch.random.get_rng_state()
    before = influence.influences(x, y, problem.x, problem.y, mode="perturbation")
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(p.grad is None for p in problem.model.parameters())
    assert problem.x.grad is None
    with torch.no_grad():
        problem.model.gain.add_(1.0)
    again = influence.influences(x, y, problem.x, problem.y, mode="perturbation")
    assert torch.equal(before, again)
    influence.fit(problem.batches())
    now = influence.influences(x, y, problem.x, problem.y, mode="perturbation")
    assert not torch.equal(before, now)


def test_the_representation_says_what_it_is(problem: Problem) -> None:
    influence = CgInfluence(problem.model, problem.loss, 0.1, "layer_wise", GGN, rtol=1e-3)
    assert repr(influence).splitlines() == [
        "CgInfluence(RootAndNested, CrossEntropyLoss, regularization=0.1, "
        "block_structure='layer_wise',",
        "   second_order_mode='generalized_gauss_newton', rtol=0.001), not fitted",
    ]
    text = repr(influence.fit(problem.batches()))
    assert "fitted on 7 points" in text
    assert "block 'inner.0': CgOperator(regularization=0.1" in text


# --- damping -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["direct hessian", "cg", "arnoldi with woodbury", "lissa"])
@pytest.mark.parametrize("blocks", ["full", "layers"])
def test_a_relative_damping_is_of_the_mean_eigenvalue_of_its_block(
    case: str, blocks: str, problem: Problem
) -> None:
    kind = CASES[case]
    settings = {"block_structure": BLOCKS[blocks], "second_order_mode": GGN}
    model = kind.make(problem.model, problem.loss, **{**settings, "regularization": Damping(0.1)})
    model.fit(problem.batches())
    curvature = problem.reference.generalized_gauss_newton()
    for name, where in problem.positions(BLOCKS[blocks]).items():
        expected = 0.1 * curvature[where, where].mean()
        assert abs(model.fitted_regularization[name] - expected) < 1e-12 * expected
    # The same through `with_regularization`, from a fit that did not need it.
    other = kind.make(problem.model, problem.loss, **settings).fit(problem.batches())
    again = other.with_regularization(Damping(0.1)).fitted_regularization
    assert again == pytest.approx(model.fitted_regularization, rel=1e-12)


def test_a_relative_damping_of_the_harmonic_mean_is_of_the_squared_gradients(
    problem: Problem,
) -> None:
    influence = InverseHarmonicMeanInfluence(
        problem.model, problem.loss, Damping(0.1), "layer_wise"
    )
    influence.fit(problem.batches())
    gradients = problem.gradients(problem.x, problem.y)
    for name, where in problem.positions("layer_wise").items():
        expected = 0.1 * gradients[:, where].square().sum(dim=1).mean() / len(where)
        assert abs(influence.fitted_regularization[name] - expected) < 1e-12 * expected


def test_the_trace_of_a_large_block_is_estimated_by_probes() -> None:
    model, x, y = (
        nn.Linear(60, 20).double(),
        torch.randn(9, 60).double(),
        torch.zeros(9, 20).double(),
    )
    influence = CgInfluence(model, nn.MSELoss(), Damping(0.5)).fit([(x, y)])
    exact = 2 / 20 * (x.square().sum(dim=1).mean() + 1) * 20 / 1220
    assert abs(influence.fitted_regularization["full"] - 0.5 * exact) < 0.1 * exact
    again = CgInfluence(model, nn.MSELoss(), Damping(0.5)).fit([(x, y)])
    assert again.fitted_regularization == influence.fitted_regularization


def test_a_relative_damping_needs_a_positive_scale(problem: Problem) -> None:
    influence = Influence(
        problem.model,
        problem.loss,
        Damping(0.1),
        inverse=MinresOperator,
        curvature=lambda m, f, d, names: -HessianOperator(m, f, d, names),
    )
    with pytest.raises(ArgumentError, match="mean eigenvalue of block 'full'"):
        influence.fit(problem.batches())


def test_one_regularization_for_each_block(problem: Problem) -> None:
    values = {"": 0.3, "inner.0": 0.1, "last": Damping(0.2)}
    by_name = fitted(problem, block_structure="layer_wise", regularization=values)
    assert by_name.fitted_regularization["inner.0"] == 0.1
    in_order = fitted(
        problem, block_structure="layer_wise", regularization=[0.3, 0.1, Damping(0.2)]
    )
    assert by_name.fitted_regularization == in_order.fitted_regularization
    x, y = problem.x_test, problem.y_test
    assert torch.equal(by_name.influences(x, y), in_order.influences(x, y))


@pytest.mark.parametrize("case", CASES)
def test_another_regularization_is_that_of_a_new_fit(case: str, problem: Problem) -> None:
    model = CASES[case].build(problem, "layer_wise").fit(problem.batches())
    changed = model.with_regularization(0.02)
    anew = CASES[case].build(problem, "layer_wise").with_regularization(0.02)
    anew.fit(problem.batches())
    x, y = problem.x_test, problem.y_test
    assert relative_error(changed.influences(x, y), anew.influences(x, y)) < 1e-8
    assert set(changed.fitted_regularization.values()) == {0.02}
    assert set(model.fitted_regularization.values()) == {1e-3}


@pytest.mark.parametrize("case", ["direct hessian", "arnoldi", "nystroem"])
def test_what_is_kept_is_damped_anew_without_the_data(case: str, problem: Problem) -> None:
    class OnceOnly(list):
        closed = False

        def __iter__(self):
            assert not self.closed
            return super().__iter__()

    data = OnceOnly(problem.batches())
    model = CASES[case].build(problem, "full").fit(data)
    data.closed = True
    x, y = problem.x_test, problem.y_test
    swept = model.explore_regularization(x, y, [0.01, Damping(0.1), 1])
    assert list(swept) == [0.01, Damping(0.1), 1]
    for value, by_block in swept.items():
        expected = model.with_regularization(value).influences(x, y)
        assert relative_error(by_block["full"], expected) < 1e-9


# --- gradients and bilinear forms ----------------------------------------------------------


def test_gradients_are_those_of_plain_loops(problem: Problem) -> None:
    provider = GradientProvider(Objective(problem.model, problem.loss))
    x, y = problem.x, problem.y
    gradients, mixed = problem.gradients(x, y), problem.mixed(x, y)
    assert relative_error(provider.flat_grads(x, y), gradients) < 1e-12
    assert relative_error(provider.space.flatten(provider.grads(x, y)), gradients) < 1e-12
    assert provider.mixed_grads(x, y)["inner.0.weight"].shape == (7, 3, 4, 3)
    assert relative_error(provider.flat_mixed_grads(x, y), mixed) < 1e-12
    g = torch.randn(4, 27, dtype=torch.float64)
    assert relative_error(provider.jacobian_prod(x, y, g), g @ gradients.T) < 1e-12
    expected = torch.einsum("mp,nip->mni", g, mixed)
    assert relative_error(provider.mixed_jacobian_prod(x, y, g), expected) < 1e-12
    assert provider.jacobian_prod(x, y, g[:0]).shape == (0, 7)
    assert provider.mixed_jacobian_prod(x, y, g[:0]).shape == (0, 7, 3)


def test_gradients_of_inputs_that_are_dictionaries() -> None:
    class OfDictionary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1).double()

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.layer(batch["a"]) * batch["b"]

    model = OfDictionary()
    x = {"a": torch.randn(5, 3).double(), "b": torch.randn(5, 1).double()}
    y = torch.randn(5, 1).double()
    influence = DirectInfluence(model, nn.MSELoss(), 0.1).fit([(x, y)])
    up = influence.influences(x, y)
    assert up.shape == (5, 5)
    with pytest.raises(ArgumentTypeError, match="x must be a floating-point tensor"):
        influence.influences(x, y, mode="perturbation")


def test_integers_cannot_be_perturbed() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))
    x, y = torch.randint(5, (4, 2)), torch.randint(2, (4,))
    influence = DirectInfluence(model, nn.CrossEntropyLoss(), 0.1, second_order_mode=GGN)
    influence.fit([(x, y)])
    assert influence.influences(x, y).shape == (4, 4)
    with pytest.raises(DtypeError, match="int64"):
        influence.influences(x, y, mode="perturbation")


def test_layer_norm_and_attention_have_right_mixed_derivatives() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 2)).double().eval()
    x, y = torch.randn(3, 3, 4).double(), torch.tensor([0, 1, 1])
    loss = nn.CrossEntropyLoss()
    provider = GradientProvider(Objective(model, loss))
    g = torch.randn(2, provider.space.size).double()
    product = provider.mixed_jacobian_prod(x, y, g)
    full = torch.einsum("mp,nabp->mnab", g, provider.flat_mixed_grads(x, y))
    assert relative_error(product, full) < 1e-10
    step = 1e-6
    moved = x.clone()
    moved[1, 2, 3] += step
    back = x.clone()
    back[1, 2, 3] -= step
    difference = provider.jacobian_prod(moved, y, g) - provider.jacobian_prod(back, y, g)
    assert relative_error(product[:, 1, 2, 3], difference[:, 1] / (2 * step)) < 1e-6


@pytest.mark.parametrize("sizes", [(2, 5), (5, 2), (3, 3)])
def test_bilinear_forms_are_those_of_the_matrix(sizes: tuple[int, int], problem: Problem) -> None:
    provider = GradientProvider(Objective(problem.model, problem.loss))
    dense = problem.reference.generalized_gauss_newton()
    values, vectors = torch.linalg.eigh(dense)
    from hessops import LowRankOperator, LowRankProductOperator, LowRankProductRepresentation

    pairs = LowRankProductRepresentation(values[-4:], vectors[:, -4:].contiguous())
    low = (vectors[:, -4:] * values[-4:]) @ vectors[:, -4:].T
    inverted = (vectors[:, -4:] / (values[-4:] + 0.1)) @ vectors[:, -4:].T
    left, right = (provider.batch(problem.x[:n], problem.y[:n]) for n in sizes)
    u, v = (problem.gradients(problem.x[:n], problem.y[:n]) for n in sizes)
    mixed = problem.mixed(problem.x[: sizes[1]], problem.y[: sizes[1]])
    for operator, matrix, kind in (
        (MatrixOperator(dense), dense, BilinearForm),
        (LowRankProductOperator(pairs), low, LowRankBilinearForm),
        (LowRankOperator(pairs, 0.1, exact=False), inverted, LowRankBilinearForm),
    ):
        form = BilinearForm.of(operator)
        assert type(form) is kind
        expected = u @ matrix @ v.T
        assert relative_error(form.inner_prod(u, v), expected) < 1e-10
        assert relative_error(form.grads_inner_prod(left, right, provider), expected) < 1e-10
        own = form.grads_inner_prod(left, None, provider)
        assert relative_error(own, u @ matrix @ u.T) < 1e-10
        by_input = torch.einsum("mp,nip->mni", u @ matrix, mixed)
        product = form.mixed_grads_inner_prod(left, right, provider)
        assert relative_error(product, by_input) < 1e-10
        assert form.inner_prod(u[0], v).shape == (sizes[1],)
        assert form.inner_prod(u, v[0]).shape == (sizes[0],)
        assert form.inner_prod(u[0], v[0]).shape == ()
    with pytest.raises(ShapeError, match="provider"):
        BilinearForm(MatrixOperator(torch.eye(3))).grads_inner_prod(left, right, provider)


def test_the_low_rank_form_makes_no_gradient_of_a_point(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    influence = ArnoldiInfluence(problem.model, problem.loss, 0.1, second_order_mode=GGN, rank=3)
    influence.fit(problem.batches())
    expected = influence.influences(problem.x_test, problem.y_test, problem.x, problem.y)

    def refused(*arguments: object) -> Tensor:
        raise AssertionError("a per-sample gradient was made")

    monkeypatch.setattr(GradientProvider, "rows", refused)
    again = influence.influences(problem.x_test, problem.y_test, problem.x, problem.y)
    assert torch.equal(again, expected)


# --- models of one's own -------------------------------------------------------------------


def test_a_model_of_ten_lines_has_everything(problem: Problem, tmp_path: Path) -> None:
    class MinresInfluence(InfluenceFunctionModel):
        def _invert(self, operator, regularization):
            return MinresOperator(operator, regularization, rtol=1e-12)

    influence = MinresInfluence(problem.model, problem.loss, hessian_regularization=1e-3)
    influence.fit(problem.batches())
    x, y = problem.x_test, problem.y_test
    expected = fitted(problem).influences(x, y)
    assert relative_error(influence.influences(x, y), expected) < 1e-8
    influence.save(tmp_path / "own")
    again = MinresInfluence(problem.model, problem.loss, 1e-3)
    again.load(tmp_path / "own", problem.batches())
    assert torch.equal(again.influences(x, y), influence.influences(x, y))


def test_what_decides_a_result_is_in_the_configuration(problem: Problem) -> None:
    """Equal for what computes the same; another one for every part that may not be equal."""

    def own(rank: int, slope: float, power: float, tolerance: float) -> dict[str, object]:
        class Own(InfluenceFunctionModel):
            if rank == 3:

                def _invert(self, operator, regularization):
                    return MinresOperator(operator, regularization, rtol=1e-3)
            else:

                def _invert(self, operator, regularization):
                    return MinresOperator(operator, regularization, rtol=1e-4)

        def loss(output: Tensor, target: Tensor) -> Tensor:
            return ((output - target).abs() ** power).mean()

        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer, self.slope = nn.Linear(2, 1), slope

            def forward(self, x: Tensor) -> Tensor:
                return nn.functional.leaky_relu(self.layer(x), self.slope)

        recipe = partial(MinresOperator, rtol=tolerance)
        model = Influence(Scaled(), loss, 0.1, inverse=recipe)
        return {**Own(Scaled(), loss, 0.1).configuration(), "recipe": model.configuration()}

    same = own(3, 0.1, 2.0, 1e-3)
    assert same == own(3, 0.1, 2.0, 1e-3)
    for other in ((4, 0.1, 2.0, 1e-3), (3, 0.2, 2.0, 1e-3), (3, 0.1, 2.5, 1e-3), (3, 0.1, 2.0, 1)):
        assert same != own(*other)


def test_any_curvature_and_any_recipe(problem: Problem) -> None:
    def mixture(model, loss, data, names):
        from hessops import GeneralizedGaussNewtonOperator

        return 0.9 * HessianOperator(model, loss, data, names) + 0.1 * (
            GeneralizedGaussNewtonOperator(model, loss, data, names)
        )

    dense = 0.9 * problem.reference.hessian() + 0.1 * problem.reference.generalized_gauss_newton()
    for blocks in BLOCKS.values():
        influence = Influence(
            problem.model,
            problem.loss,
            1e-2,
            blocks,
            inverse=partial(MinresOperator, rtol=1e-12),
            curvature=mixture,
        ).fit(problem.batches())
        factors = influence.influence_factors(problem.x_test, problem.y_test)
        rows = problem.gradients(problem.x_test, problem.y_test)
        for where in problem.positions(blocks).values():
            matrix = dense[where[:, None], where]
            matrix = matrix + 1e-2 * torch.eye(len(where), dtype=torch.float64)
            expected = torch.linalg.solve(matrix, rows[:, where].T).T
            assert relative_error(factors[:, where], expected) < 1e-7


def test_a_composite_curvature_is_saved_and_loaded(problem: Problem, tmp_path: Path) -> None:
    def mixture(model, loss, data, names):
        return 0.5 * GeneralizedGaussNewtonOperator(model, loss, data, names) + 0.5 * (
            GeneralizedGaussNewtonOperator(model, loss, data, names)
        )

    def made() -> Influence:
        return Influence(problem.model, problem.loss, 1e-2, curvature=mixture)

    model = made().fit(problem.batches())
    model.save(tmp_path / "fit")
    again = made().load(tmp_path / "fit", problem.batches())
    x, y = problem.x_test, problem.y_test
    assert torch.equal(again.influences(x, y), model.influences(x, y))
    with pytest.raises(StoreError, match="other training data"):
        made().load(tmp_path / "fit", problem.batches()[:1])


@pytest.mark.parametrize("kind", [ArnoldiInfluence, NystroemSketchInfluence])
@pytest.mark.parametrize("rank", [2, 4, 5])
def test_without_regularization_a_rank_beyond_the_matrix_gives_its_pseudo_inverse(
    kind: type[InfluenceFunctionModel], rank: int
) -> None:
    basis = torch.randn(2, 5).double()
    x, y = torch.randn(8, 2).double() @ basis, torch.randn(8, 1).double()  # inputs of rank two
    model = nn.Linear(5, 1, bias=False).double()
    influence = kind(model, nn.MSELoss(), rank=rank).fit([(x, y)])
    hessian = 2 / 8 * x.T @ x
    expected = torch.linalg.pinv(hessian, hermitian=True, rtol=1e-10)
    rows = influence.gradient_provider.flat_grads(x, y)
    assert relative_error(influence.influence_factors(x, y), rows @ expected) < 1e-6


def test_conjugate_gradients_are_the_default_recipe(problem: Problem) -> None:
    influence = Influence(problem.model, problem.loss, 1e-3, second_order_mode=GGN)
    assert isinstance(influence.fit(problem.batches()).inverses["full"], CgOperator)


# --- files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("blocks", ["full", "custom"])
def test_what_was_saved_is_loaded_to_the_same_bits(
    case: str, blocks: str, problem: Problem, tmp_path: Path
) -> None:
    model = CASES[case].build(problem, BLOCKS[blocks]).fit(problem.batches())
    model.save(tmp_path / "fit")
    again = CASES[case].build(problem, BLOCKS[blocks])
    if again.needs_data:
        with pytest.raises(ArgumentError, match="dataloader is needed"):
            again.load(tmp_path / "fit")
    again.load(tmp_path / "fit", problem.batches() if again.needs_data else None)
    x, y = problem.x_test, problem.y_test
    assert torch.equal(again.influences(x, y), model.influences(x, y))
    assert again.fitted_regularization == model.fitted_regularization
    assert [f.name for f in tmp_path.iterdir()] == ["fit"]


def test_a_file_for_something_else_is_refused(problem: Problem, tmp_path: Path) -> None:
    path = tmp_path / "fit"
    fitted(problem).save(path)
    model, loss = problem.model, problem.loss

    def refused(influence: InfluenceFunctionModel, message: str, data: object = None) -> None:
        with pytest.raises(StoreError, match=message):
            influence.load(path, data)
        assert not influence.is_fitted

    refused(DirectInfluence(model, loss, 2e-3), "other settings: regularization")
    refused(DirectInfluence(model, loss, 1e-3, "layer_wise"), "other settings: blocks")
    refused(DirectInfluence(model, loss, 1e-3, second_order_mode=GGN), "settings")
    refused(CgInfluence(model, loss, 1e-3), "class")
    CgInfluence(model, loss, 1e-3).fit(problem.batches()).save(path)
    other = [(problem.x[:3], problem.y[:3])]
    refused(CgInfluence(model, loss, 1e-3), "other training data", other)
    fitted(problem).save(path)
    with torch.no_grad():
        model.gain.add_(1e-9)
    refused(DirectInfluence(model, loss, 1e-3), "other parameters")
    path.write_bytes(path.read_bytes()[:200])
    refused(DirectInfluence(model, loss, 1e-3), "not a file")
    path.write_bytes(b"")
    refused(DirectInfluence(model, loss, 1e-3), "not a file")
    torch.save({"weights": torch.zeros(2)}, path)
    refused(DirectInfluence(model, loss, 1e-3), "not a file")


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("payload-was-run"),))


def test_code_in_a_file_is_not_run(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "hessops influence model 1", "x": Payload()}, "by_torch")
    Path("by_pickle").write_bytes(pickle.dumps(Payload()))
    for name in ("by_torch", "by_pickle"):
        with pytest.raises(StoreError):
            DirectInfluence(problem.model, problem.loss, 1e-3).load(name)
    assert not Path("payload-was-run").exists()


def test_saving_that_fails_leaves_the_old_file(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "fit"
    influence = fitted(problem)
    influence.save(path)
    before = path.read_bytes()

    def full_disk(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        influence.save(path)
    assert path.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["fit"]


def test_a_model_on_another_device_has_no_part_left_behind(problem: Problem) -> None:
    influence = fitted(problem, block_structure="layer_wise")
    moved = influence.to("meta")
    assert moved.inverse.device.type == "meta"
    assert moved.gradient_provider.space.device.type == "meta"
    assert influence.inverse.device.type == "cpu"


def test_nan_gradients_are_an_error() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.weight).abs().sqrt()

    x, y = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
    influence = DirectInfluence(Root(), nn.MSELoss(), 1.0, second_order_mode="gauss_newton")
    influence.fit([(x, y)])
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        influence.influences(torch.zeros(1, 1), torch.ones(1, 1))


# --- what is bound to the model, its loss and its data ----------------------------------------


def test_a_curvature_of_another_loss_leaves_the_gradients_those_of_the_loss(
    problem: Problem,
) -> None:
    """Spelled as one operator or as a sum, the matrix is replaced and nothing else."""
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.2)

    def one(model, loss, data, names):
        return GeneralizedGaussNewtonOperator(model, smoothed, data, names)

    def as_a_sum(model, loss, data, names):
        return 0.5 * one(model, loss, data, names) + 0.5 * one(model, loss, data, names)

    x, y = problem.x_test, problem.y_test
    found = [
        Influence(problem.model, problem.loss, 1e-2, curvature=recipe, inverse=MinresOperator)
        .fit(problem.batches())
        .influences(x, y)
        for recipe in (one, as_a_sum)
    ]
    assert relative_error(found[0], found[1]) < 1e-6
    dense = one(problem.model, None, problem.batches(), problem.names).to_dense()
    rows = problem.gradients(x, y)
    identity = torch.eye(len(dense), dtype=torch.float64)
    expected = rows @ torch.linalg.solve(dense + 1e-2 * identity, rows.T)
    assert relative_error(found[0], expected) < 1e-6


def test_a_curvature_on_other_parameters_is_refused(problem: Problem) -> None:
    def on_others(model, loss, data, names):
        return HessianOperator(model, loss, data, ["last.bias"])

    structure = {"a": ["gain"], "b": ["inner.0.bias"]}
    with pytest.warns(UncoveredParametersWarning):
        influence = Influence(problem.model, problem.loss, 1.0, structure, curvature=on_others)
    with pytest.raises(StructureError, match="curvature returned an operator on"):
        influence.fit(problem.batches())


def test_a_curvature_that_is_not_symmetric_is_refused() -> None:
    x, y = torch.randn(5, 2), torch.randn(5, 1)
    skewed = MatrixOperator(torch.tensor([[2.0, 1.0], [0.0, 2.0]]))
    influence = Influence(
        nn.Linear(2, 1, bias=False),
        nn.MSELoss(),
        inverse=DirectSolveOperator,
        curvature=lambda m, f, d, names: skewed,
    )
    with pytest.raises(StructureError, match="not symmetric"):
        influence.fit([(x, y)])


def test_a_loss_that_is_an_object_is_that_of_the_fit(problem: Problem) -> None:
    class Weighted:
        weight = 1.0

        def __call__(self, output: Tensor, target: Tensor) -> Tensor:
            return self.weight * nn.functional.cross_entropy(output, target)

    loss = Weighted()
    influence = DirectInfluence(problem.model, loss, 1e-3).fit(problem.batches())
    before = influence.influences(problem.x_test, problem.y_test)
    loss.weight = 3.0
    assert torch.equal(influence.influences(problem.x_test, problem.y_test), before)


def test_the_start_of_lissa_is_copied(problem: Problem) -> None:
    h0 = torch.zeros(27, dtype=torch.float64)
    influence = LissaInfluence(
        problem.model,
        problem.loss,
        0.1,
        second_order_mode=GGN,
        h0=h0,
        maxiter=2,
        warn_on_max_iteration=False,
    )
    h0 += 1.0
    influence.fit(problem.batches())
    lissa = influence.inverses["full"]
    assert isinstance(lissa, LissaOperator)
    assert not lissa.h0.any()


def test_a_model_with_other_parameters_than_before_needs_another_influence_model() -> None:
    model, x, y = nn.Sequential(nn.Linear(3, 3)), torch.randn(5, 3), torch.randn(5, 3)
    influence = DirectInfluence(model, nn.MSELoss(), 0.1)
    model.double()  # a dtype or a device may change
    influence.fit([(x.double(), y.double())])
    assert influence.influence_factors(x.double(), y.double()).dtype == torch.float64
    model.append(nn.Linear(3, 3).double())
    with pytest.raises(ModelError, match=r"changed .*'1.bias', '1.weight'"):
        influence.fit([(x.double(), y.double())])


def test_a_fitted_model_is_pickled_and_copied(problem: Problem) -> None:
    influence = fitted(problem)
    x, y = problem.x_test, problem.y_test
    expected = influence.influences(x, y)
    for again in (pickle.loads(pickle.dumps(influence)), copy.deepcopy(influence)):
        assert torch.equal(again.influences(x, y), expected)


def test_results_have_the_dtype_of_the_parameters() -> None:
    class WideOutput(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).double()

    x, y = torch.randn(5, 3), torch.randn(5, 1).double()
    influence = DirectInfluence(WideOutput(), nn.MSELoss(), 0.1).fit([(x, y)])
    assert influence.influences(x, y).dtype == torch.float32
    assert influence.self_influence(x, y).dtype == torch.float32


def test_operators_refuse_torch_func_transforms() -> None:
    operator = MatrixOperator(torch.eye(2))
    with pytest.raises(ArgumentTypeError, match=r"torch\.func"):
        torch.func.grad(lambda v: operator.apply(v).sum())(torch.ones(2))
    with pytest.raises(ArgumentTypeError, match="dense"):
        operator.apply(torch.ones(2, 2).to_sparse())


@pytest.mark.parametrize("model", [ArnoldiInfluence, NystroemSketchInfluence, CgInfluence])
def test_a_layer_without_any_influence_is_no_trouble(
    model: type[InfluenceFunctionModel],
) -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 1), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + 0 * self.unused.weight.sum()

    x, y = torch.randn(6, 3).double(), torch.randn(6, 1).double()
    influence = model(Unused().double(), nn.MSELoss(), 0.1, "layer_wise").fit([(x, y)])
    assert not influence.influences_by_block(x, y)["unused"].any()
    assert influence.influences_by_block(x, y)["used"].any()


# --- descriptions ------------------------------------------------------------------------------

SCALE = 2.0


def test_descriptions_tell_apart_what_may_compute_otherwise() -> None:
    import math
    import types
    from dataclasses import dataclass, replace
    from decimal import Decimal

    import numpy as np

    from hessops.influence.description import describe, digest_of_batch

    @dataclass(frozen=True, slots=True)
    class Slotted:
        power: float

        def __call__(self, output, target):
            return output**self.power

    class OfClass:
        factor = 1.0

    def keyword(output, *, factor=1.0):
        return factor * output

    def reads_global(output):
        return SCALE * output

    def activated(function, **attributes):
        layer = nn.Linear(2, 1)
        nn.init.ones_(layer.weight), nn.init.zeros_(layer.bias)
        layer.activation = function
        for name, value in attributes.items():
            setattr(layer, name, value)
        return layer

    hooked = activated(torch.tanh)
    hooked.register_forward_hook(lambda module, args, output: 2 * output)
    pairs = [
        (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)),
        (nn.HuberLoss(), nn.HuberLoss(delta=2.0)),
        (Slotted(2.0), Slotted(3.0)),
        (partial(keyword, factor=np.float32(1)), partial(keyword, factor=np.float32(2))),
        (activated(torch.tanh), activated(torch.sin)),
        (activated(torch.tanh), activated(torch.tanh, _slope=0.1)),
        (activated(torch.tanh), activated(torch.tanh, scale=torch.ones(2))),
        (activated(torch.tanh), activated(torch.tanh).eval()),
        (activated(torch.tanh), hooked),
        (Decimal(1), Decimal(2)),
        (b"a", b"b"),
        (list[int], list[float]),
        (torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)),
    ]
    for one, other in pairs:
        assert describe(one) != describe(other), (one, other)
        assert describe(one) == describe(copy.deepcopy(one)), one
    with_default = describe(keyword)
    keyword.__kwdefaults__["factor"] = 2.0
    assert describe(keyword) != with_default
    before = describe(OfClass())
    OfClass.factor = 2.0
    assert describe(OfClass()) != before
    before = describe(reads_global)
    globals()["SCALE"] = 3.0
    try:
        assert describe(reads_global) != before
    finally:
        globals()["SCALE"] = 2.0

    def closes_over_a_module(output):
        return math.sqrt(2) * later(output) if False else math.pi * output

    assert describe(closes_over_a_module) == describe(closes_over_a_module)

    def later(output):
        return output

    assert isinstance(describe(types), str)
    one = Batch.from_raw(({"x": torch.ones(2), "scale": 1.0}, torch.ones(2)))
    assert digest_of_batch(one) != digest_of_batch(replace(one, x={**one.x, "scale": 2.0}))


def test_attributes_that_are_changed_later_are_in_the_configuration(problem: Problem) -> None:
    influence = ArnoldiInfluence(problem.model, problem.loss, 0.1)
    before = influence.configuration()
    influence.rank = 2
    assert influence.configuration() != before


def test_every_spelling_of_a_constructor_is_one_configuration(problem: Problem) -> None:
    class Passing(DirectInfluence):
        def __init__(self, model, loss, **more):
            super().__init__(model, loss, **more)

    one = Passing(problem.model, problem.loss, hessian_regularization=0.1)
    other = Passing(problem.model, problem.loss, regularization=0.1)
    assert one.configuration() == other.configuration()


def test_numbers_in_a_batch_are_part_of_the_data() -> None:
    class Changing(list):
        passes = 0.0

        def __iter__(self):
            self.passes += 1.0
            for x, y in super().__iter__():
                yield {"x": x, "scale": self.passes}, y

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, batch):
            return batch["scale"] * self.layer(batch["x"])

    data = Changing([(torch.randn(4, 2), torch.randn(4, 1))])
    with pytest.raises(DataChangedError):
        DirectInfluence(Scaled(), nn.MSELoss(), 0.1).fit(data)


def test_a_damaged_file_is_refused(problem: Problem, tmp_path: Path) -> None:
    path = tmp_path / "fit"
    fitted(problem, regularization=Damping(0.1)).save(path)
    whole = torch.load(path, weights_only=True)
    again = DirectInfluence(problem.model, problem.loss, Damping(0.1))

    def refused(message: str, **changes: object) -> None:
        torch.save({**whole, **changes}, path)
        with pytest.raises(StoreError, match=message):
            again.load(path)
        assert not again.is_fitted

    matrix = whole["tensors"]["full"]["matrix"].clone()
    matrix[0, 0] += 1e-12
    refused("is damaged", tensors={"full": {**whole["tensors"]["full"], "matrix": matrix}})
    refused("is damaged", mean_eigenvalues={"full": 2 * whole["mean_eigenvalues"]["full"]})
    refused("not a file", format="another")
    for key in ("tensors", "checksum", "configuration"):
        torch.save({name: value for name, value in whole.items() if name != key}, path)
        with pytest.raises(StoreError, match=f"lacks .*{key}"):
            again.load(path)
    torch.save(whole, path)
    bytes_of = path.read_bytes()
    for length in range(0, len(bytes_of), max(1, len(bytes_of) // 40)):
        path.write_bytes(bytes_of[:length])
        with pytest.raises(StoreError):
            again.load(path)
    path.write_bytes(bytes_of)
    with pytest.raises(StoreError, match="other training data"):
        again.load(path, [(problem.x[:2], problem.y[:2])])
    assert again.load(path, problem.batches()).is_fitted


def test_a_file_is_replaced_and_never_written_to(problem: Problem, tmp_path: Path) -> None:
    path = tmp_path / "fit"
    path.write_bytes(b"what was there")
    with path.open("rb") as reader:
        fitted(problem).save(path)
        assert reader.read() == b"what was there"
    assert path.read_bytes() != b"what was there"


def test_gradients_of_points_that_are_not_parts_of_the_batch_are_refused() -> None:
    class OtherAlone(nn.Module):
        """A function of one point at a time in every batch but one of a single point."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight if len(x) > 1 else 2 * x @ self.weight

    x, y = torch.randn(8, 2), torch.randn(8, 1)
    influence = DirectInfluence(OtherAlone(), nn.MSELoss(), 0.1).fit([(x, y)])
    with pytest.raises(ModelError, match="do not add up"):
        influence.influence_factors(x, y)
