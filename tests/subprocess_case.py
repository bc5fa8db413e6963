"""Runs Python code in a process of its own: another configuration, a fork, an exit, a hang.

    assert run("import torch; print(torch.trn.device_count())", TRN_SYSTEM="trn1.2xlarge") == "2\n"

The code runs as a file, so that `if __name__ == "__main__":` and spawned processes work.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

_OF_THE_SIMULATOR = ("TRN_", "NEURON_RT_")


def start(
    code: str, *, timeout_s: float = 60, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """The finished process of `code`, with these variables and none of the caller's settings.

    A child of it that outlives it does not hold the test up: its output goes to files.

    Raises:
        subprocess.TimeoutExpired: it hangs; it was killed together with all it had started.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(_OF_THE_SIMULATOR)}
    with tempfile.TemporaryDirectory() as folder:
        script, out, err = (Path(folder) / name for name in ("case.py", "stdout", "stderr"))
        script.write_text(code)
        with out.open("w") as stdout, err.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, str(script)],
                stdout=stdout,
                stderr=stderr,
                stdin=subprocess.DEVNULL,
                env=inherited | {"PYTHONUNBUFFERED": "1"} | environment,
                start_new_session=True,
            )
            try:
                status = process.wait(timeout_s)
            except subprocess.TimeoutExpired as hang:
                os.killpg(process.pid, 9)
                process.wait()
                hang.output, hang.stderr = out.read_bytes(), err.read_bytes()
                raise
        return subprocess.CompletedProcess(code, status, out.read_text(), err.read_text())


def run(code: str, *, timeout_s: float = 60, **environment: str) -> str:
    """What `code` prints; it must end without an error and within the time."""
    done = start(code, timeout_s=timeout_s, **environment)
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
