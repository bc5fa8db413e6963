"""Modules on trn against the CPU: results, gradients of inputs and parameters, buffers.

They are the CPU's bit for bit, but for RNNs: on an accelerator torch runs their cells as fused
operators, whose sums come in another order than in the CPU's oneDNN layers.
"""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

pytestmark = [
    pytest.mark.filterwarnings("error::torch_trn.errors.LoweringWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]

RNN_TOLERANCE = 2e-6


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same numbers for the same shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=dtype)


def run(function: Callable[..., Any], inputs: tuple[Any, ...], device: str) -> list[Tensor]:
    """Results of `function` on `device` and the gradients of its floating inputs.

    A module's parameters and buffers follow. Outputs are weighted so that none are equal.
    """
    if isinstance(function, nn.Module):
        function = copy.deepcopy(function).to(device)
    moved = [
        x.detach().to(device).requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x
        for x in inputs
    ]
    torch.manual_seed(5)  # of dropout
    results = [x for x in tree_leaves(function(*moved)) if isinstance(x, Tensor)]
    outputs = [x for x in results if x.requires_grad]
    weights = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape) for x in outputs]
    torch.autograd.backward(outputs, [weight.to(device) for weight in weights])
    leaves = [x for x in moved if isinstance(x, Tensor)]
    if isinstance(function, nn.Module):
        leaves += [*function.parameters(), *function.buffers()]
    grads = [x.grad for x in leaves if x.grad is not None]
    assert all(x.device.type == device for x in (*results, *grads))
    return [x.detach().cpu() for x in (*results, *grads, *leaves)]


def check(function: Callable[..., Any], *inputs: Any, tolerance: float = 0) -> None:
    expected, actual = run(function, inputs, "cpu"), run(function, inputs, "trn")
    assert len(actual) == len(expected)
    for want, got in zip(expected, actual, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(1)


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "stride and padding": {"stride": 2, "padding": 1},
    "dilation": {"dilation": 2},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "out_channels": 8},
}


@pytest.mark.parametrize("options", CONVOLUTIONS)
@pytest.mark.parametrize("transposed", ["", "Transpose"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolution(dims: int, transposed: str, options: str) -> None:
    module = getattr(nn, f"Conv{transposed}{dims}d")
    keywords = {"in_channels": 4, "out_channels": 6, "kernel_size": 3} | CONVOLUTIONS[options]
    check(module(**keywords), randn(2, 4, *(9, 8, 7)[:dims]))


def test_convolution_forms() -> None:
    check(nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), randn(1, 4, 5, 5))
    check(nn.Conv2d(4, 6, 3, padding="same", dilation=2), randn(1, 4, 8, 8))
    check(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), randn(1, 4, 5, 5))
    check(nn.Conv2d(4, 6, (1, 3), stride=(2, 1)), randn(4, 8, 8))  # no batch
    check(nn.Conv2d(4, 6, 1), randn(0, 4, 5, 5))
    check(nn.Conv2d(4, 6, 3).double(), randn(1, 4, 5, 5, dtype=torch.float64))
    check(nn.Conv2d(4, 6, 3).bfloat16(), randn(1, 4, 5, 5, dtype=torch.bfloat16))
    check(nn.Conv2d(4, 6, 3).requires_grad_(False), randn(1, 4, 5, 5))
    with pytest.raises(RuntimeError, match=r"expected input\[1, 3, 5, 5\] to have 4 channels"):
        nn.Conv2d(4, 6, 3).to("trn")(torch.ones(1, 3, 5, 5, device="trn"))


@pytest.mark.parametrize("module", [nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(4, 8, 3, stride=2)])
def test_convolution_in_channels_last(module: nn.Module) -> None:
    module = module.to(memory_format=torch.channels_last)
    x = randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    check(module, x)
    result = module.to("trn")(x.to("trn"))
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert result.stride() == copy.deepcopy(module).to("cpu")(x).stride()


def attention(lengths: tuple[int, int] = (6, 6), heads: int = 4, **options: Any) -> None:
    """Checks attention; options that are tensors count as inputs."""
    dtype = options.pop("dtype", torch.float32)
    queries, keys = lengths
    q, k, v = (
        randn(2, count, length, 16, dtype=dtype) * scale
        for count, length, scale in ((4, queries, 1), (heads, keys, 2), (heads, keys, 3))
    )
    mask = options.pop("attn_mask", None)
    check(
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options),
        *(q, k, v, mask),
    )


def test_attention() -> None:
    attention()
    attention(is_causal=True)
    attention((5, 9), is_causal=True)
    attention(scale=0.3)
    attention(dropout_p=0.5)
    attention(attn_mask=torch.ones(6, 6).tril().bool())
    attention(attn_mask=torch.tensor([[True, False]] * 6).repeat(1, 3))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        attention(is_causal=True, dtype=dtype)


def test_attention_of_grouped_queries() -> None:
    attention(heads=2, enable_gqa=True)
    attention(heads=1, enable_gqa=True, is_causal=True, scale=0.2)
    attention(heads=2, enable_gqa=True, attn_mask=torch.ones(6, 6).tril().bool())


@pytest.mark.parametrize("shape", [(6, 6), (2, 4, 6, 6), (1, 1, 6, 6), (2, 1, 1, 6)])
def test_attention_gradient_of_the_mask(shape: tuple[int, ...]) -> None:
    attention(attn_mask=randn(*shape))


def test_attention_mask_without_gradient() -> None:
    mask = randn(2, 1, 6, 6)

    def biased(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask.to(q.device))

    check(biased, randn(2, 4, 6, 16))


def test_attention_takes_one_fused_operator() -> None:
    import torch_trn

    q = randn(1, 2, 8, 16).to("trn").requires_grad_()
    with torch_trn.profile() as prof:
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    names = [record["name"] for record in prof.records()]
    assert names == ["aten::_scaled_dot_product_flash_attention_for_cpu"]


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.OVERRIDEABLE])
def test_attention_with_a_chosen_backend(backend: SDPBackend) -> None:
    q = randn(1, 2, 8, 16)
    expected = F.scaled_dot_product_attention(q, q, q)
    with sdpa_kernel(backend):
        result = F.scaled_dot_product_attention(q.to("trn"), q.to("trn"), q.to("trn"))
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-6, atol=1e-6)


RNNS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
RNN_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bidirectional": {"bidirectional": True},
    "two layers": {"num_layers": 2},
    "no bias": {"bias": False},
    "batch first": {"batch_first": True},
    "all": {"num_layers": 2, "bidirectional": True, "bias": False, "batch_first": True},
}


@pytest.mark.parametrize("options", RNN_OPTIONS)
@pytest.mark.parametrize("name", RNNS)
def test_rnn(name: str, options: str) -> None:
    module = RNNS[name](5, 7, **RNN_OPTIONS[options])
    check(module, randn(4, 3, 5), tolerance=RNN_TOLERANCE)


@pytest.mark.parametrize("name", RNNS)
def test_rnn_dropout_between_layers(name: str) -> None:
    check(RNNS[name](5, 7, 3, dropout=0.5), randn(4, 3, 5), tolerance=RNN_TOLERANCE)


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 7, proj_size=3)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
        return self.lstm(x, (h, c))


def test_rnn_initial_state() -> None:
    check(nn.GRU(5, 7), randn(4, 3, 5), randn(1, 3, 7), tolerance=RNN_TOLERANCE)
    inputs = randn(4, 3, 5), randn(1, 3, 3), randn(1, 3, 7)
    check(Projected(), *inputs, tolerance=RNN_TOLERANCE)


@pytest.mark.parametrize("name", RNNS)
def test_rnn_of_packed_sequences(name: str) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = RNNS[name](5, 7, bidirectional=True)

        def forward(self, x: Tensor) -> list[Tensor]:
            packed = pack_padded_sequence(x, torch.tensor([2, 4, 3]), enforce_sorted=False)
            result, state = self.rnn(packed)
            return [*pad_packed_sequence(result), *tree_leaves(state)]

    def on(device: str) -> list[Tensor]:
        module, x = copy.deepcopy(model).to(device), randn(4, 3, 5).to(device).requires_grad_()
        result, lengths, *state = module(x)
        result.square().sum().backward()
        assert lengths.tolist() == [2, 4, 3] and lengths.device.type == "cpu"
        grads = [x.grad, *(p.grad for p in module.parameters())]
        return [t.detach().cpu() for t in (result, *state, *grads)]

    model = Packed()
    torch.testing.assert_close(on("trn"), on("cpu"), rtol=RNN_TOLERANCE, atol=RNN_TOLERANCE)


def test_packed_sequences_move() -> None:
    packed = pack_padded_sequence(randn(4, 2, 3), torch.tensor([4, 2]))
    for moved in (packed.to("trn"), packed.trn()):
        assert isinstance(moved, PackedSequence) and moved.data.is_trn
        assert moved.batch_sizes.device.type == "cpu"
        assert torch.equal(moved.cpu().data, packed.data)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cell(cell: type[nn.RNNCellBase], bias: bool) -> None:
    check(cell(5, 7, bias=bias), randn(3, 5), tolerance=RNN_TOLERANCE)  # type: ignore[call-arg]


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell])
def test_cell_double_backward(cell: type[nn.RNNCellBase]) -> None:
    def second(device: str) -> list[Tensor]:
        module, x = copy.deepcopy(model).to(device), randn(2, 3).to(device).requires_grad_()
        out = tree_leaves(module(x))[0]
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        return [x.grad.cpu(), *(p.grad.cpu() for p in module.parameters())]

    model = cell(3, 4)  # type: ignore[call-arg]
    torch.testing.assert_close(second("trn"), second("cpu"), rtol=1e-5, atol=RNN_TOLERANCE)


INDICES = torch.tensor([[1, 2, 4], [1, 9, 1]])


@pytest.mark.parametrize("options", [{}, {"padding_idx": 1}, {"scale_grad_by_freq": True}])
def test_embedding(options: dict[str, Any]) -> None:
    check(nn.Embedding(10, 4, **options), INDICES)
    check(nn.Embedding(10, 4, **options), INDICES.int())


def test_embedding_norm_and_errors() -> None:
    check(nn.Embedding(10, 4, max_norm=1.0), INDICES)
    with pytest.raises(IndexError, match="index out of range in self"):
        nn.Embedding(10, 4).to("trn")(torch.tensor([10], device="trn"))
    sparse = nn.Embedding(10, 4, sparse=True).to("trn")
    with pytest.raises(NotImplementedError, match="sparse, nested and quantized tensors are not"):
        sparse(INDICES.to("trn")).sum().backward()


BAGS = list(itertools.product(["sum", "mean", "max"], [None, 4], [False, True]))


@pytest.mark.parametrize("mode, padding_idx, last", BAGS)
def test_embedding_bag(mode: str, padding_idx: int | None, last: bool) -> None:
    indices = torch.tensor([1, 2, 4, 5, 4, 3])
    offsets = torch.tensor([0, 2, 2, 5, 6] if last else [0, 2, 2, 5])
    module = nn.EmbeddingBag(10, 4, mode=mode, padding_idx=padding_idx, include_last_offset=last)
    check(module, indices, offsets)
    check(nn.EmbeddingBag(10, 4, mode=mode, padding_idx=padding_idx), INDICES)


def test_embedding_bag_with_weights() -> None:
    offsets = torch.tensor([0, 2])
    check(nn.EmbeddingBag(10, 4, mode="sum"), INDICES.flatten(), offsets, randn(6))
    check(nn.EmbeddingBag(10, 4, max_norm=1.0, scale_grad_by_freq=True), INDICES)


NORMS: dict[str, nn.Module] = {
    "batch": nn.BatchNorm2d(4),
    "batch, plain": nn.BatchNorm2d(4, affine=False, track_running_stats=False),
    "batch, cumulative": nn.BatchNorm2d(4, momentum=None),
    "group": nn.GroupNorm(2, 4),
    "instance": nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "layer": nn.LayerNorm((5, 5)),
    "layer, no bias": nn.LayerNorm(5, bias=False),
    "layer, plain": nn.LayerNorm(5, elementwise_affine=False),
    "rms": nn.RMSNorm(5),
    "local response": nn.LocalResponseNorm(2),
}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_norm(name: str, train: bool) -> None:
    module = NORMS[name].train(train)
    check(module, randn(3, 4, 5, 5))
    # Off the CPU, torch makes the input of group_norm contiguous, and so adds in another order.
    tolerance = 1e-5 if name == "group" else 0
    x = randn(3, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    check(module, x, tolerance=tolerance)


def test_batch_norm_keeps_its_statistics() -> None:
    twins = [nn.BatchNorm1d(4).to(device) for device in ("cpu", "trn")]
    for step in range(3):
        for module in twins:
            module(randn(5, 4).to(module.weight.device) * step)
    states = [module.state_dict() for module in twins]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(states[0][name], states[1][name].cpu())
        assert states[1][name].is_trn
    assert states[1]["num_batches_tracked"].item() == 3
    twins[1].eval()(randn(5, 4).to("trn"))
    assert twins[1].num_batches_tracked.item() == 3
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        twins[1].train()(torch.ones(1, 4, device="trn"))


LOSSES = {"reduction": "sum"}, {"reduction": "none"}, {"label_smoothing": 0.1}, {"ignore_index": 2}


@pytest.mark.parametrize("options", [{}, *LOSSES])
def test_cross_entropy(options: dict[str, Any]) -> None:
    check(nn.CrossEntropyLoss(**options), randn(4, 5), torch.tensor([1, 2, 0, 4]))
    check(nn.CrossEntropyLoss(**options), randn(2, 5, 3), torch.tensor([[1, 2, 0], [2, 3, 3]]))
    if "ignore_index" not in options:
        check(nn.CrossEntropyLoss(**options), randn(4, 5), randn(4, 5).softmax(1))


def test_cross_entropy_weights_and_errors() -> None:
    check(nn.CrossEntropyLoss(weight=torch.arange(5.0)), randn(4, 5), torch.tensor([1, 2, -100, 4]))
    with pytest.raises(IndexError, match="Target 9 is out of bounds."):
        F.cross_entropy(randn(1, 5).to("trn"), torch.tensor([9], device="trn"))
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        F.cross_entropy(randn(1, 5).to("trn"), torch.tensor([1]))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer(norm_first: bool, train: bool) -> None:
    options = {"dropout": 0.3, "norm_first": norm_first, "batch_first": True}
    layer = nn.TransformerEncoderLayer(16, 4, 32, activation="gelu", **options).train(train)
    check(layer, randn(2, 6, 16))
    check(nn.TransformerDecoderLayer(16, 4, 32, **options).train(train), *2 * [randn(2, 6, 16)])
    check(nn.MultiheadAttention(16, 4, 0.2).train(train), *3 * [randn(6, 2, 16)])


def test_transformer_without_gradients() -> None:
    """Torch's fused path for inference, which it takes on the CPU but not here, and padding."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)
    padding = torch.tensor([[False, False, True], [False, False, False]])
    x = randn(2, 3, 16)
    with torch.no_grad():
        encoder.eval()
        plain = encoder(x)
        padded = encoder(x, src_key_padding_mask=padding)
        encoder.to("trn")
        result = encoder(x.to("trn")).cpu()
        masked = encoder(x.to("trn"), src_key_padding_mask=padding.to("trn")).cpu()
    torch.testing.assert_close(result, plain, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(masked[~padding], padded[~padding], rtol=2e-6, atol=2e-6)
