"""MACs of the calls of single layers: by Torch-Pruning's formulas, and of what these miscount.

Of a transposed convolution Torch-Pruning multiplies the outputs, not the inputs, with the kernel (stride 4:
16 times too many); a recurrent layer's MACs it multiplies with the batch twice, and counts second directions
and layers by the first. Of a class that only derives from one that it knows (timm's ``Conv2dSame``, a
weight-normed convolution) it counts nothing: such a layer counts as its base does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.utils._pytree import tree_leaves
from torch_pruning.utils.op_counter import MODULES_MAPPING as COUNTED

from singe.graph import NORMS, ROWS


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
def counted_calls(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, float]]:
    """MACs of all calls of these modules in here, for the whole batch, by name."""
    found = dict.fromkeys(modules, 0.0)

    def counter(name: str) -> Callable[..., None]:
        def look(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
        ) -> None:
            found[name] += _macs(module, args, kwargs, out)

        return look

    hooks = [m.register_forward_hook(counter(n), with_kwargs=True) for n, m in modules.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    """All in it that have values; a packed sequence is a tuple that begins with its data."""
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.dim())


def _macs(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
    counter = COUNTED.get(type(module))
    if counter is None or _is_miscounted(module):
        # A subclass may take and return what it likes: the first tensors are the layer's.
        x, y = (next(_tensors(part), None) for part in ((args, kwargs), out))
        if x is None or y is None:
            return 0.0
        if isinstance(module, nn.RNNBase):  # a parameter once per step, also of packed sequences
            steps = x.numel() // module.input_size
            return float(steps * sum(p.numel() for p in module.parameters()))
        if isinstance(module, _ConvTransposeNd):
            bias = 0 if module.bias is None else y.numel()
            return float(x.numel() * module.weight[0].numel() + bias)
        counter, args, out = _counter_of_base(module), (x,), y
    module.__flops__ = 0  # the counter adds to it
    counter(module, args, out)
    return float(module.__flops__)
