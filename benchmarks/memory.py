"""Peak memory of products, and time per point, as the data and the number of vectors grow.

What is measured, and what the tables show, is in `DESCRIPTION`. Linux only.

    python benchmarks/memory.py [--quick] [--rounds 5] [--threads 2]

The other libraries are in the dependency group `benchmarks`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from _cases import DIGITS, WIDE, Case, case
from _harness import OURS, Call, Comparison, Contender, Report, Way, number, run
from _peers import (
    CURVLINOPS,
    DATTRI,
    EMPIRICAL,
    GGN,
    HARMONIC,
    HESSIAN,
    PYDVL,
    installed,
    prepare,
)
from products import FIXED, PLAIN, curvlinops, dattri, ours, pydvl

DESCRIPTION = """\
The growth of the peak resident memory in a product, in MiB, over what a process holds with model,
data, operator and vectors: each product in a process of its own, with allocations that go back to
the system when they are freed. A product of *fixed θ* includes its set-up: what it retains grows
with the data up to its budget of 1 GiB. n is 512 points in batches of 128 (dattri has all data in
one batch); k is the number of vectors, each of which takes {vector:.1f} MiB, as does each vector of
the result, which is part of the growth.

The second table has the time *per point* of 4n points divided by that of n, with one vector,
medians of interleaved rounds: 1 is linear in n."""

MATRICES = (HESSIAN, GGN, EMPIRICAL)
POINTS, BATCH = 512, 128
TIMED_POINTS = 1024
COUNTS = (1, 32, 128)
# Every allocation beyond it goes back to the system when it is freed.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Probe:
    """What a process of its own measures.

    Attributes:
        library: Whose product.
        matrix: Of which matrix.
        case: The name of the case.
        points: n.
        count: k.
        fixed: Whether parameters are fixed, for `hessops`.
        threads: Of torch.
    """

    library: str
    matrix: str
    case: str = WIDE
    points: int = POINTS
    count: int = 1
    fixed: bool = False
    threads: int = 1

    @property
    def label(self) -> str:
        """For tables."""
        if self.library == OURS:
            return f"{OURS}, {FIXED if self.fixed else PLAIN}"
        return self.library

    def product(self) -> Call:
        """Makes the operator, which has seen its data."""
        data = sized(self.case, self.points)
        vectors = data.vectors(self.count)
        if self.library == OURS:
            return ours(self.matrix, data, vectors, fixed=self.fixed)
        if self.library == DATTRI:
            # Setting it up is part of it, as for fixed parameters of hessops.
            return lambda: dattri(data, vectors, "rev-rev")()
        make = {PYDVL: pydvl, CURVLINOPS: curvlinops}[self.library]
        return make(self.matrix, data, vectors, data.batches)

    def measured(self) -> float | None:
        """MiB, found by another process; ``None`` where that fails."""
        command = [sys.executable, __file__, "--probe", json.dumps(asdict(self))]
        environment = os.environ | MALLOC
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def sized(name: str, points: int, batch: int = BATCH) -> Case:
    """A case with its points repeated as often as needed."""
    data = case(name)
    times = -(-points // len(data))
    data = replace(data, x=data.x.repeat(times, *[1] * (data.x.ndim - 1)), y=data.y.repeat(times))
    return replace(data.fewer(points), batch_size=batch)


def peak_mebibytes() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024


def answer(probe: Probe) -> None:
    """What the process of a probe prints."""
    torch.set_num_threads(probe.threads)
    prepare()
    # What torch and the library load once.
    replace(probe, case=DIGITS, points=8, count=1).product()()
    product = probe.product()
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_mebibytes()
    product()
    print(peak_mebibytes() - before)


# --- tables ----------------------------------------------------------------------------------


def subjects(*, quick: bool) -> Iterator[Probe]:
    """Which products of whom."""
    if quick:
        yield Probe(OURS, HESSIAN)
        yield Probe(OURS, EMPIRICAL, fixed=True)
    else:
        for matrix in MATRICES:
            yield Probe(OURS, matrix)
            yield Probe(OURS, matrix, fixed=True)
        yield Probe(OURS, HARMONIC)
    if installed(PYDVL):
        matrices = (HESSIAN,) if quick else (HESSIAN, EMPIRICAL, HARMONIC)
        yield from (Probe(PYDVL, matrix) for matrix in matrices)
    if installed(CURVLINOPS):
        yield from (Probe(CURVLINOPS, matrix) for matrix in (MATRICES[:1] if quick else MATRICES))
    if installed(DATTRI):
        yield Probe(DATTRI, HESSIAN)


def probes(subject: Probe, *, quick: bool) -> list[Probe]:
    """In n and in k."""
    four = replace(subject, points=4 * subject.points)
    counts = COUNTS[:2] if quick else COUNTS
    # Those that make the gradients of all points are slow, and take the same for many vectors.
    by_point = subject.library == PYDVL and subject.matrix != HESSIAN
    more = [replace(subject, count=k) for k in counts[1:] if not by_point]
    return [subject, four, *more]


def measure_peaks(report: Report) -> None:
    quick = report.effort.quick
    counts = COUNTS[:2] if quick else COUNTS
    header = ["", "n", "4n", *[f"n, k = {k}" for k in counts[1:]]]
    rows = []
    for subject in subjects(quick=quick):
        with_threads = replace(subject, threads=torch.get_num_threads())
        cells = []
        for probe in probes(with_threads, quick=quick):
            found = probe.measured()
            cells.append("fails" if found is None else number(found))
            report.measurements.append(asdict(probe) | {"mebibytes": found})
        cells += ["–"] * (len(header) - 1 - len(cells))
        rows.append([f"{subject.matrix}: {subject.label}", *cells])
        print(f"{rows[-1][0]:48}" + "".join(f"{cell:>12}" for cell in cells), flush=True)
    report.table(f"{WIDE}: peak memory of a product, MiB", header, rows)


def measure_times(report: Report) -> None:
    """Of `hessops`, in units of the same product with n points."""
    points = POINTS if report.effort.quick else TIMED_POINTS
    small, large = sized(WIDE, points, 512), sized(WIDE, 4 * points, 512)
    rows = []
    for matrix in MATRICES:
        cells = []
        for fixed in (False, True):
            unit = ours(matrix, small, small.vectors(1), fixed=fixed)
            product = partial(ours, matrix, large, large.vectors(1), fixed=fixed)
            # A product of four times the points is counted as four.
            comparison = Comparison(unit, report.effort, parts=4)
            name = FIXED if fixed else PLAIN
            found = comparison.measure([Contender(OURS, name, [Way("", product)])])
            report.add(found, case=WIDE, matrix=matrix, what="time per point")
            cells.append(found[0].cell())
        rows.append([matrix, *cells])
    title = f"{WIDE}: time per point of {4 * points} points / of {points} points"
    report.table(title, ["", PLAIN, FIXED], rows)


def measure(report: Report) -> None:
    """Memory, then time."""
    measure_peaks(report)
    measure_times(report)


def main() -> None:
    if sys.argv[1:2] == ["--probe"]:
        answer(Probe(**json.loads(sys.argv[2])))
        return
    mebibytes = 4 * case(WIDE).size / 2**20
    run("memory", "Memory", DESCRIPTION.format(vector=mebibytes), measure, patience=5.0)


if __name__ == "__main__":
    main()
