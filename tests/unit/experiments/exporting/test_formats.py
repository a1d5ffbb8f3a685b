"""Files for other runtimes compute what the network does, for any batch size, or are not there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from paretoprune.experiments.__main__ import main
from paretoprune.experiments.data.sources import first_examples
from paretoprune.experiments.exporting.formats import (
    FORMATS,
    OPSET,
    ExportFailed,
    Written,
    parse_formats,
    write_format,
)
from paretoprune.experiments.models import digits_resnet
from paretoprune.surgery import PruningPlan, prune, trace

PLAN = PruningPlan({"layer1.0.conv1": (0, 2, 4), "layer2.0.conv1": tuple(range(8))}, ("layer3.1",))


class Mixes(nn.Module):
    """Two inputs by name, one of them optional, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor | None = None) -> dict[str, Tensor]:
        out = self.linear(a)
        return {"sum": out if b is None else out + b, "mean": a.mean(1)}


class Pairs(nn.Module):
    """A network that is written for batches of two."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)


@pytest.fixture(scope="module")
def networks() -> tuple[nn.Module, nn.Module]:
    """A dense network and a pruned one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = digits_resnet().eval()
        graph = trace(dense, torch.randn(2, 1, 8, 8))
        return dense, prune(dense, graph, PLAN).eval()


def written(name: str, folder: Path, dense: nn.Module, small: nn.Module, batch: Any) -> Written:
    """Writes a format with little time for latencies."""
    (folder / "scratch").mkdir()
    return write_format(
        name, folder, dense, small, batch, first_examples(batch, 2), folder / "scratch"
    )


def images(number: int) -> Tensor:
    return torch.randn(number, 1, 8, 8)


def test_onnx_computes_the_same_for_any_batch_size(
    networks: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    facts = written("onnx", tmp_path, *networks, images(6))
    file = tmp_path / "model.onnx"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for number in (1, 2, 7):
        inputs = images(number)
        (outputs,) = session.run(None, {"inputs": inputs.numpy()})
        expected = networks[1](inputs).detach().numpy()
        np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)
    model = onnx.load(file)
    onnx.checker.check_model(model)
    assert [one.version for one in model.opset_import if one.domain == ""] == [OPSET]
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert f"opset {OPSET}" in facts.runtime
    assert facts.file_bytes[1] == file.stat().st_size < facts.file_bytes[0]
    assert facts.examples == 6
    assert facts.difference < 1e-4
    assert str(Path.cwd()).encode() not in file.read_bytes(), "it names folders of this machine"
    assert {one.name for one in tmp_path.iterdir()} == {"model.onnx", "scratch"}, "one file"


def test_pt2_computes_the_same_for_any_batch_size(
    networks: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    facts = written("pt2", tmp_path, *networks, images(6))
    file = tmp_path / "model.pt2"
    model = torch.export.load(file).module()
    for number in (1, 2, 7):
        inputs = images(number)
        torch.testing.assert_close(model(inputs), networks[1](inputs))
    assert facts.file_bytes[1] == file.stat().st_size < facts.file_bytes[0]
    assert str(Path.cwd()).encode() not in file.read_bytes(), "it names folders of this machine"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("call", ["tuple", "names in another order"])
def test_networks_with_several_inputs_and_outputs(name: str, call: str, tmp_path: Path) -> None:
    model = Mixes().eval()
    a, b = torch.randn(5, 4), torch.randn(5, 3)
    batch = (a, b) if call == "tuple" else {"b": b, "a": a}
    facts = written(name, tmp_path, model, model, batch)
    assert facts.examples == 5
    assert facts.difference < 1e-5


@pytest.mark.parametrize("name", FORMATS)
def test_a_network_with_a_fixed_batch_size_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ExportFailed, match=f"cannot be written as {name} with a free batch size"):
        written(name, tmp_path, Pairs(), Pairs(), torch.randn(2, 4))


def test_a_file_that_computes_something_else_is_refused(
    networks: tuple[nn.Module, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pt2 = FORMATS["pt2"]

    def wrong(program: Any, file: Path) -> None:
        bias = program.state_dict["linear.bias"]
        program.state_dict["linear.bias"] = nn.Parameter(bias + 0.01)
        pt2.write(program, file)

    monkeypatch.setitem(FORMATS, "pt2", replace(pt2, write=wrong))
    with pytest.raises(ExportFailed, match=r"model\.pt2 does not compute .* on real inputs"):
        written("pt2", tmp_path, *networks, images(3))


def test_a_file_that_is_wrong_for_one_example_alone_is_refused(
    networks: tuple[nn.Module, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pt2 = FORMATS["pt2"]

    def opened(file: Path) -> Callable[[Any], Any]:
        run = pt2.open(file)
        return lambda inputs: run(inputs) + float(len(inputs) == 1)

    monkeypatch.setitem(FORMATS, "pt2", replace(pt2, open=opened))
    with pytest.raises(ExportFailed, match=r"model\.pt2 does not compute .* on real inputs"):
        written("pt2", tmp_path, *networks, images(3))


def test_outputs_that_are_not_numbers_are_no_match(tmp_path: Path) -> None:
    class Nan(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 0 * 0

    with pytest.raises(ExportFailed, match="does not compute"):
        written("pt2", tmp_path, Nan(), Nan(), torch.ones(3, 2))


def test_the_formats_are_what_was_asked_for_once() -> None:
    assert parse_formats("safetensors") == ()
    assert parse_formats("safetensors, onnx,pt2,onnx") == ("onnx", "pt2")
    with pytest.raises(ValueError, match="'gguf'; available: safetensors, onnx, pt2"):
        parse_formats("onnx,gguf")


def test_a_missing_extra_is_named_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found: Callable[[str], object] = importlib.util.find_spec
    lacks = {"onnxruntime", "onnxscript"}
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name in lacks else found(name)
    )
    assert parse_formats("safetensors,pt2") == ("pt2",)
    assert main(["export", "no-such-run", "--to", "x", "--format", "onnx"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs onnxscript, onnxruntime" in line
    assert "pip install 'paretoprune[onnx]'" in line


def test_first_examples_repeat_where_there_are_too_few() -> None:
    one = torch.randn(1, 3)
    assert torch.equal(first_examples(one, 2), torch.cat([one, one]))
    both = first_examples({"a": torch.arange(6).reshape(3, 2), "n": 5}, 2)
    assert both["n"] == 5
    assert both["a"].tolist() == [[0, 1], [2, 3]]
