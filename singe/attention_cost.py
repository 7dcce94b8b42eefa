"""MACs of attention modules that Torch-Pruning counts as a whole, heads removed or not.

Torch-Pruning has a formula for ``nn.MultiheadAttention`` and for timm's attention: projections and the
products of every head. It takes the width of the input for that of all heads, so that it sees nothing
of heads that are gone. Here the same formula has a width of its own for them; with all heads the two
are equal. Of other attention modules both count the linear layers only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch_pruning.utils.op_counter import MODULES_MAPPING

from singe.slim import SlimMultiheadAttention


@dataclass
class Tokens:
    """What one attention module was called with, summed over its calls and the batch."""

    queries: int = 0
    keys: int = 0
    pairs: int = 0  # query tokens times the key tokens they look at


@dataclass(frozen=True)
class Sizes:
    """Widths of an attention module: its input, all heads together, one head, its output."""

    inputs: int
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
    if isinstance(module, nn.MultiheadAttention):
        weight, bias, proj = module.in_proj_weight, module.in_proj_bias, module.out_proj
    else:
        weight, bias, proj = module.qkv.weight, module.qkv.bias, module.proj
    outputs, width = proj.weight.shape
    return Sizes(weight.shape[1], width, module.num_heads, outputs, bias is not None)


def products(module: nn.Module, tokens: Tokens) -> float:
    """Of all heads: scaling, similarities, softmax, and the weighted values."""
    sizes = sizes_of(module)
    size = sizes.width // sizes.heads
    return float(sizes.heads * (tokens.queries * size + tokens.pairs * (2 * size + 1)))


def macs(module: nn.Module, tokens: Tokens) -> float:
    """Everything the module does for these tokens."""
    sizes = sizes_of(module)
    read = tokens.queries + 2 * tokens.keys
    projections = read * (sizes.inputs + sizes.bias) * sizes.width
    return projections + products(module, tokens) + tokens.queries * sizes.outputs * (
        sizes.width + 1
    )  # fmt: skip


@contextlib.contextmanager
def watched(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tokens]]:
    """Tokens that the attention modules are called with in here, by name."""
    seen = {name: Tokens() for name in modules}
    handles = [m.register_forward_pre_hook(_watch(m, seen[name])) for name, m in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _watch(module: Any, tokens: Tokens) -> Callable[..., None]:
    def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        query = inputs[0]
        key = inputs[1] if isinstance(module, nn.MultiheadAttention) else query
        dim = 1 if getattr(module, "batch_first", True) else 0
        queries = query.numel() // query.shape[-1]
        tokens.queries += queries
        tokens.keys += key.numel() // key.shape[-1]
        tokens.pairs += queries * (key.shape[dim] if key.dim() == 3 else key.shape[0])

    return look
