"""A training step on trn against the same step on CPU torch, without and with `profile()`.

python benchmarks/training.py
"""

import copy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from models import Bert, resnet18
from tabulate import tabulate
from timing import Work, seconds_each, verdict
from torch import Tensor, nn

import torch_trn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from train_gpt import GPT  # noqa: E402

LIMIT = 1.05
PROFILED_LIMIT = 1.10


def cases() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """Model, input and class targets of each case, on the CPU."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    def ids(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    images = torch.randn(4, 3, 112, 112, generator=generator)
    return {
        "demo GPT, 4 x 256": (GPT(96), ids(96, 4, 256), ids(96, 4, 256)),
        "ResNet-18, 4 x 112 x 112": (resnet18(100), images, ids(100, 4)),
        "BERT-base, 2 x 128": (Bert(), ids(8192, 2, 128), ids(8192, 2, 128)),
    }


def training_step(case: tuple[nn.Module, Tensor, Tensor], device: str) -> Work:
    """Forward, loss, backward and AdamW of a case on one device, with its own copy of the model."""
    model = copy.deepcopy(case[0]).to(device)
    inputs, targets = case[1].to(device), case[2].to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def profiled(work: Work) -> Work:
    """The same work inside `torch_trn.profile()`."""

    def step() -> object:
        with torch_trn.profile():
            return work()

    return step


def main() -> None:
    """Prints the table."""
    rows = []
    for name, case in cases().items():
        cpu, trn = training_step(case, "cpu"), training_step(case, "trn")
        for label, work, limit in (
            ("", trn, LIMIT),
            (", profiled", profiled(trn), PROFILED_LIMIT),
        ):
            cpu_s, trn_s = seconds_each(cpu, work, rounds=12, repeat=1)
            ratio = trn_s / cpu_s
            rows.append((name + label, cpu_s, trn_s, ratio, limit, verdict(ratio, limit)))
    print(tabulate(rows, headers=("step", "CPU s", "trn s", "ratio", "limit", ""), floatfmt=".3f"))


if __name__ == "__main__":
    main()
