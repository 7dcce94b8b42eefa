"""Reduced precision: convolutions and linear layers of the private copy in bf16 or fp16.

``torch.autocast`` does not reach inside ``torch.vmap`` (its convolutions complain about the dtype of
the bias), so the copy's own layers are stored in the lower dtype and cast what they are given.
Everything else keeps its float32 parameters; sums over samples are float32 as ever. The plain pass
that fills the prefix cache stays in float32 and only its results are rounded: it runs once per batch,
and the rounding errors of the layers before the gate do not pile up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from singe.graph import ROWS
from singe.network import Network

OFFERED = (torch.bfloat16, torch.float16)


def lower(network: Network, dtype: torch.dtype) -> None:
    """Let the network's convolutions and linear layers compute in ``dtype``."""
    network.cache.dtype = dtype
    attention = {
        child
        for module in network.module.modules()
        # Reads its children's weights itself, unless it was opened for gates.
        if isinstance(module, nn.MultiheadAttention) and not hasattr(module, "in_proj")
        for child in module.modules()
    }
    for module in network.module.modules():
        if module in network.folded_norms:
            continue  # the identity, in whatever precision
        own = [p for p in module.parameters(recurse=False) if p.dtype == torch.float32]
        if isinstance(module, ROWS) and module not in attention:
            for parameter in own:
                network.lowered.append((parameter, parameter.data))
                parameter.data = parameter.data.to(dtype)
            _cast_inputs(network, module, dtype)
        elif own and (not any(True for _ in module.children()) or module in attention):
            _cast_inputs(network, module, torch.float32)


def _cast_inputs(network: Network, module: Any, dtype: torch.dtype) -> None:
    """Let the module see its floating-point arguments in ``dtype``, except in a recorded pass."""
    forward = module.forward

    def cast(value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if is_float else value

    def run(*args: Any, **kwargs: Any) -> Any:
        if network.is_recording:
            return forward(*args, **kwargs)
        return forward(*map(cast, args), **{k: cast(v) for k, v in kwargs.items()})

    module.forward = run
