"""Train a character-level GPT on the source of Python's own standard library.

    python examples/train_gpt.py                  # on a simulated Trainium
    python examples/train_gpt.py --device cpu     # the same program on the CPU

Both runs see the same parameters and batches, so their losses agree. On `trn` the program ends
with a table of where the simulated time of its last step went, and a trace of that step for
ui.perfetto.dev.
"""

import argparse
import json
import sysconfig
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

LAYERS, WIDTH, HEADS, CONTEXT = 6, 384, 6, 256
LEARNING_RATE = 3e-4


class Attention(nn.Module):
    """Causal self-attention over (batch, time, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, _ = x.shape
        q, k, v = (
            part.view(batch, steps, HEADS, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, steps, WIDTH))


class Block(nn.Module):
    """One transformer layer: attention, then a two-layer network, each on a normalised input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(WIDTH)
        self.attn = Attention()
        self.norm_2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """Logits (batch, time, characters) for the next character after each of (batch, time)."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.token = nn.Embedding(characters, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, characters, bias=False)
        self.apply(self._initialise)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Text:
    """A text as int64 numbers of its characters, and how many different ones there are."""

    tokens: Tensor
    characters: int

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`size` pieces of CONTEXT characters and the characters after each, (size, CONTEXT)."""
        starts = torch.randint(len(self.tokens) - CONTEXT, (size,), generator=generator)
        pieces = torch.stack([self.tokens[start : start + CONTEXT + 1] for start in starts])
        return pieces[:, :-1], pieces[:, 1:]


def standard_library() -> Text:
    """The ASCII characters of the standard library's top-level modules, in the files' order."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    source = bytearray(b"".join(path.read_bytes() for path in paths))
    raw = torch.frombuffer(source, dtype=torch.uint8)
    known, tokens = raw[raw < 128].unique(return_inverse=True)
    return Text(tokens, len(known))


class Clocks:
    """Time since its making: of the host, and on trn also simulated."""

    def __init__(self, device: str) -> None:
        self._simulated = device != "cpu"
        self._host_started_s = time.perf_counter()
        self._simulated_started_ps = torch.trn.host_clock_ps() if self._simulated else 0

    def seconds(self) -> dict[str, float]:
        """Both clocks, by name."""
        seconds = {"host": time.perf_counter() - self._host_started_s}
        if self._simulated:
            elapsed_ps = torch.trn.host_clock_ps() - self._simulated_started_ps
            seconds["simulated"] = elapsed_ps / 1e12
        return seconds

    def __str__(self) -> str:
        seconds = self.seconds()
        text = f"host {seconds.pop('host'):.1f} s"
        return text + "".join(f", simulated {value * 1e3:.1f} ms" for value in seconds.values())


def train_step(
    model: GPT, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor
) -> float:
    """One step of the optimizer; returns the loss before it, mean over all characters, in nats."""
    loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train as the options say; returns what `--json` writes."""
    torch.manual_seed(options.seed)
    text = standard_library()
    model = GPT(text.characters).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    # Batches have a generator of their own: no other random numbers, of whichever device, move it.
    generator = torch.Generator().manual_seed(options.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"GPT of {parameters / 1e6:.1f} million parameters on {options.device}; "
        f"{len(text.tokens) / 1e6:.1f} million characters of text, "
        f"{options.batch_size} x {CONTEXT} a step"
    )
    clocks, losses, profile = Clocks(options.device), [], None
    with trange(options.steps, unit="step") as progress:
        for step in progress:
            if options.device != "cpu" and step == options.steps - 1:
                profile = new_profile()
            with profile or nullcontext():
                pieces = text.batch(options.batch_size, generator)
                inputs, targets = (piece.to(options.device) for piece in pieces)
                losses.append(train_step(model, optimizer, inputs, targets))
            progress.set_postfix_str(f"loss {losses[-1]:.4f}, {clocks}")
    print(f"{options.steps} steps: loss {losses[0]:.4f} to {losses[-1]:.4f}; {clocks}")
    if profile is not None:
        report(profile, options.trace)
    return {"device": options.device, "seed": options.seed, "losses": losses} | clocks.seconds()


def new_profile() -> Any:
    """A profile of the simulated device; all else that the device needs comes with torch."""
    import torch_trn

    return torch_trn.profile(modules=True)


def report(profile: Any, trace: Path) -> None:
    """Print where the simulated time of the profiled step went and write its trace."""
    print("\nThe last step, by operator, in simulated time:\n")
    print(profile.table())
    profile.export_chrome_trace(trace)
    print(f"\nTrace of the last step: {trace} (open it in ui.perfetto.dev)")


def positive(text: str) -> int:
    """A count from the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def main() -> None:
    """Run the program with the command line's options."""
    parser = argparse.ArgumentParser(description="Train a character-level GPT.")
    parser.add_argument("--device", choices=("trn", "cpu"), default="trn")
    parser.add_argument("--steps", type=positive, default=50)
    parser.add_argument("--batch-size", type=positive, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--trace",
        type=Path,
        default=Path("train_gpt_trace.json"),
        help="where to write the trace of the last step (trn only)",
    )
    parser.add_argument("--json", type=Path, help="write the losses and both clocks to this file")
    options = parser.parse_args()
    results = train(options)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
