"""Fused attention, backward: scores are computed again, block by block.

For up to 512 keys at a time all queries pass by. dV and dK (turned: [depth, keys]) contract over
queries, which are on partitions already, and accumulate in PSUM; dQ needs the score gradients
turned and accumulates over key blocks in SBUF, or in HBM where a head's queries do not fit. A set's
members add to the same dK and dV.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import torch

from torch_trn.chip import CoreSpec
from torch_trn.isa import Engine
from torch_trn.lowering.attention_gradient import KeyBlock, Members, Step
from torch_trn.lowering.attention_heads import (
    BANK,
    Heads,
    Operand,
    Place,
    load_rows,
    load_turned,
    named,
    refuse,
    store_rows,
    tiles_of,
    turn_rows,
    turned_columns,
    turns_on_array,
)
from torch_trn.lowering.attention_mask import NO_MAXIMUM, Mask
from torch_trn.lowering.attention_pipeline import (
    FEW_EXTENTS,
    LONG_STEPS,
    SHORT_STEPS,
    STEPS_TOGETHER,
    Block,
    Chain,
    Pipeline,
    groups,
)
from torch_trn.lowering.attention_plan import keys_of
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.layout import PARTITIONS, ceil_div
from torch_trn.lowering.registry import lowering
from torch_trn.lowering.run import loop
from torch_trn.lowering.tile import FP32
from torch_trn.memory import Index, Pool, affine
from torch_trn.program import Builder, Program

#: Queries of a set, or two numbers for each, stay in SBUF where they take at most one part of so
#: many.
QUERIES_SHARE = 2
FACTS_SHARE = 4


@dataclass
class Backward:
    """Builder state of one backward Program."""

    b: Builder
    heads: Heads
    dtype: torch.dtype
    operands: dict[str, Operand]
    mask: Mask
    pools: dict[str, Pool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        h = self.heads
        self.flow = Pipeline(self.b, 1)
        self.tiles = ceil_div(h.rows, PARTITIONS)
        self.parts = self.operands["dq"].pool.slots
        #: Chunks of 128 of the wider depth; so many banks hold 512 columns of dK or dV.
        chunks = ceil_div(max(h.depth, h.value_depth, 1), PARTITIONS)
        self.width = BANK // (1 << (chunks - 1).bit_length())
        self.turns = turns_on_array(self.b.core, self.dtype)

    def allocate(self, together: int) -> None:
        """All pools: a set's queries stay in SBUF where they fit, keys come by blocks."""
        b, h, size = self.b, self.heads, self.dtype.itemsize
        rows, width = min(h.rows, PARTITIONS), min(h.keys, self.width)
        turned = turned_columns(rows, h.depth) + turned_columns(rows, h.value_depth)
        each = (turned + h.depth + 2 * h.value_depth) * size + 4 * h.depth + 8
        slots = h.members * self.tiles * together
        room = b.sbuf_room_bytes // QUERIES_SHARE
        self.kept = slots * each <= room
        deep = 2 if 2 * slots * each <= room else 1
        #: -logsumexp and the row sums of grad * out are small enough to stay where queries are not.
        self.known = self.kept or slots * 16 <= b.sbuf_room_bytes // FACTS_SHARE
        facts = slots * (deep if self.kept else 2) if self.known else 4
        #: Whether the next sets' queries have room beside these.
        self.deep = deep == 2 and self.kept
        slots = slots * deep if self.kept else 4
        deepest, tiles = max(h.depth, h.value_depth), ceil_div(width, PARTITIONS)

        def sbuf(name: str, nbytes: int, slots: int = 2) -> None:
            self.pools[name] = b.sbuf(name, free_bytes=max(nbytes, 4), slots=slots)

        for name, nbytes in (
            ("q_turned", turned_columns(rows, h.depth) * size), ("q", h.depth * size),
            ("grad_turned", turned_columns(rows, h.value_depth) * size),
            ("grad", h.value_depth * size), ("dq", 4 * h.depth),
        ):  # fmt: skip
            sbuf(name, nbytes, slots)
        sbuf("low", 4, facts)
        sbuf("delta", 4, facts)
        sbuf("grad_once", h.value_depth * size, 4)
        sbuf("out", h.value_depth * size, 4)
        sbuf("k_turned", turned_columns(width, h.depth) * size, 4)
        sbuf("v_turned", turned_columns(width, h.value_depth) * size, 4)
        sbuf("k", tiles * h.depth * size, 4)
        if self.turns:
            sbuf("v", tiles * h.value_depth * size)
        for name in ("weights", "slopes", "slopes_turned"):
            sbuf(name, max(width, tiles * rows) * size, 3)
        sbuf("product", 4 * h.value_depth)
        sbuf("result_turned", ceil_div(deepest, PARTITIONS) * width * 4, 4)
        sbuf("result", tiles * deepest * 4, 4)
        sbuf("dq_result", h.depth * 4)
        self.mask.allocate(width, 0)
        for name, count in (("scores", 2), ("slope", 2), ("turned", 1), ("dq_bank", 1),
                            ("dk_bank", 1), ("dv_bank", 1)):  # fmt: skip
            self.pools[name] = b.psum(name, free_bytes=2048, slots=count)

    # -- loops ---------------------------------------------------------------------------------
    def run(self) -> None:
        """All sets of heads of this core."""
        h = self.heads
        if not (h.batch and h.kv_heads and h.group):
            return
        self.plan = keys_of(h, self.width) if h.rows and h.keys else []
        self.steps = sum(keys.trips * keys.steps for keys in self.plan)
        if not self.steps:
            for name in ("dq", "dk", "dv"):
                self._zero(name, 0, h.rows if name == "dq" else h.keys)
            return
        unrolled = self.steps * h.members <= STEPS_TOGETHER
        self.members = h.members if unrolled else 1
        together = min(h.sets, max(1, STEPS_TOGETHER // (self.steps * h.members)))
        self.allocate(together)
        if not self.kept:
            self._sum_in_hbm()
        stored = [s for keys in self.plan for s in keys.segments if s.closes]
        #: Whether the steps themselves store dQ, all of it.
        self.closed = sum(s.trips for s in stored) == self.tiles
        steps = self.steps * h.members
        apart = steps * together > SHORT_STEPS or not (unrolled and self.closed and self.deep)
        for first, trips, count in groups(h.sets, together):
            run = partial(self._sets, first, count)
            self.flow.blocks(run, trips, steps * count, "h", apart)
        self.flow.drain()
        if not self.kept:
            self._convert()
        unseen = [keys.first * self.width for keys in self.plan if not keys.segments]
        for name in ("dk", "dv") if unseen else ():
            self._zero(name, unseen[0], h.keys - unseen[0])

    def _sets(self, first: int, count: int, n: Index) -> Block:
        """``count`` sets, one after the other."""
        number = affine(n) * count + first
        return Chain(partial(self._emit, number, count), partial(self._last, number, count))

    def _emit(self, number: Index, count: int) -> None:
        for unit in range(count):
            self._set(number + unit)

    def _last(self, number: Index, count: int, wanted: int) -> list[Step]:
        """The last ``wanted`` steps of ``count`` sets, the last one first."""
        found: list[Step] = []
        for unit in reversed(range(count)):
            for index, keys in reversed(list(enumerate(self.plan))):
                for k in reversed(range(max(0, keys.trips - wanted), keys.trips)):
                    block = self._members(number + unit, index, k)
                    found += block.backwards(wanted - len(found))
                    if len(found) == wanted:
                        return found
        return found

    def _set(self, number: Index) -> None:
        h = self.heads
        with loop(self.b, h.members if self.known else 0, "g") as g:
            for first, trips, rows in tiles_of(h.rows):
                with loop(self.b, trips, "q") as q:
                    head, slot = (number, g), self.slot(number, g, q + first)
                    if self.kept:
                        self.load_queries(head, q + first, slot, rows)
                    self.load_facts(head, q + first, slot, rows)
        for index, keys in enumerate(self.plan):
            if keys.segments:
                self._keys(number, index)
        if self.kept and not self.closed:
            self.flow.drain()
            with loop(self.b, h.members, "g") as g:
                for first, trips, rows in tiles_of(h.rows):
                    with loop(self.b, trips, "q") as q:
                        slot = self.slot(number, g, q + first)
                        self.store_query((number, g), q + first, slot, rows)

    def _sum_in_hbm(self) -> None:
        """dQ of a head is summed in HBM in fp32: the first key block writes, the others add."""
        h, target = self.heads, self.operands["dq"]
        self.operands["dq_sum"] = target
        if target.dtype != FP32:
            shape = (h.batch, h.kv_heads * h.group, h.queries, h.depth)
            spec = TensorSpec.contiguous(FP32, *shape)
            self.operands["dq_sum"] = Operand.of(self.b, h, "dq_sum", "", spec, parts=self.parts)
        first = self.plan[0]
        if first.trips > 1:
            others = replace(first, first=1, trips=first.trips - 1)
            self.plan[:1] = [replace(first, trips=1), others]

    def _block(self, number: Index, index: int, member: Index, k: Index) -> KeyBlock:
        """Key block ``k`` of a run of like ones, against one member's queries."""
        h, keys = self.heads, self.plan[index]
        done = sum(before.trips * before.steps for before in self.plan[:index])
        at = affine(k) + keys.first
        count = affine(number) * (self.steps * h.members) + done * h.members
        return KeyBlock(
            self, number, member, at, affine(number) * ceil_div(h.keys, self.width) + at, keys,
            count + (affine(k) * h.members + member) * keys.steps,
        )  # fmt: skip

    def _members(self, number: Index, index: int, k: Index) -> Members:
        """It against the queries of all members."""
        members = range(self.heads.members)
        return Members([self._block(number, index, member, k) for member in members])

    def _keys(self, number: Index, index: int) -> None:
        """Like key blocks of one set."""
        h, keys = self.heads, self.plan[index]
        if self.members < h.members:
            with loop(self.b, keys.trips, "k") as k:
                first = self._block(number, index, 0, k)
                first.load()
                with loop(self.b, h.members, "g") as g:
                    self._block(number, index, g, k).emit()
                    self.flow.drain()
                first.collect()
                first.store()
            return
        each = keys.steps * h.members
        apart = each > LONG_STEPS and len(self.plan) > FEW_EXTENTS
        self.flow.blocks(partial(self._members, number, index), keys.trips, each, "k", apart)

    # -- queries -------------------------------------------------------------------------------
    def slot(self, number: Index, member: Index, query: Index) -> Index:
        """Where a block of queries is kept."""
        return (affine(number) * self.heads.members + member) * self.tiles + query

    def load_queries(self, head: Place, query: Index, slot: Index, rows: int) -> None:
        """Queries and gradients, both ways round."""
        b, h, p = self.b, self.heads, self.pools
        place, at = h.place(*head), affine(query) * PARTITIONS
        for name, depth in (("q", h.depth), ("grad", h.value_depth)):
            load_rows(b, p[name][slot], self.operands[name], place, at, rows, "query")
            if self.turns:
                turn_rows(b, p[f"{name}_turned"][slot], p[name][slot], (p["turned"], 0), depth,
                          rows, self.dtype)  # fmt: skip
            else:
                load_turned(b, p[f"{name}_turned"][slot], None, (p["turned"], 0),
                            self.operands[name], place, at, rows, "turned_query")  # fmt: skip
        if self.kept:
            b.memset(p["dq"][slot], n=h.depth, partitions=rows, engine=Engine.GPSIMD)

    def load_facts(self, head: Place, query: Index, slot: Index, rows: int) -> None:
        """low = -logsumexp and delta = row sums of grad * out."""
        b, h, p = self.b, self.heads, self.pools
        place, at = h.place(*head), affine(query) * PARTITIONS
        grad = p["grad"][slot]
        if not self.kept:
            grad = p["grad_once"][slot]
            load_rows(b, grad, self.operands["grad"], place, at, rows, "query")
        load_rows(b, p["out"][slot], self.operands["out"], place, at, rows, "query")
        load_rows(b, p["low"][slot], self.operands["lse"], place, at, rows, "query")
        b.tensor_scalar(p["low"][slot], p["low"][slot], op="multiply,min",
                        operands=(-1.0, NO_MAXIMUM), n=1, partitions=rows,
                        engine=Engine.GPSIMD)  # fmt: skip
        b.tensor_tensor(p["product"][slot], grad, p["out"][slot], op="multiply", n=h.value_depth,
                        partitions=rows, dtype=self.dtype,
                        out_dtype=None if self.dtype == FP32 else FP32)  # fmt: skip
        b.tensor_reduce(p["delta"][slot], p["product"][slot], op="add", n=h.value_depth,
                        partitions=rows)  # fmt: skip

    def store_query(self, head: Place, query: Index, slot: Index, rows: int) -> None:
        """dQ of a block of queries that no key block will add to."""
        target, result = self.operands["dq"], self.pools["dq_result"][slot]
        self.b.tensor_scalar(result, self.pools["dq"][slot], op="multiply",
                             operands=(self.heads.scale,), n=self.heads.depth, partitions=rows,
                             out_dtype=None if target.dtype == FP32 else target.dtype)  # fmt: skip
        store_rows(self.b, target, result, self.heads.place(*head), affine(query) * PARTITIONS,
                   rows, part=slot)  # fmt: skip

    def _convert(self) -> None:
        """dQ from its fp32 sums in HBM, where it has another dtype."""
        target, h = self.operands["dq"], self.heads
        sums = self.operands["dq_sum"]
        if sums is target:
            return
        with loop(self.b, h.sets, "h") as n, loop(self.b, h.members, "g") as g:
            for first, trips, rows in tiles_of(h.rows):
                with loop(self.b, trips, "q") as q:
                    slot = self.slot(n, g, q + first)
                    tile, result = self.pools["dq"][slot], self.pools["dq_result"][slot]
                    place, at = h.place(n, g), (q + first) * PARTITIONS
                    load_rows(self.b, tile, sums, place, at, rows, part=slot)
                    self.b.tensor_copy(result, tile, n=h.depth, partitions=rows, dtype=FP32,
                                       out_dtype=target.dtype)  # fmt: skip
                    store_rows(self.b, target, result, place, at, rows, part=slot)

    def _zero(self, name: str, start: int, count: int) -> None:
        """Rows that no other tensor's element contributes to."""
        b, h, target = self.b, self.heads, self.operands[name]
        wide = target.width[0]
        if not (count and wide):
            return
        tile = b.sbuf(f"{name}_zero", free_bytes=wide * target.dtype.itemsize)
        b.memset(tile, n=wide, dtype=target.dtype)
        with loop(b, h.sets, "h") as n, loop(b, h.members if name == "dq" else 1, "g") as g:
            for first, trips, rows in tiles_of(count):
                with loop(b, trips, "q") as q:
                    at = (q + first) * PARTITIONS + start
                    store_rows(b, target, tile[0], h.place(n, g), at, rows)


def _backward(
    call: OpCall, core: CoreSpec, shards: int, q: TensorSpec, k: TensorSpec, v: TensorSpec
) -> Program:
    given = named(call)
    refuse(call.name, given, q.dtype)
    b = Builder(core, call.name.removeprefix("aten::"))
    heads = Heads.of(call.name, q, k, v, bool(given.get("is_causal")), given.get("scale"), shards,
                     split_members=False)  # fmt: skip
    operands: dict[str, Operand] = {}
    for name, argument, keys in (
        ("q", "query", False), ("k", "key", True), ("v", "value", True), ("out", "out", False),
        ("grad", "grad_out", False), ("lse", "logsumexp", False),
    ):  # fmt: skip
        spec = given[argument]
        assert isinstance(spec, TensorSpec)
        operands[name] = Operand.of(b, heads, name, f"in{given[f'{argument}#']}", spec, keys=keys)
    for index, (name, spec) in enumerate(zip(("dq", "dk", "dv"), call.outs, strict=False)):
        # Blocks of dQ are written one by one: those of others need not wait.
        parts = heads.sets * heads.members * ceil_div(heads.rows, PARTITIONS) if not index else 1
        operands[name] = Operand.of(b, heads, name, f"out{index}", spec, keys=index > 0,
                                    parts=max(parts, 1))  # fmt: skip
    mask = Mask.of(b, heads, given, core)
    Backward(b, heads, q.dtype, operands, mask).run()
    return b.build()


@lowering("aten::_scaled_dot_product_flash_attention_for_cpu_backward",
          "aten::_scaled_dot_product_fused_attention_overrideable_backward")  # fmt: skip
def attention_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(grad, q, k, v, ...) -> gradients of q, k and v."""
    return _backward(call, core, shards, *call.args[1:4])
