"""A model put back exactly as it was when something fails half-way."""

from __future__ import annotations

from collections import OrderedDict
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn


class Snapshot:
    """Context manager: on an exception (Ctrl-C included) the model is restored.

    The very parameter objects with their values, shapes, dtypes and layouts, their ``.grad`` and
    ``requires_grad``, buffers, plain attributes such as ``out_channels``, and modes are put back. So are the
    very dicts, lists and sets that modules hold, hooks among them, with what was in them; one that somebody
    else fills meanwhile (a log, a cache) is emptied back as well. Costs one copy of the parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(m, type(m), dict(m.__dict__)) for m in model.modules()]
        held = [value for _, _, state in self._modules for value in state.values()]
        self._containers = [(c, _contents(c)) for c in held if isinstance(c, dict | list | set)]
        tensors = [*model.parameters(), *model.buffers()]
        self._tensors = [(_Saved(t), t.requires_grad, t.grad) for t in tensors]
        self._grads = [_Saved(t.grad) for t in tensors if t.grad is not None]
        self._kept = True

    def discard(self) -> None:
        """The changes are wanted: restore nothing."""
        self._kept = False

    def restore(self) -> None:
        """Put everything back; may be done several times."""
        for module, kind, state in self._modules:
            module.__class__ = kind  # removed heads may have changed it
            module.__dict__.clear()
            module.__dict__.update(state)
        for container, contents in self._containers:
            _refill(container, contents)
        for saved in self._grads:
            saved.restore()
        for saved, requires_grad, grad in self._tensors:
            saved.tensor.grad = None
            saved.restore()
            saved.tensor.requires_grad_(requires_grad)
            saved.tensor.grad = grad

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._kept:
            self.restore()


class _Saved:
    """A tensor with its values, and the form they are in."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self._value, self._form = tensor, tensor.detach().clone(), _form(tensor)

    @torch.no_grad()
    def restore(self) -> None:
        if _form(self.tensor) == self._form:
            self.tensor.copy_(self._value)
        else:  # model.to(...) keeps the parameters and changes what is in them
            self.tensor.data = self._value.clone()


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _contents(container: Any) -> list[Any]:
    kind = _kind(container)
    return list(kind.items(container) if issubclass(kind, dict) else kind.__iter__(container))


def _refill(container: Any, contents: list[Any]) -> None:
    """In place: handles of hooks, and whoever shares the container, know it and no copy."""
    kind = _kind(container)
    kind.clear(container)
    if issubclass(kind, dict):
        for key, value in contents:
            kind.__setitem__(container, key, value)
    elif issubclass(kind, list):
        kind.extend(container, contents)
    else:
        kind.update(container, contents)


def _kind(container: Any) -> Any:
    """The built-in type, whose methods do as they say: a subclass may refuse to be written to."""
    return next(k for k in (OrderedDict, dict, list, set) if isinstance(container, k))
