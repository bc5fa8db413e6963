"""What a lowering is given: one operator call, with everything of a tensor but its values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

#: dtypes that no engine of a NeuronCore computes in (hardware.md section 4: engines work in fp32).
HOST_ONLY_DTYPES = frozenset({torch.float64, torch.complex128})

#: Real dtype of one half of a complex element: engines see a complex tensor as pairs of reals.
REAL_OF = {torch.complex64: torch.float32, torch.complex32: torch.float16}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its data: dtype, sizes and strides (both in elements)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    numel: int = field(init=False, compare=False, repr=False)
    nbytes: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        numel = 1
        for size in self.shape:
            numel *= size
        object.__setattr__(self, "numel", numel)
        object.__setattr__(self, "nbytes", numel * self.dtype.itemsize)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.dtype.itemsize

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in row-major order without gaps."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= max(size, 1)
        return True

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        """The spec of a tensor on any device."""
        return cls(tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))

    @classmethod
    def contiguous(cls, dtype: torch.dtype, *shape: int) -> TensorSpec:
        """The spec of a row-major tensor of `shape`."""
        strides: list[int] = []
        step = 1
        for size in reversed(shape):
            strides.append(step)
            step *= max(size, 1)
        return cls(dtype, tuple(shape), tuple(reversed(strides)))


@dataclass(frozen=True)
class OpCall:
    """One call of an operator.

    name: schema name with overload ("aten::add.Tensor"; "aten::mm" where there is none).
    args: in schema order with defaults filled: TensorSpec, a tuple of them, a number, None, a
        torch.dtype, a str... Destinations of an `out=` variant come last, as in the schema.
    outs: what the operator returns.
    fresh: for each of `outs`, whether the operator allocates it (false: it is written in place).
    """

    name: str
    args: tuple[Any, ...]
    outs: tuple[TensorSpec, ...]
    fresh: tuple[bool, ...] = ()

    def tensors(self) -> list[TensorSpec]:
        """Every tensor among the arguments, those in lists included, in order."""
        found: list[TensorSpec] = []
        for arg in self.args:
            if isinstance(arg, TensorSpec):
                found.append(arg)
            elif isinstance(arg, tuple):
                found.extend(item for item in arg if isinstance(item, TensorSpec))
        return found

    def arg(self, index: int, default: Any = None) -> Any:
        """Argument `index`, or `default` where the call has fewer arguments."""
        return self.args[index] if index < len(self.args) else default


@dataclass(frozen=True)
class Named:
    """A tensor of a call: its spec, and its name for the Program (see `memory.Pool`)."""

    spec: TensorSpec
    name: str


def named_args(call: OpCall) -> list[Any]:
    """The arguments with `Named` tensors in the place of specs."""
    count = iter(range(len(call.tensors())))

    def named(arg: Any) -> Any:
        if isinstance(arg, TensorSpec):
            return Named(arg, f"in{next(count)}")
        return tuple(named(item) for item in arg) if isinstance(arg, tuple) else arg

    return [named(arg) for arg in call.args]


def named_outs(call: OpCall) -> tuple[Named, ...]:
    """The results."""
    return tuple(Named(spec, f"out{i}") for i, spec in enumerate(call.outs))
