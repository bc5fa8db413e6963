"""Training steps of small models, recorded operator by operator: all of them have Programs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lowering_calls import record
from torch import nn

from torch_trn.chip import system
from torch_trn.lowering import has_lowering, lower
from torch_trn.scheduler import schedule

#: Reads of a value by the host and the like: no work for a NeuronCore.
NOT_ON_DEVICE = {"aten::_local_scalar_dense", "aten::_has_same_storage_numel"}


class Block(nn.Module):
    """A causal transformer block with a vocabulary of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, 48)
        self.norm = nn.LayerNorm(48)
        self.qkv = nn.Linear(48, 144)
        self.up, self.down = nn.Linear(48, 192), nn.Linear(192, 48)
        self.head = nn.Linear(48, 97, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        q, k, v = (
            part.view(*ids.shape, 4, 12).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, 2)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + y.transpose(1, 2).reshape(x.shape)
        x = x + self.down(nn.functional.gelu(self.up(x)))
        return self.head(x)


def _language_model(device: str, **optimizer: bool) -> None:
    model = Block().to(device)
    ids = torch.zeros(2, 130, dtype=torch.long, device=device)
    steps = torch.optim.AdamW(model.parameters(), lr=1e-3, **optimizer)
    logits = model(ids)
    nn.functional.cross_entropy(logits.view(-1, 97), ids.view(-1)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    steps.step()
    steps.zero_grad()


def _image_model() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.GroupNorm(4, 16), nn.SiLU(),
        nn.Upsample(scale_factor=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    ).to("meta")  # fmt: skip
    images = torch.zeros(2, 3, 65, 65, device="meta")
    labels = torch.zeros(2, dtype=torch.long, device="meta")
    steps = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    nn.functional.cross_entropy(model(images), labels).backward()
    steps.step()


def _sampling() -> None:
    logits = torch.zeros(4, 997, device="meta")
    values, positions = (logits / 0.8).topk(50)
    cumulative = values.softmax(-1).cumsum(-1)
    kept = values.masked_fill(cumulative > 0.9, float("-inf"))
    positions.gather(-1, torch.multinomial(kept.softmax(-1), 1))
    logits.argmax(-1)


MODELS: dict[str, Callable[[], None]] = {
    "language model, foreach AdamW": lambda: _language_model("meta", foreach=True),
    "language model, fused AdamW": lambda: _language_model("cpu", fused=True),
    "image model, SGD": _image_model,
    "sampling": _sampling,
}


@pytest.mark.parametrize("name", MODELS)
def test_every_operator_of_a_training_step_has_a_program(name: str) -> None:
    core = system("trn2.48xlarge").chip.core
    calls = [call for call in record(MODELS[name]) if call.name.startswith("aten::")]
    calls = [call for call in calls if call.name not in NOT_ON_DEVICE]
    assert len(calls) >= 5
    assert {call.name for call in calls if not has_lowering(call.name)} == set()
    for call in calls:
        program = lower(call, core, 2)
        assert schedule(program, core).duration_ps >= 0
