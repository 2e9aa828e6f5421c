r"""
Data larger than memory
=======================

Operators and influences take any iterable of batches that can be iterated again. It may read them
from disk: what is held at once is a batch, whatever the number of points.

This recipe reads a memory-mapped file, measures the memory of a product, and finds the most
influential points of the file without the matrix of all influences.
"""

# %%
# A file of points
# ----------------
#
# Made here, batch by batch, in a temporary folder: 12 000 points of 512 features, 25 MB. With a
# thousand times as many, nothing below changes but the time it takes. At four places lie points
# that are asked about later.

import tempfile
import textwrap
import threading
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from hessops import BatchStream, GeneralizedGaussNewtonOperator, HessianOperator
from hessops.errors import DataError, OneShotDataError
from hessops.influence import EkfacInfluence, SequentialInfluenceCalculator

NUM_POINTS, NUM_FEATURES, BATCH = 12_000, 512, 500
torch.manual_seed(0)
teacher = torch.randn(NUM_FEATURES, 5)
asked = torch.randn(4, NUM_FEATURES)
classes = (asked @ teacher).argmin(dim=1)  # not what the teacher says: they stand out
places = [123, 5_000, 9_876, 11_999]

folder = tempfile.TemporaryDirectory()
file_x, file_y = Path(folder.name, "x.npy"), Path(folder.name, "y.npy")
x = np.lib.format.open_memmap(file_x, "w+", np.float32, (NUM_POINTS, NUM_FEATURES))
y = np.lib.format.open_memmap(file_y, "w+", np.int64, (NUM_POINTS,))
for start in range(0, NUM_POINTS, BATCH):
    some = torch.randn(BATCH, NUM_FEATURES)
    x[start : start + BATCH] = some
    y[start : start + BATCH] = (some @ teacher).argmax(dim=1)
x[places], y[places] = asked, classes
del x, y  # written

# %%
# The batches
# -----------
#
# A class with ``__iter__`` is enough; ``__len__``, the number of batches, is for progress bars.
# What is read is copied out of the map, so that pages of the file need not stay. The order is the
# same in every pass, and so are the points.


class RowsOfFile(IterableDataset):
    """Batches of the first points of two arrays on disk."""

    def __init__(self, num_points, batch_size):
        self.num_points, self.batch_size = num_points, batch_size

    def __len__(self):
        return -(-self.num_points // self.batch_size)

    def __iter__(self):
        x, y = np.load(file_x, mmap_mode="r"), np.load(file_y, mmap_mode="r")
        for start in range(0, self.num_points, self.batch_size):
            rows = slice(start, min(start + self.batch_size, self.num_points))
            yield torch.from_numpy(np.array(x[rows])), torch.from_numpy(np.array(y[rows]))


train = RowsOfFile(NUM_POINTS, BATCH)
model = nn.Sequential(nn.Linear(NUM_FEATURES, 8), nn.Tanh(), nn.Linear(8, 5))
loss = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for some, values in train:
    optimizer.zero_grad()
    loss(model(some), values).backward()
    optimizer.step()

# %%
# Memory against the number of points
# -----------------------------------
#
# ``cache`` says what may stay on the device: ``False`` keeps nothing, ``True`` all, a number of
# bytes all if it fits, and the default, ``"auto"``, is a number: 1 GiB. A part of the data is never
# kept. That they do not fit shows when the budget is full; what was kept is then let go.
#
# The memory of the process is watched while it computes two products (on Linux; elsewhere nothing
# is drawn). Pages of files do not count; blocks that the C library keeps for later use do.

STATM = Path("/proc/self/statm")


def held():
    """Memory of this process, without files, in MB."""
    resident, shared = map(int, STATM.read_text().split()[1:3])
    return (resident - shared) * 4096 / 1e6


def peak_of(function):
    """The most that was held while a function ran, in MB."""
    seen, done = [held()], threading.Event()

    def watch():
        while not done.wait(0.001):
            seen.append(held())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        function()
    finally:
        done.set()
        watcher.join()
    return max(seen)


def two_products(num_points, cache):
    ggn = GeneralizedGaussNewtonOperator(model, loss, RowsOfFile(num_points, BATCH), cache=cache)
    vector = torch.ones(ggn.input_size)
    ggn.apply(vector)
    ggn.apply(vector)
    return ggn


counts = [2_000, 4_000, 8_000, 12_000]
caches = {"cache=False": False, "cache=10_000_000": 10_000_000, "cache=True": True}
if STATM.exists():
    two_products(2 * BATCH, False)  # what torch sets up once is none of the data's
    before = held()
    figure, ax = plt.subplots(figsize=(7.2, 4), layout="constrained")
    for label, cache in caches.items():
        peaks = [peak_of(lambda n=n, c=cache: two_products(n, c)) - before for n in counts]
        ax.plot(counts, peaks, marker="o", label=label)
        print(
            f"{label:17}",
            "  ".join(f"{n:6}: {p:5.1f} MB" for n, p in zip(counts, peaks, strict=True)),
        )
    sizes = [n * NUM_FEATURES * 4 / 1e6 for n in counts]
    ax.plot(counts, sizes, color="0.6", linestyle=":", label="size of the points")
    ax.set(xlabel="points", ylabel="memory beyond the model (MB)", xticks=counts)
    ax.legend(frameon=False)
    plt.show()

# %%
# Reading takes time, and ``cache=False`` reads the file for every product. Where the data fit, keep
# them; several operators share what is kept if each is given the same ``BatchStream``:

stream = BatchStream(train, cache=50_000_000)
ggn = GeneralizedGaussNewtonOperator(model, loss, stream)
hessian = HessianOperator(model, loss, stream)
ggn.apply(torch.ones(ggn.input_size))
hessian.apply(torch.ones(ggn.input_size))
print(hessian)
del stream, ggn, hessian

# %%
# The most influential points of the file
# ---------------------------------------
#
# ``fit`` of EKFAC passes over the data three times and keeps factors of the size of the layers. The
# calculator then computes one batch of test points after the other; ``top_k`` keeps 2·k numbers for
# each test point.

influence = EkfacInfluence(
    model, update_diagonal=True, regularization=1e-3, loss=loss, cache=False
).fit(train)
calculator = SequentialInfluenceCalculator(influence)
print(calculator.estimate_memory([(asked, classes)], train))

influences = calculator.influences([(asked, classes)], train)
helpful = influences.top_k(3)
print(helpful)

# %%
# The first of each is the test point itself, where it was put:

assert helpful.indices[:, 0].tolist() == places

# %%
# Here all influences fit in memory as well, and are the same:

everything = influences.compute()
assert torch.equal(helpful.indices, everything.topk(3).indices)
print(tuple(everything.shape))

# %%
# What is refused
# ---------------
#
# A generator is used up after one pass, and positions in a shuffled order mean nothing. Data that
# change from pass to pass are found out by a fingerprint of each pass.

for wrong in (
    lambda: BatchStream(batch for batch in train),
    lambda: calculator.influences(
        [(asked, classes)], DataLoader(TensorDataset(asked, classes), shuffle=True)
    ),
):
    try:
        wrong()
    except (OneShotDataError, DataError) as error:
        print(textwrap.fill(str(error), 84))
folder.cleanup()

# %%
# For your own data
# -----------------
#
# * A ``DataLoader`` with ``shuffle=False`` over a map-style dataset that reads from disk does as
#   well, and its workers read ahead. With workers, an ``IterableDataset`` must give each of them
#   other points.
# * Results that are larger than memory are written with ``to_zarr`` (extra ``zarr``), where a run
#   that was interrupted goes on; :doc:`/gallery/dask_influence` does it on several workers.
#
# See also
# --------
#
# * :doc:`/concepts/data`: streams and the cache
# * :doc:`/influence`: influence models, and which of them need the data after ``fit``
# * :doc:`several_machines`: shards of data over processes
# * :doc:`/scaling`: models that are large
