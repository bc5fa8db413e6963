"""Operators to Programs: `lower(call, core, shards)`.

Each module registers one family; adding an operator is one function under `@lowering(...)` (or one
row of a formula table) and one row of the table in tests/test_lowering.py.
"""

from torch_trn.errors import UnsupportedOpError
from torch_trn.lowering import (
    activation,
    attention,
    attention_backward,
    bag,
    batchnorm,
    binary,
    convolution,
    copy,
    draw,
    fill,
    foreach,
    index,
    loss,
    matmul,
    nll,
    norm,
    optimizer,
    pad,
    pairwise,
    place,
    planes,
    pool,
    ramp,
    reduction,
    resample,
    rnn,
    scatter,
    search,
    softmax,
    sort,
    unary,
)
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.registry import has_lowering, lower, lowering, registered

#: Importing a family registers its lowerings.
FAMILIES = (
    activation, attention, attention_backward, bag, batchnorm, binary, convolution, copy, draw,
    fill, foreach, index, loss, matmul, nll, norm, optimizer, pad, pairwise, place, planes,
    pool, ramp, reduction, resample, rnn, scatter, search, softmax, sort, unary,
)  # fmt: skip

__all__ = [
    "FAMILIES",
    "OpCall",
    "TensorSpec",
    "UnsupportedOpError",
    "has_lowering",
    "lower",
    "lowering",
    "registered",
]
