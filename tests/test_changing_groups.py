"""Groups that come and go while a run fine-tunes: those of the first look are the run's."""

from __future__ import annotations

import pytest
import torch
from helpers import make_batches, one_thread  # noqa: F401 - autouse
from helpers_checkpoint import Power
from helpers_loop import BATCHES, OPTIONS
from torch import nn

import singe


class Gated(nn.Module):
    """The channels of ``k`` cannot go, for their mean is taken, unless the gate behind it is closed."""

    def __init__(self, gate: float) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 7, 3, padding=1)
        self.k, self.out = nn.Conv2d(8, 6, 3, padding=1), nn.Linear(7, 4)
        self.gate = nn.Parameter(torch.tensor(gate))

    def forward(self, x):
        x = self.a(x).relu()
        x = self.b(x).relu() + self.gate * self.k(x).mean(1, keepdim=True)
        return self.out(x.mean((2, 3)))


def gated(gate: float) -> Gated:
    torch.manual_seed(0)
    return Gated(gate)


def turn(gate: float):
    def finetune(model, stage):
        with torch.no_grad():
            model.gate.fill_(gate)

    return finetune


def test_a_group_that_comes_later_is_not_the_runs():
    model = gated(1.0)
    seen = []
    report = singe.compress(
        model, macs=0.6, finetune=turn(0.0), on_round=lambda done, scores, plan: seen.append(list(scores)),
        **OPTIONS,
    )  # fmt: skip
    assert "k" in singe.score(model, BATCHES, progress=False), "it would pass by now"
    assert seen == [["a"]] * 2
    assert list(report.plan) == list(report.rounds[-1].kept) == ["a"]
    assert report.macs_after <= 0.6 * report.macs_before


@pytest.mark.parametrize(
    "options", [{}, {"order": "layerwise"}, {"layers": ["a", "k"], "channels": 0.7}], ids=str
)
def test_a_group_that_fails_its_check_later_keeps_its_units(options):
    model = gated(0.0)
    options = {"channels": 0.7, "ranking": "local", **OPTIONS, **options}
    with pytest.warns(UserWarning, match="group 'k' fails its check in round 2 and keeps") as told:
        report = singe.compress(model, finetune=turn(1.0), **options)
    assert [w.filename for w in told] == [__file__]
    assert len(report.rounds) == 2
    assert report.rounds[1].kept["k"] == report.rounds[0].kept["k"] == model.k.out_channels
    assert "not in round 2: gating some of its units" in report.plan.meta["rejected"]["k"]
    assert "left out: k: not in round 2" in report.plan.explain()
    missed = report.plan.meta["after"]["channels"] > 0.7 * 14
    assert missed == (options.get("order") == "layerwise"), (
        "where each group has a share of its own"
    )


@pytest.mark.parametrize(
    "options",
    [{"params": 0.23}, {"params": 0.8, "layers": ["k"]}, {"channels": 0.7, "layers": ["k"]}],
)
def test_a_target_out_of_reach_by_that_leaves_what_is_done(options, tmp_path):
    """And so it does again when the run is continued."""
    for resume in (False, True):
        model = gated(0.0)
        with pytest.warns(
            UserWarning, match=r"target is out of reach .*'k' \(not in round 2: gating"
        ):
            report = singe.compress(
                model, finetune=turn(1.0), checkpoint=tmp_path, resume=resume, **options, **OPTIONS,
            )  # fmt: skip
        assert "this is the network after round 1" in report.stopped
        assert len(report.rounds) == 1
        assert report.rounds[0].kept["k"] == model.k.out_channels < 6
        assert "not in round 2" in report.plan.meta["rejected"]["k"]


def test_what_failed_is_known_when_the_run_is_continued(tmp_path):
    cuts = [3]  # the round in which the power goes

    def finetune(model, stage):
        if stage.round in cuts:
            raise Power
        turn(1.0)(model, stage)

    options = {
        "channels": 0.7,
        "finetune": finetune,
        **OPTIONS,
        "rounds": 3,
        "checkpoint": tmp_path,
    }
    with pytest.raises(Power), pytest.warns(UserWarning, match="fails its check in round 2"):
        singe.compress(gated(0.0), **options)
    cuts.clear()
    report = singe.compress(gated(0.0), resume=True, **options)
    assert "not in round 2" in report.plan.meta["rejected"]["k"]


class Joined(nn.Module):
    """Two layers whose channels are added once ``joined``: from then on they can only go together."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Linear(16, 4)
        self.joined = False

    def forward(self, x):
        a, b = self.a(x).relu(), self.b(x).relu()
        a = a + b if self.joined else a
        return self.head(torch.cat([a.mean((2, 3)), b.mean((2, 3))], 1))


def test_groups_that_were_joined_since_keep_their_units():
    def join(model, stage):
        model.joined = True

    data = make_batches((3, 8, 8), (6, 6), dtype=torch.float32)
    model = Joined()
    with pytest.warns(UserWarning, match="its units go with those of another by now"):
        report = singe.compress(
            model, channels=0.5, ranking="local", finetune=join, **{**OPTIONS, "train": data}
        )
    assert report.rounds[-1].kept == {"a": model.a.out_channels, "b": model.b.out_channels}
    assert "out of reach with all units of 'a' (not in round 2" in report.stopped
    fresh = Joined()
    singe.prune(fresh, report.plan, data[0][0])
    assert fresh.a.weight.shape == model.a.weight.shape
    assert fresh.b.weight.shape == model.b.weight.shape
