"""Memory that nobody wrote: all bits set, so NaN in every float."""

from __future__ import annotations

import mmap
import os
import tempfile
from functools import cache

import torch
from torch import Tensor

__all__ = ["unwritten"]

#: Below this, filling costs less than a mapping.
_SMALL_BYTES = 1 << 16

#: Size of the file behind larger memories: SBUF and PSUM of the largest core (v4), padded.
_FILE_BYTES = 36 << 20


def unwritten(nbytes: int) -> Tensor:
    """A fresh uint8 tensor of ``nbytes`` that holds 255 everywhere.

    Large ones are private mappings of one file, so that only pages that are written take memory
    and time: a Program's pools are far larger than what a small call touches of them.
    """
    if _SMALL_BYTES <= nbytes <= _FILE_BYTES:
        mapped = mmap.mmap(_file(), nbytes, flags=mmap.MAP_PRIVATE)
        return torch.frombuffer(mapped, dtype=torch.uint8)
    return torch.full((nbytes,), 255, dtype=torch.uint8)


@cache
def _file() -> int:
    """A file descriptor of `_FILE_BYTES` set bits."""
    if hasattr(os, "memfd_create"):
        number = os.memfd_create("unwritten")
    else:
        number = os.dup(tempfile.TemporaryFile().fileno())
    block = b"\xff" * (1 << 20)
    for _ in range(_FILE_BYTES // len(block)):
        os.write(number, block)
    return number
