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
from paretoprune.experiments.reproduce.common import SCALE, Results, without_lowest
from paretoprune.experiments.reproduce.page import page
from paretoprune.experiments.reproduce.published import PUBLISHED
from paretoprune.experiments.training import Training
from paretoprune.surgery import trace

SMALL = ["--networks", "digits", "--epochs", "1", "--images", "300", "--test-images", "120"]
SCRIPTS: dict[str, tuple[Any, list[str], int]] = {
    "everything": (
        everything,
        ["--reductions", "60", "--recovery", "1", "--trials", "4", "--workers", "0",
         "--criterion", "l2", "--draws", "1",
         "--methods", "greedy,search distilled,layers,neurons,half the layers distilled"],
        5,
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
    if name == "everything":
        by_method = {row["method"]: row for row in found}
        assert all(float(row["macs_reduction"]) >= 60 for row in found)
        assert len({row["epochs_total"] for row in found}) == 1  # of equal cost
        assert int(by_method["greedy"]["epochs_total"]) > 1
        assert by_method["neurons"]["removed_blocks"] == "0"
        assert int(by_method["half the layers distilled"]["removed_blocks"]) > 0
        assert "(1 drawn)" in page(tmp_path)
    capsys.readouterr()
    text = file.read_text()
    script.main(arguments)
    assert file.read_text() == text
    assert "epoch" not in capsys.readouterr().out.replace("'epochs", "")


def test_a_row_that_goes_on_does_not_say_what_it_took(tmp_path: Path) -> None:
    results = Results(tmp_path / "rows.csv", ("method",), tmp_path / "work", ("energy",))
    scale = dict.fromkeys(SCALE, 1)

    def stopped() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        results.measure({"method": "l1", **scale}, stopped)
    for method in ("l1", "l2"):
        results.measure({"method": method, **scale}, lambda: {"accuracy": 90})
    resumed, whole = rows(tmp_path / "rows.csv")
    taken = ("seconds", "work_kwh", "work_co2_grams")
    assert resumed["accuracy"] == "90"
    assert [resumed[name] for name in taken] == ["", "", ""]
    assert all(float(whole[name]) >= 0 for name in taken)


def test_robustness_and_energy_are_columns(tmp_path: Path) -> None:
    more = ["--reductions", "40", "--methods", "l2", "--report", "robustness,energy"]
    places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "proscore.csv")]
    proscore.main([*SMALL, *more, *places])
    (row,) = rows(tmp_path / "proscore.csv")
    for name in ("fgsm_2", "fgsm_8", "corrupted"):
        assert 0 <= float(row[name]) <= 100
        assert 0 < float(row[f"dense_{name}"]) <= 100
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
