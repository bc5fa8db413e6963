"""Steps of models whose times and HBM must be those of numerics "host": prints what they are.

    TRN_NUMERICS=none TRN_DATA_BYTES=0 python tests/none_models.py llama

After each step a line: bytes allocated and reserved, their peak, picoseconds of stream and host,
and the draws of the generator.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from torch_trn import _C

T = torch.Tensor
Step = Callable[[], T]


def optimized(model: nn.Module, loss: Step, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Three steps of training."""
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield


def transformer(config: Any, **arguments: Any) -> Iterator[None]:
    """A transformers model from its configuration, on the device from the start."""
    from transformers import AutoModelForCausalLM

    with torch.device("trn"):
        model = AutoModelForCausalLM.from_config(config, **arguments)
    ids = torch.randint(0, 500, (2, 33), device="trn")
    yield from optimized(
        model,
        lambda: model(input_ids=ids, labels=ids).loss,
        torch.optim.AdamW(model.parameters(), lr=1e-3),
    )


def gpt2() -> Iterator[None]:
    """With dropout, tied embeddings and Conv1D."""
    from transformers import GPT2Config

    yield from transformer(GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=512))


def llama() -> Iterator[None]:
    """With grouped queries, rotary positions and bfloat16."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=160,
        vocab_size=512,
    )
    yield from transformer(config, dtype=torch.bfloat16)


def convolutional() -> Iterator[None]:
    """Convolutions (also channels_last, grouped, transposed), batch norm in both modes, pooling."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, groups=4, bias=False),
        nn.MaxPool2d(2),
        nn.ConvTranspose2d(32, 8, 2, stride=2),
        nn.GroupNorm(2, 8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    ).to("trn", memory_format=torch.channels_last)
    x = torch.randn(4, 3, 24, 24, device="trn").to(memory_format=torch.channels_last)
    target = torch.arange(4, device="trn")
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    yield from optimized(model, lambda: F.cross_entropy(model(x), target), sgd)
    model.eval()
    with torch.no_grad():
        model(x)
    yield


def recurrent() -> Iterator[None]:
    """LSTM and GRU over packed and padded sequences, embedding, dropout between layers."""
    lstm = nn.LSTM(24, 32, num_layers=2, dropout=0.2, batch_first=True)
    gru = nn.GRU(32, 16, bidirectional=True, batch_first=True)
    model = nn.ModuleList([nn.Embedding(100, 24, padding_idx=0), lstm, gru, nn.Linear(32, 5)])
    model.to("trn")
    ids = torch.arange(44, device="trn").view(4, 11) % 100

    def loss() -> T:
        hidden, _ = model[1](model[0](ids))
        hidden, _ = model[2](hidden)
        return F.mse_loss(model[3](hidden[:, -1]), torch.zeros(4, 5, device="trn"))

    yield from optimized(model, loss, torch.optim.Adam(model.parameters(), fused=True))


def scaled() -> Iterator[None]:
    """Autocast with a GradScaler, which asks each step whether all gradients are finite."""
    model = nn.Sequential(nn.Linear(40, 80), nn.GELU(), nn.Dropout(0.1), nn.Linear(80, 3)).to("trn")
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    scaler = torch.amp.GradScaler("trn")
    x = torch.randn(16, 40, device="trn")
    for _ in range(3):
        with torch.autocast("trn"):
            loss = model(x).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        yield


def attention() -> Iterator[None]:
    """Every way of scaled_dot_product_attention, and the encoder layer that uses it."""
    q, k, v = (torch.randn(2, 4, 20, 8, device="trn", requires_grad=True) for _ in range(3))
    mask = torch.ones(20, 20, dtype=torch.bool, device="trn").tril()
    for options in ({}, {"is_causal": True}, {"attn_mask": mask}, {"dropout_p": 0.3}):
        F.scaled_dot_product_attention(q, k, v, **options).square().sum().backward()
        yield
    encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).to("trn")
    x = torch.randn(2, 10, 32, device="trn")
    yield from optimized(
        encoder, lambda: encoder(x).mean(), torch.optim.SGD(encoder.parameters(), fused=True)
    )


def initialised() -> Iterator[None]:
    """The initialisers of torch.nn.init (but trunc_normal_), and the other random functions."""
    init = torch.nn.init
    weight = torch.empty(48, 40, device="trn")
    for name in ("uniform_", "normal_", "ones_", "zeros_", "eye_", "orthogonal_"):
        getattr(init, name)(weight)
        yield
    for name in ("xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_"):
        getattr(init, name)(weight)
        yield
    init.dirac_(torch.empty(8, 4, 3, 3, device="trn"))
    init.constant_(weight[:, ::2], 0.3)
    init.normal_(weight[:, ::2])
    yield
    p = torch.full((30, 7), 0.25, device="trn")
    for draw in (
        lambda: torch.bernoulli(p),
        lambda: torch.bernoulli(p, 0.5),
        lambda: torch.normal(p, 2.0),
        lambda: torch.normal(p, p),
        lambda: torch.multinomial(p, 3),
        lambda: torch.multinomial(p, 3, replacement=True),
        lambda: torch.randn(77, dtype=torch.float64, device="trn"),
        lambda: torch.rand(33, dtype=torch.bfloat16, device="trn"),
        lambda: torch.randn(5, 9, dtype=torch.complex64, device="trn"),
        lambda: torch.randint(0, 9, (100,), dtype=torch.float32, device="trn"),
        lambda: torch.randint(0, 1 << 40, (100,), device="trn"),
        lambda: torch.randperm(100, device="trn"),
        lambda: weight.exponential_(),
        lambda: weight.geometric_(0.5),
        lambda: weight.cauchy_(),
        lambda: weight.log_normal_(),
        lambda: F.dropout(weight, 0.2),
        lambda: F.rrelu(weight, training=False),
        lambda: torch.rand(3, device="trn"),
    ):
        draw()
        yield


MODELS = (gpt2, llama, convolutional, recurrent, scaled, attention, initialised)


def main() -> None:
    """Runs the model that is named first."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    model = next(model for model in MODELS if model.__name__ == sys.argv[1])
    for _ in model():
        stats = torch.trn.memory_stats()
        names = ("allocated_bytes.all.current", "reserved_bytes.all.current")
        peak = stats["requested_bytes.all.peak"]
        draws = torch.trn.get_rng_state().view(torch.int64)[1].item()
        clocks = (_C.stream_clock_ps(0), _C.host_clock_ps())
        print(*(stats[name] for name in names), peak, *clocks, draws)


if __name__ == "__main__":
    main()
