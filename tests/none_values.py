"""What a storage without values is, does and says. Run by test_none.py with numerics "none"."""

import copy
import io
import pickle
import re
import resource
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import torch_trn
from torch_trn import _C

T = torch.Tensor
WAY_OUT = (
    "Run with TRN_NUMERICS=host to have every value, or raise TRN_DATA_BYTES (65536 now; "
    "TRN_INTEGER_DATA_BYTES, 16777216 now, is for integers and bools): tensors up to it keep "
    "theirs."
)


def large(*shape: int, **options: Any) -> T:
    return torch.randn(*(shape or (300, 300)), device="trn", **options)


def valued(*tensors: T) -> list[bool]:
    return [_C.has_values(tensor) for tensor in tensors]


def error_of(call: Any) -> str:
    with pytest.raises(RuntimeError) as caught:
        call()
    return str(caught.value)


def test_small_tensors_have_values_and_large_ones_have_none() -> None:
    assert valued(torch.ones(128, 128, device="trn"), torch.ones(128, 129, device="trn")) == [
        True,
        False,
    ]
    assert torch.arange(5, device="trn").mul(3).tolist() == [0, 3, 6, 9, 12]


def test_integers_and_bools_have_a_limit_of_their_own() -> None:
    ids = torch.arange(1 << 21, device="trn")
    assert valued(ids, ids.repeat(2)) == [True, False]
    mask = torch.ones(4096, 4096, dtype=torch.bool, device="trn").tril()
    assert mask[3, 2:6].tolist() == [True, True, False, False]


def test_large_results_of_small_tensors_are_not_computed() -> None:
    row = torch.ones(1, 1000, device="trn")
    wide = row.expand(1000, 1000)
    assert valued(row, wide, wide.contiguous()) == [True, True, False]
    assert not _C.has_values(torch.arange(1e6, device="trn"))


def test_an_operator_with_a_valueless_input_writes_no_values() -> None:
    x, small = large(), torch.ones(300, device="trn")
    results = (x.sum(), x.max(0).values, x @ small, small + x[0])
    assert valued(*results) == [False] * 4
    small.add_(x[1])
    assert valued(small) == [False]
    out = torch.zeros(300, device="trn")
    torch.sum(x, 0, out=out)
    assert valued(out) == [False]


def test_a_full_overwrite_gives_values_again() -> None:
    step = torch.zeros(4, device="trn")
    for overwrite in (
        T.zero_,
        lambda t: t.fill_(2.0),
        lambda t: t.copy_(torch.ones(4)),
        lambda t: t.copy_(torch.ones(4, device="trn")),
        lambda t: t.uniform_(),
        lambda t: torch.add(torch.ones(4, device="trn"), 1, out=t),
    ):
        step.add_(large()[0, :4])
        assert valued(step) == [False]
        overwrite(step)
        assert valued(step) == [True]
        step.cpu()
    step.add_(large()[0, :4])
    step[:2].zero_()
    assert valued(step) == [False]


def test_an_operator_that_fails_leaves_no_values_behind() -> None:
    x = torch.zeros(4, device="trn").add_(large()[0, :4])
    assert "must match the size" in error_of(lambda: x.copy_(torch.ones(3, device="trn")))
    assert valued(x) == [False]


def test_what_was_only_allocated_reads_as_zeros_or_not_at_all() -> None:
    assert torch.empty(3, device="trn").tolist() == [0.0, 0.0, 0.0]
    assert error_of(lambda: torch.empty(1000, 1000, device="trn").cpu()) == (
        "trn: a copy to the CPU asks for the value of a tensor of shape (1000, 1000) and dtype "
        'torch.float32 on trn:0, which has none: numerics is "none" and nothing has been written '
        f"to it. {WAY_OUT}"
    )
    virgin = torch.empty(6, device="trn")
    virgin[2:4] = 5.0
    assert virgin.tolist() == [0.0, 0.0, 5.0, 5.0, 0.0, 0.0]


def test_views_share_the_state_of_their_storage() -> None:
    x = torch.zeros(2, 3, device="trn")
    view = x.t()[1]
    view.add_(large()[0, :2])
    assert valued(x, view, x.detach()) == [False] * 3
    x.zero_()
    assert view.tolist() == [0.0, 0.0]
    y = torch.empty(0, device="trn").set_(x.untyped_storage(), 0, (6,))
    assert valued(y) == [True]


def test_a_number_without_a_value_is_an_error_or_nan() -> None:
    total = large().sum()
    wanted = (
        "trn: a conversion to a Python number asks for the value of a tensor of shape () and dtype "
        'torch.float32 on trn:0, which has none: numerics is "none" and aten::sum gave it its '
        f"content without computing values. TRN_NONE_ITEM=nan gives nan instead. {WAY_OUT}"
    )
    for read in (T.item, float, lambda t: f"{t:.2f}"):
        assert error_of(lambda read=read: read(total)).replace("sum.dim_IntList", "sum") == wanted
    with torch_trn.override(none_item="nan"):
        with pytest.warns(UserWarning, match=r"nan stands for the value of a tensor of shape \(\)"):
            assert str(total.item()) == "nan"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert str(float(total)) == str(total.cpu().item()) == "nan"
        text = error_of(lambda: bool(total > 0))
        assert "dtype torch.bool" in text and "TRN_NONE_ITEM" not in text
        assert "(300, 300)" in error_of(lambda: large().cpu())


def test_operators_that_need_values_say_so() -> None:
    x = large()
    assert error_of(x.nonzero) == (
        "trn: aten::nonzero needs the values of its arguments, but a tensor of shape (300, 300) "
        'and dtype torch.float32 on trn:0 (tensor 0 of the call) has none: numerics is "none" and '
        f"aten::normal_ gave it its content without computing values. {WAY_OUT}"
    )
    calls = (
        lambda: torch.equal(x, x),
        x.unique,
        lambda: torch.masked_select(x, x > 0),
        lambda: x[x > 0],
        lambda: torch.poisson(x),
    )
    for call in calls:
        assert 'numerics is "none"' in error_of(call)
    assert torch.tensor([0, 3, 0, 1], device="trn").nonzero().tolist() == [[1], [3]]


def test_a_wrong_call_is_still_refused() -> None:
    x = large()
    for call in (
        lambda: x @ large(200, 2),
        lambda: x.add_(torch.ones(7, device="trn")),
        lambda: torch.cat([x, large(2, 2)]),
        lambda: x + torch.ones(300),
        lambda: torch.ones(300, 300, dtype=torch.int64, device="trn").add_(x),
    ):
        assert "numerics" not in error_of(call)


def test_printing_says_that_there_is_no_data() -> None:
    x = large()
    assert repr(x) == "tensor(no data, size=(300, 300), device='trn:0')"
    parameter = nn.Parameter(x.bfloat16())
    assert str(parameter) == (
        "Parameter containing:\ntensor(no data, size=(300, 300), device='trn:0', "
        "dtype=torch.bfloat16,\n       requires_grad=True)"
    )
    assert repr(torch.ones(2, device="trn")) == "tensor([1., 1.], device='trn:0')"


def test_saving_names_the_tensor() -> None:
    model = nn.Linear(300, 300, device="trn")
    text = error_of(lambda: torch.save(model.state_dict(), io.BytesIO()))
    assert (
        "aten::uniform_ gave it its content, as a tensor of shape (300, 300) and dtype "
        "torch.float32, without computing values" in text
    )
    assert "aten::uniform_ gave it" in error_of(lambda: pickle.dumps(model.weight))


def test_checkpoints_load_and_only_their_shapes_count() -> None:
    saved = io.BytesIO()
    torch.save(nn.Linear(300, 300).state_dict(), saved)
    saved.seek(0)
    state = torch.load(saved, map_location="trn")
    assert state["weight"].shape == (300, 300) and state["bias"].device.type == "trn"
    model = nn.Linear(300, 300, device="trn")
    model.load_state_dict(state)
    assert valued(model.weight, model.bias) == [False, True]
    assert torch.equal(model.bias.cpu(), state["bias"].cpu())
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        nn.Linear(200, 300, device="trn").load_state_dict(state)


def test_addresses_are_unique_and_used_again() -> None:
    parts = [torch.empty(1 << 20, device="trn") for _ in range(50)]
    starts = sorted(part.data_ptr() for part in parts)
    assert all(b - a >= 4 << 20 for a, b in zip(starts, starts[1:], strict=False))
    first = parts[0].data_ptr()
    assert parts[0].view(-1)[4:].data_ptr() == first + 16
    tied = nn.Linear(500, 500, device="trn")
    assert tied.weight.detach().data_ptr() == tied.weight.data_ptr()
    twin = copy.deepcopy(tied)
    assert twin.weight.data_ptr() != tied.weight.data_ptr() and valued(twin.weight) == [False]
    for _ in range(3000):
        torch.empty(1 << 30, dtype=torch.uint8, device="trn")  # 3 TiB, one after the other


def test_no_memory_of_the_host_is_behind_them() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch_trn.override(hbm_bytes="8TiB"):
        held = [large(1 << 15, 1 << 15) for _ in range(64)]
        result = sum(held) @ held[0]
        assert result.shape == (1 << 15, 1 << 15)
        assert torch.trn.memory_allocated() >= 65 << 32
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB
        del held, result


def test_storages_resize_as_fsdp_does() -> None:
    x = large(1 << 16)
    storage = x.untyped_storage()
    storage.resize_(0)
    assert (storage.data_ptr(), storage.nbytes()) == (0, 0)
    storage.resize_(1 << 18)
    assert x.data_ptr() != 0
    x.copy_(large(1 << 16))
    assert valued(x) == [False]
    small = torch.arange(4.0, device="trn")
    small.resize_(6)
    assert small[:4].tolist() == [0.0, 1.0, 2.0, 3.0]
    small.resize_(1 << 20)
    assert valued(small) == [False]


def test_out_grows_and_is_charged() -> None:
    x = large(512, 512)
    out = torch.empty(0, device="trn")
    before = torch.trn.memory_allocated()
    torch.mul(x, 2, out=out)
    assert (out.shape, torch.trn.memory_allocated() - before) == ((512, 512), 1 << 20)
    assert valued(out) == [False]


def test_copies_between_devices_carry_the_state() -> None:
    x = large()
    assert valued(x.to("trn:1"), torch.ones(3, device="trn").to("trn:1")) == [False, True]
    assert valued(torch.ones(300, 300).to("trn")) == [False]
    assert valued(torch.ones(3, dtype=torch.float64).to("trn")) == [True]


def test_random_numbers_go_on_where_they_would_be() -> None:
    torch.manual_seed(11)
    expected = torch.Generator().manual_seed(11)
    for shape, dtype in (((300, 300), torch.float32), ((20_000_000,), torch.float64)):
        torch.randn(shape, dtype=dtype, device="trn")
        torch.randn(shape, dtype=dtype, generator=expected)
        drawn = torch.rand(5, device="trn")
        assert torch.equal(drawn.cpu(), torch.rand(5, generator=expected))
    state = torch.trn.get_rng_state()
    a = (torch.dropout(large(), 0.1, True), torch.rand(3, device="trn"))[1]
    torch.trn.set_rng_state(state)
    b = (torch.dropout(large(), 0.1, True), torch.rand(3, device="trn"))[1]
    assert a.tolist() == b.tolist()


def test_truncated_normals_are_drawn_once() -> None:
    weight = nn.init.trunc_normal_(torch.empty(300, 300, device="trn"), std=0.02)
    assert valued(weight) == [False]
    small = nn.init.trunc_normal_(torch.empty(50, device="trn"), a=-0.1, b=0.1)
    assert small.abs().max().item() <= 0.1


def test_gradients_without_values_count_as_finite() -> None:
    model = nn.Linear(300, 300, device="trn")
    scaler = torch.amp.GradScaler("trn", init_scale=4.0, growth_interval=1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler.scale(model(large()).sum()).backward()
    scaler.step(sgd)
    scaler.update()
    assert scaler.get_scale() == 8.0


def test_a_storage_of_raw_bytes_is_read_only_when_it_has_some() -> None:
    assert pickle.loads(pickle.dumps(torch.ones(3, device="trn"))).tolist() == [1.0, 1.0, 1.0]


def test_out_of_memory_changes_nothing() -> None:
    with torch_trn.override(hbm_bytes="64MiB"):
        x = large(1 << 10, 1 << 12)
        before = torch.trn.memory_allocated()
        with pytest.raises(torch.OutOfMemoryError, match=re.escape("trn:0 is out of memory")):
            x.repeat(4, 4)
        assert torch.trn.memory_allocated() == before
        del x


def test_numerics_cannot_change_in_use() -> None:
    torch.ones(1, device="trn")
    with pytest.raises(ValueError) as caught:
        torch_trn.configure(numerics="host")
    assert str(caught.value) == (
        "numerics cannot change from 'none' to 'host': the device is in use, and its tensors have "
        "values or have none. Call torch_trn.configure before the first trn tensor, or set "
        "TRN_NUMERICS"
    )


def test_limits_can_change() -> None:
    with torch_trn.override(data_bytes="1MiB"):
        assert valued(torch.ones(300, 300, device="trn")) == [True]
    with torch_trn.override(data_bytes=0, integer_data_bytes=0):
        assert valued(torch.ones(1, device="trn"), torch.ones(1, device="trn") > 0) == [False] * 2
