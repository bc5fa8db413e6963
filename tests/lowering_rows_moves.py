"""Rows (see lowering_rows) of what moves data: real calls of ATen, so that arguments are whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lowering_calls import spec_of, tensors_in
from lowering_rows import BF16, F32, I64, Case, row, t
from torch import Tensor

aten = torch.ops.aten


def z(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    """Zeros: valid indices too."""
    return torch.zeros(shape, dtype=dtype)


def actual(
    names: str, function: Any, args: Callable[[int], Sequence[Any]], reads: int | None = 0,
    **kwargs: Any,
) -> None:  # fmt: skip
    """The row of a call of ``function``; ``reads`` bytes that must come for each n (None: all)."""

    def make(n: int) -> Case:
        given = list(args(n))
        arguments = function._schema.arguments
        named = [a.name for a in arguments if a.kwarg_only]
        for argument in arguments[len(given) :]:
            given.append(kwargs.get(argument.name, argument.default_value))
        plain = given[: len(given) - len(named)]
        result = function(*plain, **dict(zip(named, given[len(plain) :], strict=True)))
        listed = list(result) if isinstance(result, list | tuple) else [result]
        outs = tuple(spec for item in listed for spec in tensors_in(spec_of(item)))
        writes = sum(spec.nbytes for spec in outs) if n else 0
        return Case(spec_of(given), outs, None if reads is None else reads * n, writes,
                    overload=function._schema.overload_name)  # fmt: skip

    row(names)(make)


# -- copies and views ------------------------------------------------------------------------------
actual("clone contiguous to lift_fresh_copy alias_copy detach_copy _lazy_clone",
       aten.clone.default, lambda n: [z(n, 3)], 12)  # fmt: skip
actual("_to_copy", aten._to_copy.default, lambda n: [z(n, 3)], 12, dtype=BF16)
actual("copy", aten.copy.default, lambda n: [z(n, 3), z(n, 3, dtype=BF16)], 6)
actual("_copy_from _copy_from_and_resize", aten.copy.default, lambda n: [z(n, 3), z(n, 3)], 12)
actual("_conj_copy", aten._conj_copy.default, lambda n: [z(n, 3, dtype=torch.complex64)], 24)
actual("_neg_view_copy", aten._neg_view_copy.default, lambda n: [z(n, 3)], 12)
actual("expand_copy", aten.expand_copy.default, lambda n: [z(n, 1, 3), [n, 2, 3]], 12)
actual("permute_copy", aten.permute_copy.default, lambda n: [z(n, 3), [1, 0]], 12)
actual("t_copy", aten.t_copy.default, lambda n: [z(n, 3)], 12)
actual("transpose_copy", aten.transpose_copy.int, lambda n: [z(n, 3), 0, 1], 12)
actual("slice_copy", aten.slice_copy.Tensor, lambda n: [z(n, 9), 1, 0, 9, 3], 12)
actual("select_copy", aten.select_copy.int, lambda n: [z(n, 9), 1, 2], 4)
actual("as_strided_copy", aten.as_strided_copy.default, lambda n: [z(n, 9), [n, 3], [9, 2]], 12)
actual("diagonal_copy", aten.diagonal_copy.default, lambda n: [z(n, n)], 4)
actual("unfold_copy", aten.unfold_copy.default, lambda n: [z(n, 9), 1, 3, 3], 36)
actual("narrow_copy", aten.narrow_copy.default, lambda n: [z(n, 9), 1, 2, 3], 12)
actual("view_copy _reshape_copy _unsafe_view reshape", aten.view_copy.default,
       lambda n: [z(n, 6), [2, 3 * n]], 24)  # fmt: skip
actual("squeeze_copy", aten.squeeze_copy.default, lambda n: [z(n, 1, 6)], 24)
actual("unsqueeze_copy", aten.unsqueeze_copy.default, lambda n: [z(n, 6), 1], 24)
actual("_reshape_alias_copy", aten._reshape_alias_copy.default,
       lambda n: [z(n, 6), [n, 2, 3], [6, 3, 1]], 24)  # fmt: skip
actual("view_as_real_copy", aten.view_as_real_copy.default,
       lambda n: [z(n, 3, dtype=torch.complex64)], 24)  # fmt: skip
actual("view_as_complex_copy", aten.view_as_complex_copy.default, lambda n: [z(n, 3, 2)], 24)
actual("unbind_copy", aten.unbind_copy.int, lambda n: [z(n, 3), 1], 12)
actual("split_copy", aten.split_copy.Tensor, lambda n: [z(n, 3), 2, 1], 12)
actual("split_with_sizes_copy", aten.split_with_sizes_copy.default,
       lambda n: [z(n, 3), [1, 2], 1], 12)  # fmt: skip
actual("rot90", aten.rot90.default, lambda n: [z(n, 3)], 12)
actual("channel_shuffle", aten.channel_shuffle.default, lambda n: [z(2, 6, n, 3), 2], 144)
actual("native_channel_shuffle", aten.native_channel_shuffle.default,
       lambda n: [z(2, 6, n, 3), 2], 144)  # fmt: skip
actual("pixel_shuffle", aten.pixel_shuffle.default, lambda n: [z(2, 4, n, 3), 2], 96)
actual("pixel_unshuffle", aten.pixel_unshuffle.default, lambda n: [z(2, 2, 2 * n, 4), 2], 128)
actual("roll", aten.roll.default, lambda n: [z(n, 3), [1], [0]], 12)
actual("flip", aten.flip.default, lambda n: [z(n, 3), [0]], 12)
actual("repeat", aten.repeat.default, lambda n: [z(n, 3), [2, 1]], 24)
actual("tile", aten.repeat.default, lambda n: [z(n, 3), [2, 1]], 24)
actual("cat _cat concat", aten.cat.default, lambda n: [[z(n, 3), z(n, 5)], 1], 32)
actual("stack _stack", aten.stack.default, lambda n: [[z(n, 3), z(n, 3)], 0], 24)
actual("block_diag", aten.block_diag.default, lambda n: [[z(n, 3), z(n, 2)]], 20)
actual("_chunk_cat", aten._chunk_cat.default, lambda n: [[z(max(n, 1), 3), z(4, 2)], 0, 2], 12)
actual("slice_backward", aten.slice_backward.default,
       lambda n: [z(n, 3), [n, 9], 1, 0, 3, 1], 12)  # fmt: skip
actual("slice_scatter", aten.slice_scatter.default, lambda n: [z(n, 9), z(n, 3), 1, 0, 3, 1], 36)
actual("select_backward", aten.select_backward.default, lambda n: [z(n), [n, 9], 1, 0], 4)
actual("select_scatter", aten.select_scatter.default, lambda n: [z(n, 9), z(n), 1, 0], 36)
actual("diagonal_backward", aten.diagonal_backward.default, lambda n: [z(n), [n, n], 0, 0, 1], 4)
actual("diagonal_scatter", aten.diagonal_scatter.default, lambda n: [z(n, n), z(n)], 4)
actual("as_strided_scatter", aten.as_strided_scatter.default,
       lambda n: [z(n, 9), z(n), [n], [9], 2], 40)  # fmt: skip
actual("diag_embed", aten.diag_embed.default, lambda n: [z(3, n)], 12)
actual("unfold_backward", aten.unfold_backward.default, lambda n: [z(n, 3, 3), [n, 9], 1, 3, 3], 36)
actual("constant_pad_nd", aten.constant_pad_nd.default, lambda n: [z(n, 3), [1, 1], 0.5], 12)
for _d in (1, 2, 3):
    _pads, _tail = [1, 1] * _d, [3] * _d
    for _kind in ("reflection", "replication"):
        _name = f"{_kind}_pad{_d}d"
        actual(_name, getattr(aten, _name).default,
               lambda n, tail=_tail, pads=_pads: [z(max(n, 1), 2, *tail), pads], 24)  # fmt: skip
        actual(f"{_name}_backward", getattr(aten, f"{_name}_backward").default,
               lambda n, tail=_tail, pads=_pads: [
                   z(max(n, 1), 2, *(size + 2 for size in tail)), z(max(n, 1), 2, *tail), pads],
               40)  # fmt: skip

# -- constants, ramps, random numbers --------------------------------------------------------------
actual("zeros ones", aten.zeros.default, lambda n: [[n, 3]])
actual("full", aten.full.default, lambda n: [[n, 3], 2.5])
actual("zeros_like ones_like", aten.zeros_like.default, lambda n: [z(n, 3)])
actual("full_like", aten.full_like.default, lambda n: [z(n, 3), 2.5])
actual("new_zeros new_ones", aten.new_zeros.default, lambda n: [z(2), [n, 3]])
actual("new_full", aten.new_full.default, lambda n: [z(2), [n, 3], 2.5])
actual("zero", aten.zero.default, lambda n: [z(n, 3)])
actual("fill", aten.fill.Tensor, lambda n: [z(n, 3), z()])
actual("_efficientzerotensor", aten.zeros.default, lambda n: [[n, 3]])
actual("scalar_tensor", aten.scalar_tensor.default, lambda n: [2.5])
actual("arange", aten.arange.default, lambda n: [n])
actual("linspace", aten.linspace.default, lambda n: [0.0, 1.0, n])
actual("logspace", aten.logspace.default, lambda n: [0.0, 1.0, n])
actual("range", aten.range.step, lambda n: [0.0, float(n), 1.0])
actual("tril_indices", aten.tril_indices.default, lambda n: [n, 3])
actual("triu_indices", aten.triu_indices.default, lambda n: [3, n])
actual("fft_fftfreq", aten.fft_fftfreq.default, lambda n: [max(n, 1)])
actual("fft_rfftfreq", aten.fft_rfftfreq.default, lambda n: [max(n, 1)])
actual("eye", aten.eye.m, lambda n: [n, 3])
for _name in ("hann", "hamming", "blackman", "bartlett", "kaiser"):
    actual(f"{_name}_window", getattr(aten, f"{_name}_window").default, lambda n: [n])
actual("tril triu", aten.tril.default, lambda n: [z(n, 3)], 12)
actual("uniform", aten.uniform.default, lambda n: [z(n, 3)])
actual("rand", aten.rand.default, lambda n: [[n, 3]])
actual("rand_like", aten.rand_like.default, lambda n: [z(n, 3)])
actual("randn", aten.randn.default, lambda n: [[n, 3]])
actual("randn_like", aten.randn_like.default, lambda n: [z(n, 3)])
actual("random", aten.random.default, lambda n: [z(n, 3)])
actual("randint", aten.randint.default, lambda n: [9, [n, 3]])
actual("randint_like", aten.randint_like.default, lambda n: [z(n, 3), 9])
actual("randperm", aten.randperm.default, lambda n: [n])
actual("exponential", aten.exponential.default, lambda n: [z(n, 3)])
actual("geometric", aten.geometric.default, lambda n: [z(n, 3), 0.5])
actual("cauchy", aten.cauchy.default, lambda n: [z(n, 3)])
actual("log_normal", aten.log_normal.default, lambda n: [z(n, 3)])
actual("normal", aten.normal.Tensor_float, lambda n: [z(n, 3)], 12)
row("_philox_uniform _philox_normal")(
    lambda n: Case((t(n, 3), t(2, dtype=I64), 0.0, 1.0), (t(n, 3),), reads=0)
)
actual("bernoulli", aten.bernoulli.default, lambda n: [z(n, 3)], 12)

# -- gathers and scatters --------------------------------------------------------------------------
actual("embedding", aten.embedding.default, lambda n: [z(50, 12), z(n, dtype=I64)], 56)
actual("index_select", aten.index_select.default, lambda n: [z(50, 12), 0, z(n, dtype=I64)], 56)
actual("gather take_along_dim", aten.gather.default, lambda n: [z(130, 9), 1, z(130, n, dtype=I64)],
       1040)  # fmt: skip
actual("take", aten.take.default, lambda n: [z(130), z(n, dtype=I64)], 12)
actual("index _unsafe_index", aten.index.Tensor, lambda n: [z(50, 12), [z(n, dtype=I64)]], 56)
actual("embedding_dense_backward", aten.embedding_dense_backward.default,
       lambda n: [z(n, 12), z(n, dtype=I64), 50, -1, False], 56)  # fmt: skip
actual("_embedding_bag _embedding_bag_forward_only", aten._embedding_bag.default,
       lambda n: [z(50, 12), z(n, dtype=I64), z(4, dtype=I64)], 56)  # fmt: skip
actual("_embedding_bag_dense_backward", aten._embedding_bag_dense_backward.default,
       lambda n: [z(4, 12), z(n, dtype=I64), z(n, dtype=I64), z(4, dtype=I64), z(0, dtype=I64), 50,
                  False, 0, None], 60)  # fmt: skip
actual("_embedding_bag_backward", aten._embedding_bag_backward.default,
       lambda n: [z(4, 12), z(n, dtype=I64), z(4, dtype=I64), z(0, dtype=I64), z(4, dtype=I64),
                  z(4, dtype=I64), 50, False, 0, False, None], 56)  # fmt: skip
actual("_embedding_bag_per_sample_weights_backward",
       aten._embedding_bag_per_sample_weights_backward.default,
       lambda n: [z(4, 12), z(50, 12), z(n, dtype=I64), z(4, dtype=I64), z(n, dtype=I64), 0],
       112)  # fmt: skip
actual("scatter", aten.scatter.src, lambda n: [z(9, 600), 1, z(9, n, dtype=I64), z(9, n)], 108)
actual("scatter_add", aten.scatter_add.default,
       lambda n: [z(9, 600), 1, z(9, n, dtype=I64), z(9, n)], 108)  # fmt: skip
actual("scatter_reduce", aten.scatter_reduce.two,
       lambda n: [z(9, 600), 1, z(9, n, dtype=I64), z(9, n), "amax"], 108)  # fmt: skip
actual("index_put _index_put_impl _unsafe_index_put", aten.index_put.default,
       lambda n: [z(50, 12), [z(n, dtype=I64)], z(n, 12), False], 56)  # fmt: skip
actual("index_add", aten.index_add.default,
       lambda n: [z(50, 12), 0, z(n, dtype=I64), z(n, 12)], 56)  # fmt: skip
actual("index_copy", aten.index_copy.default,
       lambda n: [z(50, 12), 0, z(n, dtype=I64), z(n, 12)], 56)  # fmt: skip
actual("index_fill", aten.index_fill.int_Scalar,
       lambda n: [z(50, 12), 0, z(n, dtype=I64), 1.0], 8)  # fmt: skip
actual("index_reduce", aten.index_reduce.default,
       lambda n: [z(50, 12), 0, z(n, dtype=I64), z(n, 12), "amax"], 56)  # fmt: skip
actual("put", aten.put.default, lambda n: [z(50, 12), z(n, dtype=I64), z(n)], 12)
actual("max_unpool2d", aten.max_unpool2d.default,
       lambda n: [z(n, 3, 2, 1), z(n, 3, 2, 1, dtype=I64), [4, 2]], 24)  # fmt: skip
actual("max_unpool3d", aten.max_unpool3d.default,
       lambda n: [z(n, 3, 2, 1, 1), z(n, 3, 2, 1, 1, dtype=I64), [4, 2, 1], [2, 2, 1], [0, 0, 0]],
       24)  # fmt: skip

# -- pooling, resampling, columns, gates -----------------------------------------------------------
POOLS = {2: (z(2, 3, 4, 8), [2, 2]), 3: (z(1, 2, 4, 4, 8), [2, 2, 2])}
for _d, (_x, _k) in POOLS.items():
    _rest = list(_x.shape[2:])
    actual(f"max_pool{_d}d_with_indices" + " max_pool2d" * (_d == 2),
           getattr(aten, f"max_pool{_d}d_with_indices").default,
           lambda n, rest=_rest, k=_k: [z(max(n, 1), 3, *rest), k], 384)  # fmt: skip
    actual(f"max_pool{_d}d_with_indices_backward",
           getattr(aten, f"max_pool{_d}d_with_indices_backward").default,
           lambda n, rest=_rest, k=_k: [
               z(max(n, 1), 3, *(s // 2 for s in rest)), z(max(n, 1), 3, *rest), k, k, [0] * len(k),
               [1] * len(k), False, z(max(n, 1), 3, *(s // 2 for s in rest), dtype=I64)],
           96)  # fmt: skip
    actual(f"adaptive_max_pool{_d}d", getattr(aten, f"adaptive_max_pool{_d}d").default,
           lambda n, rest=_rest, k=_k: [z(max(n, 1), 3, *rest), k], 384)  # fmt: skip
    actual(f"adaptive_max_pool{_d}d_backward",
           getattr(aten, f"adaptive_max_pool{_d}d_backward").default,
           lambda n, rest=_rest, k=_k: [z(max(n, 1), 3, *k), z(max(n, 1), 3, *rest),
                                        z(max(n, 1), 3, *k, dtype=I64)], 48)  # fmt: skip
    actual(f"avg_pool{_d}d", getattr(aten, f"avg_pool{_d}d").default,
           lambda n, rest=_rest, k=_k: [z(max(n, 1), 3, *rest), k], 384)  # fmt: skip
    actual(f"avg_pool{_d}d_backward", getattr(aten, f"avg_pool{_d}d_backward").default,
           lambda n, rest=_rest, k=_k: [
               z(max(n, 1), 3, *(s // 2 for s in rest)), z(max(n, 1), 3, *rest), k, k, [0] * len(k),
               False, True, None], 48)  # fmt: skip
    actual(f"_adaptive_avg_pool{_d}d adaptive_avg_pool{_d}d",
           getattr(aten, f"_adaptive_avg_pool{_d}d").default,
           lambda n, rest=_rest, k=_k: [z(max(n, 1), 3, *rest), k], 384)  # fmt: skip
    actual(f"_adaptive_avg_pool{_d}d_backward"
           + " mkldnn_adaptive_avg_pool2d_backward" * (_d == 2),
           getattr(aten, f"_adaptive_avg_pool{_d}d_backward").default,
           lambda n, rest=_rest, k=_k: [z(max(n, 1), 3, *k), z(max(n, 1), 3, *rest)],
           48)  # fmt: skip
actual("avg_pool1d", aten.avg_pool1d.default, lambda n: [z(max(n, 1), 3, 8), [2]], 96)
actual("adaptive_avg_pool1d", aten.adaptive_avg_pool1d.default,
       lambda n: [z(max(n, 1), 3, 8), [2]], 96)  # fmt: skip


def _resampled(name: str, dims: int, aligned: bool) -> None:
    overload = getattr(aten, name).default
    extra = [False] if aligned else []
    actual(name, overload, lambda n: [z(max(n, 1), 3, *[4] * dims), [8] * dims, *extra], 12)
    actual(f"{name}_backward", getattr(aten, f"{name}_backward").default,
           lambda n: [z(max(n, 1), 3, *[8] * dims), [8] * dims, [max(n, 1), 3, *[4] * dims],
                      *extra], 12)  # fmt: skip


for _d in (1, 2, 3):
    _resampled(f"upsample_nearest{_d}d", _d, False)
    _resampled(f"_upsample_nearest_exact{_d}d", _d, False)
_resampled("upsample_linear1d", 1, True)
_resampled("upsample_trilinear3d", 3, True)
for _name in ("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa",
              "_upsample_bicubic2d_aa", "_upsample_lanczos2d_aa"):  # fmt: skip
    _resampled(_name, 2, True)
actual("im2col", aten.im2col.default,
       lambda n: [z(2, 3, 4, max(n, 1)), [2, 1], [1, 1], [0, 0], [1, 1]], 96)  # fmt: skip
actual("col2im", aten.col2im.default,
       lambda n: [z(2, 6, 3 * max(n, 1)), [4, max(n, 1)], [2, 1], [1, 1], [0, 0], [1, 1]],
       144)  # fmt: skip
actual("glu", aten.glu.default, lambda n: [z(n, 6)], 24)
actual("glu_backward", aten.glu_backward.default, lambda n: [z(n, 3), z(n, 6), -1], 36)
actual("glu_jvp", aten.glu_jvp.default, lambda n: [z(n, 3), z(n, 6), z(n, 6), -1], 48)

# -- order -----------------------------------------------------------------------------------------
actual("topk", aten.topk.default, lambda n: [z(130, n), min(n, 3)], 520)
actual("sort", aten.sort.default, lambda n: [z(130, n), 1, False], 520)
actual("argsort", aten.argsort.default, lambda n: [z(130, n), 1, False], 520)
actual("msort", aten.msort.default, lambda n: [z(n, 130)], 520)
actual("kthvalue", aten.kthvalue.default, lambda n: [z(130, max(n, 1)), 1, 1], 520)
actual("median", aten.median.default, lambda n: [z(130, n)], 520)
actual("searchsorted", aten.searchsorted.Tensor, lambda n: [z(30), z(n)], 4)
actual("bucketize", aten.bucketize.Tensor, lambda n: [z(n), z(30)], 4)

# -- searches --------------------------------------------------------------------------------------
actual("isin", aten.isin.Tensor_Tensor, lambda n: [z(n, 3), z(7)], 12)
actual("histc", aten.histc.default, lambda n: [z(n, 3), 9, 0, 1], 12)
