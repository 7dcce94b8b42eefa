"""Libraries that are no dependency of the tests: ``make test-adapters`` runs this file beside them.

Through each library's own pruner, on a small network, the trained ResNet-20 and one of torchvision's.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from helpers import (
    make_batches,
    one_thread,  # noqa: F401 - autouse
    randomise,
)
from helpers_networks import vgg
from helpers_trained import torchvision_models, trained_resnet20
from torch import nn

import singe
from singe import adapters

HINT = "not installed; `make test-adapters` brings it"


def resnet18():
    torch.manual_seed(0)
    return randomise(torchvision_models().resnet18(weights=None, num_classes=10))


def scored(model, size=32):
    model = model.float().eval()
    batches = make_batches((3, size, size), (2,), dtype=torch.float32, classes=10)
    return model, batches[0][0], singe.score(model, batches, path="network", progress=False)


@pytest.mark.parametrize("build", [trained_resnet20, resnet18])
def test_fasterai(build):
    torchvision_models()  # fastai imports torchvision, whose operators may not load
    library = pytest.importorskip("fasterai.prune.all", reason=HINT)
    model, inputs, scores = scored(build())
    head = [m for m in model.modules() if isinstance(m, nn.Linear)]
    pruner = library.Pruner(
        model,
        0.5,
        "global",
        adapters.fasterai.criterion,
        ignored_layers=head,
        example_inputs=inputs,
    )
    with pytest.raises(singe.OptionError, match="before"):
        pruner.prune_model()
    before = {name: model.get_submodule(name).weight.clone() for name in scores}
    pruner.pruner.reset()
    importance = adapters.fasterai.use(pruner, scores)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Torch-Pruning leaves the group")
        pruner.prune_model()
    flat = torch.cat(list(importance.table.values()))
    threshold = flat.sort().values[len(flat) - len(flat) // 2]
    for name, values in importance.table.items():
        kept = before[name][values >= threshold]
        assert model.get_submodule(name).weight.shape[0] == len(kept), name
    assert model(inputs).shape == (2, 10)


def test_modelopt_fastnas():
    convert = pytest.importorskip("modelopt.torch.nas", reason=HINT).convert
    pruning = pytest.importorskip("modelopt.torch.prune", reason=HINT)
    utils = pytest.importorskip("modelopt.torch.opt.utils")
    model, _, scores = scored(trained_resnet20())
    config = pruning.fastnas.FastNASConfig()
    for rule in config.nn_conv2d.values() if hasattr(config, "nn_conv2d") else ():
        rule["channel_divisor"] = 4
    converted = convert(
        copy.deepcopy(model), [("fastnas", config)], registry=pruning.pruning.PruneModeRegistry
    )
    used = adapters.modelopt.use(converted, scores)
    assert set(used.values()) <= set(scores)
    assert used
    for name, hparam in utils.named_hparams(converted, configurable=True):
        if name in used:
            order = hparam.importance.argsort(descending=True)
            assert order.tolist() == scores[used[name]].argsort(stable=True).flip(0).tolist()


@pytest.mark.parametrize("build", [trained_resnet20, resnet18])
def test_nni(build):
    pytest.importorskip("nni.compression", reason=HINT)
    model, _, scores = scored(build())
    config = [{"op_names": list(scores), "sparse_ratio": 0.5}]
    pruner = adapters.nni.pruner(model, config, scores)
    _, masks = pruner.compress()
    for name, values in scores.items():
        gone = (masks[name]["weight"].flatten(1).sum(1) == 0).nonzero().view(-1).tolist()
        assert gone == sorted(values.argsort()[: len(values) // 2].tolist())
    pruner.unwrap_model()


def test_nni_refuses_layers_without_scores():
    pytest.importorskip("nni.compression", reason=HINT)
    model, _, scores = scored(trained_resnet20())
    pruner = adapters.nni.pruner(model, [{"op_names": ["conv1"], "sparse_ratio": 0.5}], scores)
    with pytest.raises(singe.ModelError, match="'conv1' of config_list has no scores"):
        pruner.compress()


def test_captum_understands_the_relevances():
    """Captum's own visitor of attributions takes ours: same names, same shapes per channel."""
    captum = pytest.importorskip("captum.attr", reason=HINT)
    torch.manual_seed(0)
    model = randomise(vgg())
    model[13] = nn.Linear(7 * 4, 9)
    model = randomise(model.double())
    x, y = make_batches((3, 16, 16), (3,))[0]
    conductance = captum.LayerConductance(model, model[0]).attribute(x, target=y, n_steps=8)
    ours = adapters.captum.ChannelIntegratedGradients(model, model[0])
    found, delta = ours.attribute(x, target=y, n_steps=8, return_convergence_delta=True)
    assert found.shape == conductance.shape[1:2] == delta.shape
