"""What a prediction is, and how the figures behind it are made."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from kernels import operator
from measurement import Measurement, MeasurementError

from torch_trn.chip import CoreSpec, system
from torch_trn.isa import Engine
from torch_trn.program import Program
from torch_trn.scheduler import GRAPH_LOOK_AHEAD, schedule
from torch_trn.timeline import Timeline

__all__ = ["Prediction", "core_of", "of_operators", "of_program", "timed"]

_READ_OFF = {"K048", "O027", "K166", "K167", "O058"}
"""Rows behind a constant that is not in a CoreSpec: reciprocal, int8 passes, the start-up."""


@dataclass(frozen=True)
class Prediction:
    """One figure of one row; ``program`` tells rows of the same Program from others."""

    row: Measurement
    kind: str
    program: str
    predicted: float
    measured: float
    unit: str = "ms"
    remark: str = ""

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured

    @property
    def gave_a_constant(self) -> bool:
        """Whether a constant of the chip or of an instruction was read off this row."""
        return self.row.id in _READ_OFF | _rows_behind(core_of(self.row.hardware))


@cache
def _rows_behind(core: CoreSpec) -> frozenset[str]:
    """Ids that the sources of ``core`` name before a semicolon, after which only comments come."""
    named = (re.findall(r"\b[A-Z]\d{3}\b", text.split(";")[0]) for text in core.sources.values())
    return frozenset(id for ids in named for id in ids)


def core_of(hardware: str) -> CoreSpec:
    """The core that a row's hardware names.

    Raises:
        MeasurementError: it names none that there is.
    """
    text = hardware.lower()
    for word, name in (
        ("trn3", "trn3.48xlarge"), ("trainium3", "trn3.48xlarge"), ("trn2", "trn2.48xlarge"),
        ("trainium2", "trn2.48xlarge"), ("trn1", "trn1.32xlarge"), ("trainium1", "trn1.32xlarge"),
        ("inf2", "inf2.xlarge"), ("inferentia2", "inf2.xlarge"),
    ):  # fmt: skip
        if word in text:
            return system(name).chip.core
    raise MeasurementError(f"unknown hardware {hardware!r}")


@cache
def _schedule(build: Callable[..., Program], core: CoreSpec, sizes: tuple[Any, ...]) -> Timeline:
    return schedule(build(core, **dict(sizes)), core)


def timed(build: Callable[..., Program], core: CoreSpec, **sizes: Any) -> Timeline:
    """The Timeline of ``build(core, **sizes)``; rows of the same Program share it."""
    return _schedule(build, core, tuple(sizes.items()))


def _key(build: Callable[..., Program], core: CoreSpec, **sizes: Any) -> str:
    return f"{build.__module__}.{build.__name__} {core.pe_sustained_factor} {sizes}"


def bound(timeline: Timeline) -> str:
    """The busiest engine and how busy it is."""
    engine = max(Engine, key=lambda each: timeline.busy_ps[each])
    return f"{engine} {timeline.busy_ps[engine] / max(timeline.duration_ps, 1):.0%} busy"


def of_program(
    row: Measurement, kind: str, measured: float, build: Callable[..., Program], core: CoreSpec,
    *, extra_ms: float = 0.0, remark: str = "", **sizes: Any,
) -> list[Prediction]:  # fmt: skip
    """The prediction of a row that is one Program's time."""
    timeline = timed(build, core, **sizes)
    predicted = timeline.duration_ps / 1e9 + extra_ms
    remarks = "; ".join(filter(None, (bound(timeline), remark)))
    return [Prediction(row, kind, _key(build, core, **sizes), predicted, measured, "ms", remarks)]


def of_operators(
    row: Measurement, core: CoreSpec, measured: float, function: Callable[..., object],
    *shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, extra_ms: float = 0.0,
    remark: str = "",
) -> list[Prediction]:  # fmt: skip
    """The prediction of a row that is a torch function of tensors of ``shapes``."""
    timelines = _operators(core, function, shapes, dtype)
    predicted = sum(each.duration_ps for each in timelines) / 1e9 + extra_ms
    longest = max(timelines, key=lambda each: each.duration_ps)
    remarks = "; ".join(filter(None, (bound(longest), remark)))
    program = f"{function} {shapes} {dtype} {core.pe_sustained_factor}"
    return [Prediction(row, "compiler", program, predicted, measured, "ms", remarks)]


@cache
def _operators(
    core: CoreSpec, function: Callable[..., object], shapes: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
) -> tuple[Timeline, ...]:  # fmt: skip
    found = operator.programs(core, function, *shapes, dtype=dtype)
    return tuple(schedule(program, core, look_ahead=GRAPH_LOOK_AHEAD) for program in found)
