"""Steps of attention's backward: a block of queries against a block of keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch_trn.lowering.attention_heads import (
    chunks_of,
    load_rows,
    load_turned,
    store_rows,
    tiles_of,
    turn_rows,
)
from torch_trn.lowering.attention_plan import Keys, Segment
from torch_trn.lowering.layout import PARTITIONS
from torch_trn.lowering.tile import FP32
from torch_trn.memory import Index, TileRef, affine

if TYPE_CHECKING:
    from torch_trn.lowering.attention_backward import Backward


@dataclass
class Members:
    """A key block against the queries of each member of its set."""

    blocks: list[KeyBlock]

    def emit(self) -> None:
        """Loads the keys and takes every step."""
        self.blocks[0].load()
        for block in self.blocks:
            block.emit()

    def backwards(self, count: int) -> list[Step]:
        """The last ``count`` steps, the last one first."""
        return [s for block in reversed(self.blocks) for s in block.backwards(count)][:count]


@dataclass
class KeyBlock:
    """One key block against the queries of one member that see it."""

    f: Backward
    number: Index
    member: Index
    at: Index
    slot: Index
    keys: Keys
    base: Index

    def load(self) -> None:
        """Keys both ways round, values turned."""
        f, h, p = self.f, self.f.heads, self.f.pools
        place, start, keys = h.place(self.number, 0), affine(self.at) * f.width, self.keys.keys
        load_rows(f.b, p["k"][self.slot], f.operands["k"], place, start, keys)
        if f.turns:
            load_rows(f.b, p["v"][self.slot], f.operands["v"], place, start, keys)
        for name, depth in (("k", h.depth), ("v", h.value_depth)):
            turned = p[f"{name}_turned"][self.slot]
            if f.turns:
                turn_rows(f.b, turned, p[name][self.slot], (p["turned"], 0), depth, keys, f.dtype)
            else:
                load_turned(f.b, turned, None, (p["turned"], 0), f.operands[name], place, start,
                            keys, f"{name}_turned")  # fmt: skip

    def emit(self) -> None:
        """Takes every step."""
        for index, segment in enumerate(self.keys.segments):
            self.f.flow.steps(partial(self.step, index), segment.trips, "q")

    def step(self, index: int, at: Index) -> Step:
        """Query block ``at`` of segment ``index``."""
        done = sum(segment.trips for segment in self.keys.segments[:index])
        return Step(self, self.keys.segments[index], at, index, affine(self.base) + done + at)

    def backwards(self, count: int) -> list[Step]:
        """The last ``count`` steps (or all), the last one first."""
        found = [
            self.step(index, at)
            for index, segment in reversed(list(enumerate(self.keys.segments)))
            for at in reversed(range(max(0, segment.trips - count), segment.trips))
        ]
        return found[:count]

    def gradients(self) -> list[tuple[str, int, float]]:
        """(result, depth, factor)."""
        h = self.f.heads
        return [("dv", h.value_depth, 1.0), ("dk", h.depth, h.scale)]

    def collect(self) -> None:
        """dV and dK out of PSUM, still turned."""
        f, keys = self.f, self.keys.keys
        for index, (name, depth, factor) in enumerate(self.gradients()):
            target, bank = f.operands[name], f.pools[f"{name}_bank"]
            result = f.pools["result_turned"][affine(self.slot) * 2 + index]
            for at, (_, count) in enumerate(chunks_of(depth)):
                f.b.activation(
                    result.view(target.dtype, (1, keys), offset=at * keys),
                    bank[0].view(FP32, (1, keys), offset=at * f.width), op="copy", scale=factor,
                    n=keys, partitions=count, dtype=FP32,
                    out_dtype=None if target.dtype == FP32 else target.dtype,
                )  # fmt: skip

    def store(self) -> None:
        """dV and dK to HBM, with keys on partitions again."""
        f, keys = self.f, self.keys.keys
        for index, (name, depth, _) in enumerate(self.gradients()):
            target, turned = f.operands[name], f.pools["turned"]
            result = f.pools["result"][affine(self.slot) * 2 + index]
            source = f.pools["result_turned"][affine(self.slot) * 2 + index]
            for tile, (start, rows) in enumerate(chunks_of(keys)):
                for at, (first, count) in enumerate(chunks_of(depth)):
                    f.b.nc_transpose(
                        turned[0].view(target.dtype, (1, count), offset=tile * depth + first),
                        source.view(target.dtype, (1, rows), offset=at * keys + start),
                        partitions=count, n=rows, dtype=target.dtype,
                    )  # fmt: skip
            for first_tile, tiles, rows in tiles_of(keys):
                columns, offset = tiles * depth, first_tile * depth
                f.b.tensor_copy(
                    result.view(target.dtype, (1, columns), offset=offset),
                    turned[0].view(target.dtype, (1, columns), offset=offset),
                    n=columns, partitions=rows, dtype=target.dtype,
                )  # fmt: skip
            store_rows(f.b, target, result, f.heads.place(self.number, 0),
                       affine(self.at) * f.width, keys)  # fmt: skip


@dataclass
class Step:
    """One block of queries against one key block; ``count`` numbers all steps of the core."""

    block: KeyBlock
    segment: Segment
    at: Index
    index: int
    count: Index

    def __post_init__(self) -> None:
        f, block, segment = self.block.f, self.block, self.segment
        self.f, self.rows, self.keys = f, segment.rows, segment.keys
        self.query = affine(self.at) + segment.first
        self.head = (block.number, block.member)
        #: Queries stay, or pass by with every step.
        home = f.slot(*self.head, self.query)
        self.slot = home if f.kept else self.count
        self.facts = home if f.known else self.count
        last_segment = self.index == len(block.keys.segments) - 1
        last_member = f.members == f.heads.members and block.member == f.members - 1
        #: The last step of a key block (loops leave it to what comes after them).
        self.ends = last_segment and last_member and affine(self.at) == affine(segment.trips - 1)

    def ref(self, name: str) -> TileRef:
        """This step's tile of a pool."""
        return self.f.pools[name][self.count]

    def issue(self) -> None:
        """Weights, and the gradients of the scores, [queries, keys]."""
        f, b, p = self.f, self.f.b, self.f.pools
        if not f.kept:
            f.load_queries(self.head, self.query, self.slot, self.rows)
        if not f.known:
            f.load_facts(self.head, self.query, self.facts, self.rows)
        self._scores()
        out = None if f.dtype == FP32 else f.dtype
        weights = self.ref("weights")
        start = affine(self.block.at) * f.width
        f.mask.add(self.ref("scores"), self.head, self.query, start, self.count, self.rows,
                   self.keys, 0)  # fmt: skip
        b.activation(weights, [self.ref("scores"), p["low"][self.facts]], op="exp",
                     scale=f.mask.factor, bias=None, n=self.keys, partitions=self.rows, dtype=FP32,
                     out_dtype=out)  # fmt: skip
        hidden = self.segment.hidden
        if f.heads.causal and f.heads.folded and self.keys > 1:
            b.memset(weights.view(f.dtype, (1, self.keys - 1), offset=1), n=self.keys - 1,
                     partitions=self.rows, dtype=f.dtype)  # fmt: skip
        if hidden:
            first = self.keys - hidden
            tile = weights.view(f.dtype, (1, hidden), offset=first)
            b.affine_select(tile, tile, n=hidden, op="is_le", fill=0.0, channel=-1,
                            base=start + first - self.query * PARTITIONS, partitions=self.rows,
                            dtype=f.dtype)  # fmt: skip
        b.scalar_tensor_tensor(self.ref("slopes"), [self.ref("slope"), p["delta"][self.facts]],
                               weights.view(f.dtype, (1, self.keys)), op="subtract,multiply",
                               scalar=None, n=self.keys, partitions=self.rows, dtype=FP32,
                               out_dtype=out)  # fmt: skip

    def _scores(self) -> None:
        f, p, h, dtype = self.f, self.f.pools, self.f.heads, self.f.dtype
        loaded = self.block.keys.keys
        for bank, left, right, depth in (
            ("scores", "q_turned", "k_turned", h.depth),
            ("slope", "grad_turned", "v_turned", h.value_depth),
        ):
            for index, (_, count) in enumerate(chunks_of(depth)):
                f.b.nc_matmul(
                    self.ref(bank),
                    stationary=p[left][self.slot].view(dtype, (1, self.rows),
                                                       offset=index * self.rows),
                    moving=p[right][self.block.slot].view(dtype, (1, self.keys),
                                                          offset=index * loaded),
                    k=count, m=self.rows, n=self.keys, dtype=dtype, accumulate=index > 0,
                )  # fmt: skip

    def weigh(self) -> None:
        """Nothing: the weights are VectorE's and ScalarE's from the beginning."""

    def turn(self) -> None:
        """This block's share of dV and dK; its score gradients turned."""
        f, b, p, dtype = self.f, self.f.b, self.f.pools, self.f.dtype
        adds: Index = 1 if self.index else affine(self.at) + self.block.member
        for weights, name, bank, depth in (
            ("weights", "grad", "dv_bank", f.heads.value_depth),
            ("slopes", "q", "dk_bank", f.heads.depth),
        ):
            for index, (first, count) in enumerate(chunks_of(depth)):
                b.nc_matmul(
                    p[bank][0].view(FP32, (1, self.keys), offset=index * f.width),
                    stationary=p[name][self.slot].view(dtype, (1, count), offset=first),
                    moving=self.ref(weights).view(dtype, (1, self.keys)), k=self.rows, m=count,
                    n=self.keys, dtype=dtype, accumulate=adds,
                )  # fmt: skip
        turned = p["turned"][0]
        for index, (start, count) in enumerate(chunks_of(self.keys)):
            b.nc_transpose(turned.view(dtype, (1, self.rows), offset=index * self.rows),
                           self.ref("slopes").view(dtype, (1, count), offset=start),
                           partitions=self.rows, n=count, dtype=dtype)  # fmt: skip
        for first, tiles, count in tiles_of(self.keys):
            columns, offset = tiles * self.rows, first * self.rows
            b.activation(self.ref("slopes_turned").view(dtype, (1, columns), offset=offset),
                         turned.view(dtype, (1, columns), offset=offset), op="copy", n=columns,
                         partitions=count, dtype=dtype)  # fmt: skip
        if self.ends:
            self.block.collect()

    def finish(self) -> None:
        """Its share of dQ."""
        f, b, p, dtype = self.f, self.f.b, self.f.pools, self.f.dtype
        n, bank = f.heads.depth, p["dq_bank"][0]
        for index, (_, count) in enumerate(chunks_of(self.keys)):
            b.nc_matmul(
                bank,
                stationary=self.ref("slopes_turned").view(dtype, (1, self.rows),
                                                          offset=index * self.rows),
                moving=p["k"][self.block.slot].view(dtype, (1, n), offset=index * n), k=count,
                m=self.rows, n=n, dtype=dtype, accumulate=index > 0,
            )  # fmt: skip
        if f.kept:
            b.tensor_tensor(p["dq"][self.slot], bank, p["dq"][self.slot], op="add", n=n,
                            partitions=self.rows)  # fmt: skip
            if self.segment.closes and f.closed:
                f.store_query(self.head, self.query, self.slot, self.rows)
        else:
            self._add_in_hbm(bank)
        if self.ends:
            self.block.store()

    def _add_in_hbm(self, bank: TileRef) -> None:
        """The first key block writes dQ, the others add to it."""
        f, tile = self.f, self.f.pools["dq"][self.slot]
        f.b.tensor_scalar(tile, bank, op="multiply", operands=(f.heads.scale,), n=f.heads.depth,
                          partitions=self.rows)  # fmt: skip
        store_rows(f.b, f.operands["dq_sum"], tile, f.heads.place(*self.head),
                   self.query * PARTITIONS, self.rows, self.block.keys.first > 0,
                   part=f.slot(*self.head, self.query))  # fmt: skip
