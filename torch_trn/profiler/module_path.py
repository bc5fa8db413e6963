"""Which module of a model an operator belongs to, as a path such as `model.layers.0.attn`.

Hooks on every module call keep, per thread, the stack of modules being called and tell the device
the path of the innermost one. The outermost module has no name of its own: it is called what the
outermost variable that holds it is called, or by its class.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

SetModule = Callable[[int], int]
"""Makes a module id that of the calling thread's operators; returns the id before."""


class ModulePaths:
    """The module paths of one profile, by id; id 0 is no module.

    Modules are held until `stop`, so that an `id()` cannot be used again for another one.
    """

    def __init__(self, set_module: SetModule) -> None:
        self.names: list[str] = [""]
        self._set_module = set_module
        self._ids: dict[str, int] = {"": 0}
        self._by_call: dict[tuple[int, int], int] = {}
        self._relative: dict[int, dict[int, str]] = {}
        self._seen: dict[int, int] = {}
        self._held: list[nn.Module] = []
        self._thread = threading.local()
        self._handles: list[Any] = []

    def start(self) -> None:
        """Hook every module call of the process."""
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]

    def stop(self) -> None:
        """Take the hooks away; operators of this thread belong to no module from here on."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._set_module(0)
        self._thread = threading.local()
        self._by_call, self._relative, self._seen, self._held = {}, {}, {}, []

    def _enter(self, module: nn.Module, args: Any) -> None:
        calls = self._calls()
        parent = calls[-1][0] if calls else None
        key = (id(parent), id(module))
        path_id = self._by_call.get(key)
        if path_id is None:
            path_id = self._by_call[key] = self._id_of(self._name(module, calls))
            self._held.append(module)
            self._seen.setdefault(id(module), path_id)
        calls.append((module, path_id, self._set_module(path_id)))

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        """Also called when `forward` raised. Calls that never came to their end are dropped."""
        calls = self._calls()
        depth = next((d for d in reversed(range(len(calls))) if calls[d][0] is module), None)
        if depth is not None:
            self._set_module(calls[depth][2])
            del calls[depth:]

    def _calls(self) -> list[tuple[nn.Module, int, int]]:
        """The calling thread's running module calls: module, its path's id, the id before."""
        if not hasattr(self._thread, "calls"):
            self._thread.calls = []
        calls: list[tuple[nn.Module, int, int]] = self._thread.calls
        return calls

    def _id_of(self, name: str) -> int:
        if name not in self._ids:
            self._ids[name] = len(self.names)
            self.names.append(name)
        return self._ids[name]

    def _name(self, module: nn.Module, calls: list[tuple[nn.Module, int, int]]) -> str:
        """Below the innermost running module that contains it, else as before, else as a root.

        'As before' is for what runs in the thread of a backward pass, such as the recomputation of
        a checkpointed block, where no caller is on the stack.
        """
        for caller, path_id, _ in reversed(calls):
            relative = self._name_within(caller, module)
            if relative is not None:
                return f"{self.names[path_id]}.{relative}" if relative else self.names[path_id]
        if id(module) in self._seen:
            return self.names[self._seen[id(module)]]
        return variable_name(module, sys._getframe(1)) or type(module).__name__

    def _name_within(self, caller: nn.Module, module: nn.Module) -> str | None:
        """The path of `module` below `caller` ('' for itself), None if it is not there."""
        names = self._relative.get(id(caller), {})
        if id(module) not in names:  # also a module that was added after the first call
            names = {id(child): name for name, child in caller.named_modules()}
            self._relative[id(caller)] = names
            self._held.append(caller)
        return names.get(id(module))


def variable_name(module: nn.Module, frame: FrameType | None) -> str | None:
    """What the outermost function or object among the callers that holds `module` calls it.

    In a method of a model (`self.encoder(x)` in `model.encode`) the path goes through the model.
    """
    found = None
    while frame is not None:
        found = _name_in(module, frame) or found
        frame = frame.f_back
    return found


def _name_in(module: nn.Module, frame: FrameType) -> str | None:
    for variables in (frame.f_locals, frame.f_globals):
        for name, value in list(variables.items()):
            if value is module and not name.startswith("_") and name not in ("self", "module"):
                return name
    owner = frame.f_locals.get("self")
    for name, value in _attributes(owner):
        if value is module and name:
            outer = variable_name(owner, frame.f_back) if isinstance(owner, nn.Module) else None
            return f"{outer}.{name}" if outer else name
    return None


def _attributes(owner: Any) -> Iterator[tuple[str, Any]]:
    """The submodules of a module with their paths, or the attributes of another object."""
    if isinstance(owner, nn.Module):
        yield from owner.named_modules()
    else:
        yield from getattr(owner, "__dict__", {}).items()
