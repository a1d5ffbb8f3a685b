"""Run folders: nothing is overwritten, nothing is half-written, and errors offer what there is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paretoprune.criteria import Bounds
from paretoprune.experiments.commands.options import SearchOptions
from paretoprune.experiments.runs import (
    RunSpec,
    check_name,
    comparison_dir,
    create_run,
    default_name,
    list_runs,
    load_run,
    write_json,
)

SPEC = RunSpec(
    "resnet56-cifar10",
    0.5,
    100,
    ("l2", "taylor"),
    objectives=("accuracy", "params"),
    granularity="stage",
    bounds=Bounds(multiple=8, max_ratio=0.8, exclude=("layer1.*", "conv1")),
    data="cifar10:/data",
)


def test_a_run_comes_back_as_it_was_written(tmp_path: Path) -> None:
    folder = create_run(tmp_path / "runs", "first", SPEC)
    assert load_run(tmp_path / "runs", "first") == (folder, SPEC)
    assert sorted(file.name for file in folder.iterdir()) == ["run.json"]
    assert SPEC.libraries["torch"]


def test_a_target_in_macs_stays_an_int(tmp_path: Path) -> None:
    create_run(tmp_path, "first", RunSpec("digits", 60_000_000, 1, ("l2",)))
    flops = load_run(tmp_path, "first")[1].flops
    assert flops == 60_000_000
    assert isinstance(flops, int)


def test_an_occupied_name_is_refused_and_left_alone(tmp_path: Path) -> None:
    create_run(tmp_path, "first", SPEC)
    with pytest.raises(ValueError, match="paretoprune resume first"):
        create_run(tmp_path, "first", RunSpec("digits", 0.3, 1, ("l1",)))
    assert load_run(tmp_path, "first")[1] == SPEC


def test_a_folder_that_is_no_run_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    with pytest.raises(ValueError, match="is no run"):
        check_name(tmp_path, "notes")


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "-x"])
def test_a_name_is_a_plain_file_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="a run name has letters"):
        check_name(tmp_path, name)
    with pytest.raises(ValueError, match="no run"):
        load_run(tmp_path, name)


def test_an_unknown_run_is_answered_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no runs yet"):
        load_run(tmp_path, "frist")
    create_run(tmp_path, "first", SPEC)
    create_run(tmp_path, "second", SPEC)
    with pytest.raises(ValueError, match=r"no run 'frist'.*there are: second, first"):
        load_run(tmp_path, "frist")


def test_names_count_up_from_what_is_there(tmp_path: Path) -> None:
    assert default_name(tmp_path, "resnet56-cifar10", 0.5) == "resnet56-cifar10-50pct-1"
    create_run(tmp_path, "resnet56-cifar10-50pct-1", SPEC)
    assert default_name(tmp_path, "resnet56-cifar10", 0.5) == "resnet56-cifar10-50pct-2"
    name = default_name(tmp_path, "torchvision:resnet50", 60_000_000)
    assert name == "torchvision-resnet50-60M-1"
    check_name(tmp_path, name)
    for number in (1, 2):  # no comparison takes the place of another
        folder = comparison_dir(tmp_path, "mynet:net")
        assert folder == tmp_path / "comparisons" / f"mynet-net-{number}"
        folder.mkdir(parents=True)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 99}', '{"version": 1}'])
def test_a_damaged_run_is_named(tmp_path: Path, text: str) -> None:
    folder = create_run(tmp_path, "first", SPEC)
    (folder / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json cannot be read"):
        load_run(tmp_path, "first")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [one.name for one in tmp_path.iterdir()] == ["run.json"]


def test_a_full_disk_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(tmp_path / "run.json", {"a": 1})

    def fill(file: Path, text: str) -> None:
        file.write_bytes(text.encode()[:5])
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fill)
        with pytest.raises(OSError, match="No space left"):
            write_json(tmp_path / "run.json", {"a": 2})
    assert [one.name for one in tmp_path.iterdir()] == ["run.json"]
    assert json.loads((tmp_path / "run.json").read_text()) == {"a": 1}


def test_a_run_has_the_sampler_that_a_search_takes_by_default() -> None:
    assert SPEC.sampler == SearchOptions("digits", "50%").checked().sampler


def test_the_newest_run_comes_first(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "nowhere") == []
