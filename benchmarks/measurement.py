"""Reads published measurements and turns each into a time.

A row says a time, a rate or a bandwidth of one execution of something; what was executed is in its
``workload`` and ``config``. Everything is compared as milliseconds.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["COLUMNS", "Measurement", "MeasurementError", "read"]

COLUMNS = ("id", "level", "hardware", "n_cores_used", "workload", "config", "metric", "value",
           "unit", "config_complete", "note")  # fmt: skip

_TIME_MS = {"ms": 1.0, "us": 1e-3, "ns": 1e-6, "s": 1e3}
_OPERATIONS_PER_S = {"TFLOPS": 1e12, "TOPS": 1e12, "T-ops/s": 1e12, "ops/s": 1.0}


class MeasurementError(Exception):
    """Measurements that cannot be compared with; the text says which and why."""


@dataclass(frozen=True)
class Measurement:
    """One row of the file; ``config`` is its JSON object."""

    id: str
    level: str
    hardware: str
    cores: int
    workload: str
    config: Mapping[str, Any]
    metric: str
    value: str
    unit: str
    complete: bool
    note: str

    @property
    def number(self) -> float:
        """The first number of the value: "0.633/0.641" gives two, "~1300" an approximate one.

        Raises:
            MeasurementError: there is none.
        """
        match = re.search(r"\d+(\.\d+)?([eE][+-]?\d+)?", self.value)
        if match is None:
            raise MeasurementError(f"{self.id}: value is {self.value!r}, but must hold a number")
        return float(match[0])

    def noted(self, name: str) -> float | None:
        """The number that follows ``name`` in the note, if it is there."""
        match = re.search(rf"{re.escape(name)} (\d+(\.\d+)?)", self.note)
        return float(match[1]) if match else None

    def milliseconds(
        self, *, nbytes: float | None = None, operations: float | None = None
    ) -> float:
        """The measured time; a rate needs the bytes, operations or items of one execution.

        Raises:
            MeasurementError: a unit that is no time, or a rate of something that is not given.
        """
        if self.unit in _TIME_MS:
            return self.number * _TIME_MS[self.unit]
        if self.unit == "GB/s" and nbytes is not None:
            return nbytes / (self.number * 1e9) * 1e3
        if operations is not None and not self.unit.endswith("B/s"):
            return operations / (self.number * _OPERATIONS_PER_S.get(self.unit, 1.0)) * 1e3
        raise MeasurementError(
            f"{self.id}: {self.value} {self.unit} is no time, and a rate of an unknown amount"
        )


def read(path: Path) -> list[Measurement]:
    """All rows of ``path``.

    Raises:
        MeasurementError: there is no such file, a column is missing, or a config is no JSON object.
    """
    if not path.is_file():
        raise MeasurementError(
            f"no measurements at {path}: give the path of a measurements.csv as the first argument"
        )
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise MeasurementError(f"{path} has no column {', '.join(missing)}")
        return [_measurement(row, path) for row in reader]


def _measurement(row: Mapping[str, str], path: Path) -> Measurement:
    try:
        config = json.loads(row["config"] or "{}")
    except json.JSONDecodeError as error:
        raise MeasurementError(f"{path}, row {row['id']}: config is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise MeasurementError(
            f"{path}, row {row['id']}: config is {config!r}, but must be an object"
        )
    cores = row["n_cores_used"]
    return Measurement(
        id=row["id"],
        level=row["level"],
        hardware=row["hardware"],
        cores=int(cores) if cores.isdigit() else 0,
        workload=row["workload"],
        config=config,
        metric=row["metric"],
        value=row["value"],
        unit=row["unit"],
        complete=row["config_complete"] == "yes",
        note=row["note"],
    )
