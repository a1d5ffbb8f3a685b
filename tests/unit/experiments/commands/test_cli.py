"""The command line: quick help with examples, and bad input is said in one sentence."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from paretoprune.experiments.__main__ import main
from paretoprune.experiments.cli import main_job, research  # noqa: F401  they add the commands
from paretoprune.experiments.cli.app import app
from paretoprune.experiments.models import digits_resnet
from paretoprune.experiments.runs import RunSpec, create_run
from paretoprune.experiments.tracking.saved_view import front_link, view_link
from paretoprune.experiments.tracking.server import check_port, tracked

COMMANDS = (
    "inspect", "search", "resume", "front", "ui", "export", "criteria", "compare", "bottlenecks",
    "recede",
)  # fmt: skip
MODULE = """
import torch
from torch import nn

class Stubborn(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        if x.sum() > 0:
            x = -x
        return self.linear(x.flatten(1))

def stubborn():
    return Stubborn()

def unnormed():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

def large():
    batches = [(torch.zeros(50, 3, 32, 32), torch.arange(50) % 10) for _ in range(8)]
    return batches, batches

class FromOne(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.zeros(1, 8, 8), index % 10 + 1

def from_one():
    return FromOne(), None
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with weights, a module of somebody's own, and one run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delenv("PARETOPRUNE_DATA", raising=False)
    state = digits_resnet().state_dict()
    save_file(state, "digits.safetensors")
    save_file({f"module.{name}": value for name, value in state.items()}, "other.safetensors")
    Path("somebodys_own.py").write_text(textwrap.dedent(MODULE))
    Path("broken.py").write_text("raise RuntimeError('boom')")
    Path("notes").mkdir()
    create_run(Path("runs"), "taken", RunSpec("digits", 0.5, 3, ("l2",)))
    return tmp_path


@pytest.fixture(autouse=True)
def _forget_modules() -> None:
    """Every test writes the module of somebody's own anew."""
    sys.modules.pop("somebodys_own", None)


DIGITS = ("digits", "--weights", "digits.safetensors", "--quiet")
RECEDE = ("recede", *DIGITS, "--epochs", "1")
SEARCH = ("search", *DIGITS)
BAD: dict[str, tuple[Sequence[str], str]] = {
    "an unknown recipe": (["search", "digts", "--flops", "50%"], "did you mean digits?"),
    "an unknown network": (
        ["search", "torchvision:resnet51", "--flops", "50%", "--data", "digits"],
        "unknown torchvision model 'resnet51'",
    ),
    "an unknown function": (
        ["search", "somebodys_own:nix", "--flops", "50%", "--data", "digits"],
        "has no function 'nix'",
    ),
    "a module that fails": (
        ["search", "broken:net", "--flops", "50%", "--data", "digits"],
        "RuntimeError: boom (",
    ),
    "a network without data": (["search", "torchvision:resnet18", "--flops", "9%"], "needs data"),
    "missing weights": (
        ["search", "digits", "--flops", "50%", "--weights", "nix.pt"],
        "'nix.pt' are not a file",
    ),
    "weights of another network": (
        ["search", "digits", "--flops", "50%", "--weights", "other.safetensors"],
        "does not fit ResNet: it lacks",
    ),
    "missing data": (
        [*SEARCH, "--flops", "50%", "--data", "imagefolder:nix"],
        "nix is no folder of images: it is not there",
    ),
    "data of another shape": (
        [*SEARCH, "--flops", "50%", "--data", "somebodys_own:large"],
        "to have 1 channels",
    ),
    "classes that the network does not have": (
        ["bottlenecks", *DIGITS, "--flops", "50%", "--data", "somebodys_own:from_one"],
        "Target 10 is out of bounds",
    ),
    "a recipe without its data": (["search", "resnet56-cifar10", "--flops", "50%"], "--data"),
    "a target without unit": ([*SEARCH, "--flops", "0.5"], "write 0.5%"),
    "a target above all": ([*SEARCH, "--flops", "150%"], "at most at 100%"),
    "no target": (["search", "digits"], "Missing option '--flops'"),
    "a target that cannot be reached": ([*SEARCH, "--flops", "0.1%"], "smallest reachable"),
    "a target above the dense network": ([*SEARCH, "--flops", "60M"], "357360"),
    "no trials": ([*SEARCH, "--flops", "50%", "--trials", "0"], "trials must be"),
    "trials that are no number": ([*SEARCH, "--flops", "50%", "--trials", "x"], "'--trials'"),
    "an unknown criterion": (
        [*SEARCH, "--flops", "50%", "--criteria", "l2,tailor"],
        "unknown criterion 'tailor'; available: ",
    ),
    "a comma for criteria": ([*SEARCH, "--flops", "50%", "--criteria", ","], "but got ','"),
    "an unknown sampler": (
        [*SEARCH, "--flops", "50%", "--sampler", "best"],
        "unknown sampler 'best'; available: damage, tpe",
    ),
    "a sampler for a strategy that has none": (
        [*SEARCH, "--flops", "50%", "--strategy", "everything", "--sampler", "damage"],
        "the strategy everything decides without a sampler, but got 'damage'",
    ),
    "a number of networks that are not fine-tuned": (
        [*SEARCH, "--flops", "50%", "--top", "3"],
        "--top 3 says how many are fine-tuned, but none are: give --finetune EPOCHS",
    ),
    "distillation without training": (
        [*SEARCH, "--flops", "50%", "--distill"],
        "--distill needs a training: give --finetune EPOCHS",
    ),
    "a learning rate without training": (
        [*SEARCH, "--flops", "50%", "--learning-rate", "0.1"],
        "--learning-rate needs a training: give --finetune EPOCHS",
    ),
    "a learning rate that is none": (
        [*SEARCH, "--flops", "50%", "--finetune", "1", "--learning-rate", "nan"],
        "--learning-rate is positive, but got nan",
    ),
    "recovery of candidates that are not trained": (
        [*SEARCH, "--flops", "50%", "--recovery", "5"],
        "recovery trains the candidates of the strategy everything alone, but got 5 epochs",
    ),
    "an unknown objective": (
        [*SEARCH, "--flops", "50%", "--objectives", "loss,speed"],
        "unknown objective 'speed'; available: loss, ",
    ),
    "one objective": (
        [*SEARCH, "--flops", "50%", "--objectives", "loss"],
        "two or more different objectives, but got ['loss']",
    ),
    "an unknown granularity": (
        [*SEARCH, "--flops", "50%", "--granularity", "layer"],
        "unknown granularity 'layer'; available: group, stage, uniform",
    ),
    "no multiple": ([*SEARCH, "--flops", "50%", "--multiple", "0"], "--multiple must be"),
    "a ratio above all": (
        [*SEARCH, "--flops", "50%", "--max-ratio", "120%"],
        "a pruning ratio is a fraction such as 0.9, or 90%, but got '120%'",
    ),
    "ratios the wrong way round": (
        [*SEARCH, "--flops", "50%", "--max-ratio", "0.2", "--min-ratio", "30%"],
        "but got 0.3 and 0.2",
    ),
    "a pattern that matches nothing": (
        [*SEARCH, "--flops", "50%", "--exclude", "conv1,layr1"],
        "no group, block or module matches 'layr1'; groups: conv1, layer1.0.conv1, ",
    ),
    "multiples that keep too much": (
        [*SEARCH, "--flops", "50%", "--multiple", "16", "--exclude", "layer3.?,layer2*"],
        "the smallest reachable within the bounds is ",
    ),
    "ratios that leave too little": (
        ["compare", *DIGITS, "--flops", "90%", "--min-ratio", "50%"],
        "cannot be used up: the largest reachable within the bounds is ",
    ),
    "a comparison into a file": (
        ["compare", *DIGITS, "--flops", "50%", "--to", "broken.py"],
        "broken.py cannot be a folder, because broken.py is none",
    ),
    "a comparison below a file": (
        ["compare", *DIGITS, "--flops", "50%", "--to", "broken.py/x"],
        "broken.py/x cannot be a folder, because ",
    ),
    "runs below a file": (
        [*SEARCH, "--flops", "50%", "--runs-dir", "broken.py/x"],
        "broken.py/x cannot be a folder, because ",
    ),
    "exporting below a file": (
        ["export", "taken", "--to", "broken.py/x"],
        "broken.py cannot be a folder, because broken.py is none",
    ),
    "a widened network below a file": (
        ["bottlenecks", *DIGITS, "--flops", "50%", "--to", "broken.py/x/y"],
        "broken.py/x cannot be a folder, because ",
    ),
    "receded weights below a file": (
        [*RECEDE, "--to", "broken.py/x.safetensors"],
        "broken.py cannot be a folder, because broken.py is none",
    ),
    "a widened network in a folder that exists": (
        ["bottlenecks", *DIGITS, "--flops", "50%", "--to", "notes"],
        "notes exists already",
    ),
    "a factor without an end": (
        ["bottlenecks", *DIGITS, "--flops", "50%", "--factor", "inf"],
        "a widening factor is a finite number above 1, but got inf",
    ),
    "a seed below zero": ([*SEARCH, "--flops", "50%", "--seed", "-1"], "but got -1"),
    "a seed of too many bits": (
        ["compare", *DIGITS, "--flops", "50%", "--seed", "20260101123000"],
        "a seed lies in 0 to 8796093022207, but got 20260101123000",
    ),
    "receded weights that cannot be read": (
        [*RECEDE, "--to", "x.pt"],
        "--to takes a file that ends in .safetensors, but got x.pt",
    ),
    "a network without scales that could recede": (
        ["recede", "somebodys_own:unnormed", "--data=digits", "--to=x.safetensors", "--quiet"],
        "the scales of BatchNorms recede, but the network has none",
    ),
    "a rate at which scales are bounded no longer": (
        [*RECEDE, "--to", "x.safetensors", "--learning-rate", "1000"],
        "scales reach 0 or 1, which bounded ones only come near); take a lower learning rate than",
    ),
    "bounded ratios of steps": (
        [*SEARCH, "--flops", "50%", "--strategy", "everything", "--max-ratio", "0.5"],
        "no ratio of the dense network can be bounded",
    ),
    "workers below none": ([*SEARCH, "--flops", "50%", "--workers", "-1"], "workers must be"),
    "a time limit without workers": (
        [*SEARCH, "--flops", "50%", "--workers", "0", "--trial-timeout", "9"],
        "an evaluation in this process cannot be stopped",
    ),
    "one and a half GPUs": ([*SEARCH, "--flops", "50%", "--gpus-per-trial", "1.5"], "but got 1.5"),
    "more GPUs than there are": (
        [*SEARCH, "--flops", "50%", "--gpus-per-trial", "64"],
        "every trial is to have 64 GPUs, but this machine has ",
    ),
    "a database that does not answer": (
        [*SEARCH, "--flops", "50%", "--storage", "postgresql://me:secret@127.0.0.1:9/study"],
        "the study in postgresql://me:***@127.0.0.1:9/study cannot be used (",
    ),
    "a database that nobody knows": (
        [*SEARCH, "--flops", "50%", "--storage", "files"],
        "a database is named by a URL such as sqlite:///trials.db or postgresql://user:password@"
        "host/name, but got 'files'.",
    ),
    "a database in memory": (
        [*SEARCH, "--flops", "50%", "--storage", "sqlite:///:memory:"],
        "in a file, so that no kill loses them, but got sqlite:///:memory:; name one as in",
    ),
    "a database without a name": ([*SEARCH, "--flops", "50%", "--storage", "sqlite://"], "a file"),
    "a database by a URI of SQLite": (
        [*SEARCH, "--flops", "50%", "--storage", "sqlite:///file:x?mode=memory&uri=true"],
        "keeps the trials in a file",
    ),
    "a network that cannot be traced": (
        ["search", "somebodys_own:stubborn", "--flops", "50%", "--data", "digits", "--quiet"],
        "",
    ),
    "an occupied run name": ([*SEARCH, "--flops", "50%", "--run", "taken"], "resume taken"),
    "a run name with a slash": ([*SEARCH, "--flops", "50%", "--run", "a/b"], "a run name has"),
    "an unknown command": (["serach"], "No such command 'serach'"),
    "resuming an unknown run": (["resume", "nix"], "there are: taken"),
    "the front of an unknown run": (["front", "nix"], "there are: taken"),
    "the front of a run that never began": (["front", "taken"], "holds no search"),
    "the front in another format": (["front", "taken", "--format", "yaml"], "'yaml'"),
    "exporting an unknown run": (["export", "nix", "--to", "x"], "there are: taken"),
    "exporting into a folder that exists": (
        ["export", "taken", "--to", "notes"],
        "exists already",
    ),
    "exporting in an unknown format": (
        ["export", "taken", "--to", "x", "--format", "gguf"],
        "available: safetensors, onnx, pt2",
    ),
    "inspecting what is nothing": (["inspect", "nix"], "unknown recipe 'nix'"),
    "showing a run that MLflow does not have": (["ui", "taken"], "paretoprune resume taken"),
    "showing runs where there are none": (["ui", "--runs-dir", "notes"], "holds no run"),
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, said = BAD[case]
    before = sorted(Path("runs").rglob("*"))
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    *progress, last = captured.err.splitlines()
    assert last.startswith("error: ")
    assert said in last
    assert all(line.startswith(("Preparing ", "Tracing ", "  ")) for line in progress)
    assert captured.out == ""
    assert sorted(Path("runs").rglob("*")) == before, "something half-made was left"
    assert not Path("x").exists()


def test_a_fault_of_the_program_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr("paretoprune.experiments.commands.front.front", broken)
    with pytest.raises(KeyError):
        main(["front", "x"])


def test_ctrl_c_is_130_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("paretoprune.experiments.commands.front.front", interrupted)
    assert main(["front", "x"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_fails_because_ctrl_c_broke_an_import_off_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def half(*arguments: object, **options: object) -> None:
        with contextlib.suppress(KeyboardInterrupt):  # as imports of NumPy do
            signal.raise_signal(signal.SIGINT)
        raise RecursionError("maximum recursion depth exceeded")

    monkeypatch.setattr("paretoprune.experiments.commands.front.front", half)
    assert main(["front", "x"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_ctrl_c_while_the_program_is_imported_prints_no_traceback() -> None:
    code = textwrap.dedent(
        """
        import sys
        class Interrupting:
            def find_spec(self, name, *rest):
                if name == "typer":
                    raise KeyboardInterrupt
        sys.meta_path.insert(0, Interrupting())
        from paretoprune.experiments.__main__ import main
        sys.exit(main(["criteria"]))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_weights_that_the_disk_does_not_take_are_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(*arguments: object, **options: object) -> None:
        save_file({"one": torch.zeros(2)}, tmp_path / "gone" / "x.safetensors")

    monkeypatch.setattr("paretoprune.experiments.commands.front.front", gone)
    assert main(["front", "x"]) == 2
    assert capsys.readouterr().err.startswith("error: Error while serializing: I/O error: No such")


def test_what_the_terminal_has_no_letters_for_ends_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def dashed(*arguments: object, **options: object) -> None:
        print("dense \u2013")

    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, "ascii", write_through=True))
    monkeypatch.setattr("paretoprune.experiments.commands.front.front", dashed)
    assert main(["front", "x"]) == 0
    assert written.getvalue() == b"dense ?\n"


def test_the_end_of_a_file_of_the_users_is_no_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*arguments: object, **options: object) -> None:
        raise EOFError("Ran out of input")

    monkeypatch.setattr("paretoprune.experiments.commands.front.front", cut)
    with pytest.raises(EOFError, match="Ran out of input"):
        main(["front", "x"])


def test_help_is_quick_and_has_an_example_for_every_command() -> None:
    code = textwrap.dedent(
        f"""
        import sys
        from paretoprune.experiments.__main__ import main
        for command in {COMMANDS}:
            assert main([command, "--help"]) == 0
        heavy = {{"torch", "ray", "mlflow", "optuna", "numpy", "matplotlib"}} & set(sys.modules)
        assert not heavy, heavy
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert f"Example: paretoprune {command}" in done.stdout
    assert {
        command.callback.__name__ for command in app.registered_commands if command.callback
    } == {*COMMANDS}


def test_the_exit_statuses_are_documented(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for status in ("0 done", "1 the search found no network", "2 bad input", "130 interrupted"):
        assert status in text


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("line", "completed"),
    [("paretoprune fr", "front"), ("paretoprune front ta", "taken"), ("paretoprune ui ", "taken")],
)
def test_a_shell_completes_commands_and_runs(
    line: str, completed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_PARETOPRUNE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(line.count(" ")))
    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().out.split() == [completed]


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert "inspect" in captured.out + captured.err
    assert "error" not in captured.err


@pytest.mark.usefixtures("here")
def test_inspect_shows_groups_blocks_and_what_is_frozen(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["inspect", "digits", "--weights", "digits.safetensors"]) == 0
    text = capsys.readouterr().out
    assert "357.4 k MACs (the papers' FLOPs" in text
    assert "layer1.0.conv1" in text
    assert "reaches the model's output" in text
    assert "9 prunable groups with 120 units, 4 removable blocks, 1 frozen group." in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.usefixtures("here")
def test_inspect_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "digits", "--weights", "digits.safetensors", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["macs"] == 357_360
    first = facts["groups"][0]
    assert first["name"] == "conv1"
    assert 0 < first["half_frees"] < 1
    assert "conv1.weight" in first["parameters"]
    assert {group["name"] for group in facts["groups"] if group["frozen"]} == {"linear"}
    assert next(block["name"] for block in facts["blocks"]) == "layer1.0"


def test_a_library_network_is_inspected_without_data(capsys: pytest.CaptureFixture[str]) -> None:
    with torch.random.fork_rng():
        assert main(["inspect", "torchvision:squeezenet1_1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["params"] == 1_235_496


def test_a_library_network_is_inspected_at_the_size_of_its_weights(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(name: str, weights: object) -> nn.Module:  # the trained ones are a download
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.Sequential(nn.Conv2d(3, 4, 1), pool, nn.Linear(4, 2))

    monkeypatch.setattr("torchvision.models.get_model", small)
    weights = "IMAGENET1K_SWAG_E2E_V1"
    assert main(["inspect", "torchvision:vit_b_16", "--weights", weights]) == 0
    assert "3x384x384" in capsys.readouterr().err


def test_criteria_name_their_papers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["criteria"]) == 0
    text = capsys.readouterr().out
    assert "taylor" in text
    assert "arXiv:" in text


@pytest.mark.usefixtures("here")
def test_the_ui_needs_a_free_port(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/taken/mlflow.json").write_text(
        json.dumps({"uri": "sqlite:///digits.safetensors", "experiment": "1", "run": "abc"})
    )
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["ui", "--port", str(port)]) == 2
    assert f"port {port} is in use; choose another with --port" in capsys.readouterr().err


def test_no_server_can_listen_on_a_port_beyond_the_last() -> None:
    with pytest.raises(ValueError, match="a port is a number from 1 to 65535, but got 70000"):
        check_port(70_000)


@pytest.mark.usefixtures("here")
def test_a_server_that_does_not_start_is_said_in_a_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("runs/taken/mlflow.json").write_text(
        json.dumps({"uri": "unknown://store", "experiment": "1", "run": "abc"})
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert main(["ui", "--port", str(port)]) == 2
    assert "error: the MLflow server did not start: " in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_a_database_that_is_gone_is_not_made_anew(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/taken/mlflow.json").write_text(
        json.dumps({"uri": "sqlite:////nowhere/mlflow.db", "experiment": "1", "run": "abc"})
    )
    assert main(["ui"]) == 2
    assert "/nowhere/mlflow.db is not there" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_a_server_that_is_there_is_only_pointed_at(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/taken/mlflow.json").write_text(
        json.dumps({"uri": "http://server:5000", "experiment": "1", "run": "abc"})
    )
    found = tracked(Path("runs"), None)
    assert main(["ui"]) == 0
    text = capsys.readouterr().out
    assert front_link("http://server:5000", "1", "abc") in text
    assert view_link("http://server:5000", "1", found.search_id) in text
    assert "workflowType=machine_learning" in text
