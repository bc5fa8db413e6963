"""Memory by category and `torch_trn.estimate`: bytes counted by hand, to the byte."""

import gc
import re
from typing import Any

import pytest
import torch
from hbm_case import MIB, block, device_of_its_own
from subprocess_case import run
from torch import nn
from torch.utils.checkpoint import checkpoint

import torch_trn
from torch_trn.profiler import Estimate
from torch_trn.profiler.memory import CATEGORIES, Refusal

WEIGHT_BYTES = 128 * 256 * 4
PARAMETER_BYTES = 2 * WEIGHT_BYTES + 256 * 4 + 128 * 4
INPUT_BYTES = 64 * 128 * 4
HIDDEN_BYTES = 64 * 256 * 4


@pytest.fixture(autouse=True)
def device() -> Any:
    with device_of_its_own() as index:
        yield index


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)).to("trn")


def batch(rows: int = 64) -> torch.Tensor:
    return torch.randn(rows, 128, device="trn")


def train(rows: int = 64, steps: int = 2) -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    x = batch(rows)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def by_category(*nbytes: int) -> dict[str, int]:
    return dict(zip(CATEGORIES, nbytes, strict=True))


def test_adamw_by_hand(device: int) -> None:
    estimate = torch_trn.estimate(train)
    # The peak is in the step: the square roots of one moment, beside the batch.
    expected = by_category(
        PARAMETER_BYTES, PARAMETER_BYTES, 2 * PARAMETER_BYTES, INPUT_BYTES, PARAMETER_BYTES
    )
    assert estimate.memory.category_bytes == expected
    assert estimate.peak_bytes == sum(expected.values()) == 1_351_168
    assert (estimate.peak_operator, estimate.peak_module) == ("aten::_foreach_sqrt", "")
    assert estimate.memory.device == device
    assert estimate.fits
    assert estimate.missing_bytes == 0
    assert estimate.capacity_bytes == torch.trn.mem_get_info()[1]


def test_the_peak_is_that_of_the_program_alone() -> None:
    estimate = torch_trn.estimate(train)
    torch.trn.reset_peak_memory_stats()
    train()
    assert estimate.peak_bytes == torch.trn.max_memory_allocated()


def test_the_time_is_that_of_a_profile() -> None:
    estimate = torch_trn.estimate(train)
    with torch_trn.profile() as prof:
        train()
    assert estimate.time_us == prof.elapsed_us


def test_two_runs_are_equal() -> None:
    assert torch_trn.estimate(train) == torch_trn.estimate(train)


def test_the_peak_of_a_backward_pass() -> None:
    def backward() -> None:
        model = small_model()
        model(batch(rows=640)).sum().backward()

    memory = torch_trn.estimate(backward).memory
    # The second layer has its gradients, the first not yet. Kept for backward: the input, the
    # hidden tensor, the sum and its gradient of one, which backward is called with. At work:
    # the gradients of the hidden tensor after and before the relu.
    assert memory.category_bytes == by_category(
        PARAMETER_BYTES,
        WEIGHT_BYTES + 128 * 4,
        0,
        10 * (INPUT_BYTES + HIDDEN_BYTES) + 2 * 512,
        2 * 10 * HIDDEN_BYTES,
    )
    assert (memory.operator, memory.module) == ("aten::threshold_backward", "model.1")


def test_inference_and_the_module_of_the_peak() -> None:
    model, x = small_model(), batch()

    def infer() -> None:
        with torch.no_grad():
            model(x)

    memory = torch_trn.estimate(infer).memory
    # x is not made in a module and there is no backward; both hidden tensors leave theirs.
    assert memory.category_bytes == by_category(
        PARAMETER_BYTES, 0, 0, 2 * HIDDEN_BYTES, INPUT_BYTES
    )
    assert (memory.operator, memory.module) == ("aten::relu", "model.1")
    largest = memory.blocks[0]
    assert (largest.nbytes, largest.category, largest.operator, largest.module) == (
        WEIGHT_BYTES, "parameters", "aten::empty", "",
    )  # fmt: skip


def test_what_does_not_leave_its_module_is_temporary() -> None:
    class Norm(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            square = x * x
            return square + 1

    norm, x = Norm(), batch()
    memory = torch_trn.estimate(norm, x).memory
    assert memory.activation_bytes == INPUT_BYTES  # the result
    assert memory.temporary_bytes == 2 * INPUT_BYTES  # x and its square
    assert (memory.operator, memory.module) == ("aten::add.Tensor", "norm")


def test_what_was_there_before() -> None:
    model, x = small_model(), batch()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    model(x).sum().backward()
    optimizer.step()
    with torch_trn.profile(memory=True) as prof:
        pass
    memory = prof.memory()
    assert memory.category_bytes == by_category(*3 * [PARAMETER_BYTES], 0, INPUT_BYTES)
    assert (memory.operator, memory.module) == ("", "")
    assert prof.memory_table().startswith(f"trn:{memory.device} at its peak, before the profile:\n")


def test_a_leaf_without_a_module() -> None:
    weight = torch.ones(128, 128, device="trn", requires_grad=True)

    def backward() -> None:
        (weight * weight).sum().backward()

    memory = torch_trn.estimate(backward).memory
    assert memory.parameter_bytes == 128 * 128 * 4
    with torch_trn.profile(memory=True) as prof:
        pass
    assert prof.memory().gradient_bytes == 128 * 128 * 4
    assert not weight._post_accumulate_grad_hooks


def test_buffers_are_parameters() -> None:
    model = nn.BatchNorm1d(128, affine=False).to("trn")
    with torch_trn.profile(memory=True) as prof:
        model(batch())
    # Running mean and variance, and the count of batches.
    assert prof.memory().parameter_bytes == 3 * 512


def test_what_a_checkpoint_recomputes_is_an_activation() -> None:
    model, x = small_model(), batch(rows=640)

    def backward() -> None:
        checkpoint(model, x, use_reentrant=False).sum().backward()

    memory = torch_trn.estimate(backward).memory
    again = [b for b in memory.blocks if b.operator == "aten::relu"]
    assert [(b.category, b.nbytes, b.module) for b in again] == [
        ("activations", 10 * HIDDEN_BYTES, "model.1")
    ]
    assert memory.operator == "aten::threshold_backward"


def test_a_program_that_does_not_fit() -> None:
    enough = torch_trn.estimate(train, rows=640)
    with torch_trn.override(hbm_bytes=2 * MIB):
        estimate = torch_trn.estimate(train, rows=640)
        assert torch.trn.mem_get_info() == (2 * MIB, 2 * MIB)
        with pytest.raises(torch.OutOfMemoryError):
            train(rows=640)
        gc.collect()
    assert not estimate.fits
    assert estimate.memory == enough.memory
    assert estimate.time_us == enough.time_us
    assert estimate.capacity_bytes == 2 * MIB
    assert estimate.missing_bytes == enough.peak_bytes - 2 * MIB > 0
    assert estimate.refusal == Refusal(
        device=torch.trn.current_device(),
        nbytes=640 * 128 * 4,
        operator="aten::pow.Tensor_Scalar",
        module="",
    )
    head = estimate.table().splitlines()[:2]
    assert head[0].endswith("of 2.00 MiB HBM: does not fit")
    assert re.fullmatch(
        r"no room for 320\.00 KiB in aten::pow\.Tensor_Scalar on trn:\d+; "
        r"1\.26 MiB are missing at the peak",
        head[1],
    )


def test_fragments_that_are_too_small() -> None:
    def fragments() -> None:
        pieces = [block(MIB) for _ in range(4)]
        del pieces[::2]
        block(2 * MIB)

    with torch_trn.override(hbm_bytes=4 * MIB):
        estimate = torch_trn.estimate(fragments)
    assert (estimate.peak_bytes, estimate.fits, estimate.missing_bytes) == (4 * MIB, False, 0)
    assert estimate.table().splitlines()[1] == (
        f"no room for 2.00 MiB in aten::empty on trn:{estimate.memory.device}; "
        "the free HBM is in pieces that are too small"
    )


def test_what_stays_above_the_capacity_is_a_warning(device: int) -> None:
    kept = []
    before = torch_trn.config.get().hbm_bytes
    text = (
        f"trn:{device} holds 3.00 MiB after the estimate, more than its 2.00 MiB, so the devices "
        "keep a pretended capacity of 64.00 TiB. Make the model and the optimizer inside the "
        "estimated function, or free them and call torch_trn.configure(hbm_bytes=2097152)"
    )
    with torch_trn.override(hbm_bytes=2 * MIB):
        with pytest.warns(RuntimeWarning, match=f"^{re.escape(text)}$"):
            torch_trn.estimate(lambda: kept.append(block(3 * MIB)))
        assert torch_trn.config.get().hbm_bytes == torch.trn.mem_get_info()[1] == 1 << 46
        kept.clear()
        torch_trn.configure(hbm_bytes=2 * MIB)
        assert torch.trn.mem_get_info() == (2 * MIB, 2 * MIB)
    assert torch_trn.config.get().hbm_bytes == before


def test_an_exception_after_a_refusal_leaves_the_capacity_as_it_was() -> None:
    def fails() -> None:
        block(3 * MIB)
        raise KeyError("mine")

    with torch_trn.override(hbm_bytes=2 * MIB):
        with pytest.raises(KeyError, match="mine"):
            torch_trn.estimate(fails)
        assert torch.trn.mem_get_info() == (2 * MIB, 2 * MIB)


def test_table() -> None:
    def infer() -> None:
        model, x = small_model(), batch()
        with torch.no_grad():
            model(x)

    estimate = torch_trn.estimate(infer)
    device = estimate.memory.device
    assert estimate.table(limit=2).splitlines() == [
        f"{estimate.time_us:,.1f} us, 417.50 KiB of 24.00 GiB HBM: fits",
        f"trn:{device} at its peak, in aten::relu of model.1:",
        "category              bytes    share    blocks",
        "---------------  ----------  -------  --------",
        "parameters       257.50 KiB    61.7%         4",
        "gradients               0 B     0.0%         0",
        "optimizer state         0 B     0.0%         0",
        "activations      128.00 KiB    30.7%         2",
        "temporaries       32.00 KiB     7.7%         1",
        "total            417.50 KiB   100.0%         7",
        "",
        "   largest  category    operator     module",
        "----------  ----------  -----------  --------",
        "128.00 KiB  parameters  aten::empty",
        "128.00 KiB  parameters  aten::empty",
    ]


def test_nothing_at_all() -> None:
    estimate = torch_trn.estimate(lambda: None)
    assert (estimate.time_us, estimate.peak_bytes, estimate.fits) == (0.0, 0, True)


def test_without_data_it_is_the_same() -> None:
    program = """
import torch, torch_trn
from torch import nn
def train():
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).to("trn")
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(64, 256, device="trn")
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
print(torch_trn.estimate(train))
"""
    host, none = (run(program, TRN_NUMERICS=numerics) for numerics in ("host", "none"))
    assert host == none
    assert host.startswith("Estimate(time_us=")


def test_errors() -> None:
    with pytest.raises(ValueError) as wrong:
        torch_trn.estimate(3)  # type: ignore[arg-type]
    assert str(wrong.value) == (
        "fn is 3, which cannot be called; pass a function that runs what is to be estimated, "
        "such as torch_trn.estimate(train_step, batch)"
    )
    with pytest.raises(ZeroDivisionError):
        torch_trn.estimate(lambda: 1 // 0)
    with torch_trn.profile(), pytest.raises(RuntimeError, match="is running already"):
        torch_trn.estimate(train)
    assert isinstance(torch_trn.estimate(lambda: None), Estimate)
    with pytest.raises(ValueError, match="^limit is -1; it must be 0 or more blocks to show$"):
        torch_trn.estimate(lambda: None).table(limit=-1)


def test_memory_that_was_not_recorded(device: int) -> None:
    with torch_trn.profile() as prof:
        block(512)
    with pytest.raises(ValueError) as missing:
        prof.memory()
    assert str(missing.value) == (
        "this profile did not record memory; profile with torch_trn.profile(memory=True)"
    )
    with torch_trn.profile(memory=True) as prof:
        block(512)
    assert prof.memory(device).peak_bytes == 512
    with pytest.raises(ValueError) as other:
        prof.memory(0)
    assert str(other.value).startswith("trn:0 held no memory in this profile; those that did: ")
