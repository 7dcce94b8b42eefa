"""Plans meet their target from below and tightly; pruning carries them out, physically.

Torch-Pruning's ``count_ops_and_params`` is the yardstick for MACs and parameters.
"""

from __future__ import annotations

import json

import pytest
import torch
import torch_pruning as tp
from helpers import (
    CPU,
    assert_unchanged,
    clone,
    mean_loss,
    one_thread,  # noqa: F401 - autouse
    randomise,
    relative_error,
    snapshot,
)
from helpers_networks import CASES, Case, residual, vgg
from torch import nn
from torch.utils._pytree import tree_map

import singe
from singe.cost import CostModel
from singe.data import example_batch
from singe.graph import unwrapped
from singe.units import find_groups

WIDE = {
    "vgg": Case(lambda: vgg((12, 16, 14), 20), (3, 8, 8)),
    **{name: CASES[name] for name in ("residual", "depthwise", "pre_activation", "group_norm")},
    **{name: CASES[name] for name in ("grouped", "tokens", "conv1d", "conv3d", "dict")},
}


def inputs_of(case: Case):
    """Example inputs as Torch-Pruning takes them, and one batch for scoring."""
    batch = case.batches((2,))[0]
    if isinstance(batch, dict):
        return {k: v for k, v in batch.items() if k != "labels"}, [batch]
    return batch[0], [batch]


class Positional(nn.Module):
    """Torch-Pruning counts a whole batch as one sample where inputs are passed by name."""

    def __init__(self, model: nn.Module, names) -> None:
        super().__init__()
        self.model, self.names = model, list(names)

    def forward(self, *tensors):
        return self.model(**dict(zip(self.names, tensors, strict=True)))


def count(model: nn.Module, example) -> dict[str, float]:
    """MACs per sample and parameters, as Torch-Pruning counts them for one alone."""
    if isinstance(example, dict):
        model, example = Positional(model, example), tuple(example.values())
    macs, params = tp.utils.count_ops_and_params(model, tree_map(lambda t: t[:1], example))
    return {"macs": macs, "params": params}


def prepare(name: str):
    case = WIDE[name]
    model = case.model()
    example, batches = inputs_of(case)
    return model, example, singe.score(model, batches, criterion="taylor", progress=False)


def measure(model: nn.Module, plan, example, scores) -> dict[str, float]:
    copy = clone(model)
    singe.prune(copy, plan, example)
    left = sum(len(t) for t in scores.values()) - plan.n_units
    return {**count(copy, example), "channels": left}


def order_of(plan: singe.Plan, scores: singe.Scores) -> list[tuple[str, int]]:
    """The plan's units, lowest score first."""
    return sorted(
        ((name, unit) for name, units in plan.items() for unit in units),
        key=lambda pair: scores[pair[0]][pair[1]].item(),
    )


@pytest.mark.parametrize("share", [0.8, 0.5])
@pytest.mark.parametrize("kind", ["macs", "params", "channels"])
@pytest.mark.parametrize("name", WIDE)
def test_targets_are_met_from_below_and_tightly(name, kind, share):
    """With the last unit left in, the target is missed."""
    model, example, scores = prepare(name)
    before = {**count(model, example), "channels": sum(len(t) for t in scores.values())}
    plan = singe.plan(model, scores, example, **{kind: share})
    after = measure(model, plan, example, scores)
    assert after[kind] <= share * before[kind]
    assert plan.meta["after"] == pytest.approx(after)
    assert plan.meta["before"] == pytest.approx(before)

    *kept, (last, unit) = order_of(plan, scores)
    fewer = {n: [u for u in units if (n, u) != (last, unit)] for n, units in plan.items()}
    assert singe.Plan(fewer).n_units == len(kept) == plan.n_units - 1
    assert measure(model, singe.Plan(fewer), example, scores)[kind] > share * before[kind]


def test_a_share_and_a_number_are_the_same_target():
    model, example, scores = prepare("vgg")
    before = count(model, example)
    by_share = singe.plan(model, scores, example, macs=0.5)
    assert dict(singe.plan(model, scores, example, macs=0.5 * before["macs"])) == dict(by_share)
    assert singe.plan(model, scores, example, channels=40).meta["after"]["channels"] == 40


def test_a_target_that_is_met_already_removes_nothing():
    model, example, scores = prepare("vgg")
    plan = singe.plan(model, scores, example, macs=1.0)
    assert dict(plan) == {}
    before = snapshot(model)
    report = singe.prune(model, plan, example)
    assert_unchanged(model, before)
    assert report.macs_after == report.macs_before
    assert report.removed == {}


def test_global_ranking_takes_the_lowest_scores():
    model, example, scores = prepare("vgg")
    plan = singe.plan(model, scores, example, channels=0.7, max_pruning_ratio=1.0)
    gone = [scores[n][u].item() for n, units in plan.items() for u in units]
    kept = [
        s for n, t in scores.items() for u, s in enumerate(t.tolist()) if u not in plan.get(n, [])
    ]
    assert max(gone) <= min(kept)


def test_local_ranking_takes_the_same_share_of_every_group():
    model, example, scores = prepare("vgg")
    plan = singe.plan(model, scores, example, channels=0.6, ranking="local")
    assert set(plan) == set(scores)
    for name, units in plan.items():
        values = scores[name]
        assert len(units) == pytest.approx(0.4 * len(values), abs=1)
        lowest = torch.argsort(values, stable=True)[: len(units)].tolist()
        assert units == sorted(lowest)


@pytest.mark.parametrize("ranking", ["global", "local"])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 1.0])
def test_no_group_loses_more_than_its_share_or_everything(ranking, ratio):
    model, example, scores = prepare("vgg")
    sizes = {name: len(t) for name, t in scores.items()}
    allowed = {name: min(n - 1, int(ratio * n)) for name, n in sizes.items()}
    plan = singe.plan(
        model, scores, example, ranking=ranking, max_pruning_ratio=ratio,
        channels=float(sum(sizes.values()) - sum(allowed.values())),  # everything that may go
    )  # fmt: skip
    assert {name: len(units) for name, units in plan.items()} == allowed


@pytest.mark.parametrize("name", WIDE)
def test_the_cost_model_predicts_torch_prunings_count(name):
    """Parameters exactly; MACs up to activations, pooling and the biases of token layers.

    Of these tiny networks that is up to a quarter, so the count on the pruned copy decides.
    """
    model, example, scores = prepare(name)
    graph = find_groups(model, example_batch(example, CPU), layers=list(scores))
    cost = CostModel(model, graph, example_batch(example, CPU))
    plan = singe.Plan({g.name: range(g.n_units // 2) for g in graph.groups})
    predicted = cost({name: len(units) for name, units in plan.items()})
    measured = measure(model, plan, example, scores)
    assert predicted["params"] == measured["params"]
    assert predicted["channels"] == measured["channels"]
    assert predicted["macs"] == pytest.approx(measured["macs"], rel=0.25)


# ---------------------------------------------------------------------- Plan


def test_a_plan_is_a_mapping():
    plan = singe.Plan({"b": [3, 1, 3], "a": (0,), "c": []})
    assert dict(plan) == {"b": [1, 3], "a": [0]}
    assert plan.n_units == 3
    assert len(plan) == 2
    assert repr(plan) == "Plan(3 units of 2 groups)"
    assert dict(singe.Plan({"a": torch.tensor([2, 1])})) == {"a": [1, 2]}


@pytest.mark.parametrize(
    "as_numbers", [torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.clone]
)
def test_scores_of_anybodys(as_numbers):
    model, example, scores = prepare("vgg")
    plain = {name: as_numbers(values) for name, values in scores.items()}
    plan = singe.plan(model, scores, example, macs=0.6)
    assert dict(singe.plan(model, plain, example, macs=0.6)) == dict(plan)
    by_hand = singe.Scores(scores, scores.groups, {})
    found = singe.plan(model, by_hand, example, macs=0.6)
    assert dict(found) == dict(plan)
    assert "by given scores" in found.explain()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {}, "there are no scores"),
        (lambda s: {**s, "zz": torch.ones(3)}, "scores of 'zz', which Sequential does not have"),
        (
            lambda s: {n: t[:, None] for n, t in s.items()},
            r"have shape \(\d+, 1\); give one number",
        ),
        (lambda s: dict.fromkeys(s, "abc"), "are no tensor of numbers"),
        (lambda s: {n: t[1:] for n, t in s.items()}, r"there are \d+ scores for the \d+ units of"),
    ],
)
def test_scores_that_are_none(change, message):
    model, example, scores = prepare("vgg")
    with pytest.raises(singe.ScoresError, match=message):
        singe.plan(model, change(dict(scores)), example, macs=0.6)


def test_scores_under_the_name_of_a_coupled_layer():
    model, example, scores = prepare("residual")
    group, layers = next((g, layers) for g, layers in scores.groups.items() if len(layers) > 1)
    other = next(name for name in layers if name != group)
    with pytest.raises(singe.ScoresError, match=f"units of {other} go with those of '{group}'"):
        singe.plan(model, {other: scores[group]}, example, channels=0.5)


def test_scores_that_were_written_to():
    model, example, scores = prepare("vgg")
    scores[next(iter(scores))][0] = float("nan")
    with pytest.raises(singe.NonFiniteError, match="hold NaN"):
        singe.plan(model, scores, example, macs=0.6)


def test_a_plan_that_was_edited_does_not_tell_old_numbers():
    model, example, scores = prepare("vgg")
    plan = singe.plan(model, scores, example, macs=0.6)
    name = next(iter(plan))
    for edited in (
        singe.Plan({name: plan[name][:1]}, plan.meta),
        singe.Plan(plan, {"groups": plan.meta["groups"]}),
    ):
        assert edited.rows() == []
        assert "edited since it was planned" in edited.explain()


def test_a_single_index_is_a_tensor_without_dimensions():
    mask = torch.tensor([False, False, True])
    assert dict(singe.Plan({"a": mask.nonzero().squeeze()})) == {"a": [2]}


def test_json_round_trip(tmp_path):
    model, example, scores = prepare("vgg")
    plan = singe.plan(model, scores, example, macs=0.6)
    plan.save(tmp_path / "plan.json")
    json.loads((tmp_path / "plan.json").read_text())
    loaded = singe.Plan.load(tmp_path / "plan.json")
    assert dict(loaded) == dict(plan)
    assert loaded.meta == plan.meta
    singe.prune(model, loaded, example)
    assert count(model, example)["macs"] == plan.meta["after"]["macs"]


@pytest.mark.parametrize("content", [
    "", "[]", "{}", '{"remove": 3}', '{"remove": {"a": ["x"]}}', '{"remove": {}, "groups": {"a": 3}}',
    '{"remove": {}, "format": "singe-plan-9"}',
])  # fmt: skip
def test_files_that_are_no_plan(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(singe.ScoresError, match=r"plan\.json"):
        singe.Plan.load(path)
    with pytest.raises(singe.ScoresError, match=r"none\.json"):
        singe.Plan.load(tmp_path / "none.json")


# ---------------------------------------------------------------------- prune


@pytest.mark.parametrize("name", WIDE)
def test_prune_removes_what_the_plan_says(name):
    case = WIDE[name]
    model, example, scores = prepare(name)
    before = count(model, example)
    remove = {g: list(range(len(t) // 2)) for g, t in scores.items()}
    report = singe.prune(model, singe.Plan(remove), example)
    after = count(model, example)
    assert (report.macs_before, report.params_before) == (before["macs"], before["params"])
    assert (report.macs_after, report.params_after) == (after["macs"], after["params"])
    assert report.removed == {name: len(units) for name, units in remove.items()}
    assert report.kept == {name: len(scores[name]) - len(units) for name, units in remove.items()}
    assert after["macs"] < before["macs"]
    assert f"{after['params']:,}" in str(report)
    json.dumps(report.to_dict())
    # An ordinary module: it runs, trains, and holds no trace of the package.
    model.train()
    loss = nn.functional.cross_entropy
    outputs = model(**example) if isinstance(example, dict) else model(example)
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs
    loss(logits, torch.zeros(len(logits), dtype=torch.long)).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all("forward" not in m.__dict__ for m in model.modules())
    singe.score(model.eval(), case.batches(), progress=False)


def test_which_channels_are_left():
    case = Case(residual, (3, 6, 6))
    model = case.model()
    original = clone(model)
    singe.prune(model, singe.Plan({"3.body.0": [1, 4]}), case.batches()[0][0])
    kept = [0, 2, 3, 5]
    body, old = model[3].body, original[3].body
    assert torch.equal(body[0].weight, old[0].weight[kept])
    assert torch.equal(body[1].running_var, old[1].running_var[kept])
    assert torch.equal(body[3].weight, old[3].weight[:, kept])
    assert body[0].out_channels == 4
    assert body[3].in_channels == 4


def test_any_layer_of_a_group_names_it():
    """The stream of a residual block belongs to the stem and to the block's last convolution."""
    case = CASES["residual"]
    left, right = case.model(), case.model()
    x = case.batches()[0][0]
    singe.prune(left, singe.Plan({"0": [2], "3.body.3": [4]}), x)
    singe.prune(right, singe.Plan({"0": [2, 4]}), x)
    assert left[0].out_channels == right[0].out_channels == 3
    assert mean_loss(left, case.batches()) == mean_loss(right, case.batches())


@pytest.mark.parametrize("training", [True, False])
def test_prune_keeps_modes_flags_and_statistics(training):
    case = CASES["residual"]
    model = case.model().train(training)
    model[1].train(not training)
    model[0].weight.requires_grad_(False)
    statistics = model[1].running_mean.clone()
    modes = [m.training for m in model.modules()]
    singe.prune(model, singe.Plan({"3.body.0": [0]}), case.batches()[0][0])
    assert [m.training for m in model.modules()] == modes
    assert not model[0].weight.requires_grad
    assert model[3].body[0].weight.requires_grad
    assert torch.equal(model[1].running_mean, statistics), "pruning ran a training-mode forward"


def test_pruning_in_two_steps_is_pruning_at_once():
    case = CASES["residual"]
    once, twice = case.model(), case.model()
    x = case.batches()[0][0]
    singe.prune(once, singe.Plan({"3.body.0": [1, 4], "0": [0]}), x)
    singe.prune(twice, singe.Plan({"3.body.0": [1]}), x)
    singe.prune(twice, singe.Plan({"3.body.0": [3], "0": [0]}), x)  # unit 4 is unit 3 now
    for left, right in zip(once.parameters(), twice.parameters(), strict=True):
        assert torch.equal(left, right)


def test_the_state_of_a_float32_model_with_random_statistics_survives_planning():
    """Planning prunes copies; the model's own weights and statistics are still the scored ones."""
    torch.manual_seed(0)
    model = randomise(vgg((12, 16, 14), 20), 3)
    batches = [(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))]
    scores = singe.score(model, batches, progress=False)
    singe.plan(model, scores, batches[0][0], params=0.4, ranking="local")
    again = singe.score(model, batches, progress=False)
    assert all(relative_error(again[name], scores[name]) == 0.0 for name in scores)


def test_a_compiled_data_parallel_wrapper_is_its_model():
    model = CASES["residual"].model()
    assert unwrapped(torch.compile(nn.DataParallel(torch.compile(model)))) is model


def test_a_torch_compile_wrapper_is_its_model():
    """Scores know the original names; planning and pruning through the wrapper finds them."""
    case = CASES["residual"]
    model, x = case.model(), case.batches()[0][0]
    wrapper = torch.compile(model)  # compiles at its first call, and there is none
    scores = singe.score(wrapper, case.batches(), progress=False)
    expected = singe.score(model, case.batches(), progress=False)
    assert list(scores) == list(expected)
    chosen = singe.score(wrapper, case.batches(), layers=["3.body.0"], progress=False)
    assert list(chosen) == ["3.body.0"]
    plan = singe.plan(wrapper, scores, x, channels=0.7)
    assert dict(plan) == dict(singe.plan(model, expected, x, channels=0.7))
    singe.prune(wrapper, plan, x)
    assert model[3].body[0].out_channels == 6 - len(plan.get("3.body.0", []))
