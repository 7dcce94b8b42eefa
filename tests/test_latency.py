"""Budgets in measured time."""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    CPU,
    clone,
    one_thread,  # noqa: F401 - autouse
)
from helpers_budget import IMAGE, network, random_scores
from helpers_networks import Residual
from torch import nn

import singe
from singe import latency
from singe.data import example_batch
from singe.graph import private_copy
from singe.latency import Stopwatch, Timing, quartiles, resized


class Slow(nn.Module):
    """Takes time in proportion to its channels, by a clock of its own: the real one is too noisy."""

    now = 0.0

    def __init__(self, per_channel: float = 1e-3, channels: int = 40) -> None:
        super().__init__()
        self.conv, self.per_channel = nn.Conv2d(3, channels, 1), per_channel
        self.head = nn.Linear(channels, 4)

    def forward(self, x):
        x = self.conv(x)
        Slow.now += self.per_channel * x.shape[1]
        return self.head(x.mean((2, 3)))


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: Slow.now))


@pytest.mark.parametrize("ranking", ["global", "cost"])
@pytest.mark.parametrize("target", [0.6, 24.0])
def test_a_latency_target_is_met_by_measurement(clock, ranking, target):
    model, x = Slow().eval(), torch.randn(2, *IMAGE)
    scores = random_scores(model, x)
    plan = singe.plan(
        model, scores, x, latency=target, ranking=ranking, timing=Timing(runs=3, warmup=1)
    )
    assert plan.meta["before"]["latency"] == pytest.approx(40)
    assert plan.meta["target"]["latency"] == pytest.approx(24)
    assert plan.meta["after"]["latency"] <= 24 + 1e-6
    assert plan.n_units in (16, 17), "40 - 24 = 16 channels of a millisecond each"
    assert plan.meta["timing"]["runs"] == 3
    assert "latency 40" in plan.explain()


@pytest.mark.parametrize("target", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("off", [-0.5, -0.1, 0.1, 0.5])
def test_a_time_close_above_the_target_is_not_the_end_of_the_search(clock, off, target):
    """Layers that are pruned at all cost a little more, or less, than their channels say."""
    model, x = Slow(channels=200).eval(), torch.randn(2, *IMAGE)

    def overhead(module, *_):
        Slow.now += 1e-3 * off * (module.out_channels < 200)

    model.conv.register_forward_hook(overhead)
    plan = singe.plan(
        model, random_scores(model, x), x, latency=target, timing=Timing(runs=3, warmup=1)
    )
    fewest = round(200 * (1 - target) + off)
    assert fewest - 1 <= plan.n_units <= fewest + 4, "within 2 % of 200 units"
    assert plan.meta["after"]["latency"] <= plan.meta["target"]["latency"]


def test_a_latency_out_of_reach(clock):
    model, x = Slow().eval(), torch.randn(2, *IMAGE)
    with pytest.raises(singe.BudgetError, match=r"ms latency cannot be met: .* is 0\.2500 of"):
        singe.plan(model, random_scores(model, x), x, latency=0.05, timing=Timing(runs=3))


def test_a_latency_that_removal_does_not_change(clock):
    """As on a busy machine: no plan, the empty one least of all, and advice about the timing."""
    model, x = Slow(per_channel=0.0).eval(), torch.randn(2, *IMAGE)
    model.register_forward_hook(lambda *_: setattr(Slow, "now", Slow.now + 1e-3))
    with pytest.raises(singe.BudgetError, match=r"no faster.*singe\.Timing"):
        singe.plan(model, random_scores(model, x), x, latency=0.7, timing=Timing(runs=3))


def test_the_stopwatch(clock):
    model, x = Slow().eval(), torch.randn(2, *IMAGE)
    batch = example_batch(x, CPU)
    assert resized(batch, 5).args[0].shape == (5, *IMAGE)
    assert torch.equal(resized(batch, 5).args[0][4], x[0])
    watch = Stopwatch(model, batch, Timing(batch_size=3, runs=5))
    quick = clone(model)
    quick.per_channel = 2e-4
    found = watch.compare(quick)
    assert found.share == pytest.approx(0.2)
    assert found.share_quartiles == pytest.approx((0.2, 0.2))
    assert watch.reference_ms == pytest.approx(40)
    for bad in ({"runs": 0}, {"batch_size": 0}, {"warmup": -1}, {"threads": 0}):
        with pytest.raises(singe.OptionError, match="Timing"):
            Timing(**bad)


def test_a_layer_that_is_called_twice_is_timed_with_both_calls(monkeypatch):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(self.a(self.a(x)))

    model, ticks = Twice().eval(), itertools.count()
    watch = Stopwatch(model, example_batch(torch.randn(2, 4), CPU), Timing(runs=3))
    ticking = SimpleNamespace(perf_counter=lambda: next(ticks))
    monkeypatch.setattr(latency, "time", ticking)
    assert watch.layer_seconds(model) == {"a": 2.0, "b": 1.0}


def test_threads_come_back_where_timing_is_cut_off():
    before = torch.get_num_threads()
    model, x = Slow().eval(), torch.randn(2, *IMAGE)
    timing = Timing(runs=1, warmup=0, threads=before + 1)
    watch = Stopwatch(model, example_batch(x, CPU), timing)

    def cut_off(*_):
        raise KeyboardInterrupt

    model.conv.register_forward_hook(cut_off)
    with pytest.raises(KeyboardInterrupt):
        watch.compare(model)
    assert torch.get_num_threads() == before


def test_quartiles_of_what_was_timed(clock):
    class Uneven(Slow):
        def forward(self, x):
            type(self).passes += 1
            Slow.now += 0.001 * (type(self).passes % 5)  # 0 to 4 ms more, in turn
            return super().forward(x)

    Uneven.passes = 0
    model, x = Slow().eval(), torch.randn(2, *IMAGE)
    watch = Stopwatch(model, example_batch(x, CPU), Timing(runs=5, warmup=0))
    found = watch.compare(Uneven().eval())
    assert (found.ms, *found.ms_quartiles) == pytest.approx((42, 41, 43))
    assert found.reference_quartiles == pytest.approx((40, 40))
    assert (found.share, *found.share_quartiles) == pytest.approx((1.05, 1.025, 1.075))
    assert quartiles([3.0]) == (3.0, 3.0)


def test_rounds_take_no_more_than_the_target(clock):
    """What the network takes is measured every round: one whose target is met already removes nothing."""
    torch.manual_seed(0)
    model, x = Slow().eval(), torch.randn(2, *IMAGE)
    met = []
    report = singe.compress(
        model, train=[(x, torch.tensor([0, 1]))], latency=0.5, rounds=6, round_to=8, finetune_steps=0,
        criterion="magnitude", timing=Timing(runs=3, warmup=1), progress=False,
        on_round=lambda done, scores, plan: met.append(plan.meta["before"]["latency"]),
    )  # fmt: skip
    assert model.conv.out_channels == 16, "20 of 40 ms allow 20 channels, in steps of 8"
    assert [r.kept["conv"] for r in report.rounds] == [32, 32, 24, 24, 16, 16]
    assert met == pytest.approx([40, 32, 32, 24, 24, 16])


class Spell(Slow):
    """So many passes of the pruned network are ten times as slow: the machine does something else."""

    slow = 0

    def forward(self, x):
        before = Slow.now
        out = super().forward(x)
        if Spell.slow > 0 and self.conv.out_channels < 40:
            Spell.slow -= 1
            Slow.now += 9 * (Slow.now - before)
        return out


def in_rounds(monkeypatch, slow: int, **options):
    """Four rounds of a target in latency; so many passes are slow after the second."""
    torch.manual_seed(0)
    monkeypatch.setattr(Spell, "slow", 0)
    model, x = Spell().eval(), torch.randn(2, *IMAGE)
    seen = []

    def on_round(done, scores, plan):
        seen.append(done)
        if len(seen) == 2:
            Spell.slow = slow

    report = singe.compress(
        model, train=[(x, torch.tensor([0, 1]))], latency=0.5, rounds=4, finetune_steps=0,
        criterion="magnitude", timing=Timing(runs=3, warmup=1), progress=False, on_round=on_round,
        **options,
    )  # fmt: skip
    return model, report


def test_a_slow_spell_does_not_end_a_run(clock, monkeypatch):
    """What seemed out of reach is timed again and longer."""
    model, report = in_rounds(monkeypatch, slow=12)
    assert len(report.rounds) == 4
    assert report.stopped is None
    assert model.conv.out_channels <= 20


def test_a_latency_out_of_reach_in_a_later_round_leaves_the_rounds_before(
    clock, monkeypatch, tmp_path
):
    with pytest.warns(UserWarning, match="stopped: a target of 20 ms latency cannot be met"):
        model, report = in_rounds(monkeypatch, slow=10**6, checkpoint=tmp_path / "run")
    assert len(report.rounds) == 2
    assert model.conv.out_channels == report.rounds[-1].kept["conv"] == 30
    assert re.search(
        r"cannot be met: .* of the model's 40 .*; this is the network after round 2", report.stopped
    )
    model, report = in_rounds(monkeypatch, slow=0, checkpoint=tmp_path / "run", resume=True)
    assert report.stopped is None, "it is tried again"
    assert len(report.rounds) == 4
    assert model.conv.out_channels <= 20


def test_attention_is_timed_as_the_model_runs_it():
    """With torch's fused kernels, which scoring cannot use: also of a pruned network."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    watch = Stopwatch(model, example_batch(torch.randn(1, 4, 8), CPU), Timing(runs=1, warmup=0))
    scored = private_copy(model)
    ran = []
    for twin in (model, scored):
        twin.layers[0].linear1.register_forward_hook(lambda *_: ran.append("linear1"))
    with torch.no_grad():
        scored(torch.randn(1, 4, 8))
    assert ran == ["linear1"], "scoring sees every layer"
    patched = vars(private_copy(scored, fast_path=True).layers[0].self_attn)
    assert "forward" not in patched
    assert "forward" not in vars(watch._reference.layers[0].self_attn)
    assert "forward" in vars(scored.layers[0].self_attn)


def test_real_time_passes():
    model, x = network()
    batch = example_batch(x, CPU)
    watch = Stopwatch(model, batch, Timing(runs=3))
    found = watch.compare(model)
    assert found.ms > 0
    assert found.share > 0
    seconds = watch.layer_seconds(model)
    assert set(seconds) == {"0", "4", "8", "13", "16"}
    assert all(s > 0 for s in seconds.values())


def test_residual_blocks_are_groups_of_one_kind():
    """The structure, not the name, decides what is compared with what."""
    torch.manual_seed(0)
    body = [nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1))
            for _ in range(2)]  # fmt: skip
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        *map(Residual, body),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    ).eval()
    x = torch.randn(2, *IMAGE)
    scores = random_scores(model, x)
    tilted = singe.Scores(
        {n: t * (50.0 if n == "1.body.0" else 1.0) for n, t in scores.items()},
        scores.groups, scores.meta,
    )  # fmt: skip
    plan = singe.plan(model, tilted, x, ranking="isomorphic", channels=0.75)
    assert "1.body.0" not in plan
    assert len(plan["2.body.0"]) >= 3
