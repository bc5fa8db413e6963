"""The command that compares predictions with measurements: parser, routes, scores, exit codes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import tpuv3
import validation
from measurement import COLUMNS, Measurement, MeasurementError, read
from prediction import Prediction, core_of
from rows import predict

from torch_trn.chip import system

MIB = 1 << 20


def row(**fields: Any) -> dict[str, str]:
    """A row of the file: a stream of 16 MiB in 61.44 us on trn1, but for ``fields``."""
    given = {
        "id": "O901", "level": "op", "hardware": "Trainium1 / trn1.2xlarge", "n_cores_used": 1,
        "workload": "HBM write (memory_write)", "config": {"bytes": 16 * MIB, "store_free": 8192},
        "metric": "time", "value": 61.44, "unit": "us", "config_complete": "yes", "note": "",
    }  # fmt: skip
    given |= fields
    return {
        name: json.dumps(value) if name == "config" and isinstance(value, dict) else str(value)
        for name, value in given.items()
    }


def write(path: Path, *rows: dict[str, str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*COLUMNS, "source"])
        writer.writeheader()
        writer.writerows(rows)
    return path


def measurement(tmp_path: Path, **fields: Any) -> Measurement:
    [found] = read(write(tmp_path / "one.csv", row(**fields)))
    return found


def predictions(tmp_path: Path, **fields: Any) -> list[Prediction]:
    found = predict(measurement(tmp_path, **fields))
    assert isinstance(found, list), found
    return found


def test_times_and_rates_become_milliseconds(tmp_path: Path) -> None:
    assert measurement(tmp_path, value=189, unit="ns").milliseconds() == pytest.approx(1.89e-4)
    assert measurement(tmp_path, value=2, unit="GB/s").milliseconds(nbytes=4e6) == 2.0
    assert measurement(tmp_path, value=50, unit="TFLOPS").milliseconds(operations=1e12) == 20.0
    assert measurement(tmp_path, value=8, unit="head-tiles/s").milliseconds(operations=4) == 500.0


def test_numbers_are_the_first_of_a_value_or_follow_a_name(tmp_path: Path) -> None:
    found = measurement(tmp_path, value="~0.633/0.641", note="Vector active 0.135, Scalar 1")
    assert found.number == 0.633
    assert found.noted("Vector active") == 0.135
    assert found.noted("Scalar active") is None


def test_what_is_no_time_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        MeasurementError, match="O901: 5 GB/s is no time, and a rate of an unknown amou"
    ):
        measurement(tmp_path, value=5, unit="GB/s").milliseconds(operations=1)
    with pytest.raises(MeasurementError, match="O901: value is 'fast', but must hold a number"):
        measurement(tmp_path, value="fast").milliseconds()


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("id,level\nO1,op\n")
    with pytest.raises(MeasurementError, match=r"rows\.csv has no column hardware, n_cores_used"):
        read(path)
    with pytest.raises(MeasurementError, match=r"one\.csv, row O901: config is no JSON"):
        measurement(tmp_path, config="{bytes")
    with pytest.raises(MeasurementError, match=r"row O901: config is \[1\], but must be an object"):
        measurement(tmp_path, config="[1]")


def test_a_core_is_found_by_its_hardware() -> None:
    assert core_of("Trainium1 / trn1.2xlarge") is system("trn1.2xlarge").chip.core
    assert core_of("NeuronCore-v2 (trn1/inf2)") is system("trn1.2xlarge").chip.core
    assert core_of("Inferentia2 / inf2.xlarge") is system("inf2.xlarge").chip.core
    assert core_of("Trainium2 / trn2") is system("trn2.48xlarge").chip.core
    with pytest.raises(MeasurementError, match="unknown hardware 'abacus'"):
        core_of("abacus")


def test_a_stream_row(tmp_path: Path) -> None:
    [found] = predictions(tmp_path)
    # 8 stores of 2 MiB at 16 x 17.06 GB/s (each descriptor rounded up to a picosecond), a memset
    # before and the start of a DMA.
    memset_ps, semaphore_ps, start_ps = 3_741_964, 150_000, 1_300_000
    assert found.kind == "stream"
    assert found.predicted * 1e9 == pytest.approx(
        memset_ps + semaphore_ps + start_ps + 8 * 2 * MIB / 272.96e-3, abs=8 * 8
    )
    assert found.ratio == found.predicted / found.measured == found.predicted / 0.06144


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"workload": "HBM->SBUF read, free 512 (1 KiB)", "config": {"bytes": MIB}}, "stream"),
        ({"workload": "HBM read with x*x+sum consumer", "config": {"bytes": MIB}}, "stream"),
        ({"workload": "DMA lever: HBM to HBM dma_copy", "config": {"bytes": MIB}}, "stream"),
        ({"level": "kernel", "workload": "NKI mamba_v3", "config": {
            "batch": 1, "channels": 128, "seq": 512, "state": 2}}, "kernel"),
        ({"level": "kernel", "workload": "NKI matmul tutorial: Original tiled", "config": {
            "M": 128, "K": 128, "N": 512}}, "release"),
        ({"level": "kernel", "workload": "GEMM NKI coalesced x4", "config": {
            "M": 512, "K": 128, "N": 512, "dtype": "bf16"}}, "kernel"),
        ({"level": "instruction", "workload": "ScalarE activation, dependent", "config": {
            "elements_per_partition": 1}}, "instruction"),
        ({"workload": "torch.sum through neuronx-cc", "config": {
            "bytes": MIB, "free": 2048}}, "compiler"),
        ({"workload": "torch attention (QK^T)", "config": {
            "batch": 1, "heads": 1, "seq": 128, "head_dim": 64}}, "compiler"),
        ({"workload": "one transformer block forward", "config": {
            "seq": 128, "hidden": 128, "heads": 2, "ffn": 256, "flops": 1}}, "compiler"),
    ],
    ids=lambda value: value["workload"] if isinstance(value, dict) else value,
)  # fmt: skip
def test_rows_are_recognised_by_their_workload(
    tmp_path: Path, fields: dict[str, Any], kind: str
) -> None:
    [found] = predictions(tmp_path, **fields)
    assert (found.kind, found.predicted > 0) == (kind, True)


def test_a_benchmark_row_also_says_how_busy_engines_and_hbm_were(tmp_path: Path) -> None:
    note = "HBM read 800000 B, write 500000 B, Vector active 0.5, Scalar active 0.25; spills none"
    time, busy, traffic = predictions(
        tmp_path, level="kernel", workload="NKIBench silu (baseline kernel)", value=4, note=note,
        config={"M": 128, "N": 1024, "dtype": "fp32"},
    )  # fmt: skip
    assert (time.kind, busy.kind, traffic.kind) == ("kernel", "busy", "traffic")
    assert (traffic.predicted, traffic.measured, traffic.unit) == (2 * 0.524288, 1.3, "MB")
    assert (time.measured, busy.measured) == (0.004, 0.003)
    # Two halves of 512: exp and add on ScalarE, a reciprocal (2.4N) and a product (2N) on VectorE.
    assert busy.predicted * 1e9 == 2 * (2 * 468_571 + 1_182_143 + 999_107)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"level": "training-step"}, ""),
        ({"n_cores_used": 2}, ""),
        ({"n_cores_used": "2 nodes"}, ""),
        ({"config_complete": "partly"}, "its config is not complete"),
        ({"workload": "something else"}, "its program is not known"),
        ({"config": {}}, "its config has no 'bytes'"),
        ({"workload": "PCIe host to device copy"}, "a copy of the host, not of the core"),
        ({"level": "kernel", "workload": "NKIBench adamw (baseline kernel)"},
         "its program is not known"),
    ],
)  # fmt: skip
def test_other_rows_say_why_they_are_not_predicted(
    tmp_path: Path, fields: dict[str, Any], reason: str
) -> None:
    assert predict(measurement(tmp_path, **fields)) == reason


def test_rows_behind_a_constant_are_marked(tmp_path: Path) -> None:
    for id, marked in (("O001", True), ("I015", True), ("O027", True), ("O901", False)):
        [found] = predictions(tmp_path, id=id)
        assert found.gave_a_constant == marked, id


def test_scores_weigh_rows_and_programs(tmp_path: Path) -> None:
    def prediction(id: str, program: str, predicted: float) -> Prediction:
        return Prediction(measurement(tmp_path, id=id), "stream", program, predicted, 1.0)

    found = validation.score(
        "stream",
        [prediction("O901", "a", 1.1), prediction("O001", "a", 0.9), prediction("O902", "b", 1.4)],
    )
    assert (found.rows.count, found.programs.count, found.unmarked.count) == (3, 2, 2)
    assert found.rows.median == pytest.approx(0.1)
    assert found.rows.p90 == pytest.approx(0.34)
    assert found.programs.median == pytest.approx(0.2)
    assert found.unmarked.median == pytest.approx(0.25)
    assert found.verdict == "NOT met"


def test_percentiles_lie_between_values_in_proportion() -> None:
    assert validation.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert validation.percentile([0.0, 10.0], 0.9) == 9.0
    assert validation.percentile([7.0], 0.9) == 7.0
    assert validation.percentile([], 0.9) == 0.0


def test_the_command_prints_classes_and_meets_bars(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = row(id="K901", level="kernel", workload="a mystery")
    path = write(tmp_path / "measurements.csv", row(value=66.7), unknown)
    assert validation.main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert f"no TPUv3 cycles at {tmp_path / 'tpuv3.csv'}: that section is left out" in printed
    assert "  O901       0.06666     0.0667   1.00  HBM write (memory_write)" in printed
    assert "  its program is not known: K901" in printed
    assert "stream          1    0.1%   0.1%      1    0.1%   0.1%" in printed
    assert printed.rstrip().endswith("3% / 15%  met")


def test_the_command_fails_where_a_bar_is_not_met(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "measurements.csv", row(value=100))
    assert validation.main([str(path)]) == 1
    printed = capsys.readouterr().out
    assert "  stream       O901   0.67  HBM write (memory_write): DMA 92% busy" in printed
    assert printed.rstrip().endswith("3% / 15%  NOT met")


def test_the_command_says_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "measurements.csv"
    assert validation.main([str(missing)]) == 2
    assert capsys.readouterr().err == (
        f"no measurements at {missing}: give the path of a measurements.csv as the first argument\n"
    )
    write(missing, row(level="training-step"))
    assert validation.main([str(missing)]) == 2
    assert capsys.readouterr().err == "no row of the file can be predicted\n"


def test_the_tpu_section(tmp_path: Path) -> None:
    path = tmp_path / "tpuv3.csv"
    path.write_text(
        "workload,tpuv3_cycles,mnpusim,timeloop,maestro,scalesim_v3\n"
        "gemm_256x256x256,3101,2426,512,522,1020\n"
        "softmax_128x256,2000,,,,\n"
    )
    lines = tpuv3.section(path)
    assert lines[0] == (
        "a TPUv3-like core, in its cycles (reported; *: a constant was read off this row)"
    )
    assert lines[2] == "       3011       3101   0.97  gemm_256x256x256*"
    assert lines[-4] == "    mnpusim        22%, here  2.9% (1 rows)"
    with pytest.raises(ValueError, match="unknown TPUv3 workload 'fft_8'"):
        tpuv3.predicted_cycles("fft_8")
