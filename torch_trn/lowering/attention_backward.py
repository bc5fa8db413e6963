"""Fused attention, backward: scores are computed again, block by block.

For 512 keys at a time all queries pass by. dV and dK need no transposes (their products contract
over queries, which are on partitions already) and accumulate in PSUM over the queries; dQ turns the
score gradients and accumulates over key blocks in SBUF. Scores of the next query block are issued
before the products of this one, so that TensorE does not wait for the other engines.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from torch_trn.chip import CoreSpec
from torch_trn.isa import Engine
from torch_trn.lowering.attention import MAX_EXTENTS, Shape, load_turned, turned_columns
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.layout import PARTITIONS, ceil_div
from torch_trn.lowering.matmul import array_dtype
from torch_trn.lowering.registry import lowering
from torch_trn.lowering.run import loop
from torch_trn.lowering.tile import FP32
from torch_trn.memory import Index, Pool
from torch_trn.program import Builder, Program

#: Keys of one block: a PSUM bank of scores.
KEYS = 512


@dataclass
class Backward:
    """Builder state of one backward Program."""

    b: Builder
    shape: Shape
    dtype: torch.dtype
    sources: dict[str, Pool]
    grads: dict[str, torch.dtype]
    bias: TensorSpec | None = None
    pools: dict[str, Pool] = field(default_factory=dict)

    def allocate(self) -> None:
        """All pools: a head's queries stay in SBUF where they fit, keys come by blocks."""
        b, s, size = self.b, self.shape, self.dtype.itemsize
        tiles = ceil_div(s.queries, PARTITIONS)
        per_tile = (2 * PARTITIONS + s.depth + 2 * s.value_depth) * size + 4 * s.depth + 8
        self.kept = tiles * per_tile <= b.sbuf_room_bytes // 2
        slots = tiles if self.kept else 3
        deepest, tile = max(s.depth, s.value_depth), min(s.queries, PARTITIONS)
        turned = max(turned_columns(tile, d) for d in (s.depth, s.value_depth)) * size
        blocks = KEYS // PARTITIONS

        def sbuf(name: str, nbytes: int, slots: int = 2) -> None:
            self.pools[name] = b.sbuf(name, free_bytes=nbytes, slots=slots)

        for name, nbytes in (
            ("q_turned", turned), ("grad_turned", turned), ("q", s.depth * size),
            ("grad", s.value_depth * size), ("out", s.value_depth * size), ("lse", 4),
            ("delta", 4), ("dq", 4 * s.depth),
        ):  # fmt: skip
            sbuf(name, nbytes, slots)
        sbuf("k_turned", turned_columns(min(s.keys, KEYS), s.depth) * size)
        sbuf("v_turned", turned_columns(min(s.keys, KEYS), s.value_depth) * size)
        sbuf("k", blocks * s.depth * size)
        sbuf("natural", blocks * deepest * size)
        for name in ("weights", "slopes", "slopes_turned"):
            sbuf(name, KEYS * size)
        sbuf("product", 4 * max(s.value_depth, KEYS if self.bias is not None else 1))
        sbuf("result", blocks * deepest * 4, 4)
        if s.causal:
            sbuf("mask", PARTITIONS * 4, 1)
            b.memset(self.pools["mask"], n=PARTITIONS)
            b.affine_select(
                self.pools["mask"], self.pools["mask"], n=PARTITIONS, op="greater_equal"
            )
        for name, count in (("scores", 2), ("slope", 2), ("turned", 1), ("dq_bank", 1),
                            ("dk_bank", 1), ("dv_bank", 1)):  # fmt: skip
            self.pools[name] = b.psum(name, free_bytes=2048, slots=count)

    def run(self) -> None:
        """All heads; each writes its gradients (grouped heads add to their keys' gradients)."""
        s = self.shape
        if not (s.heads and s.queries and s.keys):
            return
        self.allocate()
        with loop(self.b, s.heads, "h") as h:
            self._head(h)

    def _head(self, h: Index) -> None:
        s, tiles = self.shape, ceil_div(self.shape.queries, PARTITIONS)
        base = h * tiles
        if self.kept:
            for first, trips, rows in self._blocks(0):
                with loop(self.b, trips, "q") as q:
                    self._load_queries(base + (q + first), rows)
        full, rest = divmod(s.keys, KEYS)
        blocks = ceil_div(s.keys, KEYS)
        # Causal: key blocks that see the same queries, to the nearest of MAX_EXTENTS.
        step = max(1, ceil_div(blocks, MAX_EXTENTS) if s.causal else full)
        groups = [(at, min(step, full - at), KEYS) for at in range(0, full, step)]
        for first, trips, keys in (*groups, *([(full, 1, rest)] if rest else [])):
            with loop(self.b, trips, "k") as k:
                self._keys(h * blocks + (k + first), base, keys, first if s.causal else 0)
        for first, trips, rows in self._blocks(0) if self.kept else ():
            with loop(self.b, trips, "q") as q:
                self._store_query(base + (q + first), rows)

    def _blocks(self, start: int) -> list[tuple[int, int, int]]:
        """(first, count, queries) of the query blocks from block `start` on."""
        full, rest = divmod(self.shape.queries, PARTITIONS)
        found = [(start, full - start, PARTITIONS)] if full > start else []
        return found + ([(full, 1, rest)] if rest else [])

    def _load_queries(self, slot: Index, rows: int) -> None:
        b, s, p, size = self.b, self.shape, self.pools, self.dtype.itemsize
        for name, depth in (("q", s.depth), ("grad", s.value_depth)):
            load_turned(b, p[f"{name}_turned"][slot], p["natural"][slot], p["turned"][0],
                        self.sources[name], rows, depth, self.dtype)  # fmt: skip
            b.load(p[name][slot], self.sources[name], rows=rows, row_bytes=depth * size)
        b.load(p["out"][slot], self.sources["out"], rows=rows, row_bytes=s.value_depth * size)
        b.load(p["lse"][slot], self.sources["lse"], rows=rows, row_bytes=4)
        # delta = row sums of grad * out.
        if self.kept:
            b.memset(p["dq"][slot], n=s.depth, partitions=rows, engine=Engine.GPSIMD)
        given = {"n": s.value_depth, "partitions": rows}
        b.tensor_tensor(p["product"][slot], p["grad"][slot], p["out"][slot], op="multiply",
                        dtype=self.dtype, out_dtype=None if self.dtype == FP32 else FP32, **given)  # type: ignore[arg-type] # fmt: skip
        b.tensor_reduce(p["delta"][slot], p["product"][slot], op="add", **given)  # type: ignore[arg-type]

    def _keys(self, number: Index, base: Index, keys: int, block: int) -> None:
        """One key block: all queries that see it, the next block's scores first."""
        b, s, p, size = self.b, self.shape, self.pools, self.dtype.itemsize
        for name, depth in (("k", s.depth), ("v", s.value_depth)):
            load_turned(b, p[f"{name}_turned"][number], p["natural"][number], p["turned"][0],
                        self.sources[name], keys, depth, self.dtype)  # fmt: skip
        b.load(p["k"][number], self.sources["k"], rows=keys, row_bytes=s.depth * size)
        start = min(block * KEYS // PARTITIONS, ceil_div(s.queries, PARTITIONS))
        segments = self._blocks(start)
        before: tuple[Index, int] | None = None
        for first, trips, rows in segments:
            self._issue(base + first, number, rows, keys, diagonal=s.causal and first == start)
            if before is not None:
                self._use(before[0], number, before[1], keys)
            with loop(b, trips - 1, "q") as q:
                if trips > 1:
                    self._issue(base + (q + first + 1), number, rows, keys, diagonal=False)
                    self._use(base + (q + first), number, rows, keys)
            before = (base + (first + trips - 1), rows)
        if before is not None:
            self._use(before[0], number, before[1], keys)
        self._store_keys(number, keys)

    def _issue(self, slot: Index, number: Index, rows: int, keys: int, diagonal: bool) -> None:
        """Scores and the gradient of the weights, into their PSUM banks."""
        b, s, p = self.b, self.shape, self.pools
        if not self.kept:
            self._load_queries(slot, rows)
        for bank, left, right, depth in (
            ("scores", "q_turned", "k_turned", s.depth),
            ("slope", "grad_turned", "v_turned", s.value_depth),
        ):
            for at in range(0, depth, PARTITIONS):
                b.nc_matmul(p[bank][slot], stationary=p[left][slot], moving=p[right][number],
                            k=min(PARTITIONS, depth - at), m=rows, n=keys, dtype=self.dtype,
                            accumulate=at > 0)  # fmt: skip
        if diagonal:
            b.tensor_tensor(p["scores"][slot], p["scores"][slot], p["mask"], op="add",
                            n=min(PARTITIONS, keys), partitions=rows)  # fmt: skip
        if self.bias is not None:
            b.load(p["product"][slot], self.sources["bias"], rows=rows,
                   row_bytes=keys * self.bias.itemsize)  # fmt: skip
            b.tensor_tensor(p["scores"][slot], p["scores"][slot], p["product"][slot], op="add",
                            n=keys, partitions=rows)  # fmt: skip

    def _use(self, slot: Index, number: Index, rows: int, keys: int) -> None:
        """Weights and score gradients of one block, and their share of dV, dK and dQ."""
        b, s, p = self.b, self.shape, self.pools
        out = None if self.dtype == FP32 else self.dtype
        weights, slopes = p["weights"][slot], p["slopes"][slot]
        b.activation(weights, [p["scores"][slot], p["lse"][slot]], op="exp", n=keys,
                     partitions=rows, dtype=FP32, out_dtype=out)  # fmt: skip
        b.scalar_tensor_tensor(slopes, [p["slope"][slot], p["delta"][slot]], weights,
                               op="subtract,multiply", n=keys, partitions=rows, dtype=FP32,
                               out_dtype=out)  # fmt: skip
        widths = [min(PARTITIONS, keys - at) for at in range(0, keys, PARTITIONS)]
        for left, right, bank, depth in (
            (weights, "grad", "dv_bank", s.value_depth), (slopes, "q", "dk_bank", s.depth),
        ):  # fmt: skip
            for width in widths:
                b.nc_matmul(p[bank][0], stationary=left, moving=p[right][slot], k=rows, m=width,
                            n=depth, dtype=self.dtype, accumulate=True)  # fmt: skip
        for width in widths:
            b.nc_transpose(p["turned"][0], slopes, partitions=rows, n=width, dtype=self.dtype)
        b.tensor_copy(p["slopes_turned"][slot], p["turned"][0], n=len(widths) * rows,
                      partitions=widths[0], dtype=self.dtype)  # fmt: skip
        for width in widths:
            b.nc_matmul(p["dq_bank"][0], stationary=p["slopes_turned"][slot],
                        moving=p["k"][number], k=width, m=rows, n=s.depth, dtype=self.dtype,
                        accumulate=True)  # fmt: skip
        if self.kept:
            b.tensor_tensor(p["dq"][slot], p["dq_bank"][0], p["dq"][slot], op="add", n=s.depth,
                            partitions=rows)  # fmt: skip
        elif "dq" in self.grads:
            b.tensor_copy(p["dq"][slot], p["dq_bank"][0], n=s.depth, partitions=rows)
            self._store_query(slot, rows, accumulate=True)

    def _store_keys(self, number: Index, keys: int) -> None:
        b, s, p = self.b, self.shape, self.pools
        blocks, parts = ceil_div(keys, PARTITIONS), min(keys, PARTITIONS)
        for at, (bank, name, depth) in enumerate(
            (("dv_bank", "dv", s.value_depth), ("dk_bank", "dk", s.depth))
        ):
            if name not in self.grads:
                continue
            dtype = self.grads[name]
            result = p["result"][number * 2 + at]
            b.activation(result, p[bank][0], op="copy", n=blocks * depth, partitions=parts,
                         dtype=FP32, out_dtype=None if dtype == FP32 else dtype)  # fmt: skip
            b.store(self.sources[name], result, rows=keys, row_bytes=depth * dtype.itemsize,
                    accumulate=s.group > 1)  # fmt: skip

    def _store_query(self, slot: Index, rows: int, accumulate: bool = False) -> None:
        if "dq" not in self.grads:
            return
        b, p, dtype, n = self.b, self.pools, self.grads["dq"], self.shape.depth
        result = p["result"][slot]
        b.tensor_scalar(result, p["dq"][slot], op="multiply", n=n, partitions=rows, dtype=FP32,
                        out_dtype=None if dtype == FP32 else dtype)  # fmt: skip
        b.store(self.sources["dq"], result, rows=rows, row_bytes=n * dtype.itemsize,
                accumulate=accumulate)  # fmt: skip


def _backward(
    call: OpCall, core: CoreSpec, shards: int, given: dict[str, TensorSpec],
    bias: TensorSpec | None, causal: bool,
) -> Program:  # fmt: skip
    b = Builder(core, call.name.removeprefix("aten::"))
    outs = dict(zip(("dq", "dk", "dv"), call.outs, strict=False))
    everything = {**given, **outs, **({"bias": bias} if bias is not None else {})}
    sources = {name: b.hbm(name, nbytes=spec.nbytes) for name, spec in everything.items()}
    shape = Shape.of(given["q"], given["k"], given["v"], causal, shards)
    dtype = array_dtype(call.name, given["q"].dtype)
    grads = {name: spec.dtype for name, spec in outs.items()}
    Backward(b, shape, dtype, sources, grads, bias).run()
    return b.build()


@lowering("aten::_scaled_dot_product_flash_attention_for_cpu_backward")
def flash_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(grad, q, k, v, out, logsumexp, dropout_p, is_causal, attn_mask, scale)."""
    names = ("grad", "q", "k", "v", "out", "lse")
    given = dict(zip(names, call.args[:6], strict=True))
    bias = call.arg(8)
    return _backward(call, core, shards, given, bias, bool(call.arg(7)))


@lowering("aten::_scaled_dot_product_fused_attention_overrideable_backward")
def overrideable_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(grad, q, k, v, bias, mask, out, logsumexp, ..., is_causal at 13, ...)."""
    grad, q, k, v, bias, _mask, out, lse = call.args[:8]
    given = {"grad": grad, "q": q, "k": k, "v": v, "out": out, "lse": lse}
    bias = bias if isinstance(bias, TensorSpec) and bias.numel else None
    return _backward(call, core, shards, given, bias, bool(call.arg(13)))
