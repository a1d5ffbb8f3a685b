"""Imports point one way, vendors are contained, and every package on disk is declared."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("surgery", "criteria", "search", "experiments")
FOLDERS = ("data", "measuring", "exporting", "showing", "tracking", "commands", "cli")
"""Of `experiments/`, each above those before it."""
FILES = sorted(file for layer in LAYERS for file in (ROOT / layer).rglob("*.py"))


def imported(file: Path) -> set[str]:
    """The dotted names that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def short(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", FILES, ids=short)
def test_imports_point_one_way(file: Path) -> None:
    layer = file.relative_to(ROOT).parts[0]
    above = LAYERS[LAYERS.index(layer) + 1 :]
    wrong = {
        name
        for name in imported(file)
        if name.split(".")[0] == "paretoprune" and name.split(".")[1] in above
    }
    assert not wrong, f"{layer} must not know {wrong}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_of_experiments_import_one_way(folder: str) -> None:
    above = FOLDERS[FOLDERS.index(folder) + 1 :]
    wrong = {
        name
        for file in (ROOT / "experiments" / folder).rglob("*.py")
        for name in imported(file)
        if name.startswith(tuple(f"paretoprune.experiments.{each}." for each in above))
    }
    assert not wrong, f"experiments/{folder} must not know {wrong}"


@pytest.mark.parametrize("vendor", ["optuna", "ray", "mlflow"])
def test_a_vendor_is_imported_in_one_file(vendor: str) -> None:
    users = {
        short(file)
        for file in FILES
        if any(name.split(".")[0] == vendor for name in imported(file))
    }
    assert len(users) == 1


def test_declared_packages_are_those_on_disk() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {file.parent.relative_to(ROOT) for file in FILES}
    on_disk = {".".join(("paretoprune", *folder.parts)) for folder in folders}
    assert set(setuptools["packages"]) == on_disk
    assert setuptools["package-dir"] == {
        package: package.removeprefix("paretoprune.").replace(".", "/") for package in on_disk
    }


@pytest.mark.parametrize("layer", LAYERS)
def test_a_package_is_marked_as_typed_and_visible_to_type_checkers(layer: str) -> None:
    assert (ROOT / layer / "py.typed").exists()
    assert (ROOT / ".types" / "paretoprune" / layer).resolve() == ROOT / layer


def test_surgery_needs_no_vendor() -> None:
    code = (
        "import sys, paretoprune.surgery; "
        "print(*sorted({'ray', 'optuna', 'mlflow', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == ""
