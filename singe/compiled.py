"""Stacked passes through ``torch.compile``: traced and compiled once per group and shape."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from singe.data import Batch
from singe.errors import SingeError
from singe.folding import fold_variants
from singe.memory import is_out_of_memory
from singe.network import Network

Stacked = Callable[..., Any]  # (batch, gates, probes, overrides) -> (outputs, inputs)


@dataclass(frozen=True)
class CompiledPass:
    """A stacked pass as a compiled function of tensors.

    Attributes:
        function: gives the tensors of the result.
        used: positions of the tensors, among all that go in, that it takes.
        leaves: of the result, with None where a tensor of ``function`` belongs.
        spec: how they fit together.
    """

    function: Callable[..., Any]
    used: list[int]
    leaves: list[Any]
    spec: TreeSpec

    def __call__(self, tensors: list[Tensor]) -> Any:
        found = iter(self.function(*[tensors[i] for i in self.used]))
        return tree_unflatten(
            [next(found) if leaf is None else leaf for leaf in self.leaves], self.spec
        )


class PassCompiler:
    """Runs stacked passes compiled; what cannot be compiled runs as it is, with a warning.

    Everything that differs between passes is an argument of what is traced: gates, probes, overrides,
    the batch, and the remembered prefix.

    Args:
        network: what ``stacked`` runs.
        stacked: runs one pass, ``(batch, gates, probes, overrides) -> (outputs, inputs)``.
    """

    def __init__(self, network: Network, stacked: Stacked) -> None:
        self.network = network
        self.stacked = stacked
        self._passes: dict[Any, CompiledPass | None] = {}

    def __call__(
        self,
        batch: Batch,
        gates: Mapping[str, Tensor],
        probes: Mapping[str, list[Tensor]],
        overrides: Mapping[str, Tensor],
    ) -> Any:
        """As ``stacked``."""
        varying = (
            dict(gates),
            dict(probes),
            dict(overrides),
            dict(self.network.cache.outputs),
            batch.args,
            batch.kwargs,
        )
        leaves, spec = tree_flatten(varying)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        signature = (str(spec), tuple(map(_described, leaves)), self.network.channels_last)
        if signature in self._passes:
            known = self._passes[signature]
            return known(tensors) if known else self.stacked(batch, gates, probes, overrides)
        try:
            compiled = self._compiled(batch, leaves, spec)
            result = compiled(tensors)
        except Exception as error:  # whatever a tracer or a compiler raises
            if isinstance(error, SingeError) or is_out_of_memory(error):
                raise
            result = self.stacked(batch, gates, probes, overrides)
            self._passes[signature] = None
            warnings.warn(
                "a pass runs uncompiled: torch.compile cannot handle it "
                f"({type(error).__name__}: {str(error).strip().splitlines()[0]})",
                stacklevel=2,
            )
            return result
        self._passes[signature] = compiled
        return result

    def _compiled(self, batch: Batch, leaves: list[Any], spec: TreeSpec) -> CompiledPass:
        of_result: list[tuple[list[Any], TreeSpec]] = []

        def run(*tensors: Tensor) -> list[Tensor]:
            given = iter(tensors)
            values = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            gates, probes, overrides, remembered, args, kwargs = tree_unflatten(values, spec)
            with self.network.cache.replacing(remembered):
                result = self.stacked(
                    replace(batch, args=args, kwargs=kwargs), gates, probes, overrides
                )
            found, result_spec = tree_flatten(result)
            of_result.append(([None if isinstance(t, Tensor) else t for t in found], result_spec))
            return [t for t in found if isinstance(t, Tensor)]

        tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        # The fast path of attention has no derivative; nothing here requires one while it is traced.
        fast_attention = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        self.network.is_traced = True
        try:
            with torch.no_grad():
                traced = make_fx(run)(*tensors)
        finally:
            self.network.is_traced = False
            torch.backends.mha.set_fastpath_enabled(fast_attention)
        fold_variants(traced)
        inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
        used = [position for position, node in enumerate(inputs) if node.users]
        for node in inputs:
            if not node.users:
                traced.graph.erase_node(node)
        traced.recompile()
        return CompiledPass(torch.compile(traced, dynamic=False), used, *of_result[0])


def _described(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.requires_grad
