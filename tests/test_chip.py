"""Specs: documented figures, a source for every number, clear errors for wrong settings."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from torch_trn.chip import SYSTEMS, ChipSpec, CoreSpec, SystemSpec, system
from torch_trn.tpuv3 import TPUV3_CORE

GIB = 1 << 30


def specs() -> list[CoreSpec | ChipSpec | SystemSpec]:
    found: list[CoreSpec | ChipSpec | SystemSpec] = [TPUV3_CORE]
    for instance in SYSTEMS.values():
        found += [instance, instance.chip, instance.chip.core]
    return found


def test_every_number_has_a_source() -> None:
    for spec in specs():
        numeric = {
            field.name
            for field in fields(spec)
            if isinstance(getattr(spec, field.name), int | float)
        }
        assert numeric == set(spec.sources), spec.name
        assert all(len(source) >= 5 for source in spec.sources.values())


def test_every_number_is_positive() -> None:
    for spec in specs():
        for name in spec.sources:
            value = getattr(spec, name)
            assert isinstance(value, bool) or value > 0, (spec.name, name)


def test_the_tpu_for_validation_is_no_system() -> None:
    assert TPUV3_CORE.peak_flops(torch.bfloat16) == 2 * 128 * 128 * 2 * 940e6
    assert all(spec.chip.core is not TPUV3_CORE for spec in SYSTEMS.values())


@pytest.mark.parametrize(
    ("name", "cores", "gib"),
    [
        ("inf2.xlarge", 2, 16),
        ("inf2.48xlarge", 24, 16),
        ("trn1.2xlarge", 2, 16),
        ("trn1.32xlarge", 32, 16),
        ("trn1n.32xlarge", 32, 16),
        ("trn2.48xlarge", 64, 24),
        ("trn2u.48xlarge", 64, 24),
        ("trn3.48xlarge", 64, 36),
    ],
)
def test_logical_cores_and_their_hbm(name: str, cores: int, gib: int) -> None:
    assert system(name).logical_cores() == cores
    assert system(name).hbm_bytes_per_logical_core() == gib * GIB


def test_lnc_1_halves_the_share_of_a_core() -> None:
    assert system("trn2.48xlarge").logical_cores(1) == 128
    assert system("trn2.48xlarge").hbm_bytes_per_logical_core(1) == 12 * GIB


def test_unknown_system_lists_the_choices() -> None:
    with pytest.raises(ValueError, match="unknown system 'trn9'; choose one of: inf2.xlarge, "):
        system("trn9")


def test_lnc_that_the_chip_has_not() -> None:
    with pytest.raises(ValueError) as error:
        system("trn1.2xlarge").logical_cores(2)
    assert str(error.value) == "trn1.2xlarge (Trainium1) has no LNC=2; choose one of: 1"


def test_an_unwise_memory_split_is_impossible() -> None:
    for spec in specs():
        if isinstance(spec, CoreSpec):
            assert spec.psum_banks * spec.psum_bank_bytes * spec.sbuf_partitions == spec.psum_bytes
            assert spec.sbuf_bytes % spec.sbuf_partitions == 0


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("trn1.2xlarge", torch.bfloat16, 91.8),
        ("trn1.2xlarge", torch.float32, 22.9),
        ("trn2.48xlarge", torch.bfloat16, 78.6),
        ("trn2.48xlarge", torch.float32, 19.7),
        ("trn2.48xlarge", torch.float8_e4m3fn, 157.3),
        ("trn3.48xlarge", torch.float8_e4m3fn, 314.6),
    ],
)
def test_documented_peaks(name: str, dtype: torch.dtype, tflops: float) -> None:
    assert round(system(name).chip.core.peak_flops(dtype) / 1e12, 1) == tflops


def test_dma_limit_of_a_core_is_the_smaller_of_engines_and_hbm_share() -> None:
    assert system("trn1.2xlarge").chip.core.dma_bytes_per_s == 16 * 17_060_000_000
    assert system("trn2.48xlarge").chip.core.dma_bytes_per_s == 362_500_000_000
    assert system("trn3.48xlarge").chip.core.dma_bytes_per_s == 528_000_000_000
