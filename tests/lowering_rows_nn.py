"""Rows (see lowering_rows) of convolutions, attention, recurrent cells and lists."""

from __future__ import annotations

import torch
from lowering_rows import Case, row, t


# -- convolutions and images -----------------------------------------------------------------------
def _conv(*args: object, channels: int = 5, outs: int = 7) -> object:
    """x [2, 5, 4, n + 2] and w [7, 5, 3, 3], then the operator's own arguments."""
    return lambda n: Case(
        (t(2, channels, 4, n + 2), t(outs, channels, 3, 3), *args), (t(2, outs, 2, n),), reads=0,
        flops=2 * 2 * outs * 2 * n * channels * 9,
    )  # fmt: skip


row("convolution convolution_overrideable _convolution")(
    _conv(t(7), (1, 1), (0, 0), (1, 1), False, (0, 0), 1))  # fmt: skip
row("mkldnn_convolution")(_conv(t(7), (0, 0), (1, 1), (1, 1), 1))
row("_slow_conv2d_forward")(_conv((3, 3), t(7), (1, 1), (0, 0)))
row("slow_conv_dilated2d")(_conv((3, 3), t(7), (1, 1), (0, 0), (1, 1)))
row("slow_conv3d_forward slow_conv_dilated3d")(lambda n: Case(
    (t(2, 5, 2, 4, n + 2), t(7, 5, 1, 3, 3), (1, 3, 3), t(7), (1, 1, 1), (0, 0, 0), (1, 1, 1)),
    (t(2, 7, 2, 2, n),), reads=0, flops=2 * 2 * 2 * 7 * 2 * n * 5 * 9))  # fmt: skip
row("conv_depthwise3d")(lambda n: Case(
    (t(2, 5, 2, 4, n + 2), t(5, 1, 1, 3, 3), (1, 3, 3), t(5), (1, 1, 1), (0, 0, 0), (1, 1, 1)),
    (t(2, 5, 2, 2, n),), reads=0))  # fmt: skip
row("slow_conv_transpose2d")(lambda n: Case(
    (t(2, 5, 2, n), t(5, 7, 3, 3), (3, 3), t(7), (1, 1), (0, 0), (0, 0), (1, 1)),
    (t(2, 7, 4, n + 2),), reads=0, flops=2 * 2 * 5 * 2 * n * 7 * 9))  # fmt: skip
row("slow_conv_transpose3d")(lambda n: Case(
    (t(2, 5, 2, 2, n), t(5, 7, 1, 3, 3), (1, 3, 3), t(7), (1, 1, 1), (0, 0, 0), (0, 0, 0),
     (1, 1, 1)),
    (t(2, 7, 2, 4, n + 2),), reads=0, flops=2 * 2 * 2 * 5 * 2 * n * 7 * 9))  # fmt: skip


def _conv_backward(*args: object) -> object:
    """grad [2, 7, 2, n], x [2, 5, 4, n + 2], w [7, 5, 3, 3], then the operator's own arguments."""
    return lambda n: Case(
        (t(2, 7, 2, n), t(2, 5, 4, n + 2), t(7, 5, 3, 3), *args),
        (t(2, 5, 4, n + 2), t(7, 5, 3, 3)), reads=0, writes=None if n else 0,
        flops=2 * 2 * 2 * 7 * 2 * n * 5 * 9,
    )  # fmt: skip


row("convolution_backward")(_conv_backward(
    (7,), (1, 1), (0, 0), (1, 1), False, (0, 0), 1, (True, True, False)))  # fmt: skip
row("convolution_backward_overrideable")(_conv_backward(
    (1, 1), (0, 0), (1, 1), False, (0, 0), 1, (True, True, False)))  # fmt: skip
row("_slow_conv2d_backward")(_conv_backward((3, 3), (1, 1), (0, 0), (True, True, False)))


# -- attention -------------------------------------------------------------------------------------
row("_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
    "_scaled_dot_product_cudnn_attention")(
    lambda n: Case((t(2, 4, n, 16), t(2, 2, n, 16), t(2, 2, n, 16), 0.0, False),
                   (t(2, 4, n, 16), t(2, 4, n)), flops=2 * 2 * 8 * n * n * 16))  # fmt: skip
row("_scaled_dot_product_flash_attention_for_cpu_backward")(lambda n: Case(
    (t(2, 4, n, 16), t(2, 4, n, 16), t(2, 4, n, 16), t(2, 4, n, 16), t(2, 4, n, 16), t(2, 4, n),
     0.0, False, None, None), (t(2, 4, n, 16),) * 3, flops=10 * 8 * n * n * 16))  # fmt: skip
row("_scaled_dot_product_fused_attention_overrideable_backward")(lambda n: Case(
    (t(2, 4, n, 16), t(2, 4, n, 16), t(2, 4, n, 16), t(2, 4, n, 16), None, (True,) * 4,
     t(2, 4, n, 16), t(2, 4, n), None, None, n, n, 0.0, False, None, None, None),
    (t(2, 4, n, 16),) * 3, flops=10 * 8 * n * n * 16))  # fmt: skip

# -- recurrent cells: batch 3, hidden n ------------------------------------------------------------
row("_thnn_fused_lstm_cell")(lambda n: Case(
    (t(3, 4 * n), t(3, 4 * n), t(3, n), t(4 * n), t(4 * n)),
    (t(3, n), t(3, n), t(3, 4 * n))))  # fmt: skip
row("_thnn_fused_lstm_cell_backward_impl _thnn_fused_lstm_cell_backward")(lambda n: Case(
    (t(3, n), t(3, n), t(3, n), t(3, n), t(3, 4 * n), True),
    (t(3, 4 * n), t(3, n), t(4 * n))))  # fmt: skip
row("_thnn_fused_gru_cell")(lambda n: Case(
    (t(3, 3 * n), t(3, 3 * n), t(3, n), t(3 * n), t(3 * n)), (t(3, n), t(3, 5 * n))))  # fmt: skip
row("_thnn_fused_gru_cell_backward")(lambda n: Case(
    (t(3, n), t(3, 5 * n), True),
    (t(3, 3 * n), t(3, 3 * n), t(3, n), t(3 * n), t(3 * n))))  # fmt: skip

# -- lists of tensors ------------------------------------------------------------------------------
UNARY_LISTS = """abs acos asin atan ceil cos cosh erf erfc exp expm1 floor frac lgamma log log10
log1p
log2 neg reciprocal round rsqrt sigmoid sign sin sinh sqrt tan tanh trunc clone zero"""
row(" ".join(f"_foreach_{name}" for name in UNARY_LISTS.split()))(
    lambda n: Case(((t(n, 3), t(n), t(7)),), (t(n, 3), t(n), t(7)), reads=0)
)
row(" ".join(f"_foreach_{name}" for name in "add sub mul div maximum minimum clamp_max clamp_min "
             "pow copy".split()))(
    lambda n: Case(((t(n, 3), t(n)), (t(n, 3), t(n))), (t(n, 3), t(n)), reads=16 * n))  # fmt: skip
row("_foreach_lerp _foreach_addcmul _foreach_addcdiv")(
    lambda n: Case(((t(n, 3),), (t(n, 3),), (t(n, 3),)), (t(n, 3),))
)
row("_foreach_norm _foreach_powsum _foreach_max")(
    lambda n: Case(((t(n, 3), t(n)), 2), (t(), t()), writes=None if n else 0)
)


def _adam(n: int) -> Case:
    lists = ((t(n, 3), t(n)),) * 4
    steps = (t(), t())
    return Case((*lists, (), steps, 1e-3, 0.9, 0.999, 0.01, 1e-8, False, False, None, None), (),
                reads=64 * n, writes=48 * n)  # fmt: skip


row("_fused_adamw _fused_adam")(_adam)
row("_fused_sgd")(lambda n: Case(
    (((t(n, 3), t(n)),) * 3 + (0.01, 0.9, 1e-3, 0.0, False, False, False, None, None)), (),
    reads=48 * n, writes=32 * n))  # fmt: skip
row("_fused_adagrad")(lambda n: Case(
    (((t(n, 3), t(n)),) * 3 + ((t(), t()), 1e-2, 0.0, 0.0, 1e-10, False, None, None)), (),
    reads=48 * n, writes=32 * n))  # fmt: skip
row("_amp_foreach_non_finite_check_and_unscale")(
    lambda n: Case(((t(n, 3), t(n)), t(1), t()), (), reads=16 * n, writes=16 * n)
)
row("_amp_update_scale")(
    lambda n: Case((t(), t(dtype=torch.int32), t(), 2.0, 0.5, 2000), (), reads=0, writes=8)
)
