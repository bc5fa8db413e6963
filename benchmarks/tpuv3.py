"""The lowerings on a TPUv3-like core against cycles measured on one.

The rows come with PyTorchSim's artifact and carry four other simulators' numbers. An operator has
fp32 tensors and runs as it is lowered for a NeuronCore; of a model the operators are added up, each
with its own loads and stores, where the compiler fuses.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from kernels import operator
from models import resnet18
from torch import Tensor, nn
from torch.nn import functional

from torch_trn.scheduler import schedule
from torch_trn.tpuv3 import TPUV3_CORE, TPUV3_HZ

__all__ = ["Cycles", "read", "section"]

Shape = tuple[int, ...]
Work = tuple[Callable[..., object], list[Shape]]

PEERS = ("mnpusim", "timeloop", "maestro", "scalesim_v3")


@dataclass(frozen=True)
class Cycles:
    """One row: cycles measured, predicted here, and what the other simulators said."""

    workload: str
    measured: float
    predicted: float
    peers: tuple[float | None, ...]

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured

    @property
    def gave_a_constant(self) -> bool:
        """Whether a constant of the core was read off this row."""
        return any(self.workload in source for source in TPUV3_CORE.sources.values())


def _work(workload: str) -> Work:
    """The function of a row and its tensors' shapes.

    Raises:
        ValueError: not a workload of the published rows.
    """
    family, _, rest = workload.partition("_")
    sizes = [int(size) for size in re.findall(r"\d+", rest)]
    match family:
        case "gemm":
            m, k, n = sizes
            return torch.mm, [(m, k), (k, n)]
        case "conv":
            batch, high, wide, channels, out, kernel, stride, padding = sizes
            convolution = partial(functional.conv2d, stride=stride, padding=padding)
            return convolution, [(batch, channels, high, wide), (out, channels, kernel, kernel)]
        case "layernorm":
            return _layer_norm, [(sizes[0], sizes[1]), (sizes[1],), (sizes[1],)]
        case "softmax":
            return partial(torch.softmax, dim=-1), [(sizes[0], sizes[1])]
        case "attention":
            return operator.attention, [(1, *sizes)] * 3
        case "resnet18":
            return _model(resnet18()), [(1, 3, 224, 224)]
        case "bert":
            # One encoder block at 512 tokens: what the artifact's script builds.
            width, ffn = 768, 3072
            shapes: list[Shape] = [(512, width), (width, 3 * width), (width, width)]
            return partial(operator.block, heads=12), [*shapes, (width, ffn), (ffn, width)]
    raise ValueError(f"unknown TPUv3 workload {workload!r}")


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.layer_norm(x, (x.shape[-1],), weight, bias)


def _model(model: nn.Module) -> Callable[[Tensor], object]:
    evaluated = model.eval().to("meta")

    def run(image: Tensor) -> object:
        with torch.no_grad():
            return evaluated(image)

    return run


def predicted_cycles(workload: str) -> float:
    """Cycles of ``workload`` on the TPUv3-like core.

    Raises:
        ValueError: not a workload of the published rows.
    """
    function, shapes = _work(workload)
    found = operator.programs(TPUV3_CORE, function, *shapes, dtype=torch.float32)
    return sum(schedule(each, TPUV3_CORE).duration_ps for each in found) * TPUV3_HZ / 1e12


def read(path: Path) -> list[Cycles]:
    """All rows of ``path``, predicted."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Cycles(
                row["workload"],
                float(row["tpuv3_cycles"]),
                predicted_cycles(row["workload"]),
                tuple(float(row[name]) if row[name] else None for name in PEERS),
            )
            for row in csv.DictReader(file)
        ]


def mean_error(pairs: list[tuple[float, float]]) -> float:
    """Mean of |predicted / measured - 1|."""
    return sum(abs(predicted / measured - 1) for predicted, measured in pairs) / len(pairs)


def section(path: Path) -> list[str]:
    """The text of this section; one line if there is no such file."""
    if not path.is_file():
        return [f"no TPUv3 cycles at {path}: that section is left out"]
    rows = read(path)
    lines = [
        "a TPUv3-like core, in its cycles (reported; *: a constant was read off this row)",
        "  predicted   measured  ratio  workload",
    ]
    lines += [
        f"  {row.predicted:9.0f}  {row.measured:9.0f} {row.ratio:6.2f}  {row.workload}"
        f"{'*' if row.gave_a_constant else ''}"
        for row in rows
    ]
    own = mean_error([(row.predicted, row.measured) for row in rows])
    lines.append(f"  mean |error| {own:.1%} over {len(rows)} rows; on the rows that others cover:")
    for index, name in enumerate(PEERS):
        theirs = [(each, row) for row in rows if (each := row.peers[index]) is not None]
        if theirs:
            same = mean_error([(row.predicted, row.measured) for _, row in theirs])
            other = mean_error([(each, row.measured) for each, row in theirs])
            lines.append(f"    {name:12} {other:5.0%}, here {same:5.1%} ({len(theirs)} rows)")
    return lines
