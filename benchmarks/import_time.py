"""What autoloading trn adds to `import torch`, in seconds.

python benchmarks/import_time.py
"""

import os
import statistics
import subprocess
import sys

LIMIT_S = 0.3
ROUNDS = 7
CODE = "import time; start = time.perf_counter(); import torch; print(time.perf_counter() - start)"


def import_s(autoload: str) -> float:
    """Seconds of `import torch` in a fresh interpreter."""
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload}
    run = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True
    )
    return float(run.stdout)


def main() -> None:
    """Prints both times and their difference."""
    pairs = [(import_s("0"), import_s("1")) for _ in range(ROUNDS + 1)][1:]
    without = statistics.median(first for first, _ in pairs)
    added = statistics.median(second - first for first, second in pairs)
    word = "ok" if added <= LIMIT_S else "ABOVE"
    print(f"import torch: {without:.2f} s, trn adds {added:.2f} s (limit {LIMIT_S:.2f}) {word}")


if __name__ == "__main__":
    main()
