"""Operators to Programs: `lower(call, core, shards)`.

Each module registers one family; adding an operator is one function under `@lowering(...)` (or one
row of a formula table) and one row of the table in tests/test_lowering.py.
"""

from torch_trn.errors import UnsupportedOpError
from torch_trn.lowering import (
    activation,
    attention,
    attention_backward,
    batchnorm,
    binary,
    conv,
    copy,
    fill,
    foreach,
    index,
    loss,
    matmul,
    nll,
    norm,
    optimizer,
    planes,
    reduction,
    rnn,
    softmax,
    sort,
    unary,
)
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.registry import has_lowering, lower, lowering, registered

__all__ = [
    "OpCall",
    "TensorSpec",
    "UnsupportedOpError",
    "has_lowering",
    "lower",
    "lowering",
    "registered",
]
