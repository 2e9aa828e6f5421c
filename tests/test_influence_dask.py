from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import cloudpickle
import dask
import dask.array as da
import numpy as np
import pytest
import torch
from dask_cases import (
    LAMBDA,
    TEST_CHUNKS,
    TRAIN_CHUNKS,
    Killing,
    Marking,
    Points,
    Waiting,
    chunked,
    wide_model,
)
from distributed import Client, LocalCluster
from influence_cases import CASES
from reference import relative_error
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from hessops.errors import (
    ArgumentError,
    ArgumentTypeError,
    DataError,
    DtypeError,
    NonFiniteError,
    NotFittedError,
    ShapeError,
    StoreError,
)
from hessops.influence import (
    CgInfluence,
    DaskInfluenceCalculator,
    DirectInfluence,
    EkfacInfluence,
    LissaInfluence,
    SequentialInfluenceCalculator,
    TorchNumpyConverter,
    torch_dataset_to_dask_array,
)
from hessops.influence.dask_tasks import Shipment, delivered

# One worker of pytest-xdist has all of them, and so only one has a cluster.
pytestmark = pytest.mark.xdist_group("dask")

HERE = Path(__file__).parent
NUM_CHUNKS = len(TEST_CHUNKS) * len(TRAIN_CHUNKS)
# Port 0 is any that is free; the default one may be taken by another cluster.
SILENT = {"dashboard_address": ":0", "silence_logs": 50}


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """Two processes with a thread each."""
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, **SILENT) as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.fixture(autouse=True)
def _nothing_is_on_its_way(request: pytest.FixtureRequest) -> None:
    """Keys of one test are forgotten before the next.

    Tests share points and so the keys of their chunks. What is computed anew while it is being
    released may wait for ever (dask issue 9888).
    """
    if "client" not in request.fixturenames:
        return
    client: Client = request.getfixturevalue("client")
    gc.collect()
    before, deadline = None, time.monotonic() + 5
    while (states := client.run_on_scheduler(_states)) != before or states.keys() - {"memory"}:
        before = states
        if time.monotonic() > deadline:
            return
        time.sleep(0.01)


def _states(dask_scheduler) -> Counter[str]:
    return Counter(task.state for task in dask_scheduler.tasks.values())


def calculator_of(client: Client, model: object) -> DaskInfluenceCalculator:
    return DaskInfluenceCalculator(model, TorchNumpyConverter(), client)


def direct(points: Points) -> DirectInfluence:
    p = points.problem
    return DirectInfluence(p.model, p.loss, LAMBDA).fit(points.batches())


def expected(points: Points, model: object, mode: str = "up") -> Tensor:
    """As a calculator in this process has it, in the same chunks."""
    return SequentialInfluenceCalculator(model).influences(*points.loaders(), mode=mode).compute()


def error_of(found: np.ndarray, reference: Tensor) -> float:
    return relative_error(torch.from_numpy(found), reference)


# --- numbers -----------------------------------------------------------------------------------


def models() -> dict[str, Callable[[Points], object]]:
    made = {
        name: lambda points, case=case: case.build(points.problem, "layer_wise").fit(
            points.batches()
        )
        for name, case in CASES.items()
    }

    def ekfac(points: Points) -> EkfacInfluence:
        model = EkfacInfluence(wide_model(4), update_diagonal=True, regularization=LAMBDA)
        return model.fit(points.batches())

    def of_a_loader(points: Points) -> CgInfluence:
        p = points.problem
        loader = DataLoader(TensorDataset(p.x, p.y), batch_size=5)
        model = CgInfluence(p.model, p.loss, LAMBDA, second_order_mode="gauss_newton", rtol=1e-12)
        return model.fit(loader)

    return {**made, "ekfac": ekfac, "of a loader": of_a_loader}


# The others differ in their solver only, which is not what runs on the cluster.
ON_THE_CLUSTER = ["lissa", "nystroem", "inverse harmonic mean", "ekfac", "of a loader"]


@pytest.mark.parametrize("name", ON_THE_CLUSTER)
def test_influences_are_those_of_the_sequential_calculator(client: Client, name: str) -> None:
    points = Points()
    model = models()[name](points)
    calculator = calculator_of(client, model)
    for mode in ("up", "perturbation"):
        influences = calculator.influences(*points.test, *points.train, mode=mode)
        reference = expected(points, model, mode)
        assert influences.shape == tuple(reference.shape)
        assert error_of(influences.compute(), reference) < 1e-12


@pytest.mark.parametrize("name", models())
def test_a_fitted_model_survives_pickling(name: str) -> None:
    points = Points()
    p, model = points.problem, models()[name](points)
    reference = model.influences(p.x_test, p.y_test, p.x, p.y)
    for way in (pickle, cloudpickle):
        copy = pickle.loads(way.dumps(model))
        assert torch.equal(copy.influences(p.x_test, p.y_test, p.x, p.y), reference)


def test_a_model_is_sent_on_as_it_came_while_a_task_has_hooks_in_it() -> None:
    model = direct(Points())
    delivery = delivered(cloudpickle.dumps(Shipment(model, TorchNumpyConverter(), seed=0)))
    with delivery.in_use() as content:
        module = content.model.gradient_provider.objective._snapshot.module
        handle = module.register_forward_hook(lambda *_: pytest.fail("a hook of another task"))
        sent_on = pickle.loads(pickle.dumps(delivery)).content
        handle.remove()
    assert not sent_on.model.gradient_provider.objective._snapshot.module._forward_hooks


def test_factors_influences_from_them_and_self_influences(client: Client) -> None:
    points = Points()
    p, model = points.problem, direct(points)
    calculator = calculator_of(client, model)
    factors = calculator.influence_factors(*points.test)
    assert error_of(factors.compute(), model.influence_factors(p.x_test, p.y_test)) < 1e-12
    reference = expected(points, model)
    stored = da.from_array(factors.compute(), chunks=(3, -1))
    for some in (factors, stored):
        influences = calculator.influences_from_factors(some, *points.train)
        assert error_of(influences.compute(), reference) < 1e-12
    on_themselves = calculator.influences(*points.test).compute()
    assert error_of(on_themselves, model.influences(p.x_test, p.y_test)) < 1e-12


def test_one_chunk_and_foreign_layouts_of_memory(client: Client) -> None:
    points = Points()
    p, model = points.problem, direct(points)
    swapped = da.from_array(p.x.numpy().astype(">f8"), chunks=-1)
    backwards = da.from_array(p.y_test.numpy()[::-1].astype(np.int64), chunks=-1)[::-1]
    test = da.from_array(p.x_test.numpy(), chunks=-1), backwards
    train = swapped, da.from_array(p.y.numpy(), chunks=-1)
    influences = calculator_of(client, model).influences(*test, *train, mode="perturbation")
    reference = model.influences(p.x_test, p.y_test, p.x, p.y, "perturbation")
    assert influences.dtype == np.dtype("float64")
    assert error_of(influences.compute(), reference) < 1e-12


def test_solvers_draw_from_the_seed_of_the_driver(client: Client) -> None:
    points = Points()
    p = points.problem
    torch.manual_seed(7)
    loader = DataLoader(TensorDataset(p.x, p.y), batch_size=3, shuffle=True)
    ggn = {"second_order_mode": "generalized_gauss_newton", "warn_on_max_iteration": False}
    model = LissaInfluence(p.model, p.loss, LAMBDA, scale=20.0, maxiter=5, **ggn).fit(loader)
    calculator = calculator_of(client, model)
    reference = expected(points, model)
    torch.manual_seed(8)
    assert relative_error(expected(points, model), reference) > 1e-6
    torch.manual_seed(9)
    found = calculator.influences(*points.test, *points.train).compute()
    assert error_of(found, reference) < 1e-12


def test_float32_and_integer_inputs_keep_their_dtypes(client: Client) -> None:
    points = Points()
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))
    x, y = torch.randint(5, (9, 2)), torch.randint(2, (9,))
    influence = DirectInfluence(model, nn.CrossEntropyLoss(), 1.0).fit([(x, y)])
    calculator = calculator_of(client, influence)
    train = chunked(x, (4, 4, 1)), chunked(y, (4, 4, 1))
    influences = calculator.influences(*train)
    assert influences.dtype == influences.compute().dtype == np.float32
    assert error_of(influences.compute(), influence.influences(x, y)) < 1e-5
    with pytest.raises(DtypeError, match="floating-point input"):
        calculator.influences(*train, mode="perturbation")
    assert points.problem.x.dtype == torch.float64


def test_a_calculator_keeps_the_fit_it_was_given(client: Client) -> None:
    points = Points()
    model = direct(points)
    calculator, reference = calculator_of(client, model), expected(points, model)
    with torch.no_grad():
        points.problem.model.last.bias[0] += 1.0
    model.fit(points.batches())
    found = calculator.influences(*points.test, *points.train).compute()
    assert error_of(found, reference) < 1e-12


# --- laziness ----------------------------------------------------------------------------------


def marks_of(directory: Path, what: str) -> list[list[str]]:
    return [mark.name.split("_") for mark in directory.glob(f"{what}_*")]


def test_nothing_is_computed_before_and_factors_once_for_a_row(
    client: Client, tmp_path: Path
) -> None:
    points = Points()
    calculator = calculator_of(client, Marking.of(points, tmp_path))
    for mode in ("up", "perturbation"):
        influences = calculator.influences(*points.test, *points.train, mode=mode)
    assert marks_of(tmp_path, "factors") == marks_of(tmp_path, "scores") == []
    assert influences.chunks == (TEST_CHUNKS, TRAIN_CHUNKS, (3,))
    assert influences._meta.shape == (0, 0, 0)
    assert influences._meta.dtype == np.float64
    influences.compute()
    assert sorted(mark[1] for mark in marks_of(tmp_path, "factors")) == ["0", "1", "2"]
    assert len(marks_of(tmp_path, "scores")) == NUM_CHUNKS


def test_a_part_of_a_result_computes_its_chunks_only(client: Client, tmp_path: Path) -> None:
    points = Points()
    calculator = calculator_of(client, Marking.of(points, tmp_path))
    calculator.influences(*points.test, *points.train)[:2, -1:].compute()
    assert [mark[1] for mark in marks_of(tmp_path, "factors")] == ["0"]
    assert [mark[2] for mark in marks_of(tmp_path, "scores")] == ["3"]


def test_a_model_is_unpacked_once_on_each_worker(client: Client, tmp_path: Path) -> None:
    points = Points()
    calculator = calculator_of(client, Marking.of(points, tmp_path))
    calculator.influences(*points.test, *points.train).compute()
    processes = [mark[1] for mark in marks_of(tmp_path, "unpickled")]
    workers = [process for process in processes if process != str(os.getpid())]
    assert len(workers) == len(set(workers))
    assert 1 <= len(workers) <= 2


def test_graphs_do_not_grow_with_the_model_nor_payloads_with_the_data(client: Client) -> None:
    points = Points()
    sizes, loss = [], nn.CrossEntropyLoss()
    for width in (4, 400):
        model = EkfacInfluence(wide_model(width), regularization=LAMBDA, update_diagonal=True)
        calculator = calculator_of(client, model.fit(points.batches()))
        influences = calculator.influences(*points.test, *points.train)
        sizes.append(len(cloudpickle.dumps(dict(influences.__dask_graph__()))))
    assert abs(sizes[1] - sizes[0]) < 100
    x, y = points.problem.x.repeat(1000, 1), points.problem.y.repeat(1000)
    many = DirectInfluence(points.problem.model, loss, LAMBDA).fit([(x, y)])
    assert len(cloudpickle.dumps(calculator_of(client, many).model)) < x.nbytes / 5


@pytest.mark.parametrize("megabytes", [12])
def test_a_large_model_is_sent_without_a_warning(client: Client, megabytes: int) -> None:
    model = nn.Sequential(nn.Linear(3, 600), nn.Tanh(), nn.Linear(600, 2))
    points = Points()
    p = points.problem
    influence = EkfacInfluence(model, regularization=LAMBDA, update_diagonal=True)
    influence.fit([(p.x.float(), p.y)])
    influence.padding = torch.zeros(megabytes * 2**18)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calculator = calculator_of(client, influence)
    factors = calculator.influence_factors(chunked(p.x.float(), (13,)), chunked(p.y, (13,)))
    assert factors.compute().shape == (13, influence.space.size)


# --- arguments ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quiet(client: Client) -> DaskInfluenceCalculator:
    """A calculator for calls that are refused before anything is computed."""
    return calculator_of(client, direct(Points()))


X, Y = np.zeros((6, 3)), np.zeros(6, dtype=np.int64)
GOOD_Y = da.from_array(Y, chunks=3)
UNKNOWN = da.from_array(X, chunks=(3, 3))[da.from_array(Y, chunks=3) == 0]

POINTS = {
    "no dask array": (X, GOOD_Y, ArgumentTypeError, "x must be a dask array, got ndarray"),
    "no dask array for y": (
        da.zeros((6, 3), chunks=3),
        Y,
        ArgumentTypeError,
        "y must be a dask array",
    ),
    "chunks that are not aligned": (
        da.zeros((6, 3), chunks=(2, 3)),
        GOOD_Y,
        ShapeError,
        r"\(2, 2, 2\) and \(3, 3\): use y.rechunk",
    ),
    "other numbers of points": (
        da.zeros((5, 3), chunks=(3, 3)),
        GOOD_Y,
        ShapeError,
        "x has 5 points and y has 6",
    ),
    "chunks of features": (
        da.zeros((6, 3), chunks=(3, 2)),
        GOOD_Y,
        ShapeError,
        r"dimension 1, \(2, 1\).*x.rechunk\({1: -1}\)",
    ),
    "unknown sizes": (UNKNOWN, GOOD_Y, ShapeError, r"x.compute_chunk_sizes\(\)"),
    "chunks without points": (
        da.concatenate(
            [da.zeros((0, 3)), da.zeros((6, 3), chunks=3)], allow_unknown_chunksizes=True
        )
        if False
        else da.zeros((6, 3), chunks=((0, 6), (3,))),
        GOOD_Y,
        DataError,
        r"chunks without points, \(0, 6\)",
    ),
    "no dimension": (da.zeros(()), GOOD_Y, ShapeError, "x has no dimension"),
    "objects": (
        da.from_array(X.astype(object), chunks=(3, 3)),
        GOOD_Y,
        DtypeError,
        "dtype object, expected numbers",
    ),
    "dates": (
        da.zeros((6, 3), chunks=3, dtype="datetime64[s]"),
        GOOD_Y,
        DtypeError,
        "datetime64",
    ),
}


@pytest.mark.parametrize("case", POINTS)
def test_points_that_cannot_be_used_are_refused(quiet: DaskInfluenceCalculator, case: str) -> None:
    x, y, error, message = POINTS[case]
    good = da.zeros((6, 3), chunks=3), GOOD_Y
    with pytest.raises(error, match=message):
        quiet.influence_factors(x, y)
    with pytest.raises(error):
        quiet.influences(*good, x, y)
    with pytest.raises(error, match=r"[xy]_test"):
        quiet.influences(x, y, *good)
    factors = da.zeros((4, quiet.model.space.size), chunks=(2, -1))
    with pytest.raises(error):
        quiet.influences_from_factors(factors, x, y)


FACTORS = {
    "another width": (da.zeros((4, 5)), ShapeError, r"\(4, 5\), expected \(m, 27\)"),
    "a vector": (da.zeros(27), ShapeError, "expected"),
    "another dtype": (da.zeros((4, 27), dtype="float32"), DtypeError, "float32, expected float64"),
    "columns in chunks": (da.zeros((4, 27), chunks=(4, 9)), ShapeError, "dimension 1"),
    "a tensor": (torch.zeros(4, 27), ArgumentTypeError, "factors must be a dask array"),
}


@pytest.mark.parametrize("case", FACTORS)
def test_factors_that_do_not_fit_are_refused(quiet: DaskInfluenceCalculator, case: str) -> None:
    factors, error, message = FACTORS[case]
    with pytest.raises(error, match=message):
        quiet.influences_from_factors(factors, da.zeros((6, 3), chunks=3), GOOD_Y)


def test_other_arguments_are_refused(quiet: DaskInfluenceCalculator) -> None:
    x = da.zeros((6, 3), chunks=3)
    with pytest.raises(ArgumentError, match="mode"):
        quiet.influences(x, GOOD_Y, mode="down")
    with pytest.raises(ArgumentError, match="y is given without x"):
        quiet.influences(x, GOOD_Y, y=GOOD_Y)
    with pytest.raises(ArgumentError, match="x is given without y"):
        quiet.influences(x, GOOD_Y, x=x)


def test_constructors_refuse_what_they_cannot_use(client: Client) -> None:
    points = Points()
    p, model = points.problem, direct(points)
    with pytest.raises(ArgumentTypeError, match="model must be an InfluenceFunctionModel"):
        calculator_of(client, p.model)
    with pytest.raises(NotFittedError, match=r"fit\(train_loader\)"):
        calculator_of(client, DirectInfluence(p.model, p.loss))
    with pytest.raises(ArgumentTypeError, match="client must be a distributed"):
        calculator_of(None, model)
    with pytest.raises(ArgumentTypeError, match="got the class TorchNumpyConverter"):
        DaskInfluenceCalculator(model, TorchNumpyConverter, client)
    with pytest.raises(ArgumentTypeError, match="from_numpy and to_numpy"):
        DaskInfluenceCalculator(model, np.asarray, client)
    own = LissaInfluence(p.model, p.loss, 0.1, scale=20.0, generator=torch.Generator())
    with pytest.raises(DataError, match="generator"):
        calculator_of(client, own.fit(points.batches()))


def test_a_model_that_cannot_be_sent_is_refused(client: Client) -> None:
    points = Points()
    model = direct(points)
    model.lock = threading.Lock()
    with pytest.raises(ArgumentTypeError, match=r"cannot be pickled.*lock"):
        calculator_of(client, model)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_errors_of_the_model_arrive_with_their_types(client: Client) -> None:
    points = Points()
    calculator = calculator_of(client, direct(points))
    factors = da.full((3, 27), np.nan, chunks=(2, -1))
    with pytest.raises(NonFiniteError, match="factors holds NaN"):
        calculator.influences_from_factors(factors, *points.train).compute()
    x, y = points.train
    with pytest.raises(NonFiniteError, match="batch 2"):
        calculator.influences(*points.test, da.where(x == x[8, 0], np.nan, x), y).compute()


def test_workers_with_several_threads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    points = Points()
    model = direct(points)
    with Client(processes=False, n_workers=1, threads_per_worker=2, **SILENT) as several:
        with pytest.raises(ArgumentError, match=r"has 2\), .*LocalCluster\(threads_per_worker=1\)"):
            calculator_of(several, model)
        # As for one that joins after the calculator was made.
        monkeypatch.setattr(several, "nthreads", dict)
        calculator = calculator_of(several, model)
        for lazy in (
            calculator.influence_factors(*points.test),
            calculator.influences_from_factors(da.zeros((3, 27)), *points.train),
        ):
            with pytest.raises(ArgumentError, match="has 2"):
                lazy.compute()


def test_another_converter_is_used(client: Client) -> None:
    class Halving(TorchNumpyConverter):
        def from_numpy(self, array):
            tensor = super().from_numpy(array)
            return tensor / 2 if tensor.is_floating_point() else tensor

    points = Points()
    p, model = points.problem, direct(points)
    calculator = DaskInfluenceCalculator(model, Halving(), client)
    found = calculator.influence_factors(*points.test).compute()
    assert error_of(found, model.influence_factors(p.x_test / 2, p.y_test)) < 1e-12


def test_dask_is_imported_by_those_who_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys, hessops, hessops.influence, hessops.influence.dask;"
        "print({'dask', 'distributed', 'zarr', 'cloudpickle'} & set(sys.modules))"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert finished.stdout.strip() == b"set()"
    monkeypatch.setitem(sys.modules, "dask.array", None)
    with pytest.raises(ImportError, match=r"pip install 'hessops\[influence-dask\]'"):
        torch_dataset_to_dask_array(TensorDataset(torch.zeros(3)), 2)
    monkeypatch.setitem(sys.modules, "dask.array", da)
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match=r"pip install 'hessops\[influence-dask\]'"):
        calculator_of(None, direct(Points()))


# --- stores ------------------------------------------------------------------------------------


def files_of(store: Path) -> dict[str, int]:
    """The chunks that are there, and when they were written."""
    chunks = (store / "c").rglob("*")
    return {str(f.relative_to(store)): f.stat().st_mtime_ns for f in chunks if f.is_file()}


def require_whole(store: Path, reference: Tensor, num_chunks: int) -> None:
    """All chunks, nothing half written, and right when read with their checksums."""
    import zarr

    assert list(store.rglob("*.partial")) == []
    assert len(files_of(store)) == num_chunks
    assert error_of(zarr.open_array(str(store))[...], reference) < 1e-12


def test_a_store_has_the_numbers_in_chunks_of_one_size(client: Client, tmp_path: Path) -> None:
    points = Points()
    model = direct(points)
    calculator = calculator_of(client, model)
    for mode, trailing in (("up", ()), ("perturbation", (3,))):
        influences = calculator.influences(*points.test, *points.train, mode=mode)
        reference = expected(points, model, mode)
        array = calculator.to_zarr(influences, tmp_path / mode)
        assert array.chunks == (4, 5, *trailing)
        require_whole(tmp_path / mode, reference, 2 * 3)
        chunks = {"row_chunk": 3, "column_chunk": 20}
        array = calculator.to_zarr(influences, tmp_path / f"{mode} 3", **chunks)
        assert array.chunks == (3, 13, *trailing)
        require_whole(tmp_path / f"{mode} 3", reference, 3)
    factors = calculator.influence_factors(*points.test)
    p = points.problem
    calculator.to_zarr(factors, tmp_path / "factors")
    require_whole(tmp_path / "factors", model.influence_factors(p.x_test, p.y_test), 2)
    stored = da.from_zarr(str(tmp_path / "factors"))
    again = calculator.influences_from_factors(stored, *points.train)
    calculator.to_zarr(again, tmp_path / "from stored factors")
    require_whole(tmp_path / "from stored factors", expected(points, model), 2 * 3)


def test_a_store_is_the_sequential_one_where_chunks_are_equal(
    client: Client, tmp_path: Path
) -> None:
    points = Points()
    model = direct(points)
    calculator = calculator_of(client, model)
    calculator.to_zarr(calculator.influences(*points.test, *points.train), tmp_path / "a")
    sequential = SequentialInfluenceCalculator(model).influences(*points.loaders())
    with pytest.raises(StoreError, match="chunked by: stored dask, now nothing"):
        sequential.to_zarr(tmp_path / "a", row_chunk=4, column_chunk=5)


def test_only_missing_chunks_are_computed(client: Client, tmp_path: Path) -> None:
    points = Points()
    marks, store = tmp_path / "marks", tmp_path / "store"
    marks.mkdir()
    calculator = calculator_of(client, Marking.of(points, marks))
    influences = calculator.influences(*points.test, *points.train)
    calculator.to_zarr(influences, store)
    reference = expected(points, direct(points))
    (store / "c" / "1" / "2").unlink()
    (store / "c" / "0" / "1").write_bytes(b"half")
    before = files_of(store)
    for mark in marks.iterdir():
        mark.unlink()
    calculator.to_zarr(influences, store)
    after = files_of(store)
    assert {k for k in after if after[k] != before.get(k)} == {"c/1/2", "c/0/1"}
    # Rows 4 to 7 of the store are those of the chunks of 1 and 3, columns 10 to 12 those of the
    # chunks of 5 and 2; rows 0 to 3 those of the first, columns 5 to 9 of the chunks of 1 and 5.
    assert sorted(mark[1] for mark in marks_of(marks, "factors")) == ["0", "1", "2"]
    assert sorted(mark[2] for mark in marks_of(marks, "scores")) == ["1", "2", "2", "2", "3", "3"]
    for mark in marks.iterdir():
        mark.unlink()
    calculator.to_zarr(influences, store)
    assert marks_of(marks, "scores") == []
    require_whole(store, reference, 2 * 3)


def other_points(calculator: DaskInfluenceCalculator, points: Points):
    x, y = points.train
    return calculator, calculator.influences(*points.test, da.where(x == x[8, 0], 0.0, x), y)


def other_order(calculator: DaskInfluenceCalculator, points: Points):
    x, y = points.train
    turned = x[::-1].rechunk(x.chunks), y[::-1].rechunk(y.chunks)
    return calculator, calculator.influences(*points.test, *turned)


def other_chunks(calculator: DaskInfluenceCalculator, points: Points):
    sizes = (5, 1, 5, 1, 1)
    train = points.train[0].rechunk((sizes, 3)), points.train[1].rechunk((sizes,))
    return calculator, calculator.influences(*points.test, *train)


def other_test_points(calculator: DaskInfluenceCalculator, points: Points):
    x, y = points.test
    return calculator, calculator.influences(1.5 * x, y, *points.train)


def other_mode(calculator: DaskInfluenceCalculator, points: Points):
    return calculator, calculator.influences(*points.test, *points.train, mode="perturbation")


def other_regularization(calculator: DaskInfluenceCalculator, points: Points):
    other = calculator_of(calculator.client, calculator.model.with_regularization(0.5))
    return other, other.influences(*points.test, *points.train)


CHANGES = {
    "points": (other_points, "train: stored"),
    "order": (other_order, "train: stored"),
    "chunks of dask": (other_chunks, "train: stored"),
    "test points": (other_test_points, "test: stored"),
    "mode": (other_mode, "mode: stored up, now perturbation"),
    "regularization": (other_regularization, "regularization: stored"),
}


@pytest.fixture(scope="module")
def written(client: Client, tmp_path_factory: pytest.TempPathFactory):
    points, path = Points(), tmp_path_factory.mktemp("stores") / "written"
    calculator = calculator_of(client, direct(points))
    calculator.to_zarr(calculator.influences(*points.test, *points.train), path)
    return calculator, points, path


@pytest.mark.parametrize("change", CHANGES)
def test_a_store_of_another_computation_is_refused(written, change: str) -> None:
    calculator, points, path = written
    make, message = CHANGES[change]
    before = files_of(path)
    changed, array = make(calculator, points)
    with pytest.raises(StoreError, match=f"another computation .*{message}"):
        changed.to_zarr(array, path)
    assert files_of(path) == before


def test_arrays_that_the_calculator_did_not_make_are_refused(
    quiet: DaskInfluenceCalculator, client: Client, tmp_path: Path
) -> None:
    points = Points()
    influences = quiet.influences(*points.test, *points.train)
    other = calculator_of(client, quiet.model.with_regularization(0.5))
    foreign = (influences + 1, influences[:3], da.zeros((3, 4)))
    for array in (*foreign, other.influences(*points.test)):
        with pytest.raises(ArgumentError, match=r"not made by this calculator.*array.to_zarr"):
            quiet.to_zarr(array, tmp_path / "a")
    with pytest.raises(ArgumentTypeError, match="array must be a dask array"):
        quiet.to_zarr(np.zeros(3), tmp_path / "a")
    with pytest.raises(ArgumentError, match="row_chunk"):
        quiet.to_zarr(influences, tmp_path / "a", row_chunk=0)
    assert not (tmp_path / "a").exists()


def test_a_result_that_is_kept_on_the_cluster_is_written(
    quiet: DaskInfluenceCalculator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = Points()
    kept = quiet.influences(*points.test, *points.train).persist()
    quiet.to_zarr(kept, tmp_path / "a", progress=True)
    require_whole(tmp_path / "a", expected(points, direct(points)), 2 * 3)
    assert "6/6" in capsys.readouterr().err


def test_an_error_of_a_chunk_leaves_whole_chunks(client: Client, tmp_path: Path) -> None:
    points = Points()
    calculator = calculator_of(client, direct(points))
    x, y = points.train
    broken = calculator.influences(*points.test, da.where(x == x[12, 0], np.inf, x), y)
    with pytest.raises(NonFiniteError, match="batch 3"):
        calculator.to_zarr(broken, tmp_path / "a")
    assert list((tmp_path / "a").rglob("*.partial")) == []


# --- workers and drivers that die --------------------------------------------------------------


class KilledRun:
    """Influences to a store, of which workers are killed before their third scores."""

    def __init__(self, client: Client, directory: Path, kills: int) -> None:
        client.wait_for_workers(2)
        points = Points()
        self.marks, self.store = directory / "marks", directory / "store"
        self.marks.mkdir()
        calculator = calculator_of(client, Waiting.of(points, self.marks))
        influences = calculator.influences(*points.test, *points.train)
        writing = threading.Thread(
            target=calculator.to_zarr, args=(influences, self.store), daemon=True
        )
        writing.start()
        self.killed = self._kill_those_that_wait(kills)
        (self.marks / "go").touch()
        writing.join(timeout=60)
        assert not writing.is_alive()
        require_whole(self.store, expected(points, direct(points)), 2 * 3)

    def _kill_those_that_wait(self, count: int) -> set[str]:
        """Both workers wait in the middle of their work; some are killed there."""
        deadline = time.monotonic() + 60
        waiting: list[str] = []
        while len(waiting) < 2 and time.monotonic() < deadline:
            waiting = sorted(mark[1] for mark in marks_of(self.marks, "waiting"))
            time.sleep(0.02)
        assert len(waiting) == 2
        for process in waiting[:count]:
            os.kill(int(process), signal.SIGKILL)
        return set(waiting[:count])

    def made_again(self, what: str) -> dict[tuple[str, ...], set[str]]:
        """What was computed more than once -> in which processes."""
        made: dict[tuple[str, ...], list[str]] = {}
        for _, *about, process, _ in marks_of(self.marks, what):
            made.setdefault(tuple(about), []).append(process)
        return {about: {*some} for about, some in made.items() if len(some) > 1}


def test_a_run_outlives_the_death_of_a_worker(client: Client, tmp_path: Path) -> None:
    run = KilledRun(client, tmp_path, kills=1)
    scores, factors = run.made_again("scores"), run.made_again("factors")
    # At most what the dead one had made, which are two scores and the factors of all rows; and what
    # had gone into a chunk that it was writing or had just written.
    assert len(scores) <= NUM_CHUNKS // 2
    assert len(factors) <= len(TEST_CHUNKS)
    assert len(marks_of(run.marks, "scores")) == NUM_CHUNKS + len(scores)


def test_a_run_outlives_the_death_of_all_workers(client: Client, tmp_path: Path) -> None:
    run = KilledRun(client, tmp_path, kills=2)
    assert len(run.killed) == 2
    assert len(run.made_again("scores")) <= 4


def test_a_run_whose_driver_was_killed_goes_on(client: Client, tmp_path: Path) -> None:
    marks, store = tmp_path / "marks", tmp_path / "store"
    marks.mkdir()
    code = (
        "import sys, pathlib, dask_cases; dask_cases.run_that_is_killed(*map(pathlib.Path, {}), 7)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code.format([str(store), str(marks)])],
        env={**os.environ, "PYTHONPATH": str(HERE)},
    )
    assert run.returncode == -signal.SIGKILL
    before = files_of(store)
    assert 0 < len(before) < 6
    points = Points()
    model = Killing.of(points, marks)
    model.kill_at = 1000
    calculator = calculator_of(client, model)
    calculator.to_zarr(calculator.influences(*points.test, *points.train), store)
    require_whole(store, expected(points, direct(points)), 2 * 3)
    after = files_of(store)
    assert {name: after[name] for name in before} == before


# --- converters and datasets -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "int64", "bool", "<c8"])
def test_a_converter_preserves_values_dtypes_and_shapes(dtype: str) -> None:
    converter = TorchNumpyConverter()
    values = np.arange(6).reshape(2, 3).astype(dtype)
    read_only = values.copy()
    read_only.flags.writeable = False
    swapped = values.astype(values.dtype.newbyteorder(">"))
    for array in (values, read_only, swapped, np.asfortranarray(values), values[::-1, ::-1]):
        tensor = converter.from_numpy(array)
        assert tensor.shape == (2, 3)
        back = converter.to_numpy(tensor.clone().requires_grad_(tensor.is_floating_point()))
        assert back.dtype == np.dtype(dtype)
        assert (back == array).all()
    assert converter.from_numpy(np.array(3)).shape == ()


def test_a_converter_shares_memory_but_never_that_which_is_read_only() -> None:
    converter, values = TorchNumpyConverter(), np.zeros(3)
    converter.from_numpy(values)[0] = 1.0
    assert values[0] == 1.0
    values.flags.writeable = False
    converter.from_numpy(values)[0] = 2.0
    assert values[0] == 1.0


def test_a_converter_moves_to_its_device() -> None:
    tensor = TorchNumpyConverter("meta").from_numpy(np.zeros((2, 3)))
    assert tensor.device.type == "meta"
    assert TorchNumpyConverter(torch.device("cpu")).from_numpy(np.zeros(2)).device.type == "cpu"


def test_a_converter_refuses_what_has_no_counterpart() -> None:
    converter = TorchNumpyConverter()
    with pytest.raises(DtypeError, match=r"bfloat16.*torch.float32"):
        converter.to_numpy(torch.zeros(2, dtype=torch.bfloat16))
    with pytest.raises(DtypeError, match="datetime64"):
        converter.from_numpy(np.zeros(2, dtype="datetime64[s]"))
    with pytest.raises(DtypeError, match="object"):
        converter.from_numpy(np.zeros(2, dtype=object))
    with pytest.raises(ArgumentTypeError, match="list"):
        converter.from_numpy([1.0])
    with pytest.raises(ArgumentTypeError, match="ndarray"):
        converter.to_numpy(np.zeros(2))


class Items(Dataset):
    """Items from a function, and how often each was read."""

    def __init__(self, item: Callable[[int], object], length: int | None) -> None:
        self.item, self.length = item, length
        self.reads: list[int] = []

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("no length")
        return self.length

    def __getitem__(self, index: int) -> object:
        self.reads.append(index)
        return self.item(index)


def computed(*arrays):
    return dask.compute(*arrays, scheduler="synchronous")


def test_a_dataset_becomes_lazy_arrays_of_its_dtypes() -> None:
    x, y = torch.randn(7, 2, 3), torch.arange(7)
    dataset = Items(lambda i: (x[i], y[i], float(i), np.int8(i), i % 2 == 0), 7)
    arrays = torch_dataset_to_dask_array(dataset, chunk_size=3)
    assert dataset.reads == [0]
    assert [a.shape for a in arrays] == [(7, 2, 3), (7,), (7,), (7,), (7,)]
    assert arrays[0].chunks == ((3, 3, 1), (2,), (3,))
    assert [str(a.dtype) for a in arrays] == ["float32", "int64", "float64", "int8", "bool"]
    found = computed(*arrays)
    assert (found[0] == x.numpy()).all()
    assert (found[1] == y.numpy()).all()
    assert found[2].tolist() == found[3].tolist() == list(range(7))
    assert [a.dtype for a in found] == [a.dtype for a in arrays]
    assert sorted(dataset.reads) == [0, *range(7)]
    assert [a._meta.dtype for a in arrays] == [a.dtype for a in arrays]


def test_single_entries_casts_and_parts_of_a_dataset() -> None:
    (only,) = torch_dataset_to_dask_array(Items(lambda i: torch.full((2,), i), 5), 2)
    assert computed(only)[0].tolist() == [[i, i] for i in range(5)]
    dataset = TensorDataset(torch.ones(6, 2).double(), torch.arange(6))
    cast = torch_dataset_to_dask_array(dataset, 4, total_size=5, resulting_dtype=np.float32)
    assert [a.dtype for a in cast] == [np.float32, np.float32]
    assert [a.shape for a in cast] == [(5, 2), (5,)]
    assert computed(cast[1])[0].tolist() == [0, 1, 2, 3, 4]
    mixed = torch_dataset_to_dask_array(Items(lambda i: i if i else 0.5, None), 2, 3, "float32")
    assert computed(*mixed)[0].tolist() == [0.5, 1.0, 2.0]


def test_a_dataset_is_in_the_graph_once(client: Client) -> None:
    big = TensorDataset(torch.zeros(1000, 100), torch.zeros(1000))
    sizes = []
    for chunk_size in (500, 50):
        x, _ = torch_dataset_to_dask_array(big, chunk_size)
        sizes.append(len(cloudpickle.dumps(dict(x.__dask_graph__()))))
    assert sizes[0] < 2 * 1000 * 100 * 4
    assert sizes[1] - sizes[0] < 1000 * 100
    assert x.sum().compute() == 0


def test_influences_of_a_dataset(client: Client) -> None:
    points = Points()
    p, model = points.problem, direct(points)
    train = torch_dataset_to_dask_array(TensorDataset(p.x, p.y), 5)
    test = torch_dataset_to_dask_array(TensorDataset(p.x_test, p.y_test), 3)
    found = calculator_of(client, model).influences(*test, *train).compute()
    assert error_of(found, model.influences(p.x_test, p.y_test, p.x, p.y)) < 1e-12


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class Indexed:
    """Items without a length."""

    def __getitem__(self, index: int) -> float:
        return [0.0, 1.0, 2.0][index]


DATASETS = {
    "iterable": (Endless(), {}, ArgumentTypeError, "items by their position"),
    "a generator": (iter([1.0]), {}, ArgumentTypeError, "items by their position"),
    "no length": (Indexed(), {}, ArgumentError, "total_size is needed: Indexed"),
    "too many": ([1.0, 2.0], {"total_size": 3}, ArgumentError, "total_size is 3, but .* 2 points"),
    "no points": ([], {}, DataError, "empty"),
    "no total": ([1.0], {"total_size": 0}, ArgumentError, "total_size must be >= 1"),
    "a string": (["a"], {}, ArgumentTypeError, "entry 0 of item 0 .* got str"),
    "objects": ([np.array([None])], {}, DtypeError, "object"),
    "no entries": ([()], {}, DataError, "no entries"),
    "no dtype": ([1.0], {"resulting_dtype": "much"}, ArgumentTypeError, "resulting_dtype"),
    "bfloat16": ([torch.zeros(2).bfloat16()], {}, DtypeError, "bfloat16"),
}


@pytest.mark.parametrize("case", DATASETS)
def test_datasets_that_cannot_be_used_are_refused(case: str) -> None:
    dataset, arguments, error, message = DATASETS[case]
    with pytest.raises(error, match=message):
        torch_dataset_to_dask_array(dataset, 2, **arguments)
    with pytest.raises(ArgumentError, match="chunk_size"):
        torch_dataset_to_dask_array([1.0], 0)


ITEMS = {
    "shape": ([torch.zeros(2), torch.zeros(2), torch.zeros(3)], ShapeError, r"item 2 .* \(3,\)"),
    "dtype": ([1.0, 2.0, 3], DtypeError, "item 2 .* int64, .* resulting_dtype"),
    "entries": ([(1.0, 2.0), (1.0,)], DataError, "item 1 of dataset has 1 entries"),
    "kind": ([1.0, "a"], ArgumentTypeError, "item 1"),
}


@pytest.mark.parametrize("case", ITEMS)
def test_items_that_differ_are_errors_of_their_chunk(case: str) -> None:
    dataset, error, message = ITEMS[case]
    arrays = torch_dataset_to_dask_array(dataset, 2)
    with pytest.raises(error, match=message):
        computed(*arrays)


def test_a_dataset_shorter_than_was_said_is_noticed() -> None:
    (array,) = torch_dataset_to_dask_array(Indexed(), 2, total_size=4)
    with pytest.raises(DataError, match="no item 3"):
        computed(array)
    (array,) = torch_dataset_to_dask_array(Indexed(), 2, total_size=3)
    assert computed(array)[0].tolist() == [0.0, 1.0, 2.0]
