"""Module paths and Python stacks of operators; needs no device, only the calls it would get."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torch_trn.profiler.module_path import ModulePaths
from torch_trn.profiler.python_stack import PythonStacks


class Device:
    """Keeps the module id of each thread and what was current when an operator ran."""

    def __init__(self) -> None:
        self.thread = threading.local()
        self.seen: list[int] = []

    def set_module(self, module_id: int) -> int:
        before = getattr(self.thread, "module_id", 0)
        self.thread.module_id = module_id
        return before

    def run_operator(self) -> None:
        self.seen.append(getattr(self.thread, "module_id", 0))


DEVICE = Device()


class Leaf(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        DEVICE.run_operator()
        return x * 2


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ArithmeticError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Leaf()
        self.mlp = nn.Sequential(Leaf(), Leaf())

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp(self.attn(x))
        DEVICE.run_operator()
        return x


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def encode(self, x: Tensor) -> Tensor:
        return self.layers[1](x)


@pytest.fixture
def paths() -> Iterator[ModulePaths]:
    DEVICE.seen = []
    DEVICE.thread = threading.local()
    paths = ModulePaths(DEVICE.set_module)
    paths.start()
    yield paths
    paths.stop()


def seen(paths: ModulePaths) -> list[str]:
    names = [paths.names[module_id] for module_id in DEVICE.seen]
    DEVICE.seen = []
    return names


def block_paths(block: str) -> list[str]:
    return [f"{block}.attn", f"{block}.mlp.0", f"{block}.mlp.1", block]


def test_paths_of_a_model(paths: ModulePaths) -> None:
    model = Stack()
    model(torch.ones(1))
    DEVICE.run_operator()
    expected = [*block_paths("model.layers.0"), *block_paths("model.layers.1"), ""]
    assert seen(paths) == expected
    model(torch.ones(1))
    DEVICE.run_operator()
    assert seen(paths) == expected, "the second call has the same ids"


def test_a_model_is_named_by_its_outermost_variable(paths: ModulePaths) -> None:
    def run(callee: nn.Module) -> None:
        callee(torch.ones(1))

    generator, discriminator = Leaf(), Leaf()
    run(generator)
    run(discriminator)
    run(Leaf())
    assert seen(paths) == ["generator", "discriminator", "callee"]


def test_a_model_held_by_an_object(paths: ModulePaths) -> None:
    class Trainer:
        def __init__(self) -> None:
            self.net = Leaf()

        def step(self) -> None:
            self.net(torch.ones(1))

    Trainer().step()
    assert seen(paths) == ["net"]


def test_a_method_that_is_not_forward(paths: ModulePaths) -> None:
    model = Stack()
    model.encode(torch.ones(1))
    assert seen(paths) == block_paths("model.layers.1")


def test_a_module_without_a_variable_is_named_by_its_class(paths: ModulePaths) -> None:
    Leaf()(torch.ones(1))
    assert seen(paths) == ["Leaf"]


def test_an_error_leaves_no_module_behind(paths: ModulePaths) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bad = Failing()
            self.good = Leaf()

        def forward(self, x: Tensor) -> Tensor:
            try:
                self.bad(x)
            except ArithmeticError:
                DEVICE.run_operator()
            return self.good(x)

    model, bad = Model(), Failing()
    model(torch.ones(1))
    with pytest.raises(ArithmeticError):
        bad(torch.ones(1))
    DEVICE.run_operator()
    assert seen(paths) == ["model", "model.good", ""]


def test_a_module_that_is_shared_or_calls_itself(paths: ModulePaths) -> None:
    class Recursive(nn.Module):
        def __init__(self, shared: nn.Module) -> None:
            super().__init__()
            self.first = self.second = shared

        def forward(self, x: Tensor, depth: int = 1) -> Tensor:
            x = self.second(x)
            return self(x, depth - 1) if depth else x

    model = Recursive(Leaf())
    model(torch.ones(1))
    DEVICE.run_operator()
    assert seen(paths) == ["model.first", "model.first", ""]


def test_a_module_added_after_the_first_call(paths: ModulePaths) -> None:
    model = nn.Sequential(Leaf())
    model(torch.ones(1))
    model.append(Leaf())
    model(torch.ones(1))
    assert seen(paths) == ["model.0", "model.0", "model.1"]


def test_recomputation_in_another_thread_keeps_the_path(paths: ModulePaths) -> None:
    model = Stack()
    x = torch.ones(1, requires_grad=True)
    y = checkpoint(model, x, use_reentrant=True)
    expected = seen(paths)
    thread = threading.Thread(target=y.backward)
    thread.start()
    thread.join()
    assert expected == [*block_paths("model.layers.0"), *block_paths("model.layers.1")]
    assert seen(paths) == expected


def test_nothing_is_left_after_the_end() -> None:
    DEVICE.seen = []
    paths = ModulePaths(DEVICE.set_module)
    paths.start()
    model = Leaf()
    model(torch.ones(1))
    paths.stop()
    model(torch.ones(1))
    assert seen(paths) == ["model", ""]


def test_stacks_hold_the_users_frames_only() -> None:
    stacks = PythonStacks()
    ids: list[int] = []

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            ids.append(stacks.capture())
            return x

    model = Model()
    for _ in range(2):
        model(torch.ones(1))
    model(torch.ones(1))
    assert ids[0] == ids[1] != ids[2], "a stack is kept once"
    innermost, caller = stacks.texts()[ids[0]][:2]
    file = __file__
    prefix = "test_stacks_hold_the_users_frames_only"
    assert innermost.startswith(f"{file}:")
    assert innermost.endswith(f" {prefix}.<locals>.Model.forward")
    assert caller.startswith(f"{file}:") and caller.endswith(f" {prefix}")
    assert stacks.texts()[0] == ()
