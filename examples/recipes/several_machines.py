r"""
Several machines
================

Data that are spread over processes stay where they are: an operator adds up the products of all
ranks, and solvers and influences work as in one process.

They do with ``averaging=DistributedAveraging()``, and all ranks end with the same bits. This recipe
runs two ranks on this machine, and compares them with each other and with one process that has all
the data.
"""

# %%
# A model and its data
# --------------------
#
# Here they are written to a folder that all ranks read. What every rank needs is the same model,
# and access to its own points.

import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from hessops import DistributedAveraging
from hessops.errors import DistributedError
from hessops.influence import CgInfluence

torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.data / 16), torch.tensor(digits.target)
model = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).double()
loss = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(100):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()

x_train, y_train, x_test, y_test = x[:1201], y[:1201], x[1790:], y[1790:]
folder = tempfile.TemporaryDirectory()
setting = {"x": x_train, "y": y_train, "x_test": x_test, "y_test": y_test}
torch.save({"model": model.state_dict(), **setting}, Path(folder.name, "setting.pt"))

# %%
# The program of a rank
# ---------------------
#
# Every rank runs the same program, and makes the same calls in the same order. ``shard`` is the
# part of a data set that belongs to a rank: no point is left out, none comes twice. Factors are
# solved for by all ranks together; then each scores its own points, and ``gather`` joins what they
# found.
#
# It is a string here only so that this page can start it. In a file of its own it is the whole
# program.

PROGRAM = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from hessops import DistributedAveraging, GeneralizedGaussNewtonOperator
from hessops.distributed import gather, shard, together
from hessops.errors import HessopsError
from hessops.influence import CgInfluence

folder = Path(sys.argv[1])
torch.set_num_threads(1)  # the same number in all ranks
dist.init_process_group("gloo")  # "nccl" where every rank has a GPU
setting = torch.load(folder / "setting.pt")
model = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).double()
model.load_state_dict(setting["model"])
loss = nn.CrossEntropyLoss()
train = TensorDataset(setting["x"], setting["y"])

own = shard(train)
loader = DataLoader(own, batch_size=200)
influence = CgInfluence(
    model,
    loss,
    regularization=0.1,
    second_order_mode="generalized_gauss_newton",
    averaging=DistributedAveraging(),
).fit(loader)
factors = influence.influence_factors(setting["x_test"], setting["y_test"])
with together():  # an error in one rank is one in all
    parts = [influence.influences_from_factors(factors, *batch) for batch in loader]
    scores = torch.cat([torch.zeros(len(factors), 0).double(), *parts], dim=1)  # none: no parts
scores = gather(scores, dim=1)  # of all points, in every rank


# What is refused, in all ranks alike.
def random_vectors():  # other ones in each rank
    source = torch.Generator().manual_seed(dist.get_rank())
    vector = torch.randn(factors.shape[1], generator=source, dtype=torch.float64)
    averaging = DistributedAveraging()
    GeneralizedGaussNewtonOperator(model, loss, loader, averaging=averaging).apply(vector)


def repeated_points():  # 1201 points on two ranks: one of them twice
    twice = DataLoader(train, batch_size=200, sampler=DistributedSampler(train))
    averaging = DistributedAveraging()
    GeneralizedGaussNewtonOperator(model, loss, twice, averaging=averaging)


refusals = []
for wrong in (random_vectors, repeated_points):
    try:
        wrong()
    except HessopsError as error:
        refusals.append(f"{type(error).__name__}: {error}")

found = {"points": len(own), "factors": factors, "scores": scores, "refusals": refusals}
torch.save(found, folder / f"rank{dist.get_rank()}.pt")
dist.destroy_process_group()
"""
program = Path(folder.name, "program.py")
_ = program.write_text(PROGRAM)

# %%
# Two ranks on this machine
# -------------------------
#
# ``torchrun`` starts them and tells each its rank. ``python -m torch.distributed.run`` is the same,
# with the Python of this process.

torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
done = subprocess.run(
    [*torchrun, str(program), folder.name],
    env={**os.environ, "OMP_NUM_THREADS": "1"},
    capture_output=True,
    text=True,
    check=False,
)
assert done.returncode == 0, done.stderr
ranks = [torch.load(Path(folder.name, f"rank{rank}.pt")) for rank in range(2)]
folder.cleanup()
for rank, found in enumerate(ranks):
    print(f"rank {rank}: {found['points']} points, scores {tuple(found['scores'].shape)}")

# %%
# Equal to the last bit in both ranks, and to one process as far as the solver goes, which ends
# where the residual is below 1e-7 of the right-hand side:

assert torch.equal(ranks[0]["factors"], ranks[1]["factors"])
assert torch.equal(ranks[0]["scores"], ranks[1]["scores"])

alone = CgInfluence(
    model, loss, regularization=0.1, second_order_mode="generalized_gauss_newton"
).fit([(x_train, y_train)])
factors = alone.influence_factors(x_test, y_test)
scores = alone.influences_from_factors(factors, x_train, y_train)
for name, there, here in (
    ("factors", ranks[0]["factors"], factors),
    ("scores", ranks[0]["scores"], scores),
):
    difference = (there - here).norm() / here.norm()
    print(f"{name}: two ranks and one process differ by {difference:.1e}")
    assert difference < 1e-5

# %%
# Two machines
# ------------
#
# The same program, started on each of them with the address of the first:
#
# .. code-block:: bash
#
#    # on the first, at 10.0.0.1
#    torchrun --nnodes 2 --node-rank 0 --nproc-per-node 4 \
#        --master-addr 10.0.0.1 --master-port 29500 program.py FOLDER
#    # on the second
#    torchrun --nnodes 2 --node-rank 1 --nproc-per-node 4 \
#        --master-addr 10.0.0.1 --master-port 29500 program.py FOLDER
#
# The folder is one that both see, or a copy on each. All ranks must round alike: the same version
# of torch, number of threads and kind of processor. Points that are on their machine already need
# no ``shard``: give each rank a loader of its own.

# %%
# What is refused
# ---------------
#
# Sums of things that do not belong together. With every sum travel hashes of what must be the same,
# so that ranks that went apart are told so, all of them, instead of being averaged.

assert ranks[0]["refusals"] == ranks[1]["refusals"]
for text in ranks[0]["refusals"]:
    print(textwrap.fill(text, 84))

try:
    DistributedAveraging()  # in this process there is no group
except DistributedError as error:
    print(textwrap.fill(f"DistributedError: {error}", 84))

# %%
# So are other parameters, buffers or losses in one rank, models with sharded parameters (FSDP2,
# tensor parallel), and data that are empty in all ranks. A rank that is killed is an error in the
# others.
#
# See also
# --------
#
# * :doc:`/distributed`: what each rank does, what it costs, and all that is refused
# * :doc:`/gallery/distributed_influence`: a whole program with a picture, for any number of ranks
# * :doc:`/dask`: influences of large collections on a cluster of Dask
# * :doc:`larger_than_memory`: data on disk, in one process
