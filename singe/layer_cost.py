"""MACs of the calls of single layers: by Torch-Pruning's formulas, and of what these miscount.

Of a transposed convolution Torch-Pruning multiplies the outputs, not the inputs, with the kernel (stride 4:
16 times too many); a recurrent layer's MACs it multiplies with the batch twice, and counts second directions
and layers by the first. The bias of a linear layer it counts once per call, for however many samples: here
once per sample, as for a batch of one. Of a class that only derives from one that it knows (timm's
``Conv2dSame``, a weight-normed convolution) it counts nothing: such a layer counts as its base does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.utils._pytree import tree_leaves
from torch_pruning.utils.op_counter import MODULES_MAPPING as COUNTED

from singe.errors import ModelError, first_line
from singe.graph import NORMS, ROWS
from singe.memory import is_out_of_memory

Inputs = tuple[Any, ...]


def is_counted(module: nn.Module) -> bool:
    """Whether Torch-Pruning has a count for it; what is inside then has none of its own."""
    return type(module) in COUNTED


def layers_of(module: nn.Module) -> Iterator[nn.Module]:
    """All with a count, this module and what is in it; one that stands in two modules comes twice."""
    if is_counted(module) or _is_miscounted(module) or _counter_of_base(module):
        yield module
    if not is_counted(module):
        for child in module.children():
            yield from layers_of(child)


def _is_miscounted(module: nn.Module) -> bool:
    return isinstance(module, (_ConvTransposeNd, nn.RNNBase))


def _counter_of_base(module: nn.Module) -> Any:
    """Torch-Pruning's count of the class that this conv, linear or norm derives from, if that is needed."""
    if is_counted(module) or not isinstance(module, (*ROWS, *NORMS)):
        return None
    return next((COUNTED[base] for base in type(module).__mro__ if base in COUNTED), None)


@contextmanager
def counted_calls(
    model: nn.Module, modules: Mapping[str, nn.Module], samples: int
) -> Iterator[dict[str, float]]:
    """MACs of all calls of these modules of the model in here, for a batch of so many samples, by name.

    Raises:
        ModelError: one is called with what its formula cannot read.
    """
    found = dict.fromkeys(modules, 0.0)

    def counter(name: str) -> Callable[..., None]:
        def look(layer: nn.Module, args: Inputs, kwargs: dict[str, Any], out: Any) -> None:
            with layer_named(model, name):
                found[name] += _macs(layer, args, kwargs, out, samples)

        return look

    hooks = [m.register_forward_hook(counter(n), with_kwargs=True) for n, m in modules.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def layer_named(model: nn.Module, name: str) -> Iterator[None]:
    """Errors in here, of whatever type, are about the MACs of a layer, and name it."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        kind = type(model.get_submodule(name)).__name__
        raise ModelError(
            f"the MACs of {type(model).__name__} cannot be counted: its {name!r}, a {kind}, is called with "
            f"what the formula for it cannot read ({type(error).__name__}: {first_line(error)})"
        ) from error


def by_position(module: nn.Module, args: Inputs, kwargs: Mapping[str, Any]) -> Inputs:
    """Inputs as Torch-Pruning's formulas take them: of attention three, of others the first counts."""
    is_attention = isinstance(module, nn.MultiheadAttention)
    count = 3 if is_attention else 1
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    inputs = args + tuple(kwargs[name] for name in names[len(args) : count])
    return inputs[:count] if is_attention else inputs


def tensors(value: Any) -> Iterator[Tensor]:
    """All in it that have values; a packed sequence is a tuple that begins with its data."""
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.dim())


def _macs(module: Any, args: Inputs, kwargs: dict[str, Any], out: Any, samples: int) -> float:
    counter = COUNTED.get(type(module)) or _counter_of_base(module)
    if is_counted(module):
        args = by_position(module, args, kwargs)
    else:  # a subclass may take and return what it likes: the first tensors are the layer's
        args, out = tuple(tensors((args, kwargs))), next(tensors(out), None)
        if not args or out is None:
            return 0.0
    if isinstance(module, nn.RNNBase):  # a parameter once per step, also of packed sequences
        steps = next(tensors(args)).numel() // module.input_size
        return float(steps * sum(p.numel() for p in module.parameters()))
    if isinstance(module, _ConvTransposeNd):
        bias = 0 if module.bias is None else out.numel()
        return float(args[0].numel() * module.weight[0].numel() + bias)
    more_biases = isinstance(module, nn.Linear) and module.bias is not None
    module.__flops__ = (samples - 1) * out.shape[-1] if more_biases else 0  # the counter adds to it
    counter(module, args, out)
    return float(module.__flops__)
