"""The main job as a user does it: search, look at the front, export, load; with Ray and MLflow."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import pytest
import torch

from paretoprune.experiments.__main__ import main
from paretoprune.experiments.data.opening import load_data
from paretoprune.experiments.data.splits import split
from paretoprune.experiments.tracking.mlflow_runs import connect
from paretoprune.experiments.tracking.store import store_of
from paretoprune.search import Completed, SearchInfo, evaluate, read_run
from paretoprune.surgery import load, trace

TRIALS = 10


@dataclass(frozen=True)
class Job:
    """A finished search.

    Attributes:
        folder: The working folder.
        run: Name of the run.
        out: What it printed.
    """

    folder: Path
    run: str
    out: str

    @property
    def run_dir(self) -> Path:
        return self.folder / "runs" / self.run

    @property
    def info(self) -> SearchInfo:
        return read_run(self.run_dir)


def command(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Starts the command line in a folder, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if "MLFLOW" not in name}
    return subprocess.Popen(
        [sys.executable, "-m", "paretoprune.experiments", *arguments],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The first user's first search."""
    folder = tmp_path_factory.mktemp("job")
    process = command(
        folder, "search", "digits", "--flops", "50%", "--trials", str(TRIALS), "--workers", "2"
    )
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f"[{TRIALS}/{TRIALS}]" in err
    return Job(folder, "digits-50pct-1", out)


@pytest.fixture
def at_job(job: Job, monkeypatch: pytest.MonkeyPatch) -> Job:
    """The finished search, with its working folder entered."""
    monkeypatch.chdir(job.folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return job


def test_every_trial_is_on_budget_and_kept(job: Job) -> None:
    info = job.info
    assert len(info.records) == TRIALS
    done = [record for record in info.records if isinstance(record.outcome, Completed)]
    assert len(done) >= TRIALS - 1
    for record in done:
        assert record.cost is not None
        limit = record.candidate.budget * info.dense.macs
        assert 0.99 * limit < record.cost.macs <= limit + 1
        assert record.cost.macs <= info.target


def test_the_search_says_what_it_found_and_what_comes_next(job: Job) -> None:
    assert "Pareto front of digits-50pct-1 after 10 trials" in job.out
    assert "paretoprune ui digits-50pct-1" in job.out
    assert "paretoprune export digits-50pct-1 --to DIR" in job.out
    assert max(map(len, job.out.splitlines())) <= 100


def test_mlflow_has_every_trial_once_and_the_front(at_job: Job) -> None:
    client = connect(store_of(Path("runs")).uri)
    where = json.loads((at_job.run_dir / "mlflow.json").read_text())
    children = client.search_runs([where["experiment"]], "tags.kind = 'trial'")
    assert sorted(int(run.data.tags["trial"]) for run in children) == list(range(TRIALS))
    marked = {int(r.data.tags["trial"]) for r in children if r.data.tags["pareto"] == "true"}
    assert marked == {record.number for record in at_job.info.front.records}
    parent = client.get_run(where["run"])
    assert parent.info.status == "FINISHED"
    assert parent.data.params["dense_macs_by_thop"] == str(at_job.info.dense.macs)
    files = {file.path for file in client.list_artifacts(where["run"], "pareto")}
    assert {"pareto/front.html", "pareto/front.png"} <= files


def test_the_front_is_printed_in_every_format(
    at_job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [record.number for record in at_job.info.front.records]
    assert main(["front", at_job.run]) == 0
    assert "dense" in capsys.readouterr().out
    assert main(["front", at_job.run, "--format", "json"]) == 0
    assert [row["trial"] for row in json.loads(capsys.readouterr().out)] == members
    assert main(["front", at_job.run, "--format", "csv"]) == 0
    lines = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert [int(line["trial"]) for line in lines] == members


def test_the_best_is_exported_loads_and_keeps_its_accuracy(
    at_job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", at_job.run, "--to", "exports/best", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "MLflow   models:/digits@exported" in said
    best = at_job.info.front.best()
    assert isinstance(best.outcome, Completed)
    network = load("exports/best")
    data = load_data("digits", seed=0)
    assert data.test is not None
    inputs, _ = next(iter(data.test()))
    assert trace(network, inputs[:2]).cost() == best.cost
    accuracy = evaluate(network, data.test())["accuracy"]
    assert f"accuracy {100 * accuracy:.2f} % on the test split" in said
    assert accuracy > 0.9
    plan = json.loads(Path("exports/best/plan.json").read_text())
    said_loss = plan["metrics"]["search"]["loss"]
    assert said_loss == pytest.approx(
        evaluate(network, split(data.train, seed=0).validation)["loss"]
    )
    assert said_loss <= best.outcome.metrics["loss"] + 1e-6  # reconstructed on more, if that helps


def test_a_smaller_one_is_exported_on_request(
    at_job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ["--to", "small", "--max-flops", "44%", "--quiet", "--json"]
    assert main(["export", at_job.run, *wanted]) == 0
    plan = json.loads(Path("small/plan.json").read_text())
    assert plan["metrics"]["macs"] <= 0.44 * at_job.info.dense.macs
    facts = json.loads(capsys.readouterr().out)
    assert facts["directory"] == "small"
    assert facts["exported"]["macs"] == plan["metrics"]["macs"]
    assert facts["dense"]["macs"] == at_job.info.dense.macs
    assert facts["mlflow"] == "models:/digits@exported"


def test_the_smallest_that_is_accurate_enough_is_exported_to_onnx_and_pt2(
    at_job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    best = at_job.info.front.best()
    assert isinstance(best.outcome, Completed)
    wanted = ["--min-accuracy", f"{best.outcome.metrics['accuracy'] - 0.05:.3f}"]
    formats = ["--format", "safetensors,onnx,pt2"]
    assert main(["export", at_job.run, "--to", "both", "--quiet", *wanted, *formats]) == 0
    said = capsys.readouterr().out
    assert "onnx     " in said
    assert "pt2      " in said
    network = load("both")
    data = load_data("digits", seed=0)
    assert data.test is not None
    inputs, _ = next(iter(data.test()))
    expected = network(inputs)
    program = torch.export.load("both/model.pt2").module()
    torch.testing.assert_close(program(inputs), expected)
    session = onnxruntime.InferenceSession("both/model.onnx")
    (outputs,) = session.run(None, {"inputs": inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(outputs), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max-flops", "1%"], "the smallest has"),
        (["--trial", "99"], f"trials 0 to {TRIALS - 1}"),
        (["--trial", "0", "--max-flops", "50%"], "give one of"),
        (["--trial", "0", "--min-accuracy", "0.5"], "give one of"),
        (["--min-accuracy", "101%"], "but got '101%'"),
        (["--max-flops", "half"], "but got 'half'"),
    ],
)
def test_a_choice_that_cannot_be_is_one_sentence(
    at_job: Job, arguments: Sequence[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", at_job.run, "--to", "never", "--quiet", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not Path("never").exists()


def test_the_same_name_is_refused_and_the_next_is_free(
    at_job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (at_job.run_dir / "journal.log").read_bytes()
    taken = ["search", "digits", "--flops", "50%", "--run", at_job.run, "--quiet"]
    assert main(taken) == 2
    assert "exists already" in capsys.readouterr().err
    assert (at_job.run_dir / "journal.log").read_bytes() == before


def test_resuming_a_finished_run_adds_nothing(
    at_job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["resume", at_job.run, "--quiet", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["run"] == at_job.run
    assert facts["trials"] == TRIALS
    assert facts["best"] == at_job.info.front.best().number
    assert [row["trial"] for row in facts["front"]] == [
        record.number for record in at_job.info.front.records
    ]
    assert len(at_job.info.records) == TRIALS
    client = connect(store_of(Path("runs")).uri)
    where = json.loads((at_job.run_dir / "mlflow.json").read_text())
    assert len(client.search_runs([where["experiment"]], "tags.kind = 'trial'")) == TRIALS


def test_an_interrupted_search_goes_on_where_it_was(at_job: Job) -> None:
    weights = at_job.run_dir / "dense.safetensors"
    options = ["--weights", str(weights), "--flops", "40%", "--run", "stopped", "--workers", "2"]
    process = command(at_job.folder, "search", "digits", *options, "--trials", "400", "--quiet")
    folder = Path("runs/stopped")
    end = time.monotonic() + 300
    while time.monotonic() < end and _finished(folder) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    done = _finished(folder)
    assert err.splitlines() == [
        f"{done} of 400 trials are done and kept; continue with: paretoprune resume stopped",
        "interrupted",
    ]
    assert f"Pareto front of stopped after {done} trials" in out
    client = connect(store_of(Path("runs")).uri)
    where = json.loads((folder / "mlflow.json").read_text())
    assert client.get_run(where["run"]).info.status == "KILLED"
    shown = [file.path for file in client.list_artifacts(where["run"], "pareto")]
    assert "pareto/front.json" in shown
    # The rest would take minutes: ask for a few trials more instead.
    spec = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**spec, "trials": done + 3}))
    before = read_run(folder).records
    assert main(["resume", "stopped", "--quiet"]) == 0
    records = read_run(folder).records
    assert [record.number for record in records] == list(range(done + 3))
    assert all(records[record.number] == record for record in before)


def _finished(folder: Path) -> int:
    try:
        return len(read_run(folder).records)
    except ValueError:  # it has only just begun
        return 0
