"""What is foreseen of an operator's results is what its kernel gives, and costs no slow import."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from subprocess_case import run
from torch import Tensor

from torch_trn import eager
from torch_trn.lowering import TensorSpec

aten = torch.ops.aten
BF16 = torch.bfloat16


def x(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(sizes, dtype=dtype, device="trn")


def long(*sizes: int) -> Tensor:
    return torch.zeros(sizes, dtype=torch.int64, device="trn")


CALLS: dict[str, Callable[[], Any]] = {
    "addmm": lambda: aten.addmm(x(13), x(5, 11), x(11, 13)),
    "mm turned": lambda: aten.mm(x(11, 5).t(), x(13, 11).t()),
    "bmm": lambda: aten.bmm(x(3, 5, 11), x(3, 13, 11).transpose(1, 2)),
    "baddbmm": lambda: aten.baddbmm(x(13), x(3, 5, 11), x(3, 11, 13), beta=0.5),
    "cat": lambda: aten.cat([x(5, 13), x(5, 7).t().t(), x(0)], 1),
    "cat of channels_last": lambda: aten.cat([x(2, 3, 5, 7).to(memory_format=LAST)] * 2, 1),
    "cat of two dtypes": lambda: aten.cat([x(5, 13), long(5, 13)], -2),
    "cat of transposed": lambda: aten.cat([x(17, 5).t(), x(17, 5).t()]),
    "mean": lambda: aten.mean(x(5, 29)),
    "mean to double": lambda: aten.mean(x(31), dtype=torch.float64),
    "mean.dim": lambda: aten.mean.dim(x(3, 5, 31), [0, -1], True),
    "sum.dim": lambda: aten.sum.dim_IntList(long(5, 31), [1]),
    "sum of transposed": lambda: aten.sum.dim_IntList(x(3, 31, 5).permute(2, 0, 1), [1]),
    "sum of bool": lambda: aten.sum.dim_IntList(x(37) > 0, None),
    "any": lambda: aten.any(x(41)),
    "any.dim": lambda: aten.any.dim(x(3, 41), 1, True),
    "all.dims": lambda: aten.all.dims(x(3, 41, 2), [0, 2]),
    "all of bytes": lambda: aten.all.dim(x(3, 43, dtype=torch.uint8), 0),
    "vector_norm": lambda: aten.linalg_vector_norm(x(3, 43), 2, [1]),
    "vector_norm to fp32": lambda: aten.linalg_vector_norm(x(3, 43, dtype=BF16), dtype=torch.float),
    "cumsum": lambda: aten.cumsum(long(3, 43).t(), 0),
    "cumsum_": lambda: x(3, 47).cumsum_(0),
    "tril": lambda: aten.tril(x(43, 5).t(), 1),
    "triu_": lambda: x(47, 5).triu_(-1),
    "softmax": lambda: aten._softmax(x(5, 53).t(), 0, False),
    "log_softmax": lambda: aten._log_softmax(x(5, 53, dtype=BF16), -1, False),
    "softmax backward": lambda: aten._softmax_backward_data(x(3, 53), x(3, 53), 1, torch.float),
    "log_softmax backward": lambda: aten._log_softmax_backward_data(
        x(3, 53), x(3, 53), 1, torch.float
    ),
    "mse_loss": lambda: aten.mse_loss(x(59), x(3, 59), 0),
    "mse_loss, mean": lambda: aten.mse_loss(x(59), x(59)),
    "nll_loss": lambda: aten.nll_loss_forward(x(5, 61), long(5), None, 1, -100),
    "nll_loss of each": lambda: aten.nll_loss_forward(x(5, 61), long(5), x(61), 0, -100),
    "nll_loss backward": lambda: aten.nll_loss_backward(x(), x(5, 61), long(5), None, 1, -100, x()),
    "layer_norm": lambda: aten.native_layer_norm(x(3, 5, 67), [5, 67], x(5, 67), None, 1e-5),
    "layer_norm, mixed": lambda: aten.native_layer_norm(
        x(3, 67, dtype=BF16), [67], x(67), x(67), 1e-5
    ),
    "layer_norm in bf16": lambda: aten.native_layer_norm(
        x(3, 67, dtype=BF16), [67], None, x(67, dtype=BF16), 1e-5
    ),
    "layer_norm of transposed": lambda: aten.native_layer_norm(
        x(67, 3).t(), [67], None, None, 1e-5
    ),
    "layer_norm of nothing": lambda: aten.native_layer_norm(x(0, 71), [71], None, None, 1e-5),
    "layer_norm backward": lambda: aten.native_layer_norm_backward(
        x(71, 3).t(), x(71, 3).t(), [71], x(3, 1), x(3, 1), x(71), x(71), [True, True, True]
    ),
    "layer_norm backward of some": lambda: aten.native_layer_norm_backward(
        x(3, 71), x(3, 71), [71], x(3, 1), x(3, 1), x(71), None, [False, True, False]
    ),
    "dropout": lambda: aten.native_dropout(x(3, 73), 0.5, True),
    "dropout off": lambda: aten.native_dropout(x(5, 73), 0.5, False),
    "group_norm": lambda: aten.native_group_norm(x(2, 6, 79), x(6), x(6), 2, 6, 79, 3, 1e-5),
    "batch_norm": lambda: aten.native_batch_norm(
        x(3, 83), x(83), x(83), x(83), x(83), True, 0.1, 1e-5
    ),
    "batch_norm, evaluated": lambda: aten.native_batch_norm(
        x(3, 83, 2), None, None, x(83), x(83), False, 0.1, 1e-5
    ),
    "abs": lambda: aten.abs.out(x(3, 97), out=x(3, 97)),
    "add to out": lambda: aten.add.out(x(3, 97), x(97), out=x(97, 3).t()),
    "add to an empty out": lambda: aten.add.out(x(5, 97), x(97), out=x(0)),
    "normal_": lambda: x(89).normal_(),
    "bernoulli_": lambda: x(5, 89).t().bernoulli_(0.5),
}
LAST = torch.channels_last


@pytest.mark.parametrize("name", CALLS)
def test_results_are_as_foreseen(name: str) -> None:
    known = set(eager._calls)
    result = CALLS[name]()
    results = result if isinstance(result, tuple) else (result,)
    call = eager._calls[max(set(eager._calls) - known)]
    assert call.outs == tuple(TensorSpec.of(tensor) for tensor in results if tensor is not None)


def test_a_wrong_call_raises_what_the_cpu_raises() -> None:
    for call in (
        lambda t: aten.cat([t, t[0]]),
        lambda t: aten.native_layer_norm(t, [], None, None, 1e-5),
        lambda t: aten.native_layer_norm(t, [4], None, None, 1e-5),
        lambda t: aten.mean(t.long()),
        lambda t: aten.native_batch_norm(t[0], None, None, None, None, True, 0.1, 1e-5),
    ):
        with pytest.raises((RuntimeError, IndexError)) as expected:
            call(torch.ones(3, 5))
        with pytest.raises(expected.type) as caught:
            call(torch.ones(3, 5, device="trn"))
        assert str(caught.value) == str(expected.value)


def test_a_short_script_does_not_import_the_compiler() -> None:
    """Making an optimizer imports it too, on every device, and is left out here."""
    printed = run(
        """
import sys
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(16, 32), nn.Embedding(8, 32)
        self.norm, self.norm_2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 16, bias=False)

    def forward(self, ids):
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        q, k, v = (
            t.view(*ids.shape, 4, 8).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        return self.head(x + F.dropout(self.down(F.gelu(self.up(self.norm_2(x)))), 0.1))


model = Block().to("trn")
ids = torch.randint(16, (2, 8), device="trn")
loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
loss.backward()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(parameter.grad, alpha=-0.1)
    noise = torch.cat((torch.randn(2, 3, device="trn"), torch.rand(2, 3, device="trn")))
    print((noise.mean() + model(ids).softmax(-1).mean(1).sum()).isfinite().item())
print("torch._dynamo" in sys.modules)
"""
    )
    assert printed == "True\nFalse\n"
