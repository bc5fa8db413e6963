"""Small models of the families that people bring to an accelerator, with a batch for each.

Those that transformers has are made from its configurations; a UNet with attention and a DLRM are
written here. All of them return an object with a `loss`. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

hf.logging.set_verbosity_error()

VOCABULARY = 50
Batch = dict[str, Tensor]


def tokens(rows: int, length: int) -> Batch:
    """Random tokens that are to be predicted."""
    return {name: torch.randint(3, VOCABULARY, (rows, length)) for name in ("input_ids", "labels")}


def _decoder(**more: Any) -> dict[str, Any]:
    """Sizes that Llama and its relatives share: grouped queries, two layers."""
    return {
        "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY, **more,
    }  # fmt: skip


# -- language ------------------------------------------------------------------------------------
def gpt2() -> nn.Module:
    """Learned positions, LayerNorm, GELU, tied embeddings."""
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            n_layer=2,
            n_head=4,
            n_embd=32,
            vocab_size=VOCABULARY,
            n_positions=32,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=2,
        )  # fmt: skip
    )


def llama() -> nn.Module:
    """RoPE, RMSNorm, grouped queries, SwiGLU."""
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_decoder()))


def mixtral() -> nn.Module:
    """Llama with routed experts, which run as grouped matrix products."""
    return hf.MixtralForCausalLM(hf.MixtralConfig(**_decoder(), num_local_experts=4))


def mixtral_by_expert() -> nn.Module:
    """The same; a loop over the experts looks up each one's tokens."""
    config = hf.MixtralConfig(
        **_decoder(), num_local_experts=4, experts_implementation="eager"
    )  # fmt: skip
    return hf.MixtralForCausalLM(config)


def bert() -> nn.Module:
    """Masked tokens, attention in both directions."""
    return hf.BertForMaskedLM(
        hf.BertConfig(
            num_hidden_layers=2,
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=4,
            vocab_size=VOCABULARY,
            max_position_embeddings=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
    )


def t5() -> nn.Module:
    """Encoder and decoder, relative positions, RMSNorm."""
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            num_layers=2,
            d_model=32,
            d_ff=48,
            num_heads=4,
            d_kv=8,
            vocab_size=VOCABULARY,
            decoder_start_token_id=0,
            dropout_rate=0.0,
        )  # fmt: skip
    )


def mamba() -> nn.Module:
    """Depthwise convolutions and a selective scan."""
    return hf.MambaForCausalLM(
        hf.MambaConfig(num_hidden_layers=2, hidden_size=32, vocab_size=VOCABULARY, state_size=4)
    )


def masked_tokens() -> Batch:
    """Two texts of different lengths."""
    batch = tokens(2, 12)
    batch["attention_mask"] = (torch.arange(12) < torch.tensor([[12], [9]])).long()
    return batch


# -- images and sound ----------------------------------------------------------------------------
def vit() -> nn.Module:
    """Patches of an image as tokens."""
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            num_hidden_layers=2,
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
            num_labels=10,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
    )


def resnet50() -> nn.Module:
    """The 50 layers of ResNet-50 (3, 4, 6 and 3 bottlenecks) with few channels."""
    return hf.ResNetForImageClassification(
        hf.ResNetConfig(
            embedding_size=8,
            hidden_sizes=[16, 16, 32, 32],
            depths=[3, 4, 6, 3],
            num_labels=10,
            layer_type="bottleneck",
        )  # fmt: skip
    )


def images(size: int) -> Batch:
    """Random images and their classes."""
    return {"pixel_values": torch.randn(2, 3, size, size), "labels": torch.randint(0, 10, (2,))}


def whisper() -> nn.Module:
    """Convolutions over a spectrogram, then encoder and decoder."""
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            encoder_layers=2,
            decoder_layers=2,
            d_model=32,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            vocab_size=VOCABULARY,
            max_source_positions=16,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            num_mel_bins=8,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )  # fmt: skip
    )


def sound() -> Batch:
    """A random spectrogram and its text."""
    return {
        "input_features": torch.randn(2, 8, 32),
        "labels": torch.randint(3, VOCABULARY, (2, 8)),
    }


class Residual(nn.Module):
    """Two convolutions with group norms; the time is added between them."""

    def __init__(self, channels: int, out: int, time: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(4, channels), nn.GroupNorm(4, out)])
        self.first = nn.Conv2d(channels, out, 3, padding=1)
        self.second = nn.Conv2d(out, out, 3, padding=1)
        self.time = nn.Linear(time, out)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.first(F.silu(self.norms[0](x))) + self.time(F.silu(time))[:, :, None, None]
        return self.skip(x) + self.second(F.silu(self.norms[1](y)))


class Attention2d(nn.Module):
    """Self-attention over the pixels of an image."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(4, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows, channels, height, width = x.shape
        parts = self.qkv(self.norm(x)).reshape(rows, 3, self.heads, -1, height * width)
        q, k, v = parts.transpose(-1, -2).unbind(1)
        y = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        return x + self.out(y.reshape(rows, channels, height, width))


class UNet(nn.Module):
    """Predicts the noise of an image at a time: down, attention in the middle, up again."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        time = 2 * width
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.down = Residual(width, width, time)
        self.shrink = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = Residual(2 * width, 2 * width, time)
        self.attention = Attention2d(2 * width, 2)
        self.grow = nn.Conv2d(2 * width, width, 3, padding=1)
        self.up = Residual(2 * width, width, time)
        self.leave = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 3, 1))

    def forward(self, pixels: Tensor, time: Tensor, labels: Tensor) -> SimpleNamespace:
        half = self.width // 2
        rates = torch.exp(torch.arange(half, device=time.device) * (-4.0 / half))
        angles = time[:, None] * rates
        waves = torch.cat([angles.sin(), angles.cos()], 1)
        embedding = self.time(waves.to(pixels.dtype))
        x = self.down(self.enter(pixels), embedding)
        y = self.attention(self.middle(self.shrink(x), embedding))
        y = self.grow(F.interpolate(y, scale_factor=2.0, mode="nearest"))
        y = self.leave(self.up(torch.cat([x, y], 1), embedding))
        return SimpleNamespace(loss=F.mse_loss(y, labels), logits=y)


def noisy_images() -> Batch:
    """Images, times, and the noise to be found."""
    return {
        "pixels": torch.randn(2, 3, 8, 8),
        "time": torch.rand(2),
        "labels": torch.randn(2, 3, 8, 8),
    }


# -- recommendation ------------------------------------------------------------------------------
class Dlrm(nn.Module):
    """Bags of categories and dense features; the products of all pairs decide on a click."""

    def __init__(self, tables: Iterable[int] = (40, 30, 20), width: int = 8) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(rows, width, mode="sum") for rows in tables)
        self.bottom = nn.Sequential(
            nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, width), nn.ReLU()
        )  # fmt: skip
        features = len(self.bags) + 1
        pairs = features * (features - 1) // 2
        self.top = nn.Sequential(nn.Linear(width + pairs, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(
        self, dense: Tensor, categories: Tensor, offsets: Tensor, labels: Tensor
    ) -> SimpleNamespace:
        x = self.bottom(dense)
        looked_up = [
            bag(numbers, offsets) for bag, numbers in zip(self.bags, categories, strict=True)
        ]
        features = torch.stack([x, *looked_up], 1)
        count = features.shape[1]
        below = torch.tril_indices(count, count, -1, device=features.device)
        pairs = torch.bmm(features, features.transpose(1, 2))[:, below[0], below[1]]
        logits = self.top(torch.cat([x, pairs], 1)).squeeze(1)
        return SimpleNamespace(
            loss=F.binary_cross_entropy_with_logits(logits, labels), logits=logits
        )


def clicks() -> Batch:
    """Four visitors with two categories of each kind."""
    return {
        "dense": torch.randn(4, 6),
        "categories": torch.randint(0, 20, (3, 8)),
        "offsets": torch.arange(0, 8, 2),
        "labels": torch.randint(0, 2, (4,)).float(),
    }


@dataclass(frozen=True)
class Family:
    """A model and its batch; ``prompt`` names the input that `generate` continues from."""

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    prompt: str = ""

    def make(self, seed: int = 0) -> tuple[nn.Module, Batch]:
        """The model and a batch on the CPU, the same ones for the same seed."""
        torch.manual_seed(seed)
        return self.model(), self.batch()

    def __str__(self) -> str:
        return self.name


FAMILIES = (
    Family("gpt2", gpt2, lambda: tokens(2, 12), "input_ids"),
    Family("llama", llama, lambda: tokens(2, 12), "input_ids"),
    Family("mixtral", mixtral, lambda: tokens(2, 12), "input_ids"),
    Family("mixtral_by_expert", mixtral_by_expert, lambda: tokens(2, 12), "input_ids"),
    Family("bert", bert, masked_tokens),
    Family("t5", t5, lambda: tokens(2, 12), "input_ids"),
    Family("vit", vit, lambda: images(16)),
    Family("resnet50", resnet50, lambda: images(64)),
    Family("unet", UNet, noisy_images),
    Family("whisper", whisper, sound, "input_features"),
    Family("mamba", mamba, lambda: tokens(2, 8), "input_ids"),
    Family("dlrm", Dlrm, clicks),
)


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum, decoupled weight decay."""

    def __init__(
        self, parameters: Iterable[Tensor], lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.01,
    ) -> None:  # fmt: skip
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            fast, slow = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                update = momentum.lerp(parameter.grad, 1 - fast).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"])
                momentum.lerp_(parameter.grad, 1 - slow)


OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    "lion": Lion,
}

SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "top-k": {"do_sample": True, "top_k": 10},
    "top-p": {"do_sample": True, "top_k": 0, "top_p": 0.9},
}
