"""Resampling and average pooling: which elements, with which weights, each result is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.fill import named
from torch_trn.lowering.registry import lowering
from torch_trn.lowering.separable import separable
from torch_trn.lowering.taps import Taps
from torch_trn.program import Program

__all__ = ["dims_of_name", "each_dim", "window"]


def dims_of_name(name: str) -> int:
    """2 of "avg_pool2d"."""
    return next((n for n in (1, 2, 3) if f"{n}d" in name), 2)


def each_dim(value: Any, dims: int, default: Any = None) -> tuple[Any, ...]:
    """One value for each spatial dim of an argument that may be a number or a shorter list."""
    if value is None or isinstance(value, tuple) and not value:
        return each_dim(default, dims) if default is not None else (None,) * dims
    if not isinstance(value, tuple):
        return (value,) * dims
    return value if len(value) == dims else value * dims


# -- average pooling -------------------------------------------------------------------------------
def window(
    ins: int, outs: int, kernel: int, stride: int, padding: int, counts_padding: bool,
    divide: bool = True,
) -> Taps:  # fmt: skip
    """The mean (or the sum) of windows; those at the edge count what they cover."""
    found = []
    for out in range(outs):
        start = out * stride - padding
        end = min(start + kernel, ins + padding)
        first, last = max(start, 0), min(end, ins)
        size = end - start if counts_padding else last - first
        weight = 1.0 / size if divide and size > 0 else 1.0
        found.append(tuple((at, weight) for at in range(first, last)))
    return Taps(ins, tuple(found))


def adaptive(ins: int, outs: int) -> Taps:
    """Windows that divide ``ins`` elements as evenly as they can."""
    found = []
    for out in range(outs):
        first, last = out * ins // outs, -(-(out + 1) * ins // outs)
        found.append(tuple((at, 1.0 / (last - first)) for at in range(first, last)))
    return Taps(ins, tuple(found))


def _average(call: OpCall, x: TensorSpec, out: TensorSpec) -> list[Taps]:
    """Windows of an average pooling of ``x`` to ``out``."""
    dims, given = dims_of_name(call.name), named(call)
    kernel = each_dim(given["kernel_size"], dims)
    stride = each_dim(given.get("stride"), dims, given["kernel_size"])
    padding = each_dim(given.get("padding", 0), dims)
    override = given.get("divisor_override")
    maps = [
        window(ins, outs, size, step, pad, given.get("count_include_pad", True), override is None)
        for ins, outs, size, step, pad in zip(
            x.shape[-dims:], out.shape[-dims:], kernel, stride, padding, strict=True)
    ]  # fmt: skip
    if override is not None:
        last = maps[-1]
        maps[-1] = Taps(last.ins, tuple(
            tuple((at, w / override) for at, w in taps) for taps in last.outs))  # fmt: skip
    return maps


@lowering("aten::avg_pool1d", "aten::avg_pool2d", "aten::avg_pool3d")
def avg_pool(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Means of windows, dim by dim."""
    x = call.args[0]
    return separable(call, core, shards, x, _average(call, x, call.outs[0]))


@lowering("aten::avg_pool2d_backward", "aten::avg_pool3d_backward")
def avg_pool_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """The scaled gradient added to every position of its window."""
    grad = call.args[0]
    maps = [taps.transposed() for taps in _average(call, call.outs[0], grad)]
    return separable(call, core, shards, grad, maps)


@lowering("aten::_adaptive_avg_pool2d", "aten::_adaptive_avg_pool3d", "aten::adaptive_avg_pool2d",
          "aten::adaptive_avg_pool1d", "aten::adaptive_avg_pool3d")  # fmt: skip
def adaptive_avg_pool(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Means of windows that share the plane evenly."""
    return separable(call, core, shards, call.args[0], _evenly(call, call.args[0], call.outs[0]))


@lowering("aten::_adaptive_avg_pool2d_backward", "aten::_adaptive_avg_pool3d_backward",
          "aten::mkldnn_adaptive_avg_pool2d_backward")  # fmt: skip
def adaptive_avg_pool_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """The gradient, shared among its window."""
    grad = call.args[0]
    maps = [taps.transposed() for taps in _evenly(call, call.outs[0], grad)]
    return separable(call, core, shards, grad, maps)


def _evenly(call: OpCall, x: TensorSpec, out: TensorSpec) -> list[Taps]:
    dims = dims_of_name(call.name)
    return [adaptive(*sizes) for sizes in zip(x.shape[-dims:], out.shape[-dims:], strict=True)]


# -- resampling ------------------------------------------------------------------------------------
def _places(ins: int, outs: int, scale: float | None, exact: bool) -> list[int]:
    """Of nearest: ATen multiplies in fp32, so that is what decides at whole numbers."""
    step = torch.tensor(1.0 / scale if scale else ins / outs, dtype=torch.float32)
    at = torch.arange(outs, dtype=torch.float32) + (0.5 if exact else 0.0)
    return [min(int(place), ins - 1) for place in (at * step).floor().tolist()]


def _step(ins: int, outs: int, scale: float | None, aligned: bool) -> float:
    if aligned:
        return (ins - 1) / (outs - 1) if outs > 1 else 0.0
    return 1.0 / scale if scale else ins / outs


def _linear(ins: int, outs: int, scale: float | None, aligned: bool) -> Taps:
    step, found = _step(ins, outs, scale, aligned), []
    for out in range(outs):
        place = out * step if aligned else max(0.0, step * (out + 0.5) - 0.5)
        low = min(int(place), ins - 1)
        part = min(max(place - low, 0.0), 1.0)
        high = low + (low < ins - 1)
        found.append(_kept([(low, 1.0 - part), (high, part)]))
    return Taps(ins, tuple(found))


def _cubic(ins: int, outs: int, scale: float | None, aligned: bool) -> Taps:
    step, found = _step(ins, outs, scale, aligned), []
    for out in range(outs):
        place = out * step if aligned else step * (out + 0.5) - 0.5
        low = math.floor(place)
        part = place - low
        taps = [(min(max(low + at - 1, 0), ins - 1), _keys(abs(part - (at - 1)), -0.75))
                for at in range(4)]  # fmt: skip
        found.append(_kept(taps))
    return Taps(ins, tuple(found))


def _keys(x: float, a: float) -> float:
    """The cubic of a distance."""
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def _lanczos(x: float) -> float:
    if x >= 3:
        return 0.0
    turn = math.pi * x
    return 1.0 if x == 0 else 3 * math.sin(turn) * math.sin(turn / 3) / (turn * turn)


_FILTERS: dict[str, tuple[int, Callable[[float], float]]] = {
    "bilinear": (2, lambda x: max(0.0, 1.0 - x)), "bicubic": (4, lambda x: _keys(x, -0.5)),
    "lanczos": (6, _lanczos),
}  # fmt: skip
"""Antialiasing filters: elements they cover and their weights by distance."""


def _smooth(kind: str, ins: int, outs: int, scale: float | None, aligned: bool) -> Taps:
    size, weight = _FILTERS[kind]
    step, found = _step(ins, outs, scale, aligned), []
    support = size / 2 * max(step, 1.0)
    inverse = 1.0 / step if step >= 1.0 else 1.0
    for out in range(outs):
        center = step * (out + 0.5)
        first = max(int(center - support + 0.5), 0)
        last = min(int(center + support + 0.5), ins)
        weights = [weight(abs((at - center + 0.5) * inverse)) for at in range(first, last)]
        total = sum(weights) or 1.0
        found.append(_kept([(first + i, w / total) for i, w in enumerate(weights)]))
    return Taps(ins, tuple(found))


def _kept(taps: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Each source once, without zero weights."""
    total: dict[int, float] = {}
    for source, weight in taps:
        total[source] = total.get(source, 0.0) + weight
    return tuple((source, weight) for source, weight in total.items() if weight)


def _maps(call: OpCall, ins: Sequence[int], outs: Sequence[int]) -> list[Taps]:
    """The maps of a resampling from ``ins`` to ``outs``."""
    given, dims = named(call), len(ins)
    factors = given.get("scale_factors")
    if isinstance(factors, tuple):
        scales: Sequence[float | None] = factors
    else:
        names = ("scales",) if dims == 1 else ("scales_d", "scales_h", "scales_w")[-dims:]
        scales = [given.get(name) for name in names]
    aligned = bool(given.get("align_corners", False))
    found = []
    for size, out, scale in zip(ins, outs, scales, strict=True):
        if "nearest" in call.name:
            places = _places(size, out, scale, "exact" in call.name)
            found.append(Taps(size, tuple(((at, 1.0),) for at in places)))
        elif "_aa" in call.name:
            kind = next(kind for kind in _FILTERS if kind in call.name)
            found.append(_smooth(kind, size, out, scale, aligned))
        elif size == out and ("linear" in call.name or not aligned) and scale in (None, 1.0):
            found.append(Taps(size, tuple(((at, 1.0),) for at in range(size))))
        else:
            make = _cubic if "bicubic" in call.name else _linear
            found.append(make(size, out, scale, aligned))
    return found


@lowering(
    "aten::upsample_nearest1d", "aten::upsample_nearest2d", "aten::upsample_nearest3d",
    "aten::_upsample_nearest_exact1d", "aten::_upsample_nearest_exact2d",
    "aten::_upsample_nearest_exact3d", "aten::upsample_linear1d", "aten::upsample_bilinear2d",
    "aten::upsample_trilinear3d", "aten::upsample_bicubic2d", "aten::_upsample_bilinear2d_aa",
    "aten::_upsample_bicubic2d_aa", "aten::_upsample_lanczos2d_aa",
)  # fmt: skip
def upsample(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """A copy (nearest), or a weighted sum of taps, dim by dim."""
    x, dims = call.args[0], dims_of_name(call.name)
    maps = _maps(call, x.shape[-dims:], call.outs[0].shape[-dims:])
    return separable(call, core, shards, x, maps)


@lowering(
    "aten::upsample_nearest1d_backward", "aten::upsample_nearest2d_backward",
    "aten::upsample_nearest3d_backward", "aten::_upsample_nearest_exact1d_backward",
    "aten::_upsample_nearest_exact2d_backward", "aten::_upsample_nearest_exact3d_backward",
    "aten::upsample_linear1d_backward", "aten::upsample_bilinear2d_backward",
    "aten::upsample_trilinear3d_backward", "aten::upsample_bicubic2d_backward",
    "aten::_upsample_bilinear2d_aa_backward", "aten::_upsample_bicubic2d_aa_backward",
    "aten::_upsample_lanczos2d_aa_backward",
)  # fmt: skip
def upsample_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Every gradient element added to the input elements it was made of."""
    grad, dims = call.args[0], dims_of_name(call.name)
    maps = _maps(call, call.outs[0].shape[-dims:], grad.shape[-dims:])
    return separable(call, core, shards, grad, [taps.transposed() for taps in maps])
