"""MACs of layers that Torch-Pruning miscounts: transposed convolutions and recurrent layers.

Of a transposed convolution it multiplies the outputs, not the inputs, with the kernel (stride 4: 16 times
too many); a recurrent layer's it multiplies with the batch twice, and counts second directions and layers
by the first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd


def miscounted(module: nn.Module) -> bool:
    """Whether :func:`counted_calls` knows better."""
    return isinstance(module, (_ConvTransposeNd, nn.RNNBase))


@contextmanager
def counted_calls(modules: Collection[nn.Module]) -> Iterator[dict[nn.Module, float]]:
    """MACs of all calls of these modules in here, for the whole batch."""
    found: dict[nn.Module, float] = dict.fromkeys(modules, 0.0)

    def counter(module: nn.Module) -> Callable[..., None]:
        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            found[module] += _macs(module, args[0] if args else kwargs["input"], out)

        return look

    hooks = [m.register_forward_hook(counter(m), with_kwargs=True) for m in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _macs(module: Any, x: Any, out: Any) -> float:
    if isinstance(module, nn.RNNBase):  # every parameter once per step, packed sequences included
        steps = x.data.numel() // module.input_size
        return float(steps * sum(p.numel() for p in module.parameters()))
    assert isinstance(x, Tensor)
    return float(x.numel() * module.weight[0].numel() + (0 if module.bias is None else out.numel()))
