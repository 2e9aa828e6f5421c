"""Interleaved measurements of several libraries, and what is written about them.

In a round everyone is measured once, one after the other, each directly after the unit of time; a
round begins with another one than the last. What is reported are medians over the rounds of ratios
within a round, so that a machine that is busy for a while is so for both sides of a ratio.

Who may choose between settings, a batch size, say, is tried with each of them and goes into the
rounds with the fastest one whose answer is right. Who has taken more than `Effort.patience` is
measured in fewer rounds, but in `FEWEST_ROUNDS`; of a call that takes more than `BELIEVED` seconds
the first counts as one of them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import _page
import _peers
import torch

HERE = Path(__file__).parent
OURS = "hessops"
# A quantity that is repeated takes at least so long, or the clock decides.
LEAST_SECONDS = 0.02
# Rounds of the slowest, and seconds from which a call is slow.
FEWEST_ROUNDS, BELIEVED = 2, 2.0

Call = Callable[[], object]


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: Most rounds.
        patience: Seconds that one library may take for all of its rounds of one quantity, beyond
            the fewest that a median needs.
        quick: Whether this is a short form, whose numbers are worth little.
    """

    rounds: int = 5
    patience: float = 1.5
    quick: bool = False


@dataclass(frozen=True)
class Way:
    """One setting of a library.

    Attributes:
        setting: What it is called in tables.
        prepare: What is done once: it returns what is measured.
    """

    setting: str
    prepare: Callable[[], Call]


@dataclass(frozen=True)
class Contender:
    """What is measured of a library.

    Attributes:
        library: Its name.
        name: What of it, in words.
        ways: The settings to choose from.
        error: From an answer to how wrong it is, where that is not the same for all contenders.
    """

    library: str
    name: str
    ways: Sequence[Way]
    error: Callable[[object], float] | None = None

    @property
    def label(self) -> str:
        """For tables."""
        return f"{self.library}, {self.name}" if self.name else self.library


@dataclass
class Measurement:
    """What was found of a contender.

    Attributes:
        label: Of the contender.
        library: Its library.
        setting: The setting with which it was measured.
        seconds: Median time of a call.
        units: Median over the rounds of the time of a part of a call, in units of the same round.
        set_up: Units before the first answer, beyond a call.
        error: Of the answer, as the family defines it.
        is_wrong: Whether that is beyond what the family accepts.
        rounds: How many there were.
        failure: The name of the exception, where it failed.
        times_ours: Median over the common rounds of its time by that of the fastest of `hessops`.
        notes: What else is to be told.
        every: The units of each round.
    """

    label: str
    library: str
    setting: str = ""
    seconds: float = float("nan")
    units: float = float("nan")
    set_up: float = float("nan")
    error: float | None = None
    is_wrong: bool = False
    rounds: int = 0
    failure: str | None = None
    times_ours: float | None = None
    notes: dict[str, object] = field(default_factory=dict)
    every: list[float] = field(default_factory=list)

    def cell(self) -> str:
        """Units for a table, and what is wrong with them."""
        if self.failure:
            return f"fails: {self.failure}"
        wrong = f" (wrong: {self.error:.0e})" if self.is_wrong else ""
        return f"{number(self.units)}{wrong}"


@dataclass
class _Ready:
    """A contender with the setting that was chosen for it."""

    call: Call
    first: float
    measurement: Measurement
    calls: int
    spent: float = 0.0


def seconds(call: Call, calls: int = 1) -> float:
    """The time of some calls, per call."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def repeats(call: Call) -> int:
    """How many calls take long enough for the clock."""
    return max(1, round(LEAST_SECONDS / max(seconds(call), 1e-6)))


class Comparison:
    """Contenders for one quantity.

    Args:
        unit: What times are divided by.
        effort: How long to measure.
        error: From an answer to how wrong it is; ``None`` accepts every answer.
        accepted: The largest error of a right answer.
        calls: Successive calls that are measured together.
        parts: What a call does so many times, by which its units are divided.
        notes: From an answer to what else is to be told of it.
    """

    def __init__(
        self,
        unit: Call,
        effort: Effort,
        *,
        error: Callable[[object], float] | None = None,
        accepted: float = float("inf"),
        calls: int = 1,
        parts: int = 1,
        notes: Callable[[object], dict[str, object]] | None = None,
    ) -> None:
        self.unit, self.effort = unit, effort
        self.error, self.accepted, self.notes = error, accepted, notes
        self.calls, self.parts = calls, parts

    def measure(self, contenders: Iterable[Contender]) -> list[Measurement]:
        """Tries all settings, then measures in rounds."""
        self.unit()
        self.unit_calls = max(self.calls, repeats(self.unit))
        self.one_unit = seconds(self.unit, self.unit_calls)
        found, ready = [], []
        for contender in contenders:
            measurement, chosen = self._choose(contender)
            found.append(measurement)
            if chosen is not None:
                ready.append(chosen)
        self._rounds(ready)
        compare_with_ours(found)
        return found

    # --- settings ------------------------------------------------------------------------

    def _choose(self, contender: Contender) -> tuple[Measurement, _Ready | None]:
        """The fastest right setting; without one the fastest; without any, what went wrong."""
        candidates: list[_Ready] = []
        failed = Measurement(contender.label, contender.library)
        for way in contender.ways:
            try:
                candidates.append(self._try(contender, way))
            except Exception as problem:  # a library may fail in any way, and the table says how
                failed.setting, failed.failure = way.setting, type(problem).__name__
                failed.notes = {"message": str(problem)}
        if not candidates:
            return failed, None
        chosen = min(candidates, key=lambda c: (c.measurement.is_wrong, c.first))
        return chosen.measurement, chosen

    def _try(self, contender: Contender, way: Way) -> _Ready:
        start = time.perf_counter()
        call = way.prepare()
        prepared = time.perf_counter()
        answer = call()
        end = time.perf_counter()
        measurement = Measurement(contender.label, contender.library, way.setting)
        error = contender.error or self.error
        if error is not None:
            measurement.error = error(answer)
            # NaN is not right either.
            measurement.is_wrong = not measurement.error <= self.accepted
        if self.notes is not None:
            measurement.notes = self.notes(answer)
        del answer
        first = end - prepared if end - prepared > BELIEVED else seconds(call)
        measurement.set_up = max(0.0, end - start - first) / self.one_unit
        calls = max(1, min(self.calls, round(BELIEVED / first)))
        return _Ready(call, first, measurement, calls)

    # --- rounds --------------------------------------------------------------------------

    def _rounds(self, ready: list[_Ready]) -> None:
        for index in range(self.effort.rounds):
            turn = index % max(1, len(ready))
            for one in [*ready[turn:], *ready[:turn]]:
                self._round(one, index)
        for one in ready:
            found = one.measurement
            found.rounds = len(found.every)
            found.units = statistics.median(found.every)

    def _round(self, one: _Ready, index: int) -> None:
        found = one.measurement
        if index == 0 and one.first > BELIEVED:
            # The call that chose the setting was such a round, but for the unit beside it.
            spent, unit = one.first, self.one_unit
        elif index >= FEWEST_ROUNDS and one.spent > self.effort.patience:
            return
        else:
            unit = seconds(self.unit, self.unit_calls)
            spent = seconds(one.call, one.calls)
        one.spent += spent * one.calls
        found.every.append(spent / unit / self.parts)
        times = found.notes.setdefault("seconds", [])
        assert isinstance(times, list)
        times.append(spent)
        found.seconds = statistics.median(times)


def compare_with_ours(found: list[Measurement]) -> None:
    """Fills `times_ours`, by the fastest right way of `hessops`."""
    ours = [m for m in found if m.library == OURS and m.every and not m.is_wrong]
    if not ours:
        return
    best = min(ours, key=lambda m: m.units)
    for one in found:
        if one.every:
            # Some have fewer rounds: the common ones are the first.
            pairs = zip(one.every, best.every, strict=False)
            one.times_ours = statistics.median(theirs / own for theirs, own in pairs)


# --- what is written -------------------------------------------------------------------------


def number(value: float) -> str:
    """Two digits behind the point of a small number, none of a large one."""
    if value != value:
        return "–"
    if value >= 99.5:
        return grouped(round(value))
    return f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def grouped(value: int) -> str:
    """Thousands apart."""
    return f"{value:,}".replace(",", " ")


def cpu_model() -> str:
    """As the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine() -> dict[str, object]:
    """Where and with what was measured."""
    gibibytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    ours = {name: version(name) for name in ("hessops", "torch", "numpy", "scipy")}
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(gibibytes, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": ours | _peers.versions(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


@dataclass
class Report:
    """What a family has found.

    Attributes:
        effort: How long it measured.
        measurements: Numbers, with whatever tells them apart.
        tables: The same for readers.
    """

    effort: Effort
    measurements: list[dict[str, object]] = field(default_factory=list)
    tables: list[_page.Table] = field(default_factory=list)

    def add(self, found: Iterable[Measurement], **which: object) -> None:
        """Keeps measurements and prints them."""
        named = ", ".join(str(value) for value in which.values())
        for one in found:
            self.measurements.append(which | asdict(one))
            versus = "" if one.times_ours is None else f"{one.times_ours:8.2f} × ours"
            rounds = f"{one.rounds} rounds"
            print(f"{named:48} {one.label:34} {one.cell():>24} {rounds:>10}{versus}", flush=True)

    def table(self, title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Keeps a table."""
        self.tables.append(_page.Table(title, list(header), [list(row) for row in rows]))

    def detail(
        self,
        title: str,
        found: Iterable[Measurement],
        *,
        unit: str = "gradients",
        error: str = "error",
        notes: Sequence[str] = (),
    ) -> None:
        """Keeps a table with a row for each contender.

        Args:
            title: What stands above.
            found: What was measured.
            unit: The plural of what times are divided by.
            error: What the error is.
            notes: Which of the notes are columns.
        """
        header = [
            "",
            "seconds",
            unit,
            error,
            *notes,
            f"time / fastest of {OURS}",
            "rounds",
            "setting",
        ]
        rows = []
        for one in found:
            if one.failure:
                rows.append([one.label, one.cell(), *["–"] * (len(header) - 2)])
                continue
            wrong = " (wrong)" if one.is_wrong else ""
            value = "–" if one.error is None else f"{one.error:.1e}{wrong}"
            times = "–" if one.times_ours is None else number(one.times_ours)
            told = [str(one.notes.get(note, "–")) for note in notes]
            cells = [number(one.seconds), number(one.units), value, *told, times]
            rows.append([one.label, *cells, str(one.rounds), one.setting or "default"])
        self.table(title, header, rows)


def run(
    family: str,
    title: str,
    description: str,
    measure: Callable[[Report], None],
    patience: float = Effort.patience,
) -> None:
    """The program of a family: measures, and writes JSON and the page.

    Args:
        family: Its name, that of the file.
        title: The heading on the page.
        description: What is measured and what the columns mean, Markdown.
        measure: Fills a report.
        patience: See `Effort`.
    """
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--quick", action="store_true", help="a short form that only shows it runs")
    parser.add_argument("--rounds", type=int, help=f"most rounds, default {Effort.rounds}")
    parser.add_argument("--threads", type=int, help="of torch, for everyone; default torch's own")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    _peers.prepare()
    rounds = arguments.rounds or (1 if arguments.quick else Effort.rounds)
    effort = Effort(rounds, patience, arguments.quick)
    start, report = time.perf_counter(), Report(effort)
    measure(report)
    spent = time.perf_counter() - start
    content = {
        "family": family,
        "title": title,
        "description": description,
        "machine": machine(),
        "seconds": round(spent),
        "left_out": [peer for peer in _peers.PEERS if not _peers.installed(peer)],
        "tables": [asdict(table) for table in report.tables],
        "measurements": report.measurements,
    }
    folder = HERE / "out" if effort.quick else HERE / "results"
    folder.mkdir(exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (folder / f"{family}.json").write_text(text + "\n", "utf-8")
    _page.write(folder, folder / "benchmarks.md" if effort.quick else _page.PAGE)
    print(f"{family}: {spent:.0f} seconds")
