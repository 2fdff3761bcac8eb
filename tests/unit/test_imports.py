"""The arrows of docs/architecture.md, read from the source: who may import whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import paceline

SOURCE = Path(paceline.__file__).parent
SHELLS = {"serving", "study", "training", "integrations", "cli"}
LEAVES = {"_version", "errors", "records"}
BASE = LEAVES | {"config", "costs"}
PARTS = {"sampling", "verification", "control", "models", "execution", "drafting"}

# part -> parts that it may import (itself always). Everything else is refused.
ALLOWED: dict[str, set[str]] = {
    "_version": set(),
    "errors": set(),
    "records": set(),
    "config": {"errors"},
    "costs": {"records"},
    "sampling": BASE,
    "verification": BASE | {"sampling"},
    "control": BASE | {"compiled"},
    "models": BASE,
    "compiled": {"errors", "models"},
    "execution": BASE | {"models", "compiled"},
    "drafting": BASE | {"sampling", "models", "execution", "verification", "compiled", "control"},
    "output": BASE | {"models"},
    "request": BASE | PARTS | {"output"},
    "assembly": BASE | PARTS | {"engine"},
    "engine": BASE | PARTS | {"request", "assembly"},
    "": BASE | {"engine"},
}
CORE = set(ALLOWED)
ALLOWED |= {
    "study": CORE,
    "training": CORE | {"study"},
    "serving": CORE,
    "integrations": CORE,
    "cli": CORE | SHELLS,
    "__main__": {"cli"},
}


def source_files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def part_of(module: str) -> str:
    """`paceline.control.base` -> `control`; `paceline` and names that it exports -> the empty part (the public surface)."""
    name = module.split(".")[1] if "." in module else ""
    return name if (SOURCE / name).is_dir() or (SOURCE / f"{name}.py").is_file() else ""


def owner(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported_modules(path: Path) -> Iterator[str]:
    """Every module named by an import statement, lazy and type-checking imports included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(SOURCE)}:{node.lineno}: relative import; write it in full"
            if node.module == "paceline":
                yield from (f"paceline.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


def parts_imported(path: Path) -> set[str]:
    return {part_of(name) for name in imported_modules(path) if name.split(".")[0] == "paceline"}


@pytest.mark.parametrize("path", source_files(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_follow_the_arrows(path: Path) -> None:
    part = owner(path)
    assert part in ALLOWED, f"new part {part!r}: give it a place in ALLOWED"
    unexpected = parts_imported(path) - ALLOWED[part] - {part}
    assert not unexpected, f"{part} must not import {sorted(unexpected)}"


@pytest.mark.parametrize("path", sorted((SOURCE / "control").glob("*.py")), ids=lambda p: p.name)
def test_control_never_imports_torch(path: Path) -> None:
    assert not [name for name in imported_modules(path) if name.split(".")[0] in {"torch", "transformers"}]


def test_the_core_imports_no_shell() -> None:
    offenders = {
        str(path.relative_to(SOURCE)): sorted(parts_imported(path) & SHELLS)
        for path in source_files()
        if owner(path) in CORE and parts_imported(path) & SHELLS
    }
    assert not offenders


def test_records_import_nothing_of_ours() -> None:
    assert not parts_imported(SOURCE / "records.py")
