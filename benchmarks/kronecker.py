"""EKFAC influences of the digits network, from the model to the scores.

What is measured, and what the tables show, is in `DESCRIPTION`.

    python benchmarks/kronecker.py [--quick] [--rounds 5] [--threads 2]

The other libraries are in the dependency group `benchmarks`. `kronecker_stages.py` compares
`hessops` and kronfluence in more depth, stage by stage, in time and in memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial

import torch
from _cases import CLASSES, DIGITS, LOSS, Case, case, train
from _harness import OURS, Call, Comparison, Contender, Report, Way, run
from _peers import KRONFLUENCE, PYDVL, installed, pydvl
from _reference import relative_error
from torch import Tensor, nn

from hessops.influence import EkfacInfluence

DESCRIPTION = """\
Influences of all 1400 training points on 64 test points by EKFAC: Kronecker factors, their
eigenvectors, eigenvalues refitted in a second pass, scores. Everything is made anew in every round.
The matrices differ by the labels that they take: those of the points (*empirical*), one drawn from
the model for each point (*Monte Carlo*, the default of kronfluence), or all of them weighted by
their probability (*type-2*, exact and the default of `hessops`, at up to ten times the backward
passes). pyDVL has a choice of its own, one backward pass of a loss that is weighted by
probabilities. *Correlation* is that with the scores of the type-2 matrix, in float64 and
from scratch. The error is relative, against the same in float64 for the type-2 and the empirical
matrix; above 1e-2 it is marked wrong: eigenvectors of close eigenvalues depend on rounding. Damping
is 0.01 in every layer. kronfluence is run in memory, by the functions that its Analyzer calls; the
Analyzer itself writes every stage to files."""

DAMPING, TESTS, STEPS = 0.01, 64, 100
ACCEPTED = 1e-2
EMPIRICAL, MONTE_CARLO, TYPE_2 = "empirical", "monte-carlo", "type-2"


# --- from scratch ----------------------------------------------------------------------------


def layer_gradients(model: nn.Sequential, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each layer its inputs with a 1 for the bias, and the points' gradients by its outputs."""
    inputs, outputs = [], []
    for layer in model:
        if isinstance(layer, nn.Linear):
            inputs.append(torch.cat([x, torch.ones_like(x[:, :1])], dim=1).detach())
        x = layer(x)
        if isinstance(layer, nn.Linear):
            outputs.append(x)
    loss = nn.functional.cross_entropy(x, y, reduction="sum")
    return list(zip(inputs, torch.autograd.grad(loss, outputs), strict=True))


def expected_scores(data: Case, fisher_type: str) -> Tensor:
    """EKFAC influences in float64, with plain matrices."""
    model = perceptron_in_double(data)
    x, x_test = data.x.double(), data.x_test[:TESTS].double()
    if fisher_type == EMPIRICAL:
        labels = [(data.y, torch.ones(len(x), dtype=x.dtype))]
    else:
        p = model(x).detach().softmax(dim=1)
        labels = [(torch.full_like(data.y, c), p[:, c]) for c in range(CLASSES)]
    drawn = [(layer_gradients(model, x, y), weight) for y, weight in labels]
    of_points = layer_gradients(model, x, data.y)
    of_tests = layer_gradients(model, x_test, data.y_test[:TESTS])
    scores = torch.zeros(TESTS, len(x), dtype=x.dtype)
    for index, ((a, g), (a_test, g_test)) in enumerate(zip(of_points, of_tests, strict=True)):
        _, basis_in = torch.linalg.eigh(a.T @ a / len(x))
        slopes = [(layers[index][1], weight) for layers, weight in drawn]
        factor = sum((b * w[:, None]).T @ b for b, w in slopes) / len(x)
        _, basis_out = torch.linalg.eigh(factor)
        squares = (a @ basis_in) ** 2
        values = sum(((b @ basis_out) ** 2 * w[:, None]).T @ squares for b, w in slopes) / len(x)
        inverse = 1 / (values + DAMPING)
        rotated = torch.einsum("to,ti->toi", g_test @ basis_out, a_test @ basis_in) * inverse
        scores += torch.einsum("toi,no,ni->tn", rotated, g @ basis_out, a @ basis_in)
    return scores


def perceptron_in_double(data: Case) -> nn.Sequential:
    model = case(data.name).model.double()
    model.load_state_dict({key: value.double() for key, value in data.model.state_dict().items()})
    assert isinstance(model, nn.Sequential)
    return model


# --- contenders ------------------------------------------------------------------------------


def tests_and_points(data: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return data.x_test[:TESTS], data.y_test[:TESTS], data.x, data.y


def ours(data: Case, fisher_type: str) -> Call:
    def score() -> Tensor:
        influence = EkfacInfluence(
            data.model,
            update_diagonal=True,
            regularization=DAMPING,
            loss=LOSS,
            fisher_type=fisher_type,
        )
        return influence.fit(data.batches).influences(*tests_and_points(data))

    return score


def pydvl_scores(data: Case, batches: list[tuple[Tensor, Tensor]]) -> Call:
    kind = pydvl("influence_function_model").EkfacInfluence

    def score() -> Tensor:
        influence = kind(data.model, update_diagonal=True, hessian_regularization=DAMPING)
        return influence.fit(batches).influences(*tests_and_points(data))

    return score


def kronfluence_scores(data: Case, batch_size: int, *, empirical: bool) -> Call:
    stages = importlib.import_module("kronecker_stages")
    train_batches = stages.Batches(data.x, data.y, batch_size)
    test_batches = stages.Batches(data.x_test[:TESTS], data.y_test[:TESTS], TESTS)
    problem = stages.Problem(data.model, train_batches, test_batches, DAMPING)
    return lambda: stages.kronfluence(problem, empirical=empirical).scores


def contenders(data: Case) -> Iterator[Contender]:
    errors = {kind: partial(error_of, expected_scores(data, kind)) for kind in (TYPE_2, EMPIRICAL)}
    for kind in (TYPE_2, MONTE_CARLO, EMPIRICAL):
        yield Contender(OURS, kind, [Way("", partial(ours, data, kind))], errors.get(kind))
    sizes = {"one batch": len(data), f"batches of {data.batch_size}": data.batch_size}
    if installed(KRONFLUENCE):
        for kind in (MONTE_CARLO, EMPIRICAL):
            make = partial(kronfluence_scores, data, empirical=kind == EMPIRICAL)
            ways = [Way(setting, partial(make, size)) for setting, size in sizes.items()]
            yield Contender(KRONFLUENCE, kind, ways, errors.get(kind))
    if installed(PYDVL):
        ways = [
            Way("one batch", partial(pydvl_scores, data, data.full_batch)),
            Way(f"batches of {data.batch_size}", partial(pydvl_scores, data, data.batches)),
        ]
        yield Contender(PYDVL, "", ways)


def error_of(expected: Tensor, answer: Tensor) -> float:
    return relative_error(answer.detach(), expected)


# --- measurement -----------------------------------------------------------------------------


def correlation(found: Tensor, expected: Tensor) -> float:
    """Pearson's, over all pairs."""
    stacked = torch.stack([found.detach().double().flatten(), expected.flatten()])
    return torch.corrcoef(stacked)[0, 1].item()


def measure(report: Report) -> None:
    """One network."""
    data = case(DIGITS)
    train(data, STEPS)
    exact = expected_scores(data, TYPE_2)
    comparison = Comparison(
        data.gradient,
        report.effort,
        accepted=ACCEPTED,
        notes=lambda answer: {"correlation": f"{correlation(answer, exact):.3f}"},
    )
    measured = comparison.measure(contenders(data))
    report.add(measured, case=DIGITS)
    title = f"{DIGITS}: {TESTS} test points, {len(data)} training points"
    report.detail(title, measured, notes=["correlation"])


if __name__ == "__main__":
    run("kronecker", "EKFAC influences", DESCRIPTION, measure, patience=5.0)
