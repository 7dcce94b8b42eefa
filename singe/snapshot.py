"""A model put back exactly as it was when something fails half-way."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn


class Snapshot:
    """Context manager: on an exception (Ctrl-C included) the model is restored.

    The very parameter objects with their values, shapes, dtypes and layouts, their ``.grad`` and
    ``requires_grad``, buffers, plain attributes such as ``out_channels``, and modes are put back. Costs one
    copy of the parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            (module, type(module), {k: _shallow(v) for k, v in module.__dict__.items()})
            for module in model.modules()
        ]
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
            # Copies again: what is changed after this must not reach the next restore.
            module.__dict__.update({k: _shallow(v) for k, v in state.items()})
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


def _shallow(value: Any) -> Any:
    return value.copy() if isinstance(value, dict | list) else value
