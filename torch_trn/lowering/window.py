"""Windows of planes: where each tap of them lies, as access patterns of tiles in SBUF."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from torch_trn.lowering.layout import product
from torch_trn.lowering.separable import dims_of
from torch_trn.lowering.taps import Progression, progressions
from torch_trn.memory import TileRef

__all__ = ["Band", "TileDims", "Windows", "linear", "tile_dims"]


@dataclass(frozen=True)
class Windows:
    """The windows of one dim: for each result the first source (may be negative) and the taps.

    ``step`` apart are a window's elements.
    """

    ins: int
    starts: tuple[int, ...]
    taps: tuple[int, ...]
    step: int = 1

    @classmethod
    def regular(
        cls, ins: int, outs: int, kernel: int, stride: int, padding: int, step: int
    ) -> Windows:
        """Equal windows at equal distances."""
        starts = tuple(at * stride - padding for at in range(outs))
        return cls(ins, starts, (kernel,) * outs, step)

    @classmethod
    def even(cls, ins: int, outs: int) -> Windows:
        """Windows that divide the elements as evenly as they can."""
        starts = tuple(at * ins // outs for at in range(outs))
        ends = tuple(-(-(at + 1) * ins // outs) for at in range(outs))
        return cls(ins, starts, tuple(e - s for s, e in zip(starts, ends, strict=True)))

    def reach(self, first: int, count: int) -> tuple[int, int]:
        """The sources (possibly beyond the plane) of some results: first and one after the last."""
        chosen = range(first, first + count)
        low = min(self.starts[at] for at in chosen)
        high = max(self.starts[at] + (self.taps[at] - 1) * self.step for at in chosen)
        return low, high + 1

    def runs(self, tap: int, first: int, count: int, low: int) -> list[Progression]:
        """Where tap number ``tap`` of some results lies, counted from ``low``."""
        pairs = [
            (at - first, self.starts[at] + tap * self.step - low, 1.0)
            for at in range(first, first + count)
            if self.taps[at] > tap
        ]
        return progressions(pairs)

    def touching(self, low: int, high: int) -> tuple[int, int]:
        """(first, count) of the results whose windows reach into sources ``low`` to ``high``."""
        found = [
            at for at, (start, taps) in enumerate(zip(self.starts, self.taps, strict=True))
            if start < high and start + (taps - 1) * self.step >= low
        ]  # fmt: skip
        return (found[0], found[-1] - found[0] + 1) if found else (0, 0)


@dataclass(frozen=True)
class Band:
    """Rows of the first spatial dim: results ``first`` to ``first + count``, sources ``low`` to
    ``high`` (maybe beyond the plane)."""

    first: int
    count: int
    low: int
    high: int


@dataclass(frozen=True)
class TileDims:
    """An access pattern without its tile."""

    dims: tuple[tuple[int, int], ...]
    offset: int

    def of(self, tile: TileRef, dtype: torch.dtype) -> TileRef:
        """The pattern in a tile."""
        return tile.view(dtype, *self.dims, offset=self.offset)


def tile_dims(
    chosen: Sequence[Progression], sizes: Sequence[int], each: int, source: bool
) -> TileDims:
    """Results (or sources) of one progression along each dim, of ``each`` planes."""
    dims, offset = [(product(sizes), each)], 0
    for d, run in enumerate(chosen):
        step = product(sizes[d + 1 :])
        dims.append((step * (run.source_step if source else run.out_step), run.count))
        offset += step * (run.source if source else run.out)
    return TileDims(dims_of(*dims), offset)


def linear(at: Sequence[int], sizes: Sequence[int]) -> int:
    total = 0
    for place, size in zip(at, sizes, strict=True):
        total = total * size + place
    return total
