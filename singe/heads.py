"""The heads of a model's attention modules: what each takes with it when it is removed.

A head is gated at its value rows: attention weights do not depend on v, so this multiplies the head's
output, which is what the output projection reads. Its group is named after the layer that holds
these rows (``blocks.0.attn.qkv``, ``layers.0.self_attn.v_proj``, or the ``nn.MultiheadAttention`` itself).
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from singe.attention import TABLES, Attention, attention_of, attribute
from singe.errors import ModelError
from singe.slim import SlimMultiheadAttention, slim_of, take_slim

PACKED = Attention(  # nn.MultiheadAttention; in_proj is a layer in private copies only
    "out_proj", qkv="in_proj", heads="num_heads", sizes=("num_heads",)
)
LAYERS = (nn.Linear, nn.Conv2d)  # what can hold q, k and v: a convolution is one by one


@dataclass(frozen=True)
class Heads:
    """The heads of one attention module.

    Attributes:
        module: its name in the model.
        value: the layer that holds the value rows; of ``nn.MultiheadAttention``: the module itself.
        value_rows: int64 [U, d], these rows of each head.
        rows: layer -> int64 [U, m]: all output channels that leave with a head, its q, k and v.
        proj: the layer that reads the heads.
        columns: int64 [U, m]: its input channels of each head.
        attention: how the module is written.
    """

    module: str
    value: str
    value_rows: Tensor
    rows: dict[str, Tensor]
    proj: str
    columns: Tensor
    attention: Attention

    @property
    def n_units(self) -> int:
        return len(self.value_rows)

    @property
    def queries(self) -> int:
        """Query heads of each unit: 1, or more where they share keys and values."""
        return self.columns.shape[1] // self.value_rows.shape[1]

    def entries(self, layers: Container[str]) -> dict[str, int]:
        """Layer -> output channels of each unit, for those of ``layers`` that give an entry per head."""
        owners = (name.removesuffix(".weight") for name in self.attention.per_head)
        named = (f"{self.module}.{owner}" if self.module else owner for owner in owners)
        return {layer: self.queries for layer in named if layer in layers}


def find_heads(model: nn.Module) -> Iterator[tuple[str, Heads | str]]:
    """(attention module, its heads or why they cannot be offered) for every attention module.

    A single head is there too, so that nobody takes its channels for units: a group has the same units,
    and the same meaning, however many heads have gone.
    """
    for name, module in model.named_modules():
        packed = type(module) in (nn.MultiheadAttention, SlimMultiheadAttention)
        attention = PACKED if packed else attention_of(module)
        if attention is not None:
            yield name, _read(name, module, attention)


def _read(name: str, module: Any, attention: Attention) -> Heads | str:
    if slim_of(module) is not None and not _runs_its_class(module):
        return "its forward was replaced"
    packed = isinstance(module, nn.MultiheadAttention)
    if packed:
        plain = module._qkv_same_embed_dim or isinstance(module, SlimMultiheadAttention)
        if not plain or module.bias_k is not None or module.add_zero_attn:
            return "its keys and values have sizes or entries of their own"
        if "in_proj_weight" not in module._parameters:
            return "it computes its weight; remove its parametrization first"
    proj = attribute(module, attention.proj)
    widths = [len(module.in_proj_weight)] if packed else []
    for layer in () if packed else attention.layers:
        found = attribute(module, layer)
        if not isinstance(found, LAYERS) or getattr(found, "groups", 1) != 1:
            return f"{layer} is a {type(found).__name__}"
        widths.append(len(found.weight))
    if not isinstance(proj, LAYERS) or getattr(proj, "groups", 1) != 1:
        return f"{attention.proj} is a {type(proj).__name__}"
    width = proj.weight.shape[1]  # all heads' outputs
    if attention.head_size:
        heads = width // attribute(module, attention.head_size)
    else:
        heads = attribute(module, attention.heads or "")
    if heads < 1 or width % heads:
        return f"{width} channels cannot be shared out over {heads} heads"
    size = width // heads
    if len(widths) == 1:  # [q | k | v]
        key_width = (widths[0] - width) // 2
        parts = [width, key_width, key_width]
        layers = [attention.layers[0]] * 3
        starts = [0, width, width + key_width]
    else:
        parts, layers, starts = widths, list(attention.layers), [0, 0, 0]
    units = parts[2] // size
    if units < 1 or parts[2] % size or heads % units or any(part % units for part in parts):
        return f"{parts[2]} value channels cannot be shared out over heads of {size}"
    prefix = f"{name}." if name else ""
    named = [name if packed else prefix + layer for layer in layers]
    rows: dict[str, Tensor] = {}
    for layer, part, start in zip(named, parts, starts, strict=True):
        own = start + torch.arange(part, device="cpu").view(units, -1)
        rows[layer] = torch.cat([rows[layer], own], 1) if layer in rows else own
    value_rows = starts[2] + torch.arange(parts[2], device="cpu").view(units, -1)
    columns = torch.arange(width, device="cpu").view(units, -1)
    return Heads(name, named[2], value_rows, rows, prefix + attention.proj, columns, attention)


def _runs_its_class(module: nn.Module) -> bool:
    """Not where somebody patched the object. A private copy's guard wraps what the class has."""
    forward = module.__dict__.get("forward")
    if isinstance(forward, partial) and forward.args:
        forward = getattr(forward.args[0], "__func__", None)
        return forward is type(module).forward
    return forward is None


def remove_heads(model: nn.Module, heads: Heads, units: Sequence[int]) -> None:
    """Remove heads from ``model`` in place: rows, columns, entries per head, and what counts them."""
    module: Any = model.get_submodule(heads.module)
    gone = list(units)
    kept = sorted(set(range(heads.n_units)) - set(gone))
    for name, rows in heads.rows.items():
        _cut(model.get_submodule(name), rows[gone].flatten().tolist(), out=True)
    _cut(model.get_submodule(heads.proj), heads.columns[gone].flatten().tolist(), out=False)
    for name in tables_of(module, heads.attention):
        dim = heads.attention.per_head[name]
        _keep_entries(module, name, dim, kept, heads.n_units)
    for name in heads.attention.sizes:
        count = attribute(module, name)
        if isinstance(count, int):
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, count * len(kept) // heads.n_units)
    take_slim(module)
    if isinstance(module, SlimMultiheadAttention):
        for outer in model.modules():
            if isinstance(outer, nn.TransformerEncoder) and module in outer.modules():
                outer.use_nested_tensor = False  # only torch's own kernel reads these


def _cut(layer: Any, channels: list[int], out: bool) -> None:
    """Take output or input channels away, gradients included."""
    if isinstance(layer, nn.MultiheadAttention):  # output channels, of q, k and v
        kept = sorted(set(range(len(layer.in_proj_weight))) - set(channels))
        for name in ("in_proj_weight", "in_proj_bias"):
            if getattr(layer, name) is not None:
                setattr(layer, name, _narrowed(getattr(layer, name), 0, kept))
        return
    linear = isinstance(layer, nn.Linear)
    if out:
        prune = tp.prune_linear_out_channels if linear else tp.prune_conv_out_channels
    else:
        prune = tp.prune_linear_in_channels if linear else tp.prune_conv_in_channels
    prune(layer, channels)


def _keep_entries(module: Any, name: str, dim: int, kept: list[int], units: int) -> None:
    """Keep the entries of some units in a parameter or buffer with one entry per query head."""
    tensor = attribute(module, name)
    owner, _, leaf = name.rpartition(".")
    entries = torch.arange(tensor.shape[dim], device="cpu").view(units, -1)[kept].flatten().tolist()
    setattr(module.get_submodule(owner), leaf, _narrowed(tensor, dim, entries))


def tables_of(module: nn.Module, attention: Attention) -> dict[str, Tensor]:
    """Parameters and buffers with one entry per head; of the common names those that it uses.

    Raises:
        ModelError: it has none of a name that was registered.
    """
    found = {}
    for name in attention.per_head:
        tensor = attribute(module, name)
        if isinstance(tensor, Tensor):
            found[name] = tensor
        elif attention.per_head is not TABLES:
            raise ModelError(f"{type(module).__name__} has no {name!r} with an entry per head")
    return found


def _narrowed(tensor: Tensor, dim: int, kept: list[int]) -> Tensor:
    index = torch.tensor(kept, device=tensor.device)
    new = tensor.detach().index_select(dim, index)
    if not isinstance(tensor, nn.Parameter):
        return new
    parameter = nn.Parameter(new, requires_grad=tensor.requires_grad)
    if tensor.grad is not None:
        parameter.grad = tensor.grad.index_select(dim, index)
    return parameter
