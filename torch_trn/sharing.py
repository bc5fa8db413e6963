"""Sending trn tensors to other processes: refused with a clear error, where it can be raised.

A tensor put into a multiprocessing queue is pickled by a background thread of the sender. An error
there is printed and the object is lost, and who waits for it (a DataLoader, for one) waits for
ever. So what is sent instead is an object that raises the error when the receiver opens it.
"""

from multiprocessing.reduction import ForkingPickler
from typing import Any, NoReturn

import torch
from torch.multiprocessing import reductions

_TEXT = (
    "a {device} tensor of shape {shape} cannot be sent to another process: each process simulates "
    "its own NeuronCores. Send a CPU tensor (tensor.cpu()) and move it to trn where it arrives; a "
    "DataLoader worker must return CPU tensors"
)


def refuse_sharing() -> None:
    """Teaches torch's multiprocessing what to do with trn tensors; others go their usual way."""
    for kind in (torch.Tensor, torch.nn.Parameter):
        ForkingPickler.register(kind, _reduce_tensor)


def _reduce_tensor(tensor: torch.Tensor) -> Any:
    if tensor.device.type != "trn":
        return reductions.reduce_tensor(tensor)
    return _raise, (_TEXT.format(device=tensor.device, shape=tuple(tensor.shape)),)


def _raise(text: str) -> NoReturn:
    raise RuntimeError(text)
