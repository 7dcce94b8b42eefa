"""Captum's way of asking, for channels: relevances with a convergence delta.

    relevance = ChannelIntegratedGradients(model, model.layer1[0].conv1)
    attributions, delta = relevance.attribute(inputs, target=labels, return_convergence_delta=True)

Captum integrates over inputs or activations; here the path runs over the channels' gates, from 1 (the
network) to 0 (the network without them). Captum itself is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from singe.data import has_samples
from singe.errors import DataError, OptionError
from singe.plain import plain, plain_count
from singe.quadrature import by_name
from singe.scores import Scores
from singe.scoring import score

METHODS = (
    "gausslegendre",
    "riemann_left",
    "riemann_right",
    "riemann_middle",
    "riemann_trapezoid",
)


class ChannelIntegratedGradients:
    """Relevance of a layer's output channels: the rise of the loss that their removal causes.

    Args:
        forward_func: the model, an ``nn.Module`` (the gates sit in its layers).
        layer: a layer or several, modules or names; channels that are coupled with theirs go together.
        path: ``"neuron"`` (default: each channel alone, its relevance is exact up to quadrature) or
            ``"layer"`` (all channels of a layer together: they share its loss change out).
    """

    def __init__(
        self,
        forward_func: nn.Module,
        layer: str | nn.Module | Sequence[str | nn.Module],
        path: str = "neuron",
    ) -> None:
        if not isinstance(forward_func, nn.Module):
            raise OptionError(
                "forward_func must be an nn.Module: the gates sit in its layers; wrap a function of "
                "the model in a Module"
            )
        if path not in ("neuron", "layer"):
            raise OptionError(f"path={path!r} is not offered; choose 'neuron' or 'layer'")
        self.forward_func, self.path = forward_func, path
        self.single = isinstance(layer, str | nn.Module)
        self.layers = [layer] if isinstance(layer, str | nn.Module) else list(layer)
        if not self.layers:
            raise OptionError("layer is an empty list; name one layer at least")
        self.scores: Scores | None = None

    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        baselines: None = None,
        target: Tensor | Sequence[int] | int | None = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
    ) -> Any:
        """Channel relevances, higher = removing it costs more.

        Args:
            inputs: the model's inputs, batch first.
            baselines: only None: the baseline is the gate at 0.
            target: class indices, [B] or a list, or one for all: cross-entropy's. None: the divergence from
                the model's own output ("kl").
            additional_forward_args: passed on behind ``inputs``.
            n_steps: nodes of the integral.
            method: Captum's names of the rules.
            internal_batch_size: samples per pass; does not change the result.
            return_convergence_delta: also return integral minus true loss change.

        Returns:
            float32 [C] for one layer, one number per unit where channels can only go together (grouped
            convolutions); for several layers, or a container of several, a dict by group. With the delta in
            a pair: [C] on the neuron path, [1] on the layer path.

        Raises:
            OptionError: a method or baseline that is not offered.
            DataError: no samples, or targets that do not fit.
        """
        if baselines is not None:
            raise OptionError("baselines: the path ends at closed gates; only None is offered")
        if method not in METHODS:
            raise OptionError(f"method={method!r} is not offered; choose from {list(METHODS)}")
        arguments = inputs if isinstance(inputs, tuple) else (inputs,)
        extra = additional_forward_args
        if extra is not None:
            arguments += extra if isinstance(extra, tuple) else (extra,)
        if not isinstance(arguments[0], Tensor) or arguments[0].dim() == 0 or not len(arguments[0]):
            raise DataError(
                f"inputs must be a tensor of samples, batch first; got {_told(arguments[0])}"
            )
        size = len(arguments[0])
        labels = None if target is None else _labels(target, size).to(arguments[0].device)
        if internal_batch_size is not None:
            internal_batch_size = plain_count("internal_batch_size", internal_batch_size, 1)
        rule = by_name(method, n_steps)
        self.scores = score(
            self.forward_func,
            _batches(arguments, labels, internal_batch_size or size),
            objective="kl" if target is None else "cross_entropy",
            criterion="signed",
            path=self.path,
            quadrature=rule,
            layers=self.layers,
            progress=False,
        )
        completeness = self.scores.completeness
        assert completeness is not None  # criterion "signed" always has one
        values, delta = dict(self.scores), dict(completeness)
        if self.single and len(values) == 1:
            ((values, delta),) = zip(values.values(), delta.values(), strict=True)  # type: ignore[assignment]
        return (values, delta) if return_convergence_delta else values

    def has_convergence_delta(self) -> bool:
        """Captum asks this."""
        return True


def _told(value: Any) -> str:
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    return f"a {type(value).__name__}{shape}"


def _labels(target: Any, size: int) -> Tensor:
    """int64 [B] from what Captum takes as the classes of single-label outputs."""
    one = plain(target)
    if isinstance(one, int):
        return torch.full((size,), one, device="cpu")
    labels = torch.as_tensor(target, device="cpu")
    if labels.shape != (size,) or labels.is_floating_point():
        raise DataError(
            f"target must be one class, or one for each of the {size} samples; got {target!r}"
        )
    return labels


def _batches(arguments: tuple[Any, ...], target: Tensor | None, size: int) -> list[Any]:
    batches = []
    total = len(arguments[0])
    for start in range(0, total, size):
        part = tuple(a[start : start + size] if has_samples(a, total) else a for a in arguments)
        batches.append((part,) if target is None else (part, target[start : start + size]))
    return batches
