"""Bags of embeddings: rows gathered, those of a bag summed by a scatter that combines.

Which bag an item is in comes from the offsets: a mark at each, then a running sum. Every core does
this in scratch memory of its own; results are shared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torch_trn.chip import CoreSpec
from torch_trn.errors import UnsupportedOpError
from torch_trn.lowering.call import Named, OpCall, TensorSpec, named_args
from torch_trn.lowering.combine import combine
from torch_trn.lowering.index import selection
from torch_trn.lowering.indexed import Gathered, Number, gather
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import grid
from torch_trn.lowering.move import fill, mover, transfer
from torch_trn.lowering.part import Part
from torch_trn.lowering.registry import lowering
from torch_trn.lowering.run import joined, lower_kernel
from torch_trn.lowering.scatter import Scattered
from torch_trn.lowering.softmax import row_grid
from torch_trn.lowering.tile import FP32, INT32
from torch_trn.memory import Pool, Space
from torch_trn.program import Builder, Program

__all__: list[str] = []

_SUM, _MEAN = 0, 1


@lowering("aten::_embedding_bag", "aten::_embedding_bag_forward_only")
def embedding_bag(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Sums or means of a table's rows; which bag each item is in; how many items bags have."""
    return _Bags(call, core, shards, _forward_arguments(call)).forward()


@lowering("aten::_embedding_bag_backward")
def embedding_bag_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """The table's gradient, from the offsets where the items' bags were not kept."""
    names = ("grad", "indices", "offsets", "bags", "sizes", "maxima", "count", "frequency", "mode",
             "sparse", "weights", "padding")  # fmt: skip
    return _Bags(call, core, shards, dict(zip(names, named_args(call), strict=True))).backward()


@lowering("aten::_embedding_bag_dense_backward")
def embedding_bag_dense_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """The table's gradient."""
    names = ("grad", "indices", "bags", "sizes", "maxima", "count", "frequency", "mode", "weights",
             "padding")  # fmt: skip
    return _Bags(call, core, shards, dict(zip(names, named_args(call), strict=True))).backward()


@lowering("aten::_embedding_bag_per_sample_weights_backward")
def per_sample_weights_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """The gradients of the items' weights: their rows times the gradients of their bags."""
    names = ("grad", "table", "indices", "offsets", "bags", "mode", "padding")
    return _Bags(call, core, shards, dict(zip(names, named_args(call), strict=True))).weights()


def _forward_arguments(call: OpCall) -> dict[str, object]:
    names = ("table", "indices", "offsets", "frequency", "mode", "sparse", "weights", "last",
             "padding")  # fmt: skip
    return dict(zip(names, named_args(call), strict=True))


class _Bags:
    """One operator on bags while its Programs are made: each part hands scratch to the next."""

    def __init__(
        self, call: OpCall, core: CoreSpec, shards: int, given: dict[str, object]
    ) -> None:  # fmt: skip
        self.call, self.core, self.shards = call, core, shards
        self.given = given
        if given["mode"] not in (_SUM, _MEAN):
            raise UnsupportedOpError(
                call.name, "mode='max' keeps the number of each maximum, and which rows of a bag "
                "meet depends on data",
            )  # fmt: skip
        if given.get("frequency") and "table" not in given:
            raise UnsupportedOpError(call.name, "gradients scaled by how often an index occurs")
        self.padding = int(given["padding"])  # type: ignore[call-overload]
        self.indices = self._tensor("indices")
        self.items = self.indices.spec.numel
        self.programs: list[Program] = []

    def _tensor(self, name: str) -> Named:
        found = self.given[name]
        assert isinstance(found, Named)
        return found

    def _scratch(self, name: str, dtype: torch.dtype, *shape: int) -> tuple[Pool, TensorSpec]:
        spec = TensorSpec.contiguous(dtype, *shape)
        return Pool(name, Space.HBM, max(spec.nbytes, 8)), spec

    def _hbm(self, b: Builder, named: Named) -> Pool:
        return b.hbm(named.name, nbytes=named.spec.nbytes)

    def _kernel(
        self, shape: Sequence[int], outs: Sequence[tuple[Pool | str, TensorSpec]],
        ins: Sequence[tuple[Pool | str, TensorSpec]], shards: int,
    ) -> Kernel:  # fmt: skip
        """An elementwise kernel over ``shape``; tensors are broadcast to it."""
        pairs = [*outs, *ins]
        walked = grid(tuple(shape), [spec for _, spec in pairs])
        return Kernel(self.core, walked, len(outs), shards, [name for name, _ in pairs])

    def _done(self, kernel: Kernel) -> None:
        self.programs.append(lower_kernel(kernel, self.call.name))

    def _joined(self) -> Program:
        return joined(self.call.name, self.core, self.programs)

    # -- which bag an item is in -----------------------------------------------------------------
    def bags(self, count: int) -> tuple[Pool | str, TensorSpec]:
        """The bag of each item: as it was given, or from the offsets of ``count`` bags."""
        kept = self.given.get("bags")
        if isinstance(kept, Named) and kept.spec.numel == self.items:
            return kept.name, kept.spec
        marks, line = self._scratch("marks", FP32, self.items + 1)
        offsets = self._tensor("offsets")
        b = mover(self.core, self.call.name)
        one = b.hbm("one", nbytes=4)
        fill(b, one, Part(FP32, (1,), (1,)), 1.0, name="one_tile")
        b.adopt(marks)
        fill(b, marks, Part.of(line), 0.0, name="zero_tile")
        still = Part(FP32, (count,), (0,))
        spots = Part.of(offsets.spec).narrow(0, 0, count)
        numbers = (Number(self._hbm(b, offsets), spots, self.items + 1, 1),)
        combine(b, Gathered(still, still, numbers, 1), 0, marks, one, "add", 1)
        self.programs.append(b.build())
        found = self._scratch("bags", INT32, self.items)
        short = TensorSpec.contiguous(FP32, self.items)
        walked = row_grid((self.items,), [0], [found[1], short])
        kernel = Kernel(self.core, walked, 1, 1, [found[0], marks])
        kernel.store(0, kernel.scan("add", kernel.ins[0]) + -1.0)
        self._done(kernel)
        return found

    def _number(self, b: Builder, source: tuple[Pool | str, TensorSpec]) -> tuple[Pool, Part]:
        pool, spec = source
        held = b.adopt(pool) if isinstance(pool, Pool) else b.hbm(pool, nbytes=spec.nbytes)
        return held, Part.of(spec)

    def _rows(
        self, table: tuple[Pool | str, TensorSpec], numbers: tuple[Pool | str, TensorSpec],
        name: str,
    ) -> tuple[Pool, TensorSpec]:  # fmt: skip
        """[items, width]: the table's rows at the numbers."""
        rows = self._scratch(name, table[1].dtype, self.items, table[1].shape[1])
        b = mover(self.core, self.call.name)
        source, part = self._number(b, table)
        spots, places = self._number(b, numbers)
        found = selection(part, 0, places, Part.of(rows[1]), spots)
        gather(b, found, source, b.adopt(rows[0]), 1)
        self.programs.append(b.build())
        return rows

    def _weighed(self, rows: tuple[Pool, TensorSpec]) -> tuple[Pool, TensorSpec]:
        """Rows in fp32 times their items' weights; those of the padding index are zero."""
        weights = self.given.get("weights")
        if self.padding < 0 and not isinstance(weights, Named):
            return rows
        found = self._scratch("weighed", FP32, *rows[1].shape)
        ins: list[tuple[Pool | str, TensorSpec]] = [
            rows, (self.indices.name, _column(self.indices.spec))
        ]  # fmt: skip
        if isinstance(weights, Named):
            ins.append((weights.name, _column(weights.spec)))
        kernel = self._kernel(found[1].shape, [found], ins, 1)
        value, index, *factors = kernel.ins
        if self.padding >= 0:
            counts = kernel.binary("not_equal", index, self.padding, torch.bool)
            value = kernel.select(counts, value, 0.0, FP32)
        kernel.store(0, value * factors[0] if factors else value)
        self._done(kernel)
        return found

    def _summed(
        self, values: tuple[Pool | str, TensorSpec], bags: tuple[Pool | str, TensorSpec],
        count: int, name: str,
    ) -> tuple[Pool, TensorSpec]:  # fmt: skip
        """[count, width] in fp32: the values of each bag's items summed."""
        width = values[1].shape[1]
        sums = self._scratch(name, FP32, count, width)
        b = mover(self.core, self.call.name)
        fill(b, b.adopt(sums[0]), Part.of(sums[1]), 0.0, name="zero_tile")
        source, part = self._number(b, values)
        spots, places = self._number(b, bags)
        found = selection(Part.of(sums[1]), 0, places, part, spots)
        combine(b, found, 0, sums[0], source, "add", 1)
        self.programs.append(b.build())
        return sums

    def _sizes(
        self, bags: tuple[Pool | str, TensorSpec], count: int
    ) -> tuple[Pool, TensorSpec]:  # fmt: skip
        """[count, 1]: how many items of each bag count."""
        marks = self._scratch("counted", FP32, self.items, 1)
        kernel = self._kernel(
            (self.items, 1), [marks], [(self.indices.name, _column(self.indices.spec))], 1
        )
        kernel.store(0, kernel.binary("not_equal", kernel.ins[0], self.padding, FP32))
        self._done(kernel)
        return self._summed(marks, bags, count, "sizes")

    # -- operators -------------------------------------------------------------------------------
    def forward(self) -> Program:
        """The bags' sums or means, the items' bags, the bags' sizes (twice, as ATen has them)."""
        out, kept, *sizes = self.call.outs
        count = out.shape[0]
        table = self._tensor("table")
        bags = self.bags(count)
        rows = self._weighed(self._rows((table.name, table.spec), (self.indices.name,
                                        _flat(self.indices.spec)), "rows"))  # fmt: skip
        sums = self._summed(rows, bags, count, "sums")
        means = self.given["mode"] == _MEAN
        divided = [self._sizes(bags, count)] if means else []
        kernel = self._kernel(out.shape, [("out0", out)], [sums, *divided], self.shards)
        value, *number = kernel.ins
        if number:
            value = value * kernel.reciprocal(kernel.binary("max", number[0], 1.0))
        kernel.store(0, kernel.cast(value, FP32) if value is kernel.ins[0] else value)
        self._done(kernel)
        b = mover(self.core, self.call.name)
        if kept.numel:
            source, part = self._number(b, bags)
            transfer(b, b.hbm("out1", nbytes=kept.nbytes), Part.of(kept), source, part, self.shards)
        for number_, spec in enumerate(sizes, 2):
            pool = b.hbm(f"out{number_}", nbytes=spec.nbytes)
            if divided and spec.numel == count:
                source, part = self._number(b, divided[0])
                transfer(b, pool, Part.of(spec), source, part.select(1, 0), self.shards)
            else:
                fill(b, pool, Part.of(spec), 0, self.shards, name=f"zeros{number_}")
        self.programs.append(b.build())
        return self._joined()

    def backward(self) -> Program:
        """Rows of zeros, then each item's share of its bag's gradient added to its row."""
        grad = self._tensor("grad")
        slopes: tuple[Pool | str, TensorSpec] = (grad.name, grad.spec)
        if self.given["mode"] == _MEAN:
            sizes = self._tensor("sizes")
            slopes = self._scratch("slopes", FP32, *grad.spec.shape)
            ins: list[tuple[Pool | str, TensorSpec]] = [
                (grad.name, grad.spec), (sizes.name, _column(sizes.spec))
            ]  # fmt: skip
            kernel = self._kernel(grad.spec.shape, [slopes], ins, 1)
            value, number = kernel.ins
            kernel.store(0, value * kernel.reciprocal(kernel.binary("max", number, 1.0, FP32)))
            self._done(kernel)
        shares = self._weighed(self._rows(slopes, self.bags(grad.spec.shape[0]), "shares"))
        call = OpCall(self.call.name, self.call.args, self.call.outs[:1])
        work = Scattered(call, self.core, self.shards)
        source, part = self._number(work.b, shares)
        spots = Part.of(_flat(self.indices.spec))
        position = int(self.indices.name.removeprefix("in"))
        found = selection(work.out, 0, spots, part, work.pools[position])
        self.programs.append(work.run(found, (None, 1), source, "add"))
        return self._joined()

    def weights(self) -> Program:
        """Each item's row times the gradient of its bag, summed along the row."""
        out, grad, table = self.call.outs[0], self._tensor("grad"), self._tensor("table")
        bags = self.bags(grad.spec.shape[0])
        slopes = self._rows((grad.name, grad.spec), bags, "slopes")
        rows = self._rows(
            (table.name, table.spec), (self.indices.name, _flat(self.indices.spec)), "rows"
        )  # fmt: skip
        kept = TensorSpec(out.dtype, (self.items, 1), (out.strides[0], 0))
        specs = [kept, slopes[1], rows[1], _column(self.indices.spec)]
        walked = row_grid(rows[1].shape, [1], specs)
        kernel = Kernel(
            self.core, walked, 1, self.shards, ["out0", slopes[0], rows[0], self.indices.name]
        )  # fmt: skip
        slope, row, index = kernel.ins
        value = kernel.reduce("add", kernel.binary("multiply", slope, row, FP32), FP32)
        if self.padding >= 0:
            counts = kernel.binary("not_equal", index, self.padding, torch.bool)
            value = kernel.select(counts, value, 0.0, FP32)
        kernel.store(0, value)
        self._done(kernel)
        return self._joined()


def _flat(spec: TensorSpec) -> TensorSpec:
    """A list of numbers as one dim (torch gives contiguous ones)."""
    return TensorSpec.contiguous(spec.dtype, spec.numel)


def _column(spec: TensorSpec) -> TensorSpec:
    """One element for each row."""
    return TensorSpec(spec.dtype, (spec.numel, 1), (spec.strides[-1] if spec.ndim else 1, 0))
