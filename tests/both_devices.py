"""The same call on trn and on the CPU, compared bit by bit."""

from collections.abc import Callable
from typing import Any

import torch

T = torch.Tensor


def check_on_both(call: Callable[[str], Any]) -> None:
    """`call` gives the same bits, sizes, strides, offsets and types on trn:2 and on the CPU."""
    results, expected = (flat(call(device)) for device in ("trn:2", "cpu"))
    assert len(results) == len(expected)
    for number, (result, value) in enumerate(zip(results, expected, strict=True)):
        if isinstance(result, T):
            assert result.device == torch.device("trn", 2), number
            for fact in (T.size, T.stride, T.storage_offset):
                assert fact(result) == fact(value), (number, fact)
            result = result.cpu()
        text = f"item {number}: {{}}".format
        torch.testing.assert_close(result, value, rtol=0, atol=0, equal_nan=True, msg=text)


def flat(value: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(value)
