"""What the trn device adds to an eager operator of CPU torch, in microseconds (timing is on).

python benchmarks/eager.py
"""

import torch
import torch.nn.functional as F
from tabulate import tabulate
from timing import Work, seconds_each, verdict

OPERATOR_LIMIT_US = 1.5
VIEW_LIMIT_US = 0.5


def operators(device: str) -> dict[str, Work]:
    """The operators of the bar, on 8x8 tensors of one device."""
    a = torch.randn(8, 8, device=device)
    b = torch.randn(8, 8, device=device)
    weight = torch.ones(8, device=device)
    return {
        "add": lambda: a + b,
        "add_": lambda: a.add_(b, alpha=1e-6),
        "mm": lambda: torch.mm(a, b),
        "cat of two": lambda: torch.cat((a, b)),
        "layer_norm": lambda: F.layer_norm(a, (8,), weight, weight),
        "view": lambda: a.view(64),
        "t": lambda: a.t(),
    }


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    rows = []
    cpu, trn = operators("cpu"), operators("trn")
    with torch.no_grad():
        for name in cpu:
            limit = VIEW_LIMIT_US if name in ("view", "t") else OPERATOR_LIMIT_US
            cpu_s, trn_s = seconds_each(cpu[name], trn[name], rounds=60, repeat=1000)
            added_us = (trn_s - cpu_s) * 1e6
            rows.append((name, cpu_s * 1e6, trn_s * 1e6, added_us, limit, verdict(added_us, limit)))
    headers = ("operator", "CPU us", "trn us", "added us", "limit us", "")
    print(tabulate(rows, headers=headers, floatfmt=".2f"))


if __name__ == "__main__":
    main()
