"""Stacked passes through ``torch.compile``: traced and compiled once per group and shape."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from singe.data import Batch
from singe.errors import SingeError, first_line
from singe.folding import fold_variants
from singe.memory import is_out_of_memory
from singe.network import Network
from singe.tf32 import full_float32

Stacked = Callable[..., Any]  # (batch, gates, probes, overrides) -> (outputs, inputs)

# A trace loses what a model does outside of its tensors: gradients it switches off, numbers it reads on
# the host. So a compiled pass is set against the plain one before it is believed, on two batches.
CHECKED_USES = 2
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-2}  # relative L2; ReLUs flip at their kinks
TOLERANCE_BELOW = 1e-1  # for bf16 and fp16
MAX_SHAPES = 8  # of one pass; where every batch has another shape, compiling never ends
PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class NotTheSame(Exception):
    """A compiled pass gives other outputs or gradients than the plain one."""


@dataclass
class CompiledPass:
    """A stacked pass as a compiled function of tensors.

    Attributes:
        function: gives the tensors of the result.
        used: positions of the tensors, among all that go in, that it takes.
        leaves: of the result, with None where a tensor of ``function`` belongs.
        spec: how they fit together.
        uses: how often it was set against the plain pass.
    """

    function: Callable[..., Any]
    used: list[int]
    leaves: list[Any]
    spec: TreeSpec
    uses: int = 0

    def __call__(self, tensors: list[Tensor]) -> Any:
        found = iter(self.function(*[tensors[i] for i in self.used]))
        leaves = [next(found) if leaf is None else leaf for leaf in self.leaves]
        return tree_unflatten(leaves, self.spec)


class PassCompiler:
    """Runs stacked passes compiled; what cannot be compiled runs as it is, with a warning.

    Everything that differs between passes is an argument of what is traced: gates, probes, overrides,
    the batch, and the remembered prefix.

    Args:
        network: what ``stacked`` runs.
        stacked: runs one pass, ``(batch, gates, probes, overrides) -> (outputs, inputs)``.
        with_prefix: hand the remembered prefix on. Without, it is computed again: where hardly
            anything lies before the gates, one graph serves batches with and without a record.
    """

    def __init__(self, network: Network, stacked: Stacked, with_prefix: bool = True) -> None:
        self.network = network
        self.stacked = stacked
        self.with_prefix = with_prefix
        self._passes: dict[Any, CompiledPass | None] = {}
        self._shapes: Counter[tuple[str, ...]] = Counter()  # by the sites that a pass opens

    @property
    def compiled(self) -> int:
        """How many passes run compiled."""
        return sum(one is not None for one in self._passes.values())

    @property
    def refused(self) -> int:
        """How many run plainly all the same."""
        return len(self._passes) - self.compiled

    def __call__(
        self,
        batch: Batch,
        gates: Mapping[str, Tensor],
        probes: Mapping[str, list[Tensor]],
        overrides: Mapping[str, Tensor],
    ) -> Any:
        """As ``stacked``."""
        cached = self.network.cache.outputs if self.with_prefix else {}
        calls, remembered = tuple(cached), list(cached.values())
        varying = dict(gates), dict(probes), dict(overrides), remembered, batch.args, batch.kwargs
        leaves, spec = tree_flatten(varying)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        described = tuple(map(_described, leaves))
        signature = (str(spec), calls, described, self.network.channels_last)
        known = self._passes.get(signature)
        if known is not None and known.uses >= CHECKED_USES:
            return known(tensors)
        if signature in self._passes and known is None:
            return self.stacked(batch, gates, probes, overrides)
        # Convolutions that round to TF32 in other ways look like another function. Of products Dynamo takes
        # note: with another precision it would compile anew, and that is what ran unchecked afterwards.
        with full_float32(products=False):
            plain = self.stacked(batch, gates, probes, overrides)
            try:
                if known is None:
                    self._require_compilable(gates, overrides, leaves)
                    known = self._compiled(batch, calls, leaves, spec)
                _require_same(known(tensors), plain, tensors)
                known.uses += 1
                self._passes[signature] = known
            except Exception as error:  # whatever a tracer or a compiler raises
                if isinstance(error, SingeError) or is_out_of_memory(error):
                    raise
                self._passes[signature] = None
                warnings.warn(
                    "a pass runs uncompiled: torch.compile cannot handle it "
                    f"({type(error).__name__}: {first_line(error)})",
                    stacklevel=2,
                )
        return plain

    def _require_compilable(
        self, gates: Mapping[str, Tensor], overrides: Mapping[str, Tensor], leaves: Iterable[Any]
    ) -> None:
        strange = [leaf for leaf in leaves if not isinstance(leaf, (Tensor, *PLAIN))]
        if strange:
            raise TypeError(f"the batch holds a {type(strange[0]).__name__}")
        sites = (*sorted(gates), *sorted(overrides))
        self._shapes[sites] += 1
        if self._shapes[sites] > MAX_SHAPES:
            raise RuntimeError(f"it came in more than {MAX_SHAPES} shapes; use batches of one size")

    def _compiled(
        self, batch: Batch, calls: tuple[Any, ...], leaves: list[Any], spec: TreeSpec
    ) -> CompiledPass:
        of_result: list[tuple[list[Any], TreeSpec]] = []

        def run(*tensors: Tensor) -> list[Tensor]:
            given = iter(tensors)
            values = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            gates, probes, overrides, remembered, args, kwargs = tree_unflatten(values, spec)
            with self.network.cache.replacing(dict(zip(calls, remembered, strict=True))):
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
        return type(leaf), leaf if isinstance(leaf, PLAIN) else None
    return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.requires_grad


def _require_same(compiled: Any, plain: Any, tensors: list[Tensor]) -> None:
    """Raise unless both results, and their gradients, agree; the graph of ``plain`` is kept."""
    leaves = [t for t in tensors if t.requires_grad]
    found = [*_floating(compiled), *_gradients(compiled, leaves, keep=False)]
    wanted = [*_floating(plain), *_gradients(plain, leaves, keep=True)]
    dtypes = {t.dtype for t in (*found, *wanted)}
    tolerance = max((TOLERANCE.get(dtype, TOLERANCE_BELOW) for dtype in dtypes), default=0.0)
    for left, right in zip(found, wanted, strict=True):
        off = float((left.detach().double() - right.detach().double()).norm())
        if not off <= tolerance * float(right.detach().double().norm()):
            raise NotTheSame("its outputs or gradients are not those of the plain pass")


def _floating(result: Any) -> list[Tensor]:
    return [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]


def _gradients(result: Any, leaves: list[Tensor], keep: bool) -> list[Tensor]:
    """Of a fixed mixture of the outputs' entries, with respect to ``leaves``."""
    outputs = [t for t in _floating(result[0]) if t.requires_grad]
    if not outputs or not leaves:
        return []
    mixtures = [
        torch.linspace(-1, 1, t.numel(), dtype=t.dtype, device=t.device).view(t.shape)
        for t in outputs
    ]
    found = torch.autograd.grad(
        outputs, leaves, mixtures, retain_graph=keep, allow_unused=True, materialize_grads=True
    )
    return list(found)
