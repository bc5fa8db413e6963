"""Which Program a measured row is.

Rows are recognised by their workload and config, not by their id, so that rows of the same kernels
on another chip or at another size are predicted too. ``predict`` gives a list: a NKIBench row also
says how long VectorE and ScalarE were busy and what HBM moved, which are classes of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any, TypeAlias

import torch
from kernels import (
    coalesced_gemm,
    instruction,
    mamba,
    matmul_tutorial,
    nkibench,
    nkibench_attention,
    nkibench_lora,
    nkibench_mlp,
    operator,
    stream,
)
from measurement import Measurement
from prediction import Prediction, core_of, of_operators, of_program, timed

from torch_trn.chip import CoreSpec
from torch_trn.isa import Engine
from torch_trn.program import Program

__all__ = ["CLASSES", "choices", "predict"]

CLASSES = ("instruction", "stream", "kernel", "busy", "traffic", "release", "compiler")
LEVELS = ("instruction", "kernel", "op")

STARTUP_MS = 2.1
"""Start of a profiled graph before its first instruction; notes of K166, K167 and O058 say so."""

BF16 = torch.bfloat16
_DTYPES = {"bf16": BF16, "uint8": torch.uint8, "int8": torch.int8, "fp32": torch.float32}


Handler: TypeAlias = Callable[[Measurement, CoreSpec, re.Match[str]], list[Prediction]]
_ROUTES: list[tuple[str, re.Pattern[str], Handler]] = []


_WITHOUT = (
    ("instruction", r"^same kernel", "the other instructions of that kernel are not known"),
    ("instruction", r"^DMA (cross-engine|engine)", "a guideline, and a constant of the chip here"),
    ("kernel", r"^Mamba .* PyTorch", "what the compiler made of the scan is not known"),
    ("kernel", r"omni", "its kernel is not public"),
    ("op", r"^(PCIe|host-device)", "a copy of the host, not of the core"),
    ("op", r"^graph replay", "the dispatch of the host, not the core"),
    ("op", r"^MoE", "the experts' sizes are not given"),
)


def predict(row: Measurement) -> list[Prediction] | str:
    """The predictions of a row, or why there is none; an empty text: it is no row to be scored."""
    if row.level not in LEVELS or row.cores != 1:
        return ""
    for level, pattern, reason in _WITHOUT:
        if level == row.level and re.search(pattern, row.workload):
            return reason
    if not row.complete:
        return "its config is not complete"
    for level, route, handler in _ROUTES:
        match = route.search(row.workload)
        if level == row.level and match:
            try:
                return handler(row, core_of(row.hardware), match) or "its program is not known"
            except KeyError as error:
                return f"its config has no {error}"
    return "its program is not known"


def choices() -> list[str]:
    """What was chosen by looking, a paragraph for each file of kernels."""
    modules = (mamba, coalesced_gemm, stream, nkibench, nkibench_mlp, nkibench_attention,
               nkibench_lora, operator)  # fmt: skip
    texts = {
        each.__name__: (each.__doc__ or "").partition("Chosen by looking")[2].lstrip(":, \n")
        for each in modules
    }
    return [f"{name}: {' '.join(text.split())}" for name, text in texts.items()]


def _route(level: str, pattern: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        _ROUTES.append((level, re.compile(pattern), handler))
        return handler

    return register


# -- instructions ----------------------------------------------------------------------------------
@_route("instruction", r"^ScalarE activation, dependent")
def _dependent_chain(row: Measurement, core: CoreSpec, _: re.Match[str]) -> list[Prediction]:
    n, short, long = row.config["elements_per_partition"], 1000, 2000
    times = [timed(instruction.chain, core, n=n, count=count) for count in (short, long)]
    each = (times[1].duration_ps - times[0].duration_ps) / (long - short) / 1e9
    return [Prediction(row, "instruction", "chain", each, row.milliseconds())]


@_route("instruction", r"^nc_matmul fp32 .* saturated kernel")
def _saturated(row: Measurement, core: CoreSpec, _: re.Match[str]) -> list[Prediction]:
    # The profiler counts two instructions a fp32 matmul.
    sizes = {"count": row.config["count"] // 2, "dtype": torch.float32}
    busy = timed(instruction.matmuls, core, **sizes).busy_ps[Engine.TENSOR] / 1e9
    return [Prediction(row, "instruction", "fp32 matmuls", busy, row.milliseconds())]


@_route("instruction", r"^nc_matmul (\w+) 128x128x512 inside (\d+)\^3 GEMM")
def _inside_gemm(row: Measurement, core: CoreSpec, match: re.Match[str]) -> list[Prediction]:
    timeline = timed(coalesced_gemm.coalesced, core, **_gemm(int(match[2]), match[1], 8, 512))
    busy = timeline.busy_ps[Engine.TENSOR] / 1e9
    return [Prediction(row, "instruction", f"PE in {match[1]} GEMM", busy, row.milliseconds())]


@_route("instruction", r"^DMA transfers of a .* GEMM")
def _transfers(row: Measurement, core: CoreSpec, match: re.Match[str]) -> list[Prediction]:
    count = row.config["transfers"]
    nbytes = round(row.config["MB_moved"] * 1e6 / count)
    timeline = timed(instruction.descriptors, core, count=count, nbytes=nbytes)
    # One at a time on one queue: their times in flight, added up.
    summed = (timeline.duration_ps - core.dma_start_ps) / 1e9
    remark = f"all transfers taken as of their mean {nbytes} B"
    return [Prediction(row, "instruction", row.id, summed, row.milliseconds(), remark=remark)]


@_route("instruction", r"^TensorE power throttle")
def _throttle(row: Measurement, core: CoreSpec, _: re.Match[str]) -> list[Prediction]:
    count = 65536
    timeline = timed(instruction.matmuls, core, count=count, dtype=BF16)
    full_ps = count * 512e12 / core.pe_hz
    left = full_ps / timeline.busy_ps[Engine.TENSOR]
    return [
        Prediction(row, "instruction", f"throttle {core.name}", left, row.number, "fraction",
                   "the chip's constant is this row")
    ]  # fmt: skip


# -- kernels ---------------------------------------------------------------------------------------
_TUTORIAL = {
    "Original tiled": matmul_tutorial.tiled,
    "Optimization 1": matmul_tutorial.hoisted,
    "Optimization 2": matmul_tutorial.free_blocked,
    "Optimization 3": matmul_tutorial.fully_blocked,
}


@_route("kernel", r"^NKI matmul tutorial: (Original tiled|Optimization \d)")
def _tutorial(row: Measurement, core: CoreSpec, match: re.Match[str]) -> list[Prediction]:
    build, kind, remark = _TUTORIAL[match[1]], "kernel", ""
    if match[1] != "Optimization 3":
        kind, remark = "release", "that release moved DMA at 100-106 GB/s whatever the rows"
    sizes = {name.lower(): row.config[name] for name in "MKN"}
    return of_program(row, kind, row.milliseconds(), build, core, remark=remark, **sizes)


@_route("kernel", r"^NKI mamba_(v[123])$")
def _mamba(row: Measurement, core: CoreSpec, match: re.Match[str]) -> list[Prediction]:
    build = {"v1": mamba.v1, "v2": mamba.v2, "v3": mamba.v3}[match[1]]
    sizes = {name: row.config[name] for name in ("channels", "seq", "state")}
    measured = row.milliseconds() / row.config["batch"]
    wide = match[1] == "v2" and row.config["seq"] > mamba.BANK
    # 9.4 cycles a column where VectorE's own instructions take 8, in proportion to the width.
    # Copies on VectorE would explain the time, but not that it was active for 59% of K015.
    remark = "wide rows take 9.4N, VectorE alone 8N: its port shared with GpSimdE?" if wide else ""
    return of_program(row, "kernel", measured, build, core, remark=remark, **sizes)


def _nkibench_program(
    name: str, config: Any
) -> tuple[Callable[..., Program], dict[str, int]] | None:
    at = {key.lower(): value for key, value in config.items() if isinstance(value, int)}
    match name:
        case "swiglu" | "add_rmsnorm_matmul":
            return getattr(nkibench_mlp, name), {key: at[key] for key in "mkn"}
        case "silu":
            return nkibench.silu, {key: at[key] for key in "mn"}
        case "rope_single_freq_apply":
            return nkibench.rope, {"width": at["d"], "rows": at["b"] * at["h"] * at["n"]}
        case "bmm_softmax":
            sizes = {key: at[key] for key in "mnk"}
            return nkibench_attention.bmm_softmax, {"batch": at["b"], **sizes}
        case "gqa_full":
            heads = {"heads": at["qh"], "kv_heads": at["kh"]}
            return nkibench_attention.gqa_full, {"tokens": at["n"], **heads}
        case "lora":
            return nkibench_lora.lora, {key: at[key] for key in "mkn"} | {"rank": at["r"]}
    return None


_OPEN = {
    "rope_single_freq_apply": "why each tile takes one unhidden load more is not known",
    "gqa_full": "how much of its 2 GB of spills is hidden depends on the order, which is not known",
}
"""What is not explained about a NKIBench kernel's time."""


@_route("kernel", r"^NKIBench (\w+) \(baseline kernel\)")
def _nkibench(row: Measurement, core: CoreSpec, match: re.Match[str]) -> list[Prediction]:
    found = _nkibench_program(match[1], row.config)
    if found is None:
        return []
    build, sizes = found
    remark = _OPEN.get(match[1], "")
    result = of_program(row, "kernel", row.milliseconds(), build, core, remark=remark, **sizes)
    program = result[0].program
    busy = timed(build, core, **sizes).busy_ps
    vector, scalar = row.noted("Vector active"), row.noted("Scalar active")
    if vector is not None and scalar is not None:
        predicted = (busy[Engine.VECTOR] + busy[Engine.SCALAR]) / 1e9
        measured = (vector + scalar) * row.milliseconds()
        shares = (
            f"VectorE {busy[Engine.VECTOR] / 1e9:.2f} + ScalarE {busy[Engine.SCALAR] / 1e9:.2f}"
        )
        result.append(Prediction(row, "busy", program, predicted, measured, remark=f"{shares} ms"))
    read, written = row.noted("HBM read"), row.noted("write")
    if read is not None and written is not None:
        made = build(core, **sizes)
        moved = (made.hbm_read_bytes + made.hbm_write_bytes) / 1e6
        result.append(Prediction(row, "traffic", program, moved, (read + written) / 1e6, "MB"))
    return result


def _gemm(size: int, dtype: str, coalesce: int, moving: int) -> dict[str, Any]:
    shape = {"m": size, "k": size, "n": size}
    return {**shape, "coalesce": coalesce, "moving": moving, "dtype": _DTYPES[dtype]}


@_route("kernel", r"^(NKI GEMM coalesced|GEMM NKI coalesced|NKI GEMM uint8)( x(\d+))?")
def _coalesced(row: Measurement, core: CoreSpec, match: re.Match[str]) -> list[Prediction]:
    config = row.config
    # Rows that do not name the width are of the tuned kernel, which has 8 (K157, K161).
    coalesce = config.get("COALESCE_ROWS") or int(match[3] or 8)
    sizes = _gemm(config["M"], config["dtype"], coalesce, config.get("MOVING", 512))
    measured = row.milliseconds(operations=2 * config["M"] * config["N"] * config["K"])
    return of_program(row, "kernel", measured, coalesced_gemm.coalesced, core, **sizes)


@_route("kernel", r"^profiled graph \d+ \((bf16|uint8) GEMM (\d+)\^3\)")
def _profiled_gemm(row: Measurement, core: CoreSpec, match: re.Match[str]) -> list[Prediction]:
    sizes = _gemm(int(match[2]), match[1], 8, 512)
    return of_program(row, "kernel", row.milliseconds(), coalesced_gemm.coalesced, core,
                extra_ms=STARTUP_MS, remark="with 2.1 ms start-up", **sizes)  # fmt: skip


# -- streams ---------------------------------------------------------------------------------------
@_route("op", r"^HBM read with x\*x\+sum")
def _squared(row: Measurement, core: CoreSpec, _: re.Match[str]) -> list[Prediction]:
    return _stream(row, core, stream.read, 2048, square=True)


@_route("op", r"^(DMA lever: )?HBM to HBM")
def _hbm_copy(row: Measurement, core: CoreSpec, _: re.Match[str]) -> list[Prediction]:
    return _stream(row, core, stream.copy, 2048, counted=2)


@_route("op", r"^(HBM write|SBUF->HBM)")
def _write(row: Measurement, core: CoreSpec, _: re.Match[str]) -> list[Prediction]:
    return _stream(row, core, stream.write, 2048)


@_route("op", r"^(HBM read|HBM->SBUF|DMA lever)")
def _read(row: Measurement, core: CoreSpec, _: re.Match[str]) -> list[Prediction]:
    return _stream(row, core, stream.read, 2048)


def _stream(
    row: Measurement, core: CoreSpec, build: Callable[..., Program], free: int, *, counted: int = 1,
    **sizes: Any,
) -> list[Prediction]:  # fmt: skip
    """A stream of bf16 tiles; their width is in the config or in the name, else ``free``."""
    config, nbytes = row.config, row.config["bytes"]
    named = re.search(r"free (\d+)", row.workload)
    free = config.get("free") or config.get("store_free") or int(named[1] if named else free)
    measured = row.milliseconds(nbytes=counted * nbytes)
    return of_program(row, "stream", measured, build, core, nbytes=nbytes, free=free, **sizes)


# -- what the compiler makes -----------------------------------------------------------------------
@_route("op", r"^(GEMM|torch\.matmul|GEMM XLA) .*(XLA|neuronx-cc)|^torch int8->int32 GEMM")
def _matmul(row: Measurement, core: CoreSpec, _: re.Match[str]) -> list[Prediction]:
    config = row.config
    dtype = _DTYPES[config["dtype"].split("->")[0]]
    operations = 2 * config["M"] * config["N"] * config["K"]
    remark = "between two others at 1.95 and 2.5 ms" if "per execution" in row.workload else ""
    return of_operators(row, core, row.milliseconds(operations=operations), torch.mm,
                     (config["M"], config["K"]), (config["K"], config["N"]), dtype=dtype,
                     remark=remark)  # fmt: skip


@_route("op", r"^torch\.sum")
def _sum(row: Measurement, core: CoreSpec, _: re.Match[str]) -> list[Prediction]:
    nbytes, free = row.config["bytes"], row.config["free"]
    measured = row.milliseconds(nbytes=nbytes)
    remark = "the compiler's sum reads at 174 GB/s, why is open"
    return of_operators(row, core, measured, torch.sum, (nbytes // 2 // free, free), remark=remark)


@_route("op", r"^torch attention")
def _attention(row: Measurement, core: CoreSpec, _: re.Match[str]) -> list[Prediction]:
    config = row.config
    shape = (config["batch"], config["heads"], config["seq"], config["head_dim"])
    measured = row.milliseconds(operations=config["batch"] * config["heads"])
    return of_operators(row, core, measured, operator.attention, shape, shape, shape)


@_route("op", r"^KV-cache slice write")
def _cache_copy(row: Measurement, core: CoreSpec, _: re.Match[str]) -> list[Prediction]:
    config, tokens_a_step = row.config, 256
    # The profile read 268.5 MB: keys and values of all layers, twice.
    shape = (2 * 2 * config["layers"], config["context"], config["hidden"])
    measured = row.milliseconds(operations=tokens_a_step)
    remark = "this copy reached 196 GB/s, that of O044 308"
    return of_operators(row, core, measured, torch.clone, shape, remark=remark)


@_route("op", r"transformer block")
def _block(row: Measurement, core: CoreSpec, _: re.Match[str]) -> list[Prediction]:
    # The profiled graph (O058) names its width and length; the rest is that of O017.
    config = {"hidden": 4096, "seq": 2048, "ffn": 16384, "heads": 32, **row.config}
    wide, ffn = config["hidden"], config["ffn"]
    profiled = row.unit in ("ms", "us")
    flops = config["flops"] if not profiled else 0
    shapes = ((config["seq"], wide), (wide, 3 * wide), (wide, wide), (wide, ffn), (ffn, wide))
    remark = "operators added up, not fused" + "; with 2.1 ms start-up" * profiled
    return of_operators(row, core, row.milliseconds(operations=flops), _block_of(config["heads"]),
                     *shapes, extra_ms=STARTUP_MS * profiled, remark=remark)  # fmt: skip


@cache
def _block_of(heads: int) -> Callable[..., object]:
    return partial(operator.block, heads=heads)
