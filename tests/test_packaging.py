"""The wheel holds the whole product and runs from it alone, away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import paretoprune.surgery

ROOT = Path(__file__).parents[1]
LAYERS = ("criteria", "experiments", "search", "surgery")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of the wheel, built from a copy so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    for layer in LAYERS:
        shutil.copytree(ROOT / layer, source / layer, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", str(source)]
    done = subprocess.run(build, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    target = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def run_outside(code: str, unpacked: Path, folder: Path) -> str:
    """What a fresh interpreter prints that sees the unpacked wheel and not the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(unpacked), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_wheel_has_every_module_and_nothing_else(unpacked: Path) -> None:
    expected = {
        Path("paretoprune", file.relative_to(ROOT))
        for layer in LAYERS
        for pattern in ("*.py", "py.typed")
        for file in (ROOT / layer).rglob(pattern)
    }
    package = unpacked / "paretoprune"
    found = {file.relative_to(unpacked) for file in package.rglob("*") if file.is_file()}
    assert found == expected
    tops = {entry.name for entry in unpacked.iterdir() if not entry.name.endswith(".dist-info")}
    assert tops == {"paretoprune"}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_package_imports_from_the_wheel(layer: str, unpacked: Path, tmp_path: Path) -> None:
    code = f"import paretoprune.{layer} as package; print(package.__file__)"
    assert run_outside(code, unpacked, tmp_path).startswith(str(unpacked))


def test_the_console_script_starts(unpacked: Path, tmp_path: Path) -> None:
    (metadata,) = unpacked.glob("*.dist-info")
    code = f"""
from importlib.metadata import Distribution
(script,) = Distribution.at({str(metadata)!r}).entry_points
print(script.name, script.group, callable(script.load()))
"""
    assert run_outside(code, unpacked, tmp_path) == "paretoprune console_scripts True"


def test_the_licence_travels_with_the_wheel(unpacked: Path) -> None:
    (licence,) = unpacked.glob("*.dist-info/licenses/LICENSE")
    assert "Apache License" in licence.read_text()


def test_the_running_tests_use_the_checkout_or_an_installed_wheel() -> None:
    file = Path(paretoprune.surgery.__file__).resolve()
    in_checkout = file == ROOT / "surgery" / "__init__.py"
    installed = file.parts[-3:] == ("paretoprune", "surgery", "__init__.py")
    assert in_checkout or installed
