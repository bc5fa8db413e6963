"""Predicted against measured: single-core instructions, streams, kernels and operators.

    $ python benchmarks/validation.py [measurements.csv]

Without an argument the file is looked for beside the repository, in ../shared/validation. Each row
is printed with the Program's time, the published one and their ratio, then a table of classes: the
median and the 90th percentile of |ratio - 1|, over rows and over distinct Programs, and whether
they meet their bars. The exit code is 1 if a bar is not met, 2 if there is nothing to compare with.

Nothing is fitted to a row. What was chosen with the measured values in sight is said at the kernel
(benchmarks/kernels, "chosen by looking"); constants and their sources are in torch_trn/chip.py, and
the rows that some were read off are among those scored here.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from measurement import Measurement, MeasurementError, read
from prediction import Prediction
from rows import CLASSES, choices, predict
from tpuv3 import section

DEFAULT = Path(__file__).resolve().parents[2] / "shared" / "validation" / "measurements.csv"

WORST = 5
"""So many rows of a class are named, where they miss by more than ``NOTEWORTHY``."""
NOTEWORTHY = 0.10

TITLES = {
    "instruction": "single instructions",
    "stream": "HBM streams",
    "kernel": "kernels with known source or description",
    "busy": "VectorE + ScalarE busy time of NKIBench kernels",
    "traffic": "HBM bytes read and written by NKIBench kernels (reported: spills were chosen)",
    "release": "kernels of a release whose DMA was slower (reported)",
    "compiler": "operators as the compiler made them (reported)",
}


@dataclass(frozen=True)
class Bar:
    """Largest median and 90th percentile of |error| that a class may have; None: no bar."""

    median: float
    p90: float | None = None


BARS = {"stream": Bar(0.03, 0.15), "kernel": Bar(0.15, 0.45), "busy": Bar(0.15)}


@dataclass(frozen=True)
class Errors:
    """|ratio - 1| of ``count`` figures."""

    count: int
    median: float
    p90: float

    def __str__(self) -> str:
        return f"{self.count:4} {self.median:7.1%} {self.p90:6.1%}"


@dataclass(frozen=True)
class Score:
    """How a class stands: its rows, its Programs (the mean of a Program's rows), and the rows that
    gave no constant."""

    kind: str
    rows: Errors
    programs: Errors
    unmarked: Errors

    @property
    def verdict(self) -> str:
        """ "met" or "NOT met", where the class has a bar."""
        bar = BARS.get(self.kind)
        if bar is None:
            return "no bar"
        held = self.rows.median <= bar.median and (bar.p90 is None or self.rows.p90 <= bar.p90)
        return "met" if held else "NOT met"


def percentile(values: Sequence[float], share: float) -> float:
    """The ``share`` quantile, between two values in proportion; 0 of nothing.

    >>> percentile([1.0, 2.0, 3.0, 5.0], 0.5)
    2.5
    """
    if not values:
        return 0.0
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def errors(ratios: Sequence[float]) -> Errors:
    """The errors of ``ratios`` of predicted to measured."""
    misses = [abs(ratio - 1) for ratio in ratios]
    return Errors(len(misses), percentile(misses, 0.5), percentile(misses, 0.9))


def score(kind: str, predictions: Sequence[Prediction]) -> Score:
    """The errors of one class."""
    programs: dict[str, list[float]] = {}
    for each in predictions:
        programs.setdefault(each.program, []).append(each.ratio)
    return Score(
        kind,
        errors([each.ratio for each in predictions]),
        errors([sum(ratios) / len(ratios) for ratios in programs.values()]),
        errors([each.ratio for each in predictions if not each.gave_a_constant]),
    )


def table(kind: str, predictions: Iterable[Prediction]) -> list[str]:
    """The rows of one class."""
    lines = [f"{TITLES[kind]}", "  id       predicted   measured  ratio  workload"]
    lines += [
        f"  {each.row.id:4}{'*' if each.gave_a_constant else ' '} {each.predicted:12.4g} "
        f"{each.measured:10.4g} {each.ratio:6.2f}  {_what(each)}"
        for each in predictions
    ]
    return [*lines, ""]


def _what(each: Prediction) -> str:
    config, text = each.row.config, each.row.workload[:60]
    if "mamba" in text:
        text += f", {config.get('channels')} channels x {config.get('seq')}"
    return text if each.unit == "ms" else f"{text} ({each.unit})"


def worst(kind: str, predictions: Sequence[Prediction]) -> list[str]:
    """The rows that miss most, with what the Program was bound by and what is known of the row."""
    far = sorted(predictions, key=lambda each: -abs(each.ratio - 1))[:WORST]
    return [
        f"  {kind:12} {each.row.id:5} {each.ratio:5.2f}  {_what(each)}: {each.remark}"
        for each in far
        if abs(each.ratio - 1) > NOTEWORTHY
    ]


def summary(scores: Iterable[Score]) -> list[str]:
    """The table of classes."""
    lines = [
        "             rows                 programs             without *",
        "|ratio - 1|     n  median    p90      n  median    p90      n  median    p90   bar",
        "-----------  ---- ------- ------   ---- ------- ------   ---- ------- ------   ---",
    ]
    for each in scores:
        bar = BARS.get(each.kind)
        limits = [] if bar is None else [f"{limit:.0%}" for limit in (bar.median, bar.p90) if limit]
        lines.append(
            f"{each.kind:11}  {each.rows}   {each.programs}   {each.unmarked}   "
            f"{' / '.join(limits):9} {each.verdict}".rstrip()
        )
    return lines


def report(rows: Iterable[Measurement]) -> tuple[list[str], bool]:
    """The text, and whether every bar is met.

    Raises:
        MeasurementError: none of the rows can be predicted.
    """
    predictions: list[Prediction] = []
    skipped: dict[str, list[str]] = {}
    for row in rows:
        found = predict(row)
        if isinstance(found, str):
            if found:
                skipped.setdefault(found, []).append(row.id)
        else:
            predictions += found
    by_kind = {kind: [each for each in predictions if each.kind == kind] for kind in CLASSES}
    present = {kind: found for kind, found in by_kind.items() if found}
    if not present:
        raise MeasurementError("no row of the file can be predicted")
    scores = [score(kind, found) for kind, found in present.items()]
    lines = [
        "predicted and measured times in ms; ratio = predicted / measured",
        "*: a constant of the chip or of an instruction was read off this row",
        "",
    ]
    for kind, found in present.items():
        lines += table(kind, found)
    far = [line for kind, found in present.items() for line in worst(kind, found)]
    lines += [f"rows that miss by more than {NOTEWORTHY:.0%}, at most {WORST} a class", *far, ""]
    lines.append("not predicted")
    lines += [f"  {reason}: {', '.join(ids)}" for reason, ids in skipped.items()] or ["  none"]
    lines += ["", "chosen by looking at measured values"]
    lines += [
        textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="    ")
        for text in choices()
    ]
    lines += ["", *summary(scores)]
    return lines, all(each.verdict != "NOT met" for each in scores)


def main(arguments: Sequence[str]) -> int:
    path = Path(arguments[0]) if arguments else DEFAULT
    try:
        lines, met = report(read(path))
    except MeasurementError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join([*section(path.with_name("tpuv3.csv")), "", *lines]))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
