"""MACs of attention modules that Torch-Pruning counts as a whole, heads removed or not.

Torch-Pruning has a formula for ``nn.MultiheadAttention`` and for timm's attention: projections and the
products of every head. It takes the width of the input for that of all heads, so that it sees nothing
of heads that are gone, and the widths of keys and values for those of their projections. Here the same
formula has widths of its own for them; with all heads, and keys as wide as queries, the two are equal.
Of other attention modules both count the linear layers only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch_pruning.utils.op_counter import MODULES_MAPPING

from singe.layer_cost import Inputs, by_position, layer_named
from singe.slim import SlimMultiheadAttention


@dataclass
class Tokens:
    """What one attention module was called with, summed over its calls and the batch."""

    queries: int = 0
    keys: int = 0
    pairs: int = 0  # query tokens times the key tokens they look at


@dataclass(frozen=True)
class Sizes:
    """Widths of an attention module: its queries, keys and values, all heads together, its output."""

    inputs: int
    keys: int
    values: int
    width: int
    heads: int
    outputs: int
    bias: bool


def counted_whole(module: nn.Module) -> bool:
    """Whether Torch-Pruning has a formula for this attention module, or for what it was before."""
    if isinstance(module, nn.MultiheadAttention):
        return isinstance(module, SlimMultiheadAttention) or type(module) in MODULES_MAPPING
    return type(module) in MODULES_MAPPING and hasattr(module, "qkv") and hasattr(module, "proj")


def sizes_of(module: Any) -> Sizes:
    if not isinstance(module, nn.MultiheadAttention):
        weights, bias, proj = [module.qkv.weight] * 3, module.qkv.bias, module.proj
    elif module.in_proj_weight is not None:
        weights, bias, proj = [module.in_proj_weight] * 3, module.in_proj_bias, module.out_proj
    else:  # keys or values of another width (kdim, vdim)
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
        bias, proj = module.in_proj_bias, module.out_proj
    outputs, width = proj.weight.shape
    inputs, keys, values = (weight.shape[1] for weight in weights)
    return Sizes(inputs, keys, values, width, module.num_heads, outputs, bias is not None)


def products(module: nn.Module, tokens: Tokens) -> float:
    """Of all heads: scaling, similarities, softmax, and the weighted values."""
    sizes = sizes_of(module)
    size = sizes.width // sizes.heads
    return float(sizes.heads * (tokens.queries * size + tokens.pairs * (2 * size + 1)))


def macs(module: nn.Module, tokens: Tokens) -> float:
    """Everything the module does for these tokens."""
    sizes = sizes_of(module)
    read = tokens.queries * (sizes.inputs + sizes.bias)
    read += tokens.keys * (sizes.keys + sizes.values + 2 * sizes.bias)
    written = tokens.queries * sizes.outputs * (sizes.width + 1)
    return read * sizes.width + products(module, tokens) + written


@contextlib.contextmanager
def watched(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tokens]]:
    """Tokens that these attention modules of the model are called with in here, by name."""
    seen = {name: Tokens() for name in modules}

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Inputs, kwargs: dict[str, Any]) -> None:
            with layer_named(model, name):
                _add(seen[name], module, by_position(module, args, kwargs))

        return look

    handles = [
        m.register_forward_pre_hook(watch(name), with_kwargs=True) for name, m in modules.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _add(tokens: Tokens, module: Any, inputs: Inputs) -> None:
    query = inputs[0]
    key = inputs[1] if isinstance(module, nn.MultiheadAttention) else query
    dim = 1 if getattr(module, "batch_first", True) else 0
    queries = query.numel() // query.shape[-1]
    tokens.queries += queries
    tokens.keys += key.numel() // key.shape[-1]
    tokens.pairs += queries * (key.shape[dim] if key.dim() == 3 else key.shape[0])
