"""A plan is data: read, written, explained, the same again."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers import (
    clone,
    one_thread,  # noqa: F401 - autouse
)
from helpers_budget import network, random_scores

import singe
from singe.limits import rounded_down
from singe.plan import Plan


def test_a_plan_on_disk(tmp_path):
    """One line per group, replayable on a fresh copy, refused by another model."""
    model, x = network()
    plan = singe.plan(model, random_scores(model, x), x, macs=0.5, ranking="cost")
    path = tmp_path / "plan.json"
    plan.save(path)
    lines = path.read_text().splitlines()
    for name, units in plan.items():
        assert sum(line.startswith(f' "{name}": {json.dumps(units)}') for line in lines) == 1
    loaded = singe.Plan.load(path)
    assert dict(loaded) == dict(plan)
    assert loaded.meta == plan.meta
    assert loaded.explain() == plan.explain()
    fresh, pruned = clone(model), clone(model)
    singe.prune(fresh, loaded, x)
    singe.prune(pruned, plan, x)
    assert torch.equal(fresh(x), pruned(x))
    with pytest.raises(singe.ScoresError, match="another model"):
        singe.prune(network((12, 16, 15))[0], loaded, x)


def test_the_explanation():
    model, x = network()
    scores = random_scores(model, x)
    plan = singe.plan(model, scores, x, macs=0.4, ignore=["13"], max_pruning_ratio=0.5)
    text = plan.explain()
    assert "macs" in text.splitlines()[0]
    for row in plan.rows():
        name, units = row["group"], plan.get(row["group"], [])
        assert (row["removed"], row["kept"]) == (len(units), len(scores[name]) - len(units))
        if units:
            assert row["highest_removed"] == float(scores[name][units].max())
        assert row["lowest_kept"] >= (row["highest_removed"] or 0)
        fewer = {n: u for n, u in plan.items() if n != name}
        back = singe.prune(clone(model), Plan(fewer), x).params_after
        assert row["params_saved"] == back - plan.meta["after"]["params"]
        (line,) = [line for line in text.splitlines() if line.startswith(name + " ")]
        assert line.endswith(row["why"])
    why = {row["group"]: row["why"] for row in plan.rows()}
    assert why["13"] == "keeps all: ignore"
    assert "at its limit: max_pruning_ratio" in why.values()
    assert "2 units go" in singe.Plan({"a": [0, 1]}).explain()


@pytest.mark.parametrize(
    "gap", ["units", "macs_saved", "why", "before", "after", "channels", "ranking"]
)
def test_a_table_with_gaps_counts_as_absent(gap, tmp_path):
    """A plan may have been edited, or made by something else; its units are still to be carried out."""
    model, x = network()
    plan = singe.plan(model, random_scores(model, x), x, macs=0.5)
    content = json.loads(plan.to_json())
    for table in (*content["groups"].values(), content["meta"], content["meta"]["before"]):
        table.pop(gap, None)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    loaded = Plan.load(path)
    assert loaded.rows() == []
    assert f"{next(iter(plan))}: " in loaded.explain()
    assert singe.prune(model, loaded, x).macs_after == plan.meta["after"]["macs"]


@pytest.mark.parametrize(
    "wrong", [5, [], {}, {"macs": "many"}, {"macs": 0, "channels": 0, "params": 0}]
)
def test_a_table_of_something_else_counts_as_absent(wrong):
    model, x = network()
    plan = singe.plan(model, random_scores(model, x), x, macs=0.5)
    for table in ("before", "groups"):
        for units in (plan, {}):
            edited = Plan(units, {**plan.meta, table: wrong})
            assert edited.rows() == [] or (table, wrong, units) == ("groups", {}, {})
            assert edited.explain()
    without = {name: table for name, table in plan.meta.items() if name != "groups"}
    assert Plan({}, without).rows() == []


def test_a_share_of_scores_below_zero_is_not_given():
    model, x = network()
    scores = random_scores(model, x)
    for values in scores.values():
        values -= values.median()
    plan = singe.plan(model, scores, x, macs=0.4)
    assert all(row["score_removed"] is None for row in plan.rows())
    assert plan.explain().count("%") == 3 + len(plan.rows())  # costs in the head, MACs saved


def test_shares_are_not_lost_to_rounding():
    """0.29 * 100 is 28.999999999999996, and 0.07 * 100 is 7.000000000000001."""
    assert [rounded_down(share / 100, 100) for share in range(101)] == list(range(101))
    model, x = network((100, 8, 8))
    scores = random_scores(model, x)
    root = next(name for name, values in scores.items() if len(values) == 100)
    for kept in (7, 29):
        limits = {"min_keep": {root: kept / 100}, "max_keep": {root: kept / 100}}
        assert len(singe.plan(model, scores, x, macs=0.99, **limits)[root]) == 100 - kept


def test_units_of_a_plan_are_whole_numbers():
    """A mask has truth values for every unit, not the units: easily given, and silently wrong."""
    units = [
        np.array([4, 1]),
        torch.tensor([1, 4]),
        np.array([1, 4], dtype=np.uint8),
        (np.int64(4), 1),
    ]
    assert all(Plan({"0": given})["0"] == [1, 4] for given in units)
    mask = torch.tensor([False, True, False, False, True])
    for wrong in (mask, mask.numpy(), [True, False]):
        with pytest.raises(singe.ScoresError, match=r"mask\.nonzero\(\)\.flatten\(\)"):
            Plan({"0": wrong})
    assert Plan({"0": mask.nonzero().flatten()})["0"] == [1, 4]
    for wrong in (torch.tensor([1.0, 2.7]), np.float32([1.5]), [1.5], ["1"]):
        with pytest.raises(singe.ScoresError, match="units are integers"):
            Plan({"0": wrong})
