"""Normalisation layers: statistics and scaling in one pass over rows held in SBUF.

The normalised value is one ScalarE activation (scale and bias are free there), statistics are
bn_stats on VectorE, gradients of weight and bias are sums over rows on TensorE.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import Grid, Operand, product
from torch_trn.lowering.registry import lowering
from torch_trn.lowering.run import lower_kernel
from torch_trn.lowering.softmax import row_grid
from torch_trn.lowering.tile import Tile, Value
from torch_trn.program import Program

#: Rows up to which tiles take turns (run.py), so that hand-overs between engines cost nothing.
SHORT_ROW = 2048


def masked_outs(call: OpCall, mask: Sequence[bool]) -> list[TensorSpec | None]:
    """The result for each entry of an output mask, None where it is not asked for."""
    if len(call.outs) == len(mask):
        return [out if wanted else None for out, wanted in zip(call.outs, mask, strict=True)]
    given = iter(call.outs)
    return [next(given, None) if wanted else None for wanted in mask]


class Operands:
    """Tensors of a kernel by name, so that optional ones may be missing."""

    def __init__(self, outs: Mapping[str, TensorSpec | None], ins: Mapping[str, Any]) -> None:
        self.outs = {k: v for k, v in outs.items() if v is not None}
        self.ins = {k: v for k, v in ins.items() if isinstance(v, TensorSpec)}
        self.specs = [*self.outs.values(), *self.ins.values()]

    def kernel(self, core: CoreSpec, grid: Grid, shards: int) -> Kernel:
        """The Kernel over `grid`, whose operands are `specs` in order."""
        return Kernel(core, grid, len(self.outs), shards)

    def values(self, kernel: Kernel) -> dict[str, Value]:
        """Inputs by name."""
        return dict(zip(self.ins, kernel.ins, strict=True))

    def store(self, kernel: Kernel, name: str, value: Value, rows: bool = False) -> None:
        """Result `name`, if it is asked for; `rows` sums it over all rows."""
        if name in self.outs:
            index = list(self.outs).index(name)
            if rows:
                kernel.rowsum(index, value)
            else:
                kernel.store(index, value)


def normalised(t: Tile, x: Value, mean: Value, rstd: Value) -> Value:
    """(x - mean) * rstd on ScalarE: scale rstd, bias -mean * rstd."""
    return t.act("identity", x, scale=rstd, bias=t.stt(mean, "multiply", -1.0, "multiply", rstd))


def _tail(x: TensorSpec, normal: Sequence[int]) -> list[int]:
    return list(range(x.ndim - len(normal), x.ndim))


@lowering("aten::native_layer_norm", "aten::layer_norm")
def layer_norm(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """y, mean, rstd = layer_norm(x, normalized_shape, weight, bias, eps)."""
    x, normal, weight, bias = call.args[:4]
    eps = call.arg(4, 1e-5)
    outs = dict(zip(("y", "mean", "rstd"), call.outs, strict=False))
    tensors = Operands(outs, {"x": x, "weight": weight, "bias": bias})
    kernel = tensors.kernel(core, row_grid(x.shape, _tail(x, normal), tensors.specs), shards)
    v = tensors.values(kernel)
    mean, var = kernel.stats(v["x"])
    rstd = kernel.act("rsqrt", var, bias=eps)
    y = normalised(kernel, v["x"], mean, rstd)
    y = y * v["weight"] if "weight" in v else y
    tensors.store(kernel, "y", y + v["bias"] if "bias" in v else y)
    tensors.store(kernel, "mean", mean)
    tensors.store(kernel, "rstd", rstd)
    return lower_kernel(kernel, call.name)


@lowering("aten::_fused_rms_norm", "aten::rms_norm")
def rms_norm(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """y, rstd = x / sqrt(mean(x^2) + eps) * weight."""
    x, normal, weight = call.args[:3]
    eps = call.arg(3) or 1e-6
    count = max(product(normal), 1)
    outs = dict(zip(("y", "rstd"), call.outs, strict=False))
    tensors = Operands(outs, {"x": x, "weight": weight})
    kernel = tensors.kernel(core, row_grid(x.shape, _tail(x, normal), tensors.specs), shards)
    v = tensors.values(kernel)
    total = kernel.act_sum("square", v["x"])[1]
    rstd = kernel.act("rsqrt", total, scale=1 / count, bias=eps)
    y = kernel.act("identity", v["x"], scale=rstd)
    tensors.store(kernel, "y", y * v["weight"] if "weight" in v else y)
    tensors.store(kernel, "rstd", rstd)
    return lower_kernel(kernel, call.name)


@lowering("aten::native_layer_norm_backward")
def layer_norm_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """dx, dweight, dbias; see `_backward`."""
    grad, x, normal, mean, rstd, weight, _bias, mask = call.args[:8]
    return _backward(call, core, shards, (grad, x, mean, rstd, weight), normal, mask)


@lowering("aten::_fused_rms_norm_backward")
def rms_norm_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """dx, dweight; as layer_norm without a mean."""
    grad, x, normal, rstd, weight, mask = call.args[:6]
    return _backward(call, core, shards, (grad, x, None, rstd, weight), normal, mask)


def _backward(
    call: OpCall, core: CoreSpec, shards: int, args: Sequence[Any], normal: Sequence[int],
    mask: Sequence[bool],
) -> Program:  # fmt: skip
    """dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) with g = grad * weight."""
    grad, x, mean, rstd, weight = args
    outs = dict(zip(("dx", "dweight", "dbias"), masked_outs(call, mask), strict=False))
    named = {"grad": grad, "x": x, "mean": mean, "rstd": rstd, "weight": weight}
    tensors = Operands(outs, named)
    grid = _with_rows(row_grid(x.shape, _tail(x, normal), [x, *tensors.specs]), tensors)
    kernel = tensors.kernel(core, grid, shards)
    v, count = tensors.values(kernel), max(product(normal), 1)
    if mean is not None:
        xhat = normalised(kernel, v["x"], v["mean"], v["rstd"])
    else:
        xhat = kernel.act("identity", v["x"], scale=v["rstd"])
    slope = v["grad"] * v["weight"] if "weight" in v else v["grad"]
    if "dx" in tensors.outs:
        # ScalarE has time for the sum; in long rows a hand-over costs more than it saves.
        weighted = slope * xhat
        short = count <= SHORT_ROW
        total = kernel.act_sum("copy", weighted)[1] if short else kernel.reduce("add", weighted)
        inner = total * (-1 / count)
        dx = kernel.stt(xhat, "multiply", inner, "add", slope)
        if mean is not None:
            middle = kernel.act_sum("copy", slope)[1]
            shift = kernel.stt(middle, "multiply", -1 / count, "multiply", v["rstd"])
            dx = kernel.act("identity", dx, scale=v["rstd"], bias=shift)
        else:
            dx = kernel.act("identity", dx, scale=v["rstd"])
        tensors.store(kernel, "dx", dx)
    if "dweight" in tensors.outs:
        tensors.store(kernel, "dweight", v["grad"] * xhat, rows=True)
    if "dbias" in tensors.outs:
        tensors.store(kernel, "dbias", v["grad"], rows=True)
    return lower_kernel(kernel, call.name)


def _with_rows(grid: Grid, tensors: Operands) -> Grid:
    """`grid` without its leading shape-giver; weight gradients are rows also of a single row."""
    operands = list(grid.operands[1:])
    for position, name in enumerate(tensors.outs):
        if name in ("dweight", "dbias"):
            operands[position] = Operand(operands[position].spec, "row", max(grid.cols, 1))
    return Grid(grid.rows, grid.cols, tuple(operands))


# -- group norm ----------------------------------------------------------------------------------
def _channels(spec: TensorSpec, n: int, c: int, hw: int) -> TensorSpec:
    """A tensor of N x C x ... as N x C x HW."""
    inner = spec.strides[-1] if spec.ndim > 2 else 1
    if hw == 1:
        inner = 1
    step_n = spec.strides[0] if spec.ndim > 0 else c * hw
    step_c = spec.strides[1] if spec.ndim > 1 else hw
    if spec.numel != n * c * hw:
        return spec
    return TensorSpec(spec.dtype, (n, c, hw), (step_n, step_c, inner))


def _per_channel(spec: Any) -> Any:
    if not isinstance(spec, TensorSpec):
        return None
    return TensorSpec(spec.dtype, (spec.numel, 1), (1, 1))


@lowering("aten::native_group_norm")
def group_norm(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """y, mean, rstd: a channel in each partition, statistics joined over a group on TensorE."""
    x, weight, bias, n, c, hw, groups, eps = call.args[:8]
    outs = {"y": _channels(call.outs[0], n, c, hw)}
    named = {
        "x": _channels(x, n, c, hw),
        "weight": _per_channel(weight),
        "bias": _per_channel(bias),
    }
    tensors = Operands(outs, named)
    grid = row_grid((n, c, hw), [2], tensors.specs)
    small = tuple(Operand(spec, "col", every=c // groups) for spec in call.outs[1:3])
    grid = Grid(grid.rows, grid.cols, (grid.operands[0], *small, *grid.operands[1:]))
    kernel = Kernel(core, grid, 1 + len(small), shards)
    v = tensors.values(kernel)
    mean, var = kernel.stats(v["x"])
    if c > groups:
        second = kernel.stt(mean, "multiply", mean, "add", var)
        mean = kernel.fold_groups(mean, c // groups)
        var = kernel.stt(
            mean, "multiply", mean, "subtract", kernel.fold_groups(second, c // groups)
        )
    rstd = kernel.act("rsqrt", var, bias=eps)
    scale = rstd * v["weight"] if "weight" in v else rstd
    shift = kernel.stt(mean, "multiply", -1.0, "multiply", scale)
    shift = shift + v["bias"] if "bias" in v else shift
    kernel.store(0, kernel.act("identity", v["x"], scale=scale, bias=shift))
    for index, value in enumerate((mean, rstd)[: len(small)], 1):
        kernel.store(index, value)
    return lower_kernel(kernel, call.name)


@lowering("aten::native_group_norm_backward")
def group_norm_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """dx, dweight, dbias; sums of grad and grad * x per channel, joined over a group on TensorE."""
    grad, x, mean, rstd, weight, n, c, hw, groups, mask = call.args[:10]
    results = masked_outs(call, mask)
    per = c // groups
    outs = {"dx": _channels(results[0], n, c, hw) if results[0] else None}
    named = {
        "grad": _channels(grad, n, c, hw), "x": _channels(x, n, c, hw),
        "weight": _per_channel(weight),
    }  # fmt: skip
    tensors = Operands(outs, named)
    grid = row_grid((n, c, hw), [2], [named["x"], *tensors.specs])
    sums = [Operand(replace_shape(spec, c), "col", every=n) for spec in results[1:] if spec]
    stats = tuple(Operand(spec, "col", every=per) for spec in (mean, rstd))
    first = len(tensors.outs)
    operands = (*grid.operands[1 : 1 + first], *sums, *grid.operands[1 + first :], *stats)
    kernel = Kernel(core, Grid(grid.rows, grid.cols, operands), first + len(sums), shards)
    v = dict(zip([*tensors.ins, "mean", "rstd"], kernel.ins, strict=True))
    count = max(per * hw, 1)
    total = kernel.act_sum("copy", v["grad"])[1]
    inner = kernel.reduce("add", v["grad"] * v["x"])
    if results[0]:
        scaled = (total * v["weight"], inner * v["weight"]) if "weight" in v else (total, inner)
        a, b = (kernel.fold_groups(value, per) for value in scaled)
        slope = kernel.stt(b, "subtract", 0.0, "multiply", v["rstd"]) * (-1 / count)
        shift = kernel.stt(a, "multiply", -1 / count, "multiply", v["rstd"])
        gain = v["rstd"] * v["weight"] if "weight" in v else v["rstd"]
        part = kernel.act("identity", v["x"], scale=slope, bias=shift)
        kernel.store(0, kernel.stt(v["grad"], "multiply", gain, "add", part))
    rows = [kernel.stt(total, "multiply", v["mean"], "subtract", inner) * v["rstd"], total]
    wanted = [row for row, spec in zip(rows, results[1:], strict=False) if spec]
    for index, value in enumerate(wanted, first):
        kernel.store(index, value)
    return lower_kernel(kernel, call.name)


def replace_shape(spec: TensorSpec, numel: int) -> TensorSpec:
    """`spec` as a vector of `numel`."""
    return replace(spec, shape=(numel,), strides=(1,))
