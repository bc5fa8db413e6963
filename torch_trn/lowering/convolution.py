"""The convolution operators: which product a call is, and its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.conv import Conv, ConvProgram
from torch_trn.lowering.conv_weight import bias_gradient, weight_gradient
from torch_trn.lowering.depthwise import depthwise
from torch_trn.lowering.foreach import joined
from torch_trn.lowering.layout import ceil_div, product
from torch_trn.lowering.matmul import array_dtype
from torch_trn.lowering.norm import masked_outs
from torch_trn.lowering.registry import lowering
from torch_trn.program import Builder, Program


def channels_last(spec: TensorSpec) -> bool:
    """Whether the channels of [N, C, ...] lie next to each other."""
    return spec.ndim > 2 and spec.strides[1] == 1 and spec.shape[1] > 1


def plane_run(spec: TensorSpec) -> int:
    """Elements of one channel that lie next to each other."""
    run = 1
    for size, step in zip(reversed(spec.shape[2:]), reversed(spec.strides[2:]), strict=True):
        if size > 1 and step != run:
            break
        run *= size
    return run


def forward_sizes(
    name: str, x: TensorSpec, w: TensorSpec, out: TensorSpec, groups: int, transposed: bool,
) -> Conv:  # fmt: skip
    """The product of a convolution or of a transposed one."""
    taps = product(w.shape[2:])
    pixels_in, pixels_out = product(x.shape[2:]), product(out.shape[2:])
    if transposed:
        k, m = x.shape[1] // groups, w.shape[1]
        pixels, read, written = pixels_in, pixels_in, max(pixels_out, pixels_in)
    else:
        k, m = w.shape[1], w.shape[0] // groups
        pixels, read, written = pixels_out, pixels_in, pixels_out
    return Conv(
        x.shape[0], groups, k, m, taps, pixels, read, written, plane_run(x), plane_run(out),
        array_dtype(name, x.dtype), out.dtype, turn_weights=not transposed,
        turn_input=channels_last(x), turn_output=channels_last(out),
    )  # fmt: skip


def shared(c: Conv, shards: int) -> Conv:
    """The share of one core: images, groups or output channels."""
    if shards > 1:
        if c.images >= shards:
            c.images = ceil_div(c.images, shards)
        elif c.groups >= shards:
            c.groups = ceil_div(c.groups, shards)
        else:
            c.m = ceil_div(c.m, shards)
    return c


def _emit(
    name: str, core: CoreSpec, shards: int, x: TensorSpec, w: TensorSpec, out: TensorSpec,
    bias: TensorSpec | None, c: Conv,
) -> Program:  # fmt: skip
    b = Builder(core, name.removeprefix("aten::"))
    source, kernel = b.hbm("x", nbytes=x.nbytes), b.hbm("w", nbytes=w.nbytes)
    result = b.hbm("out", nbytes=out.nbytes)
    offset = b.hbm("bias", nbytes=bias.nbytes) if bias is not None else None
    c = shared(c, shards)
    if c.k == 1 and c.groups > 1:
        depthwise(b, c, source, kernel, result, offset)
    else:
        ConvProgram(b, c, source, kernel, result, offset).run()
    return b.build()


@lowering(
    "aten::convolution", "aten::convolution_overrideable", "aten::_convolution",
    "aten::mkldnn_convolution", "aten::conv_depthwise3d", "aten::_slow_conv2d_forward",
    "aten::slow_conv_dilated2d", "aten::slow_conv_dilated3d", "aten::slow_conv3d_forward",
    "aten::slow_conv_transpose2d", "aten::slow_conv_transpose3d",
)  # fmt: skip
def convolution(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)."""
    x, w = call.args[:2]
    bias = next((a for a in call.args[2:5] if isinstance(a, TensorSpec)), None)
    flags = [a for a in call.args[3:] if isinstance(a, bool)]
    transposed = bool(flags and flags[0]) or "transpose" in call.name
    out = call.outs[0]
    groups = x.shape[1] // w.shape[1] if not transposed else out.shape[1] // max(w.shape[1], 1)
    sizes = forward_sizes(call.name, x, w, out, max(groups, 1), transposed)
    return _emit(call.name, core, shards, x, w, out, bias, sizes)


def mask_of(args: Sequence[Any]) -> tuple[bool, ...]:
    """The output mask: the last argument that is a tuple of three flags."""
    return next(
        (a for a in reversed(args) if isinstance(a, tuple) and len(a) == 3
         and all(isinstance(v, bool) for v in a)), (True, True, True),
    )  # fmt: skip


@lowering(
    "aten::convolution_backward", "aten::convolution_backward_overrideable",
    "aten::_slow_conv2d_backward",
)  # fmt: skip
def convolution_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Gradients of input (a transposed product), weight (over pixels) and bias (row sums)."""
    grad, x, w = call.args[:3]
    transposed = next((a for a in call.args[3:] if isinstance(a, bool)), False)
    dx, dw, db = (*masked_outs(call, mask_of(call.args)), None, None, None)[:3]
    groups = max(1, (grad.shape[1] // max(w.shape[1], 1)) if transposed
                 else x.shape[1] // max(w.shape[1], 1))  # fmt: skip
    programs = []
    if dx is not None:
        sizes = forward_sizes(call.name, grad, w, dx, groups, not transposed)
        programs.append(_emit(call.name, core, shards, grad, w, dx, None, sizes))
    if dw is not None:
        programs.append(
            weight_gradient(call.name, core, shards, grad, x, w, dw, groups, transposed)
        )
    if db is not None:
        programs.append(bias_gradient(call.name, core, shards, grad, db))
    return joined(call.name, core, programs) if programs else Builder(core, call.name).build()
