"""What a normalisation or a user's own layer does to the channels of a gated unit.

Norms come in dialects: ``LayerNorm2d`` normalises dimension 1, timm's norm-act layers append an
activation. :func:`dialect` finds out which one a module speaks by running it on a few random numbers;
one that speaks none is refused by name; :func:`weighted_norm` is one whose channels count as much as
their gates are open. Layers of the user's own are taught by :func:`register_layer`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

from singe.errors import ModelError, OptionError

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

Tail = Callable[[Tensor], Tensor]
Gate = Callable[[Any, Callable[..., Tensor], Tensor, Tensor], Tensor]


def _nothing(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Dialect:
    """How a norm's module differs from torch's own.

    Attributes:
        dim: the dimension of its channels, 1 or -1.
        tail: what it does behind the affine map.
    """

    dim: int
    tail: Tail


@torch.no_grad()
def dialect(norm: Any) -> Dialect | None:
    """The dialect of a BatchNorm, LayerNorm or GroupNorm in evaluation mode; None: none that is known."""
    own_dim = -1 if isinstance(norm, nn.LayerNorm) else 1
    forward = type(norm).forward
    if any(c.__module__.startswith("torch.") and c.__dict__.get("forward") is forward
           for c in type(norm).__mro__):  # fmt: skip
        return Dialect(own_dim, _nothing)
    tails: list[Tail] = [_nothing]
    if hasattr(norm, "act"):
        drop = getattr(norm, "drop", _nothing)
        tails.append(lambda x: norm.act(drop(x)))
    weight = norm.weight if norm.weight is not None else getattr(norm, "running_mean", None)
    if weight is None:
        return None
    channels = weight.numel()
    generator = torch.Generator().manual_seed(0)
    for dim in dict.fromkeys((1, own_dim)):
        # Other sizes than the number of channels, so that the wrong dimension fails.
        shape = [2, 3, 5, channels] if dim == -1 else [2, channels, 3, 5]
        x = torch.randn(shape, generator=generator, device="cpu").to(weight)
        try:
            found = forward(norm, x)
        except Exception:  # the wrong dimension
            continue
        for tail in tails:
            plain = tail(_torch_norm(norm, x, dim))
            if plain.shape == found.shape and torch.allclose(plain, found, atol=1e-5, rtol=1e-4):
                return Dialect(dim, tail)
    return None


def _torch_norm(norm: Any, x: Tensor, dim: int) -> Tensor:
    if isinstance(norm, BATCH_NORMS):
        return F.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )
    if isinstance(norm, nn.GroupNorm):
        return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    moved = x.movedim(dim, -1)
    out = F.layer_norm(moved, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return out.movedim(-1, dim)


# ------------------------------------------------------------------ half-open gates


def per_channel(vector: Tensor, like: Tensor, dim: int) -> Tensor:
    """[C], or [B, C] with a row for every sample -> broadcastable against ``like``.

    Raises:
        ModelError: the first dimension of ``like`` is not that of the samples.
    """
    vector = matching_rows(vector, like)
    shape = [1] * like.dim()
    shape[dim] = vector.shape[-1]
    if vector.dim() == 2:
        shape[0] = len(vector)
    return vector.reshape(shape)


def matching_rows(vector: Tensor, like: Tensor) -> Tensor:
    """[C] or [B, C] where the first dimension of ``like`` is B; a single row serves any number of them.

    Raises:
        ModelError: that is another dimension.
    """
    if vector.dim() == 2 and len(vector) == 1:
        return vector[0]
    if vector.dim() == 2 and len(vector) != len(like):
        raise ModelError(
            f"p='fisher': a gate for each of {len(vector)} samples meets a tensor of shape "
            f"{list(like.shape)}, though other batches of the same shape had one row per sample there"
        )
    return vector


def weighted_norm(norm: Any, x: Tensor, gate: Tensor) -> Tensor:
    """LayerNorm or GroupNorm over channels that count as much as their gates are open.

    ``n = sum_c g_c``, ``mean = sum_c g_c v_c / n``, ``var = sum_c g_c (v_c - mean)^2 / n`` (sums also
    over positions), ``out_c = g_c (scale_c (v_c - mean) / sqrt(var + eps) + shift_c)``. What arrives is
    gated already, ``x_c = g_c v_c``. At gates of 0 and 1 this is the norm over the channels that remain.

    Args:
        norm: LayerNorm over the last dimension or GroupNorm.
        x: [B, *, C] for LayerNorm, [B, C, *] for GroupNorm.
        gate: [C], or [B, C].
    """
    gate = gate.to(x.dtype)
    eps = float(norm.eps)
    if isinstance(norm, nn.LayerNorm):
        dim, out = -1, _standardise(x, per_channel(gate, x, -1), (-1,), 1, eps)
    else:
        blocks = int(norm.num_groups)
        cut = x.reshape(x.shape[0], blocks, x.shape[1] // blocks, -1)
        g = per_channel(gate, x, 1).reshape(-1, blocks, cut.shape[2], 1)
        dim, out = 1, _standardise(cut, g, (2, 3), cut.shape[3], eps).reshape(x.shape)
    if norm.weight is not None:
        out = out * per_channel(norm.weight, x, dim)
    if norm.bias is not None:
        out = out + per_channel(norm.bias * gate, x, dim)
    return out


def _standardise(
    x: Tensor, gate: Tensor, dims: tuple[int, ...], positions: int, eps: float
) -> Tensor:
    # The clamps only matter where gates are 0: 0 / tiny stays 0, not NaN.
    n = gate.sum(dims[0], keepdim=True).clamp(min=1e-6) * positions
    mean = x.sum(dims, keepdim=True) / n
    centred = x - gate * mean
    squares = centred.square() / gate.clamp(min=torch.finfo(x.dtype).tiny)
    return centred * (squares.sum(dims, keepdim=True) / n + eps).rsqrt()


# ------------------------------------------------------------------ layers of the user's own


@dataclass(frozen=True)
class Registered:
    """What :func:`register_layer` was told."""

    pruner: Any
    gate: Gate
    channel_dim: int


REGISTRY: dict[type[nn.Module], Registered] = {}


def registered(module: nn.Module) -> Registered | None:
    """The entry of a module's exact class."""
    return REGISTRY.get(type(module))


def gate_output(
    module: nn.Module, forward: Callable[..., Tensor], x: Tensor, gate: Tensor
) -> Tensor:
    """The default gate of a registered layer: its output times the gate."""
    return forward(x) * gate


def register_layer(
    layer_type: type[nn.Module],
    *,
    parameters: Mapping[str, int],
    sizes: tuple[str, ...] = (),
    gate: Gate = gate_output,
    channel_dim: int = 1,
) -> None:
    """Teach ``singe`` a layer that hands its channels through one by one (a norm, a scale, a bias).

    Its parameters are then cut together with the layers around it, and its gate takes part in the
    scores with the derivative along it. Every group is checked on the model before it is offered:
    a wrong gate or dimension ends up in ``scores.meta["rejected"]``, not in the scores.

    Args:
        layer_type: the class; subclasses need an entry of their own.
        parameters: names of the parameters and buffers with one entry per channel -> the dimension
            of the channels.
        sizes: names of attributes that hold the number of channels; kept up to date.
        gate: ``gate(module, forward, x, gate) -> output``, where ``forward(x)`` is what the layer
            returns and ``gate`` is broadcastable against ``x`` (with ``p="fisher"`` it has a row for every
            sample). At gates of 0 and 1 it must compute what the layer computes without the channels at
            0, and leave zeros in their place.
        channel_dim: the dimension of the channels in input and output, 1 or -1.

    Raises:
        OptionError: no module class, no parameters, or another dimension.
    """
    if not (isinstance(layer_type, type) and issubclass(layer_type, nn.Module)):
        raise OptionError(f"register_layer takes a subclass of nn.Module, got {layer_type!r}")
    if not parameters:
        raise OptionError(
            f"register_layer({layer_type.__name__}) needs the names of its parameters by channel"
        )
    if channel_dim not in (1, -1):
        raise OptionError(f"channel_dim must be 1 or -1, got {channel_dim!r}")
    pruner = _pruner(dict(parameters), tuple(sizes))
    REGISTRY[layer_type] = Registered(pruner, gate, channel_dim)


def unregister_layer(layer_type: type[nn.Module]) -> None:
    """Forget a layer; nothing happens if it is not known."""
    REGISTRY.pop(layer_type, None)


def _pruner(parameters: dict[str, int], sizes: tuple[str, ...]) -> Any:
    """Torch-Pruning's way of cutting such a layer."""
    first, dim = next(iter(parameters.items()))

    class ChannelwisePruner(tp.pruner.function.BasePruningFunc):
        def prune_out_channels(self, layer: nn.Module, idxs: list[int]) -> nn.Module:
            gone = set(idxs)
            keep = [i for i in range(self.get_out_channels(layer)) if i not in gone]
            for name, along in parameters.items():
                owner_name, _, leaf = name.rpartition(".")
                owner = layer.get_submodule(owner_name)
                old = getattr(owner, leaf)
                if old is None:
                    continue
                left = torch.tensor(keep, device=old.device)
                new = old.detach().index_select(along, left)
                if isinstance(old, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=old.requires_grad)
                    if old.grad is not None:
                        new.grad = old.grad.index_select(along, left)
                setattr(owner, leaf, new)
            for name in sizes:
                setattr(layer, name, len(keep))
            return layer

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: nn.Module) -> int:
            owner_name, _, leaf = first.rpartition(".")
            return int(getattr(layer.get_submodule(owner_name), leaf).shape[dim])

        get_in_channels = get_out_channels

    return ChannelwisePruner()


def pruners() -> dict[type[nn.Module], Any]:
    """For Torch-Pruning's ``customized_pruners``."""
    return {layer_type: entry.pruner for layer_type, entry in REGISTRY.items()}
