"""Times a Program on one NeuronCore: encodes it once; issues, expands and schedules it natively.

An issue pass fixes the order of each engine and DMA queue, and the engine of instructions that
leave it open; then each runs strictly in that order. An instruction waits for the data of the tiles
it reads and for the slots of the tiles it writes; what another engine did is seen a semaphore
later. DMA queues share the core's DMA engines, and a transfer may pass one of another queue that
still waits for its data.

Loops are not run to their end: once all state repeats from one iteration to a later one, shifted in
time, the rest is known. That is exact; spans need every iteration.
"""

from __future__ import annotations

from array import array
from dataclasses import replace
from types import MappingProxyType
from typing import Literal, TypeAlias

from torch_trn._sim import schedule as _schedule_natively
from torch_trn.chip import CoreSpec
from torch_trn.isa import Cost, Engine, Instruction, NcMatmul, NcTranspose
from torch_trn.isa.instruction import bytes_to_ps
from torch_trn.memory import Space, TileRef
from torch_trn.program import Node, Program, Step
from torch_trn.timeline import Span, Timeline

__all__ = ["GRAPH_LOOK_AHEAD", "PROGRAM_ORDER", "Limiter", "schedule"]

Limiter: TypeAlias = bool | Literal["ramp"]

PROGRAM_ORDER = 0
"""Look-ahead of eager operators and kernels: every queue in the Program's own order."""

GRAPH_LOOK_AHEAD = 16
"""Instructions per engine that the issue pass of a compiled graph chooses from: read off the
compiler-made rows of the published measurements, which allow 16 to 64."""

_STEP, _LOOP, _END = 0, 1, 2  # Opcodes of csrc_stubs/sim/program.h.
_WEIGHTS_UNTOUCHED, _WEIGHTS_REPLACED, _WEIGHTS_REUSABLE = 0, 1, 2
_REASONS = ("", "queue", "tile", "slot", "bandwidth")


def schedule(
    program: Program,
    core: CoreSpec,
    *,
    spans: bool = False,
    look_ahead: int = PROGRAM_ORDER,
    limiter: Limiter = True,
    issued_for: CoreSpec | None = None,
    extrapolate: bool = True,
) -> Timeline:
    """The Timeline of ``program`` alone on ``core``.

    Two calls give the same Timeline.

    Args:
        program: what runs.
        core: whose costs count.
        spans: record every span.
        look_ahead: instructions per engine and DMA queue, in program order, from which the issue
            pass takes the one that can start first; 0 keeps program order.
        limiter: True applies the core's sustained power limit, "ramp" also the ramp after idle
            time, False neither.
        issued_for: decide all orders by this core's costs and keep them on ``core``, as a compiled
            program on other hardware would. Only then can no faster clock or bandwidth slow
            anything. Loops are run to their end.
        extrapolate: leave iterations out once they repeat; the results are equal either way.

    Raises:
        ValueError: ``core`` cannot run one of the instructions, or ``look_ahead`` is negative.
    """
    if look_ahead < 0:
        raise ValueError(f"look_ahead is {look_ahead}, but must be at least 0 (program order)")
    encoding = _Encoding(program, core, limiter)
    other = None
    if issued_for is not None:
        theirs = _Encoding(program, issued_for, limiter)
        other = (theirs.tables, _constants(issued_for, limiter))
    constants = _constants(core, limiter)
    duration_ps, sums, run, rows = _schedule_natively(
        encoding.tables, other, constants, look_ahead, spans, extrapolate
    )
    return encoding.timeline(duration_ps, sums.tolist(), run, rows.tolist())


def _constants(core: CoreSpec, limiter: Limiter) -> tuple[int, int, int, int, int]:
    """``Constants`` of csrc_stubs/sim/state.h."""
    packet_ps = bytes_to_ps(core.dma_packet_bytes, core.dma_engine_bytes_per_s)
    # No load runs further ahead than what SBUF can hold.
    horizon_ps = bytes_to_ps(core.sbuf_bytes, core.dma_bytes_per_s)
    ramp_ps = core.pe_ramp_ps if limiter == "ramp" and core.pe_ramp_start_factor < 1 else 0
    start_permille = round(1000 * core.pe_ramp_start_factor)
    return core.semaphore_ps, packet_ps, horizon_ps, ramp_ps, start_permille


class _Encoding:
    """The tables of ``csrc_stubs/sim/program.h`` for one Program on one core."""

    def __init__(self, program: Program, core: CoreSpec, limiter: Limiter) -> None:
        full_rate = (
            core if core.pe_sustained_factor == 1 else replace(core, pe_sustained_factor=1.0)
        )
        self._core = full_rate if limiter is False else core
        self._full_rate = full_rate
        self._pools = program.pools
        self._pool_index = {pool: index for index, pool in enumerate(program.pools)}
        self._queues: dict[str, int] = {}
        self._steps: list[Step] = []
        self._engines: list[Instruction] = []
        self._costs: dict[Instruction, tuple[int, ...]] = {}
        self._num_refs = 0
        self._pool_table = [
            value for pool in program.pools for value in (pool.slots, pool.space == Space.HBM)
        ]
        self._terms: list[int] = []
        self._refs: list[int] = []
        self._choices: list[int] = []
        self._instructions: list[int] = []
        self._ops: list[int] = []
        self._add_body(program.body)
        self.tables = (
            array("q", self._pool_table), array("q", self._terms), array("q", self._refs),
            array("q", self._choices), array("q", self._instructions), array("q", self._ops),
        )  # fmt: skip

    def timeline(
        self, duration_ps: int, sums: list[int], run: int, rows: list[list[int]]
    ) -> Timeline:
        """What the native side found, named. ``sums`` as in ``Totals`` of csrc_stubs/sim."""
        engines, pools = len(Engine), self._pools
        busy, (limiter_ps, bandwidth_ps, instructions) = sums[:engines], sums[engines : engines + 3]
        each = 2 * len(pools)
        causes = [f"{kind} {pool.name}" for kind in ("tile", "slot") for pool in pools]
        waits_ps: dict[str, int] = {}
        idle_ps = []
        at = engines + 3
        for engine in Engine:
            found = _named(causes, sums[at : at + each])
            waits_ps |= {f"{engine} for {cause}": ps for cause, ps in found.items()}
            idle_ps.append(found)
            at += each
        if bandwidth_ps:
            waits_ps["DMA for bandwidth"] = bandwidth_ps
        idle_ps[Engine.DMA] = _named([*causes, "queue"], sums[at:])
        for engine, found in zip(Engine, idle_ps, strict=True):
            rest_ps = duration_ps - busy[engine] - sum(found.values())
            if rest_ps:
                found["end"] = rest_ps
        return Timeline(
            duration_ps, (busy[0], busy[1], busy[2], busy[3], busy[4]), instructions,
            MappingProxyType(waits_ps),
            tuple(self._span(row) for row in rows),
            idle_ps=tuple(MappingProxyType(found) for found in idle_ps), limiter_ps=limiter_ps,
            instructions_run=run,
        )  # fmt: skip

    def _span(self, row: list[int]) -> Span:
        """The span that the native side reports as ``row``."""
        instruction, choice, start_ps, end_ps, reason, pool, count = row
        ran = self._engines[choice]
        waited_for = _REASONS[reason]
        if pool >= 0:
            waited_for += f" {self._pools[pool].name}"
        queue = self._steps[instruction].queue or str(ran.engine_of)
        return Span(ran.engine_of, queue, ran.NAME, start_ps, end_ps, waited_for, count)

    def _add_body(self, body: tuple[Node, ...]) -> None:
        ops = self._ops
        for node in body:
            if isinstance(node, Step):
                ops += (_STEP, len(self._steps), 0)
                self._add_step(node)
                continue
            start, steps = len(ops), len(self._steps)
            ops += (_LOOP, node.trips, 0)
            self._add_body(node.body)
            ops += (_END, 0, start // 3 + 1)
            # A loop of nothing is skipped, however often it repeats it.
            ops[start + 1] = node.trips if len(self._steps) > steps else 0
            ops[start + 2] = len(ops) // 3

    def _add_step(self, step: Step) -> None:
        first_choice, first_ref = len(self._engines), self._num_refs
        for instruction in (step.instruction, *step.alternatives):
            self._choices += self._cost(instruction)
            self._engines.append(instruction)
        queue = -1
        if step.instruction.engine_of == Engine.DMA:
            queue = self._queues.setdefault(step.queue, len(self._queues))
        for ref in step.writes:
            self._add_ref(ref)
        for ref in step.reads:
            self._add_ref(ref)
        self._instructions += (
            queue, _weights(step.instruction, step.reads), first_choice,
            1 + len(step.alternatives), first_ref, len(step.writes), len(step.reads),
        )  # fmt: skip
        self._steps.append(step)

    def _cost(self, instruction: Instruction) -> tuple[int, ...]:
        """A row of choices; equal instructions are priced once."""
        row = self._costs.get(instruction)
        if row is None:
            instruction.check(self._core)
            row = self._costs[instruction] = self._row(instruction, instruction.cost(self._core))
        return row

    def _row(self, instruction: Instruction, cost: Cost) -> tuple[int, ...]:
        engine = instruction.engine_of
        lost_ps = reuse_lost_ps = 0
        if engine == Engine.TENSOR and self._core is not self._full_rate:
            full = instruction.cost(self._full_rate)
            lost_ps = cost.occupancy_ps - full.occupancy_ps
            reuse_lost_ps = cost.reuse_ps - full.reuse_ps
        return (
            engine, cost.occupancy_ps, cost.latency_ps, cost.queue_ps, cost.reuse_ps,
            lost_ps, reuse_lost_ps,
        )  # fmt: skip

    def _add_ref(self, ref: TileRef) -> None:
        terms = self._terms
        first_term = len(terms) // 2
        for variable, value in ref.index.terms:
            terms += (variable.depth, value)
        self._refs += (
            self._pool_index[ref.pool], ref.index.constant, first_term, len(terms) // 2,
        )  # fmt: skip
        self._num_refs += 1


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


def _named(causes: list[str], sums: list[int]) -> dict[str, int]:
    """Times by cause; pools of one name count together."""
    named: dict[str, int] = {}
    for cause, ps in zip(causes, sums, strict=True):
        if ps:
            named[cause] = named.get(cause, 0) + ps
    return named
