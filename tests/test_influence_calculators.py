from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from influence_cases import BLOCKS, CASES, Problem
from reference import relative_error
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from hessops import MatrixOperator
from hessops.errors import (
    ArgumentError,
    ArgumentTypeError,
    DataChangedError,
    DataError,
    DtypeError,
    NonFiniteError,
    NotFittedError,
    ShapeError,
    StoreError,
)
from hessops.influence import (
    CgInfluence,
    DirectInfluence,
    Influence,
    InfluenceFunctionModel,
    LazyInfluences,
    LissaInfluence,
    SequentialInfluenceCalculator,
)

HERE = Path(__file__).parent
Loader = list[tuple[Tensor, Tensor]]


class Collections:
    """Test points in batches of 4, 1 and 3, training points in ragged ones, some scores equal."""

    def __init__(self, case: str = "direct hessian", blocks: str = "layers") -> None:
        self.problem = Problem(num_train=13, num_test=8)
        p = self.problem
        p.x[9], p.y[9] = p.x[2], p.y[2]  # a duplicate, so that two influences are equal
        self.model = CASES[case].build(p, BLOCKS[blocks]).fit(p.batches((5, 1, 5, 2)))
        self.calculator = SequentialInfluenceCalculator(self.model)
        self.test = list(zip(p.x_test.split([4, 1, 3]), p.y_test.split([4, 1, 3]), strict=True))
        self.train = p.batches((5, 1, 5, 2))

    def lazy(self, mode: str = "up") -> LazyInfluences:
        return self.calculator.influences(self.test, self.train, mode)

    def expected(self, mode: str = "up") -> Tensor:
        p = self.problem
        return self.model.influences(p.x_test, p.y_test, p.x, p.y, mode)


@pytest.mark.parametrize("mode", ["up", "perturbation"])
def test_chunks_compute_and_a_store_agree_with_the_model(mode: str, tmp_path: Path) -> None:
    data = Collections()
    expected, lazy = data.expected(mode), data.lazy(mode)
    assert lazy.shape == tuple(expected.shape)
    assert relative_error(lazy.compute(), expected) < 1e-12
    covered = torch.zeros(8, 13)
    for chunk in lazy:
        assert relative_error(chunk.values, expected[chunk.test, chunk.train]) < 1e-12
        covered[chunk.test, chunk.train] += 1
    assert (covered == 1).all()
    for rows, columns in ((None, None), (3, 4), (1, 13), (8, 1)):
        array = lazy.to_zarr(tmp_path / f"{rows}{columns}", row_chunk=rows, column_chunk=columns)
        assert relative_error(torch.from_numpy(array[...]), expected) < 1e-12
        assert array.dtype == "float64"


def test_factors_are_computed_once_for_each_test_batch() -> None:
    data = Collections()
    sizes: list[int] = []

    class Counting(DirectInfluence):
        def factors_of(self, batch):
            sizes.append(batch.size)
            return super().factors_of(batch)

    p = data.problem
    model = Counting(p.model, p.loss, 1e-3).fit(data.train)
    lazy = SequentialInfluenceCalculator(model).influences(data.test, data.train)
    assert sizes == []
    lazy.compute()
    assert sizes == [4, 1, 3]


@pytest.mark.parametrize("largest", [True, False])
def test_the_top_k_are_those_of_the_whole_matrix_and_ties_go_to_the_earlier(largest: bool) -> None:
    data = Collections()
    expected = data.lazy().compute()
    for k in (1, 4, 13, 50):
        top = data.lazy().top_k(k, largest=largest)
        order = expected.argsort(dim=1, descending=largest, stable=True)[:, :k]
        assert torch.equal(top.values, expected.gather(1, order))
        assert torch.equal(top.indices, order)
        assert top.indices.shape == (8, min(k, 13))


def test_factors_go_through_every_form_they_can_have(tmp_path: Path) -> None:
    data = Collections()
    calculator, expected = data.calculator, data.expected()
    lazy = calculator.influence_factors(data.test)
    stored = lazy.to_zarr(tmp_path / "factors", row_chunk=3)
    assert torch.equal(torch.from_numpy(stored[...]), lazy.compute())
    whole = lazy.compute()
    named = data.model.space.unflatten(whole)
    for factors in (lazy, whole, named, stored, zarr.open_array(str(tmp_path / "factors"))):
        influences = calculator.influences_from_factors(factors, data.train)
        assert influences.shape == (8, 13)
        assert relative_error(influences.compute(), expected) < 1e-12


def test_more_factors_than_are_read_at_once() -> None:
    data = Collections()
    factors = torch.randn(300, data.model.space.size, dtype=torch.float64)
    lazy = data.calculator.influences_from_factors(factors, data.train)
    p = data.problem
    expected = data.model.influences_from_factors(factors, p.x, p.y)
    assert relative_error(lazy.compute(), expected) < 1e-12
    assert lazy.top_k(2).values.shape == (300, 2)


@pytest.mark.parametrize("mode", ["up", "perturbation"])
def test_a_killed_run_goes_on_to_the_same_bytes(mode: str, tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "interrupted_run.py"), str(tmp_path), "0", mode]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(finished.stdout)
    print(report)
    assert report["kills"] >= 12
    assert report["others"] == []
    assert report["last"] == 0
    # Killed while there was nothing yet, at the first chunk, and at several stages after it.
    assert len(set(report["held"])) >= 8
    assert report["same"]


def measured_run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Large blocks are given back when they are freed, so that a stage begins with none to reuse.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, str(HERE / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment)


def test_peak_memory_does_not_grow_with_the_training_points(tmp_path: Path) -> None:
    finished = measured_run("peak_memory.py", str(tmp_path), "1000", "4000")
    few, many = json.loads(finished.stdout)
    print(f"peak at 1000 points: {few} KiB, at 4000: {many} KiB")
    assert few > 0
    # The inputs of the points that are more take 48,000 KiB.
    assert many - few < 8_000


# --- stores --------------------------------------------------------------------------------


def test_a_second_run_computes_nothing_again(tmp_path: Path) -> None:
    data = Collections()
    data.lazy().to_zarr(tmp_path / "a", row_chunk=2, column_chunk=5)
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "a").rglob("*") if f.is_file()}
    data.lazy().to_zarr(tmp_path / "a", row_chunk=2, column_chunk=5)
    assert before == {f: f.stat().st_mtime_ns for f in (tmp_path / "a").rglob("*") if f.is_file()}


def test_only_missing_chunks_are_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Collections()
    array = data.lazy().to_zarr(tmp_path / "a", row_chunk=2, column_chunk=5)
    complete = array[...].copy()
    (tmp_path / "a" / "c" / "1" / "2").unlink()
    (tmp_path / "a" / "c" / "3" / "0").unlink()
    times = {f: f.stat().st_mtime_ns for f in (tmp_path / "a" / "c").rglob("*") if f.is_file()}
    solved: list[int] = []
    scored: list[tuple[int, int]] = []
    factors_of, scores_of = InfluenceFunctionModel.factors_of, InfluenceFunctionModel.scores_of

    def solving(self, batch):
        solved.append(batch.size)
        return factors_of(self, batch)

    def scoring(self, factors, batch, mode):
        scored.append((len(factors), batch.size))
        return scores_of(self, factors, batch, mode)

    monkeypatch.setattr(InfluenceFunctionModel, "factors_of", solving)
    monkeypatch.setattr(InfluenceFunctionModel, "scores_of", scoring)
    again = data.lazy().to_zarr(tmp_path / "a", row_chunk=2, column_chunk=5)
    assert (again[...] == complete).all()
    # Test points 2 and 3 are in the batch of 4, 6 and 7 in that of 3; training points 10 to 12 are
    # in the batches of 5 and 2, 0 to 4 in the first one.
    assert solved == [4, 3]
    assert scored == [(2, 5), (2, 2), (2, 5)]
    assert all(f.stat().st_mtime_ns == time for f, time in times.items())


def other_parameters(data: Collections) -> LazyInfluences:
    with torch.no_grad():
        data.problem.model.last.bias[0] += 1e-9
    model = data.model.fit(data.train)
    return SequentialInfluenceCalculator(model).influences(data.test, data.train)


def other_regularization(data: Collections) -> LazyInfluences:
    model = data.model.with_regularization(2e-3)
    return SequentialInfluenceCalculator(model).influences(data.test, data.train)


def other_blocks(data: Collections) -> LazyInfluences:
    other = Collections(blocks="parameters")
    return other.calculator.influences(data.test, data.train)


def other_order(data: Collections) -> LazyInfluences:
    return data.calculator.influences(data.test, data.train[::-1])


def other_loss(data: Collections) -> LazyInfluences:
    p = data.problem
    model = DirectInfluence(p.model, lambda out, y: 1.01 * p.loss(out, y), 1e-3, "layer_wise")
    return SequentialInfluenceCalculator(model.fit(data.train)).influences(data.test, data.train)


def other_fit_data(data: Collections) -> LazyInfluences:
    model = data.model.fit(data.train[:-1])
    return SequentialInfluenceCalculator(model).influences(data.test, data.train)


def other_class(data: Collections) -> LazyInfluences:
    model = Collections("cg", "layers").model
    return SequentialInfluenceCalculator(model).influences(data.test, data.train)


CHANGES: dict[str, tuple[Callable[[Collections], LazyInfluences], str]] = {
    "parameters": (other_parameters, "parameters"),
    "regularization": (other_regularization, "regularization"),
    "blocks": (other_blocks, "configuration"),
    "order": (other_order, "train"),
    "loss": (other_loss, "losses"),
    "fit data": (other_fit_data, "fit data"),
    "class": (other_class, "configuration"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_store_of_another_computation_is_refused(change: str, tmp_path: Path) -> None:
    data = Collections()
    data.lazy().to_zarr(tmp_path / "a")
    files = {f: f.read_bytes() for f in (tmp_path / "a").rglob("*") if f.is_file()}
    make, named = CHANGES[change]
    with pytest.raises(StoreError, match=f"another computation .*{named}"):
        make(data).to_zarr(tmp_path / "a")
    assert files == {f: f.read_bytes() for f in (tmp_path / "a").rglob("*") if f.is_file()}


def test_other_chunks_and_another_mode_are_refused(tmp_path: Path) -> None:
    data = Collections()
    data.lazy().to_zarr(tmp_path / "a", row_chunk=2)
    with pytest.raises(StoreError, match=r"chunks: stored \[2, 13\], now \[3, 13\]"):
        data.lazy().to_zarr(tmp_path / "a", row_chunk=3)
    with pytest.raises(StoreError, match="mode: stored up, now perturbation"):
        data.lazy("perturbation").to_zarr(tmp_path / "a", row_chunk=2)


def test_what_is_not_a_store_is_left_alone(tmp_path: Path) -> None:
    data = Collections()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("do not touch")
    with pytest.raises(StoreError, match="not empty"):
        data.lazy().to_zarr(tmp_path / "full")
    (tmp_path / "file").write_text("a file")
    with pytest.raises(StoreError, match="is a file"):
        data.lazy().to_zarr(tmp_path / "file")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "hessops.json").write_text('{"format":')
    with pytest.raises(StoreError, match="not a manifest"):
        data.lazy().to_zarr(tmp_path / "broken")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "do not touch"
    assert (tmp_path / "file").read_text() == "a file"


def test_a_fit_that_would_be_rounded_differently_is_not_stored(tmp_path: Path) -> None:
    p = Problem(num_train=12)
    loader = DataLoader(TensorDataset(p.x, p.y), batch_size=5, shuffle=True)
    ggn = "generalized_gauss_newton"
    uncached = CgInfluence(p.model, p.loss, 1e-2, second_order_mode=ggn, cache=False).fit(loader)
    lazy = SequentialInfluenceCalculator(uncached).influences(p.batches((6, 6)), p.batches((12,)))
    with pytest.raises(DataError, match="cache=True"):
        lazy.to_zarr(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    cached = CgInfluence(p.model, p.loss, 1e-2, second_order_mode=ggn, cache=True).fit(loader)
    lazy = SequentialInfluenceCalculator(cached).influences(p.batches((6, 6)), p.batches((12,)))
    assert lazy.to_zarr(tmp_path / "b").shape == (12, 12)


def test_bfloat16_has_no_store(tmp_path: Path) -> None:
    x, y = torch.randn(6, 3).bfloat16(), torch.randn(6, 1).bfloat16()

    class Scaled(InfluenceFunctionModel):
        def _invert(self, operator, regularization):
            from hessops import IdentityOperator

            return 2.0 * IdentityOperator(4, dtype=torch.bfloat16, space=operator.space)

    model = Scaled(nn.Linear(3, 1).bfloat16(), nn.MSELoss()).fit([(x, y)])
    lazy = SequentialInfluenceCalculator(model).influences([(x, y)], [(x, y)])
    with pytest.raises(DtypeError, match="bfloat16"):
        lazy.to_zarr(tmp_path / "a")


# --- order and input -----------------------------------------------------------------------


def test_loaders_that_shuffle_are_refused() -> None:
    data = Collections()
    p = data.problem
    shuffling = DataLoader(TensorDataset(p.x, p.y), batch_size=5, shuffle=True)
    for call in (
        lambda: data.calculator.influences(shuffling, data.train),
        lambda: data.calculator.influences(data.test, shuffling),
        lambda: data.calculator.influence_factors(shuffling),
    ):
        with pytest.raises(DataError, match="shuffle"):
            call()


class Turning(Sampler[int]):
    """A sampler that comes from the other end in every second pass."""

    def __init__(self, size: int) -> None:
        self.size, self.passes = size, 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        forward = range(self.size)
        return iter(forward if self.passes % 2 else reversed(forward))


def test_an_order_that_changes_is_noticed() -> None:
    data = Collections()
    p = data.problem
    loader = DataLoader(TensorDataset(p.x, p.y), batch_size=5, sampler=Turning(13))
    with pytest.raises(DataChangedError, match="train_loader gave another batch 0"):
        data.calculator.influences(data.test, loader).compute()


def test_calculators_refuse_what_they_cannot_use(tmp_path: Path) -> None:
    data = Collections()
    calculator, p = data.calculator, data.problem
    with pytest.raises(ArgumentTypeError, match="model must be an InfluenceFunctionModel"):
        SequentialInfluenceCalculator(p.model)
    with pytest.raises(NotFittedError, match=r"fit\(train_loader\)"):
        SequentialInfluenceCalculator(DirectInfluence(p.model, p.loss))
    with pytest.raises(ArgumentError, match="mode"):
        calculator.influences(data.test, data.train, "down")
    with pytest.raises(ArgumentError, match="top_k"):
        data.lazy("perturbation").top_k(2)
    with pytest.raises(ArgumentError, match="k must be"):
        data.lazy().top_k(0)
    with pytest.raises(ShapeError, match="factors"):
        calculator.influences_from_factors(torch.zeros(3, 5, dtype=torch.float64), data.train)
    with pytest.raises(ArgumentTypeError, match="factors"):
        calculator.influences_from_factors(3, data.train)
    lazy = calculator.influence_factors(data.test)
    stored = lazy.to_zarr(tmp_path / "factors", row_chunk=3)
    (tmp_path / "factors" / "c" / "1" / "0").unlink()  # as a run leaves it that was stopped
    with pytest.raises(NonFiniteError, match="factors"):
        calculator.influences_from_factors(stored, data.train).compute()


def test_a_calculator_keeps_the_fit_it_was_given() -> None:
    data = Collections()
    expected = data.expected()
    with torch.no_grad():
        data.problem.model.last.bias[0] += 1.0
    data.model.fit(data.train)
    assert relative_error(data.lazy().compute(), expected) < 1e-12


def test_progress_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    data = Collections()
    data.lazy().compute()
    assert capsys.readouterr().err == ""
    shown = SequentialInfluenceCalculator(data.model, progress=True)
    shown.influences(data.test, data.train).compute()
    assert "influences" in capsys.readouterr().err
    shown.influence_factors(data.test).compute()
    assert "influence factors" in capsys.readouterr().err


def test_the_memory_of_every_stage_is_told_before() -> None:
    data = Collections()
    up = data.calculator.estimate_memory(data.test, data.train)
    perturbation = data.calculator.estimate_memory(data.test, data.train, "perturbation")
    assert up.result == 8 * 13 * 8
    assert perturbation.result == 3 * up.result
    # The matrices of the blocks and their Cholesky factors.
    sizes = [len(where) for where in data.problem.positions("layer_wise").values()]
    assert up.fit >= 2 * 8 * sum(size**2 for size in sizes)
    assert up.factors > up.gradients > 4 * 8 * data.model.space.size
    assert up.peak < 10 * 2**20
    assert "result" in str(up)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured by /proc of Linux")
def test_the_estimated_memory_is_the_measured_one_to_a_factor_of_three() -> None:
    finished = measured_run("stage_memory.py")
    for model, stages in json.loads(finished.stdout).items():
        for stage, (estimated, measured) in stages.items():
            print(f"{model}, {stage}: estimated {estimated:.0f} MiB, measured {measured:.0f} MiB")
            assert estimated / 3 < measured < 3 * estimated, (model, stage)


# --- what a killed run may leave, and others may do --------------------------------------------


def test_a_dataset_that_turns_is_noticed() -> None:
    data = Collections()
    p = data.problem

    class Turned(torch.utils.data.Dataset):
        passes = 0

        def __len__(self) -> int:
            return 13

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            self.passes += index == 0
            place = (index + self.passes) % 13
            return p.x[place], p.y[place]

    loader = DataLoader(Turned(), batch_size=5)
    with pytest.raises(DataChangedError, match="train_loader gave another batch"):
        data.calculator.influences(data.test, loader).compute()


@pytest.mark.parametrize("first", [1, 5])
def test_inputs_of_several_shapes_have_no_perturbation(first: int, tmp_path: Path) -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).sum(dim=1)

    lengths = (first, 6 - first)
    ragged = [(torch.randn(2, n, 2).double(), torch.randn(2, 1).double()) for n in lengths]
    model = DirectInfluence(Summed(), nn.MSELoss(), 0.1).fit(ragged)
    lazy = SequentialInfluenceCalculator(model).influences(ragged[:1], ragged, "perturbation")
    with pytest.raises(ShapeError, match="batch 1 of the training points"):
        lazy.compute()
    with pytest.raises(ShapeError, match="batch 1 of the training points"):
        lazy.to_zarr(tmp_path / "a")
    up = SequentialInfluenceCalculator(model).influences(ragged[:1], ragged)
    assert up.compute().shape == (2, 4)


def test_a_chunk_that_is_not_whole_is_computed_again(tmp_path: Path) -> None:
    data = Collections()
    array = data.lazy().to_zarr(tmp_path / "a", row_chunk=2, column_chunk=5)
    complete = array[...].copy()
    chunks = [tmp_path / "a" / "c" / place for place in ("0/0", "1/1", "2/2")]
    chunks[0].write_bytes(b"")
    chunks[1].write_bytes(chunks[1].read_bytes()[:-3])
    chunks[2].write_bytes(chunks[2].read_bytes() + b"more")
    again = data.lazy().to_zarr(tmp_path / "a", row_chunk=2, column_chunk=5)
    assert (again[...] == complete).all()


def test_a_chunk_that_is_damaged_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    data = Collections()
    array = data.lazy().to_zarr(tmp_path / "a", row_chunk=2, column_chunk=5)
    chunk = tmp_path / "a" / "c" / "1" / "1"
    content = bytearray(chunk.read_bytes())
    content[7] ^= 1
    chunk.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="checksum"):
        array[...]


def test_a_description_of_another_array_is_refused(tmp_path: Path) -> None:
    data = Collections()
    data.lazy().to_zarr(tmp_path / "a")
    described = tmp_path / "a" / "zarr.json"
    text = described.read_text()
    described.write_text(text.replace("float64", "float32"))
    with pytest.raises(StoreError, match="float32"):
        data.lazy().to_zarr(tmp_path / "a")
    described.write_text(text[: len(text) // 2])
    with pytest.raises(StoreError, match="no zarr array"):
        data.lazy().to_zarr(tmp_path / "a")


def test_factors_of_another_model_are_not_taken_for_those_of_this_one(tmp_path: Path) -> None:
    data = Collections()
    other = SequentialInfluenceCalculator(data.model.with_regularization(0.5))
    foreign = other.influence_factors(data.test)
    data.calculator.influences_from_factors(foreign, data.train).to_zarr(tmp_path / "a")
    with pytest.raises(StoreError, match="test: stored"):
        data.lazy().to_zarr(tmp_path / "a")


@pytest.mark.parametrize("sizes", [(3, 3, 7), (13,)])
def test_other_batches_of_the_same_training_points_are_another_computation(
    sizes: tuple[int, ...], tmp_path: Path
) -> None:
    p = Problem(num_train=13)
    model = CASES["lissa"].build(p, "full").fit(p.batches((5, 5, 3)))
    points = p.batches((13,))
    SequentialInfluenceCalculator(model).influences(points, points).to_zarr(tmp_path / "a")
    model.fit(p.batches(sizes))
    with pytest.raises(StoreError, match="fit data"):
        SequentialInfluenceCalculator(model).influences(points, points).to_zarr(tmp_path / "a")


def test_lissa_with_a_generator_of_its_own_is_not_stored(tmp_path: Path) -> None:
    p = Problem(num_train=13)
    settings = {"second_order_mode": "generalized_gauss_newton", "warn_on_max_iteration": False}
    generator = torch.Generator().manual_seed(0)
    model = LissaInfluence(p.model, p.loss, 0.1, maxiter=5, generator=generator, **settings)
    points = p.batches((13,))
    lazy = SequentialInfluenceCalculator(model.fit(points)).influences(points, points)
    with pytest.raises(DataError, match="generator"):
        lazy.to_zarr(tmp_path / "a")


def test_matrices_that_came_from_elsewhere_are_part_of_the_manifest(tmp_path: Path) -> None:
    p = Problem()
    points = p.batches((7,))

    def stored(scale: float) -> None:
        matrix = MatrixOperator(scale * torch.eye(27, dtype=torch.float64))
        model = Influence(p.model, p.loss, 0.1, curvature=partial(_returned, matrix))
        calculator = SequentialInfluenceCalculator(model.fit(points))
        calculator.influences(points, points).to_zarr(tmp_path / "a")

    stored(1.0)
    stored(1.0)
    with pytest.raises(StoreError, match="another computation"):
        stored(2.0)


def _returned(operator: object, *arguments: object) -> object:
    return operator


def test_losses_stand_for_what_has_no_description(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = Problem()
    points = p.batches((7,))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        scale = float(os.environ["SCALE_OF_THE_LOSS"])
        return scale * nn.functional.cross_entropy(output, target)

    def calculator(scale: str) -> SequentialInfluenceCalculator:
        monkeypatch.setenv("SCALE_OF_THE_LOSS", scale)
        return SequentialInfluenceCalculator(DirectInfluence(p.model, loss, 0.1).fit(points))

    calculator("1.0").influence_factors(points).to_zarr(tmp_path / "factors")
    calculator("1.0").influences(points, points).to_zarr(tmp_path / "influences")
    with pytest.raises(StoreError, match="losses: stored"):
        calculator("2.0").influence_factors(points).to_zarr(tmp_path / "factors")
    with pytest.raises(StoreError, match="losses: stored"):
        calculator("2.0").influences(points, points).to_zarr(tmp_path / "influences")


def test_what_was_stored_is_opened_for_reading(tmp_path: Path) -> None:
    data = Collections()
    for array in (
        data.lazy().to_zarr(tmp_path / "a"),
        data.calculator.influence_factors(data.test).to_zarr(tmp_path / "b"),
    ):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 1.0


def test_factors_that_are_none_are_refused() -> None:
    data = Collections()
    calculator, size = data.calculator, data.model.space.size
    with pytest.raises(ShapeError, match="no rows"):
        calculator.influences_from_factors(torch.zeros(0, size).double(), data.train)
    masked = np.ma.masked_array(np.zeros((2, size)), mask=True)
    with pytest.raises(ArgumentTypeError, match="mask"):
        calculator.influences_from_factors(masked, data.train).compute()
    with pytest.raises(DtypeError, match="object"):
        calculator.influences_from_factors(np.full((2, size), None), data.train).compute()
    turned = np.ones((2, size), dtype=">f8")[::-1]
    assert calculator.influences_from_factors(turned, data.train).compute().shape == (2, 13)
    with pytest.raises(ArgumentError, match="row_chunk"):
        calculator.influence_factors(data.test).to_zarr("never", row_chunk=0)
