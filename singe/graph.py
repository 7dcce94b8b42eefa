"""What can be removed from a model: its groups of coupled channels; and private copies to work on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from singe.conv1d import is_transposed
from singe.errors import ModelError, expect
from singe.gates import BATCH_NORMS
from singe.heads import Heads

ROWS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NORMS = (*BATCH_NORMS, nn.LayerNorm, nn.GroupNorm)
QUANTIZED = ("torch.ao.nn.quantized", "torch.nn.quantized")
FUSED = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)


@dataclass(frozen=True)
class Member:
    """One layer in which the units of a group have channels.

    Attributes:
        name: the module's name in the model.
        kind: ``"rows"`` (a conv or linear whose output channels the units are), ``"norm"`` (a
            normalisation that is not folded into a row), ``"custom"`` (a registered layer),
            ``"input"`` (a consumer that needs a gate because something between maps 0 to another
            value).
        channels: int64 [U, m]; the m channels of the module that belong to each unit.
    """

    name: str
    kind: str
    channels: Tensor

    def is_whole(self, n_channels: int) -> bool:
        """Whether unit u is channel u of a module with ``n_channels``, so nothing needs gathering."""
        flat = self.channels.flatten()
        return len(flat) == n_channels and torch.equal(flat, torch.arange(n_channels, device="cpu"))


@dataclass(frozen=True)
class Group:
    """Units that live in the same coupled layers; removed one by one, each as a whole.

    Attributes:
        name: the root module's name.
        n_units: number of units U.
        root_channels: int64 [U, m]; the root module's output channels of each unit (m > 1 where a
            grouped convolution or GroupNorm forces channels to go together).
        members: every layer that holds parameters or gates of the units.
        consumers: ``"input"`` members: the layers that read the units.
        units: layer -> int64 [C_out], the unit that each of its output channels belongs to, -1 where it
            is another group's. Channels of a unit need not be neighbours, nor at equal distances.
        heads: where the units are the heads of an attention module, what each takes with it.
    """

    name: str
    n_units: int
    root_channels: Tensor
    members: tuple[Member, ...]
    consumers: tuple[Member, ...] = field(default=(), repr=False)
    suspicious: bool = field(default=False, repr=False)
    units: Mapping[str, Tensor] = field(default_factory=dict, repr=False, hash=False)
    heads: Heads | None = field(default=None, repr=False, hash=False)

    @property
    def rows(self) -> tuple[Member, ...]:
        return tuple(m for m in self.members if m.kind == "rows")

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the convs and linears whose output channels the units are."""
        return tuple(self.heads.rows) if self.heads else tuple(m.name for m in self.rows)

    def with_input_gates(self, names: set[str]) -> Group:
        """The same group with gates at the inputs of the named consumers."""
        gated = tuple(m for m in self.consumers if m.name in names)
        return replace(self, members=self.members + gated)


@dataclass(frozen=True)
class ModelGraph:
    """All groups of a model, the norms that fold into rows, and what was left out and why.

    Attributes:
        folds: conv or linear -> the BatchNorm that directly follows it.
        rejected: root layer -> reason.
        rejected_layers: every layer of those groups -> root layer.
        overwritten: layers whose input the model writes over once they have read it (``x += block(x)``).
    """

    groups: tuple[Group, ...]
    folds: dict[str, str]
    rejected: dict[str, str]
    rejected_layers: dict[str, str]
    overwritten: frozenset[str] = frozenset()


def width_of(module: Any, is_out: bool = True) -> int:
    """Output or input channels of a layer; those of a norm."""
    if is_transposed(module):
        return int(module.nf if is_out else module.nx)
    for name in ("out_channels", "out_features") if is_out else ("in_channels", "in_features"):
        if hasattr(module, name):
            return int(getattr(module, name))
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1]
    return int(getattr(module, "num_features", None) or module.num_channels)


def is_inside(name: str, root: str) -> bool:
    """Whether a module is ``root`` or in it; the model itself has the name ""."""
    return root in ("", name) or name.startswith(root + ".")


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside a ``torch.compile`` or data-parallel wrapper, else the model itself."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    inner = getattr(model, "_orig_mod", model)
    return inner if inner is model else unwrapped(inner)


def expect_model(model: object) -> None:
    """Raise what a user should read where something is no module, or one that nothing can be cut from.

    Raises:
        OptionError: no module.
        ModelError: TorchScript, quantized, on the meta device or on several, or layers without sizes yet.
    """
    expect("model", model, nn.Module, "an nn.Module")
    assert isinstance(model, nn.Module)
    if isinstance(unwrapped(model), torch.jit.ScriptModule):
        raise ModelError(
            "a TorchScript model cannot be changed; give the nn.Module it was made from"
        )
    if meta := next((n for n, t in named_tensors(model) if t.is_meta), None):
        raise ModelError(
            f"{meta} is on the meta device, so it has no values; load the weights before"
        )
    quantized = (
        n for n, m in model.named_modules()
        if type(m).__module__.startswith(QUANTIZED) and "FloatFunctional" not in type(m).__name__
    )  # fmt: skip
    if name := next(quantized, None):
        raise ModelError(f"{name} is quantized; score and prune the float model, then quantize it")
    devices = sorted({str(p.device) for p in model.parameters()})
    if len(devices) > 1:
        raise ModelError(
            f"the parameters are on {', '.join(devices)}; move the model to one device, "
            f"model.to({devices[-1]!r})"
        )
    lazy = (n for n, p in model.named_parameters() if nn.parameter.is_lazy(p))
    if name := next(lazy, None):
        raise ModelError(f"{name} has no size yet; run the model once, model(inputs), before")


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """All parameters and buffers, by the names that the unwrapped model has for them."""
    bare = unwrapped(model)
    return [*bare.named_parameters(), *bare.named_buffers()]


def private_copy(model: nn.Module, trainable: bool = False, fast_path: bool = False) -> nn.Module:
    """A copy with its own module tree and buffers that shares the parameters' storage.

    Nothing that happens to the copy's ``.grad``, ``requires_grad``, hooks, mode or buffers reaches
    the original; writing into a parameter in place would, so nobody does.

    Args:
        fast_path: leave torch its fused inference kernels for attention, which have neither derivative
            nor vmap rule; for timing.

    Raises:
        ModelError: the model cannot be deep-copied.
    """
    model = unwrapped(model)
    memo: dict[int, Any] = {
        id(p): nn.Parameter(
            p.detach().clone() if p.is_inference() else p.detach(),
            requires_grad=trainable and p.is_floating_point(),
        )
        for p in model.parameters()
    }
    memo.update({id(b): b.detach().clone() for b in model.buffers()})
    memo.update({id(t): t.detach().clone() for t in _remembered(model)})
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied with copy.deepcopy{_culprit(model)} ({error}); a "
            "model must be deep-copyable to be scored without being touched"
        ) from error
    for module in twin.modules():
        if not isinstance(module, FUSED):
            continue
        forward = module.forward
        patched = isinstance(forward, partial) and forward.func is _without_fast_path
        if fast_path and patched:
            del module.forward
        elif not fast_path and not patched:
            setattr(module, "forward", partial(_without_fast_path, forward))  # noqa: B010
    return twin.eval()


def separate_copy(model: nn.Module) -> nn.Module:
    """A copy that shares nothing, as copy.deepcopy makes it; of tensors that were kept, the values."""
    model = unwrapped(model)
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in _remembered(model)})


def _remembered(model: nn.Module) -> Iterator[Tensor]:
    """What forward passes have left in attributes (features, attention maps); torch copies leaves only."""
    for module in model.modules():
        for name, value in vars(module).items():
            kept = [t for t in tree_leaves(value) if isinstance(t, Tensor) and not t.is_leaf]
            # Looked for last: torch formats an error for every attribute that is not there.
            if kept and not any(hasattr(module, f"{name}_{part}") for part in ("orig", "g")):
                yield from kept


def _culprit(model: nn.Module) -> str:
    """The layer that holds a computed tensor, which torch does not copy, and what to do about it."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if not isinstance(value, Tensor) or value.is_leaf:
                continue
            where = f"{name}.{attribute}".lstrip(".")
            if hasattr(module, f"{attribute}_orig"):
                return f": {where} is masked; torch.nn.utils.prune.remove(layer, {attribute!r}) ends that"
            if hasattr(module, f"{attribute}_g"):
                return f": {where} is normed; torch.nn.utils.remove_weight_norm(layer) ends that"
    return ""


def _without_fast_path(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """torch's fused inference kernels for attention have no derivative and no vmap rule."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return forward(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
