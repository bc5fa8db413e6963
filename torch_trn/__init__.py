"""A simulated AWS Trainium as the PyTorch device `trn`: real values, simulated time.

    import torch

    model = torch.nn.Linear(1024, 1024).to("trn")
    with torch_trn.profile() as prof:
        model(torch.randn(64, 1024, device="trn"))
    print(prof.table())

Importing torch is enough (it finds this package through its entry point); `import torch_trn` does
the same and gives the names below.
"""

from typing import Any


def _autoload() -> None:
    """Called by `import torch`, which finds it through the `torch.backends` entry point.

    Importing this package has done the work. When the package is imported first, torch comes here
    while that import is under way: it then goes on by itself.
    """


import torch  # noqa: E402  torch may call _autoload from here, so it has to exist before

from torch_trn import _C  # noqa: E402

_C.install()

from torch_trn import eager, trn  # noqa: E402  they need the installed device
from torch_trn.config import Config, configure, override  # noqa: E402
from torch_trn.errors import CapacityError, TrnError, UnsupportedOpError  # noqa: E402
from torch_trn.sharing import refuse_sharing  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "CapacityError",
    "Config",
    "TrnError",
    "UnsupportedOpError",
    "configure",
    "estimate",
    "override",
    "profile",
]

torch._register_device_module("trn", trn)
torch.utils.generate_methods_for_privateuse1_backend(
    for_tensor=True, for_module=True, for_packed_sequence=True, for_storage=True
)
trn.methods.check_indices()
trn.parameters.keep()
trn.methods.show_missing_values()
trn.methods.truncate_without_values()
refuse_sharing()
eager.start()


def __getattr__(name: str) -> Any:
    """The profiler is imported when it is first used: `import torch` should stay quick."""
    if name in ("estimate", "profile", "profiler"):
        import importlib

        profiler = importlib.import_module("torch_trn.profiler")
        return profiler if name == "profiler" else getattr(profiler, name)
    raise AttributeError(f"module 'torch_trn' has no attribute {name!r}")
