"""The import levels: a file imports only from levels above its own, so the layers stay layers."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "torch_trn"

LEVELS = (
    ("config", "errors"),
    ("chip", "memory"),
    ("isa", "systolic", "topology", "tpuv3"),
    ("program",),
    ("lowering", "collectives", "executor", "scheduler", "timeline", "unwritten", "walk"),
    ("runtime",),
    ("eager", "tile", "sharing", "compiler", "distributed", "onnx_io", "profiler", "trn", "cli"),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}

WITHIN_A_LEVEL = {
    ("scheduler", "timeline"),
    ("executor", "unwritten"),
    ("executor", "walk"),
    ("profiler", "eager"),
    ("eager", "tile"),
    ("lowering", "scheduler"),
}
"""(importer, imported): a scheduler makes timelines, a profile shows those of operators, a lowering
asks how long its plans take."""

NATIVE = ("isa", "scheduler")
"""Who uses the torch-free extension: the values of the PE array, and the scheduler."""

DEVICE_LEVEL = LEVEL["eager"]
"""Below this nobody knows that a torch device exists."""


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    """'torch_trn.lowering.matmul' of its file; a package is named by itself."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """The name in LEVELS of a module: 'lowering' of 'torch_trn.lowering.matmul'."""
    return module.split(".")[1]


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """The full names of what a file imports, wherever in it; of our own package, which part."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            if base == "torch_trn":
                yield from (f"torch_trn.{alias.name}" for alias in node.names)
            else:
                yield base


def edges(path: Path) -> Iterator[tuple[str, str]]:
    """(part, part that it imports) of one file, among the parts of this package."""
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for imported in imports(ast.parse(path.read_text()), package):
        if imported.startswith("torch_trn.") and module != "torch_trn":
            yield part_of(module), part_of(imported)


def fault(importer: str, imported: str) -> str | None:
    """What is wrong with an edge, if anything."""
    level = LEVEL[importer]
    if imported == "_sim":
        return None if importer in NATIVE else "only isa and scheduler import _sim"
    if imported == "_C":
        return None if level >= DEVICE_LEVEL else f"level {level} must not know of the device _C"
    if imported not in LEVEL:
        return f"{imported} is in no level: add it to LEVELS"
    if importer == imported or (importer, imported) in WITHIN_A_LEVEL:
        return None
    if LEVEL[imported] < level:
        return None
    return f"level {level} must not import level {LEVEL[imported]}"


@pytest.mark.parametrize("path", python_files(), ids=module_name)
def test_imports_only_from_levels_above(path: Path) -> None:
    if path.parent == PACKAGE and path.stem != "__init__":
        assert path.stem in LEVEL, f"{path.stem} is in no level: add it to LEVELS"
    wrong = {
        f"{importer} -> {imported}: {reason}"
        for importer, imported in edges(path)
        if (reason := fault(importer, imported))
    }
    assert not wrong, f"{path.name}: {sorted(wrong)}"


def test_a_wrong_edge_is_found() -> None:
    assert fault("chip", "program") == "level 1 must not import level 3"
    assert fault("scheduler", "lowering") == "level 4 must not import level 4"
    assert fault("timeline", "scheduler") == "level 4 must not import level 4"
    assert fault("runtime", "_C") == "level 5 must not know of the device _C"
    assert fault("runtime", "_sim") == "only isa and scheduler import _sim"
    assert fault("eager", "nowhere") == "nowhere is in no level: add it to LEVELS"
    assert fault("scheduler", "timeline") is None
    assert fault("runtime", "lowering") is None


def test_every_kind_of_import_is_seen() -> None:
    source = """
import torch_trn.chip as chip
from torch_trn import config, isa
from ..program import Builder
from . import tile
def late():
    from torch_trn.lowering.call import OpCall
"""
    found = set(imports(ast.parse(source), "torch_trn.lowering"))
    assert found == {
        "torch_trn.chip",
        "torch_trn.config",
        "torch_trn.isa",
        "torch_trn.program",
        "torch_trn.lowering",
        "torch_trn.lowering.call",
    }
