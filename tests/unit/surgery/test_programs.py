"""A program runs where the network is now, leaves its inputs alone, and counts what it costs."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretoprune.criteria import CRITERIA, SharedCalibration, differentiable
from paretoprune.surgery import PruningPlan, UnsupportedModel, prune, trace
from paretoprune.surgery.execute import Execution
from paretoprune.surgery.export import export_program
from paretoprune.surgery.record import record
from paretoprune.surgery.recorded import Recorded, Recording
from tests.unit.surgery.oracles import counted, difference, half, masked_outputs, outputs


class Cast(nn.Module):
    """Code that names types and devices, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(4, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.stem(x.float()).to(torch.float32).type_as(x))
        x = x.to(x.device, torch.float32) * torch.tensor([[0.5]])
        return self.out(x + torch.zeros_like(x, device=x.device))


class Placed(nn.Module):
    """Makes tensors on the device of its input, and on none in particular."""

    def __init__(self) -> None:
        super().__init__()
        self.cast, self.head = Cast(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        x = self.cast(x) + torch.arange(len(x), device=x.device)[:, None]
        return self.head(torch.relu(x * torch.ones(len(x), 1).to(x)))


def on_meta(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in model.state_dict().items()}


def test_a_program_runs_where_the_weights_are() -> None:
    model = Placed().eval()
    graph = trace(model, torch.randn(2, 4))
    inputs = torch.randn(3, 4)
    for _ in range(2):  # one run on another device does not change the next
        (output,) = Execution(graph).run(on_meta(model), inputs.to("meta")).values()
        assert output.is_meta
        assert output.shape == (3, 2)
        (output,) = Execution(graph).run(model, inputs).values()
        torch.testing.assert_close(output, model(inputs))


def test_a_program_with_gradients_runs_where_the_weights_are() -> None:
    model = Placed().eval()
    graph = trace(model, torch.randn(2, 4))
    values = differentiable.run(graph, on_meta(model), torch.randn(3, 4, device="meta"))
    assert values[graph.program.outputs[0]].is_meta


def test_a_recorded_module_runs_where_its_inputs_are() -> None:
    model, inputs = Placed().eval(), torch.randn(2, 4)
    recording = record(model, trace(model, inputs), ["cast"], inputs)["cast"]
    again = Recording.from_json(json.loads(json.dumps(recording.to_json())), recording.constants)
    expected = model.cast(inputs)
    for each in (recording, again):
        cast = Recorded(Cast(), each)
        cast.load_state_dict(model.cast.state_dict(), strict=False)
        torch.testing.assert_close(cast(inputs), expected)
        assert cast.to("meta")(torch.randn(3, 4, device="meta")).is_meta


class Overwriting(nn.Module):
    """Normalizes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.relu(self.body(x.div_(255).sub_(0.5))))


def test_inputs_that_the_code_overwrites_stay_what_they_were() -> None:
    model, inputs = Overwriting().eval(), torch.rand(3, 4) * 255
    before = inputs.clone()
    graph = trace(model, inputs)
    assert torch.equal(inputs, before)
    assert [group.size for group in graph.open_groups] == [6]
    tensors = dict(model.named_parameters())
    Execution(graph).run(model, inputs)
    record(model, graph, ["body"], inputs)
    differentiable.Outputs(model, graph, inputs)
    differentiable.run(graph, tensors, inputs)
    assert torch.equal(inputs, before)


class Cached(nn.Linear):
    """A layer with an empty buffer."""

    def __init__(self) -> None:
        super().__init__(4, 6)
        self.register_buffer("cache", torch.empty(0))


def test_an_empty_buffer_does_not_hide_the_batch_size() -> None:
    model = nn.Sequential(Cached(), nn.ReLU(), nn.Linear(6, 2))
    assert export_program(model, torch.randn(2, 4)).batch > 2
    assert [group.size for group in trace(model, torch.randn(2, 4)).open_groups] == [6]


class Queries(nn.Module):
    """Learned queries that attend to tokens, as many as there are examples."""

    def __init__(self) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.randn(1, 3, 8))
        self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 2)
        self.q, self.k, self.v = (nn.Linear(8, 12) for _ in range(3))
        self.out = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        q = self.q(self.latent.expand(x.shape[0], -1, -1))
        x = F.scaled_dot_product_attention(q, self.k(x), self.v(x))
        return self.head(torch.relu(self.out(x)).mean(1))


class Tiled(nn.Module):
    """A learned token that is repeated for every example, by tile."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.stem = nn.Parameter(torch.randn(1, 1, 6)), nn.Linear(4, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        x = torch.cat([self.token.tile(x.shape[0], 1, 1), self.stem(x)], 1)
        return self.head(self.norm(x).mean(1))


class Steps(nn.Module):
    """Ninety-seven steps, which is the prime that batches are told by."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv1d(2, 6, 3, 2), nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        n, c, t = x.shape
        return self.head(self.norm(x.mT.reshape(n, t, c))).mean(1)


class Places(nn.Module):
    """A table of places that is computed from numbers alone, and one that is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.table, self.given = nn.Linear(4, 6), nn.Linear(1, 6), nn.Linear(3, 6)
        self.mix, self.head = nn.Linear(6, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor, given: Tensor) -> Any:
        numbers = torch.arange(x.shape[1], dtype=torch.float32)[:, None]
        table = self.table(numbers) + self.given(given)
        return self.head(torch.relu(self.mix(self.stem(x) + table)).mean(1))


class Tokens(nn.Module):
    """A class token that is written into memory made for every example."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        memory = torch.zeros(1, 1, 4).repeat(len(x), 1, 1)
        return self.head(torch.relu(self.stem(memory + self.token)) + self.stem(x)).mean(1)


class Reused(nn.Module):
    """A table of places, used whole by one branch and in part by another."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(5, 6))
        self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 6)
        self.left, self.right = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        whole = torch.relu(self.a(x) + self.places)
        part = torch.relu(self.b(x[:, :3]) + self.places[:3])
        return self.left(whole).mean(1) + self.right(part).mean(1)


class Turned(Reused):
    """The same, the part first."""

    def forward(self, x: Tensor) -> Any:
        part = torch.relu(self.b(x[:, :3]) + self.places[:3])
        whole = torch.relu(self.a(x) + self.places)
        return self.left(whole).mean(1) + self.right(part).mean(1)


@pytest.mark.parametrize("model", [Reused(), Turned()], ids=["whole", "part"])
def test_a_table_that_is_used_whole_and_in_part_couples_both_uses(model: nn.Module) -> None:
    graph = trace(model, torch.randn(2, 5, 4))
    (group,) = graph.open_groups
    assert {"a.weight", "b.weight", "places"} < {item.parameter for item in group.slices}


NETWORKS: dict[str, tuple[nn.Module, tuple[Any, ...], bool]] = {
    "queries": (Queries(), ((4, 5),), True),
    "places": (Places(), ((5, 4),), False),
    "tokens": (Tokens(), ((5, 4),), True),
    "tiled": (Tiled(), ((5, 4),), True),
    "steps": (Steps(), ((2, 195),), True),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("batch", [1, 3])
def test_what_is_computed_for_every_example_counts_for_every_example(
    name: str, batch: int
) -> None:
    model, (shape,), alike = NETWORKS[name]
    inputs: Any = (torch.randn(batch, *shape),)
    one: Any = (inputs[0][:1],)
    if name == "places":
        inputs, one = (*inputs, torch.randn(5, 3)), (*one, torch.randn(5, 3))
    model.requires_grad_(False)  # torch's counter fails on views of parameters that learn
    graph = trace(model.eval(), inputs)
    assert graph.open_groups
    for plan in (PruningPlan(), half(graph)):
        small = prune(model, graph, plan)
        assert difference(masked_outputs(model, graph, plan, one), outputs(small, one)) < 1e-4
        assert graph.cost(plan) == counted(small, one)
        if alike:  # else what all examples share is computed once
            assert graph.cost(plan) == counted(small, inputs)


class Correlated(nn.Module):
    """Siamese tracking: every example's map is convolved with its own kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)

    def forward(self, kernel: Tensor, x: Tensor) -> Any:
        kernel, x = (self.deep(F.relu(self.stem(part))) for part in (kernel, x))
        line = x.reshape(1, -1, *x.shape[2:])
        return F.conv2d(line, kernel, groups=len(kernel)).transpose(0, 1).flatten(1)


def pictures(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, 7, 7), torch.randn(count, 3, 10, 10)


def test_groups_of_a_convolution_that_count_examples_follow_the_batch() -> None:
    model = Correlated().eval()
    graph = trace(model, pictures(2))
    assert {group.name for group in graph.open_groups} == {"stem"}
    inputs = pictures(5)
    (found,) = Execution(graph).run(model, inputs).values()
    torch.testing.assert_close(found, model(*inputs))


class OneByOne(nn.Module):
    """Loops over the examples."""

    def __init__(self, *, indexed: bool) -> None:
        super().__init__()
        self.hidden, self.out, self.indexed = nn.Linear(4, 6), nn.Linear(6, 2), indexed

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.hidden(x))
        rows = [x[index] for index in range(len(x))] if self.indexed else x
        return self.out(torch.stack([row.amax(0) for row in rows]))


@pytest.mark.parametrize("indexed", [False, True])
def test_code_that_loops_over_examples_prunes_and_is_not_run_on_other_batches(
    indexed: bool,
) -> None:
    model = OneByOne(indexed=indexed).eval()
    graph = trace(model, torch.randn(2, 5, 4))
    plan, inputs = half(graph), torch.randn(7, 5, 4)
    expected = masked_outputs(model, graph, plan, inputs)
    assert difference(expected, outputs(prune(model, graph, plan), inputs)) < 1e-5
    for count in (2, 97, 200):
        data = [(torch.randn(count, 5, 4), torch.zeros(count).long())]
        for name in ("obs", "taylor"):
            with pytest.raises(UnsupportedModel, match="takes the examples of a batch one by one"):
                CRITERIA[name]()(model, graph, SharedCalibration(data, F.cross_entropy))


class Pairs(nn.Module):
    """Compares all examples with each other, which makes a table of batch by batch."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.out(torch.relu(self.hidden(x)))
        return x @ x.t()


def test_a_table_of_batch_by_batch_is_no_reason_to_give_up() -> None:
    graph = trace(Pairs().eval(), torch.randn(2, 4))
    assert [group.size for group in graph.open_groups] == [6, 3]
    assert graph.program.batch > 2
