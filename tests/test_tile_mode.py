"""numerics="tile": a program's values come from the Programs that are timed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import torch_trn

pytestmark = pytest.mark.filterwarnings("error::torch_trn.errors.LoweringWarning")


@pytest.fixture(autouse=True)
def tile() -> Iterator[None]:
    with torch_trn.override(numerics="tile"):
        yield


def test_products_are_rounded_as_the_array_rounds() -> None:
    # 2^-24 is lost when it is added to 1 and kept when it comes first: the array sums from k = 0.
    a = torch.full((1, 128), 2.0**-24)
    a[0, 0] = 1.0
    b = torch.ones(128, 4)
    got = (a.to("trn") @ b.to("trn")).cpu()
    assert torch.equal(got, torch.ones(1, 4))


def test_in_place_and_out() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    y = x.to("trn")
    y[1:, ::2].add_(y[1:, ::2], alpha=2)
    expected = x.clone()
    expected[1:, ::2].add_(x[1:, ::2].clone(), alpha=2)
    assert torch.equal(y.cpu(), expected)
    out = torch.empty(3, 4, device="trn")
    torch.mul(y, 2.0, out=out)
    assert torch.equal(out.cpu(), expected * 2)


def test_a_number_is_the_calls_own() -> None:
    # The cost of x * 2 serves x * 3 too; its values must not.
    x = torch.ones(5, device="trn")
    assert (x * 2).tolist() == [2.0] * 5 and (x * 3).tolist() == [3.0] * 5


def test_random_operators_keep_the_hosts_values() -> None:
    torch.trn.manual_seed(5)
    ours = torch.rand(7, device="trn")
    torch.manual_seed(5)
    assert torch.equal(ours.cpu(), torch.rand(7))


def test_modes_of_the_user_see_only_his_operators() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.ones(4, device="trn")
    with Mode():
        x + x
    assert seen == ["aten.add.Tensor"]


def test_a_network_trains() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 33), nn.LayerNorm(33), nn.GELU(), nn.Linear(33, 3))
    twin = nn.Sequential(nn.Linear(9, 33), nn.LayerNorm(33), nn.GELU(), nn.Linear(33, 3))
    twin.load_state_dict(model.state_dict())
    twin.to("trn")
    x, target = torch.randn(17, 9), torch.randint(0, 3, (17,))
    losses = []
    for net, device in ((model, "cpu"), (twin, "trn")):
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x.to(device)), target.to(device))
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_running_statistics_move_once() -> None:
    # The schema of native_batch_norm does not say that it writes them.
    norm, x = nn.BatchNorm1d(3), torch.randn(8, 3)
    twin = nn.BatchNorm1d(3).to("trn")
    norm(x), twin(x.to("trn"))
    torch.testing.assert_close(twin.running_mean.cpu(), norm.running_mean)
    torch.testing.assert_close(twin.running_var.cpu(), norm.running_var)


def test_parameters_of_different_ages_are_refused_by_a_fused_step() -> None:
    a, b = (torch.ones(3, device="trn", requires_grad=True) for _ in range(2))
    optimizer = torch.optim.AdamW([a, b], fused=True)
    a.grad = torch.ones_like(a)
    optimizer.step()
    b.grad = torch.ones_like(b)
    with pytest.raises(torch_trn.TrnError) as error:
        optimizer.step()
    assert str(error.value) == (
        "aten::_fused_adamw_ with numerics='tile': its parameters have taken [1.0, 2.0] steps, and "
        "the Program computes one bias correction for all of them. Put parameters of different "
        "ages into groups of their own, or use fused=False"
    )


def test_single_numbers_in_float64() -> None:
    x = torch.tensor(3.0, dtype=torch.float64, device="trn")
    assert (x.reciprocal() * 3).item() == 1.0


def test_single_numbers_in_float32_are_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_trn import runtime

    ran: list[str] = []
    execute = runtime.execute

    def noted(program: Any, *args: Any) -> None:
        ran.append(program.name)
        execute(program, *args)

    monkeypatch.setattr(runtime, "execute", noted)
    x = torch.tensor(3.0, device="trn")
    assert (x.exp() * 2).item() == pytest.approx(2 * math.exp(3.0), rel=1e-6)
    assert ran == ["exp", "mul.Tensor"]


def test_a_number_where_a_mask_holds() -> None:
    x = torch.arange(6.0, device="trn").reshape(2, 3)
    x[x > 3] = -1
    x[:, torch.tensor([True, False, False], device="trn")] = torch.tensor(9.0)
    assert x.tolist() == [[9.0, 1.0, 2.0], [9.0, -1.0, -1.0]]
