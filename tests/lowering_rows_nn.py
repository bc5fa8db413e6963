"""Rows (see lowering_rows) of convolutions, images, attention, recurrent cells, sorts, lists."""

from __future__ import annotations

import torch
from lowering_rows import I64, Case, row, t


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
row("max_pool2d_with_indices max_pool3d_with_indices max_pool2d adaptive_max_pool2d "
    "adaptive_max_pool3d mkldnn_max_pool2d fractional_max_pool2d fractional_max_pool3d "
    "quantized_max_pool2d")(
    lambda n: Case((t(2, 3, n, 8), (2, 2), (2, 2)), (t(2, 3, n, 2),
                                                       t(2, 3, n, 2, dtype=I64))))  # fmt: skip
row("max_pool2d_with_indices_backward max_pool3d_with_indices_backward "
    "adaptive_max_pool2d_backward adaptive_max_pool3d_backward fractional_max_pool2d_backward "
    "fractional_max_pool3d_backward")(
    lambda n: Case((t(2, 3, n, 2), t(2, 3, n, 8), (2, 2), t(2, 3, n, 2, dtype=I64)),
                   (t(2, 3, n, 8),), reads=144 * n))  # fmt: skip
row("avg_pool2d avg_pool3d avg_pool1d _adaptive_avg_pool2d _adaptive_avg_pool3d "
    "adaptive_avg_pool2d adaptive_avg_pool1d adaptive_avg_pool3d")(
    lambda n: Case((t(2, 3, n, 8), (2, 2)), (t(2, 3, n, 2),)))  # fmt: skip
row("avg_pool2d_backward avg_pool3d_backward _adaptive_avg_pool2d_backward "
    "_adaptive_avg_pool3d_backward mkldnn_adaptive_avg_pool2d_backward")(
    lambda n: Case((t(2, 3, n, 2), t(2, 3, n, 8), (2, 2)), (t(2, 3, n, 8),),
                   reads=48 * n))  # fmt: skip

KINDS = """nearest1d nearest2d nearest3d linear1d bilinear2d trilinear3d bicubic2d""".split()
AA = "_upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_lanczos2d_aa".split()
EXACT = [f"_upsample_nearest_exact{d}d" for d in (1, 2, 3)]
UPSAMPLE = [*(f"upsample_{kind}" for kind in KINDS), *AA, *EXACT]
row(" ".join(UPSAMPLE))(lambda n: Case((t(2, 3, 2, n), (4, n)), (t(2, 3, 4, n),)))
row(" ".join(f"{name}_backward" for name in UPSAMPLE))(
    lambda n: Case((t(2, 3, 4, n), (4, n)), (t(2, 3, 2, n),))
)
row("im2col")(lambda n: Case((t(2, 3, 4, n), (2, 1), (1, 1)), (t(2, 6, 3 * n),)))
row("col2im")(lambda n: Case((t(2, 6, 3 * n), (4, n), (2, 1)), (t(2, 3, 4, n),)))
row("glu glu_backward glu_jvp glu_backward_jvp")(lambda n: Case((t(n, 6), -1), (t(n, 3),)))
row("grid_sampler_2d grid_sampler_3d grid_sampler_2d_backward grid_sampler_3d_backward "
    "affine_grid_generator")(
    lambda n: Case((t(2, 3, 4, n), t(2, 4, n, 2)), (t(2, 3, 4, n),)))  # fmt: skip

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

# -- order -----------------------------------------------------------------------------------------
row("topk")(lambda n: Case((t(130, n), min(n, 3), 1, True, True),
                           (t(130, min(n, 3)), t(130, min(n, 3), dtype=I64))))  # fmt: skip
row("sort argsort msort")(lambda n: Case((t(130, n), 1, False), (t(130, n), t(130, n, dtype=I64))))
row("kthvalue")(lambda n: Case((t(130, n), 1, 1, False), (t(130), t(130, dtype=I64)),
                               writes=None if n else 0))  # fmt: skip
row("median nanmedian")(lambda n: Case((t(130, n),), (t(),), writes=None if n else 0))
row("mode")(lambda n: Case((t(130, n), 1, False), (t(130), t(130, dtype=I64)),
                                            writes=None if n else 0))  # fmt: skip
row("searchsorted")(lambda n: Case((t(30), t(n)), (t(n, dtype=I64),), reads=4 * n))
row("bucketize")(lambda n: Case((t(n), t(30)), (t(n, dtype=I64),), reads=4 * n))

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
