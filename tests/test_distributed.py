from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rank_checks import CHECKS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

from hessops import DistributedAveraging, HessianOperator, Objective, PointAveraging
from hessops.distributed import gather, shard
from hessops.errors import (
    ArgumentError,
    ArgumentTypeError,
    DistributedError,
    ModelError,
    RemoteError,
)
from hessops.processes import ONE_PROCESS, spread

HERE = Path(__file__).parent
# With one thread in each rank, they do not fight over the cores.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run_ranks(
    script: str, size: int, folder: Path, *arguments: str, timeout: float = 300
) -> dict[int, object]:
    """What each rank wrote, by rank; ranks that were killed are left out."""
    command = [sys.executable, str(HERE / script)]
    meeting = [str(size), str(folder / "meeting")]
    running = [
        subprocess.Popen(
            [*command, str(r), *meeting, str(folder / f"{r}.json"), *arguments],
            cwd=HERE,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(size)
    ]
    try:
        output = [process.communicate(timeout=timeout)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    found = {}
    for rank, process in enumerate(running):
        if process.returncode != -9:
            assert process.returncode == 0, output[rank]
            found[rank] = json.loads((folder / f"{rank}.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_every_check_holds_in_every_rank(size: int, tmp_path: Path) -> None:
    results = run_ranks("rank_checks.py", size, tmp_path)
    assert sorted(results) == list(range(size))
    failures = [
        f"rank {rank}, {name}:\n{trace}"
        for rank, found in results.items()
        for name, trace in found.items()
        if trace is not None
    ]
    assert not failures, "\n".join(failures)
    assert all(list(found) == list(CHECKS) for found in results.values())


@pytest.mark.slow
@pytest.mark.parametrize(("size", "victim"), [(2, 1), (3, 0), (4, 1)])
def test_when_a_rank_is_killed_the_others_are_told(size: int, victim: int, tmp_path: Path) -> None:
    results = run_ranks("rank_killed.py", size, tmp_path, str(victim))
    assert sorted(results) == [rank for rank in range(size) if rank != victim]
    for found in results.values():
        assert found["told"].startswith("DistributedError: rank ")
        assert "gone" in found["told"]
        # The group itself would wait for half an hour.
        assert found["seconds"] < 40


# --- in a group of one --------------------------------------------------------------------------


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


POINTS = TensorDataset(torch.ones(3, 2), torch.zeros(3, 1))


@pytest.mark.usefixtures("alone")
def test_a_group_of_one_gives_the_same_bits() -> None:
    model, rows = nn.Linear(2, 1), torch.randn(2, 3)
    loader = DataLoader(POINTS, batch_size=2)
    averaging = DistributedAveraging(PointAveraging())
    over_group = HessianOperator(model, nn.MSELoss(), loader, averaging=averaging)
    assert torch.equal(
        over_group.apply(rows), HessianOperator(model, nn.MSELoss(), loader).apply(rows)
    )
    assert list(shard(POINTS).indices) == [0, 1, 2]
    assert torch.equal(gather(rows), rows)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("averaging", [PointAveraging, "points", 3])
def test_only_an_averaging_of_batches_is_spread(averaging: object) -> None:
    with pytest.raises(ArgumentTypeError, match="must be an Averaging"):
        DistributedAveraging(averaging)


@pytest.mark.usefixtures("alone")
def test_averages_over_processes_are_not_nested() -> None:
    with pytest.raises(ArgumentTypeError, match="within a process"):
        DistributedAveraging(DistributedAveraging())


class Median(PointAveraging):
    def reduce(self, values, like=None, same=None):
        return torch.stack([value for value, _ in values]).median(dim=0).values


@pytest.mark.usefixtures("alone")
def test_an_averaging_with_a_sum_of_its_own_is_not_split() -> None:
    with pytest.raises(ArgumentTypeError, match="reduce of its own"):
        DistributedAveraging(Median())


@pytest.mark.usefixtures("alone")
def test_the_shape_must_be_known_beforehand() -> None:
    with pytest.raises(ArgumentError, match="like is needed"):
        DistributedAveraging().reduce([(torch.ones(2), 1)])


def by_layer() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def by_columns() -> nn.Module:
    model, mesh = nn.Sequential(nn.Linear(4, 8)), init_device_mesh("cpu", (1,))
    return parallelize_module(model, mesh, {"0": ColwiseParallel()})


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("sharded", [by_layer, by_columns])
def test_sharded_parameters_are_refused(sharded: Callable[[], nn.Module]) -> None:
    with pytest.raises(ModelError, match=r"'0.weight' is a DTensor.*get_model_state_dict"):
        Objective(sharded(), nn.MSELoss())


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield torch.ones(1)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("dataset", [Endless(), DataLoader(POINTS), iter([1, 2])])
def test_only_a_dataset_with_a_length_is_split(dataset: object) -> None:
    with pytest.raises(ArgumentTypeError, match="dataset"):
        shard(dataset)


def test_without_a_process_group_there_is_no_average_over_it() -> None:
    for build in (DistributedAveraging, lambda: shard(POINTS), lambda: gather(torch.ones(1))):
        with pytest.raises(DistributedError, match="init_process_group"):
            build()


def test_an_operator_outlives_its_process_group_and_says_so() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    loader = DataLoader(POINTS, batch_size=2)
    H = HessianOperator(nn.Linear(2, 1), nn.MSELoss(), loader, averaging=DistributedAveraging())
    H.apply(torch.ones(3))
    group = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    assert group() is None  # held by nobody: one that is left may abort the process at its exit
    with pytest.raises(DistributedError, match="was destroyed"):
        H.apply(torch.ones(3))
    with pytest.raises(DistributedError, match="was destroyed"):
        copy.copy(H).refresh()
    assert "group destroyed" in repr(H)


def test_errors_are_told_apart() -> None:
    assert issubclass(RemoteError, DistributedError)
    assert issubclass(DistributedError, RuntimeError)


# --- tasks --------------------------------------------------------------------------------------


def longest(costs: list[int], owners: Sequence[int], size: int) -> int:
    return max(sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(size))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_tasks_are_spread_by_their_cost(size: int) -> None:
    costs = [n**3 for n in (65, 129, 129, 11, 128, 128, 10, 4)]
    every = itertools.product(range(size), repeat=len(costs))
    best = min(longest(costs, owners, size) for owners in every)
    found = longest(costs, spread(costs, size), size)
    assert best <= found <= (4 / 3 - 1 / (3 * size)) * best


def test_a_process_alone_does_everything() -> None:
    assert spread([3.0, 1.0], 1) == ONE_PROCESS.owners([3.0, 1.0]) == [0, 0]
    with ONE_PROCESS.together():
        pass
    with pytest.raises(ZeroDivisionError), ONE_PROCESS.together():
        raise ZeroDivisionError
