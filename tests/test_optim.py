"""Optimizers on trn: parameters, states and memory are those of the CPU with the same options."""

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

import torch_trn

pytestmark = pytest.mark.filterwarnings("error::torch_trn.errors.LoweringWarning")

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "ASGD": {},
    "Adadelta": {},
    "Adafactor": {},
    "Adagrad": {},
    "Adam": {},
    "AdamW": {},
    "Adamax": {},
    "LBFGS": {},
    "Muon": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {},
    "Rprop": {},
    "SGD": {},
}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "ASGD": [{"weight_decay": 0.1}, {"maximize": True}],
    "Adadelta": [{"weight_decay": 0.1}],
    "Adagrad": [{"lr_decay": 0.1, "weight_decay": 0.1}],
    "Adam": [{"amsgrad": True, "weight_decay": 0.1}, {"maximize": True}],
    "AdamW": [{"amsgrad": True}, {"betas": (0.8, 0.9), "eps": 1e-4}],
    "NAdam": [{"weight_decay": 0.1, "decoupled_weight_decay": True}],
    "RMSprop": [{"centered": True, "momentum": 0.9}],
    "SGD": [{"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, {"maximize": True}],
}


def supports(name: str, option: str) -> bool:
    return option in inspect.signature(getattr(torch.optim, name)).parameters


def model_on(device: str, name: str = "") -> nn.Module:
    """The same weights on every device. Muon takes matrices only."""
    torch.manual_seed(2)
    bias = name != "Muon"
    model = nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias))
    return model.to(device)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    device = next(model.parameters()).device
    x = torch.linspace(-1, 1, 48).view(8, 6).to(device)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def trained(name: str, device: str, **options: Any) -> list[Tensor]:
    """Parameters, then every tensor of the optimizer's state, after some steps."""
    model = model_on(device, name)
    optimizer = getattr(torch.optim, name)(model.parameters(), **options)
    train(model, optimizer)
    states = [
        value
        for state in optimizer.state_dict()["state"].values()
        for key, value in sorted(state.items())
        if isinstance(value, Tensor)
    ]
    return [tensor.detach().cpu() for tensor in (*model.parameters(), *states)]


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float = 0) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_defaults(name: str) -> None:
    """On trn the default is foreach, as on CUDA; on the CPU it is a loop."""
    foreach = {"foreach": True} if supports(name, "foreach") and name != "Adafactor" else {}
    assert_same(trained(name, "trn"), trained(name, "cpu", **foreach))


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if supports(name, "foreach")])
def test_foreach(name: str, foreach: bool) -> None:
    for options in ({}, *OPTIONS.get(name, [])):
        options = {"foreach": foreach} | options
        assert_same(trained(name, "trn", **options), trained(name, "cpu", **options))


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if supports(name, "fused")])
def test_fused(name: str) -> None:
    for options in ({}, *OPTIONS.get(name, [])):
        options = {"fused": True} | options
        assert_same(trained(name, "trn", **options), trained(name, "cpu", **options))


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if supports(name, "capturable")])
def test_capturable(name: str, foreach: bool) -> None:
    """The CPU has no such form; it computes step-dependent factors as tensors in float32."""
    options: dict[str, Any] = {"foreach": foreach}
    actual = trained(name, "trn", capturable=True, **options)
    assert_same(actual, trained(name, "cpu", **options), tolerance=2e-6)


def test_capturable_keeps_its_step_on_the_device() -> None:
    for capturable, device in ((True, "trn"), (False, "cpu")):
        model = model_on("trn")
        optimizer = torch.optim.Adam(model.parameters(), capturable=capturable)
        train(model, optimizer, steps=2)
        (step,) = {state["step"].item() for state in optimizer.state.values()}
        assert step == 2.0
        assert {state["step"].device.type for state in optimizer.state.values()} == {device}


def test_sparse_adam_says_why_it_cannot() -> None:
    table = nn.Embedding(4, 2, sparse=True).to("trn")
    torch.optim.SparseAdam(table.parameters())
    with pytest.raises(NotImplementedError, match="sparse, nested and quantized tensors are not"):
        table(torch.tensor([1], device="trn")).sum().backward()


def peak_bytes_of_a_step(**options: Any) -> tuple[int, int]:
    """How far one step of AdamW raises HBM's peak over the level before, and one parameter list."""
    parameters = [nn.Parameter(torch.ones(1024, 64, device="trn")) for _ in range(4)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(parameters, **options)
    optimizer.step()
    before = torch.trn.memory_allocated()
    torch.trn.reset_peak_memory_stats()
    optimizer.step()
    assert torch.trn.memory_allocated() == before
    return torch.trn.max_memory_allocated() - before, sum(4 * p.numel() for p in parameters)


def test_temporaries_are_seen_in_hbm() -> None:
    """foreach holds a list of temporaries as large as the parameters, on trn as on CUDA."""
    peak_bytes, list_bytes = peak_bytes_of_a_step(foreach=True)
    assert list_bytes <= peak_bytes <= 2 * list_bytes
    peak_bytes, list_bytes = peak_bytes_of_a_step(foreach=False)
    assert peak_bytes < list_bytes
    assert peak_bytes_of_a_step(fused=True)[0] == 0
    assert peak_bytes_of_a_step() == peak_bytes_of_a_step(foreach=True)


def names_of_a_step(**options: Any) -> list[str]:
    model = model_on("trn")
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    train(model, optimizer, steps=1)
    with torch_trn.profile() as prof:
        optimizer.step()
    assert not any(record["host"] for record in prof.records())
    return [record["name"] for record in prof.records()]


def test_a_step_arrives_whole() -> None:
    fused = names_of_a_step(fused=True)
    assert fused == ["aten::_foreach_add_.Scalar", "aten::_fused_adamw_"], "step counts, then all"
    foreach = names_of_a_step(foreach=True)
    assert foreach and all(name.startswith("aten::_foreach_") for name in foreach)
    assert len(foreach) < len(names_of_a_step(foreach=False))


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop", "LBFGS"])
@pytest.mark.parametrize("there, back", [("trn", "cpu"), ("cpu", "trn"), ("trn", "trn:1")])
def test_state_dict_round_trip(name: str, there: str, back: str, tmp_path: Any) -> None:
    """Half the steps on one device, the state saved, the other half on another device."""
    options = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    if name != "LBFGS":
        options["foreach"] = True
    first = model_on(there)
    optimizer = getattr(torch.optim, name)(first.parameters(), **options)
    train(first, optimizer, steps=2)
    torch.save([first.state_dict(), optimizer.state_dict()], tmp_path / "state")
    weights, state = torch.load(tmp_path / "state", map_location=back)
    second = model_on(back)
    second.load_state_dict(weights)
    resumed = getattr(torch.optim, name)(second.parameters(), **options)
    resumed.load_state_dict(state)
    train(second, resumed, steps=2)
    straight = model_on("cpu")
    optimizer = getattr(torch.optim, name)(straight.parameters(), **options)
    train(straight, optimizer, steps=4)
    for expected, actual in zip(straight.parameters(), second.parameters(), strict=True):
        assert actual.device == torch.device(back if ":" in back else f"{back}:0") or back == "cpu"
        assert torch.equal(actual.cpu(), expected)


def test_parameters_of_several_devices_and_dtypes() -> None:
    def step(device: str, second: str) -> list[Tensor]:
        parameters = [
            torch.ones(3, device=device, requires_grad=True),
            torch.ones(2, 2, device=second, requires_grad=True),
            torch.ones(4, device=device, dtype=torch.bfloat16, requires_grad=True),
        ]
        optimizer = torch.optim.AdamW(parameters, lr=0.1, foreach=True)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = parameter.detach() * 2
            optimizer.step()
        return [parameter.detach().cpu() for parameter in parameters]

    assert_same(step("trn:0", "trn:1"), step("cpu", "cpu"))


@pytest.mark.parametrize("device", ["cpu", "trn"])
@pytest.mark.parametrize("options", [{"fused": True}, {"capturable": True, "foreach": True}])
def test_learning_rate_as_a_tensor(device: str, options: dict[str, bool]) -> None:
    def run(rate: Any) -> list[Tensor]:
        model = model_on("trn")
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, **options)
        train(model, optimizer, steps=2)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * 0.5
        train(model, optimizer, steps=2)
        return [parameter.detach().cpu() for parameter in model.parameters()]

    assert_same(run(torch.tensor(0.125, device=device)), run(0.125), tolerance=1e-6)


def test_schedulers() -> None:
    models = [model_on(device) for device in ("cpu", "trn")]
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        cosine = CosineAnnealingLR(optimizer, T_max=4)
        plateau = ReduceLROnPlateau(optimizer, patience=0)
        for _ in range(4):
            train(model, optimizer, steps=1)
            cosine.step()
            plateau.step(next(model.parameters()).detach().sum())
    assert_same([p.detach().cpu() for p in models[1].parameters()], [*models[0].parameters()])


def test_averaged_model() -> None:
    def averaged(device: str) -> list[Tensor]:
        model = model_on(device)
        average = AveragedModel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(3):
            train(model, optimizer, steps=1)
            average.update_parameters(model)
        return [parameter.detach().cpu() for parameter in average.parameters()]

    assert_same(averaged("trn"), averaged("cpu"), tolerance=1e-6)


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_clip_grad_norm(norm_type: float, foreach: bool | None) -> None:
    def clipped(device: str) -> list[Tensor]:
        model = model_on(device)
        for index, parameter in enumerate(model.parameters()):
            parameter.grad = parameter.detach() * (index + 1)
        before = [parameter.grad.clone() for parameter in model.parameters()]
        norm = clip_grad_norm_(model.parameters(), 0.5, norm_type=norm_type, foreach=foreach)
        assert norm.device.type == device
        assert torch.equal(get_total_norm(before, norm_type, foreach=foreach), norm)
        return [norm.cpu(), *(parameter.grad.cpu() for parameter in model.parameters())]

    assert_same(clipped("trn"), clipped("cpu"))


def test_clip_grad_norm_over_devices_and_errors() -> None:
    parameters = [torch.zeros(2, device=f"trn:{index}", requires_grad=True) for index in range(3)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 2.0)
    norm = clip_grad_norm_(parameters, 1.0)
    assert norm.item() == torch.full((2,), 2.0).norm().expand(3).norm().item()
    assert [parameter.grad.device.index for parameter in parameters] == [0, 1, 2]
    parameters[0].grad.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="is non-finite, so it cannot be clipped"):
        clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    clip_grad_value_(parameters[1:], 0.25)
    assert parameters[1].grad.tolist() == [0.25, 0.25]


@pytest.mark.parametrize("fused", [True, False])
def test_grad_scaler(fused: bool) -> None:
    """Steps with infinite gradients are left out and the scale follows them, as on the CPU."""

    def run(device: str) -> tuple[list[float], list[Tensor], dict[str, Any]]:
        model = model_on(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused, foreach=False)
        scaler = torch.amp.GradScaler(device, init_scale=8.0, growth_interval=2)
        scales = []
        for step in range(6):
            optimizer.zero_grad()
            loss = model(torch.ones(2, 6, device=device)).square().sum()
            scaler.scale(loss * float("inf") if step in (1, 4) else loss).backward()
            if step % 2:
                scaler.unscale_(optimizer)
                clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        parameters = [parameter.detach().cpu() for parameter in model.parameters()]
        return scales, parameters, scaler.state_dict()

    (scales, parameters, state), expected = run("trn"), run("cpu")
    assert scales == expected[0] == [8.0, 4.0, 4.0, 8.0, 4.0, 4.0]
    assert_same(parameters, expected[1])
    assert state == expected[2]
    scaler = torch.trn.amp.GradScaler()
    scaler.load_state_dict(state)
    assert scaler.get_scale() == 4.0 and scaler.is_enabled()


def test_a_grad_scaler_step_runs_on_the_device() -> None:
    """It takes the inverse of its scale in float64, of which no engine has more than a number."""
    model = model_on("trn")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("trn", init_scale=7.0)
    with torch_trn.profile() as prof:
        scaler.scale(model(torch.ones(2, 6, device="trn")).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert not [record["name"] for record in prof.records() if record["host"]]
    assert "aten::reciprocal" in {record["name"] for record in prof.records()}
    double = torch.tensor(7.0, device="trn").double().reciprocal().float()
    assert double.cpu() == torch.tensor(7.0).double().reciprocal().float()


def test_an_optimizer_copies_with_its_model() -> None:
    model = model_on("trn")
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, steps=1)
    twin, its_optimizer = copy.deepcopy((model, optimizer))
    train(model, optimizer, steps=1)
    train(twin, its_optimizer, steps=1)
    assert_same([*twin.parameters()], [*model.parameters()])
