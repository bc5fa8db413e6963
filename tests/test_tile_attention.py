"""Attention's Programs, forward and backward, run for their values beside the CPU's flash kernel.

Bounds: the reference is the CPU kernel in fp32 on the same inputs. In fp32 results differ by the
order of sums only, but score gradients are differences of sums that are up to 30 times as large:
64 roundings of the largest value. With bf16 and fp16 inputs, weights and score gradients are
rounded once each before their products and the result once: 4 roundings of the largest value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tile_case import EPSILON, TRN1, TRN2, tile_values
from torch import Tensor

from torch_trn.chip import CoreSpec
from torch_trn.errors import UnsupportedOpError
from torch_trn.executor import execute
from torch_trn.lowering import (
    OpCall,
    TensorSpec,
    attention,
    attention_backward,
    attention_plan,
    lower,
)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
CORES = pytest.mark.parametrize("core", [TRN1, TRN2], ids=["trn1", "trn2"])


def randn(batch: int, heads: int, length: int, depth: int, dtype: torch.dtype = F32,
          turned: bool = False) -> Tensor:  # fmt: skip
    """[batch, heads, length, depth], as a view of [batch, length, heads, depth] where turned."""
    if turned:
        return randn(batch, length, heads, depth, dtype).transpose(1, 2)
    seed = torch.Generator().manual_seed(batch + 3 * heads + 7 * length + 11 * depth)
    return torch.randn(batch, heads, length, depth, generator=seed).to(dtype)


def close(got: Sequence[Tensor], expected: Sequence[Tensor], roundings: int = 4) -> None:
    """Within so many roundings (64 in fp32) of the largest value of each result, or of 1."""
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.shape == theirs.shape
        count = 64 if ours.dtype == F32 else roundings
        bound = count * EPSILON[ours.dtype] * max(1.0, float(theirs.abs().amax()))
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.0, atol=bound)


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, **options: Any) -> None:
    """The Program's output and log-sum-exp beside the kernel's, computed in fp32."""
    cores = {name: options.pop(name) for name in ("core", "cores") if name in options}
    got, _ = tile_values(FLASH, q, k, v, 0.0, causal, **options, **cores)
    wide = {name: x.float() if isinstance(x, Tensor) else x for name, x in options.items()}
    out, lse = FLASH(q.float(), k.float(), v.float(), 0.0, causal, **wide)
    close(got[:1], [out])
    # Products of 16-bit numbers are exact and weights are added up before they are rounded.
    close(got[1:], [lse])


def backward(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, **options: Any) -> None:
    """The Program's gradients beside the kernel's, computed in fp32 for each head of its own."""
    cores = {name: options.pop(name) for name in ("core", "cores") if name in options}
    grad = randn(*q.shape, q.dtype) * 0.5
    out, lse = FLASH(q, k, v, 0.0, causal, **options)
    args = (grad, q, k, v, out, lse, 0.0, causal)
    got, _ = tile_values(FLASH_BACKWARD, *args, **options, **cores)
    group = q.shape[1] // k.shape[1]
    keys, values = (x.float().repeat_interleave(group, 1) for x in (k, v))
    wide = {name: x.float() if isinstance(x, Tensor) else x for name, x in options.items()}
    exact = FLASH(q.float(), keys, values, 0.0, causal, **wide)
    found = FLASH_BACKWARD(grad.float(), q.float(), keys, values, *exact, 0.0, causal, **wide)
    folded = [x.unflatten(1, (k.shape[1], group)).sum(2) for x in found[1:]]
    close(got, [found[0], *folded])


def both(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, **options: Any) -> None:
    """Forward and backward."""
    forward(q, k, v, causal, **dict(options))
    backward(q, k, v, causal, **dict(options))


@CORES
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("queries", [1, 127, 129, 513])
@pytest.mark.parametrize("keys", [1, 128, 512, 1025])
def test_lengths(queries: int, keys: int, causal: bool, core: CoreSpec) -> None:
    q, k = randn(1, 1, queries, 16), randn(1, 1, keys, 16)
    both(q, k, k.flip(2), causal, core=core)


@CORES
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("depth", [16, 64, 96, 128, 129, 256])
def test_depths_and_dtypes(depth: int, dtype: torch.dtype, core: CoreSpec) -> None:
    q, k = randn(1, 2, 130, depth, dtype, turned=True), randn(1, 2, 300, depth, dtype, turned=True)
    both(q, k, randn(1, 2, 300, depth, dtype), core=core)


@CORES
def test_the_deepest_heads(core: CoreSpec) -> None:
    q, k = randn(1, 1, 130, 512), randn(1, 1, 600, 512)
    both(q, k, k.neg(), core=core, attn_mask=randn(1, 1, 130, 600))


@CORES
@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads"), [(1, 1, 1), (3, 1, 1), (2, 3, 3), (1, 6, 2), (1, 3, 1)]
)
@pytest.mark.parametrize("queries", [2, 150])
def test_heads_and_cores(
    queries: int, batch: int, heads: int, kv_heads: int, cores: int, core: CoreSpec
) -> None:
    q, k = randn(batch, heads, queries, 16), randn(batch, kv_heads, 140, 16)
    both(q, k, k * 0.5, core=core, cores=cores)
    both(q, k, k * 0.5, True, core=core, cores=cores)


@CORES
@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "queries"), [(7, 7, 20), (9, 3, 20), (5, 5, 200), (4, 1, 140)]
)
def test_many_short_heads(
    heads: int, kv_heads: int, queries: int, cores: int, core: CoreSpec
) -> None:
    """Loops over sets of heads whose steps overlap those of the next ones."""
    q, k = randn(5, heads, queries, 16), randn(5, kv_heads, 30, 16)
    both(q, k, k, core=core, cores=cores)
    both(q.to(BF16), k.to(BF16), k.to(BF16), True, core=core, cores=cores)


@CORES
@pytest.mark.parametrize(
    "shape", [(130, 140), (1, 140), (130, 1), (2, 4, 130, 140), (1, 4, 1, 140), (2, 1, 130, 140)]
)
def test_additive_masks(shape: tuple[int, ...], core: CoreSpec) -> None:
    q, k = randn(2, 4, 130, 16), randn(2, 4, 140, 16)
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    both(q, k, k.neg(), core=core, attn_mask=mask)
    both(q, k, k.neg(), True, core=core, attn_mask=mask, scale=0.3)
    both(q.to(BF16), k.to(BF16), k.to(BF16), core=core, cores=2, attn_mask=mask.to(BF16))


@CORES
def test_a_mask_of_grouped_heads(core: CoreSpec) -> None:
    mask = torch.randn(1, 4, 3, 140, generator=torch.Generator().manual_seed(0))
    both(randn(2, 4, 3, 16), randn(2, 2, 140, 16), randn(2, 2, 140, 16), core=core, attn_mask=mask)


@CORES
def test_rows_that_see_no_key(core: CoreSpec) -> None:
    mask = torch.zeros(130, 1200)
    mask[5] = -math.inf
    mask[7, :1100] = -math.inf
    q, k = randn(1, 2, 130, 16), randn(1, 2, 1200, 16)
    both(q, k, k, core=core, attn_mask=mask)
    out, lse = tile_values(FLASH, q, k, k, core=core, attn_mask=mask)[0]
    assert not out[:, :, 5].any() and not lse[:, :, 5].any()


def run(name: str, args: Sequence[Any], outs: Sequence[Tensor], core: CoreSpec) -> None:
    """Runs the Program of a call that the CPU has no kernel for; ``outs`` are its results."""
    specs = tuple(TensorSpec.of(x) if isinstance(x, Tensor) else x for x in args)
    call = OpCall(f"aten::{name}", specs, tuple(TensorSpec.of(x) for x in outs))
    given = [x for x in args if isinstance(x, Tensor)]
    tensors = {f"in{i}": x for i, x in enumerate(given)}
    tensors |= {f"out{i}": x.fill_(math.nan) for i, x in enumerate(outs)}
    execute(lower(call, core, 2), core, tensors, cores=2)


@CORES
def test_boolean_masks(core: CoreSpec) -> None:
    # The CPU's kernel takes additive masks only; what they hide is -inf.
    seen = torch.rand(130, 140, generator=torch.Generator().manual_seed(0)) > 0.4
    q, k, lse = randn(2, 2, 130, 16), randn(2, 2, 140, 16), torch.empty(2, 2, 130)
    out = torch.empty_like(q)
    name = "_scaled_dot_product_fused_attention_overrideable"
    run(name, (q, k, k, seen, 0.0, False, False, None), (out, lse), core)
    additive = torch.zeros(130, 140).masked_fill(~seen, -math.inf)
    close([out, lse], FLASH(q, k, k, attn_mask=additive))


@CORES
@pytest.mark.parametrize("depths", [(24, 40), (200, 16), (16, 300)])
def test_values_of_another_depth(depths: tuple[int, int], core: CoreSpec) -> None:
    depth, wide = depths
    q, k, v = (x.requires_grad_() for x in (
        randn(1, 2, 130, depth), randn(1, 2, 140, depth), randn(1, 2, 140, wide)))  # fmt: skip
    bias, grad = randn(1, 2, 130, 140), randn(1, 2, 130, wide)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias)
    gradients = torch.autograd.grad(expected, (q, k, v), grad)
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = torch.empty(1, 2, 130, wide), torch.empty(1, 2, 130)
    name = "_scaled_dot_product_fused_attention_overrideable"
    run(name, (q, k, v, bias, 0.0, False, False, None), (out, lse), core)
    close([out], [expected.detach()])
    found = [torch.empty_like(x) for x in (q, k, v)]
    args = (grad, q, k, v, bias, (True,) * 4, out, lse, None, None, 130, 140, 0.0, False, None)
    run(f"{name}_backward", (*args, None, None), found, core)
    close(found, gradients)


@CORES
@pytest.mark.parametrize("scale", [0.7, 0.0, -0.5])
def test_scales(scale: float, core: CoreSpec) -> None:
    q, k = randn(1, 2, 130, 16), randn(1, 2, 200, 16)
    both(q, k, k, core=core, scale=scale)
    if scale > 0:
        both(q, k, k, True, core=core, scale=scale)


@CORES
def test_a_negative_scale_hides_later_keys_too(core: CoreSpec) -> None:
    # The CPU's kernel hides scores before it scales them, so that -inf becomes +inf.
    q, k = randn(1, 1, 130, 16), randn(1, 1, 200, 16)
    got = tile_values(FLASH, q, k, k, 0.0, True, core=core, scale=-0.5)[0]
    close(got, FLASH(-q, k, k, 0.0, True, scale=0.5))


@CORES
@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_one_query_and_a_long_cache(kv_heads: int, cores: int, core: CoreSpec) -> None:
    cache = torch.cat([randn(2, kv_heads, 2100, 64, BF16), randn(2, kv_heads, 100, 64, BF16)], 2)
    k, v = cache[:, :, :2049], cache[:, :, 3:2052]
    forward(randn(2, 4, 1, 64, BF16), k, v, core=core, cores=cores)


@CORES
def test_elements_that_lie_apart(core: CoreSpec) -> None:
    # The CPU's kernel reads a row's elements as neighbours, whatever their stride.
    q = randn(1, 2, 16, 130).transpose(2, 3)
    k = randn(1, 2, 140, 33)[..., 1::2]
    out, lse = FLASH(*(x.contiguous() for x in (q, k, k)))
    close(tile_values(FLASH, q, k, k, core=core)[0], [out, lse])
    args = (q * 0.5, q, k, k, out, lse)
    got, _ = tile_values(FLASH_BACKWARD, *args, 0.0, False, core=core)
    close(got, FLASH_BACKWARD(*(x.contiguous() for x in args), 0.0, False))


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize(
    ("core", "kv_heads"), [(TRN1, 1), (TRN2, 1), (TRN2, 2)], ids=["trn1", "members", "sets"]
)
def test_loops(
    monkeypatch: pytest.MonkeyPatch, kv_heads: int, causal: bool, core: CoreSpec
) -> None:
    """Loops of a long sequence, at a small size: extents of several blocks, blocks that do not
    overlap, members and sets one at a time, keys and queries that do not stay in SBUF."""
    monkeypatch.setattr(attention_plan, "MAX_EXTENTS", 2)
    monkeypatch.setattr(attention_plan, "FINE_QUERIES", 128)
    monkeypatch.setattr(attention_plan, "KEY_BLOCK", 128)
    q, k = randn(1, 2, 1300, 16), randn(1, kv_heads, 1300, 16)
    for limit in (0, 8):
        for module in (attention, attention_backward):
            monkeypatch.setattr(module, "LONG_STEPS", limit)
            monkeypatch.setattr(module, "FEW_EXTENTS", limit)
        both(q, k, k, causal, core=core)
    monkeypatch.setattr(attention, "KEYS_SHARE", 1 << 20)
    monkeypatch.setattr(attention_backward, "QUERIES_SHARE", 1 << 20)
    both(q, k, k, causal, core=core)
    monkeypatch.setattr(attention_backward, "FACTS_SHARE", 1 << 20)
    both(q.to(BF16), k.to(BF16), k.to(BF16), causal, core=core)


@CORES
@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (1, 2, 5, 0)])
def test_nothing_to_attend_to(shape: tuple[int, int, int, int], core: CoreSpec) -> None:
    batch, heads, queries, keys = shape
    q, k = torch.randn(batch, heads, queries, 16), torch.randn(batch, heads, keys, 16)
    lse = torch.full((batch, heads, queries), math.nan)
    out = torch.full_like(q, math.nan)
    specs = tuple(TensorSpec.of(x) for x in (q, k, k))
    args = (*specs, 0.0, False, None, None)
    name = "aten::_scaled_dot_product_flash_attention_for_cpu"
    call = OpCall(name, args, (TensorSpec.of(out), TensorSpec.of(lse)))
    execute(lower(call, core, 1), core, {"in0": q, "in1": k, "in2": k, "out0": out, "out1": lse})
    assert not out.any() and not lse.any()


def test_what_is_refused() -> None:
    def spec(depth: int, dtype: torch.dtype = F32) -> TensorSpec:
        return TensorSpec.contiguous(dtype, 1, 2, 4, depth)

    name = "aten::_scaled_dot_product_flash_attention_for_cpu"
    call = OpCall(name, (spec(16),) * 3 + (0.5, False, None, None), (spec(16),))
    with pytest.raises(UnsupportedOpError) as error:
        lower(call, TRN2, 1)
    assert str(error.value) == (
        f"{name} has no NeuronCore lowering: dropout_p is 0.5, but the fused Program drops no "
        "weights (0 only): use scaled_dot_product_attention's math backend"
    )
    call = OpCall(name, (spec(640),) * 3 + (0.0, False, None, None), (spec(640),))
    with pytest.raises(UnsupportedOpError) as error:
        lower(call, TRN2, 1)
    assert str(error.value) == (
        f"{name} has no NeuronCore lowering: a head of 640 is wider than a PSUM bank (512 "
        "columns): use more heads or scaled_dot_product_attention's math backend"
    )
    narrow = spec(16, torch.float8_e4m3fn)
    with pytest.raises(UnsupportedOpError) as error:
        lower(OpCall(name, (narrow,) * 3 + (0.0, False, None, None), (narrow,)), TRN2, 1)
    assert str(error.value) == (
        f"{name} has no NeuronCore lowering: softmax weights between 0 and 1 are not kept in "
        "float8_e4m3fn: use float32, bfloat16 or float16"
    )
