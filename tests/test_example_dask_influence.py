"""The example computes on two workers what the model does in one process, at a reduced size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from example_scripts import EXAMPLES, loaded

# One worker of pytest-xdist has all of them, and the script runs once.
pytestmark = [pytest.mark.program, pytest.mark.xdist_group("dask_influence")]

NUM_TRAIN = 300


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return loaded("dask_influence")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The script in a process of its own, whose workers import it again."""
    output = tmp_path_factory.mktemp("example") / "new" / "folder"
    arguments = ["--num-train", str(NUM_TRAIN), "--output", str(output)]
    finished = subprocess.run(
        [sys.executable, str(EXAMPLES / "dask_influence.py"), *arguments],
        env={**os.environ, "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        check=True,
    )
    return output, finished.stdout


def test_the_store_has_the_influences_of_the_model(example: ModuleType, run) -> None:
    import zarr

    digits = example.split_digits(NUM_TRAIN, seed=0)
    influence = example.fitted(example.trained(digits, seed=0), digits)
    expected = influence.influences(*digits.test.tensors, *digits.train.tensors)
    stored = zarr.open_array(str(run[0] / "influences.zarr"))
    assert stored.shape == (1797 - NUM_TRAIN, NUM_TRAIN)
    found = torch.from_numpy(stored[...])
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_the_extremes_are_those_of_the_whole_matrix(example: ModuleType, run) -> None:
    import dask.array as da

    digits = example.split_digits(NUM_TRAIN, seed=0)
    model = example.trained(digits, seed=0)
    influences = da.from_zarr(str(run[0] / "influences.zarr"))
    found = example.extremes(influences, model, digits)
    whole = torch.from_numpy(influences.compute())[found.chosen]
    assert torch.equal(found.helpful, whole.topk(example.TOP).indices)
    assert torch.equal(found.harmful, whole.topk(example.TOP, largest=False).indices)
    assert bool((found.values[:, 0] > 0).all())
    assert bool((found.values[:, 1] < 0).all())


def test_the_script_reports_and_draws(run) -> None:
    import matplotlib.image

    output, printed = run
    assert printed.count("test point") == printed.count("helpful:") == 5
    assert "wrote" in printed
    picture = matplotlib.image.imread(output / "dask_influence.png")[..., :3]
    assert picture.shape[:2] == (745, 1200)
    is_red = (picture[..., 0] > 0.7) & (picture[..., 1] < 0.3)
    assert is_red[:, :130].sum() == 0
    assert is_red.sum() > 1000
