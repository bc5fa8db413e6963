"""A TPUv3-like core, to try the model on another machine; no system has it.

Its two 128x128 arrays divide the column tiles of a product between them: here they are one array of
twice the clock, which is too fast by two where a result has a single column tile. VMEM is SBUF. The
vector unit has 1,024 lanes, but compiled layer norms do not come near them, so its rate is read
off one.

Sources: ``PyTorchSim`` is what its artifact says of the core that it measured; a row's name is the
row of those cycle counts that the number was read off; ``not modelled`` stands at the smallest
value there is.
"""

from __future__ import annotations

from torch_trn.chip import KIB, CoreSpec

__all__ = ["TPUV3_CORE", "TPUV3_HZ"]

TPUV3_HZ = 940_000_000
"""The clock in whose cycles its measurements are given."""

_ARRAYS = "PyTorchSim: two weight-stationary 128x128 arrays at 940 MHz"
_VECTOR = "layernorm_8192x768, as lowered here: 0.7 elements a lane and cycle of 940 MHz"
_DMA = "450 GB/s a core (PyTorchSim) over 16 engines; their number is assumed"
_OUTPUT = "assumed: results in 8 banks of 512 fp32, as in a NeuronCore"
_NONE = "not modelled"

_SOURCED = {
    "pe_rows": (128, _ARRAYS),
    "pe_columns": (128, _ARRAYS),
    "pe_hz": (2 * TPUV3_HZ, f"{_ARRAYS}, taken as one of twice the clock"),
    "pe_fp32_passes": (1, "assumed: the array rounds fp32 operands to bf16, one pass"),
    "pe_fp32_transpose_passes": (1, "assumed as pe_fp32_passes"),
    "pe_tiles": (1, "assumed: no parts"),
    "pe_transpose_exact": (True, "assumed; validation has no values"),
    "pe_mx": (False, "assumed: no MX data"),
    "pe_fp8_factor": (1, "assumed: no fp8"),
    "pe_sustained_factor": (1.0, "assumed: no power limit"),
    "pe_ramp_start_factor": (1.0, _NONE),
    "pe_ramp_ps": (1, _NONE),
    "matmul_moving_max": (512, _OUTPUT),
    "matmul_pair_floor_ps": (1, _NONE),
    "vector_hz": (660_000_000, _VECTOR),
    "scalar_hz": (660_000_000, f"assumed as vector_hz: {_VECTOR}"),
    "gpsimd_hz": (660_000_000, f"assumed as vector_hz: {_VECTOR}"),
    "min_interval_cycles": (8, "assumed: one pass over 8 sublanes"),
    "vector_fixed_cycles": (1, _NONE),
    "scalar_fixed_cycles": (1, _NONE),
    "scalar_dependent_cycles": (1, _NONE),
    "gpsimd_fixed_cycles": (1, _NONE),
    "vector_copy_factor": (1, _NONE),
    "vector_tensor_tensor_factor": (1, _NONE),
    "scalar_copy_factor": (1, _NONE),
    "sbuf_bytes": (16 * KIB * KIB, "PyTorchSim: 16 MiB of VMEM"),
    "sbuf_partitions": (128, "PyTorchSim: 128 lanes"),
    "psum_bytes": (2 * KIB * KIB, _OUTPUT),
    "psum_banks": (8, _OUTPUT),
    "psum_bank_bytes": (2 * KIB, _OUTPUT),
    "dma_engines": (16, _DMA),
    "dma_engine_bytes_per_s": (28_125_000_000, _DMA),
    "dma_single_engine_bytes_per_s": (28_125_000_000, _DMA),
    "dma_engine_raw_bytes_per_s": (28_125_000_000, _DMA),
    "dma_descriptor_ps": (1, _NONE),
    "dma_descriptor_max_bytes": (64 * KIB, "assumed as a NeuronCore's"),
    "dma_packet_bytes": (4 * KIB, "assumed as a NeuronCore's"),
    "dma_start_ps": (230_000, "gemm_256x256x256: what its 3,101 cycles leave for load and store"),
    "dma_hbm_to_hbm_factor": (1.0, _NONE),
    "dma_accumulate_factor": (1.0, _NONE),
    "dma_transpose_factor": (1.0, _NONE),
    "dma_sbuf_transpose_factor": (1.0, _NONE),
    "hbm_bytes_per_s": (450_000_000_000, "PyTorchSim: 450 GB/s a core"),
    "semaphore_ps": (1, _NONE),
}

TPUV3_CORE = CoreSpec(
    name="TPUv3-like",
    **{name: value for name, (value, _) in _SOURCED.items()},  # type: ignore[arg-type]
    sources={name: source for name, (_, source) in _SOURCED.items()},
)
"""One core of a TPUv3-like chip."""
