"""Normalisation layers: statistics and scaling in one pass over rows held in SBUF.

The normalised value is one ScalarE activation (scale and bias are free there), statistics are
bn_stats on VectorE, gradients of weight and bias are sums over rows on TensorE.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import Named, OpCall, TensorSpec, named_args, named_outs
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import PARTITIONS, Grid, Operand, product
from torch_trn.lowering.registry import lowering
from torch_trn.lowering.run import joined, lower_kernel
from torch_trn.lowering.softmax import row_grid
from torch_trn.lowering.tile import FP32, Tile, Value
from torch_trn.memory import Pool, Space
from torch_trn.program import Program

#: Rows up to which tiles take turns (run.py), so that hand-overs between engines cost nothing.
SHORT_ROW = 2048


def masked_named(call: OpCall, mask: Sequence[bool]) -> list[Named | None]:
    """The result for each entry of an output mask, None where it is not asked for."""
    given = iter(named_outs(call))
    if len(call.outs) == len(mask):
        return [one if wanted else None for one, wanted in zip(given, mask, strict=True)]
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
    specs = [one.spec if one else None for one in masked_named(call, mask)]
    outs = dict(zip(("dx", "dweight", "dbias"), specs, strict=False))
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


@lowering("aten::native_group_norm")
def group_norm(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """y, mean, rstd: a channel in each partition, statistics joined over a group on TensorE."""
    x, weight, bias, n, c, hw, groups, eps = call.args[:8]
    per = c // groups
    tensors = Operands(
        {"y": _grouped(call.outs[0], n, c, hw, groups)},
        {
            "x": _grouped(x, n, c, hw, groups),
            "weight": _per_channel(weight, groups),
            "bias": _per_channel(bias, groups),
        },
    )
    walked = _group_grid(n, groups, per, hw, tensors.specs)
    small = tuple(_of_group(spec, walked, n, groups, per) for spec in call.outs[1:3])
    walked = replace(walked, operands=(walked.operands[0], *small, *walked.operands[1:]))
    kernel = Kernel(core, walked, 1 + len(small), shards)
    v = tensors.values(kernel)
    mean, var = kernel.stats(v["x"])
    if 1 < per <= PARTITIONS:
        second = kernel.fold_groups(kernel.binary("multiply", mean, mean) + var, per)
        mean = kernel.fold_groups(mean, per)
        var = second - kernel.binary("multiply", mean, mean)
    rstd = kernel.act("rsqrt", var, bias=eps)
    scale = rstd * v["weight"] if "weight" in v else rstd
    shift = kernel.stt(mean, "multiply", -1.0, "multiply", scale)
    shift = shift + v["bias"] if "bias" in v else shift
    if scale.kind == shift.kind == "col":
        kernel.store(0, kernel.act("identity", v["x"], scale=scale, bias=shift))
    else:
        kernel.store(0, v["x"] * scale + shift)
    for index, value in enumerate((mean, rstd)[: len(small)], 1):
        kernel.store(index, value)
    return lower_kernel(kernel, call.name)


def _group_grid(n: int, groups: int, per: int, hw: int, specs: Sequence[TensorSpec]) -> Grid:
    """Rows are channels; where a group has more of them than partitions, rows are groups."""
    dims = [3] if per <= PARTITIONS else [2, 3]
    return row_grid((n, groups, per, hw), dims, list(specs))


def _grouped(spec: TensorSpec, n: int, c: int, hw: int, groups: int) -> TensorSpec:
    """A tensor of N x C x ... as N x groups x channels of each x pixels."""
    whole = _channels(spec, n, c, hw)
    per = c // groups
    step_n, step_c, step = whole.strides
    return TensorSpec(spec.dtype, (n, groups, per, hw), (step_n, step_c * per, step_c, step))


def _per_channel(spec: Any, groups: int) -> Any:
    if not isinstance(spec, TensorSpec):
        return None
    per = spec.numel // groups
    return TensorSpec(spec.dtype, (groups, per, 1), (per, 1, 1))


def _of_group(spec: TensorSpec, walked: Grid, n: int, groups: int, per: int) -> Operand:
    """One element for each group of each image, the same for all its channels."""
    if walked.rows == n * groups:
        return Operand(spec, "col", rows=((n * groups, 1),))
    return Operand(spec, "col", every=per, rows=((n * groups, 1), (per, 0)))


@lowering("aten::native_group_norm_backward")
def group_norm_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """dx, dweight, dbias; sums of grad and grad * x per channel, joined over a group on TensorE.

    What images add to the gradients of weight and bias goes to scratch in HBM, [n, c], and is
    added up by a second pass over that, for which one core does it all.
    """
    n, c, _hw, groups, mask = call.args[5:10]
    dx, *sums = masked_named(call, mask)
    parts = [_scratch(f"sum{i}", n * c) if one else None for i, one in enumerate(sums)]
    if c // groups > PARTITIONS and dx:
        # A group has more channels than there are partitions: its rows are groups.
        programs = [_GroupBackward(call, core, shards, [2, 3]).run(dx, [])]
        programs += [_GroupBackward(call, core, shards, [3]).run(None, parts)] if any(sums) else []
    else:
        programs = [_GroupBackward(call, core, shards, [3]).run(dx, parts)]
    programs += [
        _over_images(core, call.name, one, pool, n, c, shards)
        for one, pool in zip(sums, parts, strict=True)
        if one and pool
    ]
    return joined(call.name, core, programs)


class _GroupBackward:
    """One pass over grad and x whose columns are `dims` of (image, group, channel, pixel)."""

    def __init__(self, call: OpCall, core: CoreSpec, shards: int, dims: list[int]) -> None:
        self.name, self.core, self.shards, self.dims = call.name, core, shards, dims
        self.n, self.c, self.hw, self.groups = call.args[5:9]
        self.per = self.c // self.groups
        self.args = named_args(call)[:5]

    def run(self, dx: Named | None, parts: Sequence[Pool | None]) -> Program:
        """dx, and for each of (dweight, dbias) that has a pool what each image adds to it."""
        grad, x, mean, rstd, weight = self.args
        n, c, hw, groups = self.n, self.c, self.hw, self.groups
        tensors = [_grouped(one.spec, n, c, hw, groups) for one in (dx, grad, x) if one]
        gain = [_per_channel(weight.spec, groups)] if weight is not None else []
        shape = (n, groups, self.per, hw)
        walked = row_grid(shape, self.dims, [tensors[-1], *tensors, *gain])
        outs = 1 if dx else 0
        full, rest = walked.operands[1 : 1 + len(tensors)], walked.operands[1 + len(tensors) :]
        pools = [pool for pool in parts if pool]
        columns = [Operand(_vector(n * c), "col", rows=((n * c, 1),)) for _ in pools]
        stats = [_of_group(one.spec, walked, n, groups, self.per) for one in (mean, rstd)]
        operands = (*full[:outs], *columns, *full[outs:], *rest, *stats)
        names: list[Any] = [*([dx.name] if dx else []), *pools, grad.name, x.name]
        names += [*([weight.name] if gain else []), mean.name, rstd.name]
        kernel = Kernel(
            self.core, replace(walked, operands=operands), outs + len(pools), self.shards, names
        )
        kernel.alone = bool(pools)
        slope, value, *given = kernel.ins
        factor, (centre, scale) = given[0] if gain else None, given[-2:]
        wide = factor is not None and factor.kind != "col"
        weighted = slope * factor if wide and factor is not None else slope
        total = kernel.act_sum("copy", weighted)[1]
        inner = kernel.reduce("add", weighted * value, FP32)
        if dx:
            by = None if wide else factor
            kernel.store(0, self._dx(kernel, weighted, value, by, (centre, scale), (total, inner)))
        if pools:
            both = [(inner - total * centre) * scale, total]
            wanted = [row for row, pool in zip(both, parts, strict=True) if pool]
            for index, row in enumerate(wanted, outs):
                kernel.store(index, row)
        return lower_kernel(kernel, self.name)

    def _dx(
        self, kernel: Kernel, slope: Value, value: Value, factor: Value | None,
        stats: tuple[Value, Value], sums: tuple[Value, Value],
    ) -> Value:  # fmt: skip
        """gain * grad + b * x + a with a and b from the group's averages of grad and grad * x."""
        centre, scale = stats
        joins = self.dims == [3]
        count = max(self.hw * (1 if joins else self.per), 1)
        averages = []
        for one in sums:
            one = one if factor is None else one * factor
            one = kernel.fold_groups(one, self.per) if joins else one
            averages.append(one * (1 / count))
        total, inner = averages
        cube = kernel.binary("multiply", scale, scale) * scale
        b = (total * centre - inner) * cube
        a = kernel.stt(b, "multiply", -1.0, "multiply", centre) - total * scale
        shifted = kernel.act("identity", value, scale=b, bias=a)
        gain = scale if factor is None else scale * factor
        return kernel.stt(slope, "multiply", gain, "add", shifted)


def _over_images(
    core: CoreSpec, name: str, out: Named, pool: Pool, n: int, c: int, shards: int
) -> Program:
    """out [c] = the sum of scratch [n, c] over n."""
    rows = Operand(out.spec, "col", rows=((c, 1),))
    source = Operand(_vector(n * c), "full", 1, rows=((c, 1),), cols=((n, c),))
    kernel = Kernel(core, Grid(c, n, (rows, source)), 1, shards, [out.name, pool])
    kernel.alone = True
    kernel.store(0, kernel.reduce("add", kernel.ins[0], FP32))
    return lower_kernel(kernel, name)


def _scratch(name: str, numel: int) -> Pool:
    return Pool(name, Space.HBM, 4 * numel)


def _vector(numel: int) -> TensorSpec:
    return TensorSpec.contiguous(FP32, numel)
