"""What the benchmarks compute around their timings: baselines, samples, floors, verdicts, pages."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest
import torch
import torch_pruning
from helpers import (
    one_thread,  # noqa: F401 - autouse
    relative_error,
)
from torch import nn

import singe
from benchmarks import early, floor, kernels, record, report, sampling, scoring
from benchmarks.floor import Pieces
from benchmarks.models import Mixer, Work, folded, spread
from benchmarks.targets import Entry
from benchmarks.textbook import STRENGTHS, NaiveLoop
from singe.quadrature import gauss_legendre

ROOT = Path(__file__).resolve().parents[1]


class Blocks(nn.Module):
    """An expansion coupled with a depthwise convolution, and a plain convolution with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm1 = nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.depth, self.norm2 = nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6)
        self.plain = nn.Conv2d(6, 4, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = torch.relu(self.norm1(self.expand(x)))
        x = torch.relu(self.norm2(self.depth(x)))
        return self.head(torch.relu(self.plain(x)).mean((2, 3)))


@pytest.fixture
def small() -> Work:
    torch.manual_seed(0)
    model = Blocks()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    batches = [(torch.randn(4, 3, 8, 8), torch.randint(5, (4,))) for _ in range(2)]
    return Work("blocks", model.eval(), batches, ("expand", "plain"))


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("path", ["layer", "neuron", "network"])
def test_the_naive_loops_give_the_packages_scores(small, path, strength):
    before = {name: value.clone() for name, value in small.model.state_dict().items()}
    rule = gauss_legendre(3)
    found = NaiveLoop(small.model, small.graph(), strength).scores(path, small.batches, rule)
    expected = scoring.sweep(small, path, 3, engine="naive")
    for name in expected:
        assert relative_error(found[name], expected[name]) < 1e-5
    for name, value in small.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_naive_loops_refuse_what_they_would_get_wrong():
    torch.manual_seed(0)
    pool = nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), pool, nn.Flatten(), nn.Linear(4, 2)
    )
    work = Work("norm", model.eval(), [(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))], ("0",))
    with pytest.raises(ValueError, match="no plain row"):
        NaiveLoop(model, work.graph(), "textbook")


@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_naive_loops_do_linear_layers(strength):
    torch.manual_seed(0)
    model = Mixer(width=8, depth=1).eval()
    batches = [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))]
    work = Work("mixer", model, batches, ("blocks.0.tokens.0", "blocks.0.channels.0"))
    found = NaiveLoop(model, work.graph(), strength).scores("layer", batches, gauss_legendre(2))
    expected = scoring.sweep(work, "layer", 2, engine="naive")
    for name in expected:
        assert relative_error(found[name], expected[name]) < 1e-5


def test_folded_is_the_same_network(small):
    same = folded(small)
    x = small.batches[0][0]
    assert torch.allclose(same.model(x), small.model(x), atol=1e-5)
    assert isinstance(same.model.norm1, nn.Identity)


def test_sampling_takes_as_much_from_every_group():
    plan = sampling.plan("neuron", [16, 64], nodes=4, batches=2, per_group=5)
    groups = [step.group for step in plan.steps]
    assert sorted(groups) == [0] * 5 + [1] * 5
    assert plan.total == {0: 128, 1: 512}
    assert not plan.complete
    assert plan.describe()["steps_of_the_whole"] == 640
    assert len(set(plan.steps)) == 10, "a step is not run twice"
    assert plan == sampling.plan("neuron", [16, 64], nodes=4, batches=2, per_group=5)
    whole = sampling.plan("network", [16, 64], nodes=4, batches=2, per_group=None)
    assert whole.complete
    assert whole.total == {None: 8}


def test_extrapolation_weighs_every_group_with_its_steps():
    times = [(0, 1.0), (0, 3.0), (1, 10.0)]
    assert sampling.extrapolate(times, {0: 10, 1: 4}) == 10 * 2.0 + 4 * 10.0
    with pytest.raises(ValueError, match=r"\[1\]"):
        sampling.extrapolate([(0, 1.0)], {0: 1, 1: 1})
    assert scoring.line(1, 3.0, 3, 7.0, 10) == 21.0  # fixed cost 1, 2 per step


PIECES = Pieces([3.0, 1.0], [6.0, 2.0], [0.5, 0.25], 4.0, 8.0)


def test_floor_arithmetic():
    assert floor.layer_floor(PIECES, 4) == 4 * (3 + 6 + 0.5 + 1 + 2 + 0.25) + 4
    assert floor.neuron_floor(PIECES, 2, [10, 20]) == 2 * (10 * 9 + 0.5 + 20 * 3 + 0.25) + 4
    assert floor.network_floor(PIECES, 4) == 4 * (4 + 8 + 0.75)
    assert PIECES.describe()["sigma"] == (9 / 12 + 3 / 12) / 2
    slower = Pieces([5.0, 5.0], [6.0, 2.0], [0.5, 0.25], 6.0, 8.0)
    middle = floor.average([PIECES, slower, PIECES])
    assert middle == PIECES


def test_measured_pieces_lie_behind_their_groups(small):
    pieces = floor.measurer(small)()
    assert len(pieces.forward) == len(pieces.backward) == len(pieces.weight) == 2
    # The clocks of one pass are in order: less lies behind a later group.
    assert pieces.forward[0] > pieces.forward[1] > 0
    assert pieces.backward[0] > pieces.backward[1] > 0
    assert all(p.grad is None for p in small.model.parameters())


def test_ranks_share_ties():
    assert scoring.ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


def test_overlap_of_the_lowest():
    scores = {"a": torch.tensor([0.3, 0.1]), "b": torch.tensor([0.2, 0.9])}
    assert early.lowest(scores, 0.5) == {1, 2}
    assert early.overlap({1, 3}, {1, 2}) == 0.5


def test_refused_options_are_told_with_the_reason():
    assert scoring.refusal() is None
    assert "nonsense" in scoring.refusal(p="nonsense")
    assert "no_such_option" in scoring.refusal(no_such_option=1)


def test_entries_pass_on_the_right_side():
    assert Entry("a", "", ">=", 3.0, 3.0).passed
    assert not Entry("a", "", ">=", 3.0, 2.9).passed
    assert Entry("a", "", "<=", 1.15, 1.0).passed
    assert not Entry("a", "", "<=", 1.15).passed, "what is not measured is not met"


def test_a_contest_says_what_was_extrapolated(small):
    found = scoring.contest(small, "layer", 2, rounds=1, per_group=1)
    textbook = found["seconds"]["textbook"]
    assert textbook["extrapolated"]
    assert (textbook["steps_run"], textbook["steps_of_the_whole"]) == (2, 8)
    assert found["ratios"]["textbook over fused"] > 0
    assert found["share_of_floor"] > 0
    json.dumps(found)


def test_options_that_are_refused_are_left_out(small, monkeypatch):
    monkeypatch.setitem(scoring.VARIANTS, "offered", {"p": 1})
    monkeypatch.setitem(scoring.VARIANTS, "refused", {"p": "nonsense"})
    names = ["offered", "refused"]
    found = scoring.contest(small, "network", 2, rounds=1, variants=names, naive=False)
    assert found["variants"]["offered"]["spearman"] == pytest.approx(1)
    assert found["variants"]["offered"]["relative_difference"] == 0
    assert "ordinary over offered" in found["ratios"]
    assert "nonsense" in found["variants"]["refused"]["refused"]
    assert "refused" not in found["seconds"]


def test_spread_keeps_both_ends():
    assert spread(list("abcdefg"), 3) == ["a", "d", "g"]
    assert spread(["a", "b"], None) == spread(["a", "b"], 5) == ["a", "b"]
    assert spread(["a", "b", "c"], 1) == ["b"]


def test_no_scores_no_contest(small):
    with pytest.raises(singe.ModelError, match="no_such_layer"):
        Work(small.name, small.model, small.batches, ("no_such_layer",)).graph()


# ---------------------------------------------------------------------- the environment block


def test_the_commit_is_none_where_nothing_says_it(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert record._commit() == (None, None), "no .git"
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record._commit() == (None, None), "no git"
    found = json.loads(record.write("name", [1], tmp_path).read_text())
    assert found["results"] == [1]
    assert found["environment"]["commit"] is None
    assert "commit unknown" in report.provenance(found, "name.json")


def test_results_that_are_put_elsewhere_add_up(monkeypatch, tmp_path):
    (tmp_path / "checkout").mkdir()
    monkeypatch.setattr(record, "RESULTS", tmp_path / "checkout")
    assert record.earlier("name") == {}
    record.write("name", {"runs": [1]})
    monkeypatch.setenv("SINGE_RESULTS", str(tmp_path / "elsewhere"))
    for run in (2, 3):
        record.write("name", {"runs": [*record.earlier("name")["runs"], run]})
    assert record.earlier("name") == {"runs": [1, 2, 3]}
    monkeypatch.delenv("SINGE_RESULTS")
    assert record.earlier("name") == {"runs": [1]}


def test_commands_name_places_in_the_checkout(monkeypatch, tmp_path):
    monkeypatch.setenv("SINGE_RESULTS", str(tmp_path))
    words = ["-m", "pytest", f"{record.ROOT}/benchmarks", "--flush", f"{tmp_path}/suite.json"]
    assert record._relative(words)[2:] == ["benchmarks", "--flush", "benchmarks/results/suite.json"]


def test_versions_are_those_that_are_installed(monkeypatch):
    """A library may say another number: torch_pruning.__version__ is "1.6.0" in the wheel of 1.6.1."""
    monkeypatch.setattr(torch_pruning, "__version__", "0")
    installed = importlib.metadata.version("torch-pruning")
    assert record.environment()["versions"]["torch-pruning"] == installed


@pytest.mark.parametrize(("state", "dirty"), [("clean", False), ("dirty", True)])
def test_a_carried_commit_stands_in(tmp_path, monkeypatch, state, dirty):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    (tmp_path / ".carry").mkdir()
    (tmp_path / ".carry" / "commit").write_text(f"0123456789ab {state}\n")
    assert record._commit() == ("0123456789ab", dirty)
    (tmp_path / ".carry" / "commit").write_text(f" {state}\n")  # carried without git
    assert record._commit() == (None, None)


def test_what_was_carried_goes_before_the_checkout_it_came_to(monkeypatch):
    """A GPU machine's checkout was of another commit than the files that were carried into it."""
    plain = record._commit()
    monkeypatch.setenv("SINGE_COMMIT", "0123456789ab clean\n")
    assert record._commit() == ("0123456789ab", False)
    monkeypatch.setenv("SINGE_COMMIT", " clean\n")  # carried without git
    assert record._commit() == plain


# ---------------------------------------------------------------------- kernels


def test_what_cannot_be_captured_is_timed_as_calls(monkeypatch):
    """On a GPU; here its graphs are replaced by plain calls."""

    def replay(run, sets):
        if run in refused:
            raise RuntimeError("operation not permitted when stream is capturing")
        return kernels.cycle(run, sets)

    monkeypatch.setattr(kernels, "replay", replay)
    runs = {
        "yardstick": (lambda: sum(range(1000)), [()], 8),
        "ours": (lambda x: sum(range(x)), [(1000,), (1001,)], 8),
        "torch reference": (lambda x: sum(range(9 * x)), [(1000,)], 8),
    }
    refused = []
    row = kernels.timed(runs, "ours", 2, "cuda")
    assert row["clock"] == "CUDA graphs"
    assert row["eager"].keys() == {"GB/s", "share", "seconds", "over ours"}
    assert "not captured" not in row
    refused = [runs["torch reference"][0]]
    row = kernels.timed(runs, "ours", 2, "cuda")
    assert "torch reference" not in row["seconds"]
    assert "torch reference" in row["eager"]["seconds"]
    assert "not permitted" in row["not captured"]["torch reference"]
    refused = [runs["ours"][0]]
    row = kernels.timed(runs, "ours", 2, "cuda")
    assert row["clock"] == kernels.CALLED
    assert "ours" in row["seconds"]
    assert row["not captured"].keys() == {"ours"}
    assert "clock" not in kernels.timed(runs, "ours", 2, "cpu")


def test_kernels_are_written_one_by_one_and_ours_first(monkeypatch):
    written = []

    def broken(*_, **__):
        raise RuntimeError("no compiler")

    stick = kernels.yardstick
    monkeypatch.setattr(kernels, "yardstick", lambda total, device: stick(1 << 12, device))
    monkeypatch.setattr(kernels, "SHAPES", {"tiny": (2, 3, 4)})
    monkeypatch.setattr(kernels, "MOST_SETS", 2)
    monkeypatch.setattr(kernels, "write", lambda name, found: written.append(json.dumps(found)))
    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(sys, "argv", ["kernels", "--device", "cpu", "--compile", "--rounds", "1"])
    kernels.main()
    found = [json.loads(text)["kernels"] for text in written]
    names = [*kernels.KERNELS, *kernels.OF_SAMPLES]
    assert names[-1] == "masked backward, gates of samples"
    firsts = [names[: i + 1] for i in range(len(names))]
    assert [list(kinds) for kinds in found] == [*firsts, names, names, names]
    for name in names:
        row = found[-1][name]["tiny"]
        assert row["share"] > 0
        assert ("torch.compile failed" in row) == (name in kernels.KERNELS)
