"""An export reloads as it was, or says in one sentence why not; it never runs foreign code."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from paretoprune.experiments.models import digits_resnet, resnet20
from paretoprune.surgery import PruningPlan, UnsupportedModel, load, prune, save, trace
from paretoprune.surgery.recorded import Recorded
from tests.unit.surgery.oracles import call, difference, half, loss, masked_outputs, outputs
from tests.unit.surgery.specimen import settle
from tests.unit.surgery.specimens import ZOO, traced
from tests.unit.surgery.zoo_attention import Derived, Transformer

REFERENCE = "paretoprune.experiments.models:digits_resnet"
IMAGES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, nn.Module]:
    """A pruned digits network and the folder it is saved in."""
    model = digits_resnet()
    settle(model)
    graph = trace(model.eval(), IMAGES)
    plan = PruningPlan(half(graph).kept, ("layer2.1",))
    small = prune(model, graph, plan)
    save(
        tmp_path / "export",
        small,
        plan,
        reference=REFERENCE,
        metrics={"accuracy": 0.9},
        example_inputs=IMAGES,
    )
    return tmp_path / "export", small


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes plan.json in place."""
    described = json.loads((folder / "plan.json").read_text())
    described = change(described) or described
    (folder / "plan.json").write_text(json.dumps(described))


def rewrite_weights(folder: Path, data: bytes) -> None:
    """Replaces model.safetensors, and its checksum in plan.json."""
    (folder / "model.safetensors").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    rewrite(folder, lambda plan: plan.update(sha256=digest))


@pytest.mark.parametrize("name", ZOO)
def test_a_round_trip_gives_equal_outputs(name: str, tmp_path: Path) -> None:
    model, graph = traced(name)
    plan = PruningPlan(half(graph).kept, tuple(graph.blocks)[:1])
    small, inputs = prune(model, graph, plan), ZOO[name].inputs(3)
    save(tmp_path, small, plan, example_inputs=inputs)
    again = load(tmp_path, ZOO[name].build)
    assert repr(again) == repr(small)
    assert not any(module.training for module in again.modules())
    for a, b in zip(outputs(small, inputs), outputs(again, inputs), strict=True):
        assert torch.equal(a, b)
    assert trace(again, inputs).cost() == graph.cost(plan)


class Padded(nn.Module):
    """An encoder of torch that is built to take nested tensors where tokens are padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.embed, self.out = nn.Linear(4, 8), nn.Linear(8, 5)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, padding: Tensor) -> Any:
        x = self.encoder(self.embed(x), src_key_padding_mask=padding)
        return self.out(x.masked_fill(padding[..., None], 0).sum(1))


class Translator(nn.Module):
    """A whole transformer of torch, which demands inputs of the width it was built with."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(4, 8), nn.Linear(8, 5)
        self.inner = nn.Transformer(8, 2, 1, 1, 12, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.out(self.inner(self.embed(x), self.embed(y)))


@pytest.mark.parametrize(
    ("build", "other"),
    [(Padded, torch.arange(6) > torch.tensor([[3], [5]])), (Translator, torch.randn(2, 3, 4))],
)
def test_transformers_of_torch_forget_their_dense_widths(
    build: Any, other: Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, inputs = build().eval(), (torch.randn(2, 6, 4), other)
    settle(model)
    graph = trace(model, inputs)
    assert "embed" in {group.name for group in graph.open_groups}
    small = prune(model, graph, half(graph))
    save(tmp_path, small, half(graph))
    expected = masked_outputs(model, graph, half(graph), inputs)
    for network in (small, load(tmp_path, build)):
        assert difference(expected, outputs(network, inputs)) < 1e-5


def test_the_recorded_reference_is_enough(exported: tuple[Path, nn.Module]) -> None:
    folder, small = exported
    for again in (load(folder), load(str(folder), REFERENCE), load(folder, digits_resnet)):
        assert torch.equal(outputs(again, IMAGES)[0], outputs(small, IMAGES)[0])


def test_pads_and_removed_blocks_survive(exported: tuple[Path, nn.Module]) -> None:
    again: Any = load(exported[0])
    small: Any = exported[1]
    assert isinstance(again.layer2[1], nn.Identity)
    assert again.layer2[0].shortcut.padding == small.layer2[0].shortcut.padding
    assert sum(small.layer2[0].shortcut.padding) < 8


def test_a_fine_tuned_network_comes_back_with_its_weights(
    exported: tuple[Path, nn.Module],
) -> None:
    folder, small = exported
    plan = PruningPlan.from_json(json.loads((folder / "plan.json").read_text())["plan"])
    optimizer = torch.optim.SGD(small.train().parameters(), 0.1)
    loss(call(small, torch.randn(8, 1, 8, 8))).backward()
    optimizer.step()
    save(folder, small, plan, reference=REFERENCE)
    again = load(folder).train()
    for a, b in zip(again.state_dict().values(), small.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    loss(call(again, torch.randn(8, 1, 8, 8))).backward()
    assert all(parameter.grad is not None for parameter in again.parameters())


def test_tied_weights_come_back_tied(tmp_path: Path) -> None:
    model, graph = traced("called_twice")
    save(tmp_path, prune(model, graph, half(graph)), half(graph))
    again: Any = load(tmp_path, ZOO["called_twice"].build)
    assert again.first.weight is again.second.weight


def test_what_is_recorded(exported: tuple[Path, nn.Module]) -> None:
    described = json.loads((exported[0] / "plan.json").read_text())
    assert described["reference"] == REFERENCE
    assert described["metrics"] == {"accuracy": 0.9}
    assert described["inputs"] == {"shape": [2, 1, 8, 8], "dtype": "torch.float32"}
    assert described["plan"]["removed"] == ["layer2.1"]
    assert {file.name for file in exported[0].iterdir()} == {"plan.json", "model.safetensors"}


WITHOUT = """
import sys
for name in ("ray", "optuna", "mlflow", "pandas", "sklearn"):
    sys.modules[name] = None  # importing it raises
"""


def test_loading_needs_neither_ray_nor_optuna_nor_mlflow(
    exported: tuple[Path, nn.Module],
) -> None:
    program = f"{WITHOUT}\nfrom paretoprune.surgery import load\nload(sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, str(exported[0])], check=True)


def test_a_recorded_module_loads_where_no_searching_is_possible(
    recorded: tuple[Path, nn.Module],
) -> None:
    folder, small = recorded
    inputs = ZOO["derived_attention"].inputs(3)
    save_file({"inputs": inputs}, folder / "inputs.safetensors")
    program = f"""{WITHOUT}
sys.path[:0] = {sys.path!r}
from safetensors.torch import load_file, save_file
from paretoprune.surgery import load
from tests.unit.surgery.zoo_attention import Derived, Transformer
network = load(sys.argv[1], lambda: Transformer(Derived()))
inputs = load_file(sys.argv[1] + "/inputs.safetensors")["inputs"]
save_file({{"outputs": network(inputs).detach()}}, sys.argv[1] + "/outputs.safetensors")
"""
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True)
    found = load_file(folder / "outputs.safetensors")["outputs"]
    assert difference(outputs(small, inputs), [found]) < 1e-6


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Path, nn.Module]:
    """A pruned network whose attention is a recording, and the folder it is saved in."""
    model, graph = traced("derived_attention")
    plan = PruningPlan({"attention.qkv": (1, 2), "embed": (0, 2, 3, 5, 7)})
    small = prune(model, graph, plan)
    assert isinstance(small.attention, Recorded)
    save(tmp_path, small, plan)
    return tmp_path, small


def set_step(plan: dict[str, Any], operator: str, *, kind: str = "call") -> None:
    step = next(s for s in plan["recorded"]["attention"]["steps"] if s[1] == "call")
    step[1:4] = [kind, operator, ["/etc/hostname"]]


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: set_step(plan, "aten.from_file.default"),
        lambda plan: set_step(plan, "aten.from_file.default", kind="input"),
        lambda plan: set_step(plan, "aten.from_file.default", kind=""),
        lambda plan: set_step(plan, "operator.call"),
        lambda plan: set_step(plan, "builtins.eval.default"),
        lambda plan: set_step(plan, "prims.convert_element_type.default"),
        lambda plan: set_step(plan, "aten.nothing.default"),
        lambda plan: set_step(plan, "aten.relu"),
        lambda plan: set_step(plan, "aten.relu.default.x"),
        lambda plan: set_step(plan, ""),
        lambda plan: plan["recorded"]["attention"].pop("inputs") and None,
        lambda plan: plan["recorded"]["attention"].update(steps=[["a", "call"]]),
        lambda plan: plan["recorded"]["attention"].update(outputs={"torch": "load"}),
        lambda plan: plan["recorded"]["attention"].update(outputs={"eval": "1"}),
        lambda plan: plan["recorded"].update(nothing=plan["recorded"]["attention"]),
        lambda plan: plan["recorded"].update({"": plan["recorded"]["attention"]}),
        lambda plan: plan.update(recorded=["attention"]),
        lambda plan: plan.update(recorded={}),
    ],
)
def test_a_tampered_recording_is_one_clear_sentence(
    change: Any, recorded: tuple[Path, nn.Module]
) -> None:
    folder, _ = recorded
    rewrite(folder, change)
    if json.loads((folder / "plan.json").read_text())["recorded"] == {}:
        again = load(folder, ZOO["derived_attention"].build)  # fits, but its code cannot run
        with pytest.raises(RuntimeError):
            call(again, ZOO["derived_attention"].inputs())
        return
    with pytest.raises(ValueError, match="does not fit Transformer: "):
        load(folder, ZOO["derived_attention"].build)


@pytest.mark.parametrize(
    "name", ["derived_attention", "windowed_attention", "torch_attention", "decoder", "residual"]
)
def test_a_network_that_was_pruned_again_and_fine_tuned_comes_back(
    name: str, tmp_path: Path
) -> None:
    model, graph = traced(name)
    inputs = ZOO[name].inputs(4)
    first = PruningPlan({g.name: tuple(range(1, g.size)) for g in graph.open_groups if g.size > 2})
    small = prune(model, graph, first)
    again = trace(small, inputs)
    second = PruningPlan(
        {g.name: tuple(range(g.size - 1)) for g in again.open_groups if g.name in first.kept}
    )
    assert second.kept
    smaller = prune(small, again, second).train()
    optimizer = torch.optim.SGD(smaller.parameters(), 0.01)
    loss(call(smaller, inputs)).backward()
    optimizer.step()
    save(tmp_path, smaller, first.then(second))
    found = load(tmp_path, ZOO[name].build)
    assert difference(outputs(smaller.eval(), inputs), outputs(found, inputs)) == 0
    assert trace(found, inputs).cost() == again.cost(second)
    loss(call(found.train(), inputs)).backward()
    assert all(parameter.grad is not None for parameter in found.parameters())


class SetWhileRunning(nn.Module):
    """Notes the size of its image when it runs, as hierarchical transformers do."""

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.height: int | None = None
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Any:
            self.height, self.width = 4, 4
            return self.linear(x)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.stage, self.out = nn.Conv2d(3, 8, 1), self.Stage(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.conv(x)).flatten(2).transpose(1, 2)
        return self.out(torch.relu(self.stage(x)).mean(1))


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True), (False, False)])
def test_integers_that_code_sets_while_it_runs_are_no_sizes(
    before: bool, after: bool, tmp_path: Path
) -> None:
    model, inputs = SetWhileRunning().eval(), torch.randn(2, 3, 4, 4)
    if before:
        model(inputs)
    graph = trace(model, inputs)
    plan = half(graph)
    small = prune(model, graph, plan)
    save(tmp_path, small, plan)
    dense = SetWhileRunning()
    if after:
        dense(inputs)
    again = load(tmp_path, lambda: dense)
    assert torch.equal(outputs(again, inputs)[0], outputs(small, inputs)[0])


class TwoNames(nn.Module):
    """Attention that must be recorded and a block that goes, both registered twice."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Transformer(Derived())
        self.extra = Branch()
        self.body = nn.ModuleList([self.net.attention, self.extra])
        self.all = nn.Sequential(self.net, self.extra, nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Any:
        return self.all(x)


class Branch(nn.Module):
    """A residual block of five channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Any:
        return x + self.second(torch.relu(self.first(x)))


def test_modules_of_two_names_are_replaced_under_both(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = TwoNames().eval(), ZOO["derived_attention"].inputs()
    graph = trace(model, inputs)
    plan = PruningPlan(half(graph).kept, tuple(graph.blocks)[-1:])
    assert plan.removed
    assert graph.recorded
    small: Any = prune(model, graph, plan)
    assert small.extra is small.body[1] is small.all[1]
    assert isinstance(small.extra, nn.Identity)
    assert small.net.attention is small.body[0]
    assert isinstance(small.body[0], Recorded)
    save(tmp_path, small, plan)
    again: Any = load(tmp_path, TwoNames)
    assert again.extra is again.body[1] is again.all[1]
    assert again.net.attention is again.body[0]
    assert torch.equal(outputs(again, inputs)[0], outputs(small, inputs)[0])


@pytest.mark.parametrize("file", ["plan.json", "model.safetensors"])
def test_a_missing_file_is_named(file: str, exported: tuple[Path, nn.Module]) -> None:
    (exported[0] / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"is no export: it has no {file}"):
        load(exported[0])


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing is no export: it has no plan\.json"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize("position", [0, 20, -1])
def test_a_flipped_byte_is_noticed(position: int, exported: tuple[Path, nn.Module]) -> None:
    weights = exported[0] / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[position] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match=r"is not the file that plan\.json was written for"):
        load(exported[0])


def test_weights_that_are_no_safetensors_are_refused(exported: tuple[Path, nn.Module]) -> None:
    rewrite_weights(exported[0], b"not tensors")
    with pytest.raises(ValueError, match="is no safetensors file"):
        load(exported[0])


def test_weights_of_another_precision_are_refused(exported: tuple[Path, nn.Module]) -> None:
    weights = load_file(exported[0] / "model.safetensors")
    weights["conv1.weight"] = weights["conv1.weight"].half()
    rewrite_weights(exported[0], serialize(weights))
    with pytest.raises(ValueError, match=r"tensor 'conv1\.weight' has another rank or dtype"):
        load(exported[0])


def set_layer(plan: dict[str, Any], layer: str, **attributes: Any) -> None:
    plan["layers"].setdefault(layer, {}).update(attributes)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda plan: plan.update(schema=2), "has schema 2 and this version reads schema 1"),
        (lambda plan: plan.pop("schema") and None, "is no plan"),
        (lambda plan: plan.pop("plan") and None, "is no plan"),
        (lambda plan: plan.pop("sha256") and None, "lacks sha256"),
        (lambda plan: plan.pop("layers") and None, "lacks layers"),
        (lambda plan: plan["plan"].pop("kept") and None, "is no plan"),
        (lambda plan: plan["plan"].update(kept={"conv1": []}), "is no plan"),
        (lambda plan: ["a list"], "is no plan"),
        (lambda plan: plan.update(layers=[]), "does not fit ResNet"),
        (lambda plan: plan.update(layers={"conv1": 3}), "does not fit ResNet"),
        (lambda plan: plan["plan"].update(removed=["layer9.1"]), "does not fit ResNet"),
        (lambda plan: plan["plan"].update(removed=["layer1.1"]), "does not fit ResNet"),
        (lambda plan: plan["layers"].pop("conv1") and None, "layer 'conv1' is in one of them"),
        (lambda plan: set_layer(plan, "conv1", forward="x"), "layer 'conv1' has the sizes"),
        (lambda plan: set_layer(plan, "conv1", training=True), "layer 'conv1' has the sizes"),
        (
            lambda plan: set_layer(plan, "layer1", __class__="x"),
            "layer 'layer1' is in one of them only",
        ),
        (lambda plan: plan["layers"]["conv1"].pop("groups") and None, "has the sizes"),
        (lambda plan: set_layer(plan, "conv7", groups=1), "does not fit ResNet: .*conv7"),
        (lambda plan: plan.update(arguments={"depth": 3}), "cannot build"),
        (lambda plan: plan.update(arguments=[1]), "arguments are given by name"),
        (
            lambda plan: plan.update(reference="paretoprune.experiments.models:none"),
            "cannot build",
        ),
        (lambda plan: plan.update(reference="torchvision:none"), "cannot build"),
        (lambda plan: plan.update(reference="paretoprune.nowhere:f"), "is not imported unless"),
        (lambda plan: plan.update(reference="os:getcwd"), "names the architecture 'os:getcwd'"),
        (lambda plan: plan.update(reference=None), "names the architecture None"),
        (lambda plan: plan.update(reference=["x"]), "names the architecture"),
    ],
)
def test_a_tampered_plan_is_one_clear_sentence(
    change: Any, sentence: str, exported: tuple[Path, nn.Module]
) -> None:
    rewrite(exported[0], change)
    with pytest.raises(ValueError, match=sentence):
        load(exported[0])


@pytest.mark.parametrize("text", ["", "{", "\x00", "null"])
def test_a_plan_that_is_no_json_is_refused(text: str, exported: tuple[Path, nn.Module]) -> None:
    (exported[0] / "plan.json").write_text(text)
    with pytest.raises(ValueError, match="is no plan"):
        load(exported[0])


def test_no_recorded_reference_leads_to_other_code(
    exported: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    touched = tmp_path / "touched"
    command = {"reference": "os:system", "arguments": {"command": f"touch {touched}"}}
    references = ("surgery.serialization:build", "surgery:load", "experiments.models:torch.save")
    for name in references:
        change = {"reference": f"paretoprune.{name}", "arguments": command}
        rewrite(exported[0], lambda plan, change=change: plan.update(change))  # type: ignore[misc]
        with pytest.raises(ValueError, match=r"is not imported unless|only numbers are passed on"):
            load(exported[0])
    assert not touched.exists()


@pytest.mark.parametrize(
    "arguments", [{"checkpoint_path": "x.pth"}, {"pretrained": True}, {"pretrained_cfg": {}}]
)
def test_arguments_that_make_a_library_fetch_weights_are_refused(
    arguments: dict[str, Any], exported: tuple[Path, nn.Module]
) -> None:
    rewrite(exported[0], lambda plan: plan.update(reference="timm:resnet18", arguments=arguments))
    with pytest.raises(ValueError, match="only numbers are passed on unless you say so"):
        load(exported[0])


def test_a_timm_hub_address_is_refused(exported: tuple[Path, nn.Module]) -> None:
    rewrite(exported[0], lambda plan: plan.update(reference="timm:hf-hub:someone/network"))
    with pytest.raises(ValueError, match="is not imported unless you say so"):
        load(exported[0])


def test_code_that_is_not_trusted_runs_only_when_named(
    exported: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stranger.py").write_text(
        "from paretoprune.experiments.models import digits_resnet as build\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rewrite(exported[0], lambda plan: plan.update(reference="stranger:build"))
    with pytest.raises(ValueError, match="'stranger:build', which is not imported unless you say"):
        load(exported[0])
    assert "stranger" not in sys.modules
    again = load(exported[0], "stranger:build")
    assert torch.equal(outputs(again, IMAGES)[0], outputs(exported[1], IMAGES)[0])


@pytest.mark.parametrize(
    "build", [resnet20, nn.Identity, lambda: nn.Sequential(nn.Linear(2, 2)), lambda: nn.ReLU()]
)
def test_another_architecture_is_one_clear_sentence(
    build: Callable[[], nn.Module], exported: tuple[Path, nn.Module]
) -> None:
    with pytest.raises(ValueError, match=r"does not fit .*; give the function that builds"):
        load(exported[0], build)


def test_a_function_that_builds_no_module_is_refused(exported: tuple[Path, nn.Module]) -> None:
    with pytest.raises(UnsupportedModel, match=r"returns str, but an nn\.Module is needed"):
        load(exported[0], "os:getcwd")
    build: Any = dict
    with pytest.raises(UnsupportedModel, match=r"returns dict, but an nn\.Module is needed"):
        load(exported[0], build)
    network: Any = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"function that builds .* but got Linear itself"):
        load(exported[0], network)


def test_what_is_no_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for values in ({"arguments": {"activation": nn.ReLU}}, {"metrics": {"loss": torch.ones(1)}}):
        with pytest.raises(ValueError, match="plain JSON values, but Object of type"):
            save(tmp_path / "export", nn.Linear(4, 3), PruningPlan(), **values)
    assert not (tmp_path / "export").exists()
