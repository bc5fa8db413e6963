"""Methods that torch has for every device, as trn needs them.

`x.trn(index)` of tensors, modules and storages: torch generates it and turns what it is given into
a device, keeping 8 bits of its index, so that 256 would become trn:0. Indices are checked first.

`repr(x)`: a tensor without values says so instead of asking for them, and initialisation that asks
for them does not.
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


def truncate_without_values() -> None:
    """Lets `torch.nn.init.trunc_normal_` end on a tensor that will have no values.

    It draws again what lies out of bounds, until no value does. Without values it draws once.
    """
    original = torch.nn.init._no_grad_trunc_normal_

    @functools.wraps(original)
    def truncated(
        tensor: torch.Tensor,
        mean: float,
        std: float,
        a: float,
        b: float,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        if _C.can_take_values(getattr(tensor, "_local_tensor", tensor)):
            return original(tensor, mean, std, a, b, generator)
        with torch.no_grad():
            return tensor.normal_(mean, std, generator=generator)

    torch.nn.init._no_grad_trunc_normal_ = truncated


def show_missing_values() -> None:
    """Lets a tensor that has no values (numerics "none") be printed."""
    original = torch.Tensor.__repr__

    @functools.wraps(original)
    def shown(self: torch.Tensor, *, tensor_contents: str | None = None) -> str:
        plain = type(self) is torch.Tensor or type(self) is torch.nn.Parameter
        if tensor_contents is None and plain and not _C.has_values(self):
            tensor_contents = f"no data, size={tuple(self.shape)}"
        return original(self, tensor_contents=tensor_contents)  # type: ignore[call-arg]

    torch.Tensor.__repr__ = shown  # type: ignore[assignment, method-assign]
