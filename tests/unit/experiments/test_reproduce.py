"""The scripts that reproduce papers measure their rows once, at any scale."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from paretoprune.experiments import recipes
from paretoprune.experiments.models import resnet110, vgg16
from paretoprune.experiments.reproduce import everything, proscore, receding, sosp
from paretoprune.experiments.reproduce import page as writing
from paretoprune.experiments.reproduce.common import SCALE, Results, without_lowest
from paretoprune.experiments.reproduce.page import page
from paretoprune.experiments.reproduce.published import PUBLISHED
from paretoprune.experiments.training import Training
from paretoprune.search import read_run
from paretoprune.surgery import trace
from tests.unit.experiments.interrupting import interrupted

SMALL = ["--networks", "digits", "--epochs", "1", "--images", "300", "--test-images", "120"]
SCRIPTS: dict[str, tuple[Any, list[str], int]] = {
    "everything": (
        everything,
        ["--reductions", "60", "--recovery", "1", "--trials", "4", "--workers", "0",
         "--criterion", "l2", "--draws", "1", "--again", "2",
         "--methods", ",".join(everything.METHODS)],
        7,
    ),
    "receding": (receding, ["--reductions", "0,50"], 6),
    "sosp": (sosp, ["--reductions", "50", "--parts", "ratios"], 3),
    "sosp-bottlenecks": (sosp, ["--reductions", "50", "--parts", "bottlenecks"], 3),
    "proscore": (proscore, ["--reductions", "40", "--methods", "proscore,l2"], 2),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense network need not be good."""
    monkeypatch.setattr(recipes, "DIGITS_TRAINING", Training(epochs=2, learning_rate=0.1))


def rows(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


@pytest.mark.parametrize("name", SCRIPTS)
def test_rows_are_measured_once(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, more, count = SCRIPTS[name]
    out = tmp_path / f"{name.split('-')[0]}.csv"
    arguments = [*SMALL, *more, "--work", str(tmp_path / "work"), "--out", str(out)]
    script.main(arguments)
    file = tmp_path / f"{name}.csv"
    found = rows(file)
    assert len(found) == count
    for row in found:
        assert row["full"] == "False"
        assert (row["epochs"], row["images"], row["test_images"]) == ("1", "300", "120")
        assert 0 <= float(row["accuracy"]) <= 100
        assert row["torch"] == torch.__version__.split("+")[0]
        first = name != "receding" or row["reduction"] == "0.0"  # it trains the dense network
        assert (row["seconds"] != "") == first
    if name == "everything":
        by_method = {row["method"]: row for row in found}
        assert all(float(row["macs_reduction"]) >= 60 for row in found)
        again = int(by_method.pop("search distilled again")["epochs_total"])
        (spent,) = {int(row["epochs_total"]) for row in by_method.values()}  # of equal cost
        assert again == spent + 2
        assert spent > 1
        assert by_method["neurons"]["removed_blocks"] == "0"
        assert int(by_method["half the layers distilled"]["removed_blocks"]) > 0
        assert f"{again} epochs, 2 of them again (1 drawn)" in page(tmp_path)
    capsys.readouterr()
    text = file.read_text()
    script.main(arguments)
    assert file.read_text() == text
    assert "epoch" not in capsys.readouterr().out.replace("'epochs", "")


def test_a_row_of_earlier_work_does_not_say_what_it_took(tmp_path: Path) -> None:
    results = Results(tmp_path / "rows.csv", ("method",), ("energy",))
    scale = dict.fromkeys(SCALE, 1)
    reused = [tmp_path / "what the row before took"]

    def goes_on() -> dict[str, Any]:
        reused.append(tmp_path / "l2.part")
        return {"accuracy": 90}

    results.measure({"method": "l1", **scale}, lambda: {"accuracy": 80}, reused)
    results.measure({"method": "l2", **scale}, goes_on, reused)
    results.measure({"method": "l3", **scale}, lambda: {"accuracy": 70})
    whole, resumed, untrained = rows(tmp_path / "rows.csv")
    taken = ("seconds", "work_kwh", "work_co2_grams")
    assert resumed["accuracy"] == "90"
    assert [resumed[name] for name in taken] == ["", "", ""]
    assert all(float(row[name]) >= 0 for name in taken for row in (whole, untrained))


def test_a_row_that_was_broken_off_is_one_of_earlier_work(tmp_path: Path) -> None:
    arguments = [*SMALL, "--reductions", "0", "--methods", "plain"]
    places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "receding.csv")]
    with interrupted(), pytest.raises(KeyboardInterrupt):
        receding.main([*arguments, *places])
    receding.main([*arguments, *places])
    (row,) = rows(tmp_path / "receding.csv")
    assert row["seconds"] == ""


def test_scripts_do_not_take_each_others_networks(tmp_path: Path) -> None:
    """`l1` removes 30 % of the FLOPs in one, and of the structures or filters in others."""
    for script, more in ((proscore, []), (receding, []), (sosp, ["--parts", "ratios"])):
        out = tmp_path / f"{script.__name__.rpartition('.')[2]}.csv"
        places = ["--work", str(tmp_path / "work"), "--out", str(out)]
        given = [*SMALL, "--methods", "l1", "--reductions", "30", *more, *places]
        script.main(given)
        (row,) = rows(out)
        assert float(row["seconds"]) >= 0
        script.main([*given, "--test-images", "60"])
        _, again = rows(out)
        assert again["seconds"] == "", "its networks were there"


def test_epochs_are_those_that_were_trained(tmp_path: Path) -> None:
    """A search before its greedy run guesses what that spends; one after it knows."""
    options = ["--reductions", "60", "--recovery", "1", "--trials", "1", "--workers", "0",
               "--criterion", "l2", "--methods", "search",
               "--work", str(tmp_path / "work")]  # fmt: skip
    guessed, known = tmp_path / "guessed.csv", tmp_path / "known.csv"
    everything.main([*SMALL, *options, "--out", str(guessed)])
    (first,) = rows(guessed)
    greedy = {**first, "method": "greedy", "epochs_total": "2"}
    with known.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(greedy))
        writer.writeheader()
        writer.writerow(greedy)
    everything.main([*SMALL, *options, "--out", str(known)])
    _, second = rows(known)
    assert (first["epochs_total"], second["epochs_total"]) == ("7", "2")
    trained = {
        record.finetuned_metrics["epochs"]
        for journal in tmp_path.glob("work/*/search-*/journal.log")
        for record in read_run(journal.parent).records
    }
    assert trained == {7, 2}
    everything.main([*SMALL, *options, "--test-images", "60", "--out", str(guessed)])
    _, again = rows(guessed)
    assert (again["epochs_total"], again["seconds"]) == ("7", ""), "the search was there"


def test_epochs_again_may_be_mixed(tmp_path: Path) -> None:
    options = ["--reductions", "60", "--recovery", "0", "--trials", "1", "--workers", "0",
               "--criterion", "l2", "--methods", everything.AGAIN, "--again", "1",
               "--mixup", "0.2", "--work", str(tmp_path / "work")]  # fmt: skip
    everything.main([*SMALL, *options, "--out", str(tmp_path / "everything.csv")])
    (row,) = rows(tmp_path / "everything.csv")
    assert (row["epochs_total"], row["mixup"]) == ("2", "0.2")
    assert "2 epochs, 1 of them again with mixup 0.2 of 300 images" in page(tmp_path)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--methods", everything.AGAIN), "needs its epochs: give --again, at least 1"),
        (("--report-images", "0"), "--report-images: must be at least 1, but got 0"),
        (("--mixup", "0.4"), "--mixup is for the epochs of --again"),
        (("--mixup", "0.4", "--again", "1", "--draws", "1"), "do not recur (--draws 0)"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        everything.main([*SMALL, *options])
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_robustness_and_energy_are_columns(tmp_path: Path) -> None:
    more = ["--reductions", "40", "--methods", "l2", "--report", "robustness,energy",
            "--report-images", "100"]  # fmt: skip
    places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "proscore.csv")]
    proscore.main([*SMALL, *more, *places])
    (row,) = rows(tmp_path / "proscore.csv")
    assert (row["test_images"], row["robust_images"]) == ("120", "100")
    for name in ("fgsm_2", "fgsm_8", "corrupted"):
        assert 0 <= float(row[name]) <= 100
        assert 0 < float(row[f"dense_{name}"]) <= 100
        assert float(row[f"dense_{name}"]) % 1 == 0 or name == "corrupted", "of 100 images"
    assert float(row["dense_fgsm_8"]) <= float(row["dense_fgsm_2"]) <= float(row["dense_accuracy"])
    assert float(row["latency_ms"]) > 0 < float(row["dense_latency_ms"])
    assert float(row["work_kwh"]) > 0
    text = page(tmp_path)
    assert f"{row['dense_corrupted']} → {row['corrupted']}" in text


def test_units_go_by_their_number() -> None:
    model = vgg16()
    graph = trace(model, torch.randn(2, 3, 32, 32))
    saliency = {g.name: torch.randperm(g.size).float() / g.size for g in graph.open_groups}
    total = sum(group.size for group in graph.open_groups)
    plan = without_lowest(graph.open_groups, saliency, 0.5, least=3)
    assert sum(map(len, plan.kept.values())) == pytest.approx(total / 2, abs=1)
    plan = without_lowest(graph.open_groups, saliency, 0.5, least=3, each=True)
    assert all(len(plan.kept[g.name]) == g.size // 2 for g in graph.open_groups)
    plan = without_lowest(graph.open_groups, saliency, 1.0, least=3)
    assert {len(kept) for kept in plan.kept.values()} == {3}
    equal = {name: torch.zeros_like(scores) for name, scores in saliency.items()}
    plan = without_lowest(graph.open_groups, equal, 0.25, least=3, each=True)
    assert all(len(plan.kept[g.name]) == g.size * 3 // 4 for g in graph.open_groups)
    plan = without_lowest(graph.open_groups, saliency, 0.0, least=3)
    assert sum(map(len, plan.kept.values())) == total


def test_the_networks_are_the_published_ones() -> None:
    counted = trace(vgg16(), torch.randn(2, 3, 32, 32)).cost()
    assert counted.macs == 313_201_664
    assert len(trace(resnet110(), torch.randn(2, 3, 32, 32)).blocks) == 52


def test_rows_of_other_settings_are_not_averaged(tmp_path: Path) -> None:
    columns = "network,method,reduction,seed,epochs,images,test_images,batch_size,learning_rate"
    lines = [f"{columns},full,accuracy_before,accuracy"]
    for seed, rate, accuracy in ((0, 0.05, 80.0), (1, 0.05, 82.0), (0, 0.01, 60.0)):
        lines.append(f"resnet20,l1,50,{seed},1,300,120,128,{rate},False,50.0,{accuracy}")
    (tmp_path / "proscore.csv").write_text("\n".join(lines) + "\n")
    text = page(tmp_path)
    assert "| 81.00 ± 1.00 (n=2) |" in text
    assert "| 60.00 |" in text


@pytest.mark.usefixtures("ascii_locale")
def test_the_page_is_utf_8_in_every_locale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "PAGE", tmp_path / "results.md")
    writing.main()
    assert "“FLOPs”" in (tmp_path / "results.md").read_text(encoding="utf-8")


def test_the_page_says_what_shares_of_structures_are_in_flops_and_time(tmp_path: Path) -> None:
    columns = "network,method,reduction,seed,epochs,images,test_images,macs_reduction"
    (tmp_path / "sosp.csv").write_text(
        f"{columns},full,accuracy_before,accuracy\nresnet20,l1,50,0,1,300,120,75.62,False,9,60\n"
    )
    (tmp_path / "sosp-time.csv").write_text(
        "network,method,structures,params,criterion_seconds\n"
        "resnet8 x1,sosp_h,400,78042,2.5\nresnet8 x1,l1,400,78042,0.01\n"
    )
    text = page(tmp_path)
    assert "| structures removed | method | FLOPs removed |" in text
    assert "| 50.00 % | **l1** | 75.62 % | 9.00 | 60.00 |" in text
    assert "| structures | params | sosp_h | l1 |" in text
    assert "| resnet8 x1 | 400 | 78,042 | 2.5 | 0.01 |" in text


def test_published_rows_are_plausible() -> None:
    for row in PUBLISHED:
        assert 0 <= row.reduction < 100
        assert row.accuracy is None or 80 < row.accuracy < 95
        assert row.accuracy is not None or row.delta is not None
        assert row.source
    assert len({(r.table, r.network, r.method, r.reduction) for r in PUBLISHED}) == len(PUBLISHED)
