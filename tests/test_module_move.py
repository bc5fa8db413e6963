"""`module.to("trn")` and back: parameters stay the objects that others hold."""

from __future__ import annotations

import copy
import gc

import torch
from torch import nn


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inputs, self.outputs = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
            self.outputs.weight = self.inputs.weight

    model = Tied()
    twin, tokens = copy.deepcopy(model), torch.tensor([1, 2, 3, 2])
    for device in ("trn", "cpu", "trn"):
        model.to(device)
        assert model.inputs.weight is model.outputs.weight
        assert model.inputs.weight.device.type == device
    for net, device in ((model, "trn"), (twin, "cpu")):
        net.outputs(net.inputs(tokens.to(device))).square().sum().backward()
    torch.testing.assert_close(model.inputs.weight.grad.cpu(), twin.inputs.weight.grad)


def test_an_optimizer_made_before_the_move_goes_on() -> None:
    model = nn.Linear(3, 3)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.to("trn")
    model(torch.ones(1, 3, device="trn")).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.weight.detach().cpu(), before - 1.0)


def test_gradients_move_along() -> None:
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    gradient = model.weight.grad.clone()
    model.to("trn")
    assert model.weight.grad.is_trn and torch.equal(model.weight.grad.cpu(), gradient)
    model(torch.ones(1, 2, device="trn")).sum().backward()
    assert torch.equal(model.weight.grad.cpu(), 2 * gradient)
    model.cpu()
    assert model.weight.grad.device.type == "cpu"


def test_a_graph_from_before_the_move_does_not_hinder() -> None:
    model = nn.Linear(2, 2)
    loss = model(torch.ones(1, 2)).sum()
    model.to("trn")
    model(torch.ones(1, 2, device="trn")).sum().backward()
    assert model.weight.grad.is_trn
    del loss


def test_dtype_and_device_at_once() -> None:
    model = nn.Linear(2, 2).to("trn", torch.bfloat16)
    held = model.weight
    assert held.dtype == torch.bfloat16 and held.is_trn and held.is_leaf and held.requires_grad
    model.to("cpu", torch.float32)
    assert model.weight is held and held.dtype == torch.float32


def test_recurrent_layers_keep_their_flat_weights() -> None:
    layer = nn.LSTM(3, 4)
    held = [id(p) for p in layer.parameters()]
    layer.to("trn")
    assert [id(p) for p in layer.parameters()] == held
    assert all(a is b for a, b in zip(layer._flat_weights, layer.parameters(), strict=True))
    assert layer(torch.ones(2, 1, 3, device="trn"))[0].is_trn


def test_the_memory_of_the_old_device_is_free() -> None:
    gc.collect()
    model = nn.Linear(64, 64).to("trn")
    used = torch.trn.memory_allocated()
    assert used > 0
    model.cpu()
    gc.collect()
    assert torch.trn.memory_allocated() == used - 64 * 64 * 4 - 512


def test_between_trn_devices_and_on_the_cpu_nothing_changes() -> None:
    model = nn.Linear(2, 2).to("trn:1")
    held = model.weight
    model.to("trn:0")
    assert model.weight is held and held.device.index == 0
    other = nn.Linear(2, 2)
    held = other.weight
    other.double()
    assert other.weight is held and held.dtype == torch.float64
