"""Times a Program on one NeuronCore: encodes it once, expands and schedules it natively.

Each engine and each DMA queue runs in program order. An instruction waits for the data of the
tiles it reads and for the slots of the tiles it writes; what another engine did is seen a semaphore
later. DMA queues share the core's DMA engines, and a transfer may pass one of another queue that
still waits for its data.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from torch_trn._sim import schedule as _schedule_natively
from torch_trn.chip import CoreSpec
from torch_trn.isa import Engine, Instruction, NcMatmul, NcTranspose
from torch_trn.isa.instruction import bytes_to_ps
from torch_trn.memory import Pool, Space, TileRef
from torch_trn.program import Node, Program, Repeat, Step
from torch_trn.timeline import Span, Timeline

__all__ = ["schedule"]

Table: TypeAlias = NDArray[np.int64]

_STEP, _LOOP, _END = 0, 1, 2  # Opcodes of csrc_stubs/sim/program.h.
_WEIGHTS_UNTOUCHED, _WEIGHTS_REPLACED, _WEIGHTS_REUSABLE = 0, 1, 2
_REASONS = ("", "queue", "tile", "slot", "bandwidth")


def schedule(program: Program, core: CoreSpec, *, spans: bool = False) -> Timeline:
    """The Timeline of ``program`` alone on ``core``; ``spans`` also records every span.

    Durations are those of ``core``'s instruction costs; two calls give the same Timeline.

    Raises:
        ValueError: ``core`` cannot run one of the instructions.
    """
    encoding = _Encoding(program, core)
    packet_ps = bytes_to_ps(core.dma_packet_bytes, core.dma_engine_bytes_per_s)
    duration_ps, busy_ps, waits, bandwidth_ps, instructions, rows = _schedule_natively(
        *encoding.tables(), core.semaphore_ps, packet_ps, spans
    )
    waits_ps = _named_waits(program.pools, waits, bandwidth_ps)
    named = tuple(encoding.span(row) for row in rows.tolist())
    return Timeline(duration_ps, busy_ps, instructions, MappingProxyType(waits_ps), named)


class _Encoding:
    """The tables of ``csrc_stubs/sim/program.h`` for one Program on one core."""

    def __init__(self, program: Program, core: CoreSpec) -> None:
        self._core = core
        self._pools = program.pools
        self._pool_index = {pool: index for index, pool in enumerate(program.pools)}
        self._queues: dict[str, int] = {}
        self._steps: list[Step] = []
        self._terms: list[tuple[int, int]] = []
        self._refs: list[tuple[int, int, int, int]] = []
        self._instructions: list[tuple[int, ...]] = []
        self._ops: list[tuple[int, int, int]] = []
        self._add_body(program.body)

    def tables(self) -> tuple[Table, Table, Table, Table, Table]:
        """Pools, terms, refs, instructions and ops."""
        pools = [(pool.slots, pool.space == Space.HBM) for pool in self._pools]
        return (
            _table(pools, 2),
            _table(self._terms, 2),
            _table(self._refs, 4),
            _table(self._instructions, 10),
            _table(self._ops, 3),
        )

    def span(self, row: list[int]) -> Span:
        """The span that the native side reports as ``row``."""
        instruction, start_ps, end_ps, reason, pool, count = row
        step = self._steps[instruction]
        engine = step.instruction.engine_of
        waited_for = _REASONS[reason]
        if pool >= 0:
            waited_for += f" {self._pools[pool].name}"
        queue = step.queue or str(engine)
        return Span(engine, queue, step.instruction.NAME, start_ps, end_ps, waited_for, count)

    def _add_body(self, body: tuple[Node, ...]) -> None:
        for node in body:
            if isinstance(node, Step):
                self._ops.append((_STEP, len(self._steps), 0))
                self._add_step(node)
                continue
            start = len(self._ops)
            self._ops.append((_LOOP, node.trips, 0))
            self._add_body(node.body)
            self._ops.append((_END, 0, start + 1))
            self._ops[start] = (_LOOP, self._trips(node, start), len(self._ops))

    def _trips(self, loop: Repeat, start: int) -> int:
        """A loop of nothing is skipped, however often it repeats it."""
        empty = all(op != _STEP for op, _, _ in self._ops[start:])
        return 0 if empty else loop.trips

    def _add_step(self, step: Step) -> None:
        instruction = step.instruction
        instruction.check(self._core)
        cost = instruction.cost(self._core)
        engine = instruction.engine_of
        queue = -1
        if engine == Engine.DMA:
            queue = self._queues.setdefault(step.queue, len(self._queues))
        first_ref = len(self._refs)
        for ref in (*step.writes, *step.reads):
            self._add_ref(ref)
        self._instructions.append(
            (
                engine, queue, cost.occupancy_ps, cost.latency_ps, cost.queue_ps, cost.reuse_ps,
                _weights(instruction, step.reads), first_ref, len(step.writes), len(step.reads),
            )
        )  # fmt: skip
        self._steps.append(step)

    def _add_ref(self, ref: TileRef) -> None:
        first_term = len(self._terms)
        self._terms += [(variable.depth, value) for variable, value in ref.index.terms]
        pool = self._pool_index[ref.pool]
        self._refs.append((pool, ref.index.constant, first_term, len(self._terms)))


def _weights(instruction: Instruction, reads: tuple[TileRef, ...]) -> int:
    """What the instruction does to the weights in the PE array.

    A tile that holds more than one stationary operand does not tell which of them is loaded, so
    only a tile of the operand's own size counts as reusable.
    """
    if isinstance(instruction, NcMatmul):
        own_bytes = instruction.m * instruction.dtype.itemsize * (1 + instruction.double_row)
        return _WEIGHTS_REUSABLE if reads[0].pool.nbytes <= own_bytes else _WEIGHTS_REPLACED
    on_array = isinstance(instruction, NcTranspose) and instruction.engine_of == Engine.TENSOR
    return _WEIGHTS_REPLACED if on_array else _WEIGHTS_UNTOUCHED


def _named_waits(pools: tuple[Pool, ...], waits: Table, bandwidth_ps: int) -> dict[str, int]:
    table = waits.reshape(len(Engine), 2, len(pools))
    named: dict[str, int] = {}
    for engine, slot, pool in np.argwhere(table).tolist():
        kind = "slot" if slot else "tile"
        key = f"{Engine(engine)} for {kind} {pools[pool].name}"
        named[key] = named.get(key, 0) + int(table[engine, slot, pool])
    if bandwidth_ps:
        named["DMA for bandwidth"] = bandwidth_ps
    return named


def _table(rows: Sequence[tuple[int, ...]], columns: int) -> Table:
    return np.array(rows, dtype=np.int64).reshape(len(rows), columns)
