"""The result of a schedule: how long a Program takes, what kept it, and the spans behind it.

Two tiles loaded, scaled and stored on a trn2 core, with two slots to hold them:

>>> print(schedule(program, core, spans=True))
5813372 ps: TensorE 0, VectorE 1264584, ScalarE 0, GpSimdE 0, DMA 3241440 busy
  waited 2892652 ps: DMA for tile tile
  waited 2288428 ps: VectorE for tile tile
  [0, 1620720) DMA/load dma_copy x2
  [2110360, 2742652) VectorE tensor_scalar x1, waited for tile tile
  [2892652, 4513372) DMA/store dma_copy x2, waited for tile tile
  [2920720, 3553012) VectorE tensor_scalar x1, waited for tile tile
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch_trn.isa import Engine

__all__ = ["Span", "Timeline"]


@dataclass(frozen=True)
class Span:
    """``count`` runs of one instruction that kept ``engine`` busy without a break.

    ``queue`` is the DMA queue, else the engine's name. ``waited_for`` says why the first of them
    did not start earlier: "" (nothing to wait for), "queue" (the one before it in its queue),
    "tile x" (the data of x), "slot x" (x was still being read or written: more slots would help),
    "bandwidth" (other DMA transfers). A DMA span lasts for its share of all DMA engines' time; the
    data arrive ``dma_start_ps`` after it or later.
    """

    engine: Engine
    queue: str
    name: str
    start_ps: int
    end_ps: int
    waited_for: str
    count: int = 1


@dataclass(frozen=True)
class Timeline:
    """When a Program's instructions ran, in integer picoseconds from its start.

    ``busy_ps`` is by ``Engine``; spans of one engine never overlap and add up to it.
    ``waits_ps`` sums what instructions and transfers waited, e.g. "VectorE for tile x"; transfers
    of several queues may wait at once. ``idle_ps`` says for each engine why it did nothing and adds
    up to ``duration_ps - busy_ps``. Its causes are "tile x" and "slot x" as in a span; "queue" (DMA
    only: the few engines of a transfer's partitions were at work, the others had nothing); "end"
    (nothing left to do). For DMA it is what the next transfer waited for. ``limiter_ps`` is the
    part of TensorE's busy time that the power limiter took. Of ``instructions``,
    ``instructions_run`` were run one by one; loops that repeat account for the others.
    """

    duration_ps: int
    busy_ps: tuple[int, int, int, int, int]
    instructions: int
    waits_ps: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    spans: tuple[Span, ...] = ()
    idle_ps: tuple[Mapping[str, int], ...] = ()
    limiter_ps: int = 0
    instructions_run: int = field(default=0, compare=False)

    def __str__(self) -> str:
        busy = ", ".join(f"{engine} {self.busy_ps[engine]}" for engine in Engine)
        lines = [f"{self.duration_ps} ps: {busy} busy"]
        by_length = sorted(self.waits_ps.items(), key=lambda item: (-item[1], item[0]))
        lines += [f"  waited {ps} ps: {reason}" for reason, ps in by_length]
        lines += [f"  {_span_line(span)}" for span in self.spans]
        return "\n".join(lines)


def _span_line(span: Span) -> str:
    queue = f"/{span.queue}" if span.engine == Engine.DMA else ""
    reason = f", waited for {span.waited_for}" if span.waited_for else ""
    times = f"[{span.start_ps}, {span.end_ps})"
    return f"{times} {span.engine}{queue} {span.name} x{span.count}{reason}"
