"""`x.trn(index)` of tensors, modules and storages: indices are checked before torch cuts them.

torch generates these methods and turns what they are given into a device, keeping 8 bits of its
index: 256 would become trn:0.
"""

import functools
from typing import Any

import torch

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
