"""numerics="none": each part runs in a process of its own, since a process has one numerics."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from none_models import MODELS

TESTS = Path(__file__).parent
SWEPT = """
add addmm cdist cumsum fft.rfftn gather index_put linalg.eig linalg.svd masked_select matmul
native_batch_norm nn.functional.batch_norm nn.functional.conv2d nn.functional.cross_entropy
nn.functional.embedding_bag nn.functional.mse_loss nn.functional.scaled_dot_product_attention
nonzero_static sort svd_lowrank topk
""".split()
SAMPLES = os.environ.get("TRN_TEST_SAMPLES", "2")
"""Samples of each operator that the sweep takes; TRN_TEST_SWEEP=all takes all operators."""

NEEDS_VALUES = ("needs the values", "asks for the value", "draws a number of random values")


def output(*command: str, timeout_s: float = 300, **environment: str) -> str:
    """What a Python process prints, under these settings alone."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TRN_", "NEURON_RT_"))}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=TESTS.parent,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_values_and_their_absence() -> None:
    output("-m", "pytest", "tests/none_values.py", TRN_NUMERICS="none")


@pytest.mark.parametrize("model", [model.__name__ for model in MODELS])
def test_a_model_costs_what_it_costs_with_values(model: str) -> None:
    """HBM to the byte, time to the picosecond, random numbers to the draw.

    Eight bytes have values, so that a loss scale is real; everything else has none.
    """
    script = str(TESTS / "none_models.py")
    host, none = (
        output(script, model, TRN_NUMERICS=numerics, TRN_DATA_BYTES="8")
        for numerics in ("host", "none")
    )
    assert host.count("\n") >= 3
    assert none == host


def test_every_call_behind_op_db_costs_what_it_costs_with_values() -> None:
    names = () if os.environ.get("TRN_TEST_SWEEP") == "all" else SWEPT
    script = str(TESTS / "none_sweep.py")
    host, none = (
        output(script, SAMPLES, *names, timeout_s=7200, TRN_NUMERICS=numerics, TRN_DATA_BYTES="0")
        for numerics in ("host", "none")
    )
    compared = 0
    for expected, got in zip(host.splitlines(), none.splitlines(), strict=True):
        name, number, calls, error = json.loads(got)
        name_host, number_host, calls_host, error_host = json.loads(expected)
        assert (name, number) == (name_host, number_host)
        if error is not None and any(text in error for text in NEEDS_VALUES):
            calls_host = calls_host[: len(calls)]
        else:
            assert error == error_host, name
        for call, call_host in zip(calls, calls_host, strict=True):
            assert call == call_host, (name, number)
        compared += len(calls)
    assert compared > 300
