"""Builds the two native modules: `torch_trn._sim` (torch-free) and `torch_trn._C` (the device)."""

import os
import re
from pathlib import Path

# torch would load the installed torch_trn, which this very build may be about to repair.
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"

import torchgen  # noqa: E402
from setuptools import Extension, setup  # noqa: E402
from torch.utils.cpp_extension import (  # noqa: E402
    BuildExtension,
    CppExtension,
    include_paths,
)

ROOT = Path(__file__).parent
SOURCES = Path("csrc_stubs")
GENERATED = Path("build/generated")
UNITS = {
    "unit_python": ("kineto", "predict", "price", "tile", "module"),
    "unit_values": ("corrections", "draws", "hollow", "layout", "values", "without_data"),
    "unit_eager": ("call", "eager", "registration", "typed_ops"),
    "unit_device": (
        "storage",
        "guard",
        "generator",
        "native_ops",
        "fused_ops",
        "own_values",
        "autocast",
    ),  # fmt: skip
}
FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]


def write_operator_table() -> None:
    """Writes the names of the operators that let 0-dim CPU tensors mix with device tensors.

    torch's own table marks them: those whose device check is left to TensorIterator.
    """
    table = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    names = []
    for block in table.read_text().split("\n- func: ")[1:]:
        if re.search(r"device_check: NoCheck.*TensorIterator", block):
            names.append(block.split("(", 1)[0])
    write_if_changed(
        "cpu_scalar_operators.inc", "".join(f'"aten::{name}",\n' for name in sorted(names))
    )


def write_if_changed(name: str, text: str) -> Path:
    """Writes a generated file; the path below ROOT. An unchanged file keeps its time."""
    target = ROOT / GENERATED / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists() or target.read_text() != text:
        target.write_text(text)
    return target.relative_to(ROOT)


def sources(folder: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / SOURCES / folder).glob("*.cpp"))


def units(folder: str) -> list[str]:
    """The sources of a folder as a few translation units.

    A unit spends its minute on torch's headers, so several sources share one.
    """
    names = [Path(path).stem for path in sources(folder)]
    assert sorted(name for unit in UNITS.values() for name in unit) == names, (
        "UNITS is not complete"
    )
    return [
        str(
            write_if_changed(
                f"{unit}.cpp",
                "".join(f'#include "{folder}/{name}.cpp"\n' for name in members),
            )
        )
        for unit, members in UNITS.items()
    ]


write_operator_table()
torch_includes = include_paths()
setup(
    ext_modules=[
        Extension(
            "torch_trn._sim",
            sources("sim"),
            include_dirs=[*torch_includes, str(ROOT / SOURCES / "sim")],
            # Sums of the PE array are rounded step by step on every machine.
            extra_compile_args=[*FLAGS, "-ffp-contract=off"],
            language="c++",
        ),
        CppExtension(
            "torch_trn._C",
            sources("core") + units("device"),
            include_dirs=[
                str(ROOT / GENERATED),
                str(ROOT / SOURCES),
                *(f"{path}/kineto" for path in torch_includes),
            ],
            extra_compile_args=[*FLAGS, "-DUSE_KINETO"],
        ),
    ],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
)
