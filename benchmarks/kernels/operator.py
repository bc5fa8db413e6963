"""Torch operators through their lowerings: what compiler-made rows are predicted from.

A function runs on meta tensors; each operator it calls becomes a Program. A row's time is the sum
of its operators' times, without launches: the compiler makes one graph of them and may overlap what
is added up here.

Chosen by looking at the profiled bytes: the KV cache that a slice write copies is cloned twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from torch_trn.chip import CoreSpec
from torch_trn.lowering import OpCall, TensorSpec, lower
from torch_trn.program import Program

BF16 = torch.bfloat16


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[OpCall] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema = func._schema
        name = schema.name + (f".{schema.overload_name}" if schema.overload_name else "")
        missing = schema.arguments[len(args) :]
        given = [*args, *(kwargs.get(each.name, each.default_value) for each in missing)]
        results = result if isinstance(result, (tuple, list)) else (result,)
        outs = tuple(_spec(each) for each in results if isinstance(each, Tensor))
        self.calls.append(OpCall(name, _spec(given), outs))
        return result


def _spec(value: Any) -> Any:
    if isinstance(value, Tensor):
        return TensorSpec.of(value)
    return tuple(_spec(each) for each in value) if isinstance(value, (list, tuple)) else value


def programs(
    core: CoreSpec, function: Callable[..., object], *shapes: tuple[int, ...],
    dtype: torch.dtype = BF16,
) -> list[Program]:  # fmt: skip
    """The Programs of the operators that ``function`` calls on tensors of ``shapes``."""
    tensors = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
    recorder = _Recorder()
    with recorder:
        function(*tensors)
    return [lower(call, core) for call in recorder.calls]


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of [batch, heads, tokens, width] as one operator, as on the device."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]


def block(x: Tensor, qkv: Tensor, out: Tensor, up: Tensor, down: Tensor, *, heads: int) -> Tensor:
    """A pre-norm transformer block of x [tokens, width] without biases: attention, a GELU MLP."""
    tokens, width = x.shape
    normed = functional.layer_norm(x, (width,))
    q, k, v = (
        part.view(1, tokens, heads, width // heads).transpose(1, 2)
        for part in (normed @ qkv).chunk(3, dim=-1)
    )
    mixed = attention(q, k, v).transpose(1, 2).reshape(tokens, width)
    x = x + mixed @ out
    return x + functional.gelu(functional.layer_norm(x, (width,)) @ up) @ down
