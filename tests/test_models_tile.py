"""Whole models whose values come from their Programs: losses, gradients and steps as on the CPU.

Both devices start from the same weights and batch. Programs add in another order than the CPU's
kernels and round at other places, so values agree to a bound.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from model_families import FAMILIES, SAMPLING, Batch, Family
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import torch_trn

pytestmark = pytest.mark.filterwarnings("error::torch_trn.errors.LoweringWarning")

LOSS_BOUND = 2.0**-20
"""Relative: 8 roundings of fp32."""

GRADIENT_BOUND = 2.0**-17
"""Of a parameter's largest gradient: 64 roundings in sums of some hundred products."""

ZERO_BOUND = 2.0**-20
"""Of the model's largest gradient: what should be zero (a key's bias) is what sums leave of it."""

AMPLIFIED = {"resnet50": 64}
"""By how much more rounding shows: 53 layers, each divided by the deviation of a few values. The
CPU's own gradients are as far from those in float64."""


def on_trn(family: Family) -> tuple[nn.Module, Batch]:
    """The family's model and batch on trn."""
    model, batch = family.make()
    return model.to("trn"), {name: tensor.to("trn") for name, tensor in batch.items()}


def named(name: str) -> Family:
    """A family by name."""
    return next(family for family in FAMILIES if family.name == name)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient on the CPU."""
    return {
        name: parameter.grad.detach().cpu().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_near(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float) -> None:
    """Each of ``got`` within ``bound`` of its largest element, or nearly zero beside the others."""
    assert got.keys() == expected.keys()
    largest = max(tensor.abs().max().item() for tensor in expected.values())
    for name, tensor in expected.items():
        allowed = bound * tensor.abs().max().item() + ZERO_BOUND * largest
        worst = (got[name].double() - tensor.double()).abs().max().item()
        assert worst <= allowed, f"{name}: {worst:.3g} off, allowed {allowed:.3g}"


def step(model: nn.Module, batch: Batch) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Loss and gradients of a batch, and the parameters after a step of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss = model.train()(**batch).loss
    loss.backward()
    found = gradients(model)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item(), found, {n: p.detach().cpu() for n, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_training(family: Family) -> None:
    loss, slopes, weights = step(*family.make())
    model, batch = on_trn(family)
    with torch_trn.override(numerics="tile"):
        got = step(model, batch)
    times = AMPLIFIED.get(family.name, 1)
    assert got[0] == pytest.approx(loss, rel=times * LOSS_BOUND)
    assert_near(got[1], slopes, times * GRADIENT_BOUND)
    assert_near(got[2], weights, times * GRADIENT_BOUND)


def test_adamw_learns_as_on_the_cpu() -> None:
    def losses(model: nn.Module, batch: Batch) -> list[float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        found = []
        for _ in range(4):
            loss = model(**batch).loss
            found.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return found

    expected = losses(*named("llama").make())
    model, batch = on_trn(named("llama"))
    with torch_trn.override(numerics="tile"):
        got = losses(model, batch)
    assert got == pytest.approx(expected, rel=2.0**-12)
    assert got[3] < got[0] - 0.5


@pytest.mark.parametrize("name", ["llama", "mamba", "t5"])
def test_greedy_tokens_are_the_cpus(name: str) -> None:
    family = named(name)
    model, batch = family.make()
    prompt = batch[family.prompt][:1]
    given = {"max_new_tokens": 4, "pad_token_id": 0, **SAMPLING["greedy"]}
    expected = model.eval().generate(prompt, **given)
    model.to("trn")
    with torch_trn.override(numerics="tile"):
        tokens = model.generate(prompt.to("trn"), **given)
    assert torch.equal(tokens.cpu(), expected)


def llama_block(dtype: torch.dtype) -> tuple[nn.Module, nn.Module, Tensor]:
    """One layer with weights in bf16 (held in ``dtype``), its positions, and its input."""
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2
    )
    config._attn_implementation = "sdpa"
    block = LlamaDecoderLayer(config, 0)
    block = block.bfloat16().to(dtype)
    return block, LlamaRotaryEmbedding(config), torch.randn(2, 20, 64).bfloat16().to(dtype)


def through(block: nn.Module, rotary: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The block's result, and the gradients of its square's mean."""
    x = x.requires_grad_()
    positions = rotary(x, torch.arange(x.shape[1], device=x.device)[None])
    y = block(x, position_embeddings=positions)
    y.float().square().mean().backward()
    return {"result": y.detach().cpu(), "input": x.grad.cpu(), **gradients(block)}


def test_bf16_llama_block() -> None:
    block, rotary, x = llama_block(torch.float32)
    expected = through(block, rotary, x)
    block, rotary, x = llama_block(torch.bfloat16)
    with torch_trn.override(numerics="tile"):
        got = through(block.to("trn"), rotary.to("trn"), x.detach().to("trn"))
    # Some eight operators in a row round to bf16, each by half of 2^-8; the CPU's are as far off.
    assert_near(got, expected, 4 * 2.0**-8)
