"""One AdamW step over 14 million parameters with default settings: trn against CPU torch.

python benchmarks/adamw.py
"""

import torch
from timing import Work, seconds_each, verdict

LIMIT = 1.10
SHAPES = [(384, 1536)] * 24


def step(device: str) -> Work:
    """A ready AdamW step on one device."""
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for shape in SHAPES:
        parameter = torch.randn(shape, generator=generator).to(device).requires_grad_()
        parameter.grad = torch.randn(shape, generator=generator).to(device)
        parameters.append(parameter)
    return torch.optim.AdamW(parameters, lr=1e-3).step


def main() -> None:
    """Prints both times and their ratio."""
    cpu_s, trn_s = seconds_each(step("cpu"), step("trn"), rounds=24, repeat=1)
    ratio = trn_s / cpu_s
    count = sum(rows * columns for rows, columns in SHAPES) / 1e6
    print(
        f"AdamW, {count:.1f} M parameters: CPU {cpu_s * 1e3:.1f} ms, trn {trn_s * 1e3:.1f} ms, "
        f"ratio {ratio:.2f} (limit {LIMIT:.2f}) {verdict(ratio, LIMIT)}"
    )


if __name__ == "__main__":
    main()
