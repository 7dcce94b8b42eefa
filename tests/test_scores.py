"""Scores: a mapping that survives its file, knows its model, and refuses what is not its own."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import (
    clone,
    one_thread,  # noqa: F401 - autouse
)
from helpers_networks import CASES
from torch import nn

import singe
from singe.scores import fingerprint


@pytest.fixture(scope="module")
def scored():
    case = CASES["residual"]
    model = case.model()
    scores = singe.score(
        model, case.batches(), criterion="signed", path="neuron", quadrature=2, progress=False
    )
    return model, scores


def test_it_is_a_mapping_of_float32_tensors(scored):
    _, scores = scored
    assert list(scores) == ["0", "3.body.0"]
    assert len(scores) == 2
    assert [len(t) for t in scores.values()] == [5, 6]
    for tensor in scores.values():
        assert tensor.dtype == torch.float32
        assert tensor.device.type == "cpu"
        assert not tensor.requires_grad
    assert "unknown" not in scores
    assert repr(scores) == "Scores(signed, 2 groups, 11 units, 5 samples)"


def test_meta_says_how_they_came_about(scored):
    model, scores = scored
    meta = scores.meta
    assert meta["criterion"] == "signed"
    assert meta["path"] == "neuron"
    assert meta["quadrature"] == "gauss_legendre(2)"
    assert len(meta["nodes"]) == len(meta["weights"]) == 2
    assert meta["objective"] == "cross_entropy"
    assert meta["samples"] == 5
    assert meta["fingerprint"] == fingerprint(model)
    assert meta["versions"]["torch"] == torch.__version__
    assert set(scores.groups) == set(scores)
    assert scores.groups["0"] == ("0", "3.body.3")
    json.dumps(meta)


def test_units_of_channels_survive_the_file(tmp_path):
    """Grouped convolutions put them at equal distances, a concatenation leaves channels to others."""
    case = CASES["grouped"]
    model = case.model()
    scores = singe.score(model, case.batches(), criterion="magnitude", progress=False)
    scores.save(tmp_path / "s")
    read = singe.Scores.load(tmp_path / "s")
    for kept in (scores, read):
        assert kept.units["3"]["3"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
        assert torch.equal(kept.units_of("3", "3", 8), kept.units["3"]["3"])
    by_hand = singe.Scores({"a": torch.rand(3)}, {"a": ("a",)}, {})
    assert by_hand.units_of("a", "a", 6).tolist() == [0, 1, 2, 0, 1, 2]
    assert by_hand.units_of("a", "b", 4).tolist() == [-1] * 4
    with pytest.raises(singe.ScoresError, match="3 scores of 'a', which has 4 channels"):
        by_hand.units_of("a", "a", 4)
    blocks = {"a": {"a": torch.tensor([1, 1, 0, -1])}}
    scores = singe.Scores({"a": torch.rand(2)}, {"a": ("a",)}, {}, units=blocks)
    scores.save(tmp_path / "t")
    assert singe.Scores.load(tmp_path / "t").units_of("a", "a", 4).tolist() == [1, 1, 0, -1]


def test_save_and_load(scored, tmp_path):
    model, scores = scored
    scores.stderr = {name: torch.rand(len(t)) for name, t in scores.items()}
    scores.save(tmp_path / "s.safetensors")
    loaded = singe.Scores.load(tmp_path / "s.safetensors", model)
    assert list(loaded) == list(scores)
    for kind in ("stderr", "completeness"):
        assert getattr(loaded, kind).keys() == getattr(scores, kind).keys()
        for name, tensor in getattr(scores, kind).items():
            assert torch.equal(getattr(loaded, kind)[name], tensor.float())
    assert all(torch.equal(loaded[name], scores[name]) for name in scores)
    assert loaded.groups == scores.groups
    assert loaded.meta == scores.meta
    scores.stderr = None


def test_names_with_slashes_and_many_groups_keep_their_order(tmp_path):
    values = {f"layer{i}": torch.rand(i + 1) for i in (10, 9, 2, 1)}
    groups = {name: (name,) for name in values}
    singe.Scores(values, groups, {}).save(tmp_path / "s")
    loaded = singe.Scores.load(tmp_path / "s")
    assert list(loaded) == list(values)
    assert loaded.stderr is None
    assert loaded.completeness is None


def test_the_fingerprint_is_of_names_and_shapes_not_values(scored):
    model, scores = scored
    trained = clone(model)
    with torch.no_grad():
        trained[0].weight.add_(1)
    scores.check(trained)
    scores.check(model.train())
    model.eval()
    assert fingerprint(nn.Sequential(nn.Linear(2, 3))) != fingerprint(
        nn.Sequential(nn.Linear(3, 2))
    )


def test_scores_of_another_model(scored, tmp_path):
    model, scores = scored
    pruned = clone(model)
    singe.prune(pruned, singe.Plan({"3.body.0": [1]}), CASES["residual"].batches()[0][0])
    scores.save(tmp_path / "s")
    for action in (
        lambda: scores.check(pruned),
        lambda: singe.Scores.load(tmp_path / "s", pruned),
        lambda: singe.plan(pruned, scores, CASES["residual"].batches()[0][0], macs=0.5),
    ):
        with pytest.raises(singe.ScoresError, match=r"another model.*Score it again"):
            action()


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\x08\0\0\0\0\0\0\0{}      "])
def test_files_that_are_none(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(singe.ScoresError, match=r"bad\.safetensors"):
        singe.Scores.load(path)


def test_a_damaged_file(scored, tmp_path):
    _, scores = scored
    path = tmp_path / "cut.safetensors"
    scores.save(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(singe.ScoresError, match=r"cut\.safetensors"):
        singe.Scores.load(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(singe.ScoresError, match=r"nothing\.safetensors"):
        singe.Scores.load(tmp_path / "nothing.safetensors")


def test_somebody_elses_safetensors(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(singe.ScoresError, match="no file of singe scores"):
        singe.Scores.load(tmp_path / "w.safetensors")


def test_values_that_are_not_finite():
    with pytest.raises(singe.NonFiniteError, match="'a'"):
        singe.Scores({"a": torch.tensor([1.0, float("nan")])}, {"a": ("a",)}, {})


def test_scores_equal_each_other_by_value():
    values = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    groups = {"a": ("a",), "b": ("b",)}
    scores = singe.Scores(values, groups, {})
    copied = {name: t.clone() for name, t in values.items()}
    assert scores == singe.Scores(copied, groups, {"criterion": "other"})
    assert scores != singe.Scores({**values, "b": torch.tensor([4.0])}, groups, {})
    assert scores != singe.Scores({"a": values["a"]}, groups, {})
    assert scores != values
