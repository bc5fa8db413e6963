"""The NeuronCore's instructions, named as in NKI: operands, limits and cost in one class each.

An instruction describes its shape; which tiles it reads and writes is the Program's business.
``n`` is the number of elements per partition (the free size): up to 128 partitions work in
parallel, so their number does not change the time. ``dtype`` is that of the sources, ``out_dtype``
that of the destination (default: the same).

>>> NcMatmul(k=128, m=128, n=512, dtype=torch.bfloat16).cost(trn2_core)
Cost(occupancy_ps=213333, latency_ps=0, queue_ps=213333, reuse_ps=213333)

Costs are those of nki.isa of release 2.26 (the last that printed cycles), in cycles of the
executing engine, at least ``min_interval_cycles``, plus the engine's measured fixed cycles; a cost
from elsewhere says so. GpSimdE runs the Vector formulas at its own clock (assumed).
"""

from torch_trn.isa.dma import DmaCopy
from torch_trn.isa.elementwise import Elementwise
from torch_trn.isa.index import AffineSelect, CustomOp, Indexed, Iota, LocalGather, RangeSelect
from torch_trn.isa.instruction import Cost, Engine, Instruction
from torch_trn.isa.mx import NcMatmulMx, QuantizeMx
from torch_trn.isa.row import (
    BnAggr,
    BnStats,
    Dropout,
    Max8,
    NcFindIndex8,
    NcMatchReplace8,
    NcStreamShuffle,
    Rng,
)
from torch_trn.isa.scalar import Activation, ActivationReduce
from torch_trn.isa.tensor import NcMatmul, NcTranspose
from torch_trn.isa.vector import (
    Memset,
    Reciprocal,
    ScalarTensorTensor,
    Select,
    TensorCopy,
    TensorCopyPredicated,
    TensorReduce,
    TensorScalar,
    TensorScalarReduce,
    TensorTensor,
    TensorTensorScan,
)

__all__ = [
    "Activation",
    "ActivationReduce",
    "AffineSelect",
    "BnAggr",
    "BnStats",
    "Cost",
    "CustomOp",
    "DmaCopy",
    "Dropout",
    "Elementwise",
    "Engine",
    "Indexed",
    "Instruction",
    "Iota",
    "LocalGather",
    "Max8",
    "Memset",
    "NcFindIndex8",
    "NcMatchReplace8",
    "NcMatmul",
    "NcMatmulMx",
    "NcStreamShuffle",
    "NcTranspose",
    "QuantizeMx",
    "RangeSelect",
    "Reciprocal",
    "Rng",
    "ScalarTensorTensor",
    "Select",
    "TensorCopy",
    "TensorCopyPredicated",
    "TensorReduce",
    "TensorScalar",
    "TensorScalarReduce",
    "TensorTensor",
    "TensorTensorScan",
]
