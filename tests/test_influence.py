from __future__ import annotations

import pytest
import torch
from influence_cases import BLOCKS, CASES, Problem
from reference import relative_error
from torch import Tensor

from hessops.influence import InfluenceMode

SIZES = {"fewer tests": (7, 3), "as many": (4, 4), "more tests": (3, 5)}
BATCHES = {7: (3, 3, 1), 4: (1, 1, 1, 1), 3: (3,)}


def batch_sizes(case: str, num_train: int) -> tuple[int, ...]:
    # LiSSA steps over batches; in one batch its recursion is that of the whole matrix.
    return (num_train,) if case == "lissa" else BATCHES[num_train]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("case", CASES)
def test_influences_are_those_of_the_dense_matrix(case: str, blocks: str, sizes: str) -> None:
    num_train, num_test = SIZES[sizes]
    problem = Problem(num_train, num_test)
    influence = CASES[case].build(problem, BLOCKS[blocks])
    influence.fit(problem.batches(batch_sizes(case, num_train)))
    matrix = CASES[case].matrix(problem, BLOCKS[blocks])
    tolerance = CASES[case].tolerance
    test, train = (problem.x_test, problem.y_test), (problem.x, problem.y)
    gradients = problem.gradients(*train)
    factors = problem.gradients(*test) @ matrix

    assert relative_error(influence.influence_factors(*test), factors) < tolerance
    up = influence.influences(*test, *train)
    assert up.shape == (num_test, num_train)
    assert relative_error(up, factors @ gradients.T) < tolerance
    mixed = torch.einsum("mp,nip->mni", factors, problem.mixed(*train))
    perturbation = influence.influences(*test, *train, mode=InfluenceMode.PERTURBATION)
    assert perturbation.shape == (num_test, num_train, 3)
    assert relative_error(perturbation, mixed) < tolerance
    # A multiple of the identity is no inverse here.
    scale = (factors * problem.gradients(*test)).sum() / problem.gradients(*test).square().sum()
    assert (
        relative_error(scale * problem.gradients(*test) @ gradients.T, factors @ gradients.T) > 0.1
    )


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("mode", ["up", "PERTURBATION"])
def test_blocks_add_up_and_every_way_to_an_influence_agrees(blocks: str, mode: str) -> None:
    problem = Problem()
    influence = CASES["direct hessian"].build(problem, BLOCKS[blocks]).fit(problem.batches())
    test, train = (problem.x_test, problem.y_test), (problem.x, problem.y)
    expected = influence.influences(*test, *train, mode=mode)

    factors = influence.influence_factors(*test)
    by_block = influence.influence_factors_by_block(*test)
    named = influence.space.unflatten(factors)
    reordered = dict(reversed(named.items()))
    positions = problem.positions(BLOCKS[blocks])
    assert set(by_block) == set(positions)
    for name, where in positions.items():
        assert torch.equal(by_block[name], factors[:, where])
    ways = [
        influence.influences_from_factors(factors, *train, mode=mode),
        influence.influences_from_factors(reordered, *train, mode=mode),
        sum(influence.influences_from_factors_by_block(by_block, *train, mode=mode).values()),
        sum(influence.influences_from_factors_by_block(factors, *train, mode=mode).values()),
        sum(influence.influences_by_block(*test, *train, mode=mode).values()),
    ]
    for way in ways:
        assert relative_error(way, expected) < 1e-12


def test_a_point_on_itself() -> None:
    problem = Problem()
    influence = CASES["direct hessian"].build(problem, "layer_wise").fit(problem.batches())
    whole = influence.influences(problem.x, problem.y)
    selfs = influence.self_influence(problem.x, problem.y)
    assert selfs.shape == (7,)
    assert relative_error(selfs, whole.diagonal()) < 1e-12
    assert relative_error(
        influence.influences(problem.x, problem.y, problem.x, problem.y), whole
    ) < (1e-12)
    by_block = influence.self_influence_by_block(problem.x, problem.y)
    assert relative_error(sum(by_block.values()), selfs) < 1e-12


def _one(tensor: Tensor) -> Tensor:
    return tensor[:1]


def test_one_point_keeps_its_dimension() -> None:
    problem = Problem()
    influence = CASES["cg"].build(problem, "full").fit(problem.batches())
    x, y = _one(problem.x), _one(problem.y)
    assert influence.influence_factors(x, y).shape == (1, influence.space.size)
    assert influence.influences(x, y).shape == (1, 1)
    assert influence.self_influence(x, y).shape == (1,)
