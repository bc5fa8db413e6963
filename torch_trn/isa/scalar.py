"""Instructions of ScalarE: a function of source x scale + bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from torch_trn.chip import CoreSpec
from torch_trn.isa.alu import ACTIVATIONS, FOLDS, operand
from torch_trn.isa.elementwise import Elementwise
from torch_trn.isa.instruction import Engine

__all__ = ["Activation", "ActivationReduce"]

_S = (Engine.SCALAR,)


@dataclass(frozen=True, kw_only=True)
class Activation(Elementwise):
    """func(source x scale + bias), operands (scale, bias): N cycles; scale and bias are free."""

    NAME: ClassVar[str] = "activation"
    ENGINES: ClassVar[tuple[Engine, ...]] = _S
    engine: Engine = Engine.SCALAR

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        if self.op not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"ScalarE has no function {self.op!r}; it has: {known}")
        x = operand(reads[0])
        if self.operands:
            scale, bias = (operand(value) for value in self.numbers(reads))
            # One rounding: a product and a sum of fp32 in double are exact enough for that.
            x = (x.double() * scale.double() + bias.double()).float()
        return (ACTIVATIONS[self.op](x),)


@dataclass(frozen=True, kw_only=True)
class ActivationReduce(Activation):
    """activation that also sums along the free dimension: 64 cycles more to read the sum."""

    NAME: ClassVar[str] = "activation_reduce"

    def extra_cycles(self, core: CoreSpec) -> int:
        return core.min_interval_cycles

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        (result,) = super().run(reads)
        return result, FOLDS["add"](result).unsqueeze(-1)
