"""README and documentation: commands parse, examples run, the site builds, figures are real."""

from __future__ import annotations

import copy
import csv
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import typer
from torch import nn

from paretoprune.criteria import CRITERIA
from paretoprune.experiments import recipes
from paretoprune.experiments.__main__ import main
from paretoprune.experiments.benchmarks.search_plot import grown
from paretoprune.experiments.cli import main_job, research  # noqa: F401  they add the commands
from paretoprune.experiments.cli.app import app
from paretoprune.experiments.training import Training, train
from paretoprune.surgery.progress import Lines, silent

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {file.name: file.read_text() for file in sorted((ROOT / "docs").glob("*.md"))}
TEXTS = {"README.md": README, "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text(), **PAGES}
NUMBERS = {"N": "3"}
"""What stands for placeholders that must be numbers; others may be any text."""
RUN_PAGES = ("index.md", "front.md", "own-model.md", "exporting.md", "extending.md", "cli.md")
"""Pages whose Python runs, in an order in which each finds what an earlier one made."""


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\b[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> Iterator[list[str]]:
    """Yields the arguments of every command line in blocks, and of inline ones that have some."""
    shown = [line for block in re.findall(r"```.*?```", text, re.DOTALL) for line in lines(block)]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    inline = [
        " ".join(span.split()) for span in re.findall(r"`(paretoprune [^`\s]+\s[^`]+)`", prose)
    ]
    for line in (*shown, *inline):
        if line.startswith("paretoprune ") and "…" not in line:
            command = re.split(r" {2,}", line)[0]  # what follows wide space explains it
            yield [NUMBERS.get(word, word) for word in shlex.split(command)[1:]]


def lines(block: str) -> list[str]:
    return [line.strip() for line in block.replace("\\\n", " ").splitlines()]


def parse(arguments: list[str]) -> None:
    """Parses a command line as the program does, without running the command."""
    group: Any = typer.main.get_command(app)
    if arguments[0].startswith("--"):
        assert arguments in (["--help"], ["--install-completion"])
        return
    context = group.make_context("paretoprune", [*arguments])
    name, command, rest = group.resolve_command(context, arguments)
    if rest != ["--help"]:
        command.make_context(name, rest)


@pytest.mark.parametrize("page", TEXTS)
def test_every_command_line_parses(page: str) -> None:
    for arguments in commands(TEXTS[page]):
        try:
            parse(arguments)
        except Exception as error:
            pytest.fail(f"paretoprune {' '.join(arguments)}: {error}")


def test_commands_are_found_and_wrong_ones_fail() -> None:
    assert len([line for text in TEXTS.values() for line in commands(text)]) > 40
    with pytest.raises(Exception, match="No such option"):
        parse(["front", "RUN", "--nonsense"])
    with pytest.raises(Exception, match="No such command"):
        parse(["frnt", "RUN"])


def test_the_example_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks(README, "python")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "exports/readme/model.safetensors").is_file()
    assert names["network"] is not names["small"]


@pytest.fixture(scope="module", autouse=True)
def _trained_once() -> Iterator[None]:
    """Trains the digits once per seed, not with every command; the rest is as users have it."""
    known: dict[Training, nn.Module] = {}

    def once(
        model: nn.Module, batches: Any, training: Training, *, progress: Lines = silent
    ) -> nn.Module:
        if training not in known:
            known[training] = train(model, batches, training, progress=progress)
        return copy.deepcopy(known[training])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "train", once)
        yield


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder of a reader; pages are read in order and share what they make."""
    folder = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield folder
    sys.modules.pop("mynet", None)


def run(arguments: list[str]) -> None:
    if arguments[0] == "search":  # in this process: starting workers takes longer than trials
        arguments = [*arguments, "--workers", "0"]
    assert main([*arguments]) == 0, f"paretoprune {' '.join(arguments)}"


@pytest.mark.usefixtures("workplace")
def test_every_answer_is_a_command_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks(PAGES["faq.md"], "sh"):
        for arguments in commands(f"```\n{block}```"):
            if arguments[0] != "ui" and "ray://head:10001" not in arguments:  # these do not end
                run(arguments)
                assert capsys.readouterr().out, arguments
    assert Path("exports/deployed/model.onnx").is_file()


@pytest.mark.parametrize("page", RUN_PAGES)
def test_the_python_of_the_documentation_runs(page: str, workplace: Path) -> None:
    if page == "index.md" and not (workplace / "runs/digits-50pct-1").exists():
        run(["search", "digits", "--flops", "50%", "--trials", "6"])
    if page == "index.md":
        run(["export", "digits-50pct-1", "--to", "exports/digits", "--quiet"])
    if page == "exporting.md":
        run(["export", "digits-50pct-1", "--to", "exports/best", "--quiet"])
    names: dict[str, object] = {}
    for code in re.findall(r"^```python([^\n]*)\n(.*?)^```", PAGES[page], re.DOTALL | re.M):
        file = re.search(r'title="(.+)"', code[0])
        if file:
            (workplace / file[1]).write_text(code[1])
        else:
            exec(compile(code[1], page, "exec"), names)
    assert names


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    done = subprocess.run(
        [*command, "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site/reference/index.html").read_text()
    for shown in ("search.search", "surgery.trace.trace", "surgery.PruningPlan"):
        assert f'id="paretoprune.{shown}"' in reference


def test_every_criterion_and_command_is_described() -> None:
    for name in CRITERIA:
        assert f"| `{name}` |" in PAGES["criteria.md"]
    for command in app.registered_commands:
        assert command.callback is not None
        assert f"| `{command.callback.__name__}` |" in PAGES["cli.md"]


def test_the_figures_of_the_criteria_are_those_of_the_results() -> None:
    with (ROOT / "experiments/results/criteria.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["ranking"] == "units"]

    def shown(tool: str, criterion: str, target: str, recovery: str) -> str:
        found = [
            100 * float(row["test_accuracy"])
            for row in rows
            if (row["tool"], row["criterion"], row["target"], row["recovery"])
            == (tool, criterion, target, recovery)
        ]
        half = f" ± {(max(found) - min(found)) / 2:.1f}" if len(found) > 1 else ""
        return f"{sum(found) / len(found):.1f}{half}"

    targets = ("0.7", "0.5", "0.3", "0.15")
    lines = []
    for tool, criterion in dict.fromkeys((row["tool"], row["criterion"]) for row in rows):
        own = tool == "paretoprune"
        recoveries = ("recalibrated", "reconstructed") if own else ("recalibrated",)
        cells = [
            " / ".join(shown(tool, criterion, target, recovery) for recovery in recoveries)
            for target in targets
        ]
        name = criterion if own else f"Torch-Pruning {criterion}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    page = PAGES["criteria.md"].splitlines()
    start = page.index("| criterion | 70 % of the FLOPs | 50 % | 30 % | 15 % |") + 2
    assert sorted(page[start : page.index("", start)]) == sorted(lines)


def test_the_results_of_the_readme_are_those_of_the_results_file() -> None:
    with (ROOT / "experiments/results/search-figures.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    text = (ROOT / "README.md").read_text()
    for target, shown in (("0.5", "50 %"), ("0.3", "30 %"), ("0.15", "15 %")):
        cells = []
        for method in ("search", "one-shot", "recalibrated", "fastnas"):
            found = sorted(
                (int(row["seed"]), f"{100 * float(row['test_accuracy']):.2f}")
                for row in rows
                if (row["flops"], row["method"]) == (target, method)
            )
            assert [seed for seed, _ in found] == list(range(len(found)))
            bold = "**" if method == "search" else ""
            cells.append(", ".join(f"{bold}{accuracy}{bold}" for _, accuracy in found))
        assert f"| {shown} | {' | '.join(cells)} |" in text
    fronts = [
        grown([row for row in rows if (row["method"], row["seed"]) == (method, "0")])[-1]
        for method in ("search", "one-shot", "recalibrated", "fastnas")
    ]
    volumes = [f"{volume:.3f}" for _, volume in fronts]
    assert f"| **{volumes[0]}** | {' | '.join(volumes[1:])} |" in text
    assert f"| {' | '.join(f'{seconds:,.0f}' for seconds, _ in fronts)} |" in text


def test_the_worth_of_the_parts_is_that_of_the_results() -> None:
    with (ROOT / "experiments/results/search-parts.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["trials"] == "40"]
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        found.setdefault(row["variant"], {})[int(row["seed"])] = float(row["hypervolume"])
    text = (ROOT / "docs/design.md").read_text()
    for variant, by_seed in found.items():
        assert sorted(by_seed) in ([0], [0, 1, 2])
        shown = [f"{by_seed[seed]:.3f}" if seed in by_seed else "" for seed in range(3)]
        average = f"{fmean(by_seed.values()):.3f}" if len(by_seed) == 3 else ""
        assert f"| {variant} | {' | '.join([*shown, average])} |" in text
