"""Every aten call behind op_db's float32 samples: what it allocates, gives and costs, as JSON.

    TRN_NUMERICS=none TRN_DATA_BYTES=0 python tests/none_sweep.py <samples of each operator> [names]

One line per sample: `[operator, number, calls, error]`. A call is its name, the bytes of HBM in use
after it, the sizes and strides of its results, and the simulated picoseconds of what it issued.
`error` is null, or what ended the sample. Run with numerics "host" and "none" it must say the same,
but for the samples that ask for a value.
"""

import gc
import itertools
import json
import sys
import warnings
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch_trn import _C

T = torch.Tensor


class Log(TorchDispatchMode):
    """Writes down every call that reaches the backend, and what it left."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[Any]] = []
        self.before = torch.trn.memory_allocated()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, T)]
        on_trn = [t for t in tensors if t.device.type == "trn"]
        layouts = [[list(t.shape), list(t.stride()), str(t.dtype)] for t in on_trn]
        now = torch.trn.memory_allocated() - self.before
        self.calls.append([str(func), now, layouts, _C.stream_clock_ps(0), _C.host_clock_ps()])
        return result


def to_trn(value: Any) -> Any:
    """A leaf on trn of its own, as the sample has one on the CPU."""
    if not isinstance(value, T) or value.layout != torch.strided or value.is_quantized:
        return value
    moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="trn")
    moved.copy_(value.detach())
    return moved.requires_grad_(value.requires_grad)


def run(op: Any, sample: Any) -> list[list[Any]]:
    """Forward and, where there is a gradient, backward of a sample on trn."""
    sample = sample.transform(lambda value: to_trn(value) if isinstance(value, T) else value)
    torch.manual_seed(0)
    log = Log()
    try:
        with log:
            result = op.op(sample.input, *sample.args, **sample.kwargs)
            outs = [o for o in tree_leaves(result) if isinstance(o, T) and o.requires_grad]
            if outs:
                torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])
        del result, outs
        offset = torch.trn.get_rng_state().view(torch.int64)[1].item()
        log.calls.append(["draws", offset])
        return log.calls
    except Exception as error:
        error.calls = log.calls  # type: ignore[attr-defined]
        raise


def main() -> None:
    """Prints a line per sample."""
    from torch.testing._internal.common_methods_invocations import op_db

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    count = int(sys.argv[1])
    names = set(sys.argv[2:])
    gc.disable()
    for op in op_db:
        if (names and op.name not in names) or torch.float32 not in op.dtypes:
            continue
        torch.manual_seed(0)
        samples = op.sample_inputs("cpu", torch.float32, requires_grad=op.supports_autograd)
        for number, sample in enumerate(itertools.islice(samples, count)):
            error, calls = None, []
            torch.trn.synchronize()
            before = _C.host_clock_ps()
            try:
                calls = run(op, sample)
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"
                calls = raised.calls  # type: ignore[attr-defined]
                del raised
            for call in calls:
                if len(call) > 2:
                    call[3] = max(call[3] - before, 0)
                    call[4] -= before
            print(json.dumps([f"{op.name}.{op.variant_test_name}", number, calls, error]))
            gc.collect()


if __name__ == "__main__":
    main()
