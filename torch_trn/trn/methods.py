"""Methods that torch has for every device, as trn needs them.

`x.trn(index)` of tensors, modules and storages: torch generates it and turns what it is given into
a device, keeping 8 bits of its index, so that 256 would become trn:0. Indices are checked first.

`repr(x)`: a tensor without values says so instead of asking for them.
"""

import functools
from typing import Any

import torch

from torch_trn import _C
from torch_trn.trn._utils import check_index_text


def check_indices() -> None:
    """Wraps the generated `trn` methods so that they refuse an index that does not exist."""
    packed = torch.nn.utils.rnn.PackedSequence
    for owner in (torch.Tensor, torch.nn.Module, torch.storage.TypedStorage, packed):
        _wrap(owner)
    _wrap(torch.storage.UntypedStorage)


def _wrap(owner: Any) -> None:
    method = owner.trn

    @functools.wraps(method)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        device = args[0] if args else kwargs.get("device")
        if isinstance(device, int) and not isinstance(device, bool):
            check_index_text(f"trn:{device}")
        elif isinstance(device, str):
            check_index_text(device)
        return method(self, *args, **kwargs)

    owner.trn = checked


def show_missing_values() -> None:
    """Lets a tensor that has no values (numerics "none") be printed."""
    original = torch.Tensor.__repr__

    @functools.wraps(original)
    def shown(self: torch.Tensor, *, tensor_contents: str | None = None) -> str:
        plain = type(self) is torch.Tensor or type(self) is torch.nn.Parameter
        if tensor_contents is None and plain and not _C.has_values(self):
            tensor_contents = f"no data, size={tuple(self.shape)}"
        return original(self, tensor_contents=tensor_contents)

    torch.Tensor.__repr__ = shown  # type: ignore[assignment, method-assign]
