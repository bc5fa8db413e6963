"""The examples run as a user runs them: each in a process of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
MARK = "-- next block --"
README = ROOT / "README.md"
STEPS = 3


def run_gpt(directory: Path, device: str, *, autoload: bool) -> tuple[dict[str, Any], str]:
    """Train a few steps; returns what `--json` wrote and what was printed."""
    results = directory / f"{device}.json"
    program = (
        "import runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "print('used:', 'torch_trn' in sys.modules)\n"
    )
    arguments = ["--device", device, "--steps", str(STEPS), "--batch-size", "1", "--seed", "3"]
    run = subprocess.run(
        [sys.executable, "-c", program, str(EXAMPLES / "train_gpt.py"), *arguments]
        + ["--json", str(results), "--trace", str(directory / "trace.json")],
        env=os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": str(int(autoload))},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(results.read_text()), run.stdout


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    return run_gpt(tmp_path_factory.mktemp("cpu"), "cpu", autoload=False)


@pytest.fixture(scope="module")
def trn_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trn")


@pytest.fixture(scope="module")
def on_trn(trn_directory: Path) -> tuple[dict[str, Any], str]:
    return run_gpt(trn_directory, "trn", autoload=True)


def test_gpt_on_the_cpu_needs_no_trn(on_cpu: tuple[dict[str, Any], str]) -> None:
    results, printed = on_cpu
    assert printed.splitlines()[-1] == "used: False"
    assert len(results["losses"]) == STEPS
    assert "simulated" not in results


def test_gpt_has_the_same_losses_on_both(
    on_cpu: tuple[dict[str, Any], str], on_trn: tuple[dict[str, Any], str]
) -> None:
    assert on_trn[0]["losses"] == pytest.approx(on_cpu[0]["losses"], abs=1e-4)
    assert on_trn[0]["simulated"] > 0


def test_gpt_prints_the_operators_and_no_other_than_neuron_cores_ran_them(
    on_trn: tuple[dict[str, Any], str],
) -> None:
    _, printed = on_trn
    header = next(line for line in printed.splitlines() if line.startswith("operator"))
    assert header.split()[:4] == ["operator", "calls", "total", "us"]
    assert "[host]" not in printed
    assert "trace.json" in printed


def test_gpt_writes_a_trace_whose_operators_add_up(
    on_trn: tuple[dict[str, Any], str], trn_directory: Path
) -> None:
    events = json.loads((trn_directory / "trace.json").read_text())["traceEvents"]
    tracks = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event["name"] == "thread_name"
    }
    assert {"operators", "launch", "TensorE", "VectorE", "ScalarE"} <= set(tracks.values())
    operators_us = sum(
        event["dur"]
        for event in events
        if event["ph"] == "X" and tracks[event["pid"], event["tid"]].startswith("operators")
    )
    total = next(line for line in on_trn[1].splitlines() if line.startswith("total"))
    assert f"{operators_us:,.1f}" == total.split()[2]
    assert any(event["ph"] == "C" for event in events)


def test_gpt_simulates_the_same_time_again(
    on_trn: tuple[dict[str, Any], str], trn_directory: Path, tmp_path: Path
) -> None:
    again, printed = run_gpt(tmp_path, "trn", autoload=True)
    assert again["simulated"] == on_trn[0]["simulated"]
    assert (tmp_path / "trace.json").read_bytes() == (trn_directory / "trace.json").read_bytes()


def test_the_readme_shows_what_its_example_prints(update_golden: bool) -> None:
    """A block that imports torch starts a program; after each comes 'prints' and its output."""
    text = README.read_text()
    blocks = list(re.finditer(r"```python\n(.*?)```\n\nprints\n\n```\n(.*?)```", text, re.DOTALL))
    assert len(blocks) == 3
    code = f"print({MARK!r})\n".join(block[1] for block in blocks)
    outputs = []
    for program in re.split(r"^(?=import torch\n)", code, flags=re.MULTILINE)[1:]:
        run = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=600
        )
        assert run.returncode == 0, run.stderr
        outputs += run.stdout.removesuffix(f"{MARK}\n").split(f"{MARK}\n")
    if update_golden:
        for block, output in reversed(list(zip(blocks, outputs, strict=True))):
            text = text[: block.start(2)] + output + text[block.end(2) :]
        README.write_text(text)
    else:
        assert [block[2] for block in blocks] == outputs, (
            "if the new times are right: pytest --update-golden"
        )
