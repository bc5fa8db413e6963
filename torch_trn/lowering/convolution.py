"""The convolution operators: which product a call is, and its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.conv import Conv, ConvProgram
from torch_trn.lowering.conv_bias import bias_gradient
from torch_trn.lowering.conv_input import Channels
from torch_trn.lowering.conv_shape import Axis, plain, transposed
from torch_trn.lowering.conv_weight import weight_gradient
from torch_trn.lowering.depthwise import depthwise
from torch_trn.lowering.layout import ceil_div
from torch_trn.lowering.matmul import array_dtype
from torch_trn.lowering.registry import lowering
from torch_trn.lowering.run import joined
from torch_trn.memory import CORE
from torch_trn.program import Builder, Program

__all__ = ["Geometry", "Named"]


@dataclass(frozen=True)
class Geometry:
    """Stride, padding, dilation of each pixel axis, and groups."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool = False
    groups: int = 1

    def axes(
        self, x: TensorSpec, kernel: Sequence[int], out: TensorSpec, transposed_: bool
    ) -> tuple[Axis, ...]:
        """Images, then pixels, of the product that makes ``out`` from ``x``."""
        make = transposed if transposed_ else plain
        images = Axis(x.shape[0], out.shape[0], 1, (((0, 0),),))
        sizes = zip(x.shape[2:], out.shape[2:], kernel, self.stride, self.padding, self.dilation,
                    strict=True)  # fmt: skip
        return (images, *(make(*each) for each in sizes))


@dataclass(frozen=True)
class Named:
    """A tensor and its name in the Program."""

    name: str
    spec: TensorSpec


def geometry(
    dims: int, stride: Any = 1, padding: Any = 0, dilation: Any = 1, is_transposed: bool = False,
    groups: int = 1,
) -> Geometry:  # fmt: skip
    """A Geometry from arguments that may be one number for all axes."""

    def each(value: Any) -> tuple[int, ...]:
        values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        return values * dims if len(values) == 1 else values

    return Geometry(each(stride), each(padding), each(dilation), is_transposed, groups)


def emit(
    name: str, core: CoreSpec, shards: int, x: Named, w: Named, out: Named, bias: Named | None,
    g: Geometry, is_transposed: bool,
) -> Program:  # fmt: skip
    """The Program of one product: this core's share of images, groups or output channels."""
    b = Builder(core, name.removeprefix("aten::"))
    if not out.spec.numel:
        return b.build()
    axes = g.axes(x.spec, w.spec.shape[2:], out.spec, is_transposed)
    groups, m = g.groups, out.spec.shape[1] // g.groups
    images = out.spec.shape[0]

    def channels(named: Named, each: int) -> Channels:
        pool = b.hbm(named.name, nbytes=named.spec.nbytes)
        return Channels(named.name, named.spec, groups, each, pool)

    source = channels(x, x.spec.shape[1] // groups)
    kernel = channels(w, w.spec.shape[0] // groups)
    result = channels(out, m)
    offset = None if bias is None else channels(bias, m)
    task = Conv(source, result, kernel, axes, groups, m, array_dtype(name, x.spec.dtype),
                not is_transposed, offset)  # fmt: skip
    if source.each == 1 and groups > 1:
        depthwise(b, task, shards)
        return b.build()
    if shards > 1 and images >= shards:
        share = ceil_div(images, shards)
        first = CORE * share
        task = replace(task, axes=(replace(axes[0], out_size=share), *axes[1:]),
                       x=replace(source, first_image=first),
                       out=replace(result, first_image=first))  # fmt: skip
    elif shards > 1 and groups >= shards:
        share = ceil_div(groups, shards)
        first = CORE * share
        task = replace(
            task, groups=share, x=replace(source, first_group=first),
            out=replace(result, first_group=first), weights=replace(kernel, first_group=first),
            bias=None if offset is None else replace(offset, first_group=first),
        )  # fmt: skip
    elif shards > 1:
        task = replace(task, m=ceil_div(m, shards), first_channel=CORE * ceil_div(m, shards))
    ConvProgram(b, task).run()
    return b.build()


def _arguments(call: OpCall) -> tuple[TensorSpec | None, Geometry]:
    """The bias and the geometry of a forward call, by the operator's own order of arguments."""
    name, args = call.name.removeprefix("aten::").partition(".")[0], call.args
    x, w = args[:2]
    dims = x.ndim - 2
    if name == "mkldnn_convolution":
        bias, padding, stride, dilation, groups = args[2:7]
        return bias, geometry(dims, stride, padding, dilation, False, groups)
    if "slow_conv" in name or name == "conv_depthwise3d":
        bias, stride, padding = args[3:6]
        rest = args[6:]
        is_transposed = "transpose" in name
        dilation = rest[1] if is_transposed else rest[0] if rest else 1
        groups = x.shape[1] if name == "conv_depthwise3d" else 1
        return bias, geometry(dims, stride, padding, dilation, is_transposed, groups)
    bias, stride, padding, dilation, is_transposed, _, groups = args[2:9]
    return bias, geometry(dims, stride, padding, dilation, is_transposed, groups)


@lowering(
    "aten::convolution", "aten::convolution_overrideable", "aten::_convolution",
    "aten::mkldnn_convolution", "aten::conv_depthwise3d", "aten::_slow_conv2d_forward",
    "aten::slow_conv_dilated2d", "aten::slow_conv_dilated3d", "aten::slow_conv3d_forward",
    "aten::slow_conv_transpose2d", "aten::slow_conv_transpose3d",
)  # fmt: skip
def convolution(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """A convolution or a transposed one, with its bias."""
    bias, g = _arguments(call)
    x, w = (Named(f"in{i}", spec) for i, spec in enumerate(call.args[:2]))
    offset = Named("in2", bias) if isinstance(bias, TensorSpec) else None
    out = Named("out0", call.outs[0])
    return emit(call.name, core, shards, x, w, out, offset, g, g.transposed)


def _backward_arguments(call: OpCall) -> tuple[Geometry, tuple[bool, ...]]:
    name, args = call.name.removeprefix("aten::").partition(".")[0], call.args
    dims = args[0].ndim - 2
    if name == "_slow_conv2d_backward":
        stride, padding = args[4:6]
        return geometry(dims, stride, padding), args[6] if len(args) > 6 else (True,) * 3
    start = 4 if name == "convolution_backward" else 3
    stride, padding, dilation, is_transposed, _, groups, mask = args[start : start + 7]
    return geometry(dims, stride, padding, dilation, is_transposed, groups), mask


@lowering(
    "aten::convolution_backward", "aten::convolution_backward_overrideable",
    "aten::_slow_conv2d_backward",
)  # fmt: skip
def convolution_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Gradients of input (a transposed product), weight (over pixels) and bias (row sums)."""
    g, mask = _backward_arguments(call)
    grad, x, w = (Named(f"in{i}", spec) for i, spec in enumerate(call.args[:3]))
    whole = len(call.outs) == len(mask)
    outs: list[Named | None] = []
    for at, wanted in enumerate(mask):
        place = at if whole else sum(mask[:at])
        outs.append(Named(f"out{place}", call.outs[place]) if wanted else None)
    dx, dw, db = outs
    programs = []
    if dx is not None:
        programs.append(emit(call.name, core, shards, grad, w, dx, None, g, not g.transposed))
    if dw is not None:
        outer, inner = (x, grad) if g.transposed else (grad, x)
        axes = g.axes(inner.spec, w.spec.shape[2:], outer.spec, False)
        programs.append(weight_gradient(call.name, core, shards, outer, inner, dw, axes, g.groups))
    if db is not None:
        programs.append(bias_gradient(call.name, core, shards, grad, db))
    return joined(call.name, core, programs) if programs else Builder(core, call.name).build()
