"""`module.to("trn")` moves parameters in place, as on torch's own devices.

torch sets `parameter.data` where old and new device are among those it lists, and makes a new
Parameter for any other. An optimizer made before the move would go on with parameters that no
module has, and tied modules would be untied.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torch_trn import _C

_apply_of_torch = nn.Module._apply


def keep() -> None:
    """Makes every module keep its parameters when they come to trn or leave it."""
    nn.Module._apply = _apply  # type: ignore[method-assign]


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    if recurse:
        for child in self.children():
            child._apply(fn)
    before = dict(self._parameters)
    _apply_of_torch(self, fn, recurse=False)
    for name, old in before.items():
        new = self._parameters[name]
        if old is not None and new is not None and _crossed(old, new):
            _move(old, new)
            self._parameters[name] = old
    return self


def _crossed(old: Any, new: Any) -> bool:
    """Whether a dense parameter became a new one because it came to trn or left it."""
    devices = {old.device.type, new.device.type}
    plain = type(old.data) is Tensor and type(new.data) is Tensor
    dense = old.layout == new.layout == torch.strided
    return old is not new and len(devices) == 2 and "trn" in devices and plain and dense


def _move(old: nn.Parameter, new: nn.Parameter) -> None:
    grad = new.grad
    old.grad = None
    _C.set_data(old, new.data)
    old.grad = grad
