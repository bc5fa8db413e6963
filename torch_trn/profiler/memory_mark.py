"""Tells the memory log of a profile which blocks are parameters, gradients and optimizer state.

Hooks of torch say so at the moments when it is known: a module is called or given a parameter, a
gradient has been accumulated, an optimizer steps. What is alive when the profile starts and ends is
looked up among all objects of the process.
"""

import gc
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_parameter_registration_hook,
)
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from torch_trn import _C
from torch_trn.profiler.memory import LogEvent, Mark


class MemoryMarks:
    """The memory log of one profile, and the hooks that mark its blocks."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._gradients = WeakIdKeyDictionary()

    def start(self, *, grows: bool) -> None:
        """Start the log. Must come before the hooks of `ModulePaths`, which say what is left.

        Args:
            grows: give a device that is full more HBM instead of an OutOfMemoryError.
        """
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
            register_module_parameter_registration_hook(self._register),
            register_module_buffer_registration_hook(self._register),
            register_optimizer_step_pre_hook(self._step),
            register_optimizer_step_post_hook(self._step),
        ]
        _C.memory_log_start(grows)
        self._mark_all()

    def stop(self) -> list[LogEvent]:
        """End the log and take all hooks away."""
        self._mark_all()
        for handle in (*self._handles, *self._gradients.values()):
            handle.remove()
        self._handles = []
        self._gradients = WeakIdKeyDictionary()
        return _C.memory_log_stop()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._module(module)

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        _C.leave_module()

    def _register(self, module: nn.Module, name: str, tensor: Any) -> None:
        self._parameter(tensor)

    def _step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._optimizer(optimizer)

    def _mark_all(self) -> None:
        """Mark what the process holds now."""
        for thing in gc.get_objects():
            kind = type(thing)  # isinstance would ask proxies, which may do anything
            if issubclass(kind, Tensor):
                if thing.device.type == "trn" and thing.requires_grad and thing.is_leaf:
                    self._parameter(thing)
            elif issubclass(kind, nn.Module) and "_parameters" in thing.__dict__:
                self._module(thing)
            elif issubclass(kind, Optimizer) and "state" in thing.__dict__:
                self._optimizer(thing)

    def _module(self, module: nn.Module) -> None:
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            self._parameter(tensor)

    def _optimizer(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._parameter(parameter)
        for state in optimizer.state.values():
            for leaf in tree_leaves(state):
                if isinstance(leaf, Tensor):
                    _C.mark_memory(leaf, Mark.OPTIMIZER_STATE)

    def _parameter(self, tensor: Any) -> None:
        if not isinstance(tensor, Tensor):
            return  # a module without one
        _C.mark_memory(tensor, Mark.PARAMETER)
        if not tensor.is_leaf or not tensor.requires_grad:
            return
        self._gradient(tensor)
        if tensor not in self._gradients:
            self._gradients[tensor] = tensor.register_post_accumulate_grad_hook(self._gradient)

    def _gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            _C.mark_memory(parameter.grad, Mark.GRADIENT)
