"""All variants of a batch in one pass: every setting of the gates is one slice of a stacked run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from singe.compiled import PassCompiler
from singe.data import Batch
from singe.errors import ModelError, SingeError, first_line
from singe.memory import is_out_of_memory
from singe.network import Network

Inputs = dict[str, list[Tensor]]
Structure = tuple[list[Any], TreeSpec]

# It would run a part of the model again in the backward pass, when its gates are open.
CHECKPOINTING = (
    "this model checkpoints its activations (torch.utils.checkpoint); switch that off for scoring, or use "
    'engine="naive"'
)


def zero_probes(outputs: Sequence[Tensor], variants: int) -> list[Tensor]:
    """Zeros [V, *shape of output] without memory of their own; their gradients are the adjoints."""
    return [y.new_zeros(()).expand(variants, *y.shape).requires_grad_() for y in outputs]


# Inside torch.vmap nothing seems to require a gradient, so on a GPU the other kernels of attention leave out
# what their backward passes read (the log-sum-exp).
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


class VariantRunner:
    """Runs a network for V settings of its gates at once, its ungated prefix once per batch.

    ``torch.vmap`` carries the variants: what does not depend on a gate stays unstacked. A model that
    vmap cannot run (data-dependent control flow, an operation without a batching rule) is run once
    per variant instead; the result is the same, and a warning says so. Where vmap runs a model in the
    contiguous layout only, the network is changed to it and the batch recorded again.

    Args:
        record: runs the plain pass that fills the prefix cache.
        compile: run the stacked passes through ``torch.compile``.
        compile_prefix: what lies before the gates as well, in place of remembering it.
    """

    def __init__(
        self,
        network: Network,
        record: Callable[[Batch], Any],
        compile: bool = False,
        compile_prefix: bool = False,
    ) -> None:
        self.network = network
        self.record = record
        self.stacked = True
        self.compiler = (
            PassCompiler(network, self._stacked, not compile_prefix) if compile else None
        )

    def __call__(
        self,
        batch: Batch,
        gates: Mapping[str, Tensor],
        probes: Mapping[str, list[Tensor]],
        overrides: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> tuple[Any, Inputs]:
        """One pass.

        Args:
            gates: [V, C] per site.
            probes: per site one [V, *output shape] tensor for every call of its module; what these
                sites were called with is returned.
            overrides: [V, ...] outputs that replace those of the named modules.

        Returns:
            The model's outputs, every tensor [V, ...]; and [V, ...] inputs of the probed sites, where
            what all variants share is expanded (stride 0).
        """

        if self.stacked:
            run = self._stacked if self.compiler is None else self.compiler
            try:
                return run(batch, gates, probes, overrides)
            except (RuntimeError, ValueError) as error:
                mixed = bool(self.network.lowered) and "dtype" in str(error)
                if isinstance(error, SingeError) or is_out_of_memory(error) or mixed:
                    raise
                if self.network.channels_last:  # torch.group_norm cannot ask for it in vmap
                    self.network.set_channels_last(False)
                    self.record(batch)
                    return self(batch, gates, probes, overrides)
                self.stacked = False
                warnings.warn(
                    f"variants run one after the other, which is slower: torch.vmap cannot run this "
                    f"model ({first_line(error)})",
                    stacklevel=2,
                )
        count = len(next(iter((*gates.values(), *overrides.values()))))
        structure: list[Structure] = []
        runs = [
            self._run(
                batch,
                structure,
                {key: gate[v] for key, gate in gates.items()},
                {key: [t[v] for t in probe] for key, probe in probes.items()},
                {key: output[v] for key, output in overrides.items()},
            )
            for v in range(count)
        ]
        outputs, inputs = tree_map(lambda *slices: torch.stack(slices), *runs)
        return _rebuilt(outputs, *structure[-1]), inputs

    def _stacked(
        self,
        batch: Batch,
        gates: Mapping[str, Tensor],
        probes: Mapping[str, list[Tensor]],
        overrides: Mapping[str, Tensor],
    ) -> tuple[Any, Inputs]:
        structure: list[Structure] = []
        run = torch.vmap(partial(self._run, batch, structure), randomness="same")
        self.network.cache.replay()
        try:
            with warnings.catch_warnings(), sdpa_kernel(ATTENTION):
                # Of global average pooling in a channels-last network: [B, C, 1, 1], so no loss.
                warnings.filterwarnings("ignore", r"There is a performance drop.*aten::as_strided_")
                outputs, inputs = run(dict(gates), dict(probes), dict(overrides))
        finally:
            self.network.cache.stop()
        return _rebuilt(outputs, *structure[-1]), inputs

    def _run(
        self,
        batch: Batch,
        structure: list[Structure],
        gates: Mapping[str, Tensor],
        probes: Mapping[str, list[Tensor]],
        overrides: Mapping[str, Tensor],
    ) -> tuple[list[Tensor], Inputs]:
        """One variant; the shape of the model's outputs, None and floats included, to ``structure``."""
        network = self.network
        network.clear()
        try:
            network.overrides = dict(overrides)
            for key, gate in gates.items():
                network.sites[key].gate = gate
            for key, probe in probes.items():
                network.sites[key].probes = probe
            with torch.autograd.graph.disable_saved_tensors_hooks(CHECKPOINTING):
                leaves, spec = tree_flatten(network(batch))
            structure.append((leaves, spec))
            outputs = [t for t in leaves if isinstance(t, Tensor)]
            return outputs, {key: list(network.sites[key].inputs) for key in probes}
        except RuntimeError as error:
            # Before torch 2.13 vmap meets a function of checkpoint's own first.
            if CHECKPOINTING in str(error) or "_NoopSaveInputs" in str(error):
                raise ModelError(CHECKPOINTING) from error
            raise
        finally:
            network.clear()


def _rebuilt(tensors: list[Tensor], leaves: list[Any], spec: TreeSpec) -> Any:
    """The model's outputs with their tensors replaced, in order."""
    rest = iter(tensors)
    return tree_unflatten([next(rest) if isinstance(t, Tensor) else t for t in leaves], spec)


def variant(outputs: Any, index: int) -> Any:
    """One variant's outputs."""
    return tree_map(lambda t: t[index] if isinstance(t, Tensor) else t, outputs)
