"""One row for every lowering: calls over a size `n`, with the bytes and flops they cannot avoid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from torch_trn.lowering import OpCall, TensorSpec

F32, BF16, I64, BOOL = torch.float32, torch.bfloat16, torch.int64, torch.bool


def t(*shape: int, dtype: torch.dtype = F32) -> TensorSpec:
    """A contiguous tensor."""
    return TensorSpec.contiguous(dtype, *shape)


@dataclass(frozen=True)
class Case:
    """Arguments and results of a call; bytes default to all inputs and all results."""

    args: tuple[Any, ...]
    outs: tuple[TensorSpec, ...]
    reads: int | None = None
    writes: int | None = None
    flops: int | None = None
    overload: str = ""

    def call(self, name: str) -> OpCall:
        """The call of operator `name`."""
        full = f"{name}.{self.overload}" if self.overload else name
        return OpCall(full, self.args, self.outs)

    @property
    def read_bytes(self) -> int:
        """Bytes that must come from HBM."""
        given = self.call("").tensors()
        return sum(s.nbytes for s in given) if self.reads is None else self.reads

    @property
    def write_bytes(self) -> int:
        """Bytes that must go to HBM."""
        return sum(s.nbytes for s in self.outs) if self.writes is None else self.writes


Row = Callable[[int], Case]
ROWS: dict[str, Row] = {}


def row(names: str) -> Callable[[Row], Row]:
    """Add a row for each of `names` (without "aten::")."""

    def add(function: Row) -> Row:
        for name in names.split():
            assert name not in ROWS, name
            ROWS[name] = function
        return function

    return add


def same(*extra: Any, tensors: int = 1, outs: int = 1, dtype: torch.dtype = F32,
         out_dtype: torch.dtype | None = None) -> Row:  # fmt: skip
    """`tensors` tensors [n, 3], then `extra`; results of the same shape."""
    return lambda n: Case(
        (t(n, 3, dtype=dtype),) * tensors + extra, (t(n, 3, dtype=out_dtype or dtype),) * outs
    )


UNARY = """abs neg positive exp exp2 expm1 log log1p log2 log10 sqrt rsqrt square reciprocal sin cos
tan asin acos atan sinh cosh tanh asinh acosh atanh erf erfc erfinv lgamma digamma i0 mvlgamma
sigmoid
sign sgn floor ceil trunc round frac nan_to_num logit sinc angle deg2rad rad2deg conj_physical
_conj_physical special_entr special_log_ndtr special_ndtri special_erfcx special_i0e special_i1
special_i1e special_bessel_j0 special_bessel_j1 special_bessel_y0 special_bessel_y1
special_modified_bessel_i0 special_modified_bessel_i1 special_modified_bessel_k0
special_modified_bessel_k1 special_airy_ai special_scaled_modified_bessel_k0
special_scaled_modified_bessel_k1 special_spherical_bessel_j0
relu relu6 gelu silu mish hardtanh leaky_relu
elu celu selu softplus hardsigmoid hardswish hardshrink softshrink"""
row(UNARY)(same())
row("polygamma")(lambda n: Case((1, t(n, 3)), (t(n, 3),)))
row("signbit isnan isinf isposinf isneginf logical_not")(same(out_dtype=BOOL))
row("bitwise_not")(same(dtype=torch.int32))
row("log_sigmoid_forward")(same(outs=2))

BINARY = """add sub mul div rsub true_divide floor_divide fmod remainder pow float_power atan2 hypot
ldexp logaddexp logaddexp2 copysign xlogy special_xlog1py heaviside nextafter maximum minimum fmax
fmin
igamma igammac special_chebyshev_polynomial_t special_chebyshev_polynomial_u
special_chebyshev_polynomial_v special_chebyshev_polynomial_w special_hermite_polynomial_h
special_hermite_polynomial_he special_laguerre_polynomial_l special_legendre_polynomial_p
special_shifted_chebyshev_polynomial_t special_shifted_chebyshev_polynomial_u
special_shifted_chebyshev_polynomial_v special_shifted_chebyshev_polynomial_w special_zeta
gelu_backward silu_backward mish_backward sigmoid_backward tanh_backward hardsigmoid_backward
hardswish_backward log_sigmoid_backward logit_backward _prelu_kernel clamp_min clamp_max"""
row(BINARY)(same(tensors=2))
row("eq ne gt ge lt le logical_and logical_or logical_xor")(same(tensors=2, out_dtype=BOOL))
row("bitwise_and bitwise_or bitwise_xor bitwise_left_shift bitwise_right_shift __and__ __or__ "
    "__xor__ __lshift__ __rshift__ gcd lcm")(same(tensors=2, dtype=torch.int32))  # fmt: skip
row("complex polar")(lambda n: Case((t(n, 3),) * 2, (t(n, 3, dtype=torch.complex64),)))
row("lerp addcmul addcdiv rrelu_with_noise_backward")(same(tensors=3))
row("where.self")(lambda n: Case((t(n, 3, dtype=BOOL), t(n, 3), t(n, 3)), (t(n, 3),)))
row("where.ScalarSelf")(lambda n: Case((t(n, 3, dtype=BOOL), 1.0, t(n, 3)), (t(n, 3),)))
row("where.ScalarOther")(lambda n: Case((t(n, 3, dtype=BOOL), t(n, 3), 1.0), (t(n, 3),)))
row("where.Scalar")(lambda n: Case((t(n, 3, dtype=BOOL), 2.0, 1.0), (t(n, 3),)))
row("masked_fill")(lambda n: Case((t(n, 3), t(n, 3, dtype=BOOL), 0.5), (t(n, 3),)))
row("clamp")(same(-1.0, 1.0))
row("threshold")(same(0.5, 0.0))
row("threshold_backward leaky_relu_backward hardshrink_backward softshrink_backward")(
    same(0.5, tensors=2)
)
row("hardtanh_backward softplus_backward")(same(-1.0, 1.0, tensors=2))
row("elu_backward")(lambda n: Case((t(n, 3), 1.0, 1.0, 1.0, False, t(n, 3)), (t(n, 3),)))
row("_prelu_kernel_backward")(same(tensors=3, outs=2))
row("native_dropout")(lambda n: Case((t(n, 3), 0.1, True), (t(n, 3), t(n, 3, dtype=BOOL))))
row("native_dropout_backward _masked_scale")(
    lambda n: Case((t(n, 3), t(n, 3, dtype=BOOL), 1.1), (t(n, 3),))
)

# -- matrix products: [n, 65] x [65, 33] -----------------------------------------------------------
K, M = 65, 33


@row("mm")
def _mm(n: int) -> Case:
    return Case((t(n, K), t(K, M)), (t(n, M),), flops=2 * n * K * M)


@row("_foreach_mm")
def _foreach_mm(n: int) -> Case:
    left, right = (t(n, K), t(3, 4)), (t(K, M), t(4, 5))
    return Case((left, right), (t(n, M), t(3, 5)), flops=2 * n * K * M + 120)


row("_int_mm")(lambda n: Case((t(n, K, dtype=torch.int8), t(K, M, dtype=torch.int8)),
                              (t(n, M, dtype=torch.int32),), flops=2 * n * K * M))  # fmt: skip
row("bmm")(lambda n: Case((t(3, n, K), t(3, K, M)), (t(3, n, M),), flops=6 * n * K * M))
row("addmm _addmm_activation")(
    lambda n: Case((t(M), t(n, K), t(K, M), 1, 1), (t(n, M),), flops=2 * n * K * M)
)
row("baddbmm")(lambda n: Case((t(3, n, M), t(3, n, K), t(3, K, M), 1, 1), (t(3, n, M),),
                              flops=6 * n * K * M))  # fmt: skip
row("addbmm")(lambda n: Case((t(n, M), t(3, n, K), t(3, K, M), 1, 1), (t(n, M),),
                             flops=6 * n * K * M))  # fmt: skip
row("mv")(lambda n: Case((t(n, K), t(K)), (t(n),), flops=2 * n * K))
row("addmv")(lambda n: Case((t(n), t(n, K), t(K), 1, 1), (t(n),), flops=2 * n * K))
row("linear mkldnn_linear")(
    lambda n: Case((t(2, n, K), t(M, K), t(M)), (t(2, n, M),), flops=4 * n * K * M)
)
row("_scaled_mm")(lambda n: Case(
    (t(n, K, dtype=torch.float8_e4m3fn), t(K, M, dtype=torch.float8_e4m3fn), t(1), t(1)),
    (t(n, M, dtype=BF16),), reads=(n + M) * K, flops=2 * n * K * M))  # fmt: skip
row("dot vdot")(lambda n: Case((t(n), t(n)), (t(),)))
row("addr")(lambda n: Case((t(n, M), t(n), t(M), 1, 1), (t(n, M),)))

# -- reductions ------------------------------------------------------------------------------------
row("sum mean nansum prod amax amin linalg_vector_norm")(
    lambda n: Case((t(n, 130), (1,), False), (t(n),))
)
ROWS["linalg_vector_norm"] = lambda n: Case((t(n, 130), 2, (1,), False), (t(n),))
row("norm linalg__powsum")(lambda n: Case((t(n, 130), 2, (1,), False), (t(n),)))
row("logsumexp var std")(lambda n: Case((t(n, 130), (1,), True), (t(n, 1),)))
row("any all")(lambda n: Case((t(n, 130),), (t(dtype=BOOL),)))
row("_is_any_true _is_all_true")(lambda n: Case((t(n, 130, dtype=BOOL),), (t(dtype=BOOL),)))
row("argmax argmin count_nonzero")(lambda n: Case((t(n, 130), 0), (t(130, dtype=I64),)))
row("max min")(lambda n: Case((t(n, 130),), (t(),)))
row("max.dim min.dim")(lambda n: Case((t(n, 130), 1, False), (t(n), t(n, dtype=I64))))
row("aminmax var_mean std_mean")(lambda n: Case((t(n, 130), 1), (t(n), t(n))))
row("_aminmax")(lambda n: Case((t(n, 130),), (t(), t())))
row("trace")(lambda n: Case((t(n, n),), (t(),), reads=4 * n))
row("equal allclose")(lambda n: Case((t(n, 3), t(n, 3)), ()))
row("dist")(lambda n: Case((t(n, 3), t(n, 3), 2), (t(),)))
row("multinomial")(lambda n: Case((t(n, 130), 1), (t(n, 1, dtype=I64),)))

# -- rows: softmax, scans, losses ------------------------------------------------------------------
row("_softmax softmax _safe_softmax _log_softmax log_softmax")(
    lambda n: Case((t(130, n), 1, False), (t(130, n),))
)
row("_softmax_backward_data _log_softmax_backward_data")(
    lambda n: Case((t(130, n), t(130, n), 1, F32), (t(130, n),))
)
row("_masked_softmax")(lambda n: Case((t(130, n), t(130, n, dtype=BOOL), 1), (t(130, n),)))
row("_masked_softmax_backward")(
    lambda n: Case((t(130, n), t(130, n), t(130, n, dtype=BOOL), 1), (t(130, n),))
)
row("cumsum cumprod logcumsumexp _logcumsumexp")(lambda n: Case((t(130, n), 1), (t(130, n),)))
row("cummax cummin")(lambda n: Case((t(130, n), 1), (t(130, n), t(130, n, dtype=I64))))
row("mse_loss huber_loss smooth_l1_loss l1_loss soft_margin_loss kl_div")(
    lambda n: Case((t(n, 3), t(n, 3), 1), (t(),))
)
row("binary_cross_entropy")(lambda n: Case((t(n, 3), t(n, 3), None, 1), (t(),)))
row("binary_cross_entropy_with_logits")(
    lambda n: Case((t(n, 3), t(n, 3), None, None, 0), (t(n, 3),))
)
row("mse_loss_backward huber_loss_backward smooth_l1_loss_backward soft_margin_loss_backward")(
    lambda n: Case((t(), t(n, 3), t(n, 3), 1, 1.0), (t(n, 3),), reads=24 * n)
)
row("binary_cross_entropy_backward")(
    lambda n: Case((t(n, 3), t(n, 3), t(n, 3), None, 0), (t(n, 3),))
)
row("nll_loss_forward nll_loss2d_forward")(
    lambda n: Case((t(n, 10), t(n, dtype=I64), None, 1, -100), (t(), t()), reads=12 * n)
)
row("nll_loss_backward nll_loss2d_backward")(lambda n: Case(
    (t(), t(n, 10), t(n, dtype=I64), None, 1, -100, t()), (t(n, 10),), reads=8 * n))  # fmt: skip

# -- normalisation ---------------------------------------------------------------------------------
row("native_layer_norm layer_norm")(lambda n: Case(
    (t(130, n), (n,), t(n), t(n), 1e-5), (t(130, n), t(130, 1), t(130, 1))))  # fmt: skip
row("native_layer_norm_backward")(lambda n: Case(
    (t(130, n), t(130, n), (n,), t(130, 1), t(130, 1), t(n), t(n), (True,) * 3),
    (t(130, n), t(n), t(n)), reads=1040 * n))  # fmt: skip
row("_fused_rms_norm rms_norm")(
    lambda n: Case((t(130, n), (n,), t(n), 1e-5), (t(130, n), t(130, 1)))
)
row("_fused_rms_norm_backward")(lambda n: Case(
    (t(130, n), t(130, n), (n,), t(130, 1), t(n), (True, True)), (t(130, n), t(n))))  # fmt: skip
row("native_group_norm")(lambda n: Case(
    (t(2, 6, n), t(6), t(6), 2, 6, n, 3, 1e-5), (t(2, 6, n), t(2, 3), t(2, 3))))  # fmt: skip
row("native_group_norm_backward")(lambda n: Case(
    (t(2, 6, n), t(2, 6, n), t(2, 3), t(2, 3), t(6), 2, 6, n, 3, (True,) * 3),
    (t(2, 6, n), t(6), t(6))))  # fmt: skip
row("native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional")(
    lambda n: Case((t(2, 5, n), t(5), t(5), t(5), t(5), True, 0.1, 1e-5), (t(2, 5, n), t(5), t(5)))
)
row("_batch_norm_with_update _batch_norm_with_update_functional _batch_norm_no_update "
    "_native_batch_norm_legit_no_training")(
    lambda n: Case((t(2, 5, n), t(5), t(5), t(5), t(5), 0.1, 1e-5), (t(2, 5, n), t(5), t(5)),
                   writes=40 * n)
)  # fmt: skip
row("batch_norm_update_stats")(
    lambda n: Case((t(2, 5, n), t(5), t(5), 0.1), (t(5), t(5)), reads=40 * n, writes=0)
)
row("native_batch_norm_backward batch_norm_backward")(lambda n: Case(
    (t(2, 5, n), t(2, 5, n), t(5), t(5), t(5), t(5), t(5), True, 1e-5, (True,) * 3),
    (t(2, 5, n), t(5), t(5)), reads=80 * n))  # fmt: skip

# -- nothing ---------------------------------------------------------------------------------------
row("empty empty_like empty_strided new_empty new_empty_strided empty_permuted resize resize_as "
    "_assert_async _functional_assert_async _assert_scalar _functional_assert_scalar "
    "_assert_tensor_metadata set view as_strided expand permute transpose t slice select squeeze "
    "unsqueeze detach alias unbind split split_with_sizes unsafe_split unsafe_split_with_sizes "
    "diagonal unfold view_as_real view_as_complex _reshape_alias lift lift_fresh _neg_view _conj")(
    lambda n: Case((t(n, 3),), (t(n, 3),), reads=0, writes=0))  # fmt: skip
