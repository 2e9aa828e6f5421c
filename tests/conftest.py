from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# Sums do not depend on the machine's number of cores, and two workers do not fight over them.
torch.set_num_threads(1)

# The same examples in every run, and no time limit: a slow machine is not a failure.
settings.register_profile("hessops", deadline=None, derandomize=True, database=None)
settings.load_profile("hessops")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    without_gpu = pytest.mark.skip(reason="needs a CUDA device, and torch sees none here")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(without_gpu)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Make every test independent of the ones before it."""
    torch.manual_seed(0)
