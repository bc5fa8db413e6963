"""float64 arithmetic on single numbers: a program of GpSimdE's cores, since no engine has float64.

AMP needs it: `torch.amp.GradScaler` finds the inverse of its scale in float64, on every device.
"""

from __future__ import annotations

import torch

from torch_trn.chip import CoreSpec
from torch_trn.isa import Engine
from torch_trn.lowering.call import OpCall
from torch_trn.program import Builder, Program

#: 32-bit integer steps of one operation on float64 numbers in software, a division's (assumed).
STEPS = 256

#: Operators that do not read the tensor they write.
OVERWRITING = ("aten::copy_", "aten::fill_", "aten::zero_")


def is_double_scalar(call: OpCall) -> bool:
    """Whether all tensors of a call have one element, one is float64, and none is complex."""
    tensors = (*call.outs, *call.tensors())
    single = all(spec.numel == 1 and not spec.dtype.is_complex for spec in tensors)
    return single and any(spec.dtype == torch.float64 for spec in tensors)


def double_scalar(call: OpCall, core: CoreSpec) -> Program:
    """Numbers to one partition, one pass of integer steps over their words, and the results back.

    GpSimdE is the only engine that runs programs of its own (Neuron Custom C++ Operators).
    """
    b = Builder(core, call.name.removeprefix("aten::"))
    words = b.sbuf("words", free_bytes=4 * STEPS)
    read = call.tensors()[1 if call.name.partition(".")[0] in OVERWRITING else 0 :]
    for index, spec in enumerate(read):
        b.load(words, b.hbm(f"in{index}", nbytes=spec.nbytes), rows=1, row_bytes=spec.nbytes)
    b.tensor_scalar(
        words, words, op="add", operands=(0,), n=STEPS, partitions=1, dtype=torch.int32,
        engine=Engine.GPSIMD,
    )  # fmt: skip
    for index, spec in enumerate(call.outs):
        b.store(b.hbm(f"out{index}", nbytes=spec.nbytes), words, rows=1, row_bytes=spec.nbytes)
    return b.build()
