"""The example finds the same influences on two processes, started by torchrun, as on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
from example_scripts import EXAMPLES, loaded

from hessops.influence import DirectInfluence

# One worker of pytest-xdist has all of them, and the script runs once.
pytestmark = [pytest.mark.program, pytest.mark.xdist_group("distributed_influence")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What is printed, and what is written, by the number of processes."""
    output = tmp_path_factory.mktemp("examples")
    script = str(EXAMPLES / "distributed_influence.py")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = {}
    for count, command in ((1, []), (2, torchrun)):
        folder = output / str(count)
        done = subprocess.run(
            [sys.executable, *command, script, "--output", str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found[count] = done.stdout, torch.load(folder / "influences.pt"), folder
    return found


@pytest.mark.slow
def test_each_process_scores_its_shard(runs) -> None:
    printed, found, _ = runs[2]
    assert "rank 0 of 2: 600 training points" in printed
    assert "rank 1 of 2: 600 training points" in printed
    assert "5 of 5 systems solved" in printed
    assert found["owners"].tolist() == [0] * 600 + [1] * 600
    assert found["scores"].shape == (5, 1200)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(runs) -> None:
    one, two = (runs[count][1]["scores"] for count in (1, 2))
    assert (two - one).norm() < 1e-3 * one.norm()
    assert torch.equal(one.topk(5, dim=1).indices, two.topk(5, dim=1).indices)


@pytest.mark.slow
def test_it_is_what_a_direct_solve_gives(runs, monkeypatch) -> None:
    example = loaded("distributed_influence")
    monkeypatch.delenv("RANK", raising=False)
    with example.process_group():
        digits = example.split_digits()
        model = example.trained(digits)
        chosen = example.misread(model, digits)
    x, y = digits.train.tensors
    direct = DirectInfluence(
        model.double(),
        torch.nn.CrossEntropyLoss(),
        example.WEIGHT_DECAY,
        second_order_mode="generalized_gauss_newton",
    ).fit([(x.double(), y)])
    test = digits.x_test[chosen].double(), digits.y_test[chosen]
    expected = direct.influences(*test, x.double(), y)
    found = runs[2][1]["scores"].double()
    assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.slow
def test_the_picture_shows_both_shards(runs) -> None:
    folder: Path = runs[2][2]
    picture = matplotlib.image.imread(folder / "distributed_influence.png")[..., :3]
    assert picture.shape[0] > 700
    for color in ((0.122, 0.467, 0.706), (1.0, 0.498, 0.055)):
        distance = abs(picture - list(color)).sum(axis=2)
        assert (distance < 0.05).sum() > 1000
