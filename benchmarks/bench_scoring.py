"""The matrix: models x paths x nodes, fused against naive (``make bench``).

Every cell is one pytest-benchmark entry: its statistics are those of the whole fused call, and
``extra_info`` holds everything that ran in turn with it (``benchmarks/scoring.py``). ``--reduced``
leaves out what takes longest.
"""

from __future__ import annotations

import pytest

from benchmarks.models import MODELS, work
from benchmarks.scoring import BF16, COMPILED, Contest

# Images, batch size, groups on the layer path, on the neuron path. The neuron path costs a pass per
# unit: few images, and few groups, spread over the depth.
SIZES: dict[str, tuple[int, int, int | None, int]] = {
    "resnet20": (64, 64, None, 2),
    "resnet56": (64, 64, None, 1),
    "resnet50": (2, 2, 6, 1),
    "mobilenet_v2": (4, 4, 6, 1),
    "mixer": (32, 32, None, 1),
}
GPU_IMAGES = {"resnet20": 512, "resnet56": 256, "resnet50": 64, "mobilenet_v2": 64, "mixer": 256}
NEURON_IMAGES = 8
NODES = (1, 4, 16)
COMPILED_CELLS = (("resnet20", 4), ("resnet50", 4))


def in_reduced(model: str, path: str, nodes: int) -> bool:
    """4 nodes everywhere, all numbers of nodes on the smallest network; neurons on two models."""
    if path == "neuron":
        return nodes == 4 and model in ("resnet20", "mixer")
    if model == "resnet56" and path == "layer":
        return False  # it is in benchmarks/targets.py
    return nodes == 4 or (model == "resnet20" and (nodes < 16 or path == "network"))


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("path", ["layer", "network", "neuron"])
@pytest.mark.parametrize("model", MODELS)
def test_scoring(benchmark, model, path, nodes, rounds, device, reduced):
    if reduced and not in_reduced(model, path, nodes):
        pytest.skip("not in the reduced matrix")
    images, size, layer_groups, neuron_groups = SIZES[model]
    if device == "cuda":
        images = size = GPU_IMAGES[model]
    if path == "neuron":
        images = min(images, NEURON_IMAGES)
    groups = {"neuron": neuron_groups, "layer": layer_groups, "network": None}[path]
    todo = work(model, images, size, device, groups)
    per_group = {"neuron": 8, "layer": max(1, 12 // len(todo.layers)), "network": 4}[path]
    # Compiling takes many passes' worth of time, so once is enough to see whether it pays; on a GPU
    # it would take most of the minutes there are.
    compile = device == "cpu" and path != "neuron" and (model, nodes) in COMPILED_CELLS
    compiled = [COMPILED] if compile else []
    contest = Contest(todo, path, nodes, per_group, variants=[BF16, *compiled])
    contest.warm_up()
    benchmark.group = f"{model}, {path} path"
    # Everyone else runs in pytest-benchmark's setup, so that the rounds stay paired.
    benchmark.pedantic(contest.fused, setup=contest.others, rounds=rounds)
    benchmark.extra_info.update(contest.result())
