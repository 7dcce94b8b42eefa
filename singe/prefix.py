"""What lies before the gates does not depend on them: computed once per batch, then replayed.

Every leaf module of the network remembers its output for the current batch. In a later pass a module
whose input does not depend on a gate returns what it remembers; functional operations in between
(additions, views) are cheap and run again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from singe import stacked

Call = tuple[nn.Module, int]  # a leaf, and which of its calls


class PrefixCache:
    """Outputs of the leaf modules for one batch.

    Install before any gate wraps a module's ``forward``, so that what is remembered is ungated.
    """

    def __init__(self, module: nn.Module) -> None:
        self._outputs: dict[Call, Tensor] = {}
        self._recorded: dict[Call, tuple[Tensor, int]] = {}  # as they came, with their versions
        self._overwritten: set[Call] = set()  # calls whose output a later in-place op changes
        self._mode = "off"
        self._calls: Counter[nn.Module] = Counter()  # of every leaf, in this pass
        self.bytes = 0
        self.dtype: torch.dtype | None = None  # what is remembered is rounded to it
        for leaf in module.modules():
            if not any(True for _ in leaf.children()):
                self._wrap(leaf)

    def _wrap(self, leaf: nn.Module) -> None:
        forward = leaf.forward

        def remembered(*args: Any, **kwargs: Any) -> Any:
            if self._mode == "off":
                return forward(*args, **kwargs)
            call = (leaf, self._calls[leaf])
            self._calls[leaf] += 1
            if self._mode == "record":
                out = forward(*args, **kwargs)
                if isinstance(out, Tensor) and not any(
                    out is a for a in args
                ):  # a folded norm hands on its input
                    self._remember(call, out)
                return out
            plain = not kwargs and len(args) == 1 and isinstance(args[0], Tensor)
            if not plain or stacked.differs(args[0]):
                return forward(*args, **kwargs)
            kept = self._outputs.get(call)
            if kept is None:
                return forward(*args)
            return kept.clone() if call in self._overwritten else kept

        leaf.forward = remembered

    def _remember(self, call: Call, out: Tensor) -> None:
        self._recorded[call] = (out, out._version)
        kept = out.clone() if call in self._overwritten else out
        if self.dtype is not None and kept.is_floating_point():
            kept = kept.to(self.dtype)
        self._outputs[call] = kept
        self.bytes += kept.numel() * kept.element_size()

    def record(self) -> None:
        """Start a plain pass that remembers."""
        self.clear()
        self._mode = "record"
        self._calls.clear()

    def recorded(self) -> None:
        """End it: forget what an in-place operation changed afterwards, and copy it next time."""
        self._mode = "off"
        for call, (out, version) in self._recorded.items():
            if out._version != version and call not in self._overwritten:
                self._overwritten.add(call)
                del self._outputs[call]
        self._recorded = {}

    def replay(self) -> None:
        """Start a pass that reuses."""
        self._mode = "replay"
        self._calls.clear()

    @property
    def outputs(self) -> Mapping[Call, Tensor]:
        """What is remembered, by the call."""
        return self._outputs

    @contextmanager
    def replacing(self, outputs: Mapping[Call, Tensor]) -> Iterator[None]:
        """Something else is remembered in here."""
        kept, self._outputs = self._outputs, dict(outputs)
        try:
            yield
        finally:
            self._outputs = kept

    def calls(self, leaf: nn.Module) -> int:
        """How often a leaf was called in this pass."""
        return self._calls[leaf]

    def passed_over(self, leaf: nn.Module, calls: int) -> None:
        """Something stood in for a leaf: it counts as called so many times."""
        self._calls[leaf] = calls

    def stop(self) -> None:
        self._mode = "off"

    def clear(self) -> None:
        """Free the remembered outputs."""
        self._outputs, self._recorded = {}, {}
        self._mode, self.bytes = "off", 0
