"""MACs of layers that Torch-Pruning miscounts: transposed convolutions, recurrent layers, subclasses.

Of a transposed convolution it multiplies the outputs, not the inputs, with the kernel (stride 4: 16 times
too many); a recurrent layer's it multiplies with the batch twice, and counts second directions and layers
by the first. Of a class that only derives from one that it knows (timm's ``Conv2dSame``, a weight-normed
convolution) it counts nothing: such a layer counts as its base does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
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


def miscounted(module: nn.Module) -> Iterator[nn.Module]:
    """What :func:`counted_calls` knows better, of this module and of all in it."""
    if isinstance(module, (_ConvTransposeNd, nn.RNNBase)) or _counter_of_base(module):
        yield module
    if not is_counted(module):
        for child in module.children():
            yield from miscounted(child)


def _counter_of_base(module: nn.Module) -> Any:
    """Torch-Pruning's count of the class that this conv, linear or norm derives from, if that is needed."""
    if is_counted(module) or not isinstance(module, (*ROWS, *NORMS)):
        return None
    return next((COUNTED[base] for base in type(module).__mro__ if base in COUNTED), None)


@contextmanager
def counted_calls(modules: Collection[nn.Module]) -> Iterator[dict[nn.Module, float]]:
    """MACs of all calls of these modules in here, for the whole batch."""
    found: dict[nn.Module, float] = dict.fromkeys(modules, 0.0)

    def counter(module: nn.Module) -> Callable[..., None]:
        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            # A subclass may take and return what it likes: the first tensors are the layer's.
            x, y = (next(_tensors(part), None) for part in ((args, kwargs), out))
            if x is not None and y is not None:
                found[module] += _macs(module, x, y)

        return look

    hooks = [m.register_forward_hook(counter(m), with_kwargs=True) for m in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    """All in it that have values; a packed sequence is a tuple that begins with its data."""
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.dim())


def _macs(module: Any, x: Tensor, out: Tensor) -> float:
    if isinstance(module, nn.RNNBase):  # every parameter once per step, packed sequences included
        steps = x.numel() // module.input_size
        return float(steps * sum(p.numel() for p in module.parameters()))
    if counter := _counter_of_base(module):
        module.__flops__ = 0  # the counter adds to it
        counter(module, (x,), out)
        return float(module.__flops__)
    return float(x.numel() * module.weight[0].numel() + (0 if module.bias is None else out.numel()))
