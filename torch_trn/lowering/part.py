"""Parts of HBM tensors and the algebra of views on them: what operators that move data speak of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from torch_trn.lowering.call import TensorSpec
from torch_trn.lowering.layout import broadcast_strides, product

__all__ = ["Part", "extent"]


def extent(spec: TensorSpec) -> int:
    """Elements from the first to the last of a tensor as they lie in memory."""
    if not spec.numel:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(spec.shape, spec.strides, strict=True))


@dataclass(frozen=True)
class Part:
    """Some elements of an HBM tensor: sizes and strides of its dims, and where the first lies.

    All in elements of ``dtype``, ``offset`` from the tensor's first element. Unlike a torch view, a
    stride may be negative.
    """

    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @classmethod
    def of(cls, spec: TensorSpec) -> Part:
        """The whole tensor."""
        return cls(spec.dtype, spec.shape, spec.strides)

    @property
    def ndim(self) -> int:
        """Number of dims."""
        return len(self.sizes)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return product(self.sizes)

    def dim(self, dim: int) -> int:
        """``dim`` counted from the front."""
        return dim % self.ndim if self.ndim else 0

    def with_dim(self, dim: int, size: int, stride: int, offset: int = 0) -> Part:
        """The same with another size and stride of ``dim``, starting ``offset`` later."""
        sizes, strides = list(self.sizes), list(self.strides)
        sizes[dim], strides[dim] = size, stride
        return replace(
            self, sizes=tuple(sizes), strides=tuple(strides), offset=self.offset + offset
        )

    def narrow(self, dim: int, start: int, length: int, step: int = 1) -> Part:
        """``length`` elements of ``dim`` from ``start`` on, every ``step``-th."""
        if not self.ndim:
            return self
        dim = self.dim(dim)
        stride = self.strides[dim]
        return self.with_dim(dim, length, stride * step, start * stride if length else 0)

    def flip(self, dims: Sequence[int]) -> Part:
        """The other way round along ``dims``."""
        found = self
        for dim in dims:
            if self.ndim:
                size = self.sizes[self.dim(dim)]
                found = found.narrow(dim, max(size - 1, 0), size, -1)
        return found

    def select(self, dim: int, index: int) -> Part:
        """One element of ``dim``, which is dropped."""
        dim = self.dim(dim)
        return self.narrow(dim, index % max(self.sizes[dim], 1), 1).drop(dim)

    def drop(self, dim: int) -> Part:
        """Without ``dim``, of which the first element stays."""
        dim = self.dim(dim)
        keep = [axis for axis in range(self.ndim) if axis != dim]
        return self.permute(keep)

    def permute(self, dims: Sequence[int]) -> Part:
        """The dims in another order."""
        axes = [self.dim(dim) for dim in dims]
        return replace(
            self,
            sizes=tuple(self.sizes[a] for a in axes),
            strides=tuple(self.strides[a] for a in axes),
        )

    def swap(self, a: int, b: int) -> Part:
        """Two dims exchanged."""
        axes = list(range(self.ndim))
        if axes:
            a, b = self.dim(a), self.dim(b)
            axes[a], axes[b] = axes[b], axes[a]
        return self.permute(axes)

    def front(self, dim: int) -> Part:
        """``dim`` as the first one."""
        dim = self.dim(dim)
        return self.permute([dim, *(axis for axis in range(self.ndim) if axis != dim)])

    def insert(self, dim: int, size: int = 1, stride: int = 0) -> Part:
        """A new dim before ``dim``."""
        dim = dim % (self.ndim + 1)
        sizes, strides = list(self.sizes), list(self.strides)
        sizes.insert(dim, size)
        strides.insert(dim, stride)
        return replace(self, sizes=tuple(sizes), strides=tuple(strides))

    def split(self, dim: int, *sizes: int) -> Part:
        """``dim`` as several dims of ``sizes``, outer first."""
        dim = self.dim(dim)
        inner = self.strides[dim]
        strides: list[int] = []
        for size in reversed(sizes):
            strides.insert(0, inner)
            inner *= size
        return replace(
            self,
            sizes=(*self.sizes[:dim], *sizes, *self.sizes[dim + 1 :]),
            strides=(*self.strides[:dim], *strides, *self.strides[dim + 1 :]),
        )

    def expand(self, shape: Sequence[int]) -> Part:
        """Repeated to ``shape`` (stride 0), missing dims in front."""
        steps = broadcast_strides(TensorSpec(self.dtype, self.sizes, self.strides), shape)
        return replace(self, sizes=tuple(shape), strides=tuple(steps))

    def unfold(self, dim: int, size: int, step: int) -> Part:
        """Windows of ``size`` every ``step``; the window is a new last dim."""
        if not self.ndim:
            return self.insert(0, size, 1)
        dim = self.dim(dim)
        stride = self.strides[dim]
        count = (self.sizes[dim] - size) // step + 1
        return self.with_dim(dim, count, stride * step).insert(self.ndim, size, stride)

    def diagonal(self, offset: int, first: int, second: int) -> Part:
        """A diagonal of two dims as a new last dim."""
        first, second = self.dim(first), self.dim(second)
        rows, cols = self.sizes[first], self.sizes[second]
        down, right = self.strides[first], self.strides[second]
        length = max(0, min(rows, cols - offset) if offset >= 0 else min(rows + offset, cols))
        start = offset * right if offset >= 0 else -offset * down
        rest = self.permute([a for a in range(self.ndim) if a not in (first, second)])
        moved = replace(rest, offset=rest.offset + (start if length else 0))
        return moved.insert(moved.ndim, length, down + right)

    def flat(self) -> Part | None:
        """All elements as one dim, if they lie so that one stride reaches them in order."""
        dims = [(n, step) for n, step in zip(self.sizes, self.strides, strict=True) if n != 1]
        for (_, outer), (size, inner) in zip(dims, dims[1:], strict=False):
            if outer != inner * size:
                return None
        stride = dims[-1][1] if dims else 1
        return replace(self, sizes=(self.numel,), strides=(stride,))

    def reshape(self, shape: Sequence[int]) -> Part | None:
        """The same elements as ``shape``, if one stride for each dim can say so."""
        if product(shape) != self.numel:
            return None
        if not self.numel:
            return replace(self, sizes=tuple(shape), strides=(0,) * len(shape))
        dims = [(n, step) for n, step in zip(self.sizes, self.strides, strict=True) if n != 1]
        merged: list[tuple[int, int]] = []
        for size, step in dims:
            if merged and merged[-1][1] == step * size:
                merged[-1] = (merged[-1][0] * size, step)
            else:
                merged.append((size, step))
        strides: list[int] = []
        left, step = merged.pop() if merged else (1, 1)
        for size in reversed(shape):
            if size == 1:
                strides.insert(0, 0)
                continue
            if left == 1 and merged:
                left, step = merged.pop()
            if left % size:
                return None
            strides.insert(0, step)
            step, left = step * size, left // size
        return replace(self, sizes=tuple(shape), strides=tuple(strides))
