"""Padding: the inside copied, the border filled, reflected or repeated; and the gradients of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product as combinations

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import OpCall
from torch_trn.lowering.move import fill, inputs_of, mover, outputs_of, transfer
from torch_trn.lowering.part import Part
from torch_trn.lowering.registry import lowering
from torch_trn.lowering.resample import dims_of_name
from torch_trn.lowering.separable import separable
from torch_trn.lowering.taps import Taps
from torch_trn.program import Program

__all__: list[str] = []


@lowering("aten::constant_pad_nd")
def constant_pad(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(self, pad, value): slabs of the border filled, the inside copied; negative pads crop."""
    x, pads, value = call.args[0], call.args[1], call.arg(2, 0)
    b = mover(core, call.name)
    (source,), (result,) = inputs_of(b, call), outputs_of(b, call)
    inside, out = Part.of(x), Part.of(call.outs[0])
    if not out.numel:
        return b.build()
    for number in range(len(pads) // 2 - 1, -1, -1):
        dim = x.ndim - 1 - number
        before, after = pads[2 * number], pads[2 * number + 1]
        length = max(0, inside.sizes[dim] + min(before, 0) + min(after, 0))
        inside = inside.narrow(dim, max(-before, 0), length)
        size = out.sizes[dim]
        for name, at, count in (
            (f"before{number}", 0, max(before, 0)), (f"after{number}", size - after, max(after, 0)),
        ):  # fmt: skip
            if count:
                fill(b, result, out.narrow(dim, at, count), value, shards, name)
        out = out.narrow(dim, max(before, 0), length)
    transfer(b, result, out, source, inside, shards)
    return b.build()


def _pieces(kind: str, size: int, before: int, after: int) -> list[tuple[int, int, int, int]]:
    """(place in the result, place in the source, count, step) along one dim."""
    first, last = max(-before, 0), size - max(-after, 0)
    found = [(max(before, 0), first, last - first, 1)]
    reflects = kind == "reflection"
    if before > 0:
        found.append((0, before if reflects else 0, before, -1 if reflects else 0))
    if after > 0:
        at = size - 2 if reflects else size - 1
        found.append((max(before, 0) + last - first, at, after, -1 if reflects else 0))
    return found


def _pads(call: OpCall, pads: Sequence[int], sizes: Sequence[int]) -> list[list]:
    """The pieces of each padded dim, the first of ``sizes`` first."""
    kind = "reflection" if "reflection" in call.name else "replication"
    count = len(sizes)
    return [
        _pieces(kind, size, pads[2 * (count - 1 - at)], pads[2 * (count - 1 - at) + 1])
        for at, size in enumerate(sizes)
    ]


@lowering(
    "aten::reflection_pad1d", "aten::reflection_pad2d", "aten::reflection_pad3d",
    "aten::replication_pad1d", "aten::replication_pad2d", "aten::replication_pad3d",
)  # fmt: skip
def edge_pad(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """A copy for every combination of inside and borders."""
    x, pads, dims = call.args[0], call.args[1], dims_of_name(call.name)
    b = mover(core, call.name)
    (source,), (result,) = inputs_of(b, call), outputs_of(b, call)
    first = x.ndim - dims
    for chosen in combinations(*_pads(call, pads, x.shape[first:])):
        to, given = Part.of(call.outs[0]), Part.of(x)
        for dim, (place, at, count, step) in enumerate(chosen, first):
            to, given = to.narrow(dim, place, count), given.narrow(dim, at, count, step)
        transfer(b, result, to, source, given, shards)
    return b.build()


@lowering(
    "aten::reflection_pad1d_backward", "aten::reflection_pad2d_backward",
    "aten::reflection_pad3d_backward", "aten::replication_pad1d_backward",
    "aten::replication_pad2d_backward", "aten::replication_pad3d_backward",
)  # fmt: skip
def edge_pad_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(grad, self, padding): the gradients of an element's copies added, dim by dim."""
    grad, pads, dims = call.args[0], call.args[2], dims_of_name(call.name)
    maps = []
    sizes = call.outs[0].shape[-dims:]
    for size, padded, pieces in zip(
        sizes, grad.shape[-dims:], _pads(call, pads, sizes), strict=True
    ):
        outs: list[int] = [0] * padded
        for place, at, count, step in pieces:
            for i in range(count):
                outs[place + i] = at + i * step
        maps.append(Taps(size, tuple(((source, 1.0),) for source in outs)).transposed())
    return separable(call, core, shards, grad, maps)
