"""Constants, index ramps, random numbers, triangles: results made from nothing or nearly so."""

from __future__ import annotations

import math
from typing import Any

import torch

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import ceil_div, grid
from torch_trn.lowering.move import fill, mover
from torch_trn.lowering.pointwise import pointwise
from torch_trn.lowering.registry import any_dtype, lowering
from torch_trn.lowering.run import lower_kernel
from torch_trn.lowering.tile import FP32, Source, Tile, Value
from torch_trn.program import Program


@lowering(
    "aten::zeros", "aten::ones", "aten::full", "aten::zeros_like", "aten::ones_like",
    "aten::full_like", "aten::new_zeros", "aten::new_ones", "aten::new_full", "aten::zero",
    "aten::fill", "aten::_efficientzerotensor", "aten::scalar_tensor",
)  # fmt: skip
def constant(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """A constant tile stored over and over; a tensor's value is broadcast first."""
    out = call.outs[0]
    value = call.arg(1)
    if isinstance(value, TensorSpec) and "fill" in call.name:
        kernel = Kernel(core, grid(out.shape, [out, value]), 1, shards)
        kernel.store(0, kernel.ins[0])
        return lower_kernel(kernel, call.name)
    b = mover(core, call.name)
    walked = grid(out.shape, [out])
    run = walked.operands[0].run if walked.numel else 1
    size = 0 if run * out.itemsize >= out.nbytes else run * out.itemsize
    fill(b, b.hbm("out0", nbytes=out.nbytes), ceil_div(out.nbytes, shards), 0, size)
    return b.build()


@lowering(
    "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty",
    "aten::new_empty_strided", "aten::empty_permuted", "aten::resize", "aten::resize_as",
    "aten::_assert_async", "aten::_functional_assert_async", "aten::_assert_scalar",
    "aten::_functional_assert_scalar", "aten::_assert_tensor_metadata",
    "aten::set", "aten::view", "aten::as_strided", "aten::expand", "aten::permute",
    "aten::transpose", "aten::t", "aten::slice", "aten::select", "aten::squeeze",
    "aten::unsqueeze", "aten::detach", "aten::alias", "aten::unbind", "aten::split",
    "aten::split_with_sizes", "aten::unsafe_split", "aten::unsafe_split_with_sizes",
    "aten::diagonal", "aten::unfold", "aten::view_as_real", "aten::view_as_complex",
    "aten::_reshape_alias", "aten::lift", "aten::lift_fresh", "aten::_neg_view", "aten::_conj",
)  # fmt: skip
@any_dtype
def nothing(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Memory is named, not touched: a Program without instructions."""
    return mover(core, call.name).build()


def generated(formula: Any) -> Any:
    """The lowering of an operator whose result is `formula(tile)` of its position alone."""

    def lower(call: OpCall, core: CoreSpec, shards: int) -> Program:
        kernel = Kernel(core, grid(call.outs[0].shape, [call.outs[0]]), 1, shards)
        kernel.store(0, formula(kernel, *call.args))
        return lower_kernel(kernel, call.name)

    return lower


def _kind(t: Tile) -> str:
    assert isinstance(t, Kernel)
    return t.out_operands[0].kind


def _ramp(t: Tile, *_: Any) -> Value:
    return t.scalar2(t.iota(kind=_kind(t)), "multiply", 1.0, "add", 0.0)


def _log_ramp(t: Tile, *_: Any) -> Value:
    return t.act("exp", t.iota(kind=_kind(t)), scale=1.0)


def _eye(t: Tile, *_: Any) -> Value:
    return t.affine_select(t.constant(1, FP32, _kind(t)), "equal")


def _window(t: Tile, *_: Any) -> Value:
    return t.scalar2(
        t.act("sin", t.iota(kind=_kind(t)), scale=math.pi), "multiply", 0.5, "add", 0.5
    )


lowering(
    "aten::arange",
    "aten::linspace",
    "aten::range",
    "aten::tril_indices",
    "aten::triu_indices",
    "aten::fft_fftfreq",
    "aten::fft_rfftfreq",
)(generated(_ramp))
lowering("aten::logspace")(generated(_log_ramp))
lowering("aten::eye")(generated(_eye))
lowering("aten::hann_window", "aten::hamming_window", "aten::blackman_window",
         "aten::bartlett_window", "aten::kaiser_window")(generated(_window))  # fmt: skip


# -- triangles -----------------------------------------------------------------------------------
pointwise(
    {
        "tril": lambda t, x, *_: t.affine_select(x, "greater_equal"),
        "triu": lambda t, x, *_: t.affine_select(x, "less_equal"),
    }
)


# -- random numbers ------------------------------------------------------------------------------
def uniform(t: Tile, *args: Any) -> Value:
    """32 random bits per element on VectorE, scaled to [from, to)."""
    given = [a for a in args if isinstance(a, float)]
    low, high = given[:2] if len(given) > 1 else (0.0, 1.0)
    bits = t.random(kind=_kind(t))
    return t.scalar2(bits, "multiply", high - low, "add", low)


def normal(t: Tile, *_: Any) -> Value:
    """Box-Muller: sqrt(-2 log u) * sin(2 pi v)."""
    radius = t.act("sqrt", t.act("log", t.random(kind=_kind(t))), scale=-2.0)
    wave = t.act("sin", t.random(kind=_kind(t)), scale=2 * math.pi)
    return t.scalar2(radius * wave, "multiply", 1.0, "add", 0.0)


def _integers(t: Tile, *_: Any) -> Value:
    return t.scalar2(t.random(torch.int32, _kind(t)), "mod", 1, "add", 0)


def exponential(t: Tile, *_: Any) -> Value:
    """-log(u) / rate."""
    return t.act("log", t.random(kind=_kind(t))) * -1.0


def _geometric(t: Tile, *_: Any) -> Value:
    return t.cast(exponential(t), torch.int32)


def _cauchy(t: Tile, *_: Any) -> Value:
    u = t.random(kind=_kind(t))
    return t.act("sin", u, scale=math.pi) / t.act("sin", u, scale=math.pi, bias=math.pi / 2)


def _log_normal(t: Tile, *_: Any) -> Value:
    return t.act("exp", normal(t))


lowering("aten::uniform", "aten::rand", "aten::rand_like", "aten::_philox_uniform")(
    generated(uniform)
)
lowering("aten::random", "aten::randint", "aten::randint_like", "aten::randperm")(
    generated(_integers)
)
lowering("aten::exponential")(generated(exponential))
lowering("aten::geometric")(generated(_geometric))
lowering("aten::cauchy")(generated(_cauchy))
lowering("aten::log_normal")(generated(_log_normal))


@lowering("aten::normal", "aten::randn", "aten::randn_like", "aten::_philox_normal")
def normal_(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Normal numbers; means and deviations given as tensors are read."""
    out = call.outs[0]
    in_place = call.name.partition(".")[0].endswith("_") or "like" in call.name
    given = [] if in_place else [a for a in call.args if isinstance(a, TensorSpec)]
    kernel = Kernel(core, grid(out.shape, [out, *given]), 1, shards)
    value = normal(kernel)
    for operand in kernel.ins:
        value = value + operand
    kernel.store(0, value)
    return lower_kernel(kernel, call.name)


@lowering("aten::bernoulli")
def bernoulli(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """1 where a random number is below p: a number, a tensor argument, or the input itself."""
    out = call.outs[0]
    tensors = [a for a in call.args if isinstance(a, TensorSpec)]
    in_place = call.name.partition(".")[0].endswith("_")
    source = (
        tensors[1:] if in_place else tensors[:1] if "p" not in call.name.partition(".")[2] else []
    )
    p = next((a for a in call.args[1:] if isinstance(a, float)), 0.5)
    kernel = Kernel(core, grid(out.shape, [out, *source]), 1, shards)
    level: Source = kernel.ins[0] if kernel.ins else p
    kernel.store(0, kernel.binary("is_lt", kernel.random(kind=_kind(kernel)), level, FP32))
    return lower_kernel(kernel, call.name)
