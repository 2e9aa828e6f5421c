"""Bad input to the public operators: a typed error that names the argument, never a number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hessops import (
    BatchOperation,
    BatchOperator,
    BlockDiagonalOperator,
    CgOperator,
    DiagonalOperator,
    DirectSolveOperator,
    GaussNewtonBatchOperation,
    GaussNewtonOperator,
    GeneralizedGaussNewtonBatchOperation,
    GeneralizedGaussNewtonOperator,
    HessianBatchOperation,
    HessianOperator,
    IdentityOperator,
    InverseHarmonicMeanBatchOperation,
    InverseHarmonicMeanOperator,
    LowRankOperator,
    LowRankProductOperator,
    LowRankProductRepresentation,
    MatrixOperator,
    ParameterSpace,
    TensorDictOperator,
    TensorOperator,
)
from hessops.errors import HessopsError

N, D, C = 6, 3, 2
NAN = float("nan")


@dataclass(frozen=True)
class Problem:
    """What a curvature operator is made from; a case replaces one part."""

    model: nn.Module
    loss: object
    data: object
    keywords: dict[str, object]


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C))


def x_and_y() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, D, generator=generator), torch.randn(N, C, generator=generator)


def problem(**changes: object) -> Problem:
    keywords = {k: v for k, v in changes.items() if k not in ("model", "loss", "data")}
    return Problem(
        model=changes.get("model", model()),  # type: ignore[arg-type]
        loss=changes.get("loss", nn.MSELoss()),
        data=changes.get("data", [x_and_y()]),
        keywords=keywords,
    )


def spoiled(tensor: Tensor, value: float = NAN) -> Tensor:
    result = tensor.detach().clone()
    result.view(-1)[0] = value
    return result


# --- curvature operators -------------------------------------------------------------------------


def _harmonic(model: object, loss: object, data: object, **keywords: object) -> TensorDictOperator:
    return InverseHarmonicMeanOperator(model, loss, data, 0.1, **keywords)  # type: ignore[arg-type]


def _harmonic_batch(model: object, loss: object, **keywords: object) -> BatchOperation:
    return InverseHarmonicMeanBatchOperation(model, loss, 0.1, **keywords)  # type: ignore[arg-type]


def _joined(model: object, loss: object, data: object, **keywords: object) -> TensorDictOperator:
    of_stream = {k: keywords.pop(k) for k in ("cache", "unpack", "averaging") if k in keywords}
    operation = HessianBatchOperation(model, loss, **keywords)  # type: ignore[arg-type]
    return BatchOperator(operation, data, **of_stream)  # type: ignore[arg-type]


OPERATORS: dict[str, Callable[..., TensorDictOperator]] = {
    "HessianOperator": HessianOperator,
    "GaussNewtonOperator": GaussNewtonOperator,
    "GeneralizedGaussNewtonOperator": GeneralizedGaussNewtonOperator,
    "InverseHarmonicMeanOperator": _harmonic,
    "BatchOperator": _joined,
}
BATCH_OPERATIONS: dict[str, Callable[..., BatchOperation]] = {
    "HessianBatchOperation": HessianBatchOperation,
    "GaussNewtonBatchOperation": GaussNewtonBatchOperation,
    "GeneralizedGaussNewtonBatchOperation": GeneralizedGaussNewtonBatchOperation,
    "InverseHarmonicMeanBatchOperation": _harmonic_batch,
}


def operator(name: str, given: Problem) -> TensorDictOperator:
    return OPERATORS[name](given.model, given.loss, given.data, **given.keywords)


def _generator() -> Iterator[tuple[Tensor, Tensor]]:
    yield x_and_y()


def _nan_in(part: str) -> nn.Module:
    module = nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4), nn.Linear(4, C)).eval()
    tensor = (
        dict(module.named_parameters())[part]
        if part in dict(module.named_parameters())
        else module.get_buffer(part)
    )
    tensor.data.copy_(spoiled(tensor))
    return module


def _partly_frozen() -> nn.Module:
    module = model()
    module.get_parameter("0.bias").requires_grad_(False)
    return module


Case = tuple[Callable[[], Problem], type[Exception], str]

AT_CONSTRUCTION: dict[str, Case] = {
    "no batches": (lambda: problem(data=[]), ValueError, "dataloader is empty"),
    "empty loader": (
        lambda: problem(data=DataLoader(TensorDataset(*x_and_y()), batch_size=9, drop_last=True)),
        ValueError,
        "dataloader is empty",
    ),
    "generator": (lambda: problem(data=_generator()), TypeError, "dataloader is a one-shot"),
    "iterator": (lambda: problem(data=iter([x_and_y()])), TypeError, "dataloader is a one-shot"),
    "dataset": (lambda: problem(data=TensorDataset(*x_and_y())), TypeError, "dataloader"),
    "tensor": (lambda: problem(data=x_and_y()[0]), TypeError, "dataloader"),
    "no data": (lambda: problem(data=None), TypeError, "dataloader"),
    "nothing trainable": (
        lambda: problem(model=model().requires_grad_(False)),
        ValueError,
        "has no trainable",
    ),
    "no module": (lambda: problem(model=torch.tanh), TypeError, "model must be"),
    "lazy": (lambda: problem(model=nn.LazyLinear(C)), ValueError, "lazy"),
    "mixed dtypes": (
        lambda: problem(model=nn.Sequential(nn.Linear(D, C), nn.Linear(C, C).double())),
        TypeError,
        "dtypes",
    ),
    "complex model": (
        lambda: problem(model=nn.Linear(D, C, dtype=torch.complex64)),
        TypeError,
        "complex64",
    ),
    "NaN in a parameter": (
        lambda: problem(model=_nan_in("2.weight")),
        ValueError,
        r"parameter '2\.weight'",
    ),
    "NaN in a buffer": (
        lambda: problem(model=_nan_in("1.running_var")),
        ValueError,
        r"buffer '1\.running_var'",
    ),
    "no loss": (lambda: problem(loss=None), TypeError, "loss must be callable"),
    "unknown reduction": (lambda: problem(reduction="avg"), ValueError, "reduction.*'avg'"),
    "restrict_to: unknown": (lambda: problem(restrict_to=["9.weight"]), ValueError, r"9\.weight"),
    "restrict_to: frozen": (
        lambda: problem(model=_partly_frozen(), restrict_to=["0.bias"]),
        ValueError,
        r"restrict_to.*frozen.*0\.bias",
    ),
    "restrict_to: foreign": (
        lambda: problem(restrict_to=dict(model().named_parameters())),
        ValueError,
        "restrict_to",
    ),
    "restrict_to: empty": (lambda: problem(restrict_to={}), ValueError, "restrict_to is empty"),
    "restrict_to: string": (lambda: problem(restrict_to="0.weight"), TypeError, "restrict_to"),
    "cache": (lambda: problem(cache="sometimes"), ValueError, "cache.*'sometimes'"),
    "averaging": (lambda: problem(averaging="points"), TypeError, "averaging.*'points'"),
    "chunk_size of zero": (lambda: problem(chunk_size=0), ValueError, "chunk_size"),
    "chunk_size no integer": (lambda: problem(chunk_size=1.5), TypeError, "chunk_size"),
}


@pytest.mark.parametrize("case", AT_CONSTRUCTION)
@pytest.mark.parametrize("name", OPERATORS)
def test_what_can_be_seen_at_construction_is_refused_there(name: str, case: str) -> None:
    build, error, text = AT_CONSTRUCTION[case]
    with pytest.raises(HessopsError, match=text) as caught:
        operator(name, build())
    assert isinstance(caught.value, error)


@pytest.mark.parametrize("name", [n for n in OPERATORS if "Harmonic" not in n])
def test_an_unknown_mode_of_differentiation_is_refused(name: str) -> None:
    with pytest.raises(HessopsError, match=r"mode.*'forward'") as caught:
        operator(name, problem(mode="forward"))
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("value", [0, 0.0, -1e-3, NAN, float("inf"), None, "0.1", True], ids=repr)
@pytest.mark.parametrize(
    "build",
    [
        lambda value: InverseHarmonicMeanOperator(model(), nn.MSELoss(), [x_and_y()], value),
        lambda value: InverseHarmonicMeanBatchOperation(model(), nn.MSELoss(), value),
    ],
    ids=["operator", "batch operation"],
)
def test_the_harmonic_mean_needs_a_positive_regularization(
    build: Callable[[object], object], value: object
) -> None:
    with pytest.raises(HessopsError, match="regularization") as caught:
        build(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    assert isinstance(caught.value, ValueError if is_number else TypeError)


def _weighted() -> nn.Module:
    return nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9.0]))


def _classes() -> list[tuple[Tensor, Tensor]]:
    return [(x_and_y()[0], torch.arange(N) % C)]


IN_THE_FIRST_PASS: dict[str, Case] = {
    "batches of no points": (
        lambda: problem(data=[(torch.zeros(0, D), torch.zeros(0, C))]),
        ValueError,
        "dataloader is empty",
    ),
    "x and y disagree": (
        lambda: problem(data=[(x_and_y()[0], x_and_y()[1][:-1])]),
        ValueError,
        "batch 0.*x has 6, y has 5",
    ),
    "in a later batch": (
        lambda: problem(data=[x_and_y(), (x_and_y()[0], x_and_y()[1][:-1])]),
        ValueError,
        "batch 1",
    ),
    "no pair": (lambda: problem(data=[x_and_y()[0]]), ValueError, "unpack"),
    "three parts": (lambda: problem(data=[(*x_and_y(), 1)]), ValueError, "unpack"),
    "single points": (
        lambda: problem(data=[(x_and_y()[0][0], torch.tensor(1))]),
        ValueError,
        "single point",
    ),
    "loss gives a vector": (
        lambda: problem(loss=nn.MSELoss(reduction="none")),
        ValueError,
        r"loss returned shape \(6, 2\)",
    ),
    "loss gives a scalar": (lambda: problem(reduction="none"), ValueError, "loss returned shape"),
    "loss gives a sum": (lambda: problem(loss=nn.MSELoss(reduction="sum")), ValueError, "loss"),
    "loss gives a number": (lambda: problem(loss=lambda o, y: 0.0), ValueError, "loss"),
    "weighted mean": (
        lambda: problem(loss=_weighted(), data=_classes()),
        ValueError,
        "loss.*reduction='none'",
    ),
    "ignored targets": (
        lambda: problem(loss=nn.CrossEntropyLoss(ignore_index=1), data=_classes()),
        ValueError,
        "loss.*ignore",
    ),
    "NaN in x": (
        lambda: problem(data=[(spoiled(x_and_y()[0]), x_and_y()[1])]),
        ValueError,
        "batch 0.*'x'",
    ),
    "infinity in x": (
        lambda: problem(data=[(spoiled(x_and_y()[0], float("inf")), x_and_y()[1])]),
        ValueError,
        "batch 0.*'x'",
    ),
    "NaN in y": (
        lambda: problem(data=[(x_and_y()[0], spoiled(x_and_y()[1]))]),
        ValueError,
        "batch 0.*'y'",
    ),
    "x of another dtype": (
        lambda: problem(data=[(x_and_y()[0].double(), x_and_y()[1])]),
        TypeError,
        r"x is torch\.float64",
    ),
    "dropout in training mode": (
        lambda: problem(model=nn.Sequential(model(), nn.Dropout())),
        ValueError,
        r"model\.eval\(\)",
    ),
    "batch-norm in training mode": (
        lambda: problem(model=nn.Sequential(model(), nn.BatchNorm1d(C))),
        ValueError,
        r"model\.eval\(\)",
    ),
}


@pytest.mark.parametrize("case", IN_THE_FIRST_PASS)
@pytest.mark.parametrize("name", OPERATORS)
def test_what_shows_in_the_data_is_refused_in_the_first_pass(name: str, case: str) -> None:
    build, error, text = IN_THE_FIRST_PASS[case]
    refusing = operator(name, build())
    with pytest.raises(HessopsError, match=text) as caught:
        refusing.apply(torch.ones(refusing.input_size))
    assert isinstance(caught.value, error)


@pytest.mark.parametrize("case", IN_THE_FIRST_PASS)
@pytest.mark.parametrize("name", OPERATORS)
def test_a_refusal_is_repeated_by_the_next_application(name: str, case: str) -> None:
    build, _, _ = IN_THE_FIRST_PASS[case]
    refusing = operator(name, build())
    for _ in range(2):
        with pytest.raises(HessopsError):
            refusing.apply(torch.ones(refusing.input_size))


@pytest.mark.parametrize("case", sorted(set(IN_THE_FIRST_PASS) - {"in a later batch"}))
@pytest.mark.parametrize("name", BATCH_OPERATIONS)
def test_a_batch_operation_refuses_the_same_batches(name: str, case: str) -> None:
    build, error, _ = IN_THE_FIRST_PASS[case]
    given = build()
    operation = BATCH_OPERATIONS[name](given.model, given.loss, **given.keywords)
    with pytest.raises(HessopsError) as caught:
        operation.apply(given.data[0], torch.ones(operation.space.size))  # type: ignore[index]
    assert isinstance(caught.value, error)


# --- vectors -------------------------------------------------------------------------------------


def _representation() -> LowRankProductRepresentation:
    return LowRankProductRepresentation(torch.tensor([3.0, 1.0]), torch.eye(4)[:, :2])


EVERY_OPERATOR: dict[str, Callable[[], TensorOperator]] = {
    **{name: partial(operator, name, problem()) for name in OPERATORS},
    "MatrixOperator": lambda: MatrixOperator(torch.eye(4)),
    "DirectSolveOperator": lambda: DirectSolveOperator(torch.eye(4)),
    "DiagonalOperator": lambda: DiagonalOperator(torch.ones(4)),
    "IdentityOperator": lambda: IdentityOperator(4),
    "BlockDiagonalOperator": lambda: BlockDiagonalOperator([IdentityOperator(2)] * 2),
    "LowRankProductOperator": lambda: LowRankProductOperator(_representation()),
    "LowRankOperator": lambda: LowRankOperator(_representation(), 0.1),
    "CgOperator": lambda: CgOperator(MatrixOperator(torch.eye(4))),
    "sum": lambda: MatrixOperator(torch.eye(4)) + DiagonalOperator(torch.ones(4)),
    "multiple": lambda: 2 * MatrixOperator(torch.eye(4)),
    "product": lambda: MatrixOperator(torch.eye(4)) @ DiagonalOperator(torch.ones(4)),
    "shift": lambda: MatrixOperator(torch.eye(4)).shift(1.0),
    "transpose": lambda: MatrixOperator(torch.arange(16.0).view(4, 4)).T,
    "inverse": lambda: DiagonalOperator(torch.ones(4)).inverse(),
}

BAD_VECTORS: dict[str, tuple[Callable[[int], object], type[Exception], str]] = {
    "one entry short": (lambda n: torch.ones(n - 1), ValueError, "expected"),
    "one entry long": (lambda n: torch.ones(n + 1), ValueError, "expected"),
    "columns for rows": (lambda n: torch.ones(n, n + 1), ValueError, "expected"),
    "three dimensions": (lambda n: torch.ones(1, 1, n), ValueError, "expected"),
    "no dimension": (lambda n: torch.ones(()), ValueError, "expected"),
    "double": (lambda n: torch.ones(n).double(), TypeError, r"\.to\(torch\.float32\)"),
    "half": (lambda n: torch.ones(n).half(), TypeError, r"\.to\(torch\.float32\)"),
    "whole numbers": (lambda n: torch.ones(n).long(), TypeError, r"\.to\(torch\.float32\)"),
    "complex": (lambda n: torch.ones(n) * 1j, TypeError, r"\.to\(torch\.float32\)"),
    "NaN": (lambda n: spoiled(torch.ones(n)), ValueError, "NaN"),
    "infinity": (lambda n: spoiled(torch.ones(2, n), float("inf")), ValueError, "NaN or inf"),
    "list": (lambda n: [1.0] * n, TypeError, r"torch\.Tensor, got list"),
    "none": (lambda n: None, TypeError, r"torch\.Tensor, got NoneType"),
}


@pytest.mark.parametrize("case", BAD_VECTORS)
@pytest.mark.parametrize("name", EVERY_OPERATOR)
def test_a_vector_that_does_not_fit_is_refused(name: str, case: str) -> None:
    build, error, text = BAD_VECTORS[case]
    refusing = EVERY_OPERATOR[name]()
    with pytest.raises(HessopsError, match=text) as caught:
        refusing.apply(build(refusing.input_size))  # type: ignore[arg-type]
    assert isinstance(caught.value, error)


@pytest.mark.parametrize("case", BAD_VECTORS)
@pytest.mark.parametrize("name", BATCH_OPERATIONS)
def test_a_batch_operation_refuses_the_same_vectors(name: str, case: str) -> None:
    build, error, text = BAD_VECTORS[case]
    operation = BATCH_OPERATIONS[name](model(), nn.MSELoss())
    with pytest.raises(HessopsError, match=text) as caught:
        operation.apply(x_and_y(), build(operation.space.size))  # type: ignore[arg-type]
    assert isinstance(caught.value, error)


@pytest.mark.parametrize("case", BAD_VECTORS)
@pytest.mark.parametrize(
    "name", ["CgOperator", "DirectSolveOperator", "LowRankOperator", "inverse"]
)
def test_solve_refuses_them_by_the_name_rhs(name: str, case: str) -> None:
    build, error, _ = BAD_VECTORS[case]
    inverse = EVERY_OPERATOR[name]()
    with pytest.raises(HessopsError, match="rhs") as caught:
        inverse.solve(build(inverse.input_size))  # type: ignore[attr-defined]
    assert isinstance(caught.value, error)


BAD_DICTIONARIES: dict[str, tuple[Callable[[dict[str, Tensor]], object], type[Exception], str]] = {
    "missing": (lambda d: {k: t for k, t in d.items() if k != "2.bias"}, ValueError, r"2\.bias"),
    "unknown": (lambda d: {**d, "9.bias": torch.ones(1)}, ValueError, r"9\.bias"),
    "mis-shaped": (lambda d: {**d, "2.bias": torch.ones(C + 1)}, ValueError, r"2\.bias"),
    "three dimensions": (lambda d: {**d, "2.bias": torch.ones(1, 1, C)}, ValueError, r"2\.bias"),
    "double": (lambda d: {**d, "2.bias": torch.ones(C).double()}, TypeError, r"2\.bias"),
    "NaN": (lambda d: {**d, "2.bias": spoiled(torch.ones(C))}, ValueError, "NaN"),
    "flat": (lambda d: torch.ones(26), TypeError, "dictionary"),
}


@pytest.mark.parametrize("case", BAD_DICTIONARIES)
@pytest.mark.parametrize("name", OPERATORS)
def test_a_dictionary_that_does_not_fit_is_refused(name: str, case: str) -> None:
    spoil, error, text = BAD_DICTIONARIES[case]
    refusing = operator(name, problem())
    entries = {key: torch.ones(shape) for key, shape in refusing.input_dict_structure.items()}
    with pytest.raises(HessopsError, match=text) as caught:
        refusing.apply_to_dict(spoil(entries))  # type: ignore[arg-type]
    assert isinstance(caught.value, error)


def test_an_operator_without_parameters_refuses_dictionaries() -> None:
    with pytest.raises(HessopsError, match="apply"):
        MatrixOperator(torch.eye(4)).apply_to_dict({"weight": torch.ones(4)})


# --- explicit operators, inverses and solvers ----------------------------------------------------

EYE = torch.eye(4)
SPD = MatrixOperator(EYE)
SINGULAR = torch.zeros(4, 4)
TILTED = LowRankProductRepresentation(torch.tensor([1.0]), torch.ones(4, 1))
SPACE = ParameterSpace.from_tensors({"weight": torch.zeros(3)})

BAD_ARGUMENTS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "MatrixOperator: rectangle": (lambda: MatrixOperator(EYE[:3]), ValueError, "matrix"),
    "MatrixOperator: vector": (lambda: MatrixOperator(EYE[0]), ValueError, "matrix"),
    "MatrixOperator: empty": (lambda: MatrixOperator(EYE[:0, :0]), ValueError, "matrix"),
    "MatrixOperator: whole numbers": (lambda: MatrixOperator(EYE.long()), TypeError, "matrix"),
    "MatrixOperator: complex": (lambda: MatrixOperator(EYE * 1j), TypeError, "matrix"),
    "MatrixOperator: NaN": (lambda: MatrixOperator(spoiled(EYE)), ValueError, "matrix"),
    "MatrixOperator: list": (lambda: MatrixOperator([[1.0]]), TypeError, "matrix"),  # type: ignore[arg-type]
    "MatrixOperator: other space": (lambda: MatrixOperator(EYE, space=SPACE), ValueError, "space"),
    "DirectSolveOperator: rectangle": (lambda: DirectSolveOperator(EYE[:3]), ValueError, "matrix"),
    "DirectSolveOperator: NaN": (lambda: DirectSolveOperator(spoiled(EYE)), ValueError, "matrix"),
    "DirectSolveOperator: half": (lambda: DirectSolveOperator(EYE.half()), TypeError, "matrix"),
    "DirectSolveOperator: singular": (
        lambda: DirectSolveOperator(SINGULAR),
        ValueError,
        "regularization",
    ),
    "DirectSolveOperator: negative": (
        lambda: DirectSolveOperator(EYE, -1.0),
        ValueError,
        "regularization",
    ),
    "DirectSolveOperator: NaN regularization": (
        lambda: DirectSolveOperator(EYE, NAN),
        ValueError,
        "regularization",
    ),
    "DiagonalOperator: matrix": (lambda: DiagonalOperator(EYE), ValueError, "diagonal"),
    "DiagonalOperator: NaN": (lambda: DiagonalOperator(spoiled(EYE[0])), ValueError, "diagonal"),
    "DiagonalOperator: whole numbers": (
        lambda: DiagonalOperator(torch.ones(3).long()),
        TypeError,
        "diagonal",
    ),
    "DiagonalOperator: zero inverted": (
        lambda: DiagonalOperator(EYE[0]).inverse(),
        ValueError,
        "singular",
    ),
    "IdentityOperator: no size": (lambda: IdentityOperator(0), ValueError, "input_size"),
    "IdentityOperator: complex": (
        lambda: IdentityOperator(3, torch.complex64),
        TypeError,
        "dtype",
    ),
    "BlockDiagonalOperator: none": (lambda: BlockDiagonalOperator([]), ValueError, "blocks"),
    "BlockDiagonalOperator: matrix": (
        lambda: BlockDiagonalOperator([EYE]),  # type: ignore[list-item]
        TypeError,
        r"blocks\[0\]",
    ),
    "BlockDiagonalOperator: dtypes": (
        lambda: BlockDiagonalOperator([SPD, MatrixOperator(EYE.double())]),
        TypeError,
        r"blocks\[1\]",
    ),
    "BlockDiagonalOperator: unnamed": (
        lambda: BlockDiagonalOperator([IdentityOperator(3)], space=SPACE),
        ValueError,
        r"blocks\[0\]",
    ),
    "LowRankProductRepresentation: ranks": (
        lambda: LowRankProductRepresentation(torch.ones(3), torch.eye(4)[:, :2]),
        ValueError,
        "projections",
    ),
    "LowRankProductRepresentation: NaN": (
        lambda: LowRankProductRepresentation(spoiled(torch.ones(2)), torch.eye(4)[:, :2]),
        ValueError,
        "eigen_vals",
    ),
    "LowRankProductRepresentation: dtypes": (
        lambda: LowRankProductRepresentation(torch.ones(2).double(), torch.eye(4)[:, :2]),
        TypeError,
        "eigen_vals",
    ),
    "LowRankProductOperator: matrix": (
        lambda: LowRankProductOperator(EYE),  # type: ignore[arg-type]
        TypeError,
        "low_rank_representation",
    ),
    "LowRankProductOperator: inverted": (
        lambda: LowRankProductOperator(_representation()).inverse(),
        ValueError,
        "singular",
    ),
    "LowRankOperator: none": (
        lambda: LowRankOperator(_representation()),
        ValueError,
        "regularization must be positive",
    ),
    "LowRankOperator: zero": (
        lambda: LowRankOperator(_representation(), 0.0),
        ValueError,
        "regularization must be positive",
    ),
    "LowRankOperator: negative": (
        lambda: LowRankOperator(_representation(), -1.0),
        ValueError,
        "regularization must be positive",
    ),
    "LowRankOperator: negative on the range": (
        lambda: LowRankOperator(_representation(), -1.0, exact=False),
        ValueError,
        "regularization",
    ),
    "LowRankOperator: not orthonormal": (
        lambda: LowRankOperator(TILTED, exact=False),
        ValueError,
        "low_rank_representation",
    ),
    "CgOperator: matrix": (lambda: CgOperator(EYE), TypeError, "operator"),  # type: ignore[arg-type]
    "CgOperator: negative": (lambda: CgOperator(SPD, -1.0), ValueError, "regularization"),
    "CgOperator: NaN": (lambda: CgOperator(SPD, NAN), ValueError, "regularization"),
    "CgOperator: text": (lambda: CgOperator(SPD, "1"), TypeError, "regularization"),  # type: ignore[arg-type]
    "CgOperator: rtol": (lambda: CgOperator(SPD, rtol=-1.0), ValueError, "rtol"),
    "CgOperator: atol": (lambda: CgOperator(SPD, atol=-1.0), ValueError, "atol"),
    "CgOperator: maxiter": (lambda: CgOperator(SPD, maxiter=0), ValueError, "maxiter"),
    "CgOperator: maxiter no integer": (
        lambda: CgOperator(SPD, maxiter=1.5),  # type: ignore[arg-type]
        TypeError,
        "maxiter",
    ),
    "CgOperator: not symmetric": (
        lambda: CgOperator(MatrixOperator(torch.arange(16.0).view(4, 4))),
        ValueError,
        "operator",
    ),
    "CgOperator: half": (lambda: CgOperator(MatrixOperator(EYE.half())), TypeError, "operator"),
    "BatchOperator: class": (
        lambda: BatchOperator(HessianBatchOperation, [x_and_y()]),  # type: ignore[arg-type]
        TypeError,
        "batch_operation",
    ),
    "sum of sizes": (lambda: SPD + IdentityOperator(3), ValueError, "sizes 4 and 3"),
    "sum of dtypes": (lambda: SPD + MatrixOperator(EYE.double()), TypeError, "dtypes"),
    "sum of spaces": (
        lambda: (
            operator("HessianOperator", problem(restrict_to=["0.bias"]))
            + operator("HessianOperator", problem(model=nn.Linear(3, 1)))
        ),
        ValueError,
        "different parameters",
    ),
    "elementwise product": (lambda: SPD * SPD, TypeError, "A @ B"),
    "product with a tensor": (lambda: SPD * EYE, TypeError, "factor"),
    "multiple of NaN": (lambda: SPD * NAN, ValueError, "factor"),
    "division by zero": (lambda: SPD / 0, ValueError, "divisor"),
    "shift by text": (lambda: SPD.shift("1"), TypeError, "value"),  # type: ignore[arg-type]
    "columns of another height": (lambda: SPD @ torch.ones(3, 4), ValueError, "right factor"),
    "too large to be dense": (lambda: SPD.to_dense(max_bytes=10), MemoryError, "max_bytes"),
    "inverse without a solver": (
        lambda: operator("HessianOperator", problem()).inverse(),
        ValueError,
        "solver",
    ),
    "solver that gives no operator": (
        lambda: SPD.inverse(lambda _: EYE),  # type: ignore[arg-type, return-value]
        TypeError,
        "solver",
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_an_argument_that_cannot_be_used_is_refused_by_name(case: str) -> None:
    call, error, text = BAD_ARGUMENTS[case]
    with pytest.raises(HessopsError, match=text) as caught:
        call()
    assert isinstance(caught.value, error)
