"""How attention modules keep their heads: where q, k, v and the output projection are, and what counts heads.

A description says nothing about a model's weights; :mod:`singe.heads` reads them. Known are common
ways of writing attention, told by the names of their layers; :func:`register_attention` teaches others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from singe.errors import OptionError

Slim = type[nn.Module]


@dataclass(frozen=True)
class Attention:
    """One way of writing attention; the arguments of :func:`register_attention`."""

    proj: str
    qkv: str | None = None
    query: str | None = None
    key: str | None = None
    value: str | None = None
    heads: str | None = None
    head_size: str | None = None
    sizes: tuple[str, ...] = ()
    per_head: Mapping[str, int] = field(default_factory=dict)
    slim: Slim | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """q, k and v, or the one layer that is all of them."""
        return tuple(name for name in (self.qkv, self.query, self.key, self.value) if name)


REGISTRY: dict[type[nn.Module], Attention] = {}

# Attributes that are numbers of heads, or of channels of all heads together. Those a module has are
# kept up to date; a module that reads another one fails its check and is left out.
COUNTS = (
    "num_heads",
    "num_attention_heads",
    "n_heads",
    "num_kv_heads",
    "num_key_value_heads",
    "all_head_size",
    "attn_dim",
    "split_size",
    "inner_dim",
    "cpb_mlp.2.out_features",  # Swin v2: a small network gives one bias per head
)
TABLES = {
    "relative_position_bias_table": 1,
    "relative_position_bias.relative_position_bias_table": 1,
    "logit_scale": 0,
    "temperature": 0,
    "cpb_mlp.2.weight": 0,
}


def _inside(prefix: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" for name in names)


KNOWN = (
    # timm, and the many that write attention as it does
    Attention("proj", qkv="qkv", heads="num_heads", sizes=COUNTS, per_head=TABLES),
    # transformers: Llama and its kin, OPT, CLIP, ViT
    *(
        Attention(
            out, None, "q_proj", "k_proj", "v_proj", heads, size, sizes=COUNTS, per_head=TABLES
        )
        for out in ("o_proj", "out_proj")
        for heads, size in ((None, "head_dim"), ("num_heads", None))
    ),
    # BERT and its kin
    *(
        Attention(
            "output.dense",
            None,
            f"{inner}.query",
            f"{inner}.key",
            f"{inner}.value",
            heads=f"{inner}.num_attention_heads",
            sizes=_inside(inner, COUNTS),
        )
        for inner in ("self", "attention")
    ),
    # DistilBERT
    Attention("out_lin", None, "q_lin", "k_lin", "v_lin", heads="n_heads", sizes=(*COUNTS, "dim")),
    # GPT-2
    Attention("c_proj", qkv="c_attn", heads="num_heads", sizes=COUNTS),
)


def attribute(module: Any, name: str) -> Any:
    """A dotted attribute of a module, or None."""
    for part in name.split("."):
        module = getattr(module, part, None)
    return module


def attention_of(module: nn.Module) -> Attention | None:
    """The description of a module, if it is an attention that can be described."""
    if type(module) in REGISTRY:
        return REGISTRY[type(module)]
    for known in KNOWN:
        needed = (*known.layers, known.proj)
        count = attribute(module, known.heads or known.head_size or "")
        if isinstance(count, int) and all(
            isinstance(attribute(module, name), nn.Module) for name in needed
        ):
            return known
    return None


def register_attention(
    attention_type: type[nn.Module],
    *,
    proj: str,
    qkv: str | None = None,
    query: str | None = None,
    key: str | None = None,
    value: str | None = None,
    heads: str | None = None,
    head_size: str | None = None,
    sizes: tuple[str, ...] = (),
    per_head: Mapping[str, int] | None = None,
    slim: Slim | None = None,
) -> None:
    """Teach ``singe`` an attention module, so that its heads are units.

    Names are attributes of the module, dotted where they lie deeper. Every head is checked on the
    model before it is offered: a wrong description ends up in ``scores.meta["rejected"]``.

    Args:
        attention_type: the class; subclasses need an entry of their own.
        proj: the layer that reads the heads' outputs, head after head.
        qkv: one layer whose output channels are [q | k | v], each head after head; or
        query, key, value: three layers. With fewer heads in key and value (grouped queries) neighbouring
            query heads share one, and the unit is a key/value head with all its query heads.
        heads: the attribute with the number of query heads; or
        head_size: the attribute with the number of channels of a head.
        sizes: attributes in proportion to the number of heads (it, their channels taken together);
            kept up to date.
        per_head: parameters and buffers with one entry per head -> the dimension of the heads.
        slim: a subclass that computes the same for any number of heads and calls its layers as modules;
            a module takes this class when heads are removed. Needed where the forward pass takes the
            width of the input for that of all heads, or reads weights without calling their layers.

    Raises:
        OptionError: no module class, both or none of two alternatives, a ``slim`` that is no subclass.
    """
    name = getattr(attention_type, "__name__", attention_type)
    if not (isinstance(attention_type, type) and issubclass(attention_type, nn.Module)):
        raise OptionError(f"register_attention takes a subclass of nn.Module, got {name!r}")
    separate = [layer for layer in (query, key, value) if layer]
    if bool(qkv) == bool(separate) or len(separate) not in (0, 3):
        raise OptionError(f"register_attention({name}) takes either qkv=, or query=, key=, value=")
    if bool(heads) == bool(head_size):
        raise OptionError(f"register_attention({name}) takes either heads= or head_size=")
    if slim is not None and not (isinstance(slim, type) and issubclass(slim, attention_type)):
        raise OptionError(f"slim= must be a subclass of {name}, got {slim!r}")
    tables = dict(per_head or {})
    REGISTRY[attention_type] = Attention(
        proj, qkv, query, key, value, heads, head_size, tuple(sizes), tables, slim
    )
    if slim is not None:  # pruned once, it can be pruned again
        REGISTRY[slim] = REGISTRY[attention_type]


def unregister_attention(attention_type: type[nn.Module]) -> None:
    """Forget an attention module; nothing happens if it is not known."""
    entry = REGISTRY.pop(attention_type, None)
    if entry is not None and entry.slim is not None:
        REGISTRY.pop(entry.slim, None)
