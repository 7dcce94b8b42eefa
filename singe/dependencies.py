"""Torch-Pruning's dependency graph of a model, and which layers it couples."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch_pruning.dependency.shape_infer import (
    infer_in_channels_recursively,
    infer_out_channels_recursively,
)

from singe.data import Batch
from singe.errors import ModelError, SingeError
from singe.gates import pruners
from singe.memory import is_out_of_memory
from singe.modes import eager

ROOTS = (nn.modules.conv._ConvNd, nn.Linear)


class _DependencyGraph(tp.DependencyGraph):
    """Torch-Pruning's graph, whose views and slices move channels only where they do.

    With current torch it takes every view whose neighbours have different widths for a flattening of
    channels, and every slice of the second dimension for one of channels: window partitions, channel
    shuffles and the patch merging of a Swin transformer too. Their indices then multiply from block to
    block until memory ends.

    Args:
        shapes: of what the operations gave, by their node of the autograd graph, as far as they are known.
    """

    def __init__(self, shapes: Mapping[Any, torch.Size]) -> None:
        super().__init__()
        self._shapes = shapes
        self._looks = 0  # at the neighbours of a layer, in one walk

    def get_pruning_group(self, *args: Any, **kwargs: Any) -> Any:
        """As Torch-Pruning's, but a walk that comes back to the same layers without end is given up."""
        self._looks = 0
        return super().get_pruning_group(*args, **kwargs)

    def _look(self) -> None:
        self._looks += 1
        # The most that was seen to end is 3 per layer, of DenseNet-121.
        if self._looks > 12 * len(self.module2node) + 2000:
            raise RecursionError("it comes back to the same layers without end")

    def _build_dependency(self, module2node: dict[Any, Any]) -> None:
        kinds = tp.ops.OPTYPE
        moves = {
            kinds.CONCAT: self._joins_channels,  # looks at the slices before it
            kinds.RESHAPE: self._flattens,
            kinds.SLICE: self._cuts_channels,
        }
        for kind, moves_channels in moves.items():
            for node in module2node.values():
                if node.type == kind and not moves_channels(node):
                    node.type = kinds.ELEMENTWISE
        super()._build_dependency(module2node)
        for node in module2node.values():
            node.dependencies = _Neighbours(node.dependencies, self._look)
            if node.type == kinds.SPLIT:
                node.grad_fn = _with_sizes(node.grad_fn)

    def _joins_channels(self, node: Any) -> bool:
        """Not with constants alone (an empty cache), nor what was cut along another dimension."""
        if len(node.inputs) < 2:
            return False
        dim = _signed(getattr(node.grad_fn, "_saved_dim", 1))
        for before in node.inputs:
            while before.type == tp.ops.OPTYPE.ELEMENTWISE and len(before.inputs) == 1:
                before = before.inputs[0]  # a rotary embedding negates one half
            sizes = getattr(before.grad_fn, "_saved_self_sym_sizes", None)
            if before.type != tp.ops.OPTYPE.SLICE or sizes is None or self._cuts_channels(before):
                continue
            if (_signed(before.grad_fn._saved_dim) - dim) % len(sizes) == 0:
                return False
        return True

    def _flattens(self, node: Any) -> bool:
        """[B, C, *X] -> [B, C X], or back."""
        sizes = getattr(node.grad_fn, "_saved_self_sym_sizes", None)
        if sizes is None:
            return True
        if not _are_rows(sizes) and not _are_rows(self._shapes.get(node.grad_fn, sizes[:2])):
            return False
        features = math.prod(int(size) for size in sizes[1:])
        if len(sizes) == 2:
            neighbours, infer = node.inputs, infer_out_channels_recursively
        else:
            neighbours, infer = node.outputs, infer_in_channels_recursively
        return any(infer(self, other, [0]) == features for other in neighbours)

    def _cuts_channels(self, node: Any) -> bool:
        sizes = getattr(node.grad_fn, "_saved_self_sym_sizes", None)
        dim = getattr(node.grad_fn, "_saved_dim", None)
        if sizes is None or dim is None:
            return True
        width = int(sizes[_signed(dim)])
        return any(infer_out_channels_recursively(self, n, [0]) == width for n in node.inputs)


def _are_rows(sizes: Sequence[int]) -> bool:
    """[B, F], or what a 1 x 1 convolution reads in its place, [B, F, 1, 1]."""
    return len(sizes) >= 2 and math.prod(int(size) for size in sizes[2:]) == 1


class _Neighbours(list[Any]):
    """What depends on a layer; ``look`` is called before every walk over it."""

    def __init__(self, dependencies: Iterable[Any], look: Callable[[], None]) -> None:
        super().__init__(dependencies)
        self._look = look

    def __iter__(self) -> Iterator[Any]:
        self._look()
        return super().__iter__()


class _Shapes(TorchFunctionMode):
    """Notes what shape every operation gives; the autograd graph knows that of its inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[Any, torch.Size] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.grad_fn is not None:
            self.of[out.grad_fn] = out.shape
        return out


def _with_sizes(split: Any) -> Any:
    """What Torch-Pruning asks of a split of channels into equal parts: current torch saves one size.

    Not of [B, C] features: there a recurrent layer's gates, step after step, would have no end.
    """
    sizes, part = (getattr(split, f"_saved_{n}", None) for n in ("self_sym_sizes", "split_size"))
    if sizes is None or part is None or split._saved_dim != 1 or len(sizes) < 3:
        return split
    width, part = int(sizes[1]), int(part)
    parts = [min(part, width - start) for start in range(0, width, part)]
    return SimpleNamespace(_saved_dim=1, _saved_split_sizes=parts)


def _signed(dim: int) -> int:
    """torch hands negative dimensions out as unsigned numbers."""
    return dim - 2**64 if dim >= 2**63 else dim


def build_dependency_graph(
    model: nn.Module, batch: Batch, training: bool = False
) -> tp.DependencyGraph:
    """Torch-Pruning's graph of ``model``, traced with one small batch, in training mode if asked.

    Raises:
        ModelError: the forward pass or the trace failed.
    """
    noted = _Shapes()
    graph = _DependencyGraph(noted.of)

    def forward(traced: nn.Module, _: Any) -> Any:
        with noted:
            return batch.call(traced.train(training))

    try:
        with warnings.catch_warnings(), torch.enable_grad(), eager():
            warnings.simplefilter("ignore")
            graph.build_dependency(
                model,
                batch.args,
                forward_fn=forward,
                output_transform=_traced,
                customized_pruners=pruners(),
                verbose=False,
            )
    except Exception as error:
        if isinstance(error, SingeError) or is_out_of_memory(error):
            raise
        inputs = tree_leaves((batch.args, batch.kwargs))
        shapes = ", ".join(str(list(t.shape)) for t in inputs if isinstance(t, Tensor))
        raise ModelError(
            f"tracing {type(model).__name__} with the first batch failed: {error}; check that "
            "model(inputs) runs in evaluation mode and returns tensors. It was given the first samples, cut "
            f"along the first dimension, shapes {shapes}"
        ) from error
    return graph


def _traced(outputs: Any) -> list[Tensor]:
    tensors = [t for t in tree_leaves(outputs) if isinstance(t, Tensor)]
    if not tensors:
        raise ModelError(
            f"its output is a {type(outputs).__name__}, in which torch finds no tensor: return a tensor, a "
            "tuple or a dict, or make it known by torch.utils._pytree.register_dataclass"
        )
    return [t for t in tensors if t.grad_fn is not None]


def coupled(dg: tp.DependencyGraph) -> Iterator[tuple[nn.Module, Any]]:
    """(root layer, its Torch-Pruning group) for every set of coupled layers, each layer once.

    Where Torch-Pruning cannot follow the channels, the reason takes the place of the group.
    """
    seen: set[nn.Module] = set()
    for module in list(dg.module2node):
        if not isinstance(module, ROOTS) or module in seen:
            continue
        pruner = dg.get_pruner_of_module(module)
        try:
            width = pruner.get_out_channels(module)
            group = dg.get_pruning_group(module, pruner.prune_out_channels, list(range(width)))
        except Exception as error:
            seen.add(module)
            yield module, f"Torch-Pruning cannot follow its channels ({error})"
            continue
        seen.update(
            item.dep.target.module
            for item in group
            if dg.is_out_channel_pruning_fn(item.dep.handler)
            and isinstance(item.dep.target.module, nn.Module)
        )
        yield module, group
