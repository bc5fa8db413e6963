"""Specs of NeuronCores, chips and instances: hardware as data, each number beside its source.

A chip is a value, not code: adding one is one more table below. Every numeric field has an entry in
its spec's ``sources``; the word ``assumed`` marks what no public document or measurement states.

>>> SYSTEMS["trn2.48xlarge"].logical_cores(2)
64
>>> SYSTEMS["trn2.48xlarge"].chip.core.peak_flops(torch.bfloat16) / 1e12
78.6432

Source keys: arch2, arch3, arch4 = aws-neuron-sdk nki/guides/architecture/{trainium_inferentia2,
trainium2, trainium3}_arch.rst; hw = about-neuron/arch/neuron-hardware/; dma guide = nki/deep-dives/
nki-dma-bandwidth-guide.rst; dma overview = nki/get-started/about/nki-dma-overview.rst; isa 2.26 =
nki.isa of release 2.26, the last with cycle costs; driver = aws-neuron-driver. An id like I014 is a
row of the published measurements that the number was read off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

import torch

__all__ = ["SYSTEMS", "ChipSpec", "CoreSpec", "SystemSpec", "system"]

GIB = 1 << 30
KIB = 1 << 10

_FP8 = frozenset(
    {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}
)


@dataclass(frozen=True, kw_only=True)
class CoreSpec:
    """One physical NeuronCore.

    Rates are in Hz or bytes per second, times in integer picoseconds, memories in bytes.
    ``sources`` maps each numeric field to where its number comes from.
    """

    name: str
    pe_rows: int
    pe_columns: int
    pe_hz: int
    pe_fp32_passes: int
    """Passes through the array that one fp32 matmul takes."""
    pe_fp32_transpose_passes: int
    pe_tiles: int
    """Into how many parts, at most, rows and columns of the array can be divided."""
    pe_transpose_exact: bool
    """Whether a transpose on TensorE moves bits; else it multiplies, and NaN spoils its row."""
    pe_mx: bool
    """Whether the array multiplies MX data (block scales), four rows of k in each partition."""
    pe_fp8_factor: int
    """fp8 peak over bf16 peak: 2 with double row, 4 with microscaled (MX) operands."""
    pe_sustained_factor: float
    """Share of the clock that the power limiter leaves in sustained matmul work; 1.0 = no limit."""
    pe_ramp_start_factor: float
    """Share of the rate at which the PE array starts after idle time (dI/dt); 1.0 = no ramp."""
    pe_ramp_ps: int
    """Busy time after which it runs at full rate; use below half over as long cools it down."""
    matmul_moving_max: int
    """Largest free size of a moving operand, in elements."""
    matmul_pair_floor_ps: int
    """A weight load and its matmul never take less than this together."""
    vector_hz: int
    scalar_hz: int
    gpsimd_hz: int
    min_interval_cycles: int
    """No Vector or Scalar instruction, and no matmul, issues in fewer cycles of its engine."""
    vector_fixed_cycles: int
    scalar_fixed_cycles: int
    scalar_dependent_cycles: int
    """Cycles after which the next ScalarE instruction may read what this one wrote."""
    gpsimd_fixed_cycles: int
    vector_copy_factor: int
    """Speed-up of 16-bit tensor_copy and tensor_scalar from SBUF to SBUF."""
    vector_tensor_tensor_factor: int
    """Speed-up of 16-bit tensor_tensor with both sources in SBUF."""
    scalar_copy_factor: int
    """Speed-up of 16-bit tensor_copy and tensor_scalar on ScalarE."""
    sbuf_bytes: int
    sbuf_partitions: int
    psum_bytes: int
    psum_banks: int
    psum_bank_bytes: int
    """Bytes of one PSUM bank in one partition."""
    dma_engines: int
    dma_engine_bytes_per_s: int
    """What one DMA engine sustains while all of them work."""
    dma_single_engine_bytes_per_s: int
    """What one DMA engine sustains alone."""
    dma_engine_raw_bytes_per_s: int
    """What one DMA engine moves within a descriptor."""
    dma_descriptor_ps: int
    dma_descriptor_max_bytes: int
    dma_packet_bytes: int
    """Engines switch between queues after so many bytes."""
    dma_start_ps: int
    """From trigger to data that a consumer may read, beyond the transfer itself."""
    dma_hbm_to_hbm_factor: float
    """Time of a descriptor with both ends in HBM over one with an end in SBUF."""
    dma_accumulate_factor: float
    """Time of a read-add-write descriptor over a plain one."""
    dma_transpose_factor: float
    """Time of a transposing HBM-to-SBUF descriptor over a plain one."""
    dma_sbuf_transpose_factor: float
    hbm_bytes_per_s: int
    """This core's share of the chip's HBM bandwidth."""
    semaphore_ps: int
    """From the end of an instruction to the start of one on another engine that waits for it."""
    sources: Mapping[str, str] = field(compare=False, repr=False)

    @property
    def sbuf_partition_bytes(self) -> int:
        """SBUF bytes in one partition."""
        return self.sbuf_bytes // self.sbuf_partitions

    @property
    def dma_bytes_per_s(self) -> int:
        """What all DMA engines of the core sustain: the engines' or the HBM share, the smaller."""
        return min(self.dma_engines * self.dma_engine_bytes_per_s, self.hbm_bytes_per_s)

    def peak_flops(self, dtype: torch.dtype) -> float:
        """Flop/s of a full PE array at full clock (2 x rows x columns x clock) for ``dtype``.

        fp32 takes ``pe_fp32_passes`` passes, fp8 runs ``pe_fp8_factor`` times faster than bf16;
        integers and other types that the array has no path for count as fp32.
        """
        full = 2.0 * self.pe_rows * self.pe_columns * self.pe_hz
        if dtype in _FP8:
            return full * self.pe_fp8_factor
        return full if dtype in (torch.bfloat16, torch.float16) else full / self.pe_fp32_passes


@dataclass(frozen=True, kw_only=True)
class ChipSpec:
    """One Inferentia or Trainium chip: ``physical_cores`` NeuronCores that share its HBM."""

    name: str
    core: CoreSpec
    physical_cores: int
    hbm_bytes: int
    hbm_stacks: int
    hbm_bytes_per_s: int
    link_bytes_per_s: int
    """NeuronLink bandwidth of the chip over all its ports, both directions counted."""
    lnc_choices: tuple[int, ...]
    """How many physical cores one logical NeuronCore may group."""
    default_lnc: int
    sources: Mapping[str, str] = field(compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class SystemSpec:
    """One instance: ``chips`` equal chips behind one host."""

    name: str
    chip: ChipSpec
    chips: int
    host_link_bytes_per_s: int
    """PCIe bandwidth of one host DMA queue, one way."""
    host_link_fixed_ps: int
    """Fixed time of a copy between host and device."""
    launch_ps: int
    """Gap on the device between two NEFFs that were queued back to back."""
    dispatch_ps: int
    """Host time that one eager operator costs."""
    sources: Mapping[str, str] = field(compare=False, repr=False)

    def logical_cores(self, lnc: int | None = None) -> int:
        """Logical NeuronCores of the instance with ``lnc`` physical cores each (None: default)."""
        return self.chips * self.chip.physical_cores // self._lnc(lnc)

    def hbm_bytes_per_logical_core(self, lnc: int | None = None) -> int:
        """HBM bytes of one logical NeuronCore: an equal share of the chip's."""
        return self.chip.hbm_bytes * self._lnc(lnc) // self.chip.physical_cores

    def _lnc(self, lnc: int | None) -> int:
        value = self.chip.default_lnc if lnc is None else lnc
        if value not in self.chip.lnc_choices:
            choices = ", ".join(str(choice) for choice in self.chip.lnc_choices)
            raise ValueError(
                f"{self.name} ({self.chip.name}) has no LNC={value}; choose one of: {choices}"
            )
        return value


Spec = TypeVar("Spec", CoreSpec, ChipSpec, SystemSpec)


def _spec(kind: type[Spec], plain: Mapping[str, Any], **sourced: tuple[Any, str]) -> Spec:
    """Builds a spec from ``plain`` fields and from ``name=(value, source)`` pairs."""
    values = {name: value for name, (value, _) in sourced.items()}
    sources = {name: source for name, (_, source) in sourced.items()}
    return kind(**plain, **values, sources=sources)


def _changed(spec: Spec, plain: Mapping[str, Any], **sourced: tuple[Any, str]) -> Spec:
    """A copy of ``spec`` with other ``plain`` fields and other ``name=(value, source)`` pairs."""
    kept = {name: (getattr(spec, name), source) for name, source in spec.sources.items()}
    return _spec(type(spec), plain, **{**kept, **sourced})


_KERNELS_FIXED = (
    "K016, K014, K042 (rope, mamba v2, v3: 82-107 cycles, added to the element time) on trn1"
)
_SCALAR_FIXED = "K048 on trn1; weak, interval 50-300 cycles"
_V2_COSTS = "isa 2.26, written for NeuronCore-v2"

_NEURON_CORE_V2 = _spec(
    CoreSpec,
    {"name": "NeuronCore-v2"},
    pe_rows=(128, "arch2"),
    pe_columns=(128, "arch2"),
    pe_hz=(2_800_000_000, "arch2 engine table"),
    pe_fp32_passes=(4, "arch2; isa 2.26 nc_matmul"),
    pe_fp32_transpose_passes=(4, "isa 2.26: fp32 is 4x; no faster transpose mode before v3"),
    pe_tiles=(2, "arch2: row and column tiles of 64"),
    pe_transpose_exact=(False, "arch3: before v3 a transpose is a product with the identity"),
    pe_mx=(False, "arch4: new in v4"),
    pe_fp8_factor=(1, "hw/trainium.rst: fp8 at the bf16 rate"),
    pe_sustained_factor=(0.875, "I015: the profiler prints a power limit of 0.875 on trn1"),
    pe_ramp_start_factor=(1.0, "neuron-explorer pages name the dI/dt ramp for trn2 and trn3 only"),
    pe_ramp_ps=(3_000_000, "as on trn2; without effect, since there is no ramp"),
    matmul_moving_max=(512, "nki.isa.nc_matmul"),
    matmul_pair_floor_ps=(136_000, "K163, K164 on trn1: 256- and 128-wide moving take 136 ns"),
    vector_hz=(1_120_000_000, "arch2 engine table"),
    scalar_hz=(1_400_000_000, "arch2 engine table"),
    gpsimd_hz=(1_400_000_000, "arch2 engine table"),
    min_interval_cycles=(64, "isa 2.26: MIN_II about 64 cycles"),
    vector_fixed_cycles=(95, _KERNELS_FIXED),
    scalar_fixed_cycles=(144, _SCALAR_FIXED),
    scalar_dependent_cycles=(
        56,
        "perf guide Opt 5a: dependent 1-element ACT instructions every 264 cycles = 64 + 144 + 56",
    ),
    gpsimd_fixed_cycles=(150, "isa 2.26: iota and affine_select take 150 + N"),
    vector_copy_factor=(1, _V2_COSTS),
    vector_tensor_tensor_factor=(1, _V2_COSTS),
    scalar_copy_factor=(1, _V2_COSTS),
    sbuf_bytes=(24 * KIB * KIB, "arch2"),
    sbuf_partitions=(128, "arch2"),
    psum_bytes=(2 * KIB * KIB, "arch2"),
    psum_banks=(8, "arch2"),
    psum_bank_bytes=(2 * KIB, "arch2: 2 KiB a partition, 512 fp32"),
    dma_engines=(16, "dma overview"),
    dma_engine_bytes_per_s=(17_060_000_000, "O001, O030: 273 GB/s a core; dma guide rounds to 17"),
    dma_single_engine_bytes_per_s=(
        27_200_000_000,
        "I008: 23.4 GB/s in flight, which is descriptor and raw rate; 17 is a limit of the core",
    ),
    dma_engine_raw_bytes_per_s=(27_200_000_000, "dma overview: theoretical rate of one engine"),
    dma_descriptor_ps=(36_000, "O033, O038 (1 KiB rows); I006-I008 agree within 6%"),
    dma_descriptor_max_bytes=(64 * KIB, "driver udma.h"),
    dma_packet_bytes=(4 * KIB, "compute-comm-overlap.rst: default ring packetisation"),
    dma_start_ps=(1_300_000, "dma guide: about 1300 ns from semaphore to data"),
    dma_hbm_to_hbm_factor=(1.79, "O044 (154 GB/s one way), one row"),
    dma_accumulate_factor=(2.0, "arch4: DMA reduce before v4 ran at 50%"),
    dma_transpose_factor=(1 / 0.9, "arch3: HBM to SBUF at most 90% of the DMA rate"),
    dma_sbuf_transpose_factor=(2.0, "arch3: SBUF to SBUF at most 50% of the DMA rate"),
    hbm_bytes_per_s=(410_000_000_000, "arch2: chip's 820 GB/s / 2 cores"),
    semaphore_ps=(150_000, "assumed; the measurements allow 50-300 ns, a trn2 trace 100-200 ns"),
)

_INF2_CORE = _changed(
    _NEURON_CORE_V2,
    {"name": "NeuronCore-v2"},
    pe_sustained_factor=(0.633, "I014: the profiler prints a power limit of 0.633 on inf2"),
)

_NEURON_CORE_V3 = _changed(
    _NEURON_CORE_V2,
    {"name": "NeuronCore-v3"},
    pe_hz=(2_400_000_000, "arch3 engine table"),
    pe_fp32_transpose_passes=(2, "arch3: fp32 transpose mode is 2x faster"),
    pe_tiles=(4, "arch3: row and column tiles of 32"),
    pe_transpose_exact=(True, "arch3: transpose mode is bit-exact"),
    pe_fp8_factor=(2, "arch3: double row, 158 TFLOPS"),
    pe_sustained_factor=(1.0, "I002 shows no limit on trn2; only a 3 us ramp is documented"),
    pe_ramp_start_factor=(
        0.5,
        "neuron-explorer overview page: about 50% of the maximum after idle",
    ),
    pe_ramp_ps=(3_000_000, "neuron-explorer overview page: full rate in about 3 us"),
    matmul_pair_floor_ps=(158_667, "assumed: trn1's 136 ns scaled by the PE clocks"),
    vector_hz=(960_000_000, "arch3 engine table"),
    scalar_hz=(1_200_000_000, "arch3 engine table"),
    gpsimd_hz=(1_200_000_000, "arch3 engine table"),
    vector_fixed_cycles=(95, f"assumed as trn1: {_KERNELS_FIXED}; nki-library uses 144 for max8"),
    scalar_fixed_cycles=(144, f"assumed as trn1: {_SCALAR_FIXED}"),
    scalar_dependent_cycles=(56, "assumed as trn1"),
    vector_copy_factor=(4, "arch3 DVE perf mode, baseline v2"),
    vector_tensor_tensor_factor=(2, "arch3 DVE perf mode, baseline v2"),
    sbuf_bytes=(28 * KIB * KIB, "arch3"),
    dma_engine_bytes_per_s=(
        23_141_242_938,
        "dma overview: 32 KiB on one trn2 engine in 1416 ns; dma guide rounds to 23 GB/s",
    ),
    dma_single_engine_bytes_per_s=(23_141_242_938, "dma overview: 32 KiB on one in 1416 ns"),
    dma_descriptor_ps=(26_000, "read off the dma overview's trn2 trace with 4 KiB packets"),
    hbm_bytes_per_s=(362_500_000_000, "hw/trainium2.rst: chip's 2.9 TB/s / 8 cores"),
)

_NEURON_CORE_V4 = _changed(
    _NEURON_CORE_V3,
    {"name": "NeuronCore-v4"},
    pe_mx=(True, "arch4"),
    pe_fp8_factor=(4, "arch4: MX matmul, K=512 in the time of K=128 bf16, 315 TFLOPS"),
    pe_sustained_factor=(1.0, "assumed as trn2"),
    matmul_moving_max=(4096, "nki.isa.nc_matmul: 4096 fp32 results on v4, all 8 banks"),
    matmul_pair_floor_ps=(158_667, "assumed as trn2"),
    vector_hz=(1_200_000_000, "arch4 engine table"),
    scalar_copy_factor=(2, "arch4: 2x for 16-bit tensor_scalar and tensor_copy"),
    sbuf_bytes=(32 * KIB * KIB, "arch4"),
    dma_engine_bytes_per_s=(33_000_000_000, "dma guide"),
    dma_single_engine_bytes_per_s=(33_000_000_000, "dma guide"),
    dma_engine_raw_bytes_per_s=(38_400_000_000, "dma overview"),
    dma_descriptor_ps=(26_000, "assumed as trn2"),
    dma_accumulate_factor=(1.0, "arch4: read-add-write at the rate of a copy"),
    hbm_bytes_per_s=(612_500_000_000, "hw/trainium3.rst: chip's 4.9 TB/s / 8 cores"),
)

_TRAINIUM1 = _spec(
    ChipSpec,
    {"name": "Trainium1", "core": _NEURON_CORE_V2, "lnc_choices": (1,)},
    physical_cores=(2, "arch2"),
    hbm_bytes=(32 * GIB, "arch2"),
    hbm_stacks=(2, "arch2"),
    hbm_bytes_per_s=(820_000_000_000, "arch2; hw/ prints GiB/s"),
    link_bytes_per_s=(384_000_000_000, "hw/trn1-arch.rst"),
    default_lnc=(1, "logical-neuroncore-config.rst: LNC is a trn2/trn3 setting"),
)
_TRAINIUM1N = _changed(
    _TRAINIUM1,
    {"name": "Trainium1", "core": _NEURON_CORE_V2, "lnc_choices": (1,)},
    link_bytes_per_s=(768_000_000_000, "hw/trn1-arch.rst: trn1n"),
)
_INFERENTIA2 = _changed(
    _TRAINIUM1,
    {"name": "Inferentia2", "core": _INF2_CORE, "lnc_choices": (1,)},
    link_bytes_per_s=(192_000_000_000, "hw/inf2-arch.rst"),
)
_TRAINIUM2 = _spec(
    ChipSpec,
    {"name": "Trainium2", "core": _NEURON_CORE_V3, "lnc_choices": (1, 2)},
    physical_cores=(8, "arch3"),
    hbm_bytes=(96 * GIB, "arch3"),
    hbm_stacks=(4, "driver address_map.h: 4 x 24 GiB"),
    hbm_bytes_per_s=(2_900_000_000_000, "hw/trainium2.rst; arch3 prints 3 TB/s"),
    link_bytes_per_s=(1_280_000_000_000, "hw/trn2-arch.rst: 1024 within + 256 between instances"),
    default_lnc=(2, "logical-neuroncore-config.rst"),
)
_TRAINIUM3 = _changed(
    _TRAINIUM2,
    {"name": "Trainium3", "core": _NEURON_CORE_V4, "lnc_choices": (1, 2)},
    physical_cores=(8, "arch4"),
    hbm_bytes=(144 * GIB, "arch4"),
    hbm_stacks=(4, "arch4"),
    hbm_bytes_per_s=(4_900_000_000_000, "hw/trainium3.rst; arch4 prints 4.7 TB/s"),
    link_bytes_per_s=(2_560_000_000_000, "hw/trainium3.rst; the per-link sum is 704 GB/s"),
)

_DISPATCH = (5_000_000, "assumed: a few microseconds of Python and dispatcher per operator")
_HOST_FIXED = (2_000_000, "assumed: one descriptor ring write, DMA start and completion")
_LAUNCH = "issue 1370 of aws-neuron-sdk, inf2: 10-13 us between queued NEFFs, midpoint"


def _instance(
    name: str, chip: ChipSpec, chips: tuple[int, str], link: tuple[int, str], launch_note: str = ""
) -> SystemSpec:
    return _spec(
        SystemSpec,
        {"name": name, "chip": chip},
        chips=chips,
        host_link_bytes_per_s=link,
        host_link_fixed_ps=_HOST_FIXED,
        launch_ps=(11_500_000, launch_note + _LAUNCH),
        dispatch_ps=_DISPATCH,
    )


_LINK_V2 = (16_000_000_000, "driver neuron_dhal_v2.c: 64 KiB in about 4 us")
_LINK_V3 = (32_000_000_000, "driver neuron_dhal_v3.c: 64 KiB in about 2 us")
_LINK_V4 = (32_000_000_000, "assumed as trn2")
_OTHER_CHIP = "assumed as inf2; "

SYSTEMS: Mapping[str, SystemSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            _instance("inf2.xlarge", _INFERENTIA2, (1, "hw/inf2-arch.rst"), _LINK_V2),
            _instance("inf2.8xlarge", _INFERENTIA2, (1, "hw/inf2-arch.rst"), _LINK_V2),
            _instance("inf2.24xlarge", _INFERENTIA2, (6, "hw/inf2-arch.rst"), _LINK_V2),
            _instance("inf2.48xlarge", _INFERENTIA2, (12, "hw/inf2-arch.rst"), _LINK_V2),
            _instance("trn1.2xlarge", _TRAINIUM1, (1, "hw/trn1-arch.rst"), _LINK_V2, _OTHER_CHIP),
            _instance("trn1.32xlarge", _TRAINIUM1, (16, "hw/trn1-arch.rst"), _LINK_V2, _OTHER_CHIP),
            _instance(
                "trn1n.32xlarge", _TRAINIUM1N, (16, "hw/trn1-arch.rst"), _LINK_V2, _OTHER_CHIP
            ),
            _instance("trn2.48xlarge", _TRAINIUM2, (16, "hw/trn2-arch.rst"), _LINK_V3, _OTHER_CHIP),
            _instance(
                "trn2u.48xlarge", _TRAINIUM2, (16, "hw/trn2-arch.rst"), _LINK_V3, _OTHER_CHIP
            ),
            # One of the four nodes of a Trn3 Gen1 UltraServer; no document here prints its name.
            _instance(
                "trn3.48xlarge",
                _TRAINIUM3,
                (16, "hw/trn3-arch.rst: UltraServer Gen1 is 4 x 16 chips; instance name assumed"),
                _LINK_V4,
                _OTHER_CHIP,
            ),
        )
    }
)


def system(name: str) -> SystemSpec:
    """The instance called ``name``.

    Raises:
        ValueError: no such instance; the text lists those there are.
    """
    if name not in SYSTEMS:
        raise ValueError(f"unknown system {name!r}; choose one of: {', '.join(SYSTEMS)}")
    return SYSTEMS[name]
