"""CKA and its neighbours against their definitions, and blocks against physical removal."""

from __future__ import annotations

import copy
import math
from collections import Counter
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import percentileofscore, rankdata
from torch import Tensor, nn
from torch.nn import functional as F

from paretoprune.criteria import CRITERIA, SharedCalibration, ablation, block_saliency
from paretoprune.criteria.ablation import changes, penultimate
from paretoprune.criteria.similarity import (
    CHANGES,
    SIMILARITIES,
    Change,
    Response,
    cka,
    gaussian_shape,
    kl_divergence,
    permutation_angle,
    shape_angle,
)
from paretoprune.surgery import PruningPlan, prune, trace
from tests.unit.surgery.specimen import draw
from tests.unit.surgery.specimens import ZOO, traced


def features(m: int = 40, p: int = 6, q: int = 5) -> tuple[Tensor, Tensor]:
    x = torch.randn(m, p).double()
    return x, torch.tanh(x @ torch.randn(p, q).double()) + 0.5 * torch.randn(m, q).double()


def rotation(size: int) -> Tensor:
    turned: Tensor = torch.linalg.qr(torch.randn(size, size).double()).Q
    return turned


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_of_equal_features_is_one_and_it_is_symmetric(debiased: bool) -> None:
    x, y = features()
    assert cka(x, x, debiased=debiased).item() == pytest.approx(1)
    assert cka(x, y, debiased=debiased).item() == pytest.approx(cka(y, x, debiased=debiased))
    assert 0 < cka(x, y, debiased=debiased) < 1


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_ignores_rotations_scales_and_shifts_but_not_other_maps(debiased: bool) -> None:
    x, y = features()
    same = cka(x, y, debiased=debiased).item()
    for other in (y @ rotation(5), 3 * y, -0.2 * y, y + torch.randn(5).double()):
        assert cka(x, other, debiased=debiased).item() == pytest.approx(same, abs=1e-10)
    stretched = y @ torch.diag(torch.tensor([10.0, 1, 1, 1, 0.1]).double())
    assert abs(cka(x, stretched, debiased=debiased).item() - same) > 1e-3


def test_cka_equals_its_form_with_gram_matrices() -> None:
    x, y = features()
    m = len(x)
    centring = torch.eye(m).double() - 1 / m

    def hsic(k: Tensor, other: Tensor) -> Tensor:
        return torch.trace(k @ centring @ other @ centring) / (m - 1) ** 2

    k, other = x @ x.T, y @ y.T
    expected = hsic(k, other) / (hsic(k, k) * hsic(other, other)).sqrt()
    torch.testing.assert_close(cka(x, y), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("p", "q"), [(60, 50), (60, 5), (5, 60), (40, 41)])
def test_cka_of_features_wider_than_examples_is_that_of_their_products(p: int, q: int) -> None:
    x, y = features(40, p, q)
    a, b = x - x.mean(0), y - y.mean(0)
    expected = (a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm())
    torch.testing.assert_close(cka(x, y), expected, rtol=1e-12, atol=0)


def test_cka_of_features_of_dense_prediction_needs_no_matrix_of_their_width() -> None:
    x, y = torch.randn(2, 4, 10).double()
    embedding = F.one_hot(torch.randint(2**20, (10,)), 2**20).double()  # 8 TiB for all pairs
    torch.testing.assert_close(cka(x @ embedding, y), cka(x, y), rtol=1e-10, atol=0)
    torch.testing.assert_close(cka(x @ embedding, y @ embedding), cka(x, y), rtol=1e-10, atol=0)


def unbiased(k: Tensor, other: Tensor) -> float:
    """Returns the unbiased HSIC as the mean over all quadruples of different examples."""
    m = len(k)
    pairs = [(i, j) for i in range(m) for j in range(m) if i != j]
    triples = [(i, j, r) for i, j in pairs for r in range(m) if r not in (i, j)]
    first = sum(k[i, j] * other[i, j] for i, j in pairs) / len(pairs)
    second = sum(k[i, j] * other[i, r] for i, j, r in triples) / len(triples)
    third = [k[i, j] * other[r, s] for i, j, r in triples for s in range(m) if s not in (i, j, r)]
    return float(first + sum(third) / len(third) - 2 * second)


def test_debiased_cka_is_the_ratio_of_unbiased_estimates() -> None:
    x, y = features(7)
    k, other = x @ x.T, y @ y.T
    expected = unbiased(k, other) / math.sqrt(unbiased(k, k) * unbiased(other, other))
    assert cka(x, y, debiased=True).item() == pytest.approx(expected)


def test_biased_cka_of_few_independent_features_is_high_and_debiased_is_not() -> None:
    x, y = torch.randn(2, 20, 500).double()
    assert cka(x, y) > 0.9
    assert abs(cka(x, y, debiased=True)) < 0.2
    with pytest.raises(ValueError, match="at least 4 examples, but got 3"):
        cka(x[:3], y[:3], debiased=True)


def test_cka_of_constant_features_is_zero() -> None:
    x, _ = features()
    assert cka(x, torch.ones(40, 3)) == 0


def test_shape_angles_are_zero_for_what_they_ignore() -> None:
    x, _ = features()
    mixed = x @ torch.randn(6, 6).double()
    assert shape_angle(x, 2 * x @ rotation(6), whitened=False) < 1e-6
    assert shape_angle(x, mixed, whitened=False) > 0.1
    assert shape_angle(x, mixed, whitened=True) < 1e-6
    assert shape_angle(x, torch.randn(40, 6).double(), whitened=True) > 0.5


def test_procrustes_angle_is_the_least_over_rotations() -> None:
    x, y = (each - each.mean(0) for each in (features()[0], features()[0]))
    best = shape_angle(x, y, whitened=False).item()
    for _ in range(50):
        turned = y @ rotation(6)
        cosine = (x * turned).sum() / (x.norm() * turned.norm())
        assert best <= cosine.arccos().item() + 1e-9


def test_shape_angles_of_wide_features_are_those_of_their_coordinates() -> None:
    x, y = torch.randn(2, 12, 5).double()
    embedding = torch.linalg.qr(torch.randn(30, 5).double()).Q.T
    for whitened in (False, True):
        narrow = shape_angle(x, y, whitened=whitened)
        assert shape_angle(x, y @ embedding, whitened=whitened) == pytest.approx(narrow.item())


def test_the_permutation_angle_ignores_the_order_of_neurons_but_no_rotation() -> None:
    x, _ = features()
    assert permutation_angle(x, 2 * x[:, torch.randperm(6)] + 1) < 1e-6
    turned = x @ rotation(6)
    assert permutation_angle(x, turned) > 0.1
    assert shape_angle(x, turned, whitened=False) <= permutation_angle(x, turned)


def test_the_permutation_angle_is_the_least_over_all_permutations() -> None:
    x, y = (each - each.mean(0) for each in torch.randn(2, 30, 4).double())
    cosines = [
        (x * y[:, list(order)]).sum() / (x.norm() * y.norm()) for order in permutations(range(4))
    ]
    expected = min(cosine.arccos().item() for cosine in cosines)
    assert permutation_angle(x, y).item() == pytest.approx(expected)


class Segmenting(nn.Module):
    """Classes per pixel; the last layer reads 6 * 64 * 64 numbers per example."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Any:
        return self.last(F.relu(self.first(x)))


def test_dense_prediction_is_ranked_by_the_other_seven_measures() -> None:
    model, inputs = Segmenting().eval(), torch.randn(3, 3, 64, 64)
    graph = trace(model, inputs)
    shared = SharedCalibration([(inputs, torch.zeros(3, 64, 64, dtype=torch.long))])
    saliency = CRITERIA["consensus"]()(model, graph, shared)["first"]
    found = changes(model, graph, shared, 256, SIMILARITIES)
    assert not found["permutation"].units["first"].any()
    quantiles = [np.full(6, 0.5)]  # of the permutation distance
    for measure in set(SIMILARITIES) - {"permutation"}:
        values = found[measure].units["first"].numpy()
        rounded = (values / max(1e-3 * values.max(), 1e-300)).round()
        quantiles.append((rankdata(rounded) - 0.5) / 6)
    np.testing.assert_allclose(saliency.numpy(), np.mean(quantiles, 0), rtol=1e-6)
    assert len(saliency.unique()) > 1


SIZES = [(40, 5), (12, 20)]  # narrower and wider than there are examples


def classes(m: int, p: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns two sets of features and three classes of unequal size, one of them a single one."""
    targets = torch.tensor([7, *[2, 2, 4] * m])[:m]
    x = torch.randn(m, p).double() + 2 * torch.randn(8, p).double()[targets]
    return x, torch.tanh(x + 0.5 * torch.randn(m, p).double()), targets


def wasserstein(x: Tensor, y: Tensor, targets: Tensor, alpha: int) -> float:
    """Returns the distance without an alignment, by means and covariances of every class."""
    squares = []
    for label in targets.unique():
        a, b = (each[targets == label].numpy() for each in (x, y))
        first, second = (np.atleast_2d(np.cov(each.T, bias=True)) for each in (a, b))
        little = 1e-12 * np.eye(len(first))  # a class of few examples has a singular covariance
        root = np.real(sqrtm(first + little))
        bures = np.trace(first + second - 2 * np.real(sqrtm(root @ second @ root + little)))
        squares.append(alpha * ((a.mean(0) - b.mean(0)) ** 2).sum() + (2 - alpha) * bures)
    return float(np.sqrt(max(0.0, np.mean(squares))))


@pytest.mark.parametrize("alpha", [0, 1, 2])
@pytest.mark.parametrize(("m", "p"), SIZES)
def test_the_gaussian_shape_distance_starts_at_the_closed_form(m: int, p: int, alpha: int) -> None:
    x, y, targets = classes(m, p)
    found = gaussian_shape(x, y, targets, alpha=alpha, rounds=0).item()
    assert found == pytest.approx(wasserstein(x, y, targets, alpha), rel=1e-4)


@pytest.mark.parametrize("alpha", [0, 1, 2])
@pytest.mark.parametrize(("m", "p"), SIZES)
def test_every_round_shortens_the_gaussian_shape_distance(m: int, p: int, alpha: int) -> None:
    x, y, targets = classes(m, p)
    found = [gaussian_shape(x, y, targets, alpha=alpha, rounds=r).item() for r in range(6)]
    assert all(after <= before + 1e-9 for before, after in pairwise(found))
    assert found[-1] < 0.99 * found[0]


@pytest.mark.parametrize("alpha", [0, 1])
def test_no_rotation_of_one_gaussian_is_better_than_the_one_found(alpha: int) -> None:
    x, y, _ = classes(40, 4)
    one = torch.zeros(40, dtype=torch.long)
    found = gaussian_shape(x, y, one, alpha=alpha, rounds=200).item()
    tried = [wasserstein(x, y @ rotation(4), one, alpha) for _ in range(300)]
    assert found <= min(tried) + 1e-6
    if alpha == 0:  # the best rotation aligns the principal axes
        roots = [np.linalg.eigvalsh(np.cov(each.T.numpy(), bias=True)) ** 0.5 for each in (x, y)]
        expected = math.sqrt(2) * np.linalg.norm(roots[0] - roots[1])
        assert found == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize(("m", "p"), SIZES)
def test_gaussian_shape_distances_ignore_one_rotation_and_nothing_else(m: int, p: int) -> None:
    x, _, targets = classes(m, p)
    labels = targets.unique()
    once = x @ rotation(p)
    each = torch.zeros_like(x)
    for label in labels:
        each[targets == label] = x[targets == label] @ rotation(p)
    assert gaussian_shape(x, once, targets, alpha=2) < 1e-6
    for alpha in (0, 1):
        near = x @ torch.matrix_exp(0.02 * (skew := torch.randn(p, p).double()) - 0.02 * skew.T)
        start = gaussian_shape(x, near, targets, alpha=alpha, rounds=0)
        assert gaussian_shape(x, near, targets, alpha=alpha, rounds=500) < 0.02 * start
        for other in (each, 2 * x):
            assert gaussian_shape(x, other, targets, alpha=alpha) > 0.1
    shifted = x + 3 * torch.randn(8, p).double()[targets]
    assert gaussian_shape(x, shifted, targets, alpha=0) < 1e-6
    assert gaussian_shape(x, shifted, targets, alpha=1) > 0.1
    order = torch.randperm(m)
    assert gaussian_shape(x, each, targets, alpha=1) == pytest.approx(
        gaussian_shape(x[order], each[order], targets[order], alpha=1).item()
    )


@pytest.mark.parametrize("targets", [torch.randn(20), torch.zeros(20, 3, 3, dtype=torch.long)])
def test_without_class_labels_every_example_is_a_class(targets: Tensor) -> None:
    x, y = torch.randn(2, 20, 5).double()
    assert gaussian_shape(x, y, targets, alpha=0) == 0
    aligned = y @ torch.linalg.svd(y.T @ x)[0] @ torch.linalg.svd(y.T @ x)[2]
    expected = (x - aligned).square().sum(1).mean().sqrt()
    torch.testing.assert_close(gaussian_shape(x, y, targets, alpha=1), expected)


def test_kl_is_of_the_changed_predictions_from_the_dense_ones() -> None:
    dense, changed = torch.randn(2, 9, 4).double()
    p, q = F.softmax(dense, 1), F.softmax(changed, 1)
    expected = (q * (q.log() - p.log())).sum(1).mean()
    torch.testing.assert_close(kl_divergence(dense, changed), expected)
    assert kl_divergence(dense, dense + 3) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("shape", [(9,), (9, 1)])
def test_kl_of_what_are_no_classes_is_refused_in_one_sentence(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least two classes, but the network returns"):
        kl_divergence(torch.randn(shape), torch.randn(shape))


def test_cka_of_one_number_per_example() -> None:
    data = [(torch.randn(16, 6), torch.randn(16))]
    found = []
    for tail in ([], [nn.Flatten(0)]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1), *tail).eval()
        found.append(CRITERIA["cka"]()(model, trace(model, data[0][0][:2]), data)["0"])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("measure", CHANGES)
def test_no_change_is_zero_and_a_change_is_more(measure: str) -> None:
    targets = torch.arange(20) % 4
    dense = Response(torch.randn(20, 5).double(), torch.randn(20, 4).double())
    other = Response(dense.features**3, dense.outputs**3)
    assert CHANGES[measure](dense, dense, targets).item() == pytest.approx(0, abs=1e-7)
    assert CHANGES[measure](dense, other, targets) > 1e-3


NETWORKS = ("residual", "dense", "depthwise", "excitation", "called_twice", "torch_attention")


def batch(name: str) -> tuple[Any, Tensor]:
    torch.manual_seed(5)
    return draw(ZOO[name].shape, 12), torch.arange(12) % 4


@pytest.mark.parametrize("name", NETWORKS)
def test_a_unit_is_scored_by_the_network_without_it(name: str) -> None:
    model, graph = traced(name)
    inputs, targets = batch(name)
    found = changes(model, graph, SharedCalibration([(inputs, targets)]), 100, ["kl"])["kl"].units
    before = model(inputs)
    for group in graph.open_groups:
        for unit in {0, group.size - 1}:
            kept = tuple(u for u in range(group.size) if u != unit)
            after = prune(model, graph, PruningPlan({group.name: kept}))(inputs)
            expected = kl_divergence(before.double(), after.double())
            torch.testing.assert_close(
                found[group.name][unit], expected.detach(), rtol=1e-3, atol=1e-6
            )


@pytest.mark.parametrize("name", ["residual", "pre_activation"])
def test_a_block_is_scored_by_the_network_without_it(name: str) -> None:
    model, graph = traced(name)
    inputs, targets = batch(name)
    data = SharedCalibration([(inputs, targets)])
    for criterion in ("kl", "cka"):
        kind = CRITERIA[criterion]()
        scores = block_saliency(kind, kind(model, graph, data), model, graph, data)
        for block in graph.blocks.values():
            small = prune(model, graph, PruningPlan(removed=(block.name,)))
            x, y = (captured(each, inputs) for each in (model, small))
            change = 1 - cka(x[0], y[0]) if criterion == "cka" else kl_divergence(x[1], y[1])
            units = sum(graph.groups[group].size for group in block.groups)
            assert scores[block.name] == pytest.approx(float(change) / units, rel=1e-3)


@pytest.mark.parametrize("name", ["residual", "pre_activation"])
def test_consensus_ranks_a_block_per_inner_unit_among_the_units(name: str) -> None:
    model, graph = traced(name)
    data = SharedCalibration([batch(name)])
    kind = CRITERIA["consensus"]()
    scores = block_saliency(kind, kind(model, graph, data), model, graph, data)
    found = changes(model, graph, data, 256, SIMILARITIES)
    assert graph.blocks
    for block in graph.blocks.values():
        inner = sum(graph.groups[group].size for group in block.groups)
        ranks = []
        for measure in SIMILARITIES:
            units = torch.cat(list(found[measure].units.values())).numpy()
            grain = 1e-3 * units.max()  # less is a tie
            own = found[measure].blocks[block.name] / inner
            ranks.append(percentileofscore((units / grain).round(), round(own / grain), "mean"))
        assert scores[block.name] == pytest.approx(float(np.mean(ranks)) / 100)


def captured(model: nn.Module, inputs: Any) -> tuple[Tensor, Tensor]:
    """Returns what the last linear layer reads and returns, by a hook."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    seen: list[Tensor] = []
    hook = layers[-1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        outputs = model(inputs)
    hook.remove()
    return seen[0].double(), outputs.double()


def test_a_removed_block_equals_one_whose_last_norm_is_zero() -> None:
    model, graph = traced("residual")
    inputs, targets = batch("residual")
    data = SharedCalibration([(inputs, targets)])
    found = changes(model, graph, data, 100, ["cka"])["cka"].blocks
    masked = copy.deepcopy(model)
    norm = masked.get_submodule("2.conv2.1")
    for tensor in (*norm.parameters(), norm.get_buffer("running_mean")):
        tensor.detach().zero_()
    expected = 1 - cka(captured(model, inputs)[0], captured(masked, inputs)[0])
    assert found["2"] == pytest.approx(float(expected), rel=1e-4)


def test_a_dead_unit_changes_nothing() -> None:
    model = copy.deepcopy(traced("residual")[0])
    graph = traced("residual")[1]
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    for item in graph.groups["2.conv1.0"].slices:
        index = torch.tensor(item.indices[3])
        tensors[item.parameter].detach().index_fill_(item.axis, index, 0)
    data = SharedCalibration([batch("residual")])
    for criterion in ("kl", "cka"):
        saliency = CRITERIA[criterion]()(model, graph, data)["2.conv1.0"]
        assert saliency[3] == pytest.approx(0, abs=1e-8)
        assert saliency.max() > 100 * saliency[3]


def test_images_bound_what_is_measured() -> None:
    model, graph = traced("residual")
    inputs, targets = batch("residual")
    data = SharedCalibration([(inputs[:8], targets[:8])])
    few = changes(model, graph, data, 100, ["kl"])["kl"]
    same = changes(model, graph, SharedCalibration([(inputs, targets)]), 8, ["kl"])["kl"]
    for group in few.units:
        torch.testing.assert_close(few.units[group], same.units[group])


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Returns how often each measure was taken since."""
    calls: Counter[str] = Counter()

    def count(name: str) -> Change:
        def change(dense: Response, other: Response, targets: Tensor) -> Tensor:
            calls[name] += 1
            return CHANGES[name](dense, other, targets)

        return change

    monkeypatch.setattr(ablation, "CHANGES", {name: count(name) for name in CHANGES})
    return calls


NEEDED = {"kl": {"kl"}, "cka": {"cka"}, "consensus": set(SIMILARITIES)}


@pytest.mark.parametrize("criterion", NEEDED)
def test_a_criterion_pays_for_its_own_measures_once(
    criterion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, graph = traced("residual")
    shared = SharedCalibration([batch("residual")])
    calls, kind = counted(monkeypatch), CRITERIA[criterion]()
    block_saliency(kind, kind(model, graph, shared), model, graph, shared)
    structures = sum(group.size for group in graph.open_groups) + len(graph.extents)
    assert calls == dict.fromkeys(NEEDED[criterion], structures)


@pytest.mark.parametrize("order", list(permutations(NEEDED)))
def test_criteria_asked_for_together_measure_nothing_twice(
    order: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, graph = traced("residual")
    data = [batch("residual")]
    alone = {name: CRITERIA[name]()(model, graph, data) for name in order}
    shared, calls = SharedCalibration(data), counted(monkeypatch)
    for name in order:
        for group, values in CRITERIA[name]()(model, graph, shared).items():
            assert torch.equal(values, alone[name][group])
    structures = sum(group.size for group in graph.open_groups) + len(graph.extents)
    assert calls == dict.fromkeys(CHANGES, structures)


def test_one_pass_serves_all_measures_that_are_asked_for_at_once() -> None:
    model, graph = traced("residual")
    shared = SharedCalibration([batch("residual")])
    seen: list[tuple[int, int]] = []
    shared.progress = lambda done, total: seen.append((done, total))
    structures = sum(group.size for group in graph.open_groups) + len(graph.extents)
    found = changes(model, graph, shared, 12, CHANGES)
    assert seen.count((structures, structures)) == 1
    seen.clear()
    again = changes(model, graph, shared, 12, ["cka", "kl"])
    assert not seen
    assert all(again[name] is found[name] for name in again)


@pytest.mark.parametrize("name", ["residual", "excitation", "torch_attention"])
@pytest.mark.parametrize("kept_bytes", [1, 2**20])
def test_batches_stream_and_say_what_one_batch_says(
    name: str, kept_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "_BYTES", kept_bytes)  # one structure at a time, and many
    model, graph = traced(name)
    inputs, targets = batch(name)
    data = SharedCalibration([(inputs[:11], targets[:11])])
    whole = changes(model, graph, data, 100, CHANGES)
    parts = [(inputs[i : i + 5], targets[i : i + 5]) for i in (0, 5, 10)]
    streamed = changes(model, graph, SharedCalibration(parts), 11, CHANGES)
    for found, expected in ((streamed[name], whole[name]) for name in CHANGES):
        for group, values in expected.units.items():
            torch.testing.assert_close(found.units[group], values, rtol=1e-3, atol=1e-5)
        assert found.blocks == pytest.approx(expected.blocks, rel=1e-3, abs=1e-5)


def test_consensus_is_the_rank_sum() -> None:
    assert len(SIMILARITIES) == 8
    model, graph = traced("residual")
    shared = SharedCalibration([batch("residual")])
    saliency = CRITERIA["consensus"]()(model, graph, shared)
    found = changes(model, graph, shared, 256, SIMILARITIES)
    whole = torch.cat(list(saliency.values()))
    ranks = torch.zeros(len(whole))
    for measure in SIMILARITIES:
        values = torch.cat(list(found[measure].units.values()))
        ranks += values.argsort().argsort()
    correlation = torch.corrcoef(torch.stack([ranks, whole]))[0, 1]
    assert correlation > 0.99
    assert (whole >= 0).all()
    assert (whole <= 1).all()


def test_the_penultimate_value_is_what_the_last_layer_reads() -> None:
    model, graph = traced("residual")
    name = penultimate(graph)
    shape = graph.program.nodes[name].shape
    inputs, _ = batch("residual")
    assert shape is not None
    assert shape[1] == captured(model, inputs)[0].shape[1]


def test_several_outputs_are_refused_in_one_sentence() -> None:
    model, graph = traced("residual")
    inputs, _ = batch("residual")
    data = [(inputs, torch.zeros(5))]
    with pytest.raises(ValueError, match="returns one tensor with a row per example, but it"):
        CRITERIA["kl"]()(model, graph, data)


class Overwriting(nn.Module):
    """Adds a branch to its input in place, which another ablation still needs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Linear(4, 6), nn.Linear(6, 5)
        self.outer, self.head = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.stem(x))
        x += self.outer(torch.relu(self.inner(x)))
        return self.head(x.relu_())


class WritingAPart(nn.Module):
    """Writes some units through a view of them, which leaves the others as they were."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 1)
        self.outer, self.wide = nn.Conv2d(5, 4, 3, padding=1), nn.Conv2d(8, 7, 1)
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.stem(x))
        y = x.clone()
        y[:, :4] = 3 * self.outer(torch.relu(self.inner(y)))
        return self.head(torch.relu(self.wide(y)).mean((2, 3)))


class WritingFeatures(nn.Module):
    """Writes a part of what the last layer reads, and of what it returns, through views."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.stem(x))
        x[:, :3] += self.outer(torch.relu(self.inner(x)))
        x = self.head(x)
        x[:, 1:3] *= 2
        return x


OVERWRITING = [(Overwriting, (4,)), (WritingAPart, (3, 6, 6)), (WritingFeatures, (4,))]


@pytest.mark.parametrize(("kind", "shape"), OVERWRITING)
def test_ablations_do_not_disturb_one_another_where_the_network_overwrites(
    kind: type[nn.Module], shape: tuple[int, ...]
) -> None:
    model = kind().eval()
    inputs, targets = torch.randn(20, *shape), torch.arange(20) % 4
    graph = trace(model, inputs[:2])
    data = SharedCalibration([(inputs, targets)])
    found = changes(model, graph, data, 100, ["kl", "cka"])
    assert "inner" in {group.name for group in graph.open_groups}
    for group in graph.open_groups:
        for unit in range(group.size):
            kept = tuple(u for u in range(group.size) if u != unit)
            small = prune(model, graph, PruningPlan({group.name: kept}))
            x, y = (captured(each, inputs) for each in (model, small))
            expected = {"kl": kl_divergence(x[1], y[1]), "cka": 1 - cka(x[0], y[0])}
            for name, change in expected.items():
                torch.testing.assert_close(
                    found[name].units[group.name][unit], change, rtol=1e-3, atol=1e-7
                )


class InPlaceBlock(nn.Module):
    """A residual block that overwrites all it can."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 5), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Any:
        y = self.outer(torch.relu_(self.inner(x)))
        y += x
        return y.relu_()


class InPlaceBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Linear(4, 6), InPlaceBlock(), InPlaceBlock()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.first(torch.relu(self.stem(x)))
        return self.head(self.second(x))


def test_a_block_in_front_of_what_overwrites_is_scored_without_it() -> None:
    model = InPlaceBlocks().eval()
    inputs, targets = torch.randn(20, 4), torch.arange(20) % 4
    graph = trace(model, inputs[:2])
    found = changes(model, graph, SharedCalibration([(inputs, targets)]), 100, ["kl"])["kl"]
    assert set(found.blocks) == set(graph.blocks)
    assert graph.blocks
    for block in graph.blocks:
        small = prune(model, graph, PruningPlan(removed=(block,)))
        expected = kl_divergence(model(inputs).double(), small(inputs).double()).item()
        assert found.blocks[block] == pytest.approx(expected, rel=1e-3)


class Divided(nn.Module):
    """Normalises by buffers, one for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 6), nn.Linear(6, 4)
        self.register_buffer("scale", torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.tanh(self.layer(x) / self.scale))


def test_a_unit_that_is_divided_by_a_buffer_is_masked_without_its_divisor() -> None:
    model = Divided().eval()
    inputs, targets = torch.randn(20, 4), torch.arange(20) % 4
    graph = trace(model, inputs[:2])
    found = changes(model, graph, SharedCalibration([(inputs, targets)]), 100, ["kl"])["kl"]
    for unit in range(6):
        kept = tuple(one for one in range(6) if one != unit)
        small = prune(model, graph, PruningPlan({"layer": kept}))
        expected = kl_divergence(model(inputs).double(), small(inputs).double()).item()
        assert float(found.units["layer"][unit]) == pytest.approx(expected, rel=1e-3)
