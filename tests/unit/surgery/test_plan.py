"""A plan is a value: validated, ordered, hashable, and the same after JSON and pickle."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
import torch

from paretoprune.surgery import PruningPlan

PLAN = PruningPlan({"b": (3, 0), "a": (1,)}, ("layer2", "layer1", "layer2"))


def test_names_and_units_are_sorted() -> None:
    assert list(PLAN.kept) == ["a", "b"]
    assert PLAN.kept["b"] == (0, 3)
    assert PLAN.removed == ("layer1", "layer2")


def test_equal_plans_are_equal_and_hash_alike() -> None:
    other = PruningPlan({"a": (1,), "b": (0, 3)}, ("layer1", "layer2"))
    assert other == PLAN
    assert hash(PLAN) == hash(other)
    assert PruningPlan() != PLAN


def test_a_plan_is_read_only_and_independent_of_what_made_it() -> None:
    kept: dict[str, Any] = {"a": [1, 0]}
    plan = PruningPlan(kept)
    kept["a"].append(7)
    kept["b"] = (0,)
    assert dict(plan.kept) == {"a": (0, 1)}
    with pytest.raises(TypeError):
        plan.kept["a"] = (2,)  # type: ignore[index]


def test_integers_of_other_libraries_become_plain_ones() -> None:
    plan = PruningPlan({"a": tuple(torch.tensor([2, 0]))})
    assert plan.kept["a"] == (0, 2)
    assert json.dumps(plan.to_json())


@pytest.mark.parametrize("units", [(), (-1, 2), (1, 1)])
def test_units_are_at_least_one_each_once_and_none_negative(units: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"at least one unit.*but got .* for group 'conv'"):
        PruningPlan({"conv": units})


@pytest.mark.parametrize("unit", [1.5, "1", None])
def test_units_are_integers(unit: Any) -> None:
    with pytest.raises(TypeError):
        PruningPlan({"conv": (unit,)})


def test_json_and_pickle_give_the_plan_back() -> None:
    assert PruningPlan.from_json(json.loads(json.dumps(PLAN.to_json()))) == PLAN
    assert pickle.loads(pickle.dumps(PLAN)) == PLAN


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"kept": {}},
        {"kept": [], "removed": []},
        {"kept": {"a": 1}, "removed": []},
        {"kept": {"a": [0.5]}, "removed": []},
        {"kept": {"a": "12"}, "removed": []},
        {"kept": {}, "removed": None},
        {"kept": {}, "removed": "layer1"},
        [],
        None,
    ],
)
def test_json_of_another_form_is_one_clear_sentence(data: Any) -> None:
    with pytest.raises(ValueError, match="a plan has the fields 'kept'"):
        PruningPlan.from_json(data)


def test_json_with_impossible_units_says_so() -> None:
    with pytest.raises(ValueError, match="for group 'a'"):
        PruningPlan.from_json({"kept": {"a": []}, "removed": []})


def test_then_renumbers_the_units_of_the_second_plan() -> None:
    first = PruningPlan({"a": (1, 3, 5), "b": (0, 2)}, ("x",))
    second = PruningPlan({"a": (0, 2), "c": (4,)}, ("y",))
    assert first.then(second) == PruningPlan({"a": (1, 5), "b": (0, 2), "c": (4,)}, ("x", "y"))


def test_then_is_associative_and_the_empty_plan_is_neutral() -> None:
    a, b, c = (PruningPlan({"g": units}) for units in ((0, 2, 4, 6, 7), (1, 2, 4), (0, 2)))
    assert a.then(b).then(c) == a.then(b.then(c)) == PruningPlan({"g": (2, 7)})
    assert PLAN.then(PruningPlan()) == PruningPlan().then(PLAN) == PLAN


def test_then_refuses_units_that_are_gone() -> None:
    with pytest.raises(ValueError, match=r"'a' has 1 units left, so unit 1 does not exist"):
        PLAN.then(PruningPlan({"a": (1,)}))
