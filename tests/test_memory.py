"""``max_memory``: passes are cut to fit, batches too where not even one variant fits."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CPU,
    assert_close,
    batch_of,
    make_batches,
    one_thread,  # noqa: F401 - autouse
    run_engine,
)
from helpers_networks import CASES
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from singe import memory, units, verification
from singe.data import cut
from singe.room import Room
from singe.sums import Sums
from singe.sweep import Sweep


@pytest.fixture
def passes(monkeypatch) -> list[tuple[int, int]]:
    """Variants and samples of every pass with gradients, as they come."""
    seen: list[tuple[int, int]] = []
    add = Sweep._add_gradients

    def spy(self, variants, batch, *args):
        seen.append((len(variants), batch.size))
        return add(self, variants, batch, *args)

    monkeypatch.setattr(Sweep, "_add_gradients", spy)
    return seen


def test_a_batch_that_does_not_fit_is_cut(passes):
    case = CASES["residual"]
    model, batches = case.model(), case.batches((9,))
    whole = run_engine(model, batches)
    assert set(passes) == {(6, 9)}, "two groups of three nodes share a pass"
    passes.clear()
    cut = run_engine(model, batches, max_memory=60_000)
    assert {samples for _, samples in passes} < set(range(1, 6))
    assert_close(cut.scores, whole.scores, 1e-12)


# Of one size where that takes no more passes, else as large as they may be.
@pytest.mark.parametrize(("nodes", "sizes"), [(6, [3, 3]), (7, [4, 3]), (9, [3, 3, 3]), (3, [3])])
def test_the_sizes_of_the_passes_of_a_group(monkeypatch, passes, nodes, sizes):
    case = CASES["residual"]
    monkeypatch.setattr(Room, "variants", lambda self: 4)
    monkeypatch.setattr(Room, "shared_by", lambda self: 0)
    run_engine(case.model(), case.batches((9,)), quadrature=nodes)
    assert [variants for variants, _ in passes] == sizes * 2, "two groups"


@pytest.mark.parametrize(
    ("version", "names"),
    [
        (0, ("memory.max", "memory.current", "inactive_file")),
        (1, ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ],
)
def test_page_cache_in_a_container_is_free(version, names, tmp_path, monkeypatch):
    limit, used, cached = names
    (tmp_path / limit).write_text("1000\n")
    (tmp_path / used).write_text("900\n")
    (tmp_path / "memory.stat").write_text(f"anon 300\n{cached} 600\n")
    monkeypatch.setattr(memory, "CGROUPS", [(tmp_path, limit, used, cached)])
    assert memory.free_memory(CPU) == 700
    (tmp_path / limit).write_text("max\n")
    assert memory.free_memory(CPU) == memory._system_free()


def full(*args):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(("module", "name"), [(verification, "remove_units"), (units, "Network")])
def test_running_out_of_memory_is_no_property_of_a_group(module, name, monkeypatch):
    case = CASES["residual"]
    monkeypatch.setattr(module, name, full)
    with pytest.raises(torch.OutOfMemoryError):
        units.find_groups(case.model(), batch_of(case.batches()[0]))


class Auxiliary(nn.Module):
    """A layer that runs in training mode only, where memory lacks below ``enough`` units."""

    def __init__(self, enough: int) -> None:
        super().__init__()
        self.enough = enough
        self.first, self.up = nn.Linear(4, 6), nn.Linear(6, 5)
        self.down, self.extra = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        first = self.first(x).relu()
        hidden = self.up(first).relu()
        if self.training:
            if first.shape[1] < self.enough:
                full()
            return self.down(hidden), self.extra(hidden)
        return self.down(hidden)


def test_nor_of_a_model_that_cannot_be_traced(monkeypatch):
    case = CASES["residual"]
    model = case.model()
    monkeypatch.setattr(type(model[-1]), "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        units.find_groups(model, batch_of(case.batches()[0]))


@pytest.mark.parametrize("enough", [6, 7], ids=["pruned", "whole"])
def test_nor_where_it_happens_in_training_mode(enough):
    with pytest.raises(torch.OutOfMemoryError):
        units.find_groups(Auxiliary(enough).double().eval(), batch_of(make_batches((4,), (3,))[0]))


class Limited(nn.Module):
    """Runs out of memory with more than ``most`` samples, everywhere or only where gradients are kept."""

    def __init__(self, body: nn.Module, most: int, gradients_only: bool) -> None:
        super().__init__()
        self.body, self.most, self.gradients_only = body, most, gradients_only

    def forward(self, x):
        if len(x) > self.most and (torch.is_grad_enabled() or not self.gradients_only):
            full()
        return self.body(x)


@pytest.mark.parametrize("most", [2, 4])
@pytest.mark.parametrize("gradients_only", [False, True], ids=["plain", "variants"])
@pytest.mark.parametrize(
    "options",
    [{}, {"path": "network"}, {"path": "neuron"}, {"p": "fisher"}, {"objective": "kl"}],
    ids=str,
)
def test_a_batch_that_does_not_fit_is_halved(options, gradients_only, most):
    case = CASES["residual"]
    data = case.batches((10, 11))
    roomy = Limited(case.model(), 100, gradients_only)
    graph = units.find_groups(roomy, batch_of(data[0]))
    whole = run_engine(roomy, data, graph=graph, **options)
    tight = Limited(case.model(), most, gradients_only)
    small = run_engine(tight, data, graph=graph, **options)
    assert_close(small.scores, whole.scores, 1e-12)
    small = run_engine(tight, data, graph=graph, max_memory=10**9, **options)
    assert_close(small.scores, whole.scores, 1e-12)


def test_what_did_not_fit_is_not_tried_again():
    """The first batch shows it; the others are cut before anything runs."""
    case, failed = CASES["residual"], []

    class Counted(Limited):
        def forward(self, x):
            if len(x) > self.most:
                failed.append(len(x))
            return super().forward(x)

    data = case.batches((8,) * 6)
    graph = units.find_groups(Limited(case.model(), 100, True), batch_of(data[0]))
    run_engine(Counted(case.model(), 4, False), data, graph=graph)
    assert failed == [8]


def test_sums_are_made_before_anything_is_added(monkeypatch):
    """A pass that runs out of memory while its sums are made is repeated, and counts once."""
    case, made = CASES["residual"], []
    model, data = case.model(), case.batches((6, 5))
    expected = run_engine(model, data)
    slot = Sums.slot

    def short(self, key, *rest):
        made.append(key)
        if len(made) == 3:
            full()
        return slot(self, key, *rest)

    monkeypatch.setattr(Sums, "slot", short)
    assert_close(run_engine(model, data).scores, expected.scores, 1e-12)
    assert len(made) > 3


class NoMemory(TorchDispatchMode):
    """Raises where an operation makes a tensor of its own."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given:
                full()
        return result


@pytest.mark.parametrize("norm", ["inside", "outside"])
@pytest.mark.parametrize("path", ["layer", "network", "neuron"])
def test_adding_takes_no_memory(path, norm, monkeypatch):
    """So that a pass is added whole, or not at all: coupled layers have a sum each."""
    case = CASES["residual"]
    model, data = case.model(), case.batches((6, 5))
    expected = run_engine(model, data, path=path, norm=norm)
    added = []

    def without_memory(add):
        def add_something(*args):
            with NoMemory():
                add(*args)
            added.append(add)

        return add_something

    monkeypatch.setattr(Sweep, "_add_to", without_memory(Sweep._add_to))
    monkeypatch.setattr(Sweep, "_add_rows", staticmethod(without_memory(Sweep._add_rows)))
    found = run_engine(model, data, path=path, norm=norm)
    assert added
    assert_close(found.scores, expected.scores, 1e-12)


@pytest.mark.parametrize("gradients_only", [False, True], ids=["plain", "variants"])
def test_what_cannot_be_halved_any_more_raises(gradients_only):
    case = CASES["residual"]
    roomy, full_up = (Limited(case.model(), most, gradients_only) for most in (100, 0))
    graph = units.find_groups(roomy, batch_of(case.batches()[0]))
    with pytest.raises(torch.OutOfMemoryError):
        run_engine(full_up, case.batches(), graph=graph)


def test_parts_are_the_batch():
    batch = batch_of(make_batches((6,), (7,))[0])
    first, second = cut(batch, 3, 4)
    assert (first.size, second.size) == (3, 4)
    assert torch.equal(torch.cat([first.args[0], second.args[0]]), batch.args[0])
    assert torch.equal(torch.cat([first.labels, second.labels]), batch.labels)


def test_a_batch_that_cannot_be_taken_apart_stays_whole():
    case = CASES["mlp"]
    x, y = case.batches((5,))[0]
    batch = batch_of({"input": x, "labels": y, "weight": 2.0})
    assert cut(batch, 2, 3) is None

    class Weighted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = case.model()

        def forward(self, input, weight):
            return weight * self.body(input)

    data = [{"input": x, "labels": y, "weight": 2.0}]
    small = run_engine(Weighted(), data, max_memory=1)
    assert_close(small.scores, run_engine(Weighted(), data).scores, 1e-12)


def test_a_mean_with_weights_of_its_own_is_not_halved():
    """The mean over labels that count is another in each half."""
    case = CASES["mlp"]
    x, y = case.batches((16,))[0]
    y = y.clone()
    y[:7] = -100

    def objective(outputs, batch):
        return F.cross_entropy(outputs, batch[1])

    model = case.model()
    whole = run_engine(model, [(x, y)], objective=objective)
    small = run_engine(model, [(x, y)], objective=objective, max_memory=1)
    assert_close(small.scores, whole.scores, 1e-12)


@pytest.mark.parametrize("objective", ["cross_entropy", "kl"])
def test_a_side_input_as_long_as_the_batch_is_not_taken_apart(objective):
    case = CASES["mlp"]

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = case.model()

        def forward(self, input, scale):
            return self.body(input) * scale.sum()

    x, y = case.batches((4,))[0]
    data = [{"input": x, "scale": torch.rand(4).double() + 1, "labels": y}]
    whole = run_engine(Scaled(), data, objective=objective)
    small = run_engine(Scaled(), data, objective=objective, max_memory=1)
    assert_close(small.scores, whole.scores, 1e-12)


def test_sums_that_are_too_large_do_not_cut_the_batches(passes):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 400), torch.nn.ReLU(), torch.nn.Linear(400, 400), torch.nn.ReLU(),
        torch.nn.Linear(400, 4),
    )  # fmt: skip
    run_engine(model, make_batches((6,), (16,), dtype=torch.float32), max_memory=2_000_000)
    assert {samples for _, samples in passes} == {16}


PEAK = """
import torch
from singe.memory import PeakMemory

cpu = torch.device("cpu")
current, highest = PeakMemory(cpu)._read()
more = highest - current + 100_000_000 if highest else 0  # beyond what there ever was
with PeakMemory(cpu) as peak:
    block = torch.ones(more, dtype=torch.uint8)
    del block
with PeakMemory(cpu) as nothing:
    pass
print(more, peak.bytes, nothing.bytes)
"""


def test_peak_memory_is_seen():
    """In a process of its own: where pages come and go, what is resident is no measure of anything."""
    command = [sys.executable, "-c", PEAK]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    if said[0] == "0":
        pytest.skip("this system does not tell its peak memory")
    assert 0.9 * int(said[0]) < int(said[1]) < 1.5 * int(said[0])
    assert said[2] == "None", "nothing new was reached"
