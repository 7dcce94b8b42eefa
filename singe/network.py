"""A private copy of a model in which every unit has a gate that can be set, per variant, from outside.

The copy is exact at gate 1: a BatchNorm that directly follows a convolution or linear layer is folded
into it, every other normalisation keeps its place. At gate 0 it computes what the model computes once
the unit has been physically removed:

- rows (conv, linear): ``out = gate * y + probe``. The gate multiplies weights and folded bias alike;
  the gradient with respect to the zero probe is the adjoint behind the gate.
- BatchNorm that is not folded: ``a x + gate * shift``: what arrives is gated already, only the shift
  remains to be.
- LayerNorm, GroupNorm: mean and variance are taken over the channels weighted by their gates, so a
  removed channel leaves the statistics; the shift is gated as above.
- a registered layer: what :func:`singe.gates.register_layer` was given.
- input of a layer: ``gate * x``, where an activation between maps 0 to something else (sigmoid).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from singe import stacked
from singe.conv1d import with_linears
from singe.data import Batch, in_channels_last
from singe.gates import (
    BATCH_NORMS,
    REGISTRY,
    Dialect,
    dialect,
    matching_rows,
    per_channel,
    weighted_norm,
)
from singe.graph import Group, Member, private_copy
from singe.kernels.masked_forward import masked_forward
from singe.prefix import PrefixCache
from singe.rows import rows_of
from singe.slim import SlimMultiheadAttention, open_attention


@dataclass
class Site:
    """Where a gate sits: one module of the private copy, and what this pass does there.

    Attributes:
        key: ``name`` for rows and norms, ``name + ":input"`` for input gates.
        full: the module's rows and bias before any change of precision (rows only).
        copies: whether it notes copies of its inputs, since they are written over.
        gate: [C], one factor per channel, or [B, C], for every sample its own; None for the plain network.
        probes: one zero tensor per call of the module, in the shape of its output, or empty.
        inputs: what the module was called with in this pass (rows only, when it has probes).
        outputs: shape and dtype of what it returned, call by call, in the last recording pass, as
            expanded scalars (rows only).
    """

    key: str
    kind: str
    module: Any
    channels: int
    full: tuple[Tensor, ...] = ()
    copies: bool = False
    gate: Tensor | None = None
    probes: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    calls: int = 0

    @property
    def channel_dim(self) -> int:
        return -1 if isinstance(self.module, nn.Linear | nn.LayerNorm) else 1

    @property
    def weight(self) -> Tensor:
        """[C, K] rows with the folded bias, if there is one, as last column, in full precision."""
        rows = self.full[0].flatten(1)
        return torch.cat([rows, *(bias[:, None] for bias in self.full[1:])], 1)

    @property
    def row_size(self) -> int:
        """K, the entries of one row with its bias."""
        return sum(tensor[0].numel() for tensor in self.full)

    def clear(self) -> None:
        """Open the gate and forget the pass."""
        self.gate, self.probes, self.inputs, self.calls = None, [], [], 0


def gate_rows(y: Tensor, gate: Tensor, probe: Tensor | None, dim: int) -> Tensor:
    """``gate * y + probe`` through the masked-forward kernel.

    Args:
        y: [B, C, *X] (dim 1) or [B, *X, C] (dim -1).
        gate: [C], or [B, C].
        probe: like ``y`` or None.
    """
    # The rule that vmap has for the op takes 0.3 ms per call, more than a small layer.
    at_once = stacked.in_one_vmap() and stacked.differs(gate)  # else a vmap of the model's own

    def canonical(t: Tensor) -> Tensor:  # [V or 1, B, C, X] views
        t = stacked.of_all(t) if at_once else t.unsqueeze(0)
        if dim == 1:
            return t.flatten(3) if t.dim() > 3 else t.unsqueeze(3)
        t = t.unsqueeze(2) if t.dim() == 3 else t.flatten(2, -2)
        return t.transpose(2, 3)

    gate = matching_rows(gate, y)
    gate = stacked.of_all(gate) if at_once else gate.unsqueeze(0)
    out = masked_forward(
        canonical(y), gate, residual=None if probe is None else canonical(probe)
    )  # [V, B, C, X]
    out = (out if dim == 1 else out.transpose(2, 3)).reshape(len(out), *y.shape)
    return stacked.of_each(out) if at_once else out.squeeze(0)


def batch_norm_affine(norm: Any) -> tuple[Tensor, Tensor]:
    """``(scale, shift)`` [C] in float64 of a BatchNorm in evaluation mode: ``y = scale x + shift``."""
    mean, var = norm.running_mean.double(), norm.running_var.double()
    scale = (var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift


def fold(row: Any, norm: Any) -> None:
    """Put a BatchNorm's affine map into the layer before it, and make the BatchNorm the identity."""
    scale, shift = batch_norm_affine(norm)
    weight = row.weight.detach()
    if row.bias is not None:
        shift = shift + scale * row.bias.detach().double()
    folded = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    memory_format = torch.channels_last if _is_channels_last(weight) else torch.contiguous_format
    folded = folded.to(weight.dtype).contiguous(memory_format=memory_format)
    row.weight = nn.Parameter(folded, requires_grad=False)
    row.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=False)
    norm.forward = dialect_of(norm).tail


def _pool_by_mean(pool: Any) -> None:
    """Torch takes the mean, too, but then restrides the result, which vmap does one by one."""
    pool.forward = lambda input: input.mean((-2, -1), keepdim=True)


def dialect_of(norm: Any) -> Dialect:
    """The dialect of a norm that :func:`singe.coupling.read_graph` has let through."""
    found = dialect(norm)
    assert found is not None
    return found


def _is_channels_last(weight: Tensor) -> bool:
    return (
        weight.dim() == 4
        and weight.is_contiguous(memory_format=torch.channels_last)
        and not weight.is_contiguous()
    )


class Network:
    """The gated private copy of ``model``.

    Args:
        model: the user's model; never changed.
        groups: the groups whose units get gates.
        folds: conv/linear -> BatchNorm names, see :class:`singe.graph.ModelGraph`, like the next.
        overwritten: layers that note a copy of what they read.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Iterable[Group],
        folds: dict[str, str],
        overwritten: frozenset[str] = frozenset(),
    ) -> None:
        groups = tuple(groups)
        self.module = with_linears(private_copy(model))
        gated = {group.heads.module for group in groups if group.heads is not None}
        for name, module in list(self.module.named_modules()):
            if name in gated or isinstance(module, SlimMultiheadAttention):
                open_attention(module)
        for submodule in self.module.modules():
            if getattr(submodule, "inplace", None) is True:
                setattr(submodule, "inplace", False)  # noqa: B010 - in-place ops would overwrite what is shared by variants
            if type(submodule) is nn.AdaptiveAvgPool2d and submodule.output_size in (1, (1, 1)):
                _pool_by_mean(submodule)
        for row, norm in folds.items():
            fold(self.module.get_submodule(row), self.module.get_submodule(norm))
        self.folded_norms = {self.module.get_submodule(norm) for norm in folds.values()}
        self.cache = PrefixCache(self.module)
        self.lowered: list[tuple[nn.Parameter, Tensor]] = []  # with their float32 values
        self.overrides: dict[str, Tensor] = {}  # modules whose output is given, for this pass
        self.is_recording = False
        self.is_traced = False  # for a compiler, which makes its own kernels of plain operations
        self.channels_last = False
        self.sites: dict[str, Site] = {}
        self.overwritten = overwritten
        members = [m for group in groups for m in group.members]
        for member in sorted(members, key=lambda m: m.kind == "input"):  # input gates outermost
            self._install(member)

    def _install(self, member: Member) -> None:
        key = site_key(member)
        if key in self.sites:
            return
        module: Any = self.module.get_submodule(member.name)
        layer = member.name
        if isinstance(module, nn.MultiheadAttention):
            module, layer = module.in_proj, f"{layer}.in_proj"
        if member.kind == "input":
            channels = getattr(module, "in_channels", None) or module.in_features
        elif member.kind == "rows":
            channels = rows_of(module, module.weight).shape[0]
        elif member.kind == "custom":
            channels = REGISTRY[type(module)].pruner.get_out_channels(module)
        elif isinstance(module, nn.LayerNorm):
            channels = module.normalized_shape[-1]
        else:
            channels = getattr(module, "num_features", None) or module.num_channels
        full: tuple[Tensor, ...] = ()
        if member.kind == "rows":
            full = (rows_of(module, module.weight.detach()),)
            full += () if module.bias is None else (module.bias.detach(),)
        site = Site(key, member.kind, module, int(channels), full, layer in self.overwritten)
        module.forward = self._counted(module, _GATED[member.kind](self, site, module.forward))
        self.sites[key] = site

    def _counted(self, module: nn.Module, gated: Forward) -> Forward:
        """Some gates compute what the module would without calling it: its calls count all the same."""

        def counted(*args: Tensor, **named: Any) -> Tensor:
            calls = self.cache.calls(module)
            out = gated(*args, **named)
            self.cache.passed_over(module, calls + 1)
            return out

        return counted

    def __call__(self, batch: Batch) -> Any:
        """Outputs with whatever gates and probes are set."""
        for site in self.sites.values():
            site.inputs, site.calls = [], 0
        return (in_channels_last(batch) if self.channels_last else batch).call(self.module)

    def set_channels_last(self, wanted: bool) -> None:
        """Store the copy's images and convolution weights channels-last, or contiguous."""
        self.channels_last = wanted
        layout = torch.channels_last if wanted else torch.contiguous_format
        for parameter in self.module.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=layout)
        self.lowered = [
            (p, t.contiguous(memory_format=layout) if t.dim() == 4 else t) for p, t in self.lowered
        ]

    def clear(self) -> None:
        """All gates open, nothing recorded, nothing overridden."""
        self.overrides = {}
        for site in self.sites.values():
            site.clear()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Plain passes in here fill the prefix cache and note the outputs at the gates."""
        for site in self.sites.values():
            site.outputs = []
        self.cache.record()
        self.is_recording = True
        low = [parameter.data for parameter, _ in self.lowered]
        for parameter, full in self.lowered:
            parameter.data = full
        try:
            yield
        finally:
            for (parameter, _), data in zip(self.lowered, low, strict=True):
                parameter.data = data
            self.is_recording = False
            self.cache.recorded()

    def open_gate(self, key: str) -> Tensor:
        """A single open gate of a site: 1 in its accumulation dtype, on its device."""
        like = next(chain(self.sites[key].module.parameters(), self.module.parameters()))
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return torch.ones((), dtype=dtype, device=like.device)


def site_key(member: Member) -> str:
    """Key of a member's site in :attr:`Network.sites`."""
    return f"{member.name}:input" if member.kind == "input" else member.name


def set_gates(network: Network, units: Iterable[tuple[Group, Iterable[int]]], value: float) -> None:
    """Set the gates of some units to ``value`` and of all others to 1."""
    network.clear()
    for group, indices in units:
        chosen = list(indices)
        for member in group.members:
            site = network.sites[site_key(member)]
            if site.gate is None:
                site.gate = network.open_gate(site.key).repeat(site.channels)
            site.gate[member.channels[chosen].flatten()] = value


Forward = Callable[..., Tensor]


def _gated_rows(network: Network, site: Site, forward: Forward) -> Forward:
    def gated(input: Tensor, *more: Any, **named: Any) -> Tensor:  # ``output_size``
        y = forward(input, *more, **named)
        call, site.calls = site.calls, site.calls + 1
        if network.is_recording:
            dtype = network.cache.dtype or y.dtype
            site.outputs.append(y.new_empty((), dtype=dtype).expand(y.shape))
        if site.probes:
            site.inputs.append(input.clone() if site.copies else input)
        if site.gate is None:
            return y
        probe = site.probes[call] if site.probes else None
        if network.is_traced:
            out = per_channel(site.gate.to(y.dtype), y, site.channel_dim) * y
            return out if probe is None else out + probe
        return gate_rows(y, site.gate, probe, site.channel_dim)

    return gated


def _gated_input(network: Network, site: Site, forward: Forward) -> Forward:
    def gated(input: Tensor) -> Tensor:
        if site.gate is not None:
            input = input * per_channel(site.gate.to(input.dtype), input, site.channel_dim)
        return forward(input)

    return gated


def _gated_norm(network: Network, site: Site, forward: Forward) -> Forward:
    norm = site.module
    spoken = dialect_of(norm)
    if isinstance(norm, BATCH_NORMS):
        scale, shift = batch_norm_affine(norm)

        def gated(input: Tensor) -> Tensor:
            if site.gate is None:
                return forward(input)
            # Written out, so that nothing but zeros comes out where nothing but zeros goes in.
            a, b = scale.to(input.dtype), (site.gate * shift).to(input.dtype)
            return spoken.tail(input * per_channel(a, input, 1) + per_channel(b, input, 1))

    else:

        def gated(input: Tensor) -> Tensor:
            if site.gate is None:
                return forward(input)
            if spoken.dim == 1 and isinstance(norm, nn.LayerNorm):
                out = weighted_norm(norm, input.movedim(1, -1), site.gate).movedim(-1, 1)
            else:
                out = weighted_norm(norm, input, site.gate)
            return spoken.tail(out)

    return gated


def _gated_custom(network: Network, site: Site, forward: Forward) -> Forward:
    entry = REGISTRY[type(site.module)]

    def gated(input: Tensor) -> Tensor:
        if site.gate is None:
            return forward(input)
        gate = per_channel(site.gate.to(input.dtype), input, entry.channel_dim)
        return entry.gate(site.module, forward, input, gate)

    return gated


_GATED: dict[str, Callable[[Network, Site, Forward], Forward]] = {
    "rows": _gated_rows,
    "norm": _gated_norm,
    "custom": _gated_custom,
    "input": _gated_input,
}
