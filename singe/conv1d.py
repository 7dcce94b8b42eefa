"""Linear layers that keep their weight the other way round: ``Conv1D`` of transformers (GPT-2).

Everything here knows ``nn.Linear``. So a private copy gets real linear layers in their places, under
the same names, and the user's model gets them for as long as channels are being removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import skip_init

SOURCE, NAME = "transformers.pytorch_utils", "Conv1D"


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is a linear layer with weight [C_in, C_out]."""
    return type(module).__name__ == NAME and type(module).__module__ == SOURCE


def with_linears(model: nn.Module) -> nn.Module:
    """``model``, a private copy, with linear layers in place of its transposed ones."""
    Linears(model).put()
    return model


class Linears:
    """Linear layers for the transposed ones of a model, to be put in their places and taken back."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._linears: dict[Any, nn.Linear] = {
            m: skip_init(nn.Linear, 1, 1) for m in model.modules() if is_transposed(m)
        }
        self._given: dict[
            nn.Module, tuple[Tensor, Tensor]
        ] = {}  # weight and bias, as they were put

    def put(self) -> None:
        """The model has linear layers, with the transposed ones' values as they are now."""
        for module, linear in self._linears.items():
            linear.in_features, linear.out_features = module.weight.shape
            linear.weight, linear.bias = _transposed(module.weight), module.bias
            linear.train(module.training)
            self._given[linear] = linear.weight, linear.bias
        self._replace(self._linears)

    def back(self) -> None:
        """The model has its own layers, cut as the linear ones were; uncut ones keep their parameters."""
        self._replace({linear: module for module, linear in self._linears.items()})
        for module, linear in self._linears.items():
            weight, bias = self._given.pop(linear, (linear.weight, linear.bias))
            if linear.weight is not weight:
                module.weight = _transposed(linear.weight)
                module.weight.data = module.weight.data.contiguous()
            if linear.bias is not bias:
                module.bias = linear.bias
            module.nx, module.nf = module.weight.shape

    def _replace(self, by: Mapping[Any, nn.Module]) -> None:
        for parent in list(self._model.modules()):
            for name, child in parent._modules.items():
                if child in by:
                    parent._modules[name] = by[child]


def _transposed(weight: Tensor) -> nn.Parameter:
    turned = nn.Parameter(weight.detach().t(), requires_grad=weight.requires_grad)
    if weight.grad is not None:
        turned.grad = weight.grad.t()
    return turned
