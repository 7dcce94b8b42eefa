"""Folds the variants of a traced pass into its batch: [V, B, C, H, W] is computed as [V * B, C, H, W].

``torch.vmap`` runs convolutions on the folded shape and everything else on the unfolded one, views in
between. To a compiler that is a network in five dimensions: Inductor lays those out contiguously, the
convolutions channels-last, and every element-wise kernel transposes.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

_aten = torch.ops.aten
_IMAGES = 5  # [V, B, C, H, W]


def fold_variants(traced: GraphModule) -> None:
    """Rewrite the element-wise operations on five dimensions of a graph of aten operations, in place."""
    graph = traced.graph
    folded: dict[Node, Node] = {}
    for node in list(graph.nodes):
        if not _is_elementwise(node) or len(_shape(node) or ()) != _IMAGES:
            continue
        shape = _shape(node)
        assert shape is not None
        with graph.inserting_before(node):
            arguments = [_fold(a, shape, folded) if isinstance(a, Node) else a for a in node.args]
            flat = graph.call_function(node.target, tuple(arguments), dict(node.kwargs))
            unfolded = graph.call_function(_aten.view.default, (flat, list(shape)))
        unfolded.meta = dict(node.meta)
        folded[unfolded] = flat
        node.replace_all_uses_with(unfolded)
        graph.erase_node(node)
    for node in list(graph.nodes):
        if node.target is _aten.view.default:
            source = _through_identities(node.args[0])
            if source in folded and tuple(node.args[1]) == _merged(_shape(source)):
                node.replace_all_uses_with(folded[source])
    graph.eliminate_dead_code()
    graph.lint()
    traced.recompile()


def _is_elementwise(node: Node) -> bool:
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.pointwise in node.target.tags
        and not node.target._schema.is_mutable
        and not any(isinstance(value, Node) for value in node.kwargs.values())
    )


def _shape(node: Node) -> tuple[int, ...] | None:
    if node.op == "get_attr":  # a parameter
        return tuple(operator.attrgetter(str(node.target))(node.graph.owning_module).shape)
    shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    return None if shape is None else tuple(shape)


def _merged(shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return None if shape is None else (shape[0] * shape[1], *shape[2:])


def _fold(operand: Node, shape: tuple[int, ...], folded: dict[Node, Node]) -> Any:
    """An operand that broadcasts to ``shape``, with the first two dimensions made one."""
    if operand in folded and _shape(operand) == shape:
        return folded[operand]
    own = _shape(operand)
    assert own is not None, f"no shape is known of {operand}"
    if own == ():
        return operand
    graph = operand.graph
    full = (1,) * (len(shape) - len(own)) + own
    if operand.target is _aten.view.default and full[:2] == shape[:2]:
        source = operand.args[0]
        if isinstance(source, Node) and _shape(source) == _merged(full):
            return source
    if full != own:
        operand = graph.call_function(_aten.view.default, (operand, list(full)))
    if full[:2] != shape[:2]:
        full = (*shape[:2], *full[2:])
        operand = graph.call_function(_aten.expand.default, (operand, list(full)))
    merged = _merged(full)
    assert merged is not None
    return graph.call_function(_aten.reshape.default, (operand, list(merged)))


def _through_identities(node: Any) -> Any:
    while node.target is _aten.permute.default and node.args[1] == list(range(len(node.args[1]))):
        node = node.args[0]
    return node
