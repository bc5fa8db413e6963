"""Fused attention, forward: flash attention over blocks of 128 queries and up to 1,024 keys.

Scores lie in PSUM [queries, keys]; their maximum is VectorE's, exp and its sum ScalarE's (one
activation from PSUM); probabilities are turned on TensorE so that keys are on partitions for the
product with V. The scores of a step are issued before the products of the one before, so that
TensorE does not wait for the other engines. Causal masks skip the key blocks above the diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch

from torch_trn.chip import CoreSpec
from torch_trn.lowering.attention_heads import (
    BANK,
    Heads,
    Operand,
    chunks_of,
    load_rows,
    load_turned,
    named,
    refuse,
    store_rows,
    tiles_of,
    turned_columns,
    turns_on_array,
)
from torch_trn.lowering.attention_mask import Mask
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
from torch_trn.lowering.attention_plan import extents, key_block, runs_of
from torch_trn.lowering.attention_score import QueryBlock, Step
from torch_trn.lowering.call import OpCall
from torch_trn.lowering.layout import PARTITIONS, ceil_div
from torch_trn.lowering.registry import lowering
from torch_trn.lowering.run import loop
from torch_trn.memory import Index, Pool, affine
from torch_trn.program import Builder, Program

#: Keys and values of a head stay in SBUF where they take at most one part of so many.
KEYS_SHARE = 2


@dataclass
class Forward:
    """Builder state of one forward Program."""

    b: Builder
    heads: Heads
    dtype: torch.dtype
    operands: dict[str, Operand]
    mask: Mask
    pools: dict[str, Pool] = field(default_factory=dict)

    def allocate(self, together: int) -> None:
        """All pools; keys and values of ``together`` sets are in flight, twice where they fit."""
        b, h, size = self.b, self.heads, self.dtype.itemsize
        block, rows = min(h.keys, self.block), min(h.rows, PARTITIONS)
        blocks = ceil_div(h.keys, self.block)
        tiles = ceil_div(block, PARTITIONS)
        each = blocks * (turned_columns(block, h.depth) + tiles * h.value_depth) * size * together
        room = b.sbuf_room_bytes // KEYS_SHARE
        self.kept = each <= room
        deep = 2 if 2 * each <= room else 1
        #: Whether the next sets' keys have room beside these.
        self.deep = deep == 2 or not self.kept
        slots = blocks * together * deep if self.kept else 4

        def sbuf(name: str, nbytes: int, slots: int = 2) -> None:
            self.pools[name] = b.sbuf(name, free_bytes=nbytes, slots=slots)

        sbuf("keys", turned_columns(block, h.depth) * size, slots)
        sbuf("values", tiles * h.value_depth * size, slots)
        sbuf("query", turned_columns(rows, h.depth) * size, 4)
        #: A causal step may see a part of its block only, which then must be of whole tiles.
        self.adjacent = self.operands["v"].adjoins() and not h.causal
        self.turns = turns_on_array(b.core, self.dtype)
        if self.turns:
            sbuf("natural", tiles * h.depth * size)
            sbuf("natural_query", h.depth * size, 4)
        # One bank of scores leaves room for a third step in flight: its own work is short.
        lag = 2 if block <= BANK else 1
        self.flow = Pipeline(b, lag, lag > 1 and (self.turns or 2 * block <= BANK))
        sbuf("weights", block * size, lag + 1)
        sbuf("weights_turned", min(tiles, BANK // PARTITIONS) * rows * size, 4)
        sbuf("sum", h.value_depth * 4)
        sbuf("result", h.value_depth * self.operands["out"].dtype.itemsize, 4)
        for name in ("low", "total", "block_total", "rescale", "logsum"):
            sbuf(name, 4, 6)
        self.mask.allocate(block, max(count for _, count, _, _ in self.plan))
        self.pools["scores"] = b.psum("scores", free_bytes=block * 4, slots=2 * lag)
        self.pools["turned"] = b.psum("turned", free_bytes=2048, slots=2)
        self.pools["product"] = b.psum("product", free_bytes=2048, slots=2)

    # -- loops ---------------------------------------------------------------------------------
    def run(self) -> None:
        """All sets of heads of this core."""
        h = self.heads
        if h.empty:
            return
        if not h.keys:
            self._without_keys()
            return
        #: Keys of one step.
        self.block = key_block(h, self.dtype.itemsize)
        self.plan = [
            (
                first,
                count,
                rows,
                runs_of(seen, first * PARTITIONS if h.causal else seen, self.block),
            )
            for first, count, rows, seen in extents(h)
        ]
        self.steps = sum(count * sum(run.trips for run in runs) for _, count, _, runs in self.plan)
        members = min(h.members, ceil_div(STEPS_TOGETHER, self.steps))
        sets = min(h.sets, ceil_div(STEPS_TOGETHER, self.steps * h.members))
        self.allocate(sets)
        apart = self.steps * members * sets > SHORT_STEPS or members < h.members or not self.deep
        for first, trips, count in groups(h.sets, sets):
            run = partial(self._sets, first, count, members)
            self.flow.blocks(run, trips, self.steps * h.members * count, "h", apart)
        self.flow.drain()

    def _sets(self, first: int, count: int, members: int, n: Index) -> Block:
        """``count`` sets whose keys are loaded together."""
        number = affine(n) * count + first
        return Chain(
            partial(self._emit, number, count, members), partial(self._last, number, count)
        )

    def _emit(self, number: Index, count: int, members: int) -> None:
        for unit in range(count if self.kept else 0):
            for at, (start, keys) in enumerate(chunks_of(self.heads.keys, self.block)):
                self._load_block(number + unit, self._slot(number + unit, at), start, keys)
        for unit in range(count):
            for first, trips, group in groups(self.heads.members, members):
                # The products of a loop's last step belong to its body.
                if trips > 1:
                    self.flow.drain()
                with loop(self.b, trips, "g") as g:
                    for member in range(group):
                        self._member(number + unit, g * group + (first + member))
                    if trips > 1:
                        self.flow.drain()

    def _last(self, number: Index, count: int, wanted: int) -> list[Step]:
        """The last ``wanted`` steps of ``count`` sets, the last one first."""
        found: list[Step] = []
        for unit in reversed(range(count)):
            for member in reversed(range(self.heads.members)):
                for index, (_, blocks, _, _) in reversed(list(enumerate(self.plan))):
                    for q in reversed(range(max(0, blocks - wanted), blocks)):
                        block = self._block(number + unit, member, index, q)
                        found += block.backwards(wanted - len(found))
                        if len(found) == wanted:
                            return found
        return found

    def _slot(self, number: Index, at: Index) -> Index:
        return number * ceil_div(self.heads.keys, self.block) + at

    def _load_block(self, number: Index, slot: Index, start: Index, keys: int) -> None:
        b, p, place = self.b, self.pools, self.heads.place(number, 0)
        load_turned(b, p["keys"][slot], p["natural"][slot] if self.turns else None,
                    (p["turned"], 0), self.operands["k"], place, start, keys)  # fmt: skip
        load_rows(b, p["values"][slot], self.operands["v"], place, start, keys,
                  adjacent=self.adjacent)  # fmt: skip

    def _member(self, number: Index, member: Index) -> None:
        """One head, or the folded heads of a set: all its queries."""
        for index, (_, count, _, runs) in enumerate(self.plan):
            each = sum(run.trips for run in runs)
            apart = each > LONG_STEPS and len(self.plan) > FEW_EXTENTS
            block = partial(self._block, number, member, index)
            self.flow.blocks(block, count, each, "q", apart)

    def _block(self, number: Index, member: Index, index: int, q: Index) -> QueryBlock:
        """Query block ``q`` of an extent."""
        first, _, rows, runs = self.plan[index]
        done = sum(count * sum(r.trips for r in rs) for _, count, _, rs in self.plan[:index])
        each = sum(run.trips for run in runs)
        head = affine(number) * self.heads.members + member
        query = affine(q) + first
        return QueryBlock(
            self, (number, member), query, head * ceil_div(self.heads.rows, PARTITIONS) + query,
            head * self.steps + done + affine(q) * each, rows, runs,
        )  # fmt: skip

    def _without_keys(self) -> None:
        """No key at all: results are zero."""
        b, h = self.b, self.heads
        tiles = {name: b.sbuf(name, free_bytes=4 * h.value_depth) for name in ("out", "lse")}
        for name in ("out", "lse") if h.value_depth else ():
            if name not in self.operands:
                continue
            target = self.operands[name]
            b.memset(tiles[name], n=target.width[0], dtype=target.dtype)
            with loop(b, h.sets, "h") as n, loop(b, h.members, "g") as g:
                for first, count, rows in tiles_of(h.rows):
                    with loop(b, count, "q") as q:
                        store_rows(b, target, tiles[name][0], h.place(n, g),
                                   (q + first) * PARTITIONS, rows)  # fmt: skip


@lowering(
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
)  # fmt: skip
def attention(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """softmax(q k^T * scale + bias) v and the log of its row sums."""
    given = named(call)
    q, k, v = call.args[:3]
    refuse(call.name, given, q.dtype)
    causal = bool(given.get("is_causal"))
    heads = Heads.of(call.name, q, k, v, causal, given.get("scale"), shards)
    b = Builder(core, call.name.removeprefix("aten::"))
    operands = {
        "q": Operand.of(b, heads, "q", "in0", q),
        "k": Operand.of(b, heads, "k", "in1", k, keys=True),
        "v": Operand.of(b, heads, "v", "in2", v, keys=True),
        "out": Operand.of(b, heads, "out", "out0", call.outs[0]),
    }
    if len(call.outs) > 1 and call.outs[1].numel and call.outs[1].ndim == 3:
        operands["lse"] = Operand.of(b, heads, "lse", "out1", call.outs[1])
    mask = Mask.of(b, heads, given, core)
    Forward(b, heads, q.dtype, operands, mask).run()
    return b.build()
